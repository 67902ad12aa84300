"""The amortised sequential posteriors."""

if not __name__.startswith("pyro_metassm."):
    raise ImportError(
        f"import this package as 'pyro_metassm.{__name__}': under its bare name its classes would exist twice"
    )

from pyro_metassm.guides.base import AmortizedGuide as AmortizedGuide
from pyro_metassm.guides.dkf import DKF as DKF
from pyro_metassm.guides.exact import ExactSmoother as ExactSmoother
from pyro_metassm.guides.partially_pooled import PartiallyPooledDKF as PartiallyPooledDKF
from pyro_metassm.sites import check as check
