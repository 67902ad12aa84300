"""Distributions of the observations of a batch, and their log densities summed over bins and neurons.

A distribution over neurons that defines ``log_prob_of_trials(value, mask)`` is scored by it: one pass over the data in
pieces that stay in the cache, with its gradient written out. Any other distribution is scored by its ``log_prob``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import transform_to
from torch.distributions.utils import lazy_property
from torch.nn import functional

from pyro_metassm import _machine as machine
from pyro_metassm.blocks import each_block, everywhere
from pyro_metassm.recordings import Batch


class NeuronNormal(dist.Normal):
    """``Normal(loc, scale)`` of ``loc (..., R, K, T, N)`` with one scale per neuron, ``(R, 1, 1, N)``.

    ``num_neurons`` are the recordings' numbers of neurons, the rest is padding and never observed; None is N of each.
    """

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor,
        validate_args: bool | None = None,
        num_neurons: Sequence[int] | None = None,
    ):
        self.by_neuron, self.num_neurons = scale, num_neurons
        super().__init__(loc, scale, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return dist.Normal(self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False)

    def log_prob_of_trials(self, value: Tensor, mask: Tensor) -> Tensor | None:
        """Sum over bins and neurons of the masked log densities, ``(R, K)``; None for leading dimensions."""
        if self.loc.dim() != 4 or self.by_neuron.shape[1:3] != (1, 1):
            return None
        log_scale = self.by_neuron[:, :, 0].log()
        squares, counts = _Squares.apply(self.loc, value, mask, self.num_neurons)
        constant = log_scale + 0.5 * math.log(2 * math.pi)
        return -(0.5 * squares * (-2.0 * log_scale).exp() + counts * constant).sum(-1)


class _Squares(torch.autograd.Function):
    """``sum_t mask (y - loc)^2`` and ``sum_t mask`` of every trial and neuron, ``(R, K, N)``."""

    @staticmethod
    def forward(ctx, loc: Tensor, value: Tensor, mask: Tensor, num_neurons):
        ctx.save_for_backward(loc, value, mask)
        ctx.num_neurons = num_neurons
        num, trials, bins, width = loc.shape
        squares, counts = (loc.new_zeros(num, trials, width) for _ in range(2))

        def work(rows: slice, trials: slice, neurons: slice) -> None:
            seen = _weights(mask, rows, trials, neurons, loc.dtype)
            d = torch.sub(value[rows, trials, :, neurons], loc[rows, trials, :, neurons]).square_()
            if steady := seen.shape[2] == 1:
                torch.mul(d.sum(2), seen[:, :, 0], out=squares[rows, trials, neurons])
            else:
                torch.sum(d.mul_(seen), 2, out=squares[rows, trials, neurons])
            counts[rows, trials, neurons] = seen.sum(2) * (bins if steady else 1)

        each_block(loc, work, num_neurons)
        ctx.mark_non_differentiable(counts)
        return squares, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, _):
        loc, value, mask = ctx.saved_tensors
        grad_loc = torch.empty_like(loc)

        def work(rows: slice, trials: slice, neurons: slice) -> None:
            seen = _weights(mask, rows, trials, neurons, loc.dtype)
            g = _within(grad_loc, rows, trials, neurons)
            torch.sub(value[rows, trials, :, neurons], loc[rows, trials, :, neurons], out=g)
            g.mul_(seen * (-2.0 * grad[rows, trials, None, neurons]))

        each_block(loc, work, ctx.num_neurons)
        return grad_loc, None, None, None


def _weights(mask: Tensor, rows: slice, trials: slice, neurons: slice, dtype: torch.dtype) -> Tensor:
    """The mask of a piece as numbers (products of numbers and truth values are slow), ``(R', K', T or 1, N')``."""
    steady = everywhere(mask)
    return (mask[rows, trials, :, neurons] if steady is mask else steady[rows, ..., neurons]).to(dtype)


def _within(grad: Tensor, rows: slice, trials: slice, neurons: slice) -> Tensor:
    """A block of a gradient, to be written; the padding beside it is zero."""
    grad[rows, trials, :, neurons.stop :] = 0.0
    return grad[rows, trials, :, neurons]


def saturating_log_rate(x: Tensor, log_ceiling: Tensor) -> Tensor:
    """``c - softplus(c - x) = c + log sigmoid(x - c)``: as ``x`` far below the ceiling ``c``, and never above it."""
    return functional.logsigmoid(x - log_ceiling) + log_ceiling


class SaturatingPoisson(dist.Poisson):
    r"""``Poisson(rate)`` with ``log rate = c - softplus(c - x)``, that is ``rate = e^c sigmoid(x - c)``.

    Args:
        predictor: ``x (..., R, K, T, N)``.
        log_ceiling: ``c (R, 1, 1, N)``, the largest log rate of each neuron.
        num_neurons: of each recording, the rest is padding and never observed; None is N of each.
    """

    def __init__(
        self,
        predictor: Tensor,
        log_ceiling: Tensor,
        validate_args: bool | None = None,
        num_neurons: Sequence[int] | None = None,
    ):
        self.predictor, self.log_ceiling, self.is_sparse = predictor, log_ceiling, False
        self.num_neurons = num_neurons
        # Not Poisson's own constructor: it wants the rates, which training does not need.
        torch.distributions.Distribution.__init__(self, predictor.shape, validate_args=False)

    @lazy_property
    def rate(self) -> Tensor:
        return self.log_ceiling.exp() * (self.predictor - self.log_ceiling).sigmoid()

    def expand(self, batch_shape, _instance=None):
        return dist.Poisson(self.rate.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        log_rate = saturating_log_rate(self.predictor, self.log_ceiling)
        return value * log_rate - self.rate - torch.lgamma(value + 1)

    def log_prob_of_trials(self, value: Tensor, mask: Tensor) -> Tensor | None:
        """Sum over bins and neurons of the masked log densities, ``(R, K)``; None for leading dimensions."""
        if self.predictor.dim() != 4 or self.log_ceiling.requires_grad:
            return None
        return _Counts.apply(self.predictor, self.log_ceiling[:, 0, 0], value, mask, self.num_neurons)


class _Counts(torch.autograd.Function):
    """``sum_tn mask (y log rate - rate - log y!)`` of every trial, ``(R, K)``."""

    @staticmethod
    def forward(ctx, predictor: Tensor, ceiling: Tensor, value: Tensor, mask: Tensor, num_neurons):
        ctx.save_for_backward(predictor, ceiling, value, mask)
        ctx.num_neurons = num_neurons
        total = predictor.new_empty(predictor.shape[:2])

        def work(rows: slice, trials: slice, neurons: slice) -> None:
            c, y = ceiling[rows, None, None, neurons], value[rows, trials, :, neurons]
            log_rate = saturating_log_rate(predictor[rows, trials, :, neurons], c)
            term = (y * log_rate).sub_(log_rate.exp_()).sub_(_log_factorial(y))
            term.mul_(_weights(mask, rows, trials, neurons, term.dtype))
            total[rows, trials] = term.sum((-1, -2))

        each_block(predictor, work, num_neurons)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        predictor, ceiling, value, mask = ctx.saved_tensors
        grad_predictor = torch.empty_like(predictor)

        def work(rows: slice, trials: slice, neurons: slice) -> None:
            c, x = ceiling[rows, None, None, neurons], predictor[rows, trials, :, neurons]
            # With s = sigmoid(c - x): d log rate / dx = s and rate = e^c (1 - s).
            s = torch.sub(c, x).sigmoid_()
            s.mul_(_weights(mask, rows, trials, neurons, s.dtype)).mul_(grad[rows, trials][..., None, None])
            rate = torch.sub(x, c).sigmoid_().mul_(c.exp())
            torch.sub(value[rows, trials, :, neurons], rate, out=rate)
            torch.mul(rate, s, out=_within(grad_predictor, rows, trials, neurons))

        each_block(predictor, work, ctx.num_neurons)
        return grad_predictor, None, None, None, None


TABLE = torch.lgamma(torch.arange(1.0, 258.0, dtype=torch.float64))


def _log_factorial(y: Tensor) -> Tensor:
    """``log y!``; on a CPU a table of the usual counts is many times faster than the function."""
    if y.device.type != "cpu" or y.numel() == 0 or float(y.max()) > len(TABLE) - 1:
        return torch.lgamma(y + 1)
    return TABLE.to(y.dtype)[y.to(torch.int32)]


class Observed(dist.Independent):
    """``y`` over ``(time, neuron)`` as one event, in which what was not observed counts nothing."""

    def __init__(self, y: TorchDistribution, mask: Tensor):
        self.y, self.observed = y, mask
        super().__init__(y.mask(mask), 2)

    def expand(self, batch_shape, _instance=None):
        if torch.Size(batch_shape) == self.batch_shape:  # as every plate asks for
            return self
        return Observed(self.y.expand(torch.Size(batch_shape) + self.event_shape), self.observed)

    def log_prob(self, value: Tensor) -> Tensor:
        fused = getattr(self.y, "log_prob_of_trials", None)
        if fused is not None and self.observed.shape == value.shape == self.y.batch_shape:
            if self._validate_args:
                self._validate_sample(in_support(self.y, value, self.observed))
            total = fused(value, self.observed)
            if total is not None:
                return total
        return super().log_prob(in_support(self.y, value, self.observed))


class ObservedJointly(dist.Independent):
    """A joint ``y`` over the neurons of every bin, ``(time, neuron)`` as one event, scored by the neurons seen."""

    def __init__(self, y: TorchDistribution, mask: Tensor):
        self.y, self.observed = y, mask
        super().__init__(y, 1)

    def expand(self, batch_shape, _instance=None):
        if torch.Size(batch_shape) == self.batch_shape:
            return self
        return ObservedJointly(self.y.expand(torch.Size(batch_shape) + self.event_shape[:1]), self.observed)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.y.log_prob_of_seen(value, self.observed).sum(-1)


def in_support(y: TorchDistribution, value: Tensor, mask: Tensor) -> Tensor:
    """``value`` with something that ``y`` can be wherever there is no observation.

    A density that is infinite there has NaN gradients, masked or not. Where torch does not know what ``y`` can be,
    values stay as they are.
    """
    if hasattr(y, "in_support"):
        return y.in_support(value, mask)
    try:
        support = y.support
        if support.is_discrete:
            inside = getattr(support, "lower_bound", 0.0)
        else:
            inside = transform_to(support)(value.new_zeros(()))
    except (AttributeError, NotImplementedError):
        return value
    return torch.where(mask, value, inside)


@torch.no_grad()
def counted(model, name: str) -> np.ndarray:
    """Which neurons of a recording have probabilities (counts, events), not densities, by the model, bool ``(N,)``."""
    table, like = model.neurons, next(model.parameters())
    number = dict(zip(table.names, table.num_neurons, strict=True)).get(name, 0)
    table.check([name], [number])
    row = torch.tensor([table.names.index(name)], device=like.device)
    with machine.random_forked(like.device):  # it may draw global sites
        y = model.likelihood(torch.zeros(1, 1, 1, number, dtype=like.dtype, device=like.device), row)
    if hasattr(y, "discrete"):
        return y.discrete[0].cpu().numpy()
    return np.full(number, bool(y.support.is_discrete))


def of_single_neurons(model, batch: Batch) -> bool:
    """Whether the likelihood is one of each neuron, not a joint one over the neurons."""
    predictor = batch.observations.new_zeros(1, 1, 1, batch.width)
    with torch.no_grad():
        return not model.likelihood(predictor, batch.recording[:1]).event_shape


def curvature(model, predictor: Tensor, batch: Batch, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log densities of a recording's observations by neuron, their slopes and their negative second derivatives.

    By automatic differentiation, for any family of single neurons; zero where nothing was seen, and second derivatives
    where they are of the wrong sign, so that Newton's steps go uphill.

    Args:
        model: whose ``likelihood`` it is.
        predictor: ``(K, T, N)`` of the recording.
        batch: with the recording.
        r: its place there.
    """
    width = predictor.shape[-1]
    value, mask = batch.observations[r : r + 1, ..., :width], batch.mask[r : r + 1, ..., :width]
    with torch.enable_grad():
        x = predictor.detach().unsqueeze(0).requires_grad_()
        y = model.likelihood(x, batch.recording[r : r + 1])
        log_prob = y.log_prob(in_support(y, value, mask)).where(mask, 0.0)
        (slope,) = torch.autograd.grad(log_prob.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x)
    return log_prob[0].detach(), slope[0].detach(), (-second[0]).clamp(min=0.0)


def observed(y: TorchDistribution, mask: Tensor) -> TorchDistribution:
    """``y`` over ``(time, neuron)`` as one event, in which what was not observed counts nothing.

    Args:
        y: distribution of each neuron, or a joint one over the neurons (event ``(neuron,)``). Of a joint one, the
            neurons seen count if it has ``log_prob_of_seen(value, mask)``, their marginal density in every bin; without
            it a bin counts, with all its neurons, if any of them was observed.
        mask: ``(R, K, T, N)`` bool, True = observed.

    Raises:
        ValueError: for any other event shape.
    """
    if len(y.event_shape) == 0:
        return Observed(y, mask)
    if len(y.event_shape) == 1:
        if hasattr(y, "log_prob_of_seen"):
            return ObservedJointly(y, mask)
        return y.mask(mask.any(-1)).to_event(1)
    raise ValueError(
        f"likelihood: needed a distribution of each neuron or over the neurons, got event shape {y.event_shape}"
    )
