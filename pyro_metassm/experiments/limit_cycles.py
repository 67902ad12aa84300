"""Limit cycles of different speed, two recordings and twenty: our method against shared dynamics (paper, section 5.1).

The counterparts of the paper's figures 2 and 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pyro_metassm.experiments import methods, report, study, tables
from pyro_metassm.experiments.bifurcations import spread_out
from pyro_metassm.experiments.methods import Method, Sizes, Steps
from pyro_metassm.experiments.scores import Scoring
from pyro_metassm.experiments.settings import Settings
from pyro_metassm.experiments.study import Results
from pyro_metassm.experiments.systems import LimitCycles
from pyro_metassm.experiments.tables import Row
from pyro_metassm.reporting import html as page

STEPS = (1, 10, 30, 50)  # bins ahead in the table
SHOWN = 3  # recordings in the pictures of flows
OURS = "meta"
TITLE = "Limit cycles of different speed"

_TRAINING = Steps(warm_start_steps=2000, num_steps=200, trials_per_step=16)
_ALONE: dict[str, Any] = {"shots": (), "draws": (), "shown": 0, "sizes": Sizes(latent_dim=2, embedding_dim=1)}
FULL = tuple(
    Settings(family=LimitCycles(velocities=velocities), steps=_TRAINING, scoring=Scoring(k=50), **_ALONE)
    for velocities in ((2.5, 5.0), tuple(np.linspace(0.5, 5.0, 20).round(3).tolist()))
)
SMALL = tuple(
    replace(
        settings,
        family=LimitCycles(
            velocities=settings.family.velocities[:: max(1, len(settings.family.velocities) // 6)],
            num_train=32,
            num_test=16,
        ),
        steps=Steps(warm_start_steps=400, num_steps=20, trials_per_step=8),
    )
    for settings in FULL
    if isinstance(settings.family, LimitCycles)
)


def run(
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    names: Sequence[str] | None = None,
    small: bool = False,
    settings: Sequence[Settings] | None = None,
    workers: int = 1,
    say: study.Say = print,
) -> dict:
    """Do both studies, or what is left of them, and write their tables, pictures and page.

    The sign of a velocity is not in such data (mirroring latents and read-out changes no observation), so embeddings
    are compared with the speed; by ranks, since an embedding is known up to a smooth re-parametrisation.

    Args:
        out, seeds, small, settings, workers, say: as of :func:`pyro_metassm.experiments.bifurcations.run`; settings of
            :class:`~pyro_metassm.experiments.systems.LimitCycles`, one for each number of recordings.
        names: methods; None for ours and shared dynamics.

    Returns:
        what ``metrics.json`` holds.
    """
    chosen = methods.chosen((OURS, "shared") if names is None else names)
    out = report.folder(out)
    rows: dict[str, list[Row]] = {"table.csv": [], "forecast.csv": [], "embedding.csv": [], "seconds.csv": []}
    ranks: list[Row] = []
    panels: dict[str, list[Row]] = {}
    captions: dict[str, str] = {}
    done = settings or (SMALL if small else FULL)
    for one in done:
        number = {"num_recordings": len(one.family.known(1, 0))}
        title = f"M = {number['num_recordings']}"
        folder = out / title.replace(" ", "")
        tell = study.part_of(title, say)
        results = study.run(one, chosen, seeds, folder, workers=workers, say=tell)
        panels[title] = tables.trained(results)
        steps = sorted({min(k, one.scoring.horizon) for k in STEPS})
        scored = tables.summary([row for row in panels[title] if row["k"] in steps], ("method", "k"))
        rows["table.csv"] += [number | row for row in scored]
        rows["forecast.csv"] += [number | row for row in panels[title]]
        rows["embedding.csv"] += [number | row for row in tables.embeddings(results)]
        rows["seconds.csv"] += [number | row for row in tables.seconds(results)]
        ranks += [number | row for row in rank_correlations(results, one)]
        captions |= draw(results, one, chosen, seeds[0], folder, out, title)
    captions |= _curves(panels, chosen, done[0].family.known(1, 0).bin_width, out)
    rows = {name: of for name, of in rows.items() if of}
    for name, of in rows.items():
        tables.write(out / name, of)
    numbers = {
        "table": rows["table.csv"],
        "rank_correlation": ranks,
        "methods": {name: method.label for name, method in chosen.items()},
        "seeds": list(seeds),
        "settings": [one.as_json() for one in done],
    }
    page.write(out / "index.html", TITLE, _parts(numbers, chosen, captions, list(rows)))
    say(tables.text(rows["table.csv"]))
    say(tables.text(ranks))
    say(f"tables, pictures and index.html in {out}")
    return report.write_metrics(tables.plain(numbers), out)


def speeds(settings: Settings, seed: int) -> dict[str, float]:
    """The true speed of every recording trained on, rad / s."""
    return {name: truth.attrs["speed"] for name, truth in settings.family.known(1, seed).truth.items()}


def rank_correlations(results: Results, settings: Settings) -> list[Row]:
    """|Spearman's rank correlation| of the embedding and the speed, by method and seed."""
    found = []
    for (name, seed), made in results.items():
        speed = speeds(settings, seed)
        rows = [row for row in made["fit"]["rows"] if row["embedding"] is not None]
        if len(rows) > 1:
            pair = ([row["embedding"][0] for row in rows], [speed[row["recording"]] for row in rows])
            found.append({"method": name, "seed": seed, "spearman": abs(spearman(*pair))})
    return found


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation of values without ties."""
    ranks = np.array([np.argsort(np.argsort(values)) for values in (x, y)], float)
    return float(np.corrcoef(ranks)[0, 1])


def draw(
    results: Results,
    settings: Settings,
    chosen: Mapping[str, Method],
    seed: int,
    folder: Path,
    out: Path,
    title: str,
) -> dict[str, str]:
    """Flows and embeddings of one number of recordings; captions by the names of the files."""
    from pyro_metassm.experiments import pictures

    _, test = settings.family.training(seed)
    test = test.crop(0, settings.scoring.context + settings.scoring.horizon)
    fits = {
        method.label: study.trained(folder, name, seed)
        for name, method in chosen.items()
        if study.trains(method)
    }
    stem = title.replace(" = ", "")
    figure = pictures.flow(fits, test, spread_out(test.names, SHOWN), suffix="")
    report.save_figure(figure, out / f"flow_{stem}.png")
    captions = {f"flow_{stem}.png": f"{title}: flow, true and learned, in the coordinates of the truth"}
    if chosen.get(OURS) is not None:
        rows = results[OURS, seed]["fit"]["rows"]
        figure = pictures.against(rows, speeds(settings, seed), "true speed |w| (rad/s)")
        report.save_figure(figure, out / f"embedding_{stem}.png")
        captions[f"embedding_{stem}.png"] = f"{title}: embedding of every recording against its true speed"
    return captions


def _curves(panels: dict[str, list[Row]], chosen: Mapping[str, Method], bin_width: float, out: Path) -> dict:
    from pyro_metassm.experiments import pictures

    report.save_figure(pictures.forecast(panels, chosen, bin_width), out / "forecast.png")
    return {"forecast.png": "Forecasts of test trials, mean over recordings and seeds"}


def _parts(
    numbers: dict, chosen: Mapping[str, Method], captions: dict[str, str], written: Sequence[str]
) -> Iterable[str]:
    labels = {name: method.label for name, method in chosen.items()}
    yield page.paragraph(f"Seeds: {', '.join(map(str, numbers['seeds']))}.")
    yield page.heading("Forecasts of test trials")
    yield page.table([row | {"method": labels[row["method"]]} for row in numbers["table"]])
    yield page.paragraph(
        "R2 over recordings and seeds, k bins ahead. The ceiling is a forecast from the true state with the true "
        "dynamics, against the same noisy observations."
    )
    yield page.heading("Embedding and speed")
    yield page.table([row | {"method": labels[row["method"]]} for row in numbers["rank_correlation"]])
    yield from (page.figure(name, caption) for name, caption in captions.items())
    yield page.heading("All numbers")
    yield page.links([*written, "metrics.json"])
