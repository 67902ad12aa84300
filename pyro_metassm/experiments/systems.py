"""The data of the studies: families of systems as plain settings, and what is known of their recordings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pyro_metassm import simulate
from pyro_metassm.recordings import Recording, Recordings


@dataclass(frozen=True)
class Family(ABC):
    """A family of systems: recordings to train on, and unseen ones to adapt to.

    Attributes:
        num_train, num_test, num_adapt: trials of a recording to train on, to score on, to adapt with.
        num_bins: bins of a trial.
        num_neurons: neurons of a recording, (lowest, highest).
        noise, noise_sd, mean_count: of the observations, as of :mod:`pyro_metassm.simulate`.
        held_out_seed: of the unseen recordings: their parameters, neurons and trials.
    """

    num_train: int = 128
    num_test: int = 64
    num_adapt: int = 32
    num_bins: int = 300
    num_neurons: tuple[int, int] = (30, 100)
    noise: simulate.Noise = "gaussian"
    noise_sd: float = 0.1
    mean_count: tuple[float, float] = (0.05, 0.5)
    held_out_seed: int = 1000

    @abstractmethod
    def known(self, num_trials: int, seed: int) -> Recordings:
        """The recordings that methods are trained on."""

    @abstractmethod
    def unseen(self, num_trials: int) -> Recordings:
        """Recordings of the family with other parameters."""

    def training(self, seed: int) -> tuple[Recordings, Recordings]:
        """Training and test trials of the known recordings: the first trials train."""
        return split(self.known(self.num_train + self.num_test, seed), self.num_train)

    def held_out(self) -> tuple[Recordings, Recordings]:
        """Trials of the unseen recordings to adapt with, and to test on."""
        return split(self.unseen(self.num_adapt + self.num_test), self.num_adapt)

    @property
    def counts(self) -> bool:
        return self.noise == "poisson"

    @property
    def observing(self) -> dict:
        """What the simulations are told of trials and observations."""
        return {
            "num_steps": self.num_bins,
            "num_neurons": self.num_neurons,
            "noise": self.noise,
            "noise_sd": self.noise_sd,
            "mean_count": self.mean_count,
        }


@dataclass(frozen=True)
class Bifurcations(Family):
    """Duffing and Hopf oscillators across their bifurcations (paper, section 5.2).

    Attributes:
        damping, stiffness: the grid of (a, b) of the Duffing recordings.
        mu: of the Hopf recordings.
        unseen_duffing, unseen_hopf: numbers of held-out recordings, whose parameters are drawn uniformly from
            the ranges of the grids.
    """

    damping: tuple[float, ...] = tuple(np.linspace(-0.6, 0.0, 4).round(6).tolist())
    stiffness: tuple[float, ...] = tuple(np.linspace(-1.0, 1.0, 5).round(6).tolist())
    mu: tuple[float, ...] = tuple(np.linspace(-1.0, 1.0, 11).round(6).tolist())
    unseen_duffing: int = 4
    unseen_hopf: int = 2

    def known(self, num_trials: int, seed: int) -> Recordings:
        pairs = [(a, b) for a in self.damping for b in self.stiffness]
        return self._simulate(pairs, self.mu, num_trials, seed)

    def unseen(self, num_trials: int) -> Recordings:
        rng = np.random.default_rng(self.held_out_seed)
        a, b = (
            rng.uniform(min(grid), max(grid), self.unseen_duffing).round(4)
            for grid in (self.damping, self.stiffness)
        )
        mu = rng.uniform(min(self.mu), max(self.mu), self.unseen_hopf).round(4)
        return self._simulate(
            list(zip(a.tolist(), b.tolist(), strict=True)), mu.tolist(), num_trials, self.held_out_seed
        )

    def _simulate(self, pairs, mu, num_trials: int, seed: int) -> Recordings:
        options = {"num_trials": num_trials, "seed": seed, **self.observing}
        parts = [simulate.duffing(pairs, **options)] if pairs else []
        parts += [simulate.hopf(mu, **options)] if len(mu) else []
        return together(parts)


@dataclass(frozen=True)
class LimitCycles(Family):
    """Limit cycles of different speed (paper, section 5.1).

    Attributes:
        velocities: of the recordings, rad / s.
        num_unseen: held-out recordings, of speeds drawn uniformly from their range.
    """

    num_bins: int = 100
    num_neurons: tuple[int, int] = (20, 60)
    velocities: tuple[float, ...] = (2.5, 5.0)
    num_unseen: int = 2

    def known(self, num_trials: int, seed: int) -> Recordings:
        return simulate.limit_cycles(self.velocities, num_trials=num_trials, seed=seed, **self.observing)

    def unseen(self, num_trials: int) -> Recordings:
        rng, (low, high) = np.random.default_rng(self.held_out_seed), self._range()
        velocities = rng.uniform(low, high, self.num_unseen).round(4)
        return simulate.limit_cycles(
            velocities, num_trials=num_trials, seed=self.held_out_seed, **self.observing
        )

    def _range(self) -> tuple[float, float]:
        return min(self.velocities), max(self.velocities)


def together(parts: Iterable[Recordings]) -> Recordings:
    """Recordings of several kinds as one, truths included."""
    parts = list(parts)
    truth = {name: dataset for part in parts for name, dataset in part.truth.items()}
    return Recordings([recording for part in parts for recording in part.values()], truth=truth)


def split(recs: Recordings, number: int) -> tuple[Recordings, Recordings]:
    """The first ``number`` trials of every recording, and the others."""
    first, second = (
        Recordings(
            [r.take(np.arange(r.num_trials)[rows]) for r in recs.values()],
            truth={name: dataset.isel(trial=rows) for name, dataset in recs.truth.items()},
        )
        for rows in (slice(0, number), slice(number, None))
    )
    return first, second


def renamed(recs: Recordings, suffix: str) -> Recordings:
    """The same recordings under names that end in ``suffix``: for another fit they are others."""
    recordings = [
        Recording(r.name + suffix, r.observations, bin_width=r.bin_width, attrs=r.attrs)
        for r in recs.values()
    ]
    return Recordings(recordings, truth={name + suffix: dataset for name, dataset in recs.truth.items()})


def few_trials(pool: Recordings, number: int, num_draws: int, seed: int) -> Recordings:
    """``number`` trials of every recording, drawn ``num_draws`` times: recordings ``"name #0"``, ``"name #1"``, ...

    The trials of a smaller number are among those of a larger one of the same draw.
    """
    draws = (
        renamed(pool.take_trials(number, seed=1000 * seed + draw), tag(draw)) for draw in range(num_draws)
    )
    return together(draws)


def tag(draw: int) -> str:
    """What the name of a recording ends in for a draw of its trials."""
    return f" #{draw}"
