"""The cases that are timed: sizes of model and data, and data of that shape."""

from __future__ import annotations

from dataclasses import dataclass, fields
from inspect import signature

import numpy as np
import torch

import pyro_metassm as pm
from pyro_metassm.trainer import Options, Trainer


@dataclass(frozen=True)
class Case:
    """Sizes of one case; a step takes ``trials_per_step`` of the ``num_trials`` trials of every recording."""

    num_neurons: tuple[int, ...]  # of each recording
    num_bins: int
    trials_per_step: int = 32
    num_trials: int = 128
    latent_dim: int = 2
    embedding_dim: int = 1
    rank: int = 1
    hidden_dim: int = 64  # of the dynamics
    read_in_dim: int = 32
    common_dim: int = 16
    recurrent_dim: int = 64
    rollout_probability: float = 0.2

    @property
    def num_recordings(self) -> int:
        return len(self.num_neurons)


def _between(fewest: int, most: int, number: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.linspace(fewest, most, number))


CASES = {
    "limit_cycles": Case(_between(20, 50, 4), num_bins=100),
    "motor": Case(
        _between(60, 350, 30),
        num_bins=35,
        num_trials=64,
        latent_dim=24,
        embedding_dim=2,
        rank=6,
        hidden_dim=128,
        read_in_dim=128,
        common_dim=64,
        recurrent_dim=128,
    ),
    "long": Case(_between(20, 50, 8), num_bins=1000, trials_per_step=16, num_trials=64),
    "wide": Case((1000,) * 4, num_bins=100, num_trials=64),
}
# Seconds in all: what the tests run.
TINY = Case((3, 5), 6, 2, 4, hidden_dim=8, read_in_dim=6, common_dim=4, recurrent_dim=5)


def data(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays ``(trials, time, neurons)`` of noisy sines: the time of a step does not depend on what is in them."""
    rng = np.random.default_rng(seed)
    bins = np.arange(case.num_bins, dtype=np.float32)[:, None]
    result = {}
    for row, num_neurons in enumerate(case.num_neurons):
        phase = rng.uniform(0, 6.28, (case.num_trials, 1, case.latent_dim)).astype(np.float32)
        latents = np.sin(rng.uniform(0.05, 0.3, case.latent_dim).astype(np.float32) * bins + phase)
        weight = rng.standard_normal((case.latent_dim, num_neurons), np.float32) * case.latent_dim**-0.5
        noise = rng.standard_normal((case.num_trials, case.num_bins, num_neurons), np.float32)
        result[f"r{row}"] = latents @ weight + 0.1 * noise
    return result


def recordings(arrays: dict[str, np.ndarray]) -> pm.Recordings:
    return pm.Recordings([pm.Recording(name, array, bin_width=0.02) for name, array in arrays.items()])


def library(case: Case, recs: pm.Recordings, device: torch.device | str = "cpu", **options) -> Trainer:
    """The library's trainer as :func:`pyro_metassm.fit` makes it, at the first step of SVI."""
    model = pm.models.MetaSSM(
        recs,
        latent_dim=case.latent_dim,
        embedding_dim=case.embedding_dim,
        rank=case.rank,
        hidden_dim=case.hidden_dim,
    )
    guide = pm.guides.DKF(
        model,
        read_in_dim=case.read_in_dim,
        common_dim=case.common_dim,
        hidden_dim=case.recurrent_dim,
        rollout_probability=case.rollout_probability,
    )
    device = torch.device(device)
    model.to(device).train(), guide.to(device).train()
    guide.read_in.start(recs)
    # What `fit` would take for everything that is not chosen here.
    defaults = {name: parameter.default for name, parameter in signature(pm.fit).parameters.items()}
    chosen = {"num_steps": 10_000, "trials_per_step": case.trials_per_step, "learning_rate": 1e-3}
    chosen |= {"warm_start": False} | options
    known = {field.name for field in fields(Options)}
    options = {name: value for name, value in (defaults | chosen).items() if name in known}
    return Trainer(model, guide, recs, Options(**options), device)
