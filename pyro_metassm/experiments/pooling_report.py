"""What an experiment of real recordings found: tables by recording, verdicts, pictures, a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_metassm.experiments import report, tables
from pyro_metassm.experiments.pooling_scores import bits
from pyro_metassm.plots._style import PALETTE
from pyro_metassm.recordings import Recordings
from pyro_metassm.reporting import html as page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {
    "co": "co_bps",
    "fp": "fp_bps",
    "velocity": "velocity_r2",
    "forecast_velocity": "forecast_velocity_r2",
}
LEFT = -0.3  # of the pictures of scores: what is worse says only that it is bad
ENOUGH = 16  # trials from which adaptation is to beat training from scratch
Row = dict[str, Any]


def scores(rows: Iterable[Row]) -> list[Row]:
    """Every score with its standard error over trials, a row for each plan, seed, method and recording."""
    found = []
    for row in rows:
        of = {key: row[key] for key in ("plan", "seed", "recording", "method", "trials")}
        for key, name in NAMES.items():
            value, error = np.nan, np.nan
            if key in row:
                value, error = bits(row[key]) if key in ("co", "fp") else row[key]
            of |= {name: value, f"{name}_se": error}
        found.append(of)
    return found


def differences(
    rows: Sequence[Row], first: str, second: str, by: Sequence[str] = ("recording",)
) -> list[Row]:
    """Two methods and their difference in bits per spike by recording, seeds (and plans) averaged trial by trial.

    Returns:
        for each group of ``by``: both scores, ``difference`` and ``se`` (over trials, paired) of co-smoothing and of
        forecasts (``fp_``), ``seeds_sd`` of the co-smoothing difference (0 of one seed).
    """
    groups: dict[tuple, dict[str, list[Row]]] = {}
    for row in rows:
        if row["method"] in (first, second):
            of = groups.setdefault(tuple(row[key] for key in by), {first: [], second: []})
            of[row["method"]].append(row)
    found = []
    for key, of in groups.items():
        if not of[first] or not of[second]:
            continue
        result: Row = dict(zip(by, key, strict=True))
        for score, prefix in (("co", ""), ("fp", "fp_")):
            a, b = (_mean([row[score] for row in of[method]]) for method in (first, second))
            difference, error = bits(a, minus=b)
            result |= {f"{prefix}{first}": bits(a)[0], f"{prefix}{second}": bits(b)[0]}
            result |= {f"{prefix}difference": difference, f"{prefix}se": error}
        each = [
            bits(one["co"], minus=other["co"])[0]
            for one in of[first]
            for other in of[second]
            if one["seed"] == other["seed"]
        ]
        found.append(result | {"seeds_sd": float(np.std(each, ddof=1)) if len(each) > 1 else 0.0})
    return found


def _mean(pairs: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Gains of seeds averaged trial by trial; the spikes are the same."""
    return [np.mean([pair[0] for pair in pairs], 0).tolist(), list(pairs[0][1])]


def verdicts(
    pooled: Sequence[Row],
    adapted: Sequence[Row],
    few: Sequence[Row] = (),
    tuned: Sequence[Row] = (),
    pooled_tuned: Sequence[Row] = (),
) -> list[str]:
    """Whether pooling paid, in words with the numbers; and where it did not."""
    lines = []
    for what, found in (
        ("pooled minus single", pooled),
        ("pooled, then each alone, minus alone for as many steps", pooled_tuned),
    ):
        if found:
            lines.append(
                f"Co-smoothing of held-out trials, {what}, mean over {len(found)} recordings: "
                f"{_mean_difference(found)} bits per spike."
            )
            lines += [_against(row, "pooling does not help") for row in found if row["difference"] < 0]
    for trials in sorted({row["trials"] for row in few}):
        of = [row for row in few if row["trials"] == trials]
        lines.append(
            f"The same with {trials} trials of every recording, mean over {len(of)}: {_mean_difference(of)} bits per "
            "spike."
        )
    for what, verb, found in (
        ("Adapted", "adapting", adapted),
        ("Adapted and fine-tuned", "fine-tuning", tuned),
    ):
        enough = [row for row in found if row["trials"] == ENOUGH]
        if enough:
            won = [row for row in enough if row["difference"] > 0]
            lines.append(
                f"{what} with {ENOUGH} trials against {ENOUGH} trials from scratch: better in {len(won)} of "
                f"{len(enough)} held-out recordings."
            )
            lines += [_against(row, f"{verb} does not help") for row in enough if row["difference"] <= 0]
    return lines


def _mean_difference(rows: Sequence[Row]) -> str:
    error = np.sqrt(np.sum([row["se"] ** 2 for row in rows])) / len(rows)
    return f"{np.mean([row['difference'] for row in rows]):+.4f} ± {error:.4f}"


def _against(row: Row, what: str) -> str:
    sure = "" if abs(row["difference"]) > 2 * row["se"] else ", within two standard errors"
    return f"{row['recording']}: {what} ({row['difference']:+.4f} ± {row['se']:.4f} bits per spike{sure})."


def write(
    out: Path,
    title: str,
    rows: Sequence[Row],
    recs: Recordings,
    settings: Mapping[str, Any],
    notes: Sequence[str],
    captions: Mapping[str, str],
) -> dict:
    """Write the tables (``scores.csv``, ``pooling.csv``, ...), pictures of scores, ``index.html`` and ``metrics.json``.

    Args:
        out: the folder.
        title: of the page.
        rows: of :func:`pyro_metassm.experiments.pooling.run`.
        recs: the recordings.
        settings: what decided the numbers.
        notes: what a reader must know of the data.
        captions: of more pictures in the folder, by name.

    Returns:
        what ``metrics.json`` holds.
    """
    found = scores(rows)
    fits = [row for row in rows if row["piece"] in ("pooled", "pooled-tuned", "single")]
    pooled = differences(fits, "pooled", "single recording")
    pooled_tuned = differences(fits, "pooled, then alone", "single, longer")
    adapted, tuned, few = (
        differences(
            [row for row in rows if row["piece"] in (piece, "scratch")],
            method,
            "from scratch",
            ("recording", "trials"),
        )
        for piece, method in (("adapted", "adapted"), ("tuned", "fine-tuned"), ("few", "few pooled"))
    )
    written = {"scores.csv": found, "pooling.csv": pooled, "pooling_tuned.csv": pooled_tuned, "few.csv": few}
    written |= {"adaptation.csv": adapted, "tuning.csv": tuned}
    written = {name: of for name, of in written.items() if of}
    for name, of in written.items():
        tables.write(out / name, of)
    shown = {"scores.png": "Held-out trials by recording, with standard errors over trials"}
    report.save_figure(bars(found), out / "scores.png")
    if adapted:
        shown["adaptation.png"] = (
            "Held-out recordings: adapted, all of that trained on (fine-tuned), and from scratch, against the number "
            "of trials"
        )
        report.save_figure(curves(adapted, found), out / "adaptation.png")
    if few:
        shown["few.png"] = (
            "Held-out trials: pooled minus alone, against the trials of every recording that both learn from "
            "(last: all)"
        )
        report.save_figure(gains(few, pooled, found), out / "few.png")
    lines = verdicts(pooled, adapted, few, tuned, pooled_tuned)
    data = [
        {
            "recording": name,
            "subject": r.attrs.get("subject", ""),
            "trials": r.num_trials,
            "neurons": r.num_neurons,
            "of": r.attrs.get("neurons_in_file", r.num_neurons),
            "held out": int(r.held_out_neurons.sum()),
            "bin (ms)": 1000 * r.attrs.get("true_bin_width", r.bin_width),
        }
        for name, r in recs.items()
    ]
    parts = [
        page.heading("Does pooling pay?"),
        *(page.paragraph(line) for line in lines),
        page.heading("Data"),
        page.table(data),
        *(page.paragraph(note) for note in notes),
        page.heading("Pooled and single, bits per spike"),
        page.table(pooled),
        page.heading("Pooled, then each alone; and alone for as many steps, bits per spike"),
        page.table(pooled_tuned),
        page.heading("Few trials of every recording: pooled and each alone, bits per spike"),
        page.table(few),
        page.heading("Adapted and from scratch, bits per spike"),
        page.table(adapted),
        page.heading("Adapted and fine-tuned, and from scratch, bits per spike"),
        page.table(tuned),
        *(page.figure(name, caption) for name, caption in (shown | dict(captions)).items()),
        page.heading("All scores"),
        page.table(means(found)),
        page.links([*written, "metrics.json"]),
    ]
    page.write(out / "index.html", title, parts)
    numbers = {
        "verdicts": lines,
        "pooling": pooled,
        "pooling_tuned": pooled_tuned,
        "few": few,
        "adaptation": adapted,
        "tuning": tuned,
        "data": data,
        "settings": dict(settings),
    }
    return report.write_metrics(tables.plain(numbers), out)


def means(found: Sequence[Row]) -> list[Row]:
    """Scores by recording, method and trials, averaged over seeds and plans."""
    groups: dict[tuple, list[Row]] = {}
    for row in found:
        groups.setdefault((row["recording"], row["method"], row["trials"]), []).append(row)
    return [
        dict(zip(("recording", "method", "trials"), key, strict=True))
        | {name: _or_none(np.mean([row[name] for row in of])) for name in NAMES.values()}
        for key, of in groups.items()
    ]


def _or_none(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def bars(found: Sequence[Row]) -> Figure:
    """A panel for each score: recordings, a bar for each method that they have (adaptations: the most trials)."""
    import matplotlib.pyplot as plt

    used = [name for name in NAMES.values() if any(np.isfinite(row[name]) for row in found)]
    methods = list(dict.fromkeys(row["method"] for row in found))
    names = list(dict.fromkeys(row["recording"] for row in found))
    colors = plt.get_cmap("turbo")(
        np.linspace(0.05, 0.95, len(methods))
    )  # more methods than a cycle has colours
    pairs = {(row["recording"], row["method"]) for row in found}
    groups = [[(name, method) for method in methods if (name, method) in pairs] for name in names]
    rows = [pair for group in groups for pair in [*group, None]][:-1]  # an empty row between recordings
    middles = [(rows.index(group[0]) + rows.index(group[-1])) / 2 for group in groups]
    figure, axes = plt.subplots(
        1, len(used), figsize=(4 * len(used), 1.0 + 0.15 * len(rows)), squeeze=False, layout="constrained"
    )
    for ax, score in zip(axes[0], used, strict=True):
        left = min(0.0, *(row[score] for row in found if np.isfinite(row[score])))
        left = max(1.1 * left, LEFT)
        for at, pair in enumerate(rows):
            of = [row for row in found if (row["recording"], row["method"]) == pair]
            most = max((row["trials"] for row in of), default=0)
            of = [row for row in of if row["trials"] == most and np.isfinite(row[score])]
            if of and pair:
                value, error = (float(np.mean([row[key] for row in of])) for key in (score, f"{score}_se"))
                color = colors[methods.index(pair[1])]
                ax.barh(at, value, 0.9, xerr=error, color=color, error_kw={"linewidth": 0.8})
                if value < left:  # the bar leaves the picture
                    ax.text(left, at, f" {value:.2f}", va="center", fontsize="x-small", color="white")
        ax.set_xlabel(score)
        ax.set_yticks(middles, names if ax is axes[0, 0] else [""] * len(names), fontsize="small")
        ax.set_ylim(len(rows), -1)
        ax.axvline(0.0, color="0.6", linewidth=0.8)
        ax.set_xlim(left=left)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in colors]
    figure.legend(handles, methods, loc="outside right upper", frameon=False, fontsize="small")
    return figure


def curves(adapted: Sequence[Row], found: Sequence[Row]) -> Figure:
    """Co-smoothing and forecasts of the held-out recordings against the number of trials."""
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["recording"] for row in adapted))
    shape = (2, len(names))
    figure, axes = plt.subplots(*shape, figsize=(3.6 * len(names), 6), squeeze=False, layout="constrained")
    for column, name in zip(axes.T, names, strict=True):
        for ax, score in zip(column, ("co_bps", "fp_bps"), strict=True):
            for place, method in enumerate(("adapted", "from scratch", "fine-tuned")):
                of = [r for r in found if (r["recording"], r["method"]) == (name, method)]
                shots = sorted({r["trials"] for r in of})
                value, error = (
                    [float(np.mean([r[key] for r in of if r["trials"] == n])) for n in shots]
                    for key in (score, f"{score}_se")
                )
                beside = [n * 2 ** (0.08 * (place - 1)) for n in shots]  # errors do not hide each other
                ax.errorbar(
                    beside, value, error, marker="o", markersize=3, color=PALETTE[place], label=method
                )
            single = [r[score] for r in found if (r["recording"], r["method"]) == (name, "single recording")]
            if single:
                ax.axhline(float(np.mean(single)), color="black", linestyle=":", label="alone, all trials")
            ax.set_xscale("log", base=2)
            ax.set_xticks(shots, [str(n) for n in shots])
            ax.set_xlim(shots[0] * 0.75, shots[-1] / 0.75)
            ax.axhline(0.0, color="0.6", linewidth=0.8)
            ax.set_ylabel(score)
        column[0].set_title(name, fontsize="small")
        column[1].set_xlabel("trials")
    axes[0, -1].legend(frameon=False, fontsize="small")
    return figure


def gains(few: Sequence[Row], pooled: Sequence[Row], found: Sequence[Row]) -> Figure:
    """Pooled minus alone against the number of trials, a panel for co-smoothing and one for forecasts."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import ScalarFormatter

    every = {
        row["recording"]: row["trials"] for row in found if row["method"] == "single recording"
    }  # all trials
    rows = [
        *few,
        *({**row, "trials": every[row["recording"]]} for row in pooled if row["recording"] in every),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, prefix, label in zip(axes, ("", "fp_"), ("co-smoothing", "forecasts"), strict=True):
        for color, name in zip(PALETTE, dict.fromkeys(row["recording"] for row in few), strict=False):
            of = sorted((row for row in rows if row["recording"] == name), key=lambda row: row["trials"])
            trials, value, error = (
                [row[key] for row in of] for key in ("trials", f"{prefix}difference", f"{prefix}se")
            )
            ax.errorbar(trials, value, error, marker="o", markersize=3, color=color, label=name)
        ax.axhline(0.0, color="0.6", linewidth=0.8)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.set_xlabel("trials of every recording")
        ax.set_ylabel("pooled minus alone (bits per spike)")
        ax.set_title(label, fontsize="small")
    axes[0].legend(frameon=False, fontsize="small")
    return figure
