"""Latent dynamics, and how the embedding of a recording changes them."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_metassm.capture import Captures, captures
from pyro_metassm.native import mlp as native


class LowRankHypernetwork(nn.Module):
    r"""Low-rank updates of weight matrices, ``h(e) = u(e) v(e)^T`` (eq. 12-13).

    A trunk shared by all matrices, a head ``u`` and a head ``v`` for each. ``u(e) = head(trunk(e)) - head(trunk(0))``,
    so that the update vanishes at ``e = 0``: the origin of the embedding is the shared dynamics.

    Args:
        embedding_dim: size of the embedding.
        shapes: ``(in, out)`` of each adapted matrix.
        rank: rank of the updates; 0 is no update at all.
        hidden_dim: width of the trunk.
    """

    def __init__(
        self, embedding_dim: int, shapes: Sequence[tuple[int, int]], rank: int, hidden_dim: int = 32
    ):
        super().__init__()
        self.shapes, self.rank = tuple(shapes), rank
        self.trunk = nn.Sequential(nn.Linear(embedding_dim, hidden_dim), nn.SiLU())
        self.u = nn.ModuleList(nn.Linear(hidden_dim, inp * rank, bias=False) for inp, _ in shapes if rank)
        self.v = nn.ModuleList(nn.Linear(hidden_dim, out * rank) for _, out in shapes if rank)

    def forward(self, e: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``e (..., embedding_dim)`` to ``[(u (..., in, rank), v (..., out, rank)), ...]``."""
        trunk = self.trunk(e)
        change = trunk - self.trunk(torch.zeros_like(e))
        return [
            (u(change).unflatten(-1, (inp, self.rank)), v(trunk).unflatten(-1, (out, self.rank)) * inp**-0.5)
            for (inp, out), u, v in zip(self.shapes, self.u, self.v, strict=False)
        ]


Update = tuple[Tensor, Tensor]
"""``u (..., R, 1, in, rank)`` and ``v (..., R, 1, out, rank)``: a matrix ``(in, out)`` gets ``+ u v^T``."""
Layer = nn.Linear | tuple[Tensor, Tensor]
"""Shared; or a weight and a bias, ``(out, in)`` and ``(out,)`` of all or ``(..., R, 1, *)`` of each recording."""


class Network(NamedTuple):
    """The parts of an MLP: what :class:`AdaptedMLP` needs of one."""

    layers: Sequence[Layer]
    activation: Callable[[Tensor], Tensor]
    residual: bool


class AdaptedMLP:
    """The dynamics of one draw of embeddings: ``z (..., K, latent_dim) -> next mean``, weights made once.

    Low-rank updates are applied in factored form, ``x W + (x u) v^T``; the adapted matrix is never built. On a CPU
    with a C compiler the same is done in C, which builds it in cache (:mod:`pyro_metassm.native.mlp`).

    Args:
        mlp: the shared MLP, a :class:`ResidualMLP` or a :class:`Network`.
        updates: low-rank ones of the first layers, as many as there are.
        shifts: what is added in full to the weights ``(..., R, 1, out, in)`` and biases ``(..., R, 1, out)`` of the
            first layers; None for nothing.
    """

    def __init__(
        self,
        mlp: ResidualMLP | Network,
        updates: Sequence[Update] = (),
        shifts: Sequence[tuple[Tensor | None, Tensor | None]] = (),
    ):
        self.mlp, self.updates, self.shifts = mlp, updates, shifts
        layers: list = list(mlp.layers)
        self.layers: list[Layer] = [*map(_shifted, layers, shifts), *layers[len(shifts) :]]

    def __call__(self, z: Tensor) -> Tensor:
        compiled = self._compiled(z, 1, None)
        return self._next(z) if compiled is None else compiled

    def rollout(self, z: Tensor, num_steps: int, clamp: float | None = None) -> Tensor:
        """The path that follows from states without noise.

        Args:
            z: ``(..., K, 1, latent_dim)``, one bin.
            num_steps: bins that follow, at least 1.
            clamp: limit of the absolute values of every state.

        Returns:
            ``(..., K, num_steps, latent_dim)``.

        Raises:
            ValueError: for states of several bins, or no steps.
        """
        if z.dim() < 2 or z.shape[-2] != 1 or num_steps < 1:
            raise ValueError(
                "a roll-out needs states (..., K, 1, latent_dim) and num_steps >= 1, got "
                f"{tuple(z.shape)} and {num_steps}"
            )
        compiled = self._compiled(z, num_steps, clamp)
        if compiled is not None:
            return compiled
        layers, activation = native.linear(self.layers), self.mlp.activation
        tensors = layers and _by_recording(z, layers, self.updates)
        if tensors and type(self) is AdaptedMLP and not isinstance(activation, nn.Module):
            call = captures(self.mlp) if isinstance(self.mlp, nn.Module) else Captures()
            form = {"num_layers": len(self.layers), "activation": activation, "residual": self.mlp.residual}
            return call(_path, *tensors, num_steps=num_steps, clamp=clamp, **form)
        path = []
        for _ in range(num_steps):
            z = self(z) if clamp is None else self(z).clamp(-clamp, clamp)
            path.append(z)
        return torch.cat(path, -2)

    def hidden(self, z: Tensor) -> Tensor:
        """The last hidden layer at states ``(..., K, latent_dim)``, ``(..., K, hidden_dim)``."""
        for number in range(len(self.layers) - 1):
            z = self.mlp.activation(self._layer(number, z))
        return z

    def _next(self, z: Tensor) -> Tensor:
        """The equations, in PyTorch."""
        x = self._layer(len(self.layers) - 1, self.hidden(z))
        return z + x if self.mlp.residual else x

    def _layer(self, number: int, x: Tensor) -> Tensor:
        layer = self.layers[number]
        out = layer(x) if isinstance(layer, nn.Module) else _affine(x, *layer)
        if number < len(self.updates):
            u, v = self.updates[number]
            out = out + _times(_times(x, u), v.mT)
        return out

    def _compiled(self, z: Tensor, num_steps: int, clamp: float | None) -> Tensor | None:
        """A roll-out in C, or None where there is none for these."""
        layers = native.linear(self.layers)
        if layers is None or type(self) is not AdaptedMLP:
            return None
        leads = {factor.shape[:-2] for update in self.updates for factor in update}
        leads |= {lead for weight, bias in layers for lead in (weight.shape[:-2], bias.shape[:-1]) if lead}
        batch = _recordings(z, leads)
        if batch is None:
            return None
        states = z.shape[-3:] if batch else z.shape
        path = native.rollout(
            _flat(z, batch, states).flatten(1, -2),
            [(_own(weight, batch, 2), _own(bias, batch, 1)) for weight, bias in layers],
            [(_flat(u, batch, u.shape[-2:]), _flat(v, batch, v.shape[-2:])) for u, v in self.updates],
            num_steps=num_steps,
            activation=self.mlp.activation,
            residual=self.mlp.residual,
            clamp=clamp,
        )
        if path is None:
            return None
        return (
            path.reshape(*batch, *states)
            if num_steps == 1
            else path.reshape(*batch, *states[:-2], num_steps, -1)
        )

    def with_last_layer(self, weight: Tensor, bias: Tensor) -> AdaptedMLP:
        """The same with this added to the last weights ``(..., R, 1, out, in)`` and biases ``(..., R, 1, out)``."""
        shifts = [*self.shifts, *[(None, None)] * (len(self.mlp.layers) - len(self.shifts))]
        old_weight, old_bias = shifts.pop()
        last = (
            weight if old_weight is None else old_weight + weight,
            bias if old_bias is None else old_bias + bias,
        )
        return AdaptedMLP(self.mlp, self.updates, [*shifts, last])

    def update_norm(self) -> Tensor:
        """Mean over the recordings of squared Frobenius norms of what is added, ``sum |u v^T|^2 + |shift|^2``."""
        norms = [((u.mT @ u) * (v.mT @ v)).sum((-1, -2)).mean() for u, v in self.updates]
        for weight, bias in self.shifts:
            norms += [] if weight is None else [(weight**2).sum((-1, -2)).mean()]
            norms += [] if bias is None else [(bias**2).sum(-1).mean()]
        return torch.stack(norms).sum() if norms else torch.zeros(())


def _by_recording(
    z: Tensor, layers: Sequence[tuple[Tensor, Tensor]], updates: Sequence[Update]
) -> list[Tensor] | None:
    """``z (R, K, 1, d)`` and the tensors of its dynamics as :func:`_path` takes them; None for other shapes."""
    sized = [(x, dims) for layer in layers for x, dims in zip(layer, (2, 1), strict=True)]
    sized += [(x, 2) for update in updates for x in update]
    if z.dim() != 4 or any(x.dim() > dims and x.shape[:-dims] != (len(z), 1) for x, dims in sized):
        return None
    return [z.squeeze(-2), *(x.squeeze(1) if x.dim() == 4 else x for x, _ in sized)]


def _path(
    z: Tensor,
    *tensors: Tensor,
    num_layers: int,
    num_steps: int,
    activation: Callable[[Tensor], Tensor],
    residual: bool,
    clamp: float | None,
) -> Tensor:
    """A roll-out of ``z (R, K, d)`` in few operations, ``(R, K, num_steps, d)``: each recording's matrices are built.

    The tensors are a weight ``([R,] out, in)`` and a bias ``(out,)`` or ``(R, 1, out)`` of every layer, then u and v of
    every update.
    """
    pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
    layers = [(weight.mT.expand(len(z), -1, -1), bias) for weight, bias in pairs[:num_layers]]
    for number, (u, v) in enumerate(pairs[num_layers:]):
        matrix, bias = layers[number]
        layers[number] = matrix + u @ v.mT, bias
    path = []
    for _ in range(num_steps):
        x = z
        for number, (matrix, bias) in enumerate(layers):
            out = torch.baddbmm(bias, x, matrix)
            x = activation(out) if number + 1 < num_layers else out
        z = z + x if residual else x
        z = z if clamp is None else z.clamp(-clamp, clamp)
        path.append(z)
    return torch.stack(path, -2)


def _shifted(layer: nn.Linear, shift: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, Tensor]:
    weight, bias = shift
    return (
        layer.weight if weight is None else layer.weight + weight,
        layer.bias if bias is None else layer.bias + bias,
    )


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x W^T + b``, of all or of each recording, as in :data:`Layer`."""
    return _times(x, weight.mT) + (bias if bias.dim() == 1 else bias.unsqueeze(-2))


def _recordings(z: Tensor, leads: set[torch.Size]) -> torch.Size | None:
    """Draws and recordings of weights, ``leads (..., R, 1)``, and of states ``(..., R, K, T, d)``, as they broadcast.

    Nothing, ``()``, where all states belong to one recording; None where this is not how the shapes are.
    """
    leads = set(leads)
    lead = leads.pop() if leads else torch.Size()
    if leads or z.dim() < 2:
        return None
    if lead.numel() == 1 and len(lead) <= z.dim() - 2:
        return torch.Size()
    if z.dim() == 2 or not lead or lead[-1] != 1:
        return None
    if z.shape[:-3] == lead[:-1]:
        return lead[:-1]
    with contextlib.suppress(RuntimeError):  # shapes that do not fit: PyTorch will say so
        return torch.broadcast_shapes(z.shape[:-3], lead[:-1])
    return None


def _flat(x: Tensor, batch: torch.Size, own: torch.Size) -> Tensor:
    """``(..., [1,] *own)`` to ``(draws and recordings, *own)``."""
    if x.numel() != batch.numel() * own.numel():
        lead = x.shape[: x.dim() - len(own)]
        x = x.reshape(*(lead if len(own) > 2 else lead[:-1]), *own).expand(*batch, *own)
    return x.reshape(batch.numel(), *own)


def _own(x: Tensor, batch: torch.Size, own: int) -> Tensor:
    """A weight or bias, its own dims the last ``own``: as it is where it is shared, else as :func:`_flat`."""
    return x if x.dim() == own else _flat(x, batch, x.shape[-own:])


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """``x (..., R, K, T, in) @ weight (..., R, 1, in, out)``: one product a recording, trials and bins together."""
    if weight.dim() == x.dim() >= 3 and weight.shape[-3] == 1:
        trials, bins = x.shape[-3:-1]
        return torch.matmul(x.flatten(-3, -2), weight.squeeze(-3)).unflatten(-2, (trials, bins))
    return torch.matmul(x, weight)


def residual_layers(latent_dim: int, hidden_dim: int) -> list[nn.Linear]:
    """Two hidden layers and an output of the size of the state, which starts small: the identity plus a small step."""
    widths = (latent_dim, hidden_dim, hidden_dim, latent_dim)
    layers = [nn.Linear(inp, out) for inp, out in zip(widths, widths[1:], strict=False)]
    with torch.no_grad():
        layers[-1].weight.mul_(0.3)
        layers[-1].bias.zero_()
    return layers


class ResidualMLP(nn.Module, ABC):
    r"""Dynamics ``f(z) = z + W_o s( W_h s( W_i z + b_i ) + b_h ) + b_o``; a subclass adapts them to the embedding.

    Args:
        latent_dim: number of latents.
        embedding_dim: size of the embedding.
        rank: of the subclass's updates, where they have one.
        hidden_dim: width of both hidden layers.
        residual: add ``z`` to the output.
        activation: between layers.
    """

    def __init__(
        self,
        latent_dim: int,
        embedding_dim: int,
        *,
        rank: int = 1,
        hidden_dim: int = 64,
        residual: bool = True,
        activation: Callable[[Tensor], Tensor] = functional.silu,
    ):
        super().__init__()
        layers = residual_layers(latent_dim, hidden_dim)
        self.layers = nn.ModuleList(layers)
        self.shapes = [(layer.in_features, layer.out_features) for layer in layers]
        self.residual, self.activation = residual, activation

    @abstractmethod
    def forward(self, e: Tensor) -> AdaptedMLP:
        """``e (..., embedding_dim)``, batch shape ``(..., R, 1)`` in the model, to these recordings' dynamics."""


class LowRankMLP(ResidualMLP):
    r"""Residual dynamics with two hidden layers and a low-rank update by the embedding (eq. 12-13).

    ``f_e(z) = z + W_o s( [W_h + u_2 v_2^T] s( [W_i + u_1 v_1^T] z ) )``; biases are shared and not adapted.

    Args:
        latent_dim: number of latents.
        embedding_dim: size of the embedding.
        rank: rank of the updates of the input and the hidden matrix; 0 gives shared dynamics.
        options: the other arguments of :class:`ResidualMLP`.
    """

    def __init__(self, latent_dim: int, embedding_dim: int, *, rank: int = 1, **options):
        super().__init__(latent_dim, embedding_dim, **options)
        self.hypernetwork = LowRankHypernetwork(embedding_dim, self.shapes[:2], rank)

    def forward(self, e: Tensor) -> AdaptedMLP:
        return AdaptedMLP(self, self.hypernetwork(e))
