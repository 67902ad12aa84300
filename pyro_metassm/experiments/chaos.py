"""Lorenz systems of different drive: a family of three-dimensional, chaotic dynamics, and how long they can be told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xarray as xr

from pyro_metassm._selecting import generator_of
from pyro_metassm.experiments.systems import Family
from pyro_metassm.integrating import Flow, integrate, runge_kutta
from pyro_metassm.recordings import Recording, Recordings

SIGMA, BETA = 10.0, 8.0 / 3.0
DT = 0.01
KEEP_EVERY = 3  # integration steps per bin
SETTLED = 500  # integration steps until a path is on the attractor


@dataclass(frozen=True)
class Lorenz(Family):
    """Lorenz systems, chaotic ones, with latents standardised in every recording.

    Attributes:
        rho: of the recordings.
        num_unseen: held-out recordings, with rho drawn uniformly from the range.
    """

    rho: tuple[float, ...] = tuple(np.linspace(28.0, 56.0, 8).tolist())
    num_unseen: int = 3

    def known(self, num_trials: int, seed: int) -> Recordings:
        return self._simulate(self.rho, num_trials, seed)

    def unseen(self, num_trials: int) -> Recordings:
        rng = np.random.default_rng(self.held_out_seed)
        rho = rng.uniform(min(self.rho), max(self.rho), self.num_unseen).round(4)
        return self._simulate(rho.tolist(), num_trials, self.held_out_seed)

    def _simulate(self, rho: Iterable[float], num_trials: int, seed: int) -> Recordings:
        if self.counts:
            raise ValueError("Lorenz: needed Gaussian observations, got counts")
        return lorenz(
            rho,
            num_trials=num_trials,
            num_bins=self.num_bins,
            num_neurons=self.num_neurons,
            noise_sd=self.noise_sd,
            seed=seed,
        )


def lorenz(
    rho: Iterable[float],
    *,
    num_trials: int,
    num_bins: int,
    num_neurons: tuple[int, int],
    noise_sd: float = 0.1,
    seed: int = 0,
    process_noise: float = 0.2,
) -> Recordings:
    r"""Lorenz systems, ``x' = sigma (y - x)``, ``y' = x (rho - z) - y``, ``z' = x y - beta z``.

    Latents are ``(x, y, z)`` less their mean over their standard deviation on the attractor, where trials start.

    Args:
        rho: of each recording.
        num_trials, num_bins, num_neurons, noise_sd, seed, process_noise: as of :mod:`pyro_metassm.simulate`; bins of
            30 ms of the system's time.

    Returns:
        Recordings named ``"lorenz rho=28"``, with ``truth`` as there; the attrs hold ``rho``, ``mean``, ``sd`` and
        ``lyapunov_time`` (s).
    """
    recordings, truth = [], {}
    for value in map(float, rho):
        name = f"lorenz rho={value:g}"
        of_neurons, of_path, of_noise = generator_of("simulate", name, seed).spawn(3)
        mean, sd, lyapunov_time = attractor(value)
        attrs = {"system": "lorenz", "rho": value, "mean": mean, "sd": sd, "lyapunov_time": lyapunov_time}
        derivative = flow(value, mean, sd)
        start = _path(derivative, of_path.standard_normal((num_trials, 3)), SETTLED)[:, -1]
        latents = integrate(
            runge_kutta,
            derivative,
            start,
            num_steps=num_bins,
            dt=DT,
            keep_every=KEEP_EVERY,
            step_sd=process_noise * DT,
            rng=of_path,
        )
        low, high = num_neurons
        read_out = of_neurons.standard_normal((3, int(of_neurons.integers(low, high + 1)))) / math.sqrt(3)
        rates = latents @ read_out
        y = rates + noise_sd * of_noise.standard_normal(rates.shape)
        recordings.append(Recording(name, y.astype(np.float32), bin_width=KEEP_EVERY * DT, attrs=attrs))
        truth[name] = xr.Dataset(
            {
                "latents": (("trial", "time", "latent_dim"), latents),
                "rates": (("trial", "time", "neuron"), rates.astype(np.float32)),
                "read_out": (("latent_dim", "neuron"), read_out),
                "offset": (("neuron",), np.zeros(read_out.shape[1])),
            },
            attrs=attrs,
        )
    return Recordings(recordings, truth=truth)


def flow(rho: float, mean: Sequence[float], sd: Sequence[float]) -> Flow:
    """The derivative in standardised coordinates."""
    center, scale = np.asarray(mean), np.asarray(sd)

    def derivative(w: np.ndarray) -> np.ndarray:
        x, y, z = np.moveaxis(center + scale * w, -1, 0)
        return np.stack([SIGMA * (y - x), x * (rho - z) - y, x * y - BETA * z], axis=-1) / scale

    return derivative


@lru_cache(maxsize=64)
def attractor(rho: float) -> tuple[list[float], list[float], float]:
    """Mean and standard deviation of ``(x, y, z)`` on the attractor, and the Lyapunov time (s)."""
    raw = flow(rho, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    starts = np.random.default_rng(0).standard_normal((64, 3)) * 5 + [0.0, 0.0, rho]
    states = _path(raw, starts, 4 * SETTLED)[:, SETTLED:]
    mean, sd = states.mean((0, 1)), states.std((0, 1))
    return mean.tolist(), sd.tolist(), 1 / lyapunov_exponent(raw, states[:, -1])


def lyapunov_exponent(derivative: Flow, states: np.ndarray, num_steps: int = 3000) -> float:
    """The largest one (1 / s): how fast neighbours part, which are brought together after every step (Benettin)."""
    distance = 1e-6
    direction = np.random.default_rng(1).standard_normal(states.shape)
    other = states + distance * direction / np.linalg.norm(direction, axis=-1, keepdims=True)
    growth = 0.0
    for step in range(num_steps):
        states, other = (runge_kutta(derivative, z, DT) for z in (states, other))
        apart = np.linalg.norm(other - states, axis=-1, keepdims=True)
        other = states + (other - states) * (distance / apart)
        if step >= num_steps // 10:  # by then the direction is that of the fastest growth
            growth += float(np.log(apart / distance).mean())
    return growth / ((num_steps - num_steps // 10) * DT)


def _path(derivative: Flow, start: np.ndarray, num_steps: int) -> np.ndarray:
    return integrate(
        runge_kutta,
        derivative,
        start,
        num_steps=num_steps,
        dt=DT,
        keep_every=1,
        step_sd=0.0,
        rng=np.random.default_rng(0),
    )
