"""A family of dynamics that is known instead of learned, with an encoder that is a formula: van der Pol oscillators."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr

import pyro_metassm as pm
from pyro_metassm.guides.encoders import EmbeddingEncoder

STEP = 0.12  # time units a bin
NOISE = 0.1  # sd of the observations, whose read-outs have unit variance
MUS = (0.5, 0.8, 1.2, 1.5, 2.0)
CENTER = 1.2  # mu at e = 0


def derivative(z, mu):
    """``z1' = z2``, ``z2' = (mu - min(z1^2, 6)) z2 - z1``; the only linear symmetry is ``z -> -z``.

    Bounded, so that steps from far away are stable.
    """
    stack, square = (
        (torch.stack if isinstance(z, torch.Tensor) else np.stack),
        (z[..., 0] ** 2).clip(0.0, 6.0),
    )
    return stack([z[..., 1], (mu - square) * z[..., 1] - z[..., 0]], -1)


class VanDerPol(pm.models.MetaSSM):
    """Its embedding is ``mu - CENTER``; what it returns is any callable."""

    def adapt_dynamics(self, e):
        mu = CENTER + e  # (..., R, 1, 1), for states (..., R, K, T, 2)
        return lambda z: z + STEP * derivative(z, mu)


class Regression(EmbeddingEncoder):
    """Least squares of ``mu`` in a step of ``z2``, over the bins of a trial."""

    def summary(self, frame, seen):
        raise NotImplementedError

    def forward(self, frame, seen):
        both = (seen[..., 1:, :] & seen[..., :-1, :]).squeeze(-1)
        now, after = frame[..., :-1, :], frame[..., 1:, 1]
        rest = (after - now[..., 1]) / STEP - derivative(now, 0.0)[..., 1]  # mu z2
        square = (now[..., 1].square() * both).sum(-1, keepdim=True)
        mean = (now[..., 1] * rest * both).sum(-1, keepdim=True) / square.clamp(min=1e-6) - CENTER
        return mean.clamp(-2.0, 2.0), torch.full_like(mean, 1e-3)


def recordings(mus, *, num_trials=6, num_bins=60, num_neurons=25, seed=0, prefix="mu=") -> pm.Recordings:
    """Simulated recordings with the family's read-outs, ``c ~ Normal(0, I)`` and ``d ~ Normal(0, 1/4)``."""
    rng = np.random.default_rng(seed)
    result, truth = [], {}
    for mu in mus:
        z = 1.5 * rng.normal(size=(num_trials, 2))
        path = [z]
        for _ in range(num_bins - 1):
            path.append(path[-1] + STEP * derivative(path[-1], mu))
        z = np.stack(path, 1)
        c, d = rng.normal(size=(2, num_neurons)), 0.5 * rng.normal(size=num_neurons)
        y = z @ c + d + NOISE * rng.normal(size=(num_trials, num_bins, num_neurons))
        name = f"{prefix}{mu:g}"
        result.append(pm.Recording(name, y, bin_width=0.02))
        variables = {"latents": (("trial", "time", "latent_dim"), z), "weight": (("latent_dim", "neuron"), c)}
        truth[name] = xr.Dataset(variables | {"bias": ("neuron", d)}, attrs={"mu": mu})
    return pm.Recordings(result, truth=truth)


def fit_of(mus=MUS, *, model=VanDerPol, dtype=torch.float32, seed=0) -> pm.Fit:
    """What a perfect fit of these recordings would be, but for read-ins: nobody asks for these."""
    recs = recordings(mus, seed=seed, num_trials=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model(recs, latent_dim=2, embedding_dim=1, hidden_dim=4)
        guide = pm.guides.DKF(model, hidden_dim=4, embedding_encoder=Regression)
    guide.read_in.start(recs)
    with torch.no_grad():
        model.process_noise.log_scale.fill_(float(np.log(0.02)))
        model.initial.log_scale.fill_(float(np.log(1.5)))
        model.observation.log_sd.fill_(float(np.log(NOISE)))
        for name, dataset in recs.truth.items():
            rows = model.neurons.slice(name)
            model.read_out.weight[rows] = torch.as_tensor(dataset["weight"].values.T, dtype=torch.float32)
            model.read_out.bias[rows] = torch.as_tensor(dataset["bias"].values, dtype=torch.float32)
    model.to(dtype).eval(), guide.to(dtype).eval()
    statistics = torch.tensor([[mu - CENTER, 1e-3] for mu in mus], dtype=dtype)
    return pm.Fit(model, guide, xr.Dataset(), statistics, attrs={"bin_width": 0.02})
