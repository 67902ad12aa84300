"""Pictures of a study's results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_metassm import plots
from pyro_metassm.experiments.maps import PARAMETERS
from pyro_metassm.experiments.methods import METHODS, Method
from pyro_metassm.experiments.systems import renamed, tag
from pyro_metassm.experiments.tables import Row
from pyro_metassm.plots._style import PALETTE
from pyro_metassm.posterior import posterior
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOWEST = -0.5  # of the axes of scores
NEAR = 0.1  # below the ceiling: the range of scores of methods that forecast at all
SEEN = 32  # trials that say where a flow is drawn
GREY = "0.75"


def flow(fits: Mapping[str, Fit], test: Recordings, names: Sequence[str], suffix: str = tag(0)) -> Figure:
    """True and learned flow of some recordings, a row each: the truth and then a column for each fit.

    Args:
        fits: by what is written above their column; they know the recordings as ``name + suffix``.
        test: trials of the recordings, with their truth.
        names: the recordings to show.
        suffix: of their names in the fits.
    """
    import matplotlib.pyplot as plt

    shape = (len(names), 1 + len(fits))
    size = (2.6 * shape[1], 2.9 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for row, name in zip(axes, names, strict=True):
        some = test.select([name]).take_trials(min(SEEN, test[name].num_trials))
        truth = some.truth[name]
        states = truth["latents"].values.reshape(-1, truth.sizes["latent_dim"])
        low, high = np.quantile(states, [0.005, 0.995], axis=0)
        margin = 0.1 * (high - low)
        lim = tuple(zip((low - margin).tolist(), (high + margin).tolist(), strict=True))
        speed = np.linalg.norm(np.diff(truth["latents"].values, axis=1), axis=-1) / some.bin_width
        shared: dict[str, Any] = {"lim": lim, "speed_max": float(np.quantile(speed, 0.95)), "colorbar": False}
        plots.true_flow_field(truth, row[0], bin_width=some.bin_width, **shared)
        row[0].set_title(f"{name}: true", fontsize="small")
        for ax, (label, fit) in zip(row[1:], fits.items(), strict=True):
            tree = posterior(fit, renamed(some, suffix), num_samples=10)
            plots.flow_field(fit, name + suffix, ax, tree=tree, align=True, num_trials=2, **shared)
            ax.set_title(label, fontsize="small")
            ax.set_ylabel("")
    return figure


def forecast(panels: Mapping[str, Sequence[Row]], chosen: Mapping[str, Method], bin_width: float) -> Figure:
    """Forecast scores against the horizon: every method and the ceiling.

    Args:
        panels: rows with ``method, k, r2, ceiling`` by the titles of their panels; means over these are drawn.
        chosen: the methods.
        bin_width: in s.
    """
    import matplotlib.pyplot as plt

    size = (3.4 * len(panels) + 2.6, 3.6)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for ax, (title, rows) in zip(axes[0], panels.items(), strict=True):
        for name, method in chosen.items():
            _line(ax, [row for row in rows if row["method"] == name], "r2", method.label, style(name))
        _line(ax, rows, "ceiling", "ceiling", {"color": "black", "linestyle": ":"})
        ax.set_title(title, fontsize="medium")
        ax.set_xlabel(f"bins of {1000 * bin_width:g} ms ahead")
    _finish(axes[0])
    return figure


def _line(ax: Axes, rows: Sequence[Row], key: str, label: str, look: Mapping[str, Any]) -> None:
    if not rows:
        return
    steps = sorted({row["k"] for row in rows})
    sums, counts = np.zeros(len(steps)), np.zeros(len(steps))
    place = {k: i for i, k in enumerate(steps)}
    for row in rows:
        sums[place[row["k"]]] += max(row[key], -1.0)
        counts[place[row["k"]]] += 1
    ax.plot(steps, sums / counts, label=label, **look)


def shots_curve(table: Sequence[Row], chosen: Mapping[str, Method], k: str) -> Figure:
    """The score of the table against the number of adaptation trials, with standard errors; at the right, the top."""
    import matplotlib.pyplot as plt

    figure, (ax, near) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    top = sorted({(row["n_s"], row["ceiling"]) for row in table})
    for axes in (ax, near):
        for name, method in chosen.items():
            rows = sorted((row for row in table if row["method"] == name), key=lambda row: row["n_s"])
            n, mean, sem = (np.array([row[key] for row in rows], float) for key in ("n_s", "mean", "sem"))
            look = {"label": method.label, "marker": "o", "markersize": 3, **style(name)}
            axes.errorbar(n, mean, np.nan_to_num(sem), **look)
        axes.plot(*zip(*top, strict=True), color="black", linestyle=":", label="ceiling")
        axes.set_xscale("log", base=2)
        axes.set_xticks([n for n, _ in top], [str(n) for n, _ in top])
        axes.set_xlabel("trials to adapt with")
    _finish([ax, near])
    ax.set_ylabel(f"forecast $R^2$, k = {k}")
    best = max(ceiling for _, ceiling in top)
    near.set_ylim(best - NEAR, best + 0.1 * NEAR)
    near.set_title("near the ceiling", fontsize="medium")
    return figure


def _finish(axes) -> None:
    """One range for all axes: down to the lowest score, at most to ``LOWEST``; and a legend."""
    low = min(float(np.nanmin(line.get_ydata())) for ax in axes for line in ax.get_lines())
    for ax in axes:
        ax.axhline(0.0, color="0.6", linewidth=0.8)
        ax.set_ylim(max(low - 0.1 * (1 - low), LOWEST), 1.0 + 0.03 * (1 - max(low, LOWEST)))
    axes[0].set_ylabel("forecast $R^2$")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")


def style(name: str) -> dict[str, Any]:
    """The look of a method's lines: the plain recipe is dashed and what is revised dotted, in the method's colour."""
    bases = [known for known, method in METHODS.items() if not (method.plain or method.revised)]
    base = name.removesuffix("-plain").removesuffix("-revised")
    place = bases.index(base) if base in bases else len(bases)
    return {
        "color": PALETTE[place % len(PALETTE)],
        "linestyle": "-" if base == name else ":" if name.endswith("-revised") else "--",
        "linewidth": 2.2 if name == bases[0] else 1.3,
    }


def embedding_map(
    trained: Mapping[str, Sequence[float]],
    attrs: Mapping[str, Mapping[str, Any]],
    adapted: Mapping[str, Sequence[float]],
) -> Figure:
    """The plane of embeddings, a panel for each parameter that colours the recordings which have it.

    Args:
        trained: embeddings of the recordings trained on.
        attrs: of all recordings' truths.
        adapted: embeddings of the held-out recordings: stars.
    """
    import matplotlib.pyplot as plt

    panels = [(family, q) for family, names in PARAMETERS.items() for q in names]
    panels = [(family, q) for family, q in panels if any(attrs[n]["system"] == family for n in trained)]
    size = (4.0 * len(panels), 3.4)
    figure, axes = plt.subplots(
        1, len(panels), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for ax, (family, parameter) in zip(axes[0], panels, strict=True):
        members = [[n for n in of if attrs[n]["system"] == family] for of in (trained, adapted)]
        values = [attrs[n][parameter] for of in members for n in of]
        others = np.array([e[:2] for n, e in trained.items() if attrs[n]["system"] != family]).reshape(-1, 2)
        ax.scatter(*others.T, color=GREY, s=18)
        for of, names, marker, size_ in ((trained, members[0], "o", 45), (adapted, members[1], "*", 160)):
            points = np.array([of[n][:2] for n in names]).reshape(-1, 2)
            colors = [attrs[n][parameter] for n in names]
            dots = ax.scatter(
                *points.T, c=colors, marker=marker, s=size_, cmap="cividis", edgecolors="black",
                linewidths=0.5, vmin=min(values), vmax=max(values),
            )  # fmt: skip
        figure.colorbar(dots, ax=ax)
        ax.set_title(f"{parameter} ({family})", fontsize="medium")
        ax.set_xlabel("embedding dim 1")
    axes[0, 0].set_ylabel("embedding dim 2")
    return figure


def trials(trained: Mapping[str, Sequence[float]], adapted: Sequence[Row]) -> Figure:
    """The embeddings of held-out recordings as trials grow: on the map, and how far they are from where they end.

    Args:
        trained: embeddings of the recordings trained on.
        adapted: rows with ``recording, draw, n_s, embedding``.
    """
    import matplotlib.pyplot as plt

    known = np.array([e[:2] for e in trained.values()])
    spread = float(np.sqrt(known.var(0).sum())) or 1.0
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained")
    left.scatter(*known.T, color=GREY, s=18, label="trained on")
    names = list(dict.fromkeys(row["recording"] for row in adapted))
    for number, name in enumerate(names):
        of_draws: dict[int, list] = {}
        for row in adapted:
            if row["recording"] == name:
                of_draws.setdefault(row["n_s"], []).append(row["embedding"][:2])
        shots = sorted(of_draws)
        means = np.array([np.mean(of_draws[n], 0) for n in shots])
        color = PALETTE[number % len(PALETTE)]
        left.plot(*means.T, color=color, linewidth=1.0)
        left.scatter(*means.T, color=color, s=[12 + 14 * i for i in range(len(shots))], label=name)
        distances = [np.linalg.norm(np.array(of_draws[n]) - means[-1], axis=1) / spread for n in shots]
        right.plot(shots, [d.mean() for d in distances], "o-", color=color, markersize=4, label=name)
        right.fill_between(
            shots, [d.min() for d in distances], [d.max() for d in distances], color=color, alpha=0.12
        )
    left.set_xlabel("embedding dim 1")
    left.set_ylabel("embedding dim 2")
    right.set_xscale("log", base=2)
    right.set_xticks(shots, [str(n) for n in shots])
    right.set_xlabel("trials to adapt with (larger dots: more)")
    right.set_ylabel(f"distance from that of {shots[-1]} trials\n(in the spread of those trained on)")
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    return figure


def against(rows: Sequence[Row], values: Mapping[str, float], label: str) -> Figure:
    """The first embedding dim of recordings against a value of theirs, with 90 % intervals."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
    x = [values[row["recording"]] for row in rows]
    loc, sd = ([row[key][0] for row in rows] for key in ("embedding", "embedding_sd"))
    ax.errorbar(
        x, loc, 1.645 * np.array(sd), linestyle="", marker="o", markersize=5, capsize=2, color=PALETTE[0]
    )
    ax.set_xlabel(label)
    ax.set_ylabel("embedding")
    return figure
