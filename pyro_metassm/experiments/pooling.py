"""Does pooling pay? Recordings fitted together and each alone, and unseen ones adapted to; piece by piece, in a folder.

Every piece is a JSON file that is either there and complete or not there: what was stopped goes on from there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_metassm import _machine as machine
from pyro_metassm import baselines, likelihoods, metrics, saving
from pyro_metassm._scores import mean_r2, ratio, spike_information, velocity_decoder
from pyro_metassm.adaptation import adapt
from pyro_metassm.draws import forecast_trials
from pyro_metassm.experiments import report
from pyro_metassm.guides import DKF
from pyro_metassm.models import MetaSSM
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit
from pyro_metassm.training import fit as train_fit
from pyro_metassm.writing import write_json

Say = Callable[[str], None]
BOOTSTRAPS = 200


@dataclass(frozen=True)
class Plan:
    """Which recordings are pooled, and which are unseen until they are adapted to."""

    name: str
    pooled: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """What decides the numbers besides the data; the defaults were chosen on validation trials of reaches.

    Attributes:
        latent_dim, embedding_dim, rank, hidden_dim: of the model.
        neuron_dropout: of the guide.
        num_steps, warm_start_steps, trials_per_step, learning_rate: of fits to all trials, pooled and alone. The rate
            is high and the steps are many because what is shared learns slowly: at a quarter of the rate, or in half
            of the steps, the pooled model has learned less of its training trials than the others have.
        tune_steps, tune_learning_rate: of a second cycle with one recording: from the pooled fit, and from its own.
        scratch_steps, scratch_learning_rate: of fits to few trials, pooled, alone and from an adapted fit: more of them
            learn these by heart (on validation trials, fits from 16 trials are best after one to two hundred).
        adapt_steps, adapt_learning_rate, num_starts, search_steps: of adaptations. With the few counts of real trials
            the read-outs need ten times the usual steps and a higher rate, and forecasts more than reconstructions.
        shots: numbers of trials to adapt with.
        context, horizon: of forecasts, bins.
        held_out_neurons: share of the neurons of every recording that the guide does not see.
        test_fraction: share of the trials of every recording that scores are of.
        validate: score a quarter of the training trials, left out of them, in place of the test trials: for choices.
        num_samples: draws behind means.
    """

    latent_dim: int = 8
    embedding_dim: int = 2
    rank: int = 1
    hidden_dim: int = 64
    neuron_dropout: float = 0.3
    num_steps: int = 1200
    warm_start_steps: int = 300
    trials_per_step: int = 32
    learning_rate: float = 2e-2
    tune_steps: int = 400
    tune_learning_rate: float = 2e-2
    scratch_steps: int = 200
    scratch_learning_rate: float = 5e-3
    adapt_steps: int = 500
    adapt_learning_rate: float = 1e-2
    num_starts: int = 256
    search_steps: int = 150
    shots: tuple[int, ...] = (8, 16, 32, 64)
    context: int = 2
    horizon: int = 6
    held_out_neurons: float = 0.25
    test_fraction: float = 0.25
    validate: bool = False
    num_samples: int = 25


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
        ``method`` and what :func:`score` gives.
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
    """A model of recordings together (with shared dynamics where there is one), to all of their trials or to few."""
    with machine.random_forked():
        torch.manual_seed(seed)
        rank = setting.rank if len(recs) > 1 else 0
        model = MetaSSM(
            recs,
            latent_dim=setting.latent_dim,
            embedding_dim=setting.embedding_dim,
            rank=rank,
            hidden_dim=setting.hidden_dim,
            likelihood=likelihoods.Poisson,
        )
        guide = DKF(model, neuron_dropout=setting.neuron_dropout)
    return train_fit(
        model,
        guide,
        recs,
        num_steps=setting.scratch_steps if few else setting.num_steps,
        warm_start_steps=setting.warm_start_steps,
        trials_per_step=setting.trials_per_step,
        learning_rate=setting.scratch_learning_rate if few else setting.learning_rate,
        seed=seed,
        progress=False,
    )


def tuned(
    start: Fit, recs: Recordings, num_steps: int, learning_rate: float, setting: Setting, seed: int
) -> Fit:
    """All of a fit trained on with some recordings: what was shared is no longer."""
    return train_fit(
        start.model,
        start.guide,
        recs,
        num_steps=num_steps,
        warm_start=False,
        trials_per_step=setting.trials_per_step,
        learning_rate=learning_rate,
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
        """The pooled fit, a second cycle with each of its recordings alone."""
        rows = []
        for name in plan.pooled:
            start = saving.load(folder / "pooled")
            rows += self._second_cycle(start, name, seed, "pooled-tuned", "pooled, then alone")
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
        """One recording alone, whatever the plans that pool it; and as long as :meth:`pooled_tuned`."""
        fit = fit_of(self.train.select([name]), self.setting, seed)
        rows = self._rows(fit, self.train, [name], "single", "single recording")
        return rows + self._second_cycle(fit, name, seed, "single", "single, longer")

    def _second_cycle(self, start: Fit, name: str, seed: int, piece: str, method: str) -> list[dict]:
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


def row_of(fit: Fit, train: Recordings, test: Recordings, name: str, setting: Setting) -> dict:
    """What :func:`score` gives of a fit's rates of a recording, with its embedding and the trials that it is from."""
    trials = forecast_trials(test, name, setting.context + 1)
    ahead = metrics.mean_forecasts(
        fit, test, name, trials, setting.context, setting.horizon, setting.num_samples, 0
    )
    learned, predicted = (metrics.mean_rates(fit, recs, name, setting.num_samples) for recs in (train, test))
    embedding = fit.statistics[fit.names.index(name), : fit.model.embedding_dim].tolist()
    scores = score(learned, predicted, ahead, train[name], test[name], setting)
    return {"trials": train[name].num_trials, "recording": name, **scores, "embedding": embedding}


def simple_scores(train: Recording, test: Recording, setting: Setting) -> dict[str, dict]:
    """The scores of the simple predictions, by method."""
    late = test.take(np.flatnonzero(test.lengths > setting.context))
    window = slice(setting.context, setting.context + setting.horizon)
    found: dict[str, tuple[Any, Any, Any]] = {}
    for label, predict in (("mean rate", baselines.mean_rate), ("psth", baselines.psth)):
        found[label] = (predict(train, train), predict(train, test), predict(train, late)[:, window])
    found["smoothing"] = (baselines.smoothing(train, train), baselines.smoothing(train, test), None)
    lasting = baselines.persistence(train, late, context=setting.context, horizon=setting.horizon)
    found["persistence"] = (None, None, lasting)
    return {label: score(*rates, train, test, setting) for label, rates in found.items()}


def score(
    learned: np.ndarray | None,
    predicted: np.ndarray | None,
    ahead: np.ndarray | None,
    train: Recording,
    test: Recording,
    setting: Setting,
) -> dict[str, Any]:
    """Scores of one method's rates of a recording, with what their standard errors over trials are made from.

    Args:
        learned, predicted: rates of the training and of the test trials ``(trial, time, neuron)``; None: has none.
        ahead: forecasts of the test trials longer than the context ``(trial, horizon, neuron)``; None: has none.
        train, test: the trials.
        setting: context and horizon.

    Returns:
        ``co`` and ``fp``, each ``[gains, spikes]`` of every trial (nats over the mean rate in the bins scored, and
        counts), ``velocity`` and ``forecast_velocity``, each ``[r2, standard error over trials]``: what is not defined
        is left out. The decoder is learned from ``learned``.
    """
    window = slice(setting.context, setting.context + setting.horizon)
    rows = np.flatnonzero(test.lengths > setting.context)
    held_out, future = test.held_out_neurons, test.observations[rows, window]
    found: dict[str, Any] = {}
    if predicted is not None and held_out.any():
        found["co"] = _gains(predicted[..., held_out], test.observations[..., held_out])
    if ahead is not None and len(rows):
        ahead = ahead[:, : future.shape[1]]
        found["fp"] = _gains(ahead, future)
    if learned is None or predicted is None or train.behavior is None or test.behavior is None:
        return found
    decode = velocity_decoder(learned, train.behavior[..., :2])
    velocity = test.behavior[..., :2]
    found["velocity"] = _r2(velocity, decode(predicted))
    if ahead is not None and len(rows):
        found["forecast_velocity"] = _r2(velocity[rows, window], decode(ahead))
    return found


def bits(
    pair: Sequence[Sequence[float]], minus: Sequence[Sequence[float]] | None = None
) -> tuple[float, float]:
    """Bits per spike of ``[gains, spikes]`` and their standard error over trials; of a difference, trial by trial."""
    gains, spikes = (np.array(values) for values in pair)
    gains = gains if minus is None else gains - np.array(minus[0])
    value, error = ratio(gains, spikes)
    return value / math.log(2), error / math.log(2)


def _gains(rates: np.ndarray, spikes: np.ndarray) -> list[list[float]]:
    rates = np.where(np.isnan(spikes), np.nan, rates)
    return [spike_information(rates, spikes).tolist(), np.nansum(spikes, (1, 2)).tolist()]


def _r2(truth: np.ndarray, decoded: np.ndarray) -> list[float]:
    """R2 averaged over dims, and the standard error from resampled trials."""
    known = ~(np.isnan(truth).any(-1) | np.isnan(decoded).any(-1))
    rows = [np.flatnonzero(trial) for trial in known]

    def of(trials: np.ndarray) -> float:
        y, x = (np.concatenate([values[k, rows[k]] for k in trials]) for values in (truth, decoded))
        return mean_r2(y, x)

    rng = np.random.default_rng(0)
    drawn = [of(rng.integers(len(rows), size=len(rows))) for _ in range(BOOTSTRAPS)]
    return [of(np.arange(len(rows))), float(np.nanstd(drawn, ddof=1))]
