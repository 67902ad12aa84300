"""What recordings say about the last layer of their dynamics, with states that are known through observations alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from pyro_metassm.dynamics import AdaptedMLP
from pyro_metassm.guides.exact import GaussianPath
from pyro_metassm.laplace_smoother import Chain, linearised, smoothed
from pyro_metassm.models.revised import with_last_layer
from pyro_metassm.recordings import Batch

STEP = 1e-5  # of the central differences of features, in latents
AT_ONCE = 2**22  # numbers a bin of the passes over time


@dataclass(frozen=True)
class Information:
    r"""The log evidence of a recording's data about a change ``b`` of its last layer, from where that is.

    ``log p(y; b + c) = const + sum_k slope_k^T c - c^T matrix c / 2``, p = num_features latent_dim.

    Attributes:
        slope: of every trial, ``(K, p)``.
        matrix: ``(p, p)``.
        paths: smoothed, ``(K, T, d)``.
    """

    slope: Tensor
    matrix: Tensor
    paths: Tensor


def last_hidden(dynamics: AdaptedMLP, z: Tensor) -> Tensor:
    """The last hidden layer and a one, ``(..., hidden_dim + 1)``, at states ``(..., d)``."""
    x = dynamics.hidden(z)
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


@torch.no_grad()
def information(
    model, dynamics: AdaptedMLP, features: Tensor, change: Tensor, paths: Tensor, batch: Batch
) -> Information:
    r"""Slope and information of ``b`` in ``z' = f(z) + phi(z) b + noise``, ``phi = [h(z); 1] V``, at a change ``b``.

    Around the paths that are likeliest given the data the model is linear and Gaussian: states are integrated out, so
    that noise of the observations neither bends ``b`` (as it does a regression on smoothed states) nor is counted
    twice. By Fisher's identity the slope is ``E[ phi(z_t)^T W (z_{t+1} - f(z_t)) | y ]``, exact where dynamics are
    linear; the information is that of the joint Gaussian of states and ``b``.

    Args:
        model: in double precision; read-outs, likelihood, first state and process noise are its own.
        dynamics: of the one recording, without the change.
        features: ``V (hidden_dim + 1, F)``.
        change: ``b (F, d)``.
        paths: to start from, ``(1, K, T, d)``.
        batch: the recording's trials.
    """
    precision = model.process_noise().pow(-2).diag()
    changed = with_last_layer(dynamics, (features @ change)[None, None])
    chain = Chain(changed, precision, model.initial.loc, model.initial.scale.pow(-2).diag())
    path = smoothed(model, chain, paths, batch, num_steps=2)
    z = path.mean
    mean, jacobian = linearised(changed, z[:, :, :-1])
    error, jacobian = (z[:, :, 1:] - mean)[0], jacobian[0]
    own, cross = (torch.stack(x, 1) for x in covariances(path))
    phi, dphi = _features(dynamics, features, z[:, :, :-1])  # (K, T - 1, F), (K, T - 1, F, d)
    both = batch.time_mask[0, :, 1:] & batch.time_mask[0, :, :-1]
    phi, dphi = phi * both.unsqueeze(-1), dphi * both[..., None, None]
    # cov( z_t, z_{t+1} - f(z_t) ): noise in the states goes with the error that it makes
    with_error = cross - own[:, :-1] @ jacobian.mT
    slope = torch.einsum("ktf,ktd->kfd", phi, error) + torch.einsum("ktfi,ktid->kfd", dphi, with_error)
    return Information((slope @ precision).flatten(1), _integrated(path, jacobian, precision, phi), z[0])


def _features(dynamics: AdaptedMLP, features: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    at = lambda z: (last_hidden(dynamics, z) @ features)[0]
    steps = STEP * torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    slopes = [(at(z + step) - at(z - step)) / (2 * STEP) for step in steps]
    return at(z), torch.stack(slopes, -1)


def covariances(path: GaussianPath) -> tuple[list[Tensor], list[Tensor]]:
    """``cov(z_t)`` of every bin, ``cov(z_t, z_{t+1})`` of all but the last, of a recording's trials ``(K, d, d)``."""
    eye = torch.eye(path.loc.shape[-1], dtype=path.loc.dtype, device=path.loc.device)
    own: list[Tensor] = []
    cross: list[Tensor] = []
    for t in range(len(path.lower) - 1, -1, -1):
        inverse = solve_triangular(path.lower[t][0], eye.expand_as(path.lower[t][0]), upper=False)
        inner = eye
        if own:
            below = path.cross[t][0]
            cross.append(-inverse.mT @ below.mT @ own[-1])
            inner = eye + below.mT @ own[-1] @ below
        own.append(inverse.mT @ inner @ inverse)
    return own[::-1], cross[::-1]


def _integrated(path: GaussianPath, jacobian: Tensor, precision: Tensor, phi: Tensor) -> Tensor:
    """``sum_t Phi_t^T W Phi_t - C^T P^-1 C``: P the precision of the path, C what couples it to ``b``."""
    num_trials, steps, num_features = phi.shape
    d = len(precision)
    p = num_features * d
    total = torch.einsum("ktf,ktg->fg", phi, phi)
    total = torch.einsum("fg,de->fdge", total, precision).reshape(p, p)
    size = max(1, AT_ONCE // (d * p))
    for first in range(0, num_trials, size):
        part = slice(first, first + size)
        back = jacobian[part].mT @ precision
        solved = None
        for t in range(steps + 1):
            right = phi.new_zeros(*phi[part].shape[:1], d, num_features, d)
            if t < steps:
                right += torch.einsum("kde,kf->kdfe", back[:, t], phi[part, t])
            if t > 0:
                right -= torch.einsum("de,kf->kdfe", precision, phi[part, t - 1])
            right = right.flatten(2)
            if solved is not None:
                right = right - path.cross[t - 1][0, part] @ solved
            solved = solve_triangular(path.lower[t][0, part], right, upper=False)
            flat = solved.flatten(0, 1)
            total -= flat.mT @ flat
    return total
