"""What came of adapting to new recordings: the table, the picture, the lines that are printed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyro_metassm.experiments import report

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes

COLUMNS = ("recording", "method", "num_trials", "quantity", "index", "value")
METHODS = {"adapted": ("adapted", "-"), "scratch": ("from scratch", "--"), "constant": ("constant", ":")}
WORST = -1.0  # the least that is drawn of a score
WORSE = 2.0  # roll-out error, in that of the worst known recording, up to which a new one is like them
# In variances, where nothing is known of the known ones: roll-outs miss more than they explain.
UNEXPLAINED = 0.5
ALIKE = 0.01  # difference of scores up to which neither is called better
FEW = 12  # known recordings that are named
NINETY = np.sqrt(-2 * np.log(0.1))  # sd within which a Normal plane holds 90 %


def headline(numbers: dict, method: str, name: str, number: str) -> float | None:
    """The score that matters most, where there is one."""
    scores = numbers["scores"].get(method, {}).get(number, {}).get(numbers["score"], {})
    return scores.get(str(numbers["horizon"]), scores).get(name)


def lines(numbers: dict) -> Iterator[str]:
    """The score that matters most, the embeddings and whether the family fits, as lines to print."""
    of_r2 = numbers["score"] == "forecast_r2"
    what = (
        f"{numbers['horizon']} bins ahead" if of_r2 else f"of the {numbers['horizon']} bins after the context"
    )
    yield f"{numbers['score']} {what}, on test trials"
    yield f"{'recording':32}{'trials':>7}{''.join(f'{method:>10}' for method in METHODS)}   embedding (sd)"
    for name, by_number in numbers["embedding"].items():
        for number, e in by_number.items():
            values = [headline(numbers, method, name, number) for method in METHODS]
            cells = "".join(f"{'' if value is None else format(value, '.4f'):>10}" for value in values)
            where = ", ".join(f"{m:.3f} ({s:.3f})" for m, s in zip(e["mean"], e["sd"], strict=True))
            yield f"{name[:31]:32}{number:>7}{cells}   {where}"
    for name in numbers["embedding"]:
        yield f"{name}: {_verdict(numbers, name)}"


def fits(numbers: dict, name: str) -> bool | None:
    """Whether the family fits a recording, by all the trials to adapt from; None where that cannot be told.

    It does where roll-outs of its dynamics miss about as much of the latents as they do for the recordings that the fit
    was trained on, whose share tells what is noise. Where nothing is known of those, or roll-outs miss most of them as
    well, missing more says little; then it does not fit if it forecasts worse than a constant, and the same model
    from the same trials better.
    """
    number, found = list(numbers["embedding"][name].items())[-1]
    if "rollout_error" not in found:
        return None
    limit = _limit(numbers)
    if found["rollout_error"] <= (UNEXPLAINED if limit is None else limit):
        return True
    if limit is not None and limit <= UNEXPLAINED:
        return False
    adapted, scratch, constant = (headline(numbers, method, name, number) for method in METHODS)
    if adapted is None or scratch is None or constant is None:
        return None
    return False if adapted < constant < scratch else None


def _limit(numbers: dict) -> float | None:
    """The largest roll-out error that is like those of known recordings; None where theirs are not known."""
    known = [error for error in numbers.get("rollout_error_known", {}).values() if np.isfinite(error)]
    return WORSE * max(known) if known else None


def _verdict(numbers: dict, name: str) -> str:
    found = list(numbers["embedding"][name].values())[-1]
    if "rollout_error" not in found:
        return "whether the family fits was not asked (neither read-in nor read-out was trained)"
    error = (
        f"roll-outs of its dynamics miss {_percent(found['rollout_error'])} of the variance of the latents"
    )
    limit = _limit(numbers)
    error += "" if limit is None else f" (of known recordings, {_percent(limit / WORSE)} at most)"
    answer = {
        True: "the family fits",
        False: "the family does not fit",
        None: "it cannot be told whether the family fits",
    }
    return f"{answer[fits(numbers, name)]}: {error}{_beside(numbers, name)}"


def _percent(share: float) -> str:
    return f"{100 * share:{'.0f' if share >= 0.1 else '.1g'}} %"


def _beside(numbers: dict, name: str) -> str:
    """With how many trials the adapted model forecasts better, and worse, than the one from scratch."""
    apart: dict[str, list[str]] = {"better": [], "worse": []}
    compared = 0
    for number in numbers["embedding"][name]:
        adapted, scratch = (headline(numbers, method, name, number) for method in ("adapted", "scratch"))
        if adapted is None or scratch is None:
            continue
        compared += 1
        if abs(adapted - scratch) > ALIKE:
            apart["better" if adapted > scratch else "worse"].append(number)
    if not compared:
        return ""
    found = [f"{how} with {', '.join(with_)} trials" for how, with_ in apart.items() if with_]
    return f"; compared with the model from scratch it forecasts {' and '.join(found) or 'alike'}"


def write_csv(numbers: dict, path: Path) -> None:
    """Scores and embeddings in long form, a row for each value; `index` is the steps ahead or the embedding dim."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for method, by_number in numbers["scores"].items():
            for number, by_score in by_number.items():
                for score, values in by_score.items():
                    by_index = values if score == "forecast_r2" else {"": values}
                    for index, of in by_index.items():
                        writer.writerows([name, method, number, score, index, v] for name, v in of.items())
        for name, by_number in numbers["embedding"].items():
            for number, quantities in by_number.items():
                for quantity, values in quantities.items():
                    each = enumerate(values, 1) if isinstance(values, list) else [("", values)]
                    what = quantity if "_" in quantity else f"embedding_{quantity}"
                    writer.writerows([name, "adapted", number, what, index, v] for index, v in each)


def draw(numbers: dict, tree: xr.DataTree, ahead: xr.DataTree, out: Path) -> None:
    """``adaptation.png``: scores and embeddings by number of trials; ``traces.png``: some test trials."""
    import matplotlib.pyplot as plt

    from pyro_metassm import plots

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    _scores(left, numbers)
    size = len(numbers["embedding_prior"]["mean"])
    (_line if size == 1 else _map)(right, numbers)
    names = list(numbers["embedding"])
    handles, texts = left.get_legend_handles_labels()
    figure.legend(
        handles, texts, loc="outside lower center", ncols=min(4, len(names)), frameon=False, fontsize="small"
    )
    report.save_figure(figure, out / "adaptation.png")
    report.save_figure(plots.trace_panels(ahead, tree, names, context=numbers["context"]), out / "traces.png")


def _style(row: int) -> dict:
    from pyro_metassm.plots._style import MARKERS, PALETTE

    return {"color": PALETTE[row % len(PALETTE)], "marker": MARKERS[row % len(MARKERS)], "markersize": 5}


def _ticks(ax: Axes, numbers: dict) -> list[str]:
    """The numbers of trials, along x one after the other."""
    every = list(next(iter(numbers["embedding"].values())))
    ax.set_xticks(range(len(every)), every)
    ax.set_xlabel("trials to adapt from")
    return every


def _scores(ax: Axes, numbers: dict) -> None:
    every = _ticks(ax, numbers)
    series: list[tuple[np.ndarray, dict]] = []
    for row, name in enumerate(numbers["embedding"]):
        for method, (label, line) in METHODS.items():
            values = [headline(numbers, method, name, number) for number in every]
            if None not in values:
                style = _style(row) | {"fillstyle": "full" if method == "adapted" else "none"}
                style |= {"marker": "", "linewidth": 1.0} if method == "constant" else {}
                y = np.array(values, float)
                ax.plot(y, line, label=f"{name}, {label}", **style)
                series.append((y, style))
    drawn = np.concatenate([y[np.isfinite(y)] for y, _ in series] or [np.zeros(0)])
    low, high = max(drawn.min(initial=1.0), WORST), max(drawn.max(initial=WORST), 0.0)
    margin = 0.06 * (high - low) + 1e-3
    ax.set_ylim(low - margin, high + margin)
    models = [(y, style) for y, style in series if style["marker"]]
    for place, (y, style) in enumerate(models):  # below the axis: an arrow at its end
        below = np.flatnonzero(y < low - margin)
        x = below + 0.05 * (place - (len(models) - 1) / 2)
        ax.plot(x, np.full(len(x), low - margin / 2), linestyle="", **style | {"marker": "v"})
    if low <= 0:
        ax.axhline(0.0, color="0.4", linewidth=0.8, linestyle=":")
    k = numbers["horizon"]
    is_r2 = numbers["score"] == "forecast_r2"
    ax.set_ylabel(f"forecast $R^2$, {k} bins ahead" if is_r2 else f"forecast of {k} bins (bits per spike)")
    ax.set_title("test trials (0: their own mean)", fontsize="medium")


def _prior(numbers: dict) -> str:
    """The prior in words; one number for all dims where they agree."""
    parts = []
    for what, values in numbers["embedding_prior"].items():
        every = [f"{value:.2g}" for value in values]
        parts.append(f"{what} {every[0] if len(set(every)) == 1 else ', '.join(every)}")
    return "prior: " + ", ".join(parts)


def _line(ax: Axes, numbers: dict) -> None:
    """One embedding dim: against the number of trials, beside the known recordings'."""
    _ticks(ax, numbers)
    known = numbers["embedding_known"]
    for name, e in known.items():
        ax.axhline(e["mean"][0], color="0.75", linewidth=1.0, zorder=0)
        if len(known) <= FEW:
            ax.annotate(name, (1.0, e["mean"][0]), xytext=(4, 0), xycoords=("axes fraction", "data"),
                        textcoords="offset points", color="0.4", fontsize="x-small", va="center")  # fmt: skip
    for row, by_number in enumerate(numbers["embedding"].values()):
        mean, sd = (np.array([e[key][0] for e in by_number.values()]) for key in ("mean", "sd"))
        spread = np.array([e.get("embedding_spread", [0.0])[0] for e in by_number.values()])
        x = np.arange(len(mean)) + 0.04 * row
        ax.errorbar(x, mean, np.hypot(sd, spread), linewidth=1.2, capsize=2, **_style(row))
    ax.set_ylabel("embedding")
    ax.set_title(f"embedding ± sd ({_prior(numbers)})", fontsize="medium")


def _map(ax: Axes, numbers: dict) -> None:
    """Two embedding dims: the path of each new recording as trials grow, among the known ones."""
    from matplotlib.patches import Ellipse

    known = numbers["embedding_known"]
    for name, e in known.items():
        ax.plot(*e["mean"][:2], "o", color="0.6", markersize=5)
        if len(known) <= FEW:
            ax.annotate(
                name,
                e["mean"][:2],
                xytext=(5, 3),
                textcoords="offset points",
                color="0.4",
                fontsize="x-small",
            )
    for row, by_number in enumerate(numbers["embedding"].values()):
        style = _style(row)
        path = np.array([e["mean"][:2] for e in by_number.values()])
        ax.plot(*path.T, "-", linewidth=0.8, color=style["color"])
        for step, (number, e) in enumerate(by_number.items(), 1):
            share = step / len(by_number)
            size = 2 * NINETY * np.array(e["sd"][:2])
            ax.add_patch(Ellipse(e["mean"][:2], *size, facecolor=style["color"], alpha=0.12 * share))
            ax.plot(*e["mean"][:2], linestyle="", alpha=0.3 + 0.7 * share, **style)
            ax.annotate(number, e["mean"][:2], xytext=(4, -9), textcoords="offset points", color=style["color"],
                        fontsize="x-small")  # fmt: skip
    ax.margins(0.1)
    ax.set_xlabel("embedding dim 1")
    ax.set_ylabel("embedding dim 2")
    ax.set_title(f"embedding by trials, 90 % ({_prior(numbers)})", fontsize="medium")
