"""The flow of learned dynamics, with its posterior spread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.plots import _fields as fields
from pyro_metassm.plots import _given as given
from pyro_metassm.plots._style import BLACK, legend_below, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THIN, THICK = 0.4, 1.5  # points: lines where draws disagree in all, and where they agree
HALF = 0.5  # agreement below which the picture says what thin lines are
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
TRIAL: dict[str, Any] = {"color": BLACK, "linewidth": 0.8, "markersize": 3, "label": "trial, from the dot"}
NOTE: dict[str, Any] = {"fontsize": "x-small", "bbox": BOX, "zorder": 6}


def flow(
    found: xr.Dataset,
    ax: Axes | None = None,
    *,
    at: str | int | None = None,
    paths: xr.DataArray | None = None,
    num_paths: int = 3,
    speed_max: float | None = None,
    colorbar: bool = True,
) -> Axes:
    """Stream lines of learned dynamics on a plane, where data support them.

    The lines follow the mean displacement over the draws and are coloured by the mean speed. They are thick where
    the draws agree, and the thinner the larger the spread of the displacement is beside its mean (root mean square
    over both axes: half of the width is left where they are equal). Grey: no visited state within two cells of the
    grid, where nothing is drawn.

    Args:
        found: of :func:`pyro_metassm.analysis.flow_field`.
        ax: where to draw.
        at: the recording (or point), if the flow was asked for at several.
        paths: trajectories to draw on top, such as ``tree["w=5/posterior/latents"]``: ``(trial, time, latent_dim)``,
            averaged over all other dims; a dot is where one begins, and a legend below the axes says so.
        num_paths: of them.
        speed_max: upper end of the colours (1/s), for pictures beside each other.
        colorbar: add one.

    Returns:
        the axes.

    Raises:
        ValueError: a Dataset of something else, ``at`` that is none of its places, paths of other dims.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> found = pm.analysis.flow_field(fit, ["w=2.5", "w=5"], num_draws=4)
        >>> flow(found, at="w=5").get_ylabel()
        'latent 2'
    """
    given.dataset("flow", found, ("displacement", "speed_mean", "visited"), "pm.analysis.flow_field")
    found = given.one_place("flow", found, at)
    plane = given.Plane.of("flow", found.sizes["latent_dim"], (0, 1), on=found)
    curves = None if paths is None else _paths(paths, found.sizes["latent_dim"], num_paths)
    width = float(found.attrs["bin_width"])
    moved = found["displacement"].transpose("draw", "y", "x", "axis").values / width
    mean, variance = moved.mean(0), moved.var(0).sum(-1)
    length = np.linalg.norm(mean, axis=-1)
    # 1 where all draws are alike, 1/2 where the spread is as large as the mean, towards 0 beyond.
    agreement = length / np.maximum(length + np.sqrt(variance), np.finfo(float).tiny)
    several = moved.shape[0] > 1
    from matplotlib.lines import Line2D

    ax = new_axes(ax)
    top = fields.streams(
        ax,
        found["x_value"].values,
        found["y_value"].values,
        mean,
        found["visited"].values,
        found["speed_mean"].values,
        width=THIN + (THICK - THIN) * agreement if several else 1.2,
        speed_max=speed_max,
    )
    if several and (agreement[found["visited"].values] < HALF).any():
        ax.annotate("thin: draws disagree", (0.98, 0.02), xycoords="axes fraction", ha="right", **NOTE)
    if colorbar:
        fields.colorbar(ax, top, "s", "neither" if speed_max is None else "max")
    for path in () if curves is None else plane(curves):
        ax.plot(*path.T, color=BLACK, linewidth=0.8, alpha=0.8)
        ax.plot(*path[np.isfinite(path).all(-1)][:1].T, "o", color=BLACK, markersize=3)
    plane.label(ax)
    if curves is not None and len(curves):
        legend_below(ax, [Line2D([], [], marker="o", **TRIAL)])
    ax.set_xlim(*found["x_value"].values[[0, -1]])
    ax.set_ylim(*found["y_value"].values[[0, -1]])
    place = next((found[dim].item() for dim in given.PLACES if dim in found.coords), None)
    if place is not None:
        ax.set_title(str(place), fontsize="medium")
    return ax


# ---- parts -----------------------------------------------------------------------------------------------


def _paths(paths: xr.DataArray, size: int, number: int) -> np.ndarray:
    """Some trials' mean paths ``(trial, time, latent_dim)``."""
    checks.integers(least=0, num_paths=number)
    needed = ("trial", "time", "latent_dim")
    lacking = [dim for dim in needed if dim not in getattr(paths, "dims", ())]
    if lacking or paths.sizes["latent_dim"] != size:
        raise ValueError(
            f"flow: needed paths (trial, time, latent_dim) of {size} latents, got "
            + (f"the sizes {dict(paths.sizes)}" if isinstance(paths, xr.DataArray) else type(paths).__name__)
        )
    others = [dim for dim in paths.dims if dim not in needed]
    return paths.isel(trial=slice(number)).mean(others).transpose(*needed).values
