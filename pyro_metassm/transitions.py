"""Other forms of dynamics than an MLP, adapted by the embedding as that is: for ``dynamics_class`` of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_metassm.dynamics import AdaptedMLP, LowRankHypernetwork, Network, residual_layers


class LowRankLinear(nn.Module):
    r"""Linear dynamics with a low-rank update by the embedding, ``f_e(z) = z + (W + v(e) u(e)^T) z + b``.

    Args:
        latent_dim: number of latents.
        embedding_dim: size of the embedding.
        rank: rank of the update; 0 gives shared dynamics.
        hidden_dim: has no effect.

    Example:
        >>> import pyro_metassm as pm
        >>> class Linear(pm.models.MetaSSM):
        ...     dynamics_class = pm.transitions.LowRankLinear
    """

    def __init__(self, latent_dim: int, embedding_dim: int, *, rank: int = 1, hidden_dim: int = 64):
        super().__init__()
        self.layer = nn.Linear(latent_dim, latent_dim)
        self.hypernetwork = LowRankHypernetwork(embedding_dim, [(latent_dim, latent_dim)], rank)
        with torch.no_grad():  # near the identity
            self.layer.weight.mul_(0.1)
            self.layer.bias.zero_()

    def forward(self, e: Tensor) -> AdaptedMLP:
        return AdaptedMLP(Network([self.layer], functional.silu, residual=True), self.hypernetwork(e))


class LowRankGated(nn.Module):
    r"""A gate for every latent says how far it moves to a candidate, ``f_e(z) = (1 - g) z + g h``.

    ``h = z + W_o s( W_h s( W_i z ) )`` and ``g = sigmoid( G_o s( G_i z ) )``; the hypernetwork updates ``W_i``, ``W_h``
    and ``G_i``. A latent whose gate is shut remembers. The gated transition of Krishnan, Shalit and Sontag (AAAI 2017),
    with a candidate that starts near the state.

    Args:
        latent_dim: number of latents.
        embedding_dim: size of the embedding.
        rank: rank of the updates; 0 gives shared dynamics.
        hidden_dim: width of the hidden layers.
    """

    def __init__(self, latent_dim: int, embedding_dim: int, *, rank: int = 1, hidden_dim: int = 64):
        super().__init__()
        self.candidate = nn.ModuleList(residual_layers(latent_dim, hidden_dim))
        self.gate = nn.ModuleList([nn.Linear(latent_dim, hidden_dim), nn.Linear(hidden_dim, latent_dim)])
        shapes = [(latent_dim, hidden_dim), (hidden_dim, hidden_dim), (latent_dim, hidden_dim)]
        self.hypernetwork = LowRankHypernetwork(embedding_dim, shapes, rank)

    def forward(self, e: Tensor) -> Gated:
        updates = self.hypernetwork(e)
        candidate = AdaptedMLP(Network(self.candidate, functional.silu, residual=True), updates[:2])  # type: ignore[arg-type]
        gate = AdaptedMLP(Network(self.gate, functional.silu, residual=False), updates[2:])  # type: ignore[arg-type]
        return Gated(candidate, gate)


class Gated:
    """The dynamics of one draw of embeddings, weights made once, as :class:`LowRankGated` has them."""

    def __init__(self, candidate: AdaptedMLP, gate: AdaptedMLP):
        self.candidate, self.gate = candidate, gate

    def __call__(self, z: Tensor) -> Tensor:
        return torch.lerp(z, self.candidate(z), self.gate(z).sigmoid())

    def update_norm(self) -> Tensor:
        """As :meth:`~pyro_metassm.dynamics.AdaptedMLP.update_norm`, of both networks."""
        return self.candidate.update_norm() + self.gate.update_norm()
