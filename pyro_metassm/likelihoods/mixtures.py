"""A distribution with more zeros than another."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid


class ZeroInflated(TorchDistribution):
    """Zero with probability ``g``, else a draw of ``base``: counts, or positive numbers, which are never zero.

    Args:
        base: distribution of each element.
        gate: the logit of ``g``, of the shape of ``base``.
    """

    arg_constraints: dict = {}

    def __init__(self, base: TorchDistribution, gate: Tensor, validate_args: bool | None = None):
        self.base, self.gate = base, gate
        super().__init__(base.batch_shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self):
        discrete = self.base.support.is_discrete
        return constraints.nonnegative_integer if discrete else constraints.nonnegative

    @property
    def mean(self) -> Tensor:
        return (-self.gate).sigmoid() * self.base.mean

    @property
    def variance(self) -> Tensor:
        share = (-self.gate).sigmoid()
        return share * (self.base.variance + (1 - share) * self.base.mean.square())

    def expand(self, batch_shape, _instance=None):
        return ZeroInflated(self.base.expand(batch_shape), self.gate.expand(batch_shape), validate_args=False)

    def sample(self, sample_shape=()):
        with torch.no_grad():
            zero = dist.Bernoulli(logits=self.gate).sample(sample_shape)
            return self.base.sample(sample_shape) * (1 - zero)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        zero = value == 0
        if self.base.support.is_discrete:
            other = logsigmoid(-self.gate) + self.base.log_prob(value)
            return torch.where(zero, torch.logaddexp(logsigmoid(self.gate), other), other)
        # A density may be infinite at zero, and its gradient NaN behind the choice: one is as good a place.
        other = logsigmoid(-self.gate) + self.base.log_prob(torch.where(zero, 1.0, value))
        return torch.where(zero, logsigmoid(self.gate), other)
