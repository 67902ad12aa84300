"""A guide that starts near the posterior of a started model: it learns to tell paths that were drawn from it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_metassm.optimizers import adam, one_cycle
from pyro_metassm.recordings import Batch

STEPS = 400
TRIALS = 8  # of each recording and step
BINS = (20, 100)  # shortest and longest stretch of trials
RATE = 3e-3


def teach(
    model, guide, draws: Tensor, e: Tensor, batch: Batch, rng: torch.Generator, *, num_steps: int = STEPS
) -> None:
    r"""Maximise ``E log q(z_{a:b} | y_{a:b}, e)`` over stretches of trials, in place; read-ins and embeddings stay.

    With ``z`` from ``p(z | y)`` of whole trials the best ``q`` is ``p(z_{a:b} | y_{a:b})``, whatever the stretch: what
    a guide must know of the ends of trials and of contexts of forecasts, of which whole trials show it little.

    Args:
        model, guide: started.
        draws: paths ``(R, K, T, latent_dim)`` drawn from their posterior given the batch.
        e: embeddings ``(R, 1, embedding_dim)``.
        batch: the data.
        rng: of the stretches.
        num_steps: of Adam.
    """
    fixed = {
        id(p)
        for part in (guide.read_in, guide.encode_embedding, guide.global_sites)
        for p in part.parameters()
    }
    parameters = [p for p in guide.parameters() if p.requires_grad and id(p) not in fixed]
    if not parameters:
        return
    optimizer = adam(parameters, lr=RATE)
    schedule = one_cycle(optimizer, num_steps)
    training = guide.training
    guide.eval()  # without roll-outs
    shortest, longest = (min(n, batch.num_bins) for n in BINS)
    for step in range(num_steps):
        length = _random(shortest, longest, rng)
        start = 0 if step % 2 else _random(0, batch.num_bins - length, rng)
        first = _random(0, max(0, batch.num_trials - TRIALS), rng)
        part = batch.part(trials=slice(first, first + TRIALS), bins=slice(start, start + length))
        z = draws[:, first : first + TRIALS, start : start + length]
        prior = model.path_prior(e, part)
        with torch.no_grad():
            spaces = guide.common_space(part)
        log_prob = guide.latents_posterior(*spaces, e, prior, part).log_prob(z)
        loss = -log_prob.sum() / part.time_mask.sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    guide.train(training)


def _random(low: int, high: int, rng: torch.Generator) -> int:
    return int(torch.randint(low, high + 1, (), generator=rng))
