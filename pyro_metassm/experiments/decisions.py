"""Decisions of real mice: recordings of many areas and days pooled, and unseen days adapted to, at two bin widths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pyro_metassm import plots
from pyro_metassm.experiments import pooling, pooling_report, recorded, report, study, tables
from pyro_metassm.experiments.pooling_settings import Plan, Setting
from pyro_metassm.experiments.settings import claim
from pyro_metassm.posterior import posterior
from pyro_metassm.recordings import Recordings
from pyro_metassm.reporting import html as page

TITLE = "Decisions: many mice and days pooled, unseen days adapted to"
FILES = ("steinmetz_*.npz",)
HELD_OUT = (
    "steinmetz_s09_10ms",
    "steinmetz_s18_10ms",
)  # a day between two others of its mouse, and a last day
SMALL_FILES = ("steinmetz_s01*.npz", "steinmetz_s08*.npz", "steinmetz_s12*.npz", "steinmetz_s18*.npz")
FACTORS = (2, 1)  # bins of the files, 10 ms, that become one
LEAST_HZ, COPIES = 1.0, 0.8
SIZES = {"trials": 250, "neurons": 150}
SMALL_SIZES = {"trials": 48, "neurons": 40}
FULL = {
    factor: Setting(
        hidden_dim=128,  # features that recordings of many areas share: of 64, a pool in bins of 10 ms is behind
        num_steps=1800,
        trials_per_step=16,
        kl_warmup=0.8,
        num_samples=10,
        context=10 // factor,
        horizon=30 // factor,
        update_penalty=5e-5 * factor,
        adapt_steps=250,
    )
    for factor in FACTORS
}
SMALL = {
    factor: replace(
        setting,
        latent_dim=4,
        num_steps=100,
        warm_start_steps=100,
        tune_steps=40,
        scratch_steps=100,
        adapt_steps=150,
        num_starts=32,
        search_steps=40,
        shots=(16,),
        num_samples=10,
    )
    for factor, setting in FULL.items()
}

NOTES = (
    f"The {SIZES['neurons']} most active neurons of each recording, of those above {LEAST_HZ} Hz, in the first "
    f"{SIZES['trials']} trials; a quarter of them held out. Recordings are of different areas: what they share are the "
    "responses to the stimulus and to the wheel's movement.",
    "Bins count from the onset of the stimulus; forecasts are given the first 100 ms, before most of the response.",
)


def run(
    out: str | Path,
    *,
    data: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    small: bool = False,
    setting: dict[int, Setting] | None = None,
    say: pooling.Say = print,
) -> dict:
    """Do the experiment, or what is left of it, and write its tables, pictures and pages.

    Args:
        out: folder of the experiment; one folder in it for each bin width.
        data: folder with the recordings.
        seeds: of fits and of the trials drawn to adapt with.
        small: fewer recordings, trials, neurons and steps.
        setting: in place of the usual ones, by the factor of the bins.
        say: is told what was done.

    Returns:
        what ``metrics.json`` holds: the numbers of each bin width.

    Raises:
        ValueError: no data (says where there is some), fewer than three recordings, a folder with another study.
    """
    settings = setting or (SMALL if small else FULL)
    out = report.folder(out)
    numbers: dict[str, Any] = {}
    parts: list[str] = []
    for factor, chosen in settings.items():
        recs = load(data, factor, small=small)
        label = f"{1000 * recs.bin_width:.0f}ms"
        folder = report.folder(out / label)
        mine = {**asdict(chosen), "small": small, "recordings": list(recs), "factor": factor}
        claim(folder, json.loads(json.dumps(mine)))
        plan = plan_of(recs.names)
        rows = pooling.run(recs, [plan], chosen, seeds, folder, study.part_of(label, say))
        captions = _embedding(recs, plan, chosen, seeds[0], folder)
        title = f"{TITLE} ({label} bins)"
        numbers[label] = pooling_report.write(folder, title, rows, recs, mine, NOTES, captions)
        parts += [page.heading(label), *map(page.paragraph, numbers[label]["verdicts"])]
        parts += [
            page.figure(f"{label}/embedding.png", captions["embedding.png"]),
            page.links([f"{label}/index.html"]),
        ]
        for line in numbers[label]["verdicts"]:
            say(f"{label}: {line}")
    page.write(out / "index.html", TITLE, parts)
    say(f"tables, pictures and index.html in {out}")
    return report.write_metrics(tables.plain(numbers), out)


def load(data: str | Path | None, factor: int = 1, *, small: bool = False) -> Recordings:
    """The recordings in a folder, bins summed, a quarter of their neurons held out for co-smoothing.

    Raises:
        ValueError: no folder, fewer than three recordings in it.
    """
    paths = recorded.files("decisions", data, SMALL_FILES if small else FILES)
    if len(paths) < 3:
        raise ValueError(
            f"experiment decisions: needed three recordings, two to pool and one to adapt to, got {len(paths)}"
        )
    found = []
    for path in paths:
        recording = recorded.read(path, factor=factor, least_hz=LEAST_HZ, copies=COPIES)
        recording = recorded.fewer(recording, **(SMALL_SIZES if small else SIZES))
        found.append(recorded.hold_out_neurons(recording, FULL[FACTORS[0]].held_out_neurons))
    return Recordings(found)


def plan_of(names: Sequence[str]) -> Plan:
    """The usual recordings are held out, or the last one of others."""
    held_out = tuple(name for name in names if name in HELD_OUT) or (names[-1],)
    return Plan("pool", tuple(name for name in names if name not in held_out), held_out)


def _embedding(recs: Recordings, plan: Plan, setting: Setting, seed: int, out: Path) -> dict[str, str]:
    """Embeddings of all recordings, coloured by mouse."""
    import matplotlib.pyplot as plt

    shots = max(setting.shots)
    fit = pooling.adapted_fit(out, plan, seed, shots)
    few = Recordings(
        [recording.take([0]) for recording in recs.values()]
    )  # embeddings are of the training trials
    tree = posterior(fit, few, num_samples=200)
    figure, ax = plt.subplots(figsize=(7, 6), layout="constrained")
    plots.embedding(tree, ax=ax, color={name: recs[name].attrs.get("subject", "unknown") for name in recs})
    report.save_figure(figure, out / "embedding.png")
    return {
        "embedding.png": f"Embeddings by mouse; {', '.join(plan.held_out)} adapted with {shots} trials",
    }
