"""Does pooling pay? Recordings fitted together and each alone, and unseen ones adapted to; piece by piece, in a folder.

Every piece is a JSON file that is either there and complete or not there: what was stopped goes on from there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pyro_metassm import _machine as machine
from pyro_metassm import likelihoods, saving
from pyro_metassm.adaptation import adapt
from pyro_metassm.experiments import report
from pyro_metassm.experiments.pooling_scores import row_of, simple_scores
from pyro_metassm.experiments.pooling_settings import Plan, Setting
from pyro_metassm.guides import DKF, PartiallyPooledDKF
from pyro_metassm.models import MetaSSM, PartiallyPooled
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit
from pyro_metassm.training import fit as train_fit
from pyro_metassm.writing import write_json

Say = Callable[[str], None]


def run(
    recs: Recordings,
    plans: Sequence[Plan],
    setting: Setting,
    seeds: Sequence[int],
    out: Path,
    say: Say = print,
) -> list[dict]:
    """Do what is not yet done, and read all of it.

    Args:
        recs: the recordings of all plans, with held-out neurons.
        plans, setting, seeds: what to do; a seed is of the fits and of the trials drawn to adapt with. The test trials
            are the same for all.
        out: folder; ``pieces/`` holds the pieces. Those of a plan are in ``PLAN-seedN/``, with the pooled fit beside
            the adapted ones; fits that no plan decides, of recordings alone or of few trials of all together, are made
            once for all plans.
        say: is told of every finished piece.

    Returns:
        rows: ``plan`` (empty where there is none), ``seed``, ``piece`` ("pooled", "pooled-tuned", "adapted", "tuned",
        "single", "scratch", "few", "baselines"), ``trials`` (of the recording, that were learned from), ``recording``,
        ``method`` and what :func:`~pyro_metassm.experiments.pooling_scores.score` gives.
    """
    train, test = recs.split(setting.test_fraction, seed=0)
    if setting.validate:
        train, test = train.split(setting.test_fraction, seed=1)
    pieces = report.folder(out / "pieces")
    rows: list[dict] = []

    def do(label: str, plan: str, seed: int, make: Callable[[], list[dict]]) -> None:
        path = pieces / f"{label}.json"
        if not path.is_file():
            report.folder(path.parent)
            begin = time.perf_counter()
            made = make()
            seconds = time.perf_counter() - begin
            write_json({"seconds": seconds, "rows": made}, path)
            say(f"{seconds:7.1f} s  {label}")
        kept = json.loads(path.read_text(encoding="utf-8"))
        rows.extend({"plan": plan, "seed": seed, **row} for row in kept["rows"])

    data = _Data(recs, train, test, setting)
    do("baselines", "", 0, data.baselines)
    unseen = [name for name in recs if any(name in plan.held_out for plan in plans)]
    for seed in seeds:
        for plan in plans:
            folder = pieces / f"{plan.name}-seed{seed}"
            do(f"{folder.name}/pooled", plan.name, seed, partial(data.pooled, plan, seed, folder))
            do(f"{folder.name}/pooled-tuned", plan.name, seed, partial(data.pooled_tuned, plan, seed, folder))
            for shots in setting.shots:
                make = partial(data.adapted, plan, seed, shots, folder)
                do(f"{folder.name}/adapted-{shots}", plan.name, seed, make)
                make = partial(data.tuned, plan, seed, shots, folder)
                do(f"{folder.name}/tuned-{shots}", plan.name, seed, make)
        for number, name in enumerate(recs):
            if any(name in plan.pooled for plan in plans):
                do(f"alone-seed{seed}/{number}", "", seed, partial(data.alone, name, seed))
        for shots in setting.shots:
            do(f"alone-seed{seed}/scratch-{shots}", "", seed, partial(data.scratch, unseen, seed, shots))
            do(f"few-seed{seed}/{shots}", "", seed, partial(data.few, unseen, seed, shots))
    return rows


def adapted_fit(out: Path, plan: Plan, seed: int, shots: int) -> Fit:
    """The fit that knows the held-out recordings too."""
    return saving.load(out / "pieces" / f"{plan.name}-seed{seed}" / f"adapted-{shots}")


def fit_of(recs: Recordings, setting: Setting, seed: int, *, few: bool = False) -> Fit:
    """A model of recordings, to all of their trials or to few: of several with deviations from what they share."""
    alone = len(recs) == 1
    with machine.random_forked():
        torch.manual_seed(seed)
        model = (MetaSSM if alone else PartiallyPooled)(
            recs,
            latent_dim=setting.latent_dim,
            embedding_dim=setting.embedding_dim,
            rank=0 if alone else setting.rank,
            hidden_dim=setting.hidden_dim,
            likelihood=likelihoods.Poisson,
        )
        guide = (DKF if alone else PartiallyPooledDKF)(
            model, neuron_dropout=setting.neuron_dropout, newton_step=setting.newton_step
        )
    num_steps = setting.scratch_steps if few else setting.num_steps
    return train_fit(
        model,
        guide,
        recs,
        num_steps=num_steps,
        warm_start_steps=setting.warm_start_steps,
        trials_per_step=setting.trials_per_step,
        learning_rate=setting.scratch_learning_rate if few else setting.learning_rate,
        kl_warmup_steps=round(setting.kl_warmup * num_steps),
        update_penalty=setting.update_penalty,
        seed=seed,
        progress=False,
    )


def tuned(
    start: Fit, recs: Recordings, num_steps: int, learning_rate: float, setting: Setting, seed: int
) -> Fit:
    """All of a fit trained on, with the recordings given: with one alone, what was shared is no longer."""
    return train_fit(
        start.model,
        start.guide,
        recs,
        num_steps=num_steps,
        warm_start=False,
        trials_per_step=setting.trials_per_step,
        learning_rate=learning_rate,
        update_penalty=setting.update_penalty,
        seed=seed,
        progress=False,
    )


@dataclass(frozen=True)
class _Data:
    """What the pieces are made from, and how each is made."""

    recs: Recordings
    train: Recordings
    test: Recordings
    setting: Setting

    def baselines(self) -> list[dict]:
        """The simple predictions of every recording."""
        return [
            {"piece": "baselines", "method": method, "trials": train.num_trials, "recording": name, **row}
            for name, train in self.train.items()
            for method, row in simple_scores(train, self.test[name], self.setting).items()
        ]

    def pooled(self, plan: Plan, seed: int, folder: Path) -> list[dict]:
        """A plan's recordings together; the fit is kept."""
        fit = fit_of(self.train.select(plan.pooled), self.setting, seed)
        fit.save(folder / "pooled")
        return self._rows(fit, self.train, plan.pooled, "pooled", "pooled")

    def pooled_tuned(self, plan: Plan, seed: int, folder: Path) -> list[dict]:
        """The pooled fit, a last cycle with each of its recordings alone."""
        rows = []
        for name in plan.pooled:
            start = saving.load(folder / "pooled")
            rows += self._last_cycle(start, name, seed, "pooled-tuned", "pooled, then alone")
        return rows

    def adapted(self, plan: Plan, seed: int, shots: int, folder: Path) -> list[dict]:
        """The pooled fit adapted to some trials of the recordings that the plan holds out."""
        setting, few = self.setting, self.train.select(plan.held_out).take_trials(shots, seed=seed)
        fit = adapt(
            saving.load(folder / "pooled"),
            few,
            num_steps=setting.adapt_steps,
            learning_rate=setting.adapt_learning_rate,
            num_starts=setting.num_starts,
            search_steps=setting.search_steps,
            seed=seed,
            progress=False,
        )
        fit.save(folder / f"adapted-{shots}")
        return self._rows(fit, few, plan.held_out, "adapted", "adapted")

    def tuned(self, plan: Plan, seed: int, shots: int, folder: Path) -> list[dict]:
        """The adapted fit, all of it trained on with the same trials: what is shared is the pool's no longer."""
        setting, few = self.setting, self.train.select(plan.held_out).take_trials(shots, seed=seed)
        start = saving.load(folder / f"adapted-{shots}")
        fit = tuned(start, few, setting.scratch_steps, setting.scratch_learning_rate, setting, seed)
        return self._rows(fit, few, plan.held_out, "tuned", "fine-tuned")

    def alone(self, name: str, seed: int) -> list[dict]:
        """One recording alone, whatever the plans that pool it; and with a last cycle as :meth:`pooled_tuned`."""
        fit = fit_of(self.train.select([name]), self.setting, seed)
        rows = self._rows(fit, self.train, [name], "single", "single recording")
        return rows + self._last_cycle(fit, name, seed, "single", "single, longer")

    def _last_cycle(self, start: Fit, name: str, seed: int, piece: str, method: str) -> list[dict]:
        setting, recs = self.setting, self.train.select([name])
        fit = tuned(start, recs, setting.tune_steps, setting.tune_learning_rate, setting, seed)
        return self._rows(fit, self.train, [name], piece, method)

    def scratch(self, names: Sequence[str], seed: int, shots: int) -> list[dict]:
        """Some trials of each of these recordings, each alone."""
        rows = []
        for name in names:
            few = self.train.select([name]).take_trials(shots, seed=seed)
            fit = fit_of(few, self.setting, seed, few=True)
            rows += self._rows(fit, few, [name], "scratch", "from scratch")
        return rows

    def few(self, names: Sequence[str], seed: int, shots: int) -> list[dict]:
        """As many trials of all recordings together; rows of these."""
        few = self.train.take_trials(shots, seed=seed)
        fit = fit_of(few, self.setting, seed, few=True)
        return self._rows(fit, few, names, "few", "few pooled")

    def _rows(self, fit: Fit, train: Recordings, names: Iterable[str], piece: str, method: str) -> list[dict]:
        return [
            {"piece": piece, "method": method} | row_of(fit, train, self.test, name, self.setting)
            for name in names
        ]
