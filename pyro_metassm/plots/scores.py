"""Scores: against the horizon of forecasts, and against the number of trials to adapt from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.plots._style import BLACK, MARKERS, PALETTE, STYLES, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 8  # lines that are named one by one
MANY = 5  # entries of a legend inside the axes
WORDS = {"r2": "$R^2$", "forecast_r2": "$R^2$", "bits_per_spike": "(bits per spike)", "crps": "(CRPS)"}
LOWEST = -1.0  # of an axis of R^2


def forecast_curve(
    scores: xr.DataArray,
    ax: Axes | None = None,
    *,
    baselines: Mapping[str, xr.DataArray] | None = None,
    label: str | None = None,
) -> Axes:
    """Forecast scores against the horizon: a line for each recording, their mean bold, baselines dashed with markers.

    Args:
        scores: of :func:`pyro_metassm.metrics.forecast_r2`, ``(recording, horizon_step)``, or a variable of
            :func:`pyro_metassm.metrics.forecast_scores` with these dims.
        ax: where to draw.
        baselines: the same scores of other methods by name, over ``horizon_step``; their mean over ``recording``, if
            they have that, is drawn.
        label: of y; default by the name of the scores.

    Returns:
        the axes. Of R^2 their lower end is -1 at the least; 0 is the average trial.

    Raises:
        ValueError: other dims, baselines of other steps.

    Example:
        >>> scores = xr.DataArray([[0.9, 0.7], [0.8, 0.5]], dims=("recording", "horizon_step"))
        >>> scores = scores.assign_coords(recording=["a", "b"], horizon_step=[1, 2])
        >>> ax = forecast_curve(scores, baselines={"persistence": scores.mean("recording") - 0.4})
        >>> [text.get_text() for text in ax.get_legend().texts]
        ['a', 'b', 'mean of 2', 'persistence']
    """
    if not isinstance(scores, xr.DataArray) or set(scores.dims) != {"recording", "horizon_step"}:
        raise ValueError(
            "forecast_curve: needed the dims (recording, horizon_step), got "
            f"{scores.dims if isinstance(scores, xr.DataArray) else type(scores).__name__}"
        )
    ax = new_axes(ax)
    scores = scores.transpose("recording", "horizon_step")
    steps, names = scores["horizon_step"].values, [str(name) for name in scores["recording"].values]
    few = len(names) <= FEW
    for row, name in enumerate(names):
        color = PALETTE[row % (len(PALETTE) - 1)] if few else "0.6"
        style = STYLES[row % len(STYLES)] if few else "-"
        text = name if few else ("each recording" if row == 0 else None)
        ax.plot(steps, scores.values[row], style, color=color, linewidth=1.0, label=text)
    if len(names) > 1:
        mean = scores.mean("recording", skipna=True).values
        ax.plot(steps, mean, color=BLACK, linewidth=2.5, label=f"mean of {len(names)}")
    drawn = [scores.values.ravel()]
    for number, (name, other) in enumerate((baselines or {}).items()):
        values = _baseline(name, other, steps)
        marker: dict[str, Any] = {
            "marker": MARKERS[number % len(MARKERS)],
            "markevery": max(len(steps) // 8, 1),
        }
        ax.plot(
            steps,
            values,
            color=BLACK,
            linestyle="--",
            linewidth=1.4,
            markersize=6,
            markerfacecolor="white",
            label=name,
            **marker,
        )
        drawn.append(values)
    what = WORDS.get(str(scores.name or "r2"), str(scores.name))
    is_r2 = what == WORDS["r2"]
    _limits(ax, np.concatenate(drawn), is_r2)
    bins = (
        f" of {1000 * float(scores['lead_time'][0]) / steps[0]:g} ms" if "lead_time" in scores.coords else ""
    )
    ax.set_xlabel(f"bins{bins} ahead")
    ax.locator_params(axis="x", integer=True)
    ax.set_ylabel(label or f"forecast {what}")
    # Many entries stand beside the axes, where they cover no line.
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
    many = len(ax.get_legend_handles_labels()[0]) > MANY
    inside = {"frameon": not few, "framealpha": 0.9, "edgecolor": "none"}  # on many lines words need a ground
    ax.legend(fontsize="small", **(beside | {"frameon": False} if many else inside))
    return ax


def adaptation_curve(
    scores: Mapping[str, xr.DataArray] | xr.DataArray,
    ax: Axes | None = None,
    *,
    over: str = "recording",
    ceiling: float | None = None,
    label: str | None = None,
) -> Axes:
    """Scores against the number of trials to adapt from: means with one standard error, a line for each method.

    The standard error is that of the mean over ``over`` (without it, or with one, there is no bar): all other
    dimensions, such as draws of the trials or seeds, which share a recording and are not independent, are averaged
    first. The numbers of trials are evenly spaced.

    Args:
        scores: by method, such as "adapted" and "from scratch", each over ``num_trials`` and others; or of one.
        ax: where to draw.
        over: the dimension whose entries are independent.
        ceiling: what no method can pass, a dotted line.
        label: of y; default by the name of the scores.

    Returns:
        the axes. Of R^2 their lower end is -1 at the least: a triangle at the lower edge is a mean below.

    Raises:
        ValueError: scores without ``num_trials``, of none.

    Example:
        >>> trials = {"num_trials": [1, 8], "recording": ["a", "b", "c"]}
        >>> adapted = xr.DataArray([[0.6, 0.7, 0.8], [0.8, 0.8, 0.9]], trials, ("num_trials", "recording"))
        >>> ax = adaptation_curve({"adapted": adapted, "from scratch": adapted - 0.3})
        >>> ax.get_xlabel()
        'trials to adapt from'
    """
    methods = scores if isinstance(scores, Mapping) else {"adapted": scores}
    if not methods:
        raise ValueError("adaptation_curve: needed scores by method, got none")
    for name, values in methods.items():
        if (
            not isinstance(values, xr.DataArray)
            or "num_trials" not in values.coords
            or "num_trials" not in values.dims
        ):
            raise ValueError(
                f"adaptation_curve: needed a dimension num_trials, with its coordinate, of {name!r}, got "
                + (str(values.dims) if isinstance(values, xr.DataArray) else type(values).__name__)
            )
    numbers = sorted({int(n) for values in methods.values() for n in values["num_trials"].values})
    ax = new_axes(ax)
    series = []
    for row, (name, values) in enumerate(methods.items()):
        values = values.mean([dim for dim in values.dims if dim not in ("num_trials", over)])
        mean, error = values, np.zeros(values.sizes["num_trials"])
        if values.sizes.get(over, 1) > 1:
            mean, number = values.mean(over), values.count(over)
            error = np.nan_to_num((values.std(over, ddof=1) / np.sqrt(number)).values)
        elif over in values.dims:
            mean = values.isel({over: 0})
        # Side by side, so that the bars of one do not hide those of another.
        x = np.array([numbers.index(int(n)) for n in values["num_trials"].values])
        x = x + 0.06 * (row - (len(methods) - 1) / 2)
        style: dict[str, Any] = {"color": PALETTE[row % len(PALETTE)], "linestyle": STYLES[row % len(STYLES)]}
        style |= {"marker": MARKERS[row % len(MARKERS)], "markersize": 6, "capsize": 3, "linewidth": 1.6}
        ax.errorbar(x, mean.values, error if error.any() else None, label=name, **style)
        series.append((x, mean.values, error, style))
    if ceiling is not None:
        ax.axhline(ceiling, color=BLACK, linewidth=1.0, linestyle=":", label="ceiling")
    what = WORDS.get(str(next(iter(methods.values())).name or "r2"), str(next(iter(methods.values())).name))
    ends = [y + side * error for _, y, error, _ in series for side in (-1, 1)]
    low = _limits(
        ax, np.concatenate([*ends, [ceiling if ceiling is not None else np.nan]]), what == WORDS["r2"]
    )
    for x, y, _, style in series:
        below = y < low
        ax.plot(x[below], np.full(below.sum(), low), "v", color=style["color"], clip_on=False, zorder=5)
    ax.set_xticks(range(len(numbers)), list(map(str, numbers)))
    ax.set_xlabel("trials to adapt from")
    ax.set_ylabel(label or f"forecast {what}")
    if len(methods) > 1 or ceiling is not None:
        ax.legend(frameon=False, fontsize="small")
    return ax


# ---- parts -----------------------------------------------------------------------------------------------


def _baseline(name: str, scores: xr.DataArray, steps: np.ndarray) -> np.ndarray:
    """Mean scores of a baseline at the steps."""
    dims = scores.dims if isinstance(scores, xr.DataArray) else ()
    found = scores["horizon_step"].values if "horizon_step" in dims else np.zeros(0)
    if not set(dims) <= {"recording", "horizon_step"} or not np.array_equal(found, steps):
        raise ValueError(
            f"forecast_curve: needed the baseline {name!r} over horizon_step ({checks.some(steps)}), got "
            f"{dims if isinstance(scores, xr.DataArray) else type(scores).__name__} ({checks.some(found) or 'none'})"
        )
    return scores.mean([dim for dim in dims if dim != "horizon_step"]).values


def _limits(ax: Axes, values: np.ndarray, is_r2: bool) -> float:
    """Sets the range of y around values, of R^2 from ``LOWEST`` up to 1; returns its lower end."""
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if low <= 0:
        ax.axhline(0.0, color="0.4", linewidth=0.8, linestyle=":")
    if is_r2:
        bottom = max(low - 0.05 * (1 - low) - 1e-3, LOWEST)
        ax.set_ylim(bottom, 1.0 + 0.02 * (1 - max(low, LOWEST)) + 1e-3)
    else:
        margin = 0.05 * (high - low) + 1e-3 * max(abs(high), abs(low), 1e-9)
        bottom = low - margin
        ax.set_ylim(bottom, high + margin)
    return bottom
