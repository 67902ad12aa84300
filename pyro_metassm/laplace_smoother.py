"""Paths of states given the data, by the Laplace approximation: for any likelihood of single neurons, any dynamics."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_metassm.guides.exact import GaussianPath
from pyro_metassm.observations import curvature
from pyro_metassm.recordings import Batch


@dataclass(frozen=True)
class Chain:
    """A prior of paths, ``z_1 ~ Normal(m, P^-1)`` and ``z_{t+1} ~ Normal(f(z_t), W^-1)``.

    Attributes:
        dynamics: ``f``, of states ``(R, K, T, d)``.
        precision: ``W``, of all recordings ``(d, d)`` or of each ``(R, d, d)``.
        first_loc, first_precision: ``m`` and ``P``, ``(d,)`` and ``(d, d)`` or ``(R, d)`` and ``(R, d, d)``.
    """

    dynamics: Callable[[Tensor], Tensor]
    precision: Tensor
    first_loc: Tensor
    first_precision: Tensor


@torch.no_grad()
def smoothed(model, chain: Chain, z: Tensor, batch: Batch, *, num_steps: int = 3) -> GaussianPath:
    r"""The Gaussian approximation of ``p(z_k | y_k)`` at its mode, batch ``(R, K)``, in double precision.

    Gauss-Newton steps of whole paths, halved where they do not help: the chain's mean is linearised at the path, the
    precision is the chain's plus ``C^T diag(-d^2 log p(y) / dx^2) C`` at the predictor ``x``, negative curvatures left
    out. Exact where dynamics and read-outs are linear and Gaussian. Held-out neurons are not seen.

    Args:
        model: whose read-outs and likelihood are used, a density of each neuron.
        chain: the prior.
        z: paths to start from, ``(R, K, T, d)``.
        batch: the data.
        num_steps: of Gauss-Newton.
    """
    share = z.new_ones(z.shape[:2])
    best: tuple[Tensor, ...] = ()
    bins = torch.ones_like(z[..., 0], dtype=torch.bool)
    for number in range(num_steps + 1):
        now = (z, *_terms(model, chain, z, batch))
        better = now[1] > (best[1] if best else -torch.inf)
        share = torch.where(better, (2 * share).clamp(max=1.0), 0.5 * share)
        best = tuple(_chosen(better, *pair) for pair in zip(now, best, strict=True)) if best else now
        path = GaussianPath(best[2], best[3], best[4], bins)
        if number < num_steps:
            z = best[0] + share[..., None, None] * (path.loc.to(z.dtype) - best[0])
    return path


@torch.no_grad()
def log_evidence(model, chain: Chain, path: GaussianPath, batch: Batch) -> Tensor:
    r"""Laplace's approximation of ``log p(y_k)``, ``(R, K)``: ``log p(y_k, z) - log q(z)`` at the mode ``z`` of ``q``.

    Exact where dynamics and read-outs are linear and Gaussian.

    Args:
        model, chain, batch: as of :func:`smoothed`.
        path: what it gives.
    """
    z = path.mean
    log_joint = _terms(model, chain, z.to(batch.observations), batch)[0]
    logdet = torch.linalg.slogdet(chain.first_precision.double())[1]
    logdet = logdet + (z.shape[-2] - 1) * torch.linalg.slogdet(chain.precision.double())[1]
    constant = 0.5 * (logdet - z[0, 0].numel() * math.log(2 * math.pi))
    return log_joint + constant.unsqueeze(-1) - path.log_prob(z)


def _chosen(first: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` where ``first``, else ``b``, that have further dimensions."""
    return torch.where(first.view(*first.shape, *[1] * (a.dim() - first.dim())), a, b)


def _terms(model, chain: Chain, z: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The log joint density ``(R, K)`` up to a constant; as :class:`GaussianPath` takes it, its expansion at ``z``."""
    w, p = (
        x.double().expand(len(z), *x.shape[-2:]).unsqueeze(1)
        for x in (chain.precision, chain.first_precision)
    )
    mean, jacobian = linearised(chain.dynamics, z[:, :, :-1])
    error = (z[:, :, 1:] - mean).double()
    first = (z[:, :, 0] - chain.first_loc.expand(len(z), -1).unsqueeze(1)).double()
    from_first, from_error = first @ p.squeeze(1), error @ w
    log_joint = -0.5 * ((from_first * first).sum(-1) + (from_error * error).sum((-1, -2)))
    below = -(w.unsqueeze(2) @ jacobian)
    diagonal = torch.cat([p.expand(-1, z.shape[1], -1, -1).unsqueeze(2), w.unsqueeze(2).expand_as(below)], 2)
    diagonal[:, :, :-1] -= jacobian.mT @ below
    slope = -torch.cat([from_first.unsqueeze(2), from_error], 2)
    slope[:, :, :-1] += (jacobian.mT @ from_error.unsqueeze(-1)).squeeze(-1)
    for r, name in enumerate(batch.names):
        rows = model.read_out.neurons.slice(name)
        c, seen = model.read_out.weight[rows], batch.held_in[r, : batch.num_neurons[r]]
        predictor = torch.addmm(model.read_out.bias[rows], z[r].flatten(0, 1), c.mT).unflatten(
            0, z[r].shape[:2]
        )
        log_prob, first_order, second_order = (x * seen for x in curvature(model, predictor, batch, r))
        squares = (c.unsqueeze(-1) * c.unsqueeze(-2)).flatten(1)
        log_joint[r] += log_prob.sum((-1, -2), dtype=torch.float64)
        slope[r] += (first_order @ c).double()
        diagonal[r] += (second_order @ squares).double().unflatten(-1, c.shape[1:] * 2)
    z = z.double()
    information = _times(diagonal, z) + slope  # precision times z, plus the slope: precision times the next z
    information[:, :, 1:] += _times(below, z[:, :, :-1])
    information[:, :, :-1] += _times(below.mT, z[:, :, 1:])
    return log_joint, diagonal, below, information


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def linearised(dynamics: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """``f(z)`` and its Jacobian ``(..., d, d)``, in double precision."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = dynamics(z)
        rows = [torch.autograd.grad(value[..., i].sum(), z, retain_graph=True)[0] for i in range(z.shape[-1])]
    return value.detach(), torch.stack(rows, -2).double()
