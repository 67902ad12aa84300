"""A family of dynamics whose last layer is latent: what :func:`pyro_metassm.revise` makes of a fit."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.nn import PyroSample
from torch import Tensor

from pyro_metassm.dynamics import AdaptedMLP
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.recordings import Recordings


class Revised(MetaSSM):
    r"""Dynamics ``f_e(z) = g_e(z) + W(e) [h_e(z); 1]``: ``g`` as it is, with last hidden layer ``h``, and ``W`` latent.

    ``W`` is a Gaussian process over embeddings, of finitely many functions::

        u_j   ~ Normal(0, 1)                                       site "last_layer"   (direction,)
        W(e)  = V sum_m psi_m(e) sum_j u_j D_jm,     psi(e) = k(e, c) P,   k(e, c) = exp( -|e - c|^2 / (2 reach^2) )

    ``D``, ``V``, ``P``, the places ``c`` and ``reach`` are given, so that both the prior and the posterior of ``u`` are
    independent Normals. Far from all places ``W`` vanishes. Without directions it is ``g`` alone.

    Args:
        recordings: as of :class:`MetaSSM`.
        family: the class of model that ``g`` is of; its ``dynamics_class`` is a
            :class:`~pyro_metassm.dynamics.ResidualMLP`.
        num_places, num_functions, num_features: sizes of ``c``, of ``psi``, and columns of ``V``. There are
            ``num_functions num_features latent_dim`` directions.
        options: the other arguments of :class:`MetaSSM`.
    """

    def __init__(
        self,
        recordings: Recordings | NeuronTable,
        *,
        family: type[MetaSSM] = MetaSSM,
        num_places: int = 0,
        num_functions: int = 0,
        num_features: int = 0,
        rank: int = 1,
        hidden_dim: int = 64,
        **options,
    ):
        super().__init__(recordings, rank=rank, hidden_dim=hidden_dim, **options)
        self.config |= {
            "family": family,
            "num_places": num_places,
            "num_functions": num_functions,
            "num_features": num_features,
        }
        if family.dynamics_class is not self.dynamics_class:
            self.dynamics = family.dynamics_class(
                self.latent_dim, self.embedding_dim, rank=rank, hidden_dim=hidden_dim
            )
        self.num_directions = num_functions * num_features * self.latent_dim
        if not self.num_directions:
            return
        each = (num_functions, num_features, self.latent_dim)
        self.places: Tensor
        self.reach: Tensor
        self.functions: Tensor
        self.features: Tensor
        self.directions: Tensor
        self.register_buffer("places", torch.zeros(num_places, self.embedding_dim))
        self.register_buffer("reach", torch.ones(()))
        self.register_buffer("functions", torch.zeros(num_places, num_functions))
        self.register_buffer("features", torch.zeros(hidden_dim + 1, num_features))
        self.register_buffer("directions", torch.zeros(self.num_directions, *each))
        self.last_layer = PyroSample(dist.Normal(0.0, 1.0).expand([self.num_directions]).to_event(1))
        self.dims["last_layer"] = ("direction",)

    def adapt_dynamics(self, e: Tensor) -> AdaptedMLP:
        dynamics = super().adapt_dynamics(e)
        if not self.num_directions:
            return dynamics
        return with_last_layer(dynamics, self.change(e, self.last_layer))

    def change(self, e: Tensor, u: Tensor) -> Tensor:
        """``W(e) (..., R, 1, hidden_dim + 1, latent_dim)`` at ``e (..., R, 1, embedding_dim)``."""
        parts = torch.tensordot(u, self.directions, 1)  # (..., function, feature, latent_dim)
        return self.features @ torch.einsum("...m,...mfd->...fd", self.functions_at(e), parts)

    def functions_at(self, e: Tensor) -> Tensor:
        """``psi(e) (..., num_functions)``."""
        return kernel(e, self.places, self.reach) @ self.functions


def kernel(e: Tensor, places: Tensor, reach: Tensor | float) -> Tensor:
    """``exp( -|e - c|^2 / (2 reach^2) )`` of ``e (..., d)`` and ``c (M, d)``, ``(..., M)``."""
    square = (e.unsqueeze(-2) - places).square().sum(-1)
    return (-0.5 * square / reach**2).exp()


def with_last_layer(dynamics: AdaptedMLP, change: Tensor) -> AdaptedMLP:
    """Dynamics with ``change (..., R, 1, hidden_dim + 1, latent_dim)`` added to the last weights and biases."""
    change = change.mT
    return dynamics.with_last_layer(change[..., :-1], change[..., -1])
