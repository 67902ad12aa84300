"""The bifurcation study: Duffing and Hopf oscillators, all methods, few-shot adaptation (paper, section 5.2).

The counterparts of the paper's table 1 and figures 4 and 17, and a negative control.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyro_metassm.experiments import maps, methods, report, study, tables
from pyro_metassm.experiments.methods import Method, Sizes, Steps
from pyro_metassm.experiments.scores import Scoring
from pyro_metassm.experiments.settings import Settings
from pyro_metassm.experiments.study import Results
from pyro_metassm.experiments.systems import Bifurcations
from pyro_metassm.experiments.tables import Row
from pyro_metassm.reporting import html as page

# Directions that an update of rank 1 has are spent on what all systems differ in; the flow near rest needs more.
SIZES = Sizes(rank=3)
FULL = Settings(sizes=SIZES)
SMALL = Settings(
    sizes=SIZES,
    family=Bifurcations(
        num_train=24,
        num_test=16,
        num_adapt=8,
        num_bins=100,
        num_neurons=(20, 30),
        damping=(-0.6, -0.3, 0.0),
        stiffness=(-1.0, 0.0, 1.0),
        mu=(-1.0, -0.5, 0.0, 0.5, 1.0),
        unseen_duffing=2,
        unseen_hopf=1,
    ),
    steps=Steps(
        warm_start_steps=400,
        num_steps=20,
        num_starts=64,
        search_steps=50,
        adapt_steps=20,
        plain_steps=40,
        plain_adapt_steps=30,
    ),
    scoring=Scoring(num_samples=10),
    shots=(1, 4),
    draws=(2, 1),
    shown=4,
)
CONTROLLED = "meta"
PANELS = (1, 8, 16)  # numbers of trials with a panel in the picture of forecasts, as in the paper's table
SHOWN = 3  # recordings in the picture of flows
TITLE = "Bifurcating systems: a family of dynamics from many recordings, a new one from a few trials"


def run(
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    held_out_seed: int = Bifurcations.held_out_seed,
    names: Sequence[str] | None = None,
    small: bool = False,
    settings: Settings | None = None,
    workers: int = 1,
    say: study.Say = print,
) -> dict:
    """Do the study, or what is left of it, and write its tables, pictures and page.

    Args:
        out: folder to write into; one that holds a part of the same study is gone on with.
        seeds: of the training data, the fits and the draws of adaptation trials; the table is over all of them.
        held_out_seed: of the held-out recordings' parameters and data.
        names: of :data:`~pyro_metassm.experiments.methods.METHODS`; None for the default ones.
        small: a small version of everything.
        settings: other settings than these two.
        workers: processes at work.
        say: is told of every finished piece.

    Returns:
        what ``metrics.json`` holds.

    Raises:
        ValueError: unknown methods, or a folder with a study of other settings.
    """
    settings = settings or (SMALL if small else FULL)
    settings = replace(settings, family=replace(settings.family, held_out_seed=held_out_seed))
    chosen = methods.chosen(methods.DEFAULT if names is None else names)
    out = report.folder(out)
    results = study.run(settings, chosen, seeds, out, controlled=[CONTROLLED], workers=workers, say=say)
    forecasts, adaptations = tables.forecasts(results), tables.adaptations(results)
    table, flows = tables.summary(adaptations), tables.flow_errors(results)
    mapped, controls = map_rows(results, settings), control_rows(results, settings)
    written = {
        "table1.csv": table,
        "forecast.csv": forecasts,
        "training.csv": tables.trained(results),
        "adaptation.csv": adaptations,
        "flow_error.csv": flows,
        "embedding.csv": tables.embeddings(results),
        "map.csv": mapped,
        "control.csv": controls,
        "seconds.csv": tables.seconds(results),
    }
    written = {name: rows for name, rows in written.items() if rows}
    for name, rows in written.items():
        tables.write(out / name, rows)
    pictures = draw(results, settings, chosen, seeds[0], forecasts, table, out)
    numbers: dict[str, Any] = {
        "k": settings.scoring.k,
        "table1": table,
        "training": tables.summary(
            [r for r in tables.trained(results) if r["k"] == settings.scoring.k], ["method"]
        ),
        "flow_error": tables.flow_summary(flows),
        "map": mapped,
        "verdicts": verdicts(controls),
        "seconds": tables.seconds_by_method(results),
        "methods": {name: method.label for name, method in chosen.items()},
        "seeds": list(seeds),
        "settings": settings.as_json(),
    }
    page.write(out / "index.html", TITLE, _parts(numbers, chosen, controls, pictures, written, settings))
    say(tables.text(tables.by_method(table, chosen)))
    for line in numbers["verdicts"]:
        say(line)
    say(f"tables, pictures and index.html in {out}")
    return report.write_metrics(tables.plain(numbers), out)


def map_rows(results: Results, settings: Settings) -> list[Row]:
    """Quadratic fits between embeddings and parameters of the recordings trained on (:mod:`maps`)."""
    rows = []
    for (name, seed), made in results.items():
        found = [row for row in made.get("fit", {"rows": []})["rows"] if row["embedding"] is not None]
        if found:
            attrs = parameters(settings, seed)
            embeddings = {row["recording"]: row["embedding"] for row in found}
            fitted = maps.explained_by_quadratics(embeddings, attrs)
            rows += [{"seed": seed, "method": name} | row for row in fitted]
    return rows


def parameters(settings: Settings, seed: int) -> dict[str, dict]:
    """The attrs of the truth of all recordings."""
    family = settings.family
    truths = family.known(1, seed).truth | family.unseen(1).truth
    return {name: dict(truth.attrs) for name, truth in truths.items()}


def control_rows(results: Results, settings: Settings) -> list[Row]:
    """Held-out recordings and negative controls beside each other, adapted with as many trials."""
    rows = []
    shown = str(settings.shown)
    for (name, seed), made in results.items():
        for kind, key in (("held out", shown), ("unrelated", "control")):
            for row in made[key]["rows"] if "control" in made and key in made else ():
                of = {"seed": seed, "method": name, "recording": row["recording"], "kind": kind}
                of |= {"draw": row["draw"], "rollout_error": row["rollout_error"]}
                rows.append(of | {"r2": row["r2"][row["k"] - 1], "ceiling": row["ceiling"][row["k"] - 1]})
    return rows


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each negative control: does the roll-out error of its adaptation tell it from the family?"""
    errors: dict[str, dict[str, list[float]]] = {"held out": {}, "unrelated": {}}
    for row in rows:
        errors[row["kind"]].setdefault(row["recording"], []).append(row["rollout_error"])
    if not errors["unrelated"] or not errors["held out"]:
        return []
    means = {name: float(np.mean(of)) for name, of in errors["held out"].items()}
    worst, largest = max(means.values()), max(max(of) for of in errors["held out"].values())
    lines = []
    for name, of in errors["unrelated"].items():
        mean, above = float(np.mean(of)), float(np.mean([error > largest for error in of]))
        r2, ceiling = (
            float(np.mean([r[key] for r in rows if r["recording"] == name])) for key in ("r2", "ceiling")
        )
        says = "says that it does not fit" if mean > worst else "does not tell it from the family"
        lines.append(
            f"{name}: roll-out error {mean:.3f}, {mean / worst:.1f} times that of the worst held-out recording "
            f"({worst:.3f}), and above all of theirs in {above:.0%} of the draws: adaptation {says}. "
            f"Its forecast r2 is {r2:.2f}, with a ceiling of {ceiling:.2f}."
        )
    return lines


def draw(
    results: Results, settings: Settings, chosen: dict[str, Method], seed: int, forecasts, table, out: Path
) -> dict[str, str]:
    """Make the pictures; their captions by the names of their files."""
    from pyro_metassm.experiments import pictures

    k, shown = settings.scoring.k, settings.shown
    unseen = settings.family.held_out()[1].crop(0, settings.scoring.context + settings.scoring.horizon)
    captions = {}

    def keep(name: str, figure, caption: str) -> None:
        report.save_figure(figure, out / name)
        captions[name] = caption

    fits = {
        method.label: fit
        for name, method in chosen.items()
        if not (method.plain or method.revised) and (fit := study.adapted(out, name, seed, shown)) is not None
    }
    if fits:
        text = f"Flow of held-out recordings, true and learned from {shown} trials, in the coordinates of the truth"
        keep("flow.png", pictures.flow(fits, unseen, spread_out(unseen.names, SHOWN)), text)
    panels = [n for n in PANELS if n in settings.shots] or list(settings.shots)
    if len(panels) == 1:
        panels = list(settings.shots)
    text = "Forecasts of held-out recordings, mean over recordings, draws and seeds; dashed: plain, dotted: revised"
    by_shots = {f"adapted with {n}": [row for row in forecasts if row["n_s"] == n] for n in panels}
    keep("forecast.png", pictures.forecast(by_shots, chosen, unseen.bin_width), text)
    text = f"Forecasts {k} bins ahead against the number of trials adapted with; bars: standard errors"
    keep("table1.png", pictures.shots_curve(table, chosen, str(k)), text)
    name = next((n for n in chosen if chosen[n].embeds and "fit" in results[n, seed]), None)
    if name is None or settings.sizes.embedding_dim < 2:
        return captions
    made, attrs = results[name, seed], parameters(settings, seed)
    trained = {row["recording"]: row["embedding"] for row in made["fit"]["rows"]}
    adapted = [
        {"recording": row["recording"], "draw": row["draw"], "n_s": n, "embedding": row["embedding"]}
        for n in settings.shots
        for row in made[str(n)]["rows"]
    ]
    last = {row["recording"]: row["embedding"] for row in adapted if row["n_s"] == max(settings.shots)}
    text = f"Embeddings of {chosen[name].label}, coloured by the systems' parameters; stars: held out"
    keep("embedding.png", pictures.embedding_map(trained, attrs, last), text)
    text = "Embeddings of held-out recordings as the trials to adapt with grow"
    keep("trials.png", pictures.trials(trained, adapted), text)
    return captions


def spread_out(names: Sequence[str], number: int) -> list[str]:
    """Some of the names: the first, the last and others between them."""
    places = np.linspace(0, len(names) - 1, min(number, len(names))).round().astype(int)
    return [names[place] for place in places]


def _parts(
    numbers: dict,
    chosen: dict[str, Method],
    controls: Sequence[Row],
    pictures: dict[str, str],
    written,
    settings,
) -> Iterable[str]:
    family = settings.family
    pages = {name: page.figure(name, caption) for name, caption in pictures.items()}
    yield page.paragraph(
        f"{len(family.damping) * len(family.stiffness)} Duffing and {len(family.mu)} Hopf recordings, "
        f"{family.num_train} trials of {family.num_bins} bins each to train on; "
        f"{family.unseen_duffing + family.unseen_hopf} unseen recordings "
        f"(seed {family.held_out_seed}), scored on {family.num_test} trials each. Forecasts from "
        f"{settings.scoring.context} bins. Seeds: {', '.join(map(str, numbers['seeds']))}."
    )
    yield page.heading(f"Table 1: forecast R2, {numbers['k']} bins ahead")
    yield page.table(tables.by_method(numbers["table1"], chosen))
    yield page.paragraph(
        "Mean and standard error over held-out recordings and seeds, by the number n_s of trials adapted with. The "
        "ceiling is a forecast from the true state with the true dynamics, against the same noisy observations. Scores "
        f"below {tables.FLOOR:g} count as {tables.FLOOR:g}."
    )
    yield page.heading("Flow-field error")
    yield page.table(tables.flows_by_method(numbers["flow_error"], chosen))
    yield page.paragraph(
        "Mean squared difference of the learned displacements in a bin from the true ones, at true states of test "
        "trials, over the variance of the true ones; latents mapped to the truth by the best affine map. Mean and "
        "standard error over recordings and seeds; 0 is the truth, 1 no flow at all, and errors above "
        f"{1 - tables.FLOOR:g} count as {1 - tables.FLOOR:g}."
    )
    yield from (pages[name] for name in ("table1.png", "flow.png", "forecast.png") if name in pages)
    if numbers["map"]:
        yield page.heading("The embedding as a map of the systems' parameters")
        yield page.table(numbers["map"])
        yield page.paragraph(
            "R2 of quadratic fits within a family, over the recordings trained on; r2_left_out predicts each recording "
            "from the others."
        )
    yield from (pages[name] for name in ("embedding.png", "trials.png") if name in pages)
    if controls:
        yield page.heading("Negative control: recordings of unrelated dynamics")
        yield page.table(tables.means(controls, ("kind", "recording"), ("rollout_error", "r2", "ceiling")))
        yield from map(page.paragraph, numbers["verdicts"])
    yield page.heading("The recordings trained on, and the time it took")
    labels = {name: method.label for name, method in chosen.items()}
    yield page.table([row | {"method": labels[row["method"]]} for row in numbers["training"]])
    yield page.table([{"method": labels[name]} | seconds for name, seconds in numbers["seconds"].items()])
    yield page.paragraph("Seconds are sums over pieces, a thread each; several may have run at a time.")
    yield page.heading("All numbers")
    yield page.links([*written, "metrics.json", "settings.json"])
