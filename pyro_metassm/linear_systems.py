"""Better frames for noisy data: a linear dynamical system of every recording, observed through the model's likelihood.

Kernels smooth what is noise and what is signal alike, and principal components of counts are not their log rates:
read-outs from such frames are biased. A few rounds of expectation and maximisation mend both.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_metassm import simulated_trials
from pyro_metassm.frames import Frames, canonical_frame
from pyro_metassm.guides.encoders import smooth
from pyro_metassm.laplace_smoother import Chain, smoothed
from pyro_metassm.observations import of_single_neurons
from pyro_metassm.read_outs import refit_read_outs, start_read_outs
from pyro_metassm.recordings import Batch
from pyro_metassm.tempering import tempered

ROUNDS = 16
FIRST = 8  # steps of Newton from neurons without tuning
SIMULATED = 32  # trials that a regression is of
FARTHEST = 30.0  # in coordinates of about unit variance: what is beyond it, a Newton step has sent astray
LEAST = 1e-4  # variance that the dynamics leave, at least, of coordinates of about unit variance


@dataclass(frozen=True)
class LinearSystems:
    """Canonical coordinates of R recordings as their linear systems have them.

    Attributes:
        frames: the linear map from smoothed features to ``paths`` of least squares, and what it gives.
        paths: posterior means ``(R, K, T, latent_dim)``.
        draws: one of each path, from its posterior.
    """

    frames: Frames
    paths: Tensor
    draws: Tensor


def noisy_counts(model, guide, frames: Frames, batch: Batch) -> bool:
    """Whether these are data that linear systems are for: counts of single neurons, in frames that must be smoothed."""
    counts = all(bool(guide.read_in.counts[model.neurons.slice(name)].all()) for name in batch.names)
    return max(frames.smoothing) > 0 and counts and of_single_neurons(model, batch)


@torch.no_grad()
def through_linear_systems(
    model, features: Tensor, frames: Frames, bins: Tensor, batch: Batch
) -> LinearSystems:
    """Laplace EM of linear systems, from the frames given; the model's read-outs are those from the new ones.

    Args:
        model: whose read-outs are fitted.
        features: ``(R, K, T, N)``, of which the frames are linear maps.
        frames: where to start.
        bins: ``(R, K, T)`` bool, where anything was seen.
        batch: the data.
    """
    paths = draws = frames.coordinates
    seen_through = tempered(model)
    start_read_outs(model, paths, batch)
    refit_read_outs(seen_through, paths, batch, num_steps=FIRST)
    for _ in range(ROUNDS):
        posterior = smoothed(seen_through, _linear(draws, batch.time_mask), paths, batch, num_steps=1)
        paths, draws = (z.to(paths).clamp(-FARTHEST, FARTHEST) for z in (posterior.mean, posterior.rsample()))
        refit_read_outs(seen_through, draws, batch, num_steps=1)
    matrix, offset = canonical_frame(paths, bins)
    paths, draws = ((z.flatten(1, 2) @ matrix + offset.unsqueeze(1)).view(z.shape) for z in (paths, draws))
    for r, name in enumerate(batch.names):
        rows, read_out = model.read_out.neurons.slice(name), model.read_out
        read_out.weight[rows] = torch.linalg.solve(matrix[r], read_out.weight[rows].mT).mT
        read_out.bias[rows] -= read_out.weight[rows] @ offset[r]
    return LinearSystems(regressed(features, paths, bins, frames.smoothing), paths, draws)


def _linear(z: Tensor, exists: Tensor) -> Chain:
    """The linear systems that are likeliest given the paths."""
    z = z.double()  # rare states far out, and little that the dynamics leave
    both = (exists[:, :, 1:] & exists[:, :, :-1]).unsqueeze(-1).to(z.dtype)
    x, y = _with_one(z[:, :, :-1] * both, both).flatten(1, 2), (z[:, :, 1:] * both).flatten(1, 2)
    number = both.sum((1, 2)).clamp(min=1).unsqueeze(-1)  # (R, 1, 1)
    eye = torch.eye(z.shape[-1]).to(z)
    map_ = torch.linalg.solve(x.mT @ x + 1e-3 * torch.eye(x.shape[-1]).to(z), x.mT @ y)
    error = y - x @ map_
    noise = error.mT @ error / number + LEAST * eye
    first = z[:, :, 0] - z[:, :, 0].mean(1, keepdim=True)
    spread = first.mT @ first / first.shape[1] + 0.01 * eye  # of few trials

    def dynamics(states: Tensor) -> Tensor:
        return (states.flatten(1, 2).to(map_) @ map_[:, :-1] + map_[:, -1:]).view(states.shape)

    return Chain(dynamics, torch.linalg.inv(noise), z[:, :, 0].mean(1), torch.linalg.inv(spread))


def regressed(features: Tensor, paths: Tensor, bins: Tensor, smoothing: tuple[float, ...]) -> Frames:
    """Frames linear in the features, of which a guide makes its own."""
    seen = bins.unsqueeze(-1).to(paths.dtype)
    x = _with_one(smooth(features, seen, smoothing) * seen, seen).flatten(1, 2)
    gram = x.mT @ x
    ridge = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    map_ = torch.linalg.solve(
        gram + ridge * torch.eye(gram.shape[-1]).to(gram), x.mT @ (paths * seen).flatten(1, 2)
    )
    return Frames(map_[:, :-1], map_[:, -1], paths, smoothing).of(features, bins)


@torch.no_grad()
def frames_of_simulations(model, guide, e: Tensor, batch: Batch) -> Frames:
    """Latents linear in the features, of least squares over trials that the model itself draws.

    A few trials leave a regression on as many neurons undecided; simulated ones there are enough of.

    Args:
        model, guide: whose read-outs are fitted.
        e: embeddings ``(R, 1, embedding_dim)``.
        batch: of which recordings.
    """
    number = -(-SIMULATED // batch.num_trials)
    z = (
        simulated_trials.paths(model, e, batch, (number,)).movedim(0, 1).flatten(1, 2)
    )  # (R, K, T, latent_dim)
    y = simulated_trials.observations(model, z, batch)
    real = torch.arange(batch.width, device=z.device) < torch.tensor(batch.num_neurons).to(z.device)[:, None]
    seen = real[:, None, None].expand_as(y)
    bins = torch.ones_like(z[..., 0], dtype=torch.bool)
    drawn = dataclasses.replace(batch, observations=y * seen, mask=seen, time_mask=bins)
    return regressed(guide.read_in.features(drawn), z, bins, tuple(guide.smoothing[batch.recording].tolist()))


def _with_one(x: Tensor, one: Tensor) -> Tensor:
    return torch.cat([x, one], -1)
