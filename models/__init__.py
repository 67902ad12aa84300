"""The generative models: what a user reads and edits."""

if not __name__.startswith("pyro_metassm."):
    raise ImportError(
        f"import this package as 'pyro_metassm.{__name__}': under its bare name its classes would exist twice"
    )

from pyro_metassm.models.comparisons import GEPS as GEPS
from pyro_metassm.models.comparisons import EmbeddingInput as EmbeddingInput
from pyro_metassm.models.comparisons import FullRank as FullRank
from pyro_metassm.models.comparisons import LinearAdapter as LinearAdapter
from pyro_metassm.models.comparisons import SharedDynamics as SharedDynamics
from pyro_metassm.models.comparisons import SingleSession as SingleSession
from pyro_metassm.models.linear_gaussian import LinearGaussian as LinearGaussian
from pyro_metassm.models.meta_ssm import MetaSSM as MetaSSM
from pyro_metassm.models.partially_pooled import PartiallyPooled as PartiallyPooled
from pyro_metassm.models.revised import Revised as Revised
