"""The networks of both baselines: plain modules, a read-in and a read-out for every recording.

They compute what the library's ``MetaSSM`` and ``DKF`` compute of complete data, one recording at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _cases import Case
from torch import Tensor, nn
from torch.nn import functional

SET_DIM, TRUNK_DIM = 64, 32  # the library's defaults


class Dynamics(nn.Module):
    """Residual dynamics with two hidden layers and low-rank updates by the embedding (eq. 12-13)."""

    def __init__(self, case: Case):
        super().__init__()
        latent, hidden, self.rank = case.latent_dim, case.hidden_dim, case.rank
        self.layer_in, self.layer_hidden = nn.Linear(latent, hidden), nn.Linear(hidden, hidden)
        self.layer_out = nn.Linear(hidden, latent)
        with torch.no_grad():
            self.layer_out.weight.mul_(0.3)
            self.layer_out.bias.zero_()
        self.trunk = nn.Sequential(nn.Linear(case.embedding_dim, TRUNK_DIM), nn.SiLU())
        adapted = (self.layer_in, self.layer_hidden)
        self.u = nn.ModuleList(nn.Linear(TRUNK_DIM, w.in_features * case.rank, bias=False) for w in adapted)
        self.v = nn.ModuleList(nn.Linear(TRUNK_DIM, w.out_features * case.rank) for w in adapted)

    def at(self, e: Tensor) -> Callable[[Tensor], Tensor]:
        """``e (embedding_dim,)`` to the dynamics there, ``(..., latent_dim) -> (..., latent_dim)``.

        The adapted matrices are built once: at every bin, one product is cheaper than three.
        """
        trunk = self.trunk(e)
        change = trunk - self.trunk(torch.zeros_like(e))
        weights = []
        for layer, u, v in zip((self.layer_in, self.layer_hidden), self.u, self.v, strict=True):
            left = v(trunk).view(-1, self.rank) * layer.in_features**-0.5
            weights.append(layer.weight + left @ u(change).view(-1, self.rank).mT)
        weight_in, weight_hidden = weights

        def step(z: Tensor) -> Tensor:
            x = functional.silu(functional.linear(z, weight_in, self.layer_in.bias))
            x = functional.silu(functional.linear(x, weight_hidden, self.layer_hidden.bias))
            return z + self.layer_out(x)

        return step


class Networks(nn.Module):
    """Everything that is learned."""

    def __init__(self, case: Case):
        super().__init__()
        latent, embedding = case.latent_dim, case.embedding_dim
        self.latent_dim = latent
        self.read_in = nn.ModuleList(nn.Linear(n, case.read_in_dim) for n in case.num_neurons)
        self.read_out = nn.ModuleList(nn.Linear(latent, n) for n in case.num_neurons)
        self.log_sd = nn.ParameterList(torch.zeros(n) for n in case.num_neurons)
        self.common = nn.Sequential(
            nn.Linear(case.read_in_dim, case.common_dim), nn.LayerNorm(case.common_dim), nn.SiLU()
        )
        self.set_net = nn.Sequential(
            nn.Linear(2 * latent, SET_DIM), nn.SiLU(), nn.Linear(SET_DIM, SET_DIM), nn.SiLU()
        )
        self.set_head = nn.Linear(SET_DIM, 2 * embedding)
        inputs = case.common_dim + latent + embedding
        self.rnn = nn.GRU(inputs, case.recurrent_dim, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * case.recurrent_dim, 2 * latent)
        self.dynamics = Dynamics(case)
        self.initial_loc = nn.Parameter(torch.zeros(latent))
        self.initial_log_scale = nn.Parameter(torch.zeros(latent))
        self.log_noise = nn.Parameter(torch.full((latent,), 0.1).log())
        self.step_scale: Tensor
        self.register_buffer("step_scale", torch.full((latent,), 0.1))

    def embedding(self, ybar: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale of q(e) from the trials of a recording, ``ybar (K, T, read_in_dim)`` (eq. 15)."""
        z = ybar[..., : self.latent_dim]
        step = (z[:, 1:] - z[:, :-1]) / self.step_scale
        summary = self.set_net(torch.cat([z[:, :-1], step], -1)).mean(1)
        loc, log_variance = self.set_head(summary).chunk(2, -1)
        return loc.mean(0), log_variance.clamp(-12.0, 4.0).exp().mean(0).sqrt()

    def states(self, ybar: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Means and scales of q(z), ``(K, T, latent_dim)`` (eq. 16-17); ``e`` is not learned from here."""
        z = ybar[..., : self.latent_dim]
        inputs = torch.cat([self.common(ybar), z, e.detach().expand(*z.shape[:2], -1)], -1)
        change, log_scale = self.head(self.rnn(inputs)[0]).chunk(2, -1)
        return z + change, log_scale.clamp(-7.0, 3.0).exp()
