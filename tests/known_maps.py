"""Fits whose dynamics are known maps of state and embedding, for tests of what is said about learned ones."""

from __future__ import annotations

import math

import numpy as np
import torch
import xarray as xr

import pyro_metassm as pm

WIDTH = 0.05  # s of a bin


class Known(pm.models.MetaSSM):
    """A family of maps ``step(z, e)``, with ``e`` of shape ``(..., 1, 1, d)`` before the trials and bins of ``z``."""

    def adapt_dynamics(self, e):
        e = e.unsqueeze(-2)
        return lambda z: self.step(z, [e[..., k] for k in range(e.shape[-1])])

    @staticmethod
    def step(z, e):
        raise NotImplementedError


class NormalForm(Known):
    """The exact flow of ``r' = r (mu - r^2)``, ``phi' = w`` over a bin, with ``e = (mu, w)``."""

    @staticmethod
    def step(z, e):
        mu, w = e
        square, grow = z.square().sum(-1), (2 * mu * WIDTH).exp()
        # ( exp(2 mu t) - 1 ) / mu, continuous at 0
        gain = torch.where(mu.abs() < 1e-9, 2 * WIDTH, (grow - 1) / torch.where(mu.abs() < 1e-9, 1.0, mu))
        scale = (grow / (1 + square * gain)).sqrt()
        c, s = (w * WIDTH).cos() * scale, (w * WIDTH).sin() * scale
        return torch.stack([c * z[..., 0] - s * z[..., 1], s * z[..., 0] + c * z[..., 1]], -1)


def runge_kutta(derivative, z, dt=WIDTH):
    first = derivative(z)
    second = derivative(z + dt / 2 * first)
    third = derivative(z + dt / 2 * second)
    return z + dt / 6 * (first + 2 * second + 2 * third + derivative(z + dt * third))


class Duffing(Known):
    """``x'' = a x' - x (b + 0.1 x^2)`` by Runge-Kutta's rule, with ``e = (a, b)``."""

    @staticmethod
    def step(z, e):
        a, b = e
        square = lambda x: (x**2).clamp(max=60.0)
        return runge_kutta(
            lambda z: torch.stack([z[..., 1], a * z[..., 1] - z[..., 0] * (b + 0.1 * square(z[..., 0]))], -1),
            z,
        )


class VanDerPol(Known):
    """``x'' = -x + (mu - x^2) x'`` by Runge-Kutta's rule, with ``e = (mu,)``."""

    @staticmethod
    def step(z, e):
        damping = lambda x: e[0] - (x**2).clamp(max=8.0)
        return runge_kutta(
            lambda z: torch.stack([z[..., 1], -z[..., 0] + damping(z[..., 0]) * z[..., 1]], -1), z
        )


class Henon(Known):
    """``(1 - a x^2 + y, b x)`` with ``e = (a, b)``."""

    @staticmethod
    def step(z, e):
        return torch.stack([1 - e[0] * z[..., 0] ** 2 + z[..., 1], e[1] * z[..., 0]], -1)


class Linear(Known):
    """``z' = A z`` of a fixed matrix."""

    matrix = torch.tensor([[0.9, 0.2, 0.0], [-0.2, 0.9, 0.1], [0.0, 0.0, 0.5]], dtype=torch.float64)

    @classmethod
    def step(cls, z, e):
        return z @ cls.matrix.mT.to(z) + 0.0 * e[0].unsqueeze(-1)


def fit_of(
    kind: type[pm.models.MetaSSM],
    embeddings: dict[str, tuple[float, ...]],
    sd: float = 0.01,
    latent_dim: int = 2,
    initial_sd: float = 1.5,
    noise: float = 0.01,
) -> pm.Fit:
    """A fit that knows these recordings, with embeddings ``Normal(., sd^2)`` and read-outs that are random."""
    rng = np.random.default_rng(0)
    recs = pm.Recordings(
        pm.Recording(name, rng.normal(size=(2, 12, 6)), bin_width=WIDTH) for name in embeddings
    )
    size = len(next(iter(embeddings.values())))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(recs, latent_dim=latent_dim, embedding_dim=size, hidden_dim=4)
        guide = pm.guides.DKF(model, hidden_dim=4)
    with torch.no_grad():
        model.initial.log_scale.fill_(math.log(initial_sd))
        model.process_noise.log_scale.fill_(math.log(noise))
    model.eval(), guide.eval()
    statistics = torch.tensor([[*e, *[sd**2] * size] for e in embeddings.values()])
    return pm.Fit(model, guide, xr.Dataset(), statistics, attrs={"bin_width": WIDTH})
