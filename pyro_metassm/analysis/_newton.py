"""Damped Newton searches for the fixed points of many maps from many starts at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_metassm.analysis._maps import Maps

STEPS = 60
LEAST_SHARE = 2.0**-8  # of Newton's step: a search that makes no progress with this little has failed
LONGEST = 0.5  # a step, in units of the region's scale
RIDGE = 1e-14
SAME, FLAT = 1e-3, 0.05  # distances over the scale, see `distinct`


def roots(maps: Maps, z: Tensor, scale: float, tolerance: float) -> tuple[Tensor, Tensor]:
    r"""Solutions of ``f(z) = z`` by Newton's method with backtracking on ``|f(z) - z|``.

    Args:
        maps: of S draws.
        z: starts, ``(S, N, latent_dim)``.
        scale: of the region that is searched.
        tolerance: of ``|f(z) - z| / scale``.

    Returns:
        where the searches ended, ``(S, N, latent_dim)``, and which of them found a solution, ``(S, N)``.
    """
    z, num_draws = z.clone(), z.shape[0]
    residual, slope = _residual(maps, z)
    size = residual.norm(dim=-1)
    share = torch.ones_like(size)
    rows = torch.arange(num_draws, device=z.device)[:, None]
    for _ in range(STEPS):
        going = (size > tolerance * scale) & (share >= LEAST_SHARE)
        most = int(going.sum(1).max())
        if not most:
            break
        at = torch.argsort(going.int(), dim=1, descending=True, stable=True)[
            :, :most
        ]  # the same number in every draw
        here, r, old = z[rows, at], residual[rows, at], size[rows, at]
        step = newton_step(slope[rows, at], r)
        length = step.norm(dim=-1, keepdim=True)
        step = step * (LONGEST * scale / length.clamp(min=1e-300)).clamp(max=1.0)
        trial = here + share[rows, at].unsqueeze(-1) * step
        r_new, slope_new = _residual(maps, trial)
        new = r_new.norm(dim=-1)
        better = (new < (1 - 1e-4 * share[rows, at]) * old) & going[rows, at]
        z[rows, at] = torch.where(better.unsqueeze(-1), trial, here)
        residual[rows, at] = torch.where(better.unsqueeze(-1), r_new, r)
        slope[rows, at] = torch.where(better[..., None, None], slope_new, slope[rows, at])
        size[rows, at] = torch.where(better, new, old)
        share[rows, at] = torch.where(better, (2 * share[rows, at]).clamp(max=1.0), share[rows, at] / 4)
    return z, size <= tolerance * scale


def newton_step(slope: Tensor, residual: Tensor) -> Tensor:
    """``-slope^-1 residual``; where the slope is singular, the least-squares step of smallest length."""
    transposed = slope.mT
    normal = transposed @ slope
    ridge = RIDGE * normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-300)
    normal = normal + ridge[..., None, None] * torch.eye(
        slope.shape[-1], dtype=slope.dtype, device=slope.device
    )
    step, info = torch.linalg.solve_ex(normal, -(transposed @ residual.unsqueeze(-1)).squeeze(-1))
    good = (info == 0) & step.isfinite().all(-1)
    return torch.where(good.unsqueeze(-1), step, torch.zeros_like(step))


def distinct(maps: Maps, z: Tensor, good: Tensor, scale: float, tolerance: float) -> tuple[Tensor, Tensor]:
    """The different ones among solutions of every draw.

    Two are one if they are within 1e-3 of the scale; or within 0.05, and so is what lies halfway: where solutions are
    about to merge, ``f(z) - z`` is flat, and its zero is no better known.

    Args:
        maps: of S draws.
        z: ``(S, N, latent_dim)``.
        good: ``(S, N)``; others are left out.
        scale: of the region.
        tolerance: of a solution.

    Returns:
        ``(S, F, latent_dim)`` and which of them are there ``(S, F)``, F the largest number of a draw.
    """
    left, kept, there = good.clone(), [], []
    rows = torch.arange(len(z), device=z.device)
    while bool(left.any()):
        point = z[rows, left.int().argmax(1)][:, None]
        there.append(left.any(1))
        kept.append(point[:, 0])
        apart = (z - point).norm(dim=-1)
        near = apart <= SAME * scale
        if bool((left & ~near & (apart <= FLAT * scale)).any()):
            halfway = maps.displacement((z + point) / 2).norm(dim=-1)
            near |= (apart <= FLAT * scale) & (halfway <= 10 * tolerance * scale)
        left = left & ~near & there[-1][:, None]
    if not kept:
        return z[:, :0], good[:, :0]
    return torch.stack(kept, 1), torch.stack(there, 1)


def _residual(maps: Maps, z: Tensor) -> tuple[Tensor, Tensor]:
    """``f(z) - z`` and its derivative; infinite where it is no number."""
    after, jacobian = maps.jacobian(z)
    residual = after - z
    residual = torch.where(residual.isfinite(), residual, torch.inf)
    jacobian = jacobian - torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return residual, torch.where(jacobian.isfinite(), jacobian, 0.0)
