"""What fitted dynamics do, with the uncertainty of the embedding: the map of a family of dynamics.

Every function takes a fit and where to look, and returns an `xarray.Dataset` with a dimension `draw`, of the
posterior of the embedding (and of the global sites). Dynamics are the mean of the model's transition, in float64.

The spread over draws is what the posterior leaves open of the embedding and of the model's global sites. The shared
networks of a fit are point estimates, and their errors are in no draw: of the bifurcation study's three fits, 90 %
bands of fixed points hold the truth in 9, 14 and 25 % of the cases. :func:`pyro_metassm.revise` makes the last layer of
these networks a latent, given all recordings: the bands of the revised fits hold it in 94, 97 and 96 %
(`docs/calibration.md`). Draws of another posterior can be passed in place of a recording's name.
"""

from pyro_metassm.analysis.activity import power_spectra as power_spectra
from pyro_metassm.analysis.activity import state_divergence as state_divergence
from pyro_metassm.analysis.activity import variance_explained as variance_explained
from pyro_metassm.analysis.bifurcation import bifurcation as bifurcation
from pyro_metassm.analysis.embedding import embedding_map as embedding_map
from pyro_metassm.analysis.embedding import sensitivity as sensitivity
from pyro_metassm.analysis.fixed_points import fixed_points as fixed_points
from pyro_metassm.analysis.flow import flow_field as flow_field
from pyro_metassm.analysis.interpolation import interpolate as interpolate
from pyro_metassm.analysis.limit_cycles import limit_cycles as limit_cycles
from pyro_metassm.analysis.lyapunov import lyapunov as lyapunov
