"""Trajectories over a grid of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.plots import _given as given
from pyro_metassm.plots._style import BLACK, BLUE, INTERVAL, PALETTE, STYLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE = 3.0  # times the median width of panels: what is wider has exploded
DIMS = {"rates": "neuron", "decoded": "output"}


def interpolation_grid(
    found: xr.Dataset,
    ax: Sequence[Axes] | np.ndarray | None = None,
    *,
    of: Literal["latents", "rates", "decoded"] = "latents",
    plane: tuple[int, int] = (0, 1),
    which: Sequence[int] | None = None,
    label: str | None = None,
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Small multiples: where the same state goes under embeddings on a grid, the one in the middle framed boldly.

    Columns go along the first embedding dimension of the grid to the right, rows along the second one upwards; the
    offset from the middle is written above and to the right. All panels have the same limits, those of the panels'
    bulk: those of the panels that are at most three times as wide as their median. What leaves them has exploded.

    Args:
        found: of :func:`pyro_metassm.analysis.interpolate`.
        ax: where to draw: as many axes as the grid has, row by row from above.
        of: "latents" (the paths of the draws thin in the plane of two, bold the one nearest to their median, a dot at
            the beginning), "rates" of some neurons over time or what was "decoded" over time (medians, and bands from 5
            to 95 %). Where a few draws explode there is no mean.
        plane: the two latents.
        which: neurons or outputs, by their position; default the three that vary most over all panels.
        label: of y for rates and what was decoded, with its units.
        names: what to call the neurons or outputs that are drawn, in their order; default by their positions.

    Returns:
        the axes ``(row, column)``, as they lie on paper.

    Raises:
        ValueError: a Dataset of something else, or without what is asked for; a plane that is none; too few axes; names
            of another number.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=2)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> pm.plots.interpolation_grid(pm.analysis.interpolate(fit, "w=5", num_bins=10, num_draws=2)).shape
        (3, 3)
    """
    if of not in ("latents", *DIMS):
        raise ValueError(f"interpolation_grid: needed of= 'latents', 'rates' or 'decoded', got {of!r}")
    given.dataset("interpolation_grid", found, ("latents", "embedding", of), "pm.analysis.interpolate")
    shape = found.sizes["row"], found.sizes["column"]
    panels = _panels(ax, shape)
    # On paper the second dimension of the embedding grows upwards.
    paper = panels[::-1]
    if of == "latents":
        _in_a_plane(paper, found, plane)
    else:
        _over_time(paper, found, of, which, label, names)
    _name_offsets(paper, found)
    for side in paper[shape[0] // 2, shape[1] // 2].spines.values():
        side.set_linewidth(2.5)
    return panels


# ---- parts -----------------------------------------------------------------------------------------------


def _in_a_plane(panels: np.ndarray, found: xr.Dataset, plane: tuple[int, int]) -> None:
    where = given.Plane.of("interpolation_grid", found.sizes["latent_dim"], plane)
    paths = where(found["latents"].transpose("row", "column", "draw", "time", "latent_dim").values)
    middle = _central(paths)
    limits = _bulk(middle)
    for place in np.ndindex(panels.shape):
        ax: Any = panels[place]
        for path in paths[place] if paths.shape[2] > 1 else ():
            ax.plot(*path.T, color=BLUE, linewidth=0.6, alpha=max(1 / len(paths[place]), 0.15))
        ax.plot(*middle[place].T, color=BLUE, linewidth=1.8)
        ax.plot(*middle[place][0], "o", color=BLACK, markersize=4)
        ax.set_xlim(*limits[0])
        ax.set_ylim(*limits[1])
    _label_outer(panels, *where.labels)


def _central(paths: np.ndarray) -> np.ndarray:
    """Of paths ``(row, column, draw, time, 2)`` those nearest to the median, on the mean over time."""
    away = np.linalg.norm(paths - np.median(paths, 2, keepdims=True), axis=-1).mean(-1)
    nearest = np.nan_to_num(away, nan=np.inf).argmin(-1)[..., None, None, None]
    return np.take_along_axis(paths, nearest, 2)[:, :, 0]


def _over_time(
    panels: np.ndarray,
    found: xr.Dataset,
    of: str,
    which: Sequence[int] | None,
    label: str | None,
    names: Sequence[str] | None,
) -> None:
    dim = DIMS[of]
    values = found[of].transpose("row", "column", "draw", "time", dim).values
    size = values.shape[-1]
    if which is None:
        which = sorted(np.argsort(-values.mean(2).std((0, 1, 2)), kind="stable")[:3].tolist())
    wrong = [k for k in which if not (isinstance(k, int | np.integer) and 0 <= k < size)]
    if wrong or not len(which):
        raise ValueError(
            f"interpolation_grid: needed which= positions below {size}, got {checks.some(wrong) or 'none'}"
        )
    words = [f"{dim} {place}" for place in which] if names is None else list(map(str, names))
    if len(words) != len(which):
        raise ValueError(
            f"interpolation_grid: needed {len(which)} names, one for each {dim} that is drawn, got {len(words)}"
        )
    values = values[..., list(which)]
    low, middle, high = np.quantile(values, (INTERVAL[0], 0.5, INTERVAL[1]), axis=2)
    time, (limits,) = found["time"].values, _bulk(middle.reshape(*middle.shape[:2], -1, 1))
    for place in np.ndindex(panels.shape):
        ax: Any = panels[place]
        for k in range(len(which)):
            style: dict[str, Any] = {"color": PALETTE[k % len(PALETTE)], "linestyle": STYLES[k % len(STYLES)]}
            ax.fill_between(
                time, low[place][:, k], high[place][:, k], color=style["color"], alpha=0.25, linewidth=0
            )
            ax.plot(time, middle[place][:, k], linewidth=1.6, label=words[k], **style)
        ax.set_xlim(time[0], time[-1])
        ax.set_ylim(*limits)
    _label_outer(panels, "time (s)", label or ("rate (per bin)" if of == "rates" else "decoded"))
    panels[-1, -1].legend(loc="upper left", bbox_to_anchor=(1.1, 1.0), frameon=False, fontsize="small")


def _bulk(values: np.ndarray) -> list[tuple[float, float]]:
    """Limits of each number of panels ``(row, column, point, number)``, but for panels that are far wider than most."""
    flat = values.reshape(-1, *values.shape[2:])
    flat = flat[np.isfinite(flat).all((1, 2))]
    if not len(flat):
        return [(0.0, 1.0)] * values.shape[-1]
    low, high = flat.min(1), flat.max(1)
    width = high - low
    usual = (width <= WIDE * np.median(width, 0) + 1e-12).all(1)
    usual |= not usual.any()
    bottom, top = low[usual].min(0), high[usual].max(0)
    margin = np.where(top > bottom, 0.05 * (top - bottom), 0.5)
    return list(zip((bottom - margin).tolist(), (top + margin).tolist(), strict=True))


def _name_offsets(panels: np.ndarray, found: xr.Dataset) -> None:
    """The offsets of columns above the topmost panels, those of rows to the right of the last ones."""
    e = found["embedding"].mean("draw").transpose("row", "column", "embedding_dim").values
    offset = e - e[e.shape[0] // 2, e.shape[1] // 2]
    dims = [int(k) for k in np.atleast_1d(found.attrs["plane"])]
    for column in range(panels.shape[1]):
        panels[-1, column].set_title(
            f"$e_{dims[0] + 1}$ {offset[0, column, dims[0]]:+.2f}", fontsize="medium"
        )
    for row in range(panels.shape[0]) if len(dims) > 1 else ():
        text = f"$e_{dims[1] + 1}$ {offset[row, 0, dims[1]]:+.2f}"
        panels[row, -1].annotate(
            text, (1.03, 0.5), xycoords="axes fraction", rotation=270, va="center", fontsize="medium"
        )


def _label_outer(panels: np.ndarray, x: str, y: str) -> None:
    for ax in panels[0]:
        ax.set_xlabel(x)
    for ax in panels[:, 0]:
        ax.set_ylabel(y)
    for ax in panels[1:].ravel():
        ax.tick_params(labelbottom=False)
    for ax in panels[:, 1:].ravel():
        ax.tick_params(labelleft=False)


def _panels(ax: Any, shape: tuple[int, int]) -> np.ndarray:
    if ax is None:
        import matplotlib.pyplot as plt

        size = (2.2 * shape[1] + 0.8, 2.0 * shape[0] + 0.6)
        return plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")[1]
    panels = np.atleast_1d(np.asarray(ax, object)).ravel()
    if len(panels) < shape[0] * shape[1]:
        raise ValueError(f"interpolation_grid: needed {shape[0]} x {shape[1]} axes, got {len(panels)}")
    return panels[: shape[0] * shape[1]].reshape(shape)
