"""Guesses of a new recording's frame: from what the fitted model itself draws, and from the size of known read-outs."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_metassm import _machine as machine
from pyro_metassm.frames import canonical_frame, roots
from pyro_metassm.read_outs import ReadOutPrior, common_shift, second_moments
from pyro_metassm.windows import roll_out

JITTER = 0.15  # sd of the embeddings of the starts around those of known recordings, in their spread
SIMULATED = 16  # trials, at most, whose canonical frame is a start


@torch.no_grad()
def simulated_starts(
    model, w: Tensor, bins: Tensor, embeddings: Tensor, number: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Frames and offsets ``(S, R, ...)`` from canonical frames of simulated trials, seen where the data are."""
    most = bins.sum(-1).topk(min(SIMULATED, bins.shape[1]), -1).indices  # the trials with most data
    bins = bins.take_along_dim(most.unsqueeze(-1), 1)
    trials, time = bins.shape[1:]
    device, dtype, dim = w.device, w.dtype, w.shape[-1]
    spread = embeddings.std(0, correction=0)
    picked = torch.randint(len(embeddings), (number,), generator=rng)
    noise = torch.randn(number, embeddings.shape[-1], generator=rng, dtype=dtype).to(device)
    e = (embeddings[picked.to(device)] + JITTER * spread * noise).unsqueeze(-2)  # (S, 1, embedding_dim)
    seed = int(torch.randint(2**31, (), generator=rng))
    with machine.random_forked(device):
        torch.manual_seed(seed)
        z = model.initial_state(e).expand((number, trials)).sample().unsqueeze(-2)
    path = z if time == 1 else torch.cat([z, roll_out(model.adapt_dynamics(e), z, time - 1)], -2)
    path = path + 0.01 * torch.randn(path.shape, generator=rng, dtype=dtype).to(device)
    same = bool((bins == bins[:1]).all())
    pairs = [
        canonical_frame(path, seen.expand(number, trials, time)) for seen in (bins[:1] if same else bins)
    ]
    pairs = pairs * (len(bins) if same else 1)
    frame, offset = (torch.stack(parts, 1) for parts in zip(*pairs, strict=True))
    # A frame's signs are decided by its flow; with little of it they may come out wrong.
    flip = torch.where(torch.rand(number, 1, 1, dim, generator=rng) < 0.5, -1.0, 1.0).to(w)
    flip[: number // 2] = 1.0
    return frame * flip, offset * flip.squeeze(-2)


@torch.no_grad()
def starts_by_read_outs(
    rows: list[Tensor], prior: ReadOutPrior, number: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Frames and offsets ``(S, R, ...)`` in which the read-outs are as large as the known ones, turned at random.

    ``F = C Q B^-1/2`` with ``C C^T`` the covariance of the known read-outs, ``B`` the second moment of the new ones and
    ``Q`` orthogonal; the offset such that their common shift is that of a known one. It holds however small a part of
    the latent space the trials have visited, where canonical coordinates of simulations say little.
    """
    moments = second_moments(rows)
    dim = moments.shape[-1] - 1
    _, white = roots(moments[..., :-1, :-1])

    def random(*shape: int) -> Tensor:
        return torch.randn(number, len(rows), *shape, generator=rng).to(moments)

    # LAPACK's Q is a product of dim - 1 reflections: without signs of its own its determinant is the same always.
    turn = torch.linalg.qr(random(dim, dim))[0] * random(1, dim).sign() * (1 + JITTER * random(1, 1))
    frame = torch.linalg.cholesky(prior.covariance[:-1, :-1]) @ turn @ white
    shift = prior.shift_mean + random(dim) @ torch.linalg.cholesky(prior.shift_covariance).mT
    return frame, (shift.unsqueeze(-2) @ frame).squeeze(-2) - common_shift(moments)
