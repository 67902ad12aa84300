"""Trials with their forecasts, for several recordings at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from pyro_metassm.plots.trajectories import draw, trials

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def traces(
    forecast_tree: xr.DataTree,
    posterior_tree: xr.DataTree,
    recording: str,
    trial: int = 0,
    neurons: int | Sequence[int] = 3,
    context: int | None = None,
    axes: Sequence[Axes] | None = None,
) -> np.ndarray:
    """:func:`trajectories` of rates: observed, reconstructed up to the context's end and forecast after it.

    Args:
        forecast_tree: of :func:`pyro_metassm.forecast`.
        posterior_tree: of :func:`pyro_metassm.posterior`, of the same trials.
        recording: its name.
        trial: the trial, by its number in the recordings given to both.
        neurons: how many (those whose rates vary most in this trial), or which positions.
        context: bins given to the forecast; default where it begins.
        axes: where to draw, one for each neuron.

    Returns:
        the axes ``(neurons,)``.

    Raises:
        ValueError: a trial or recording that a tree lacks, too few axes.
    """
    words = "posterior_tree", "forecast_tree"
    return draw(
        "traces", posterior_tree, recording, trial, "rates", neurons, forecast_tree, context, axes, *words
    )


def trace_panels(
    forecast_tree: xr.DataTree,
    posterior_tree: xr.DataTree,
    recordings: Iterable[str],
    *,
    trial: int | None = None,
    neurons: int = 2,
    context: int | None = None,
) -> Figure:
    """:func:`traces` of several recordings, a column for each.

    Args:
        forecast_tree, posterior_tree, context: as for :func:`traces`.
        recordings: their names.
        trial: the trial; default the first one that was forecast.
        neurons: of each recording.

    Returns:
        the figure.

    Raises:
        ValueError: as :func:`traces`.
    """
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = list(recordings)
    size = (3.4 * len(names), 1.2 + 1.4 * neurons)
    layout = ConstrainedLayoutEngine(w_pad=0.1)  # the labels of a column do not touch the one before
    figure, axes = plt.subplots(neurons, len(names), squeeze=False, figsize=size, layout=layout)
    for column, name in zip(axes.T, names, strict=True):
        known = trials(forecast_tree, name)
        first = known[0] if trial is None and known else trial or 0
        used = traces(forecast_tree, posterior_tree, name, first, neurons, context, column)
        column[0].set_title(f"{name}, trial {first}", fontsize="medium")
        column[0].get_legend().remove()
        for ax in column[len(used) :]:
            ax.set_axis_off()
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False)
    return figure
