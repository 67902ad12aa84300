"""A linear chain of states, its paths as one dense Gaussian, and posteriors of it."""

import numpy as np
import pyro.distributions as dist
import torch

from pyro_metassm.distributions import (
    MarkovPath,
)

A = torch.tensor([[0.9, 0.5], [-0.4, 0.7]], dtype=torch.float64)
B = torch.tensor([0.3, -0.2], dtype=torch.float64)
Q = torch.tensor([0.5, 0.2], dtype=torch.float64)  # sd of a step
MU, SIGMA = torch.tensor([1.0, -1.0], dtype=torch.float64), torch.tensor([0.7, 1.5], dtype=torch.float64)
T, D = 5, 2
SIGMAS = 5.0  # standard errors allowed: 6e-7 a comparison, were the seeds not fixed


def step(z):
    return dist.Normal(z @ A.mT + B, Q).to_event(1)


def bent(z):
    return dist.Normal(torch.tanh(z @ A.mT) + B, Q).to_event(1)


def chain(num_steps=T, mask=None, batch=(), transition=step) -> MarkovPath:
    initial = dist.Normal(MU, SIGMA).expand((*batch, D)).to_event(1)
    return MarkovPath(initial, transition, num_steps, mask)


def dense(num_steps: int = T) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the linear chain's whole path: by its definition, ``z = M (noise) + m``."""
    a, b, q, mu, sigma = (x.numpy() for x in (A, B, Q, MU, SIGMA))
    mean = [mu]
    for _ in range(num_steps - 1):
        mean.append(a @ mean[-1] + b)
    mix = np.zeros((num_steps * D, num_steps * D))
    for t in range(num_steps):
        for s in range(t + 1):
            scale = np.diag(sigma if s == 0 else q)
            mix[t * D : t * D + D, s * D : s * D + D] = np.linalg.matrix_power(a, t - s) @ scale
    return np.concatenate(mean), mix @ mix.T


def check_moments(samples: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> None:
    """Sample moments within standard errors: var(m_i) = C_ii / N, var(S_ij) = (C_ii C_jj + C_ij^2) / N."""
    num = len(samples)
    variance = cov.diagonal()
    assert (np.abs(samples.mean(0) - mean) < SIGMAS * np.sqrt(variance / num)).all()
    error = np.sqrt((np.outer(variance, variance) + cov**2) / num)
    centred = samples - mean
    assert (np.abs(centred.T @ centred / num - cov) < SIGMAS * error).all()


def encoder(*batch, num_steps=T, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    loc = torch.randn(*batch, num_steps, D, generator=rng, dtype=torch.float64)
    return loc, torch.rand(*batch, num_steps, D, generator=rng, dtype=torch.float64) + 0.3


PATTERNS = {
    "none": None,
    "some": torch.tensor([False, True, False, True, True]),
    "all": torch.tensor([True] * T),
}
