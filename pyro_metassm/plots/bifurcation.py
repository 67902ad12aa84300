"""Bifurcation diagrams: branches of fixed points and cycles along a path of embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.plots import _given as given
from pyro_metassm.plots._style import BLACK, BLUE, INTERVAL, ORANGE, legend_below, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TURNING = 1e-6  # Hz: what crosses at this frequency or above turns


def bifurcation(
    found: xr.Dataset,
    ax: Axes | None = None,
    *,
    latent: int | None = None,
    against: Sequence[float] | np.ndarray | None = None,
    label: str | None = None,
    legend: bool = True,
) -> Axes:
    """Fixed points and cycles along a path of embeddings: solid where stable, dashed where not, with 90 % bands.

    Of fixed points (black, with blue bands) the mean of a latent over the draws; of limit cycles (orange,
    with triangles) its extrema along the cycle. A branch is drawn where half of the draws or more have it; whether it
    is stable most of those say. Where the number of unstable eigenvalues of a branch changes, an open circle (what
    crosses turns: a Hopf bifurcation) or a diamond (it does not) is at the median over the draws, with a bar from 5 to
    95 %; where two branches meet and end or begin, an open square: a fold.

    Args:
        found: of :func:`pyro_metassm.analysis.bifurcation`.
        ax: where to draw.
        latent: the one to draw; default the one in which branches and cycles vary most.
        against: a number for each point of the path, rising or falling, to draw along x in place of the share of the
            path's length, such as the parameter of a simulated system.
        label: of x.
        legend: explain what is drawn, below the axes.

    Returns:
        the axes.

    Raises:
        ValueError: a Dataset of something else, a latent that there is not, ``against`` of another length or that
            turns back.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> found = pm.analysis.bifurcation(fit, ["w=2.5", "w=5"], num_points=3, num_draws=2, with_cycles=False)
        >>> pm.plots.bifurcation(found, against=[2.5, 3.75, 5.0], label="speed (rad/s)").get_ylabel()
        'latent 1'
    """
    given.dataset("bifurcation", found, ("position", "stable", "crossing"), "pm.analysis.bifurcation")
    latent = _varying(found) if latent is None else latent
    checks.integers(least=0, latent=latent)
    if latent >= found.sizes["latent_dim"]:
        raise ValueError(
            f"bifurcation: needed one of the {found.sizes['latent_dim']} latents, numbered from 0, got {latent}"
        )
    s = found["s"].values
    x = s if against is None else _along(against, len(s))
    ax = new_axes(ax)
    position = found["position"].isel(latent_dim=latent).transpose("branch", "draw", "point").values
    stable = found["stable"].transpose("branch", "draw", "point").values
    for values, of in zip(position, stable, strict=True):
        _branch(ax, x, values, of, {"color": BLACK, "linewidth": 1.8}, BLUE)
    kinds = [_crossings(ax, found.isel(branch=k), values, s, x) for k, values in enumerate(position)]
    kinds.append(_folds(ax, found, latent, s, x))
    cycles = "low" in found and found.sizes["cycle"] > 0
    if cycles:
        of_cycles = found["cycle_stable"].transpose("cycle", "draw", "point").values
        for side in ("low", "high"):
            extrema = found[side].isel(latent_dim=latent).transpose("cycle", "draw", "point").values
            for values, of in zip(extrema, of_cycles, strict=True):
                _branch(ax, x, values, of, CYCLE, ORANGE)
    ax.set_xlabel(
        label or ("share of the path through the embeddings" if against is None else "along the path")
    )
    ax.set_ylabel(f"latent {latent + 1}")
    ax.set_xlim(min(x), max(x))
    if legend:
        _legend(ax, (position, stable), cycles, {kind for of in kinds for kind in of})
    return ax


# ---- parts -----------------------------------------------------------------------------------------------

CYCLE: dict[str, Any] = {"color": ORANGE, "linewidth": 1.4, "marker": "^", "markersize": 3.5}
CROSSING: dict[str, dict[str, Any]] = {
    "Hopf bifurcation": {"marker": "o"},
    "change without turning": {"marker": "d"},
    "fold": {"marker": "s"},
}


def _varying(found: xr.Dataset) -> int:
    """The latent in which fixed points and extrema of cycles vary most."""
    parts = [
        found[key].transpose(..., "latent_dim").values for key in ("position", "low", "high") if key in found
    ]
    values = np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])
    values = values[np.isfinite(values).all(-1)]
    return int(values.std(0).argmax()) if len(values) else 0


def _along(against: Any, number: int) -> np.ndarray:
    x = np.asarray(checks.as_numpy(against), float)
    steps = np.diff(x) if x.ndim == 1 else np.zeros(0)
    if x.shape != (number,) or not ((steps > 0).all() or (steps < 0).all()):
        raise ValueError(
            f"bifurcation: needed against as {number} numbers, one for each point of the path, rising or falling, "
            f"got {checks.some(np.ravel(x))}"
        )
    return x


def _branch(ax: Axes, x: np.ndarray, values: np.ndarray, stable: np.ndarray, style: dict, color: str) -> None:
    """A branch ``(draw, point)``: solid and dashed pieces, which meet halfway, and a band."""
    there = np.isfinite(values)
    share = there.mean(0)
    drawn = share >= 0.5
    if not drawn.any():
        return
    mean = np.full(len(x), np.nan)
    low, high = mean.copy(), mean.copy()
    mean[drawn] = np.nanmean(values[:, drawn], 0)
    low[drawn], high[drawn] = np.nanquantile(values[:, drawn], INTERVAL, axis=0)
    firm = drawn & ((stable & there).sum(0) >= 0.5 * there.sum(0))
    ax.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
    for here, line in ((firm, "-"), (drawn & ~firm, "--")):
        pieces = _pieces(x, mean, here, drawn)
        if len(pieces):
            ax.plot(*pieces.T, line, **style)


def _pieces(x: np.ndarray, y: np.ndarray, here: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """The points ``(N, 2)`` of one line style, NaN between pieces, and halfway to neighbours of the other style."""
    found: list[tuple[float, float]] = []
    last = len(x) - 1
    for k in np.flatnonzero(here):
        for other, after in ((k - 1, False), (k + 1, True)):
            if after:
                found.append((x[k], y[k]))
            if 0 <= other <= last and drawn[other] and not here[other]:
                found.append(((x[k] + x[other]) / 2, (y[k] + y[other]) / 2))
        if k < last and not here[k + 1]:
            found.append((np.nan, np.nan))
    return np.array(found)


def _crossings(ax: Axes, branch: xr.Dataset, values: np.ndarray, s: np.ndarray, x: np.ndarray) -> list[str]:
    """Markers where a branch changes its stability; what they are."""
    kinds = []
    at = branch["crossing"].transpose("crossing", "draw").values
    turning = branch["crossing_frequency"].transpose("crossing", "draw").values
    for of_draws, frequency in zip(at, turning, strict=True):
        there = np.isfinite(of_draws)
        if there.mean() < 0.5:
            continue
        kind = list(CROSSING)[int(np.median(frequency[there]) < TURNING)]
        mean = np.full(len(s), np.nan)
        known = np.isfinite(values).any(0)
        mean[known] = np.nanmean(values[:, known], 0)
        y = np.interp(np.median(of_draws[there]), s[known], mean[known])
        _mark(ax, of_draws[there], float(y), kind, s, x)
        kinds.append(kind)
    return kinds


def _folds(ax: Axes, found: xr.Dataset, latent: int, s: np.ndarray, x: np.ndarray) -> list[str]:
    """Markers where two branches meet; what they are."""
    kinds = []
    for k in range(found.sizes.get("fold", 0)):
        of_draws = found["fold"].isel(fold=k).values
        there = np.isfinite(of_draws)
        if there.mean() >= 0.5:
            y = np.nanmedian(found["fold_position"].isel(fold=k, latent_dim=latent).values)
            _mark(ax, of_draws[there], float(y), "fold", s, x)
            kinds.append("fold")
    return kinds


def _mark(ax: Axes, shares: np.ndarray, y: float, kind: str, s: np.ndarray, x: np.ndarray) -> None:
    """A marker at the median of shares of the path, with a bar."""
    low, middle, high = np.interp(np.quantile(shares, [INTERVAL[0], 0.5, INTERVAL[1]]), s, x)
    error = np.abs([[middle - low], [high - middle]])
    look: dict[str, Any] = {"color": BLACK, "markerfacecolor": "white", "markersize": 8, "capsize": 3}
    ax.errorbar(middle, y, xerr=error, linestyle="", zorder=6, **look, **CROSSING[kind])


def _legend(ax: Axes, branches: tuple[np.ndarray, np.ndarray], cycles: bool, kinds: set[str]) -> None:
    from matplotlib.lines import Line2D

    position, stable = branches
    there = np.isfinite(position)
    handles = []
    if (there & stable).any():
        handles.append(Line2D([], [], color=BLACK, label="stable fixed point"))
    if (there & ~stable).any():
        handles.append(Line2D([], [], color=BLACK, linestyle="--", label="unstable fixed point"))
    if cycles:
        handles.append(Line2D([], [], **CYCLE, label="extrema of a cycle"))
    style: dict[str, Any] = {"color": BLACK, "markerfacecolor": "white", "markersize": 7, "linestyle": ""}
    handles += [Line2D([], [], label=kind, **style, **CROSSING[kind]) for kind in CROSSING if kind in kinds]
    legend_below(ax, handles, columns=2)
