"""One distribution of neurons that have different ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_metassm.blocks import everywhere
from pyro_metassm.observations import in_support, observed


@dataclass(frozen=True)
class Part:
    """The neurons of one family.

    Attributes:
        y: their distribution, ``(..., R', K, T, N)``; of whatever neurons are not its own it says nothing.
        own: which neurons of all recordings of the batch are, ``(R, 1, 1, N)`` bool.
        rows: the ``R'`` recordings that have some; None is all R.
    """

    y: TorchDistribution
    own: Tensor
    rows: Tensor | None = None

    def of(self, value: Tensor) -> Tensor:
        """The part's recordings of ``(..., R, K, T, N)``."""
        return of_rows(value, self.rows)


def of_rows(value: Tensor, rows: Tensor | None) -> Tensor:
    """These recordings of ``(..., R, K, T, N)``; None is all of them."""
    if rows is None or value.dim() < 4 or value.shape[-4] == 1:  # or the same for all
        return value
    return value.index_select(-4, rows)


class SideBySide(TorchDistribution):
    """Each neuron by the distribution of its own family; batch ``(..., R, K, T, N)``, no event dimension.

    Args:
        parts: at least one; a neuron is of one part at most, and one of none is padding.
        shape: the batch shape.
    """

    arg_constraints: dict = {}

    def __init__(self, parts: Sequence[Part], shape: torch.Size, validate_args: bool | None = None):
        self.parts = tuple(parts)
        super().__init__(torch.Size(shape), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self):
        return _Support(self)

    @property
    def discrete(self) -> Tensor:
        """Which neurons have probabilities, not densities, ``(R, N)`` bool."""
        return torch.stack([p.own & p.y.support.is_discrete for p in self.parts]).any(0)[:, 0, 0]

    @property
    def mean(self) -> Tensor:
        return self.joined(part.y.mean for part in self.parts)

    @property
    def variance(self) -> Tensor:
        return self.joined(part.y.variance for part in self.parts)

    def expand(self, batch_shape, _instance=None):
        shape = torch.Size(batch_shape)
        parts = [
            Part(p.y.expand((*shape[:-4], p.y.batch_shape[-4], *shape[-3:])), p.own, p.rows)
            for p in self.parts
        ]
        return SideBySide(parts, shape, validate_args=False)

    def sample(self, sample_shape=()):
        with torch.no_grad():
            return self.joined(part.y.sample(sample_shape) for part in self.parts)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.joined(p.y.log_prob(in_support(p.y, p.of(value), p.of(p.own))) for p in self.parts)

    def log_prob_of_trials(self, value: Tensor, mask: Tensor) -> Tensor | None:
        """Sum over bins and neurons of the masked log densities, ``(R, K)``; None for leading dimensions."""
        if len(self.batch_shape) != 4:
            return None
        total = value.new_zeros(value.shape[:2])
        for part in self.parts:
            theirs = part.of(value)
            seen = (part.of(everywhere(mask)) & part.of(part.own)).expand(theirs.shape)
            each = observed(part.y, seen).log_prob(in_support(part.y, theirs, seen))
            total = total + each if part.rows is None else total.index_add(0, part.rows, each)
        return total

    def in_support(self, value: Tensor, mask: Tensor) -> Tensor:
        """``value`` with something possible wherever there is no observation."""
        return self.joined(in_support(p.y, p.of(value), p.of(mask & p.own)) for p in self.parts)

    def joined(self, values: Iterable[Tensor], otherwise: float = 0.0) -> Tensor:
        """One tensor ``(..., R, K, T, N)`` of what each part has for its recordings ``(..., R', K, T, N)``."""
        whole: Tensor | None = None
        for part, value in zip(self.parts, values, strict=True):
            if part.rows is not None:
                shape = (*value.shape[:-4], self.batch_shape[-4], *value.shape[-3:])
                value = value.new_zeros(shape).index_copy(-4, part.rows, value)
            rest = torch.full((), otherwise).to(value) if whole is None else whole
            whole = torch.where(part.own, value, rest)
        assert whole is not None
        return whole


class _Support(constraints.Constraint):
    """Of every neuron that of its part."""

    event_dim = 0

    def __init__(self, y: SideBySide):
        self.y = y
        self.is_discrete = all(part.y.support.is_discrete for part in y.parts)

    def check(self, value: Tensor) -> Tensor:
        inside: Callable[[Part], Tensor] = lambda part: part.y.support.check(part.of(value))
        return self.y.joined(map(inside, self.y.parts), otherwise=1.0)
