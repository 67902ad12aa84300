"""Latent frames found in the data alone: a subspace of a recording's neurons, in an orientation that its flow decides.

Every recording's latents are known up to an affine map only. A frame fixes that map by rules that do not depend on who
observed the system, so that similar systems come to lie alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_metassm.guides.encoders import smooth

# Of the largest variance: keeps directions that hold only noise from being blown up by whitening.
RIDGE = 0.02
KERNELS = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # sd in bins
SPREAD = math.log(2.0)  # sd of the logarithms of kernels' widths between recordings of a pool, about


@dataclass(frozen=True)
class Frames:
    """Canonical coordinates of R recordings, ``w = features @ weight + bias``, about unit variance.

    Attributes:
        weight: ``(R, N, latent_dim)``.
        bias: ``(R, latent_dim)``.
        coordinates: ``w (R, K, T, latent_dim)``, smoothed over time where the data are noisy.
        smoothing: sd of every recording's Gaussian kernel, in bins; 0 is none.
    """

    weight: Tensor
    bias: Tensor
    coordinates: Tensor
    smoothing: tuple[float, ...]

    def of(self, features: Tensor, bins: Tensor) -> Frames:
        """The same frames, with the coordinates of other trials: their features ``(R, K, T, N)`` and bins seen."""
        w = features.flatten(1, 2) @ self.weight + self.bias.unsqueeze(1)
        seen = bins.unsqueeze(-1).to(w.dtype)
        return replace(self, coordinates=smooth(w.unflatten(1, bins.shape[1:]), seen, self.smoothing))


def canonical_frames(features: Tensor, bins: Tensor, dim: int, smoothing: float | None = None) -> Frames:
    """The frame of every recording.

    Args:
        features: ``(R, K, T, N)``, centred, zero where not seen.
        bins: ``(R, K, T)`` bool, where anything was seen.
        dim: number of latents.
        smoothing: width of the kernels, in bins, around which those of the recordings are looked for; 0 is none, None
            that which predicts a bin of all recordings best from its neighbours.
    """
    pairs = list(zip(features, bins, strict=True))
    basis = torch.stack([lagged_subspace(f, seen, dim) for f, seen in pairs])
    x = torch.stack([f @ b for f, b in zip(features, basis, strict=True)])
    widths = smoothing_widths(x, bins, smoothing)
    x = smooth(x, bins.unsqueeze(-1).to(x.dtype), widths)
    matrix, offset = canonical_frame(x, bins)
    w = (x.flatten(1, 2) @ matrix + offset.unsqueeze(1)).reshape(x.shape)
    return Frames(basis @ matrix, offset, w, widths)


def canonical_frame(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Whiten projections and orient them by their flow.

    With white ``w``, the one-step operator ``A = E[w_t (w_{t+1} - w_{t-1})^T] / 2`` does not depend on the basis in
    which a system was observed: the eigenvectors of its symmetric part (ascending) are the axes, the signs of its
    antisymmetric part fix reflections, so that similar systems get similar frames.

    Args:
        x: ``(..., K, T, d)``, each leading index a system of its own.
        seen: ``(..., K, T)`` bool.

    Returns:
        ``matrix (..., d, d)`` and ``offset (..., d)`` with ``w = x @ matrix + offset``.
    """
    weight = seen.unsqueeze(-1).to(x.dtype)
    number = weight.sum((-3, -2), keepdim=True).clamp(min=1)
    mean = (x * weight).sum((-3, -2), keepdim=True) / number
    centred = (x - mean) * weight
    flat = centred.flatten(-3, -2)
    values, vectors = torch.linalg.eigh(flat.mT @ flat / number.squeeze(-3))
    ridge = RIDGE * values[..., -1:].clamp(min=1e-12)
    whiten = vectors * (values.clamp(min=0) + ridge).rsqrt().unsqueeze(-2)
    # The operator of the raw coordinates, then in white ones; trials of one or two bins say nothing of a flow.
    both = (seen[..., 2:] & seen[..., 1:-1] & seen[..., :-2]).unsqueeze(-1)
    change = (centred[..., 2:, :] - centred[..., :-2, :]) * both
    raw = (centred[..., 1:-1, :] * both).flatten(-3, -2).mT @ change.flatten(-3, -2)
    count = 2 * both.sum((-3, -2), keepdim=True).squeeze(-3).clamp(min=1)
    operator = whiten.mT @ (raw / count) @ whiten
    axes = torch.linalg.eigh((operator + operator.mT) / 2)[1]
    turn = axes.mT @ ((operator - operator.mT) / 2) @ axes
    signs = [torch.ones_like(turn[..., 0, 0])]
    for axis in range(1, turn.shape[-1]):
        signs.append(torch.where(signs[-1] * turn[..., axis - 1, axis] < 0, -1.0, 1.0))
    matrix = whiten @ (axes * torch.stack(signs, -1).unsqueeze(-2))
    return matrix, -(mean.squeeze(-3) @ matrix).squeeze(-2)


def roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """The symmetric ``B^1/2`` and ``B^-1/2`` of second moments ``B (..., d, d)``, whose small variances are raised."""
    values, vectors = torch.linalg.eigh(moments)
    values = values.clamp(min=RIDGE * values[..., -1:].clamp(min=1e-12))
    root, inverse = (vectors * power.unsqueeze(-2) @ vectors.mT for power in (values.sqrt(), values.rsqrt()))
    return root, inverse


def lagged_subspace(features: Tensor, seen: Tensor, dim: int) -> Tensor:
    """Directions of the neurons that vary together over time, ``(N, dim)``, orthonormal, largest first.

    Eigenvectors of the symmetrised covariance between neighbouring bins, which noise that is independent from bin to
    bin does not enter. Fewer neurons than ``dim``: the rest are zeros.
    """
    if features.shape[1] > 1:
        a, b = features[:, :-1], features[:, 1:]
        lagged = torch.einsum("ktn,ktm->nm", a, b) / (seen[:, :-1] & seen[:, 1:]).sum().clamp(min=1)
    else:
        lagged = torch.einsum("ktn,ktm->nm", features, features) / seen.sum().clamp(min=1)
    # In double precision: with silent neurons and few bins float32 does not converge.
    vectors = torch.linalg.eigh((lagged + lagged.mT).double() / 2)[1].to(features.dtype)
    basis = features.new_zeros(features.shape[-1], dim)
    count = min(dim, features.shape[-1])
    basis[:, :count] = vectors.flip(-1)[:, :count]
    return basis


def noise_share(x: Tensor, seen: Tensor) -> Tensor:
    """Share of the variance of ``x (K, T, d)`` that is independent from bin to bin, from its covariance at lags 0-2."""

    def covariance(lag: int) -> Tensor:
        a, b = x[:, : x.shape[1] - lag], x[:, lag:]
        both = (seen[:, : x.shape[1] - lag] & seen[:, lag:]).unsqueeze(-1)
        return (a * b * both).sum() / both.sum().clamp(min=1)

    # For a smooth signal c(lag) = c(0) - a lag^2 near 0; what the variance has beyond that is noise.
    return 1 - (4 * covariance(1) - covariance(2)) / (3 * covariance(0)).clamp(min=1e-12)


def smoothing_widths(x: Tensor, bins: Tensor, about: float | None = None) -> tuple[float, ...]:
    """Width of every recording's kernel, which predicts its bins best from their neighbours; 0 with next to no noise.

    Recordings of a pool are as noisy as their neurons are few or silent: a width that suits them all on the whole
    blurs some and leaves others noisy. Where a recording's bins are too few to tell, its width is that of all.

    Args:
        x: projections ``(R, K, T, d)``.
        bins: ``(R, K, T)`` bool, where they were seen.
        about: a width that is likely without data; default the one that is best for all recordings together.
    """
    if about is None:
        share = torch.stack([noise_share(a, b) for a, b in zip(x, bins, strict=True)]).mean()
        about = None if share >= 0.05 else 0.0
    if about == 0.0 or x.shape[-2] < 3:
        return (0.0,) * len(x)
    weight = bins.unsqueeze(-1).to(x.dtype)
    scale = ((x**2) * weight).sum((1, 2, 3), keepdim=True).clamp(min=1e-12)
    errors = torch.stack(
        [
            (((smooth(x, weight, sd, leave_out=True) - x) ** 2) * weight / scale).sum((1, 2, 3))
            for sd in KERNELS
        ]
    )
    if about is None:
        about = KERNELS[int(errors.sum(1).argmin())]
    # As densities of errors of unknown size, and of widths. A bin counts once: its coordinates err together.
    number = bins.sum((1, 2))
    unlikely = 0.5 * number * errors.clamp(min=1e-12).log()
    unlikely = unlikely + 0.5 * ((torch.tensor(KERNELS).to(x) / about).log() / SPREAD).square().unsqueeze(-1)
    return tuple(KERNELS[index] for index in unlikely.argmin(0).tolist())
