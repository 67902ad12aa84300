"""What decides the numbers of a study: plain settings, written beside its results."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyro_metassm.experiments import report
from pyro_metassm.experiments.methods import Sizes, Steps
from pyro_metassm.experiments.scores import Scoring
from pyro_metassm.experiments.systems import Bifurcations, Family


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a study, but for its methods and seeds.

    Attributes:
        family: the data.
        sizes, steps, scoring: of the model, the training and the scores.
        shots: numbers of trials to adapt with.
        draws: how often these trials are drawn, for each of ``shots``.
        shown: the one of ``shots`` that pictures show, and that the controls take.
    """

    family: Family = field(default_factory=Bifurcations)
    sizes: Sizes = field(default_factory=Sizes)
    steps: Steps = field(default_factory=Steps)
    scoring: Scoring = field(default_factory=Scoring)
    shots: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    draws: tuple[int, ...] = (10, 4, 3, 3, 2, 1)
    shown: int = 8

    def __post_init__(self) -> None:
        bins = self.scoring.context + self.scoring.horizon
        for needed, holds in (
            ("a number of draws for each number of trials", len(self.shots) == len(self.draws)),
            (
                f"at most {self.family.num_adapt} trials to adapt with",
                max(self.shots, default=0) <= self.family.num_adapt,
            ),
            (f"trials of {bins} bins, context and horizon", bins <= self.family.num_bins),
        ):
            if not holds:
                raise ValueError(f"settings: needed {needed}")

    def as_json(self) -> dict:
        """Plain values, as they are written beside the results."""
        return json.loads(json.dumps({"kind": type(self.family).__name__, **asdict(self)}))

    def claim(self, out: Path) -> None:
        """Write the settings into the folder of a new study, or see that those there are the same."""
        claim(out, self.as_json())


def claim(out: Path, mine: dict) -> None:
    """Write what decides the numbers of a study into its folder, or see that what is there is the same.

    Raises:
        ValueError: a folder with a study of other settings.
    """
    path = report.folder(out) / "settings.json"
    if not path.is_file():
        path.write_text(json.dumps(mine, indent=2) + "\n", encoding="utf-8")
        return
    try:
        theirs: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: needed the settings of a study, got what is no JSON") from error
    if theirs != mine:
        there = theirs if isinstance(theirs, dict) else {}
        differing = ", ".join(sorted(key for key in mine if there.get(key) != mine[key]))
        raise ValueError(
            f"{out} holds a study of other settings ({differing}); choose another --out, or remove it"
        )
