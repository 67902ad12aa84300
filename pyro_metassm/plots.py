"""Pictures of fits and their results, with matplotlib. Every function draws into `ax` (or makes one) and
returns it.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; line styles and markers differ as
well, so that nothing is lost in grey.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm._calibration_plot import calibration
from pyro_metassm._embedding_plot import BLUE, INTERVAL, PALETTE, embedding
from pyro_metassm._flow_plots import (
    AffineMap,
    align,
    flow_comparison,
    flow_field,
    new_axes,
    part,
    true_flow_field,
)
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AffineMap",
    "align",
    "calibration",
    "embedding",
    "flow_comparison",
    "flow_field",
    "forecast_curve",
    "history",
    "trace_panels",
    "traces",
    "true_flow_field",
]

BLACK, ORANGE = "#000000", "#D55E00"
STYLES = ("-", "--", "-.", ":")
FEW = 8  # lines that are named one by one


def history(
    fit: Fit, ax: Axes | None = None, *, recs: Recordings | None = None, validation: Recordings | None = None
) -> Axes:
    """The ELBO against the steps of the fit: every step thin, a running mean bold, the validation ELBO as
    dots.

    The axis leaves out how low the first steps were. The ELBO is per observed number where that number is
    known, from ``recs`` or the attribute ``num_observed`` of the history, else in nats of all data.
    Validation shares the axis if its number is known (``validation``, ``num_observed_validation``) and has
    one of its own if not. It may lie above training, which rolls the dynamics out for part of the bins.

    Args:
        fit: the fit.
        ax: where to draw.
        recs: what it was trained on.
        validation: what it was validated on.

    Returns:
        the axes.

    Raises:
        ValueError: a fit without steps.
    """
    if not fit.history.sizes.get("step", 0) or "elbo" not in fit.history:
        raise ValueError("history: needed a fit with at least one step, got none; use num_steps > 0")
    ax = new_axes(ax)
    number = _num_observed(recs, fit.history.attrs.get("num_observed"))
    steps, elbo = fit.history["step"].values, fit.history["elbo"].values / (number or 1.0)
    width = max(len(elbo) // 25, 1)
    mean = np.convolve(elbo, np.full(width, 1 / width), "valid")
    ax.plot(steps, elbo, color=BLUE, linewidth=0.6, alpha=0.5)
    lines = ax.plot(steps[width - 1 :], mean, color=BLUE, linewidth=2.0, label="training")
    settled = elbo[len(elbo) // 10 :]
    ax.set_xlabel("step")
    ax.set_ylabel(f"ELBO ({_nats(number, 'data')})")
    if "validation_elbo" in fit.history:
        other = _num_observed(validation, fit.history.attrs.get("num_observed_validation"))
        values = fit.history["validation_elbo"].dropna("step")
        values = values / (other if number and other else 1.0)
        shared = bool(number and other)
        of_validation = ax if shared else ax.twinx()
        style: dict[str, Any] = {"color": ORANGE, "markersize": 4, "label": "validation"}
        lines += of_validation.plot(values["step"].values, values.values, "o--", **style)
        if shared:
            settled = np.concatenate([settled, values.values])
        else:
            of_validation.set_ylabel(f"validation ELBO ({_nats(None, 'validation data')})")
        ax.legend(handles=lines, frameon=False, loc="lower right")
    low, high = np.quantile(settled, 0.02), settled.max()
    margin = 0.05 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)
    return ax


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


# ---- parts -----------------------------------------------------------------------------------------------


def _trials(tree: xr.DataTree, recording: str) -> list[int]:
    if recording not in tree.children:
        return []
    return part(tree, recording, "observed_data")["trial"].values.tolist()


def _nats(number: float | None, of: str) -> str:
    return "nats per observed number" if number else f"nats, all {of}"


def _num_observed(recs: Recordings | None, known: Any) -> float | None:
    return float(sum(int(r.mask.sum()) for r in recs.values())) if recs is not None else known


def _band(ax: Axes, draws: xr.DataArray, color: str, style: str, label: str) -> None:
    time = draws["time"].values
    low, high = draws.quantile(INTERVAL, ("chain", "draw"), skipna=False).values
    ax.fill_between(time, low, high, color=color, alpha=0.25, linewidth=0)
    ax.plot(time, draws.mean(("chain", "draw")).values, style, color=color, linewidth=1.6, label=label)
