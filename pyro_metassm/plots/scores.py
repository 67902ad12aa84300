"""Scores: against the horizon of forecasts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from pyro_metassm.plots._style import BLACK, PALETTE, STYLES, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 8  # lines that are named one by one


def forecast_curve(scores: xr.DataArray, ax: Axes | None = None) -> Axes:
    """Forecast scores against the horizon: a line for each recording, their mean bold.

    Args:
        scores: of :func:`pyro_metassm.metrics.forecast_r2`, ``(recording, horizon_step)``.
        ax: where to draw.

    Returns:
        the axes; their lower end is -1 at the least, 0 is the average trial.

    Raises:
        ValueError: other dims.
    """
    if set(scores.dims) != {"recording", "horizon_step"}:
        raise ValueError(f"forecast_curve: needed the dims (recording, horizon_step), got {scores.dims}")
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
    finite = scores.values[np.isfinite(scores.values)]
    low = float(finite.min()) if len(finite) else 0.0
    if low <= 0:
        ax.axhline(0.0, color="0.4", linewidth=0.8, linestyle=":")
    ax.set_ylim(max(low - 0.05 * (1 - low) - 1e-3, -1.0), 1.0 + 0.02 * (1 - max(low, -1.0)) + 1e-3)
    bins = (
        f" of {1000 * float(scores['lead_time'][0]) / steps[0]:g} ms" if "lead_time" in scores.coords else ""
    )
    ax.set_xlabel(f"bins{bins} ahead")
    ax.set_ylabel("forecast $R^2$")
    ax.legend(frameon=False, fontsize="small")
    return ax
