"""What the best possible forecast would score: from the true state with the true dynamics, against the same targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from pyro_metassm import simulate
from pyro_metassm._scores import explained
from pyro_metassm.experiments import chaos
from pyro_metassm.integrating import Flow, Step, euler, integrate, runge_kutta
from pyro_metassm.recordings import Recordings


def derivative_of(attrs: Mapping[Any, Any]) -> Flow:
    """The noise-free dynamics of a simulated recording, from the attrs of its truth."""
    match attrs:
        case {"system": "lorenz", "rho": rho, "mean": mean, "sd": sd}:
            return chaos.flow(rho, mean, sd)
        case {"system": "ornstein-uhlenbeck", "relaxation": relaxation}:
            return lambda z: -z / relaxation
        case {"system": "reversed", "of": of}:
            forwards = derivative_of(of)
            return lambda z: -forwards(z)
    return simulate.flow(xr.Dataset(attrs=dict(attrs)))


def advance(
    states: np.ndarray, attrs: Mapping[Any, Any], bin_width: float, num_bins: int, bound: float = 1e6
) -> np.ndarray:
    """Where states ``(N, latent_dim)`` go without noise, ``(N, num_bins, latent_dim)``, by the simulation's rule."""
    step, dt = _rule(attrs)
    derivative = derivative_of(attrs)
    path = integrate(
        step,
        lambda z: np.clip(derivative(np.clip(z, -bound, bound)), -bound, bound),
        np.asarray(states, np.float64),
        num_steps=num_bins + 1,
        dt=dt,
        keep_every=round(bin_width / dt),
        step_sd=0.0,
        rng=np.random.default_rng(0),
    )
    return path[:, 1:]


def _rule(attrs: Mapping[Any, Any]) -> tuple[Step, float]:
    """How the system was integrated, and its step in s."""
    system = attrs["of"]["system"] if attrs["system"] == "reversed" else attrs["system"]
    if system == "limit cycle":
        return euler, 0.01
    return runge_kutta, chaos.DT if system == "lorenz" else 0.025


def targets(recs: Recordings, name: str, context: int, horizon: int, counts: bool) -> np.ndarray:
    """What forecasts are scored against, ``(trial, horizon, neuron)``: observations, or the log rates of counts."""
    window = slice(context, context + horizon)
    if counts:
        return np.log(recs.truth[name]["rates"].values[:, window].astype(np.float64))
    return recs[name].observations[:, window].astype(np.float64)


def ceilings(recs: Recordings, *, context: int, horizon: int, counts: bool = False) -> dict[str, list[float]]:
    """By recording, the share of the variance that a forecast from the true state explains, 1 to ``horizon`` steps on.

    As :func:`pyro_metassm.metrics.forecast_r2`: at each step over trials and neurons. The state is the true one in the
    last bin of the context, the dynamics are the true ones without their noise.
    """
    found = {}
    for name, recording in recs.items():
        truth = recs.truth[name]
        path = advance(truth["latents"].values[:, context - 1], truth.attrs, recording.bin_width, horizon)
        predicted = path @ truth["read_out"].values + truth["offset"].values
        found[name] = curve(targets(recs, name, context, horizon, counts), predicted)
    return found


def curve(target: np.ndarray, predicted: np.ndarray) -> list[float]:
    """Variance explained at each step of ``(trial, horizon, neuron)``."""
    return [explained(target[:, k], predicted[:, k], (0,)) for k in range(target.shape[1])]
