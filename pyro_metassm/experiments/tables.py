"""The results of a study as tables: plain rows, as CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyro_metassm.experiments.methods import Method
from pyro_metassm.experiments.study import Results
from pyro_metassm.reporting.html import cell

FLOOR = -1.0  # a score below counts as this in means: one that explodes would decide them alone
CEILING = "ceiling"
Row = dict[str, Any]


def write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Rows as a CSV file; what is not known (None, NaN) is empty."""
    columns = list(rows[0]) if columns is None else list(columns)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_csv_cell(row[column]) for column in columns] for row in rows)


def read(path: Path) -> list[Row]:
    """Rows of a CSV file, numbers as numbers and empty cells as None."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: _value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def _csv_cell(value: Any) -> Any:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text or None


def pieces(results: Results) -> Iterable[tuple[Row, Row]]:
    """Every row of the adaptations, with what it belongs to: seed, method, recording, draw and ``n_s``."""
    for (name, seed), made in results.items():
        for key, piece in made.items():
            if not key.isdigit():
                continue
            for row in piece["rows"]:
                of = {"seed": seed, "method": name, "recording": row["recording"], "draw": row["draw"]}
                yield of | {"n_s": int(key)}, row


def forecasts(results: Results) -> list[Row]:
    """The forecast scores of the held-out recordings, every step ahead."""
    return [
        of | {"k": k, "r2": r2, "ceiling": ceiling}
        for of, row in pieces(results)
        for k, (r2, ceiling) in enumerate(zip(row["r2"], row["ceiling"], strict=True), 1)
    ]


def adaptations(results: Results) -> list[Row]:
    """What else is known of every adaptation."""
    keys = ("k", "flow_r2", "alignment_r2", "rollout_error")
    return [
        of
        | {"r2": row["r2"][row["k"] - 1], "ceiling": row["ceiling"][row["k"] - 1]}
        | {q: row[q] for q in keys}
        for of, row in pieces(results)
    ]


def trained(results: Results) -> list[Row]:
    """The forecast scores of the recordings trained on, of their test trials."""
    return [
        {"seed": seed, "method": name, "recording": row["recording"], "k": k, "r2": r2, "ceiling": ceiling}
        for (name, seed), made in results.items()
        for row in made.get("fit", {"rows": []})["rows"]
        for k, (r2, ceiling) in enumerate(zip(row["r2"], row["ceiling"], strict=True), 1)
    ]


def flow_errors(results: Results) -> list[Row]:
    """How far learned flows are from the true ones: of recordings trained on (``n_s`` and ``draw`` empty), and adapted.

    ``flow_error`` is the mean squared difference of the displacements in a bin, over their variance in the truth:
    ``1 - flow_r2`` of :func:`pyro_metassm.experiments.scores.flow_scores`, at true states of test trials and in the
    truth's coordinates. By the variance, as all scores of the study: no flow at all and the best constant one score 1.
    ``alignment_r2`` says how well the two systems of coordinates agree.
    """
    return [
        of | {"flow_error": 1 - row["flow_r2"], "alignment_r2": row["alignment_r2"]}
        for of, row in (*_of_fits(results), *pieces(results))
    ]


def embeddings(results: Results) -> list[Row]:
    """Embeddings of the recordings trained on (``n_s`` and ``draw`` empty) and of the adapted ones."""
    return [
        of
        | {f"e_{d + 1}": value for d, value in enumerate(row["embedding"])}
        | {f"sd_{d + 1}": value for d, value in enumerate(row["embedding_sd"])}
        for of, row in (*_of_fits(results), *pieces(results))
        if row["embedding"] is not None
    ]


def _of_fits(results: Results) -> Iterable[tuple[Row, Row]]:
    """Every row of the recordings trained on, as :func:`pieces`: without a draw, and without ``n_s``."""
    for (name, seed), made in results.items():
        for row in made.get("fit", {"rows": []})["rows"]:
            of = {"seed": seed, "method": name, "recording": row["recording"], "draw": None}
            yield of | {"n_s": None}, row


def seconds(results: Results) -> list[Row]:
    """How long every piece took."""
    return [
        {"seed": seed, "method": name, "piece": key, "seconds": piece["seconds"]}
        for (name, seed), made in results.items()
        for key, piece in made.items()
    ]


def summary(rows: Iterable[Row], by: Sequence[str] = ("method", "n_s")) -> list[Row]:
    """Mean and standard error over recordings and seeds of ``r2``, the draws of a recording averaged first.

    Returns:
        for each group: ``mean``, ``sem``, ``median``, ``worst`` (of recordings and seeds), ``num`` of these, and the
        mean ``ceiling``. Scores below ``FLOOR`` count as it.
    """
    groups: dict[tuple, dict[tuple, list[tuple[float, float]]]] = {}
    for row in rows:
        of_group = groups.setdefault(tuple(row[key] for key in by), {})
        of_group.setdefault((row["seed"], row["recording"]), []).append((row["r2"], row["ceiling"]))
    found = []
    for key, cells in groups.items():
        each = np.array(
            [np.mean([(max(r2, FLOOR), top) for r2, top in draws], 0) for draws in cells.values()]
        )
        r2 = each[:, 0]
        sem = r2.std(ddof=1) / math.sqrt(len(r2)) if len(r2) > 1 else math.nan
        numbers = {"mean": r2.mean(), "sem": sem, "median": np.median(r2), "worst": r2.min()}
        plain = {k: float(v) for k, v in numbers.items()} | {"ceiling": float(each[:, 1].mean())}
        found.append(dict(zip(by, key, strict=True)) | plain | {"num": len(r2)})
    return found


def flow_summary(rows: Iterable[Row]) -> list[Row]:
    """:func:`summary` of ``flow_error``; an error above ``1 - FLOOR`` counts as that, ``worst`` is the largest.

    The mean ``alignment_r2`` stands beside it.
    """
    shares = [row | {"r2": 1 - row["flow_error"], "ceiling": row["alignment_r2"]} for row in rows]
    return [
        row
        | {key: 1 - row[key] for key in ("mean", "median", "worst")}
        | {"alignment_r2": row.pop("ceiling")}
        for row in summary(shares)
    ]


def flows_by_method(table: Sequence[Row], chosen: Mapping[str, Method]) -> list[Row]:
    """A summary of flow errors as it is read: rows of methods, columns of recordings trained on and of each ``n_s``."""
    cells = {(row["method"], row["n_s"]): row for row in table}
    shots = sorted({n for _, n in cells if n is not None})
    titles = {None: "trained on"} | {n: f"n_s = {n}" for n in shots}
    return [
        {"method": method.label}
        | {title: plus_minus(cells[name, n]) if (name, n) in cells else "" for n, title in titles.items()}
        for name, method in chosen.items()
    ]


def by_method(table: Sequence[Row], chosen: Mapping[str, Method]) -> list[Row]:
    """A summary as it is read: a row for each method, a column ``"mean +- sem"`` for each ``n_s``; the ceiling last."""
    shots = sorted({row["n_s"] for row in table})
    cells = {(row["method"], row["n_s"]): row for row in table}
    rows = [
        {"method": method.label} | {f"n_s = {n}": plus_minus(cells[name, n]) for n in shots}
        for name, method in chosen.items()
        if (name, shots[0]) in cells
    ]
    top = {n: next(row["ceiling"] for row in table if row["n_s"] == n) for n in shots}
    return [*rows, {"method": CEILING} | {f"n_s = {n}": f"{top[n]:.3f}" for n in shots}]


def plus_minus(row: Row) -> str:
    known = row["sem"] is not None and math.isfinite(row["sem"])
    return f"{row['mean']:.3f}" + (f" ± {row['sem']:.3f}" if known else "")


def text(rows: Sequence[Row]) -> str:
    """Rows in columns for a terminal, numbers rounded to three places."""
    if not rows:
        return ""
    lines = [[*map(str, rows[0])], *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def means(rows: Iterable[Row], by: Sequence[str], of: Sequence[str]) -> list[Row]:
    """Plain means of some columns over the rows of each group."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    return [
        dict(zip(by, key, strict=True))
        | {column: float(np.mean([row[column] for row in group])) for column in of}
        for key, group in groups.items()
    ]


def seconds_by_method(results: Results) -> dict[str, dict[str, float]]:
    """Seconds of training, of adaptations and in all, summed over seeds."""
    found: dict[str, dict[str, float]] = {}
    for row in seconds(results):
        of = found.setdefault(row["method"], {"training": 0.0, "adaptation": 0.0, "all": 0.0})
        of["training" if row["piece"] == "fit" else "adaptation"] += row["seconds"]
        of["all"] += row["seconds"]
    return found


def plain(value: Any) -> Any:
    """The same for a JSON file: numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
