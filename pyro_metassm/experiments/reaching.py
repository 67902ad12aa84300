"""Reaches of real monkeys: pool recordings, adapt to an unseen one, decode the hand from forecasts.

The counterpart of figures 5 to 7 of Vermani et al. (ICLR 2025), on whatever recordings of reaches there are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pyro_metassm.experiments import pooling, pooling_report, reaching_pictures, recorded, report
from pyro_metassm.experiments.pooling_settings import Plan, Setting
from pyro_metassm.experiments.settings import claim
from pyro_metassm.recordings import Recording, Recordings

TITLE = "Reaches: pooled recordings, adapted to unseen ones"
FILES = ("chewie_*.npz", "hennig_*.npz")
BIN = 0.1  # s; nearest to it are summed bins of recordings that come in finer ones
LEAST_HZ, COPIES = 0.5, 0.8
FULL = Setting()
SMALL = replace(
    FULL,
    num_steps=300,
    warm_start_steps=200,
    tune_steps=100,
    scratch_steps=150,
    adapt_steps=200,
    num_starts=64,
    search_steps=60,
    shots=(16,),
)
MOST_TRIALS = 300  # of a recording, the first ones: before a change of the task, where there is one
SMALL_SIZES = {"trials": 120}

NOTES = (
    "Bins are 100 ms (Chewie) and 90 ms (Hennig: two of 45 ms): near enough to pool, not equal; dynamics are per bin, "
    "so a difference of speed of a tenth is part of what the embedding has to say.",
    "Trials of Chewie start at movement onset (on the second day: the first bins faster than 5 cm/s): a "
    "forecast from onset has the first bins of the movement as its context.",
    "The velocity of Hennig's recording is that of a cursor moved by these same spikes: decoding it is no evidence.",
    f"Neurons below {LEAST_HZ} Hz, and those that correlate above {COPIES} with an earlier one, are left out. The "
    f"first {MOST_TRIALS} trials of a recording are taken: later ones of Hennig's are of another mapping.",
)


def run(
    out: str | Path,
    *,
    data: str | Path | None = None,
    seeds: Sequence[int] = (0,),
    small: bool = False,
    setting: Setting | None = None,
    say: pooling.Say = print,
) -> dict:
    """Do the experiment, or what is left of it, and write its tables, pictures and page.

    Every recording in turn is held out (with ``small`` the first alone), the others are pooled.

    Args:
        out: folder of the experiment.
        data: folder with the recordings.
        seeds: of fits and of the trials drawn to adapt with.
        small: fewer trials, neurons and steps.
        setting: in place of the usual one.
        say: is told what was done.

    Returns:
        what ``metrics.json`` holds.

    Raises:
        ValueError: no data (says where there is some), fewer than three recordings, a folder with another study.
    """
    recs = load(data, small=small)
    setting = setting or (SMALL if small else FULL)
    out = report.folder(out)
    mine: dict[str, Any] = {**asdict(setting), "small": small, "recordings": list(recs)}
    claim(out, json.loads(json.dumps(mine)))
    plans = [
        Plan(f"without-{n + 1}", tuple(other for other in recs if other != name), (name,))
        for n, name in enumerate(recs)
    ]
    plans = plans[:1] if small else plans
    rows = pooling.run(recs, plans, setting, seeds, out, say)
    captions = reaching_pictures.draw(recs, plans, setting, seeds[0], out)
    numbers = pooling_report.write(out, TITLE, rows, recs, mine, NOTES, captions)
    for line in numbers["verdicts"]:
        say(line)
    say(f"tables, pictures and index.html in {out}")
    return numbers


def load(data: str | Path | None, *, small: bool = False) -> Recordings:
    """The recordings in a folder, in nearly equal bins, a quarter of their neurons held out for co-smoothing.

    Raises:
        ValueError: no folder, fewer than three recordings in it.
    """
    found = [ready(path, small=small) for path in recorded.files("reaching", data, FILES)]
    if len(found) < 3:
        raise ValueError(
            f"experiment reaching: needed three recordings, two to pool and one to adapt to, got {len(found)}"
        )
    return Recordings(found)


def ready(path: Path, *, small: bool = False) -> Recording:
    """One recording as the experiment takes it."""
    factor = max(1, round(BIN / recorded.bin_width_of(path)))
    recording = recorded.read(path, factor=factor, least_hz=LEAST_HZ, copies=COPIES, bin_width=BIN)
    sizes = SMALL_SIZES if small else {"trials": MOST_TRIALS}
    return recorded.hold_out_neurons(recorded.fewer(recording, **sizes), FULL.held_out_neurons)
