"""Other ways for an embedding to act on the dynamics: those that the low-rank hypernetwork is compared with.

Each has the layers of :class:`~pyro_metassm.dynamics.LowRankMLP`, takes its arguments, and starts about as near to its
dynamics at ``e = 0``, the shared ones. Weights are made once for each embedding, and rolled out as that one's are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_metassm.dynamics import AdaptedMLP, LowRankMLP, Network, ResidualMLP, residual_layers

SMALL = 0.1  # what an embedding of unit size adds to a weight at first, over what nn.Linear starts it with


def _uniform(*shape: int, bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class SharedMLP(ResidualMLP):
    """The same dynamics for every embedding. ``rank`` has no effect."""

    def forward(self, e: Tensor) -> AdaptedMLP:
        return AdaptedMLP(self)


class EmbeddingInputMLP(ResidualMLP):
    r"""The embedding is an input beside the state, ``f_e(z) = z + g([z; e])``.

    The first layer is ``W_i z + W_e e + b_i``, so of all weights ``e`` shifts one bias. ``rank`` has no effect. As in
    CAVIA by concatenation (Zintgraf et al., ICML 2019) and DYNAMO (Cotler et al., 2023).
    """

    def __init__(self, latent_dim: int, embedding_dim: int, **options):
        super().__init__(latent_dim, embedding_dim, **options)
        self.weight = _uniform(embedding_dim, self.shapes[0][1], bound=(latent_dim + embedding_dim) ** -0.5)

    def forward(self, e: Tensor) -> AdaptedMLP:
        return AdaptedMLP(self, shifts=[(None, e @ self.weight)])


class LinearAdapterMLP(ResidualMLP):
    r"""All weights and biases are shifted by a linear function of the embedding, ``theta_i = theta + L e_i``.

    ``rank`` has no effect. The hypernetwork of CoDA (Kirchmeyer et al., ICML 2022).
    """

    def __init__(self, latent_dim: int, embedding_dim: int, **options):
        super().__init__(latent_dim, embedding_dim, **options)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inp, out in self.shapes:
            self.weights.append(_uniform(embedding_dim, out, inp, bound=SMALL * inp**-0.5))
            self.biases.append(_uniform(embedding_dim, out, bound=SMALL * inp**-0.5))

    def forward(self, e: Tensor) -> AdaptedMLP:
        both = zip(self.weights, self.biases, strict=True)
        return AdaptedMLP(self, shifts=[(torch.tensordot(e, weight, 1), e @ bias) for weight, bias in both])


class GEPSMLP(ResidualMLP):
    r"""Factors that all recordings share, scaled by the embedding: ``W + A diag(c) B^T``, ``b + D c``, in every layer.

    The context ``c`` is ``e`` with each entry ``rank`` times: ``A (in, embedding_dim rank)``, ``B (out, embedding_dim
    rank)``. Rank 1 is GEPS as published (Kassai Koupai et al., NeurIPS 2024), where the rank is the context's size, but
    for its activations: theirs read the context, too. Rank 0 is shared dynamics.
    """

    def __init__(self, latent_dim: int, embedding_dim: int, *, rank: int = 1, **options):
        super().__init__(latent_dim, embedding_dim, **options)
        self.rank, size = rank, embedding_dim * rank
        self.a, self.b, self.biases = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for inp, out in self.shapes if rank else ():
            self.a.append(_uniform(inp, size, bound=inp**-0.5))
            self.b.append(_uniform(out, size, bound=SMALL))
            self.biases.append(_uniform(embedding_dim, out, bound=SMALL * inp**-0.5))

    def forward(self, e: Tensor) -> AdaptedMLP:
        context, lead = e.repeat_interleave(self.rank, -1).unsqueeze(-2), e.shape[:-1]
        factors = zip(self.a, self.b, strict=True)
        updates = [(a * context, b.expand(*lead, *b.shape)) for a, b in factors]
        return AdaptedMLP(self, updates, [(None, e @ bias) for bias in self.biases])


class FullRankMLP(ResidualMLP):
    r"""A hypernetwork gives whole updates of the input and the hidden matrix, ``W + H(e)`` with ``H(0) = 0``.

    The trunk is that of :class:`~pyro_metassm.dynamics.LowRankHypernetwork`; a head gives ``in out`` numbers in place
    of ``rank (in + out)``. ``rank`` has no effect.
    """

    def __init__(self, latent_dim: int, embedding_dim: int, **options):
        super().__init__(latent_dim, embedding_dim, **options)
        width = 32
        self.trunk = nn.Sequential(nn.Linear(embedding_dim, width), nn.SiLU())
        self.heads = nn.ParameterList(
            _uniform(width, out, inp, bound=SMALL * inp**-0.5) for inp, out in self.shapes[:2]
        )

    def forward(self, e: Tensor) -> AdaptedMLP:
        change = self.trunk(e) - self.trunk(torch.zeros_like(e))
        return AdaptedMLP(self, shifts=[(torch.tensordot(change, head, 1), None) for head in self.heads])


class SessionMLP(nn.Module):
    """Weights of its own for every recording; nothing is shared, and no embedding acts.

    Args:
        num_recordings: rows of the tables of weights.
        latent_dim: number of latents.
        hidden_dim: width of both hidden layers.
    """

    def __init__(self, num_recordings: int, latent_dim: int, *, hidden_dim: int = 64):
        super().__init__()
        layers = zip(*(residual_layers(latent_dim, hidden_dim) for _ in range(num_recordings)), strict=True)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for of_recordings in layers:
            self.weights.append(nn.Parameter(torch.stack([layer.weight.detach() for layer in of_recordings])))
            self.biases.append(nn.Parameter(torch.stack([layer.bias.detach() for layer in of_recordings])))

    def forward(self, recording: Tensor) -> AdaptedMLP:
        """Rows ``recording (R,)`` to the dynamics of these recordings."""
        tables = zip(self.weights, self.biases, strict=True)
        rows = [tuple(t.index_select(0, recording).unsqueeze(1) for t in pair) for pair in tables]
        return AdaptedMLP(Network(rows, functional.silu, residual=True))


class DeviatingMLP(LowRankMLP):
    r"""A family's dynamics, to whose last layer every recording adds something of its own::

        f_i(z) = z + (W_o + delta_i) phi(z, e_i) + b_o + d_i

    The features ``phi`` are those of the family at the recording's embedding; how they add up differs. Deviations of
    all layers, at the same cost, take all that the embedding could say: its posterior becomes the prior.

    Args:
        num_recordings: rows of the tables of ``delta`` and ``d``, which start at zero.
        latent_dim, embedding_dim: sizes.
        options: as of :class:`~pyro_metassm.dynamics.LowRankMLP`.
    """

    def __init__(self, num_recordings: int, latent_dim: int, embedding_dim: int, **options):
        super().__init__(latent_dim, embedding_dim, **options)
        inp, out = self.shapes[-1]
        self.weight = nn.Parameter(torch.zeros(num_recordings, out, inp))
        self.bias = nn.Parameter(torch.zeros(num_recordings, out))

    def forward(self, e: Tensor, recording: Tensor | None = None) -> AdaptedMLP:
        """The dynamics at ``e (..., R, 1, embedding_dim)``: of these recordings ``(R,)``, or of the family."""
        of_family = super().forward(e)
        if recording is None:
            return of_family
        weight, bias = (
            t[recording].unsqueeze(1).expand(*e.shape[:-1], *t.shape[1:]) for t in (self.weight, self.bias)
        )
        return of_family.with_last_layer(weight, bias)
