"""What is drawn on a page: functions that draw into a figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm import plots
from pyro_metassm.reporting.mapping import Map, Place
from pyro_metassm.reporting.scoring import LEVEL
from pyro_metassm.result import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[["Figure"], Any]
NAMED = 40  # recordings whose names stand beside the distances
LETTERS = 22  # of a name in a picture
NEURONS = 2


def history(fit: Fit) -> Draw:
    return lambda figure: plots.history(fit, figure.subplots())


def forecasts(curve: xr.DataArray) -> Draw:
    """The forecast score against the horizon."""
    return lambda figure: plots.forecast_curve(curve, figure.subplots()).set_ylabel("forecast R²")


def coverage_curve(coverage: xr.DataArray) -> Draw:
    """How often observations lie in their forecast intervals, against the horizon."""

    def draw(figure: Figure) -> None:
        ax = figure.subplots()
        steps = coverage["horizon_step"].values
        ax.plot(steps, coverage.transpose("horizon_step", "recording").values, color="0.65", linewidth=0.8)
        ax.plot(
            steps,
            coverage.mean("recording").values,
            color="black",
            linewidth=2.2,
            label=f"mean of {coverage.sizes['recording']}",
        )
        ax.axhline(LEVEL, color="black", linestyle="--", linewidth=1.0, label="calibrated")
        ax.set_ylim(min(0.5, float(coverage.min()) - 0.03), 1.02)
        width = float(coverage["lead_time"][0]) / float(steps[0])
        ax.set_xlabel(f"bins of {1000 * width:g} ms ahead")
        ax.set_ylabel(f"observations in {100 * LEVEL:.0f} % intervals")
        ax.legend(frameon=False, fontsize="small", loc="lower left")

    return draw


def embeddings(found: Map, color: dict[str, Any] | None, label: str | None) -> Draw:
    """Posteriors of the embeddings: rows, or the plane of the first two dims."""

    def draw(figure: Figure) -> None:
        noise = np.random.default_rng(0).standard_normal((1, 400, *found.mean.shape))
        values = xr.DataArray(
            found.mean + found.sd * noise,
            {"recording": [short(name) for name in found.names]},
            ("chain", "draw", "recording", "embedding_dim"),
            "embedding",
        )
        tree = xr.DataTree.from_dict({"posterior": values.to_dataset()})
        plots.embedding(
            tree, figure.subplots(), color=None if color is None else list(color.values()), label=label
        )

    return draw


def distances(found: Map, key: str) -> Draw:
    """Distances between recordings, recordings in the order of their places along the map.

    Args:
        found: the map.
        key: "distance" in embedding, or "dynamics_distance".
    """

    def draw(figure: Figure) -> None:
        data = found.distances
        assert isinstance(data, xr.Dataset)
        centred = found.mean - found.mean.mean(0)
        order = np.argsort(centred @ np.linalg.svd(centred, full_matrices=False)[2][0], kind="stable")
        names = [short(found.names[row]) for row in order]
        values = (
            data[key].transpose("draw", "recording", "recording_").mean("draw").values[np.ix_(order, order)]
        )
        ax = figure.subplots()
        image = ax.imshow(values if key == "distance" else np.sqrt(values), cmap="cividis")
        label = "distance in embedding" if key == "distance" else "difference of the dynamics (rms, 1/s)"
        figure.colorbar(image, ax=ax, shrink=0.75, label=label)
        if len(names) <= NAMED:
            look: dict[str, Any] = {"fontsize": "xx-small" if len(names) > 12 else "small"}
            ax.set_xticks(range(len(names)), names, rotation=90, **look)
            ax.set_yticks(range(len(names)), names, **look)
        else:
            ax.set_xticks([])
            ax.set_yticks([])

    return draw


def branches(along: xr.Dataset) -> Draw:
    """Fixed points and cycles along a path, in the latent that varies most."""
    return lambda figure: plots.bifurcation(along, figure.subplots())


def flow(place: Place, paths: xr.DataArray | None) -> Draw:
    """The flow of a recording with its fixed points and cycles."""

    def draw(figure: Figure) -> None:
        assert isinstance(place.field, xr.Dataset)
        ax = plots.flow(place.field, figure.subplots(), paths=paths, num_paths=2)
        if isinstance(place.cycles, xr.Dataset):
            plots.limit_cycles(place.cycles, ax, on=place.field, legend=False)
        if isinstance(place.points, xr.Dataset):
            plots.fixed_points(place.points, ax, on=place.field)
        ax.set_title("")

    return draw


def trial(tree: xr.DataTree, ahead: xr.DataTree | None, name: str) -> Draw:
    """The first trial as it was observed, reconstructed and maybe forecast: the neurons whose rates vary most."""

    def draw(figure: Figure) -> None:
        size = min(NEURONS, tree[f"{name}/observed_data"].sizes["neuron"])
        axes = figure.subplots(size, 1, sharex=True, squeeze=False)[:, 0]
        plots.trajectories(tree, name, which=size, forecast=ahead, ax=list(axes))
        axes[0].set_title("")
        legend = axes[0].get_legend()
        handles, texts = axes[0].get_legend_handles_labels()
        if legend is not None:
            legend.remove()
        figure.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False, fontsize="small")

    return draw


def short(name: str) -> str:
    """A name that fits into a picture."""
    printed = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return printed if len(printed) <= LETTERS else printed[: LETTERS - 1] + "…"
