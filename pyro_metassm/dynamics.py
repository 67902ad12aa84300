"""Latent dynamics, and how the embedding of a recording changes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

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


class AdaptedMLP:
    """The dynamics of one draw of embeddings: ``z (..., K, latent_dim) -> next mean``, weights made once.

    Low-rank updates are applied in factored form, ``x W + (x u) v^T``; the adapted matrix is never built. On a CPU
    with a C compiler the same is done in C, which builds it in cache (:mod:`pyro_metassm.native.mlp`).
    """

    def __init__(self, mlp: LowRankMLP, updates: Sequence[tuple[Tensor, Tensor]]):
        self.mlp, self.updates = mlp, updates

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
        path = []
        for _ in range(num_steps):
            z = self(z) if clamp is None else self(z).clamp(-clamp, clamp)
            path.append(z)
        return torch.cat(path, -2)

    def _next(self, z: Tensor) -> Tensor:
        """The equations, in PyTorch."""
        x = z
        for number, layer in enumerate(self.mlp.layers):
            out = layer(x)
            if number < len(self.updates):
                u, v = self.updates[number]
                out = out + _times(_times(x, u), v.mT)
            x = self.mlp.activation(out) if number + 1 < len(self.mlp.layers) else out
        return z + x if self.mlp.residual else x

    def _compiled(self, z: Tensor, num_steps: int, clamp: float | None) -> Tensor | None:
        """A roll-out in C, or None where there is none for these."""
        layers = native.linear(self.mlp.layers)
        batch = _recordings(z, self.updates)
        if layers is None or batch is None or type(self) is not AdaptedMLP:
            return None
        states = z.shape[-3:] if batch else z.shape
        path = native.rollout(
            _flat(z, batch, states).flatten(1, -2),
            layers,
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

    def update_norm(self) -> Tensor:
        """Mean over the recordings of the squared Frobenius norms of the updates, ``sum |u v^T|^2``."""
        norms = [((u.mT @ u) * (v.mT @ v)).sum((-1, -2)).mean() for u, v in self.updates]
        return torch.stack(norms).sum() if norms else torch.zeros(())


def _recordings(z: Tensor, updates: Sequence[tuple[Tensor, Tensor]]) -> torch.Size | None:
    """Draws and recordings of updates ``(..., R, 1, in, rank)`` and states ``(..., R, K, T, d)``, as they broadcast.

    Nothing, ``()``, where all states belong to one recording; None where this is not how the shapes are.
    """
    leads = {factor.shape[:-2] for update in updates for factor in update}
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


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """``x (..., R, K, T, in) @ weight (..., R, 1, in, out)``: one product a recording, trials and bins together."""
    if weight.dim() == x.dim() >= 3 and weight.shape[-3] == 1:
        trials, bins = x.shape[-3:-1]
        return torch.matmul(x.flatten(-3, -2), weight.squeeze(-3)).unflatten(-2, (trials, bins))
    return torch.matmul(x, weight)


class LowRankMLP(nn.Module):
    r"""Residual dynamics with two hidden layers and a low-rank update by the embedding (eq. 12-13).

    ``f_e(z) = z + W_o s( [W_h + u_2 v_2^T] s( [W_i + u_1 v_1^T] z ) )``; biases are shared and not adapted.

    Args:
        latent_dim: number of latents.
        embedding_dim: size of the embedding.
        rank: rank of the updates of the input and the hidden matrix; 0 gives shared dynamics.
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
        widths = (latent_dim, hidden_dim, hidden_dim, latent_dim)
        layers = [nn.Linear(inp, out) for inp, out in zip(widths, widths[1:], strict=False)]
        self.layers, last = nn.ModuleList(layers), layers[-1]
        with torch.no_grad():  # start near the identity: a small step away from z
            last.weight.mul_(0.3)
            last.bias.zero_()
        adapted = tuple(zip(widths[:2], widths[1:3], strict=True))
        self.hypernetwork = LowRankHypernetwork(embedding_dim, adapted, rank)
        self.residual, self.activation = residual, activation

    def forward(self, e: Tensor) -> AdaptedMLP:
        """``e (..., embedding_dim)``, batch shape ``(..., R, 1)`` in the model, to these recordings' dynamics."""
        return AdaptedMLP(self, self.hypernetwork(e))
