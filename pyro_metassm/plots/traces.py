"""Single trials: observed, reconstructed, forecast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from pyro_metassm.plots._style import BLACK, BLUE, INTERVAL, ORANGE
from pyro_metassm.trees import part

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
    """One trial: observed, reconstructed up to the context's end and forecast after it; a panel for each neuron.

    Args:
        forecast_tree: of :func:`pyro_metassm.forecast`.
        posterior_tree: of :func:`pyro_metassm.posterior`, of the same trials.
        recording: its name.
        trial: the trial, by its number in the recordings given to both.
        neurons: how many (those whose rates vary most in this trial), or which positions.
        context: bins given to the forecast; default as the tree says.
        axes: where to draw, one for each neuron.

    Returns:
        the axes ``(neurons,)``.

    Raises:
        ValueError: a trial or recording that a tree lacks, too few axes.
    """
    context = int(forecast_tree.attrs["context"] if context is None else context)
    for tree, what in ((forecast_tree, "forecast_tree"), (posterior_tree, "posterior_tree")):
        if trial not in _trials(tree, recording):
            raise ValueError(
                f"traces: needed trial {trial} of recording {recording!r} in the {what}, got none; a trial "
                "that ends before the context is not forecast"
            )
    past = part(posterior_tree, recording, "posterior")["rates"].sel(trial=trial)
    ahead = part(forecast_tree, recording, "predictions")["rates"].sel(trial=trial)
    seen = part(posterior_tree, recording, "observed_data")["observations"].sel(trial=trial)
    if isinstance(neurons, int | np.integer):
        spread = np.nan_to_num(past.mean(("chain", "draw")).std("time").values)
        neurons = sorted(np.argsort(-spread, kind="stable")[:neurons].tolist())
    if axes is None:
        import matplotlib.pyplot as plt

        size = (7, 1.2 + 1.4 * len(neurons))
        grid = plt.subplots(len(neurons), 1, sharex=True, figsize=size, layout="constrained", squeeze=False)[
            1
        ]
        panels = grid[:, 0]
    else:
        panels = np.atleast_1d(np.asarray(axes, object))
    if len(panels) < len(neurons):
        raise ValueError(f"traces: needed {len(neurons)} axes, one for each neuron, got {len(panels)}")
    panels = panels[: len(neurons)]
    time = past["time"].values
    width = float(time[1] - time[0]) if len(time) > 1 else 1.0
    start = time[0] + (context - 0.5) * width
    stop = ahead["time"].values[-1] + width / 2
    for ax, neuron in zip(panels, neurons, strict=True):
        y = seen.isel(neuron=neuron)
        ax.plot(y["time"], y, ".", color=BLACK, markersize=3.5, label="observed")
        _band(ax, past.isel(neuron=neuron, time=slice(context)), BLUE, "-", "reconstructed")
        _band(ax, ahead.isel(neuron=neuron), ORANGE, "--", "forecast")
        ax.axvline(start, color=BLACK, linewidth=1.0, linestyle=":")
        ax.set_xlim(time[0] - width / 2, max(stop, time[-1] + width / 2))
        ax.set_ylabel(f"neuron {seen['neuron'].values[neuron]}\n(per bin)")
    panels[0].set_title(f"{recording}, trial {trial} (bands: 90 % of the rate)", fontsize="medium")
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    panels[-1].set_xlabel("time (s)")
    return panels


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
    """
    import matplotlib.pyplot as plt

    names = list(recordings)
    size = (3.4 * len(names), 1.2 + 1.4 * neurons)
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1)  # the labels of a column do not touch the one before
    figure, axes = plt.subplots(neurons, len(names), squeeze=False, figsize=size, layout=layout)
    for column, name in zip(axes.T, names, strict=True):
        first = _trials(forecast_tree, name)[0] if trial is None else trial
        used = traces(forecast_tree, posterior_tree, name, first, neurons, context, column)
        column[0].set_title(f"{name}, trial {first}", fontsize="medium")
        column[0].get_legend().remove()
        for ax in column[len(used) :]:
            ax.set_axis_off()
    handles, texts = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False)
    return figure


# ---- parts -----------------------------------------------------------------------------------------------


def _trials(tree: xr.DataTree, recording: str) -> list[int]:
    if recording not in tree.children:
        return []
    return part(tree, recording, "observed_data")["trial"].values.tolist()


def _band(ax: Axes, draws: xr.DataArray, color: str, style: str, label: str) -> None:
    time = draws["time"].values
    low, high = draws.quantile(INTERVAL, ("chain", "draw"), skipna=False).values
    ax.fill_between(time, low, high, color=color, alpha=0.25, linewidth=0)
    ax.plot(time, draws.mean(("chain", "draw")).values, style, color=color, linewidth=1.6, label=label)
