"""Fixed points and limit cycles of learned dynamics on a plane: where they are, of which kind, and how sure."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm.plots import _given as given
from pyro_metassm.plots._style import BLACK, BLUE, ORANGE, ellipse, legend_below, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Marker and filling by type: filled is stable, open unstable, the cross is a saddle.
KINDS: dict[str, dict[str, Any]] = {
    "stable node": {"marker": "o", "markerfacecolor": BLUE},
    "stable focus": {"marker": "D", "markerfacecolor": BLUE},
    "unstable node": {"marker": "o", "markerfacecolor": "white"},
    "unstable focus": {"marker": "D", "markerfacecolor": "white"},
    "saddle": {"marker": "X", "markerfacecolor": ORANGE},
}
SURE = 0.995  # probability from which on it is not written


def fixed_points(
    found: xr.Dataset,
    ax: Axes | None = None,
    *,
    at: str | int | None = None,
    plane: tuple[int, int] = (0, 1),
    on: xr.Dataset | None = None,
    least: float = 0.1,
    legend: bool = True,
) -> Axes:
    """Fixed points with their type and stability: a circle is a node, a diamond a focus, a cross a saddle; filled is
    stable, open is unstable.

    A point is at its mean over the draws that have it, in an ellipse that holds 90 % of these (of a Normal of their
    mean and covariance), and of the type that most of them say. Where some draws lack it, or say another type, the
    share of draws that have it is written beside it, and of these the share that say so. Of more than two latents it
    is a shadow: a flow drawn in the same plane is that of states in the plane, where the point need not be.

    Args:
        found: of :func:`pyro_metassm.analysis.fixed_points`.
        ax: where to draw, such as the axes of :func:`flow`.
        at: the recording (or point), if they were asked for at several.
        plane: the two latents to draw in.
        on: the flow field that ``ax`` shows (of :func:`pyro_metassm.analysis.flow_field`): its plane is taken, be it
            one of principal axes.
        least: share of draws below which a point is left out.
        legend: explain the markers that are used, below the axes, beside what a legend explains there already.

    Returns:
        the axes.

    Raises:
        ValueError: a Dataset of something else, ``at`` that is none of its places, a single latent, a plane that is
            none, a flow of another number of latents.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> field = pm.analysis.flow_field(fit, "w=5", num_draws=4)
        >>> found = pm.analysis.fixed_points(fit, "w=5", num_draws=4)
        >>> fixed_points(found, pm.plots.flow(field), on=field).get_xlabel()
        'latent 1'
    """
    given.dataset("fixed_points", found, ("position", "type", "probability"), "pm.analysis.fixed_points")
    found = given.one_place("fixed_points", found, at)
    on = None if on is None else given.one_place("fixed_points", on, at if _several(on) else None)
    where = given.Plane.of("fixed_points", found.sizes["latent_dim"], plane, on)
    position = where(found["position"].transpose("fixed_point", "draw", "latent_dim").values)
    ax = new_axes(ax)
    used: list[str] = []
    written: list[tuple[float, float, str]] = []
    for k, share in enumerate(found["probability"].values):
        if not share >= least or not share:
            continue
        there = np.isfinite(position[k]).all(-1)
        (kind, number), *_ = Counter(found["type"].isel(fixed_point=k).values[there].tolist()).most_common()
        ellipse(ax, position[k, there].T, ORANGE if kind == "saddle" else BLUE)
        x, y = position[k, there].mean(0)
        ax.plot(x, y, linestyle="", markersize=9, markeredgecolor=BLACK, zorder=5, **KINDS[kind])
        agreed = number / there.sum()
        notes = [f"{100 * share:.0f} %"] if share < SURE else []
        notes += [f"{100 * agreed:.0f} % {kind}"] if agreed < SURE else []
        if notes:
            written.append((x, y, ", ".join(notes)))
        used.append(kind)
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.0}
    look: dict[str, Any] = {"textcoords": "offset points", "fontsize": "small", "bbox": box, "zorder": 6}
    for x, y, note in written:
        # Towards the middle: what is written at an edge would cover what stands beside the axes.
        side, ha = (-7, "right") if x > np.mean(ax.get_xlim()) else (7, "left")
        ax.annotate(note, (x, y), xytext=(side, 6), ha=ha, **look)
    where.label(ax)
    if legend and used:
        legend_below(ax, [_handle(kind) for kind in KINDS if kind in used])
    return ax


def limit_cycles(
    found: xr.Dataset,
    ax: Axes | None = None,
    *,
    at: str | int | None = None,
    plane: tuple[int, int] = (0, 1),
    on: xr.Dataset | None = None,
    least: float = 0.1,
    legend: bool = True,
) -> Axes:
    """Limit cycles on a plane: those of every draw thin, solid where they attract and dashed where they do not, and
    the mean period in the legend.

    Args:
        found: of :func:`pyro_metassm.analysis.limit_cycles`.
        ax, at, plane, on, least, legend: as for :func:`fixed_points`.

    Returns:
        the axes.

    Raises:
        ValueError: as :func:`fixed_points`.

    Example:
        >>> import pyro_metassm as pm
        >>> angle = np.linspace(0, 2 * np.pi, 8, endpoint=False)
        >>> path = np.stack([np.cos(angle), np.sin(angle)], -1)[None, None]
        >>> found = xr.Dataset(
        ...     {
        ...         "path": (("draw", "cycle", "phase", "latent_dim"), path),
        ...         "period": (("draw", "cycle"), [[0.5]]),
        ...         "stable": (("draw", "cycle"), [[True]]),
        ...         "probability": (("cycle",), [1.0]),
        ...     }
        ... )
        >>> limit_cycles(found).get_legend().texts[0].get_text()
        'cycle of 0.5 s'
    """
    given.dataset("limit_cycles", found, ("path", "period", "stable"), "pm.analysis.limit_cycles")
    found = given.one_place("limit_cycles", found, at)
    on = None if on is None else given.one_place("limit_cycles", on, at if _several(on) else None)
    where = given.Plane.of("limit_cycles", found.sizes["latent_dim"], plane, on)
    path = where(found["path"].transpose("cycle", "draw", "phase", "latent_dim").values)
    ax = new_axes(ax)
    handles: list[Any] = []
    for k, share in enumerate(found["probability"].values):
        of = found.isel(cycle=k)
        there = np.isfinite(path[k]).all((-2, -1))
        if not share >= least or not there.any():
            continue
        stable = bool(of["stable"].values[there].mean() >= 0.5)
        style: dict[str, Any] = {"color": BLACK, "linestyle": "-" if stable else "--"}
        for closed in path[k, there]:
            alpha = max(1.0 / there.sum(), 0.15)
            ax.plot(*np.concatenate([closed, closed[:1]]).T, linewidth=1.4, alpha=alpha, zorder=4, **style)
        text = f"cycle of {of['period'].mean().item():.3g} s" + ("" if stable else ", unstable")
        text += f" ({100 * share:.0f} % of draws)" if share < SURE else ""
        handles += ax.plot([], [], linewidth=1.4, label=text, **style)
    where.label(ax)
    if legend and handles:
        legend_below(ax, handles)
    return ax


# ---- parts -----------------------------------------------------------------------------------------------


def _several(on: xr.Dataset) -> bool:
    return any(dim in on.dims for dim in given.PLACES)


def _handle(kind: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle="", markersize=7, markeredgecolor=BLACK, label=kind, **KINDS[kind])
