"""What fitted dynamics do, with the uncertainty of the embedding: the map of a family of dynamics.

Every function takes a fit and where to look, and returns an `xarray.Dataset` with a dimension `draw`.
"""

from pyro_metassm.analysis.fixed_points import fixed_points as fixed_points
from pyro_metassm.analysis.flow import flow_field as flow_field
from pyro_metassm.analysis.limit_cycles import limit_cycles as limit_cycles
from pyro_metassm.analysis.bifurcation import bifurcation as bifurcation
