"""Baseline ``loop``: the method in plain PyTorch as one writes it first, looping over recordings and over time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from _cases import Case
from _networks import Networks
from torch import Tensor, nn

# For e (embedding_dim,) and z (K, T, latent_dim); roll-outs (K, T) bool.
Noise = tuple[Tensor, Tensor, Tensor]


class Loop:
    """The state of a fit, and a step of it."""

    def __init__(self, case: Case, arrays: dict[str, np.ndarray], device: torch.device | str = "cpu"):
        self.case = case
        self.data = [torch.from_numpy(y).to(device) for y in arrays.values()]
        self.networks = Networks(case).to(device)
        self.optimizer = torch.optim.Adam(self.networks.parameters(), lr=1e-3, betas=(0.9, 0.99))
        self.scale = sum(y.numel() for y in self.data)

    def take_step(self) -> float:
        """One step of SVI on a random batch; returns the loss."""
        batch = [y[torch.randperm(len(y), device=y.device)[: self.case.trials_per_step]] for y in self.data]
        loss = -self.elbo(batch, [self.draw(y) for y in batch]) / self.scale
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    def draw(self, y: Tensor) -> Noise:
        """The randomness of one recording's term."""
        e = torch.randn(self.case.embedding_dim, dtype=y.dtype, device=y.device)
        z = torch.randn(*y.shape[:2], self.case.latent_dim, dtype=y.dtype, device=y.device)
        rollout = torch.rand(y.shape[:2], device=y.device) < self.case.rollout_probability
        return e, z, rollout

    def elbo(self, batch: Sequence[Tensor], noise: Sequence[Noise]) -> Tensor:
        """The full-data ELBO estimated from some trials of every recording."""
        terms = []
        for row, (y, draws) in enumerate(zip(batch, noise, strict=True)):
            by_trial, kl_embedding = self.recording_terms(row, y, *draws)
            terms.append(by_trial * len(self.data[row]) / len(y) - kl_embedding)
        return torch.stack(terms).sum()

    def recording_terms(
        self, row: int, y: Tensor, noise_e: Tensor, noise_z: Tensor, rollout: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log likelihood minus KL of the states, summed over trials, and the KL of the embedding."""
        net = self.networks
        ybar = net.read_in[row](y)
        e_loc, e_scale = net.embedding(ybar)
        e = e_loc + e_scale * noise_e
        dynamics, noise_sd = net.dynamics.at(e), net.log_noise.exp()
        loc, scale = net.states(ybar, e)

        encoded, shocks = (loc + scale * noise_z).unbind(1), (noise_sd * noise_z).unbind(1)
        rolled = rollout.unsqueeze(-1).unbind(1)
        z, means = [encoded[0]], []
        for t in range(1, y.shape[1]):
            mean = dynamics(z[-1])
            z.append(torch.where(rolled[t], mean + shocks[t], encoded[t]))
            means.append(mean)

        predicted = net.read_out[row](torch.stack(z, 1))
        log_likelihood = log_normal(y, predicted, net.log_sd[row])
        first = kl_normal(loc[:, 0], scale[:, 0], net.initial_loc, net.initial_log_scale.exp())
        rest = kl_normal(loc[:, 1:], scale[:, 1:], torch.stack(means, 1), noise_sd)
        # A rolled-out bin follows the prior itself.
        kl = first.sum() + rest.sum(-1).masked_fill(rollout[:, 1:], 0.0).sum()
        return log_likelihood - kl, kl_normal(e_loc, e_scale, torch.zeros_like(e), torch.ones_like(e)).sum()


def log_normal(y: Tensor, loc: Tensor, log_sd: Tensor) -> Tensor:
    """Log density of all numbers together; ``log_sd`` of the last dimension."""
    rows = y.numel() // log_sd.numel()
    squares = ((y - loc) * torch.exp(-log_sd)).square().sum()
    return -0.5 * squares - rows * log_sd.sum() - 0.5 * math.log(2 * math.pi) * y.numel()


def kl_normal(loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
    """KL divergence of one Normal from another, number by number."""
    ratio = (scale / prior_scale).square()
    return 0.5 * (ratio + ((loc - prior_loc) / prior_scale).square() - 1 - ratio.log())
