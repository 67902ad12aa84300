"""The generative models: what a user reads and edits."""

if not __name__.startswith("pyro_metassm."):
    raise ImportError(
        f"import this package as 'pyro_metassm.{__name__}': under its bare name its classes would exist twice"
    )

from pyro_metassm.models.linear_gaussian import LinearGaussian as LinearGaussian
from pyro_metassm.models.meta_ssm import MetaSSM as MetaSSM
