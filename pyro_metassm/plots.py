"""Pictures of fits and their results, with matplotlib. Every function draws into `ax` (or makes one) and returns it.

Colours are those of Okabe and Ito, which colour-blind readers tell apart; line styles and markers differ as well, so
that nothing is lost in grey.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm._flow_plots import AffineMap, align, flow_comparison, flow_field, new_axes, true_flow_field
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "AffineMap",
    "align",
    "embedding",
    "flow_comparison",
    "flow_field",
    "forecast_curve",
    "history",
    "trace_panels",
    "traces",
    "true_flow_field",
]

BLACK, BLUE, ORANGE = "#000000", "#0072B2", "#D55E00"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", BLACK)
MARKERS = "osD^vP*"
STYLES = ("-", "--", "-.", ":")
INTERVAL = (0.05, 0.95)
FEW = 8  # lines or rows that are named one by one


def history(
    fit: Fit, ax: Axes | None = None, *, recs: Recordings | None = None, validation: Recordings | None = None
) -> Axes:
    """The ELBO against the steps of the fit: every step thin, a running mean bold, the validation ELBO as dots.

    The axis leaves out how low the first steps were. With the recordings (or their numbers in the attributes
    ``num_observed`` and ``num_observed_validation`` of ``fit.history``) the ELBO is per observed number, and training
    and validation compare; without, it is in nats of all data.

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
    steps, elbo = (
        fit.history["step"].values,
        fit.history["elbo"].values if "elbo" in fit.history else np.zeros(0),
    )
    if not len(elbo):
        raise ValueError("history: needed a fit with at least one step, got none; use num_steps > 0")
    ax = new_axes(ax)
    number = _num_observed(recs, fit.history.attrs.get("num_observed"))
    elbo = elbo / (number or 1.0)
    width = max(len(elbo) // 25, 1)
    mean = np.convolve(elbo, np.full(width, 1 / width), "valid")
    ax.plot(steps, elbo, color=BLUE, linewidth=0.6, alpha=0.5)
    ax.plot(steps[width - 1 :], mean, color=BLUE, linewidth=2.0, label="training")
    shown = [elbo[len(elbo) // 10 :]]
    if "validation_elbo" in fit.history:
        other = _num_observed(validation, fit.history.attrs.get("num_observed_validation"))
        values = fit.history["validation_elbo"].values
        there = np.isfinite(values)
        if number and other:
            values = values / other
            ax.plot(steps[there], values[there], "o--", color=ORANGE, markersize=4, label="validation")
            shown.append(values[there])
        elif number is None:
            ax.plot(
                steps[there],
                values[there],
                "o--",
                color=ORANGE,
                markersize=4,
                label="validation (its own data)",
            )
            shown.append(values[there])
        if ax.lines[-1].get_linestyle() == "--":
            ax.legend(frameon=False)
    low, high = min(np.nanquantile(v, 0.02) for v in shown), max(np.nanmax(v) for v in shown)
    margin = 0.05 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)
    ax.set_xlabel("step")
    ax.set_ylabel("ELBO (nats per observed number)" if number else "ELBO (nats, all data)")
    return ax


def embedding(
    tree: xr.DataTree,
    ax: Axes | Sequence[Axes] | None = None,
    against: Mapping[str, float] | Any = None,
    color: Mapping[str, Any] | Any = None,
    labels: bool = True,
    *,
    label: str | None = None,
) -> Axes | np.ndarray:
    """The posterior of every recording's embedding: means and 90 % intervals.

    With ``against`` a panel for each embedding dim, over a value of the recordings. Without: a row for each recording
    (one embedding dim), or the first two dims with ellipses that hold 90 %.

    Args:
        tree: of :func:`pyro_metassm.posterior` or :func:`pyro_metassm.forecast`.
        ax: where to draw; with ``against`` and several embedding dims, as many axes.
        against: a value of every recording: a mapping by name, a DataArray over `recording`, or in the tree's order.
        color: likewise, numbers (a colour bar) or categories (a legend).
        labels: write the recordings' names beside the points.
        label: of the axis of ``against``; default a DataArray's name.

    Returns:
        the axes, or an array of them.

    Raises:
        ValueError: values that lack a recording, too few axes.

    Example:
        >>> draws = np.random.default_rng(0).normal([[-1.0], [1.0]], 0.1, (1, 50, 2, 1))
        >>> dims = ("chain", "draw", "recording", "embedding_dim")
        >>> data = xr.DataArray(draws, {"recording": ["slow", "fast"]}, dims, "embedding")
        >>> tree = xr.DataTree.from_dict({"posterior": data.to_dataset()})
        >>> embedding(tree, against={"slow": 2.5, "fast": 5.0}, label="speed (rad/s)").get_xlabel()
        'speed (rad/s)'
    """
    e = (
        tree["posterior"]["embedding"]
        .stack(sample=("chain", "draw"))
        .transpose("recording", "embedding_dim", "sample")
    )
    names, draws = [str(name) for name in e["recording"].values], e.values
    size = draws.shape[1]
    styles, legend = _colors(color, names)
    if against is not None:
        x = np.array(_of_recordings(against, names, "against"), float)
        label = label or str(getattr(against, "name", None) or "value of the recording")
        if ax is None and size > 1:
            import matplotlib.pyplot as plt

            ax = plt.subplots(1, size, figsize=(4 * size, 3.5), layout="constrained")[1]
        axes = np.atleast_1d(new_axes(ax) if ax is None else np.asarray(ax, object))
        if len(axes) < size:
            raise ValueError(f"embedding: needed {size} axes, one for each embedding dim, got {len(axes)}")
        for d in range(size):
            for row, style in enumerate(styles):
                _interval(axes[d], x[row], draws[row, d], style, vertical=True)
                if labels:
                    _name(axes[d], names[row], x[row], draws[row, d].mean(), len(names))
            axes[d].set_xlabel(label)
            axes[d].set_ylabel(_embedding_label(d, size))
            axes[d].margins(x=0.1)
        legend(axes[0])
        return axes[0] if size == 1 else axes[:size]
    ax = new_axes(ax)
    if size == 1:
        for row, style in enumerate(styles):
            _interval(ax, row, draws[row, 0], style, vertical=False)
        ax.set_yticks(range(len(names)), names if labels else [""] * len(names))
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_xlabel(_embedding_label(0, 1))
    else:
        for row, style in enumerate(styles):
            _ellipse(ax, draws[row, :2], style)
            if labels:
                _name(ax, names[row], *draws[row, :2].mean(1), len(names))
        ax.set_xlabel(_embedding_label(0, size))
        ax.set_ylabel(_embedding_label(1, size))
        ax.margins(0.1)
    legend(ax)
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
    """One trial as observed, reconstructed up to the context's end and forecast after it; a panel for each neuron.

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
        if recording not in tree.children or trial not in tree[recording]["observed_data"]["trial"].values:
            raise ValueError(
                f"traces: needed trial {trial} of recording {recording!r} in the {what}, got none; a trial that ends "
                "before the context is not forecast"
            )
    past, ahead = (
        tree[recording].children[group].to_dataset()["rates"].sel(trial=trial)
        for tree, group in ((posterior_tree, "posterior"), (forecast_tree, "predictions"))
    )
    seen = posterior_tree[recording]["observed_data"]["observations"].sel(trial=trial)
    if isinstance(neurons, int | np.integer):
        spread = np.nan_to_num(past.mean(("chain", "draw")).std("time").values)
        neurons = sorted(np.argsort(-spread, kind="stable")[:neurons].tolist())
    if axes is None:
        import matplotlib.pyplot as plt

        size = (7, 1.2 + 1.4 * len(neurons))
        axes = plt.subplots(len(neurons), 1, sharex=True, figsize=size, layout="constrained", squeeze=False)[
            1
        ][:, 0]
    axes = np.atleast_1d(np.asarray(axes, object))
    if len(axes) < len(neurons):
        raise ValueError(f"traces: needed {len(neurons)} axes, one for each neuron, got {len(axes)}")
    time = past["time"].values
    width = float(time[1] - time[0]) if len(time) > 1 else 1.0
    start = time[0] + (context - 0.5) * width
    stop = ahead["time"].values[-1] + width / 2
    for ax, neuron in zip(axes, neurons, strict=False):
        y = seen.isel(neuron=neuron)
        ax.plot(y["time"], y, ".", color=BLACK, markersize=3.5, label="observed")
        _band(ax, past.isel(neuron=neuron, time=slice(context)), BLUE, "-", "reconstructed")
        _band(ax, ahead.isel(neuron=neuron), ORANGE, "--", "forecast")
        ax.axvline(start, color=BLACK, linewidth=1.0, linestyle=":")
        ax.set_xlim(time[0] - width / 2, max(stop, time[-1] + width / 2))
        ax.set_ylabel(f"neuron {seen['neuron'].values[neuron]}")
    axes[0].set_title(f"{recording}, trial {trial} (bands: 90 % of the rate)", fontsize="medium")
    axes[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    axes[len(neurons) - 1].set_xlabel("time (s)")
    return axes[: len(neurons)]


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
    size = (3.2 * len(names), 1.2 + 1.4 * neurons)
    figure, axes = plt.subplots(neurons, len(names), squeeze=False, figsize=size, layout="constrained")
    for column, name in zip(axes.T, names, strict=True):
        first = int(forecast_tree[name]["observed_data"]["trial"].values[0]) if trial is None else trial
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


# ---- parts ----------------------------------------------------------------------------------------------------------


def _num_observed(recs: Recordings | None, known: Any) -> float | None:
    return float(sum(int(r.mask.sum()) for r in recs.values())) if recs is not None else known


def _of_recordings(values: Any, names: Sequence[str], what: str) -> list:
    """A value of every recording, in the order of the names."""
    if isinstance(values, xr.DataArray) and "recording" in values.coords:
        values = dict(zip(values["recording"].values.tolist(), values.values.tolist(), strict=True))
    if isinstance(values, Mapping):
        lacking = [name for name in names if name not in values]
        if lacking:
            raise ValueError(f"embedding: needed a value of every recording in {what}, got none of {lacking}")
        return [values[name] for name in names]
    found = list(np.asarray(values).tolist())
    if len(found) != len(names):
        raise ValueError(
            f"embedding: needed {len(names)} values in {what}, one for each recording, got {len(found)}"
        )
    return found


def _colors(color: Any, names: Sequence[str]):
    """A style for every recording, and a function that adds what explains it to an axes."""
    if color is None:
        return [{"color": BLUE, "marker": "o"}] * len(names), lambda ax: None
    values = _of_recordings(color, names, "color")
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        scale = ScalarMappable(Normalize(min(values), max(values)), colormaps["cividis"])
        text = str(getattr(color, "name", None) or "")
        styles = [{"color": scale.to_rgba(v), "marker": "o"} for v in values]
        return styles, lambda ax: ax.figure.colorbar(scale, ax=ax, label=text)
    kinds = list(dict.fromkeys(map(str, values)))
    style = {
        k: {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
        for i, k in enumerate(kinds)
    }

    def legend(ax: Axes) -> None:
        handles = [ax.plot([], [], linestyle="", label=kind, **style[kind])[0] for kind in kinds]
        ax.legend(handles=handles, frameon=False)

    return [style[str(v)] for v in values], legend


def _interval(ax: Axes, at: float, draws: np.ndarray, style: dict, vertical: bool) -> None:
    mean, (low, high) = draws.mean(), np.quantile(draws, INTERVAL)
    error = np.array([[max(mean - low, 0.0)], [max(high - mean, 0.0)]])
    where = {"x": at, "y": mean, "yerr": error} if vertical else {"x": mean, "y": at, "xerr": error}
    ax.errorbar(**where, linestyle="", markersize=5, capsize=2, linewidth=1.2, **style)


def _ellipse(ax: Axes, draws: np.ndarray, style: dict) -> None:
    from matplotlib.patches import Ellipse

    center = draws.mean(1)
    values, vectors = np.linalg.eigh(np.cov(draws) if draws.shape[1] > 1 else np.zeros((2, 2)))
    # A normal plane holds 90 % within sqrt(-2 ln 0.1) standard deviations.
    width, height = 2 * np.sqrt(-2 * np.log(0.1) * values.clip(min=0))
    angle = np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0]))
    ax.add_patch(Ellipse(tuple(center), width, height, angle=angle, facecolor=style["color"], alpha=0.25))
    ax.plot(*center[:, None], linestyle="", markersize=5, **style)


def _name(ax: Axes, name: str, x: float, y: float, count: int) -> None:
    size = "small" if count <= 2 * FEW else "xx-small"
    ax.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=size)


def _embedding_label(dim: int, size: int) -> str:
    return "embedding" if size == 1 else f"embedding dim {dim + 1}"


def _band(ax: Axes, draws: xr.DataArray, color: str, style: str, label: str) -> None:
    time = draws["time"].values
    low, high = draws.quantile(INTERVAL, ("chain", "draw"), skipna=True).values
    ax.fill_between(time, low, high, color=color, alpha=0.25, linewidth=0)
    ax.plot(time, draws.mean(("chain", "draw")).values, style, color=color, linewidth=1.6, label=label)
