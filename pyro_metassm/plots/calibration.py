"""The picture of a calibration: histograms of ranks, and coverage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm.plots._style import MARKERS, PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BAND = 0.99  # probability that a bar of uniform ranks lies in the band
EXPECTED = 10  # ranks in a bar, at least, where there are enough for the fewest bars
BARS = (20, 10, 5)
RELIABLE = 0.7  # Pareto shape
COLORS = dict(zip(("embedding", "latents", "rates"), PALETTE, strict=False))


def calibration(result: xr.Dataset, axes: Sequence[Axes] | None = None) -> np.ndarray:
    """Ranks of the truth among the draws, a histogram for each quantity, and what central intervals cover.

    A bar of a calibrated posterior lies in the grey band with a probability of 99 %. Both ends high: the posterior is
    too narrow; the middle high: too wide; one side: biased. The last panel has the share of truths within 50 and 90 %
    intervals, which belong on the dashed lines.

    Args:
        result: of :func:`pyro_metassm.calibration`.
        axes: where to draw, one for each quantity with a truth and one more.

    Returns:
        the axes.

    Raises:
        ValueError: too few axes.
    """
    keys = [str(key) for key in result["quantity"].values]
    if axes is None:
        import matplotlib.pyplot as plt

        size = (3.2 * (len(keys) + 1), 3.4)
        axes = plt.subplots(1, len(keys) + 1, figsize=size, layout="constrained")[1]
    panels = np.atleast_1d(np.asarray(axes, object)).ravel()
    if len(panels) <= len(keys):
        raise ValueError(f"calibration: needed {len(keys) + 1} axes, got {len(panels)}")
    for ax, key in zip(panels, keys, strict=False):
        _ranks(ax, result[f"{key}_rank"], int(result.attrs["num_samples"]), COLORS[key])
        ax.set_title(key)
    panels[0].set_ylabel("ranks, 1 = as many as expected")
    panels[0].legend(frameon=False, fontsize="small", loc="upper center")
    _intervals(panels[len(keys)], result, keys)
    return panels[: len(keys) + 1]


def _ranks(ax: Axes, ranks: xr.DataArray, num_samples: int, color: str) -> None:
    """Bars of all dims of a quantity; the band is for as many ranks as are independent, one a trial."""
    last = [dim for dim in ranks.dims if dim in ("latent_dim", "embedding_dim")]
    values = ranks.values[np.isfinite(ranks.values)]
    number = len(values) // math.prod(ranks.sizes[dim] for dim in last)
    bars = next((n for n in BARS if number >= EXPECTED * n), BARS[-1])
    heights = np.histogram(values, bars, (-0.5, num_samples + 0.5))[0] * bars / len(values)
    low, high = (count * bars / number for count in binomial_interval(number, 1.0 / bars, BAND))
    edges = np.linspace(0.0, 1.0, bars + 1)
    ax.stairs(heights, edges, fill=True, color=color, alpha=0.35)
    ax.axhspan(low, high, color="0.5", alpha=0.3, linewidth=0, zorder=2, label="99 % band if calibrated")
    ax.axhline(1.0, color="0.4", linewidth=0.8, zorder=2)
    ax.stairs(heights, edges, color=color, linewidth=1.4, zorder=3)
    ax.set_xlim(0.0, 1.0)
    ax.set_ylim(0.0, 1.25 * max(high, heights.max()))
    ax.set_xlabel(f"rank of the truth / {num_samples}\nn = {number}")


def _intervals(ax: Axes, result: xr.Dataset, keys: Sequence[str]) -> None:
    levels = [float(level) for level in result["level"].values]
    for level, marker in zip(levels, MARKERS, strict=False):
        ax.axhline(level, color="0.4", linewidth=0.8, linestyle="--")
        ax.plot([], [], marker, color="0.4", label=f"{100 * level:.0f} % intervals")
        for at, key in enumerate(keys):
            mean, error = (
                float(result[v].sel(quantity=key, level=level)) for v in ("coverage", "coverage_se")
            )
            style: dict[str, Any] = {"color": COLORS[key], "marker": marker, "linestyle": ""}
            ax.errorbar(at, mean, 2 * error, capsize=3, markersize=6, **style)
    ax.set_xticks(range(len(keys)), keys)
    ax.set_xlim(-0.5, len(keys) - 0.5)
    ax.set_ylim(-0.05, 1.25)
    ax.set_yticks([0.0, *levels, 1.0])
    ax.legend(frameon=False, fontsize="small", loc="upper center", ncols=len(levels), columnspacing=1.0)
    ax.set_title("truths covered (± 2 se)")
    shapes = result["khat"].values[~np.isnan(result["khat"].values)]
    ax.set_xlabel(
        f"k-hat: median {np.median(shapes):.1f},\n{100 * (shapes > RELIABLE).mean():.0f} % above {RELIABLE}"
    )


def binomial_interval(number: int, p: float, level: float) -> tuple[int, int]:
    """The central interval of counts of ``number`` independent events of probability ``p``, at least ``level``."""
    k = np.arange(number + 1)
    log_choose = math.lgamma(number + 1) - np.array(
        [math.lgamma(i + 1) + math.lgamma(number - i + 1) for i in k]
    )
    below = np.cumsum(np.exp(log_choose + k * math.log(p) + (number - k) * math.log1p(-p)))
    low, high = np.searchsorted(below, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return int(low), min(int(high), number)
