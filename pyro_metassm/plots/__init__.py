"""Pictures of fits and their results, with matplotlib. Every function draws into `ax` (or makes one) and
returns it.

- of a fit: `history`; its scores: `forecast_curve`, `adaptation_curve`, `calibration`;
- of recordings: `embedding`; of trials: `trajectories`, `traces`, `trace_panels`, `raster_and_rates`;
- of what `pm.analysis` finds: `flow`, `fixed_points`, `limit_cycles`, `bifurcation`, `interpolation_grid`;
- beside the truth of a simulation: `flow_field`, `true_flow_field`, `flow_comparison`, `align`.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; line styles, markers and lightness differ
as well, so that nothing is lost in grey.
"""

from pyro_metassm._aligning import AffineMap as AffineMap
from pyro_metassm._aligning import align as align
from pyro_metassm.plots.bifurcation import bifurcation as bifurcation
from pyro_metassm.plots.calibration import calibration as calibration
from pyro_metassm.plots.embedding import embedding as embedding
from pyro_metassm.plots.fixed_points import fixed_points as fixed_points
from pyro_metassm.plots.fixed_points import limit_cycles as limit_cycles
from pyro_metassm.plots.flow import flow as flow
from pyro_metassm.plots.flow_field import flow_comparison as flow_comparison
from pyro_metassm.plots.flow_field import flow_field as flow_field
from pyro_metassm.plots.flow_field import true_flow_field as true_flow_field
from pyro_metassm.plots.history import history as history
from pyro_metassm.plots.interpolation import interpolation_grid as interpolation_grid
from pyro_metassm.plots.raster import raster_and_rates as raster_and_rates
from pyro_metassm.plots.scores import adaptation_curve as adaptation_curve
from pyro_metassm.plots.scores import forecast_curve as forecast_curve
from pyro_metassm.plots.traces import trace_panels as trace_panels
from pyro_metassm.plots.traces import traces as traces
from pyro_metassm.plots.trajectories import trajectories as trajectories
