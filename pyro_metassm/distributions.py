"""A whole latent path as one distribution, and the divergence between two of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import constraints, kl_divergence
from torch.nn import functional

Transition = Callable[..., TorchDistribution]
"""``(..., K, latent_dim) -> Distribution`` with batch shape ``(..., K)`` and event shape ``(latent_dim,)``."""


class MarkovPath(TorchDistribution):
    r"""Path of a Markov chain, ``p(z_1) prod_t p(z_t | z_{t-1})`` (eq. 9-10), with event shape ``(time, latent_dim)``.

    ``rsample`` steps through time; ``log_prob`` calls the transition once, on all time steps together.

    Args:
        initial: distribution of the first state, event shape ``(latent_dim,)``.
        transition: from states ``(..., K, latent_dim)`` to the distribution of their successors, batch ``(..., K)``
            and event ``(latent_dim,)``; called with K = 1 in ``rsample`` and K = num_steps - 1 in ``log_prob``. What it
            has of its own for every element of the batch it joins to the states by broadcasting.
        num_steps: number of time bins, at least 1.
        mask: ``(..., num_steps)`` bool, False where a trial has already ended: those bins have no density. Ends of
            trials only: a bin that exists and was not observed stays True (it still links its neighbours).
        inputs: ``(..., num_steps, input_dim)``, given to the transition as ``inputs``: those of the bins it leads to.

    Raises:
        ValueError: ``initial`` not over a vector, ``num_steps < 1``, or a mask of another number of bins.

    Example:
        >>> initial = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> path = MarkovPath(initial, lambda z: dist.Normal(0.9 * z, 0.1).to_event(1), num_steps=5)
        >>> path.log_prob(path.rsample((3,))).shape
        torch.Size([3])
    """

    arg_constraints: dict = {}
    support = constraints.independent(constraints.real, 2)

    def __init__(
        self,
        initial: TorchDistribution,
        transition: Transition,
        num_steps: int,
        mask: Tensor | None = None,
        inputs: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        if len(initial.event_shape) != 1:
            raise ValueError(
                "MarkovPath needs an initial distribution with event shape (latent_dim,), got "
                f"{tuple(initial.event_shape)}; "
                "use .to_event(1)"
            )
        if num_steps < 1:
            raise ValueError(f"MarkovPath needs num_steps >= 1, got {num_steps}")
        if mask is not None and mask.shape[-1] != num_steps:
            raise ValueError(f"MarkovPath needs a mask of (..., {num_steps}), got {tuple(mask.shape)}")
        batch_shape = initial.batch_shape
        if mask is not None:
            batch_shape = torch.broadcast_shapes(batch_shape, mask.shape[:-1])
        self.initial, self.transition, self.num_steps = initial, transition, num_steps
        self.mask_of_bins, self.inputs = mask, inputs
        super().__init__(
            batch_shape, torch.Size((num_steps, *initial.event_shape)), validate_args=validate_args
        )

    @property
    def has_rsample(self) -> bool:
        return self.initial.has_rsample

    def expand(self, batch_shape, _instance=None) -> MarkovPath:
        initial = self.initial.expand(batch_shape)
        mask, inputs = self.mask_of_bins, self.inputs
        return MarkovPath(initial, self.transition, self.num_steps, mask, inputs, validate_args=False)

    def into(self, bins: slice, z: Tensor) -> TorchDistribution:
        """Distribution of the states in these bins, given those in the bins before them, ``z (..., K, latent_dim)``."""
        if self.inputs is None:
            return self.transition(z)
        return self.transition(z, inputs=self.inputs[..., bins, :])

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        return self._draw(sample_shape, "rsample")

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        with torch.no_grad():
            return self._draw(sample_shape, "sample")

    def _draw(self, sample_shape, how: str) -> Tensor:
        z = getattr(self.initial.expand(self.batch_shape), how)(sample_shape).unsqueeze(-2)
        states = [z]
        for t in range(1, self.num_steps):
            z = getattr(self.into(slice(t, t + 1), z), how)()
            states.append(z)
        return torch.cat(states, -2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Sum over the bins that exist of the initial and transition log densities, shape ``batch_shape``."""
        return self.log_factors(value).sum(-1)

    def log_factors(self, value: Tensor) -> Tensor:
        """Log density of every bin given the bin before, ``(..., num_steps)``; 0 after a trial's end."""
        first = self.initial.log_prob(value[..., 0, :])
        if self.num_steps == 1:
            return self.masked(first.unsqueeze(-1))
        rest = self.into(slice(1, None), value[..., :-1, :]).log_prob(value[..., 1:, :])
        return self.masked(_along_time(first, rest))

    def masked(self, factors: Tensor) -> Tensor:
        return factors if self.mask_of_bins is None else factors.masked_fill(~self.mask_of_bins, 0.0)


class RolloutPath(TorchDistribution):
    r"""Variational path: an encoder's independent Normals, some bins replaced by roll-outs of the prior.

    Bin t has the factor ``Normal(loc_t, scale_t)``, or, where ``rollout`` is True, the prior's own
    ``p(z_t | z_{t-1})``, whose divergence from the prior is zero: a legal variational factor that teaches the dynamics
    to carry several steps (paper, eq. 16; roll-outs: practice known to help). Runs of such bins are advanced together,
    one pass per depth of run, not one per bin.

    Args:
        loc, scale: ``(..., time, latent_dim)`` of the encoder.
        prior: the path's prior; its transition makes the roll-outs, its mask says which bins exist.
        rollout: ``(..., time)`` bool or None, best on the CPU whatever the device; the first bin is always the
            encoder's.
    """

    arg_constraints: dict = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, prior: MarkovPath, rollout: Tensor | None = None, validate_args=None
    ):
        batch_shape = torch.broadcast_shapes(loc.shape[:-2], prior.batch_shape)
        if rollout is not None:
            rollout = rollout.clone()
            rollout[..., 0] = False
            rollout = rollout.expand(*batch_shape, prior.num_steps)
        self.loc, self.scale, self.prior, self.rollout = loc, scale, prior, rollout
        super().__init__(batch_shape, loc.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape, _instance=None) -> RolloutPath:
        shape = (*batch_shape, *self.event_shape)
        return RolloutPath(
            self.loc.expand(shape), self.scale.expand(shape), self.prior, self.rollout, validate_args=False
        )

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        z = self.loc + self.scale * torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        if self.rollout is None:
            return z
        # Which bins are advanced together is worked out on the host, so that a GPU is not waited for.
        rollout = self.rollout.cpu()
        if rollout.shape[:-1].numel() == 1 or not self._trials_alike(z):
            return self._rolled(z, rollout)
        # All trials as one long path: no run goes on from one to the next, whose first bin is the encoder's.
        joined = z.flatten(-3, -2).unsqueeze(-3), rollout.flatten(-2).unsqueeze(-2)
        return self._rolled(*joined).view(shape)

    def _trials_alike(self, z: Tensor) -> bool:
        """Whether the transition is the same along the last dimension of the batch, as its parameters say.

        Asked of one state in place of that dimension: if it belongs to all, what comes back belongs to all.
        """
        if self.prior.inputs is not None:
            return False
        state = z[..., :1, :1, :].detach()
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # it may insist on the trials that it has
            return self.prior.transition(state).batch_shape == state.shape[:-1]
        return False

    def _rolled(self, z: Tensor, rollout: Tensor) -> Tensor:
        """``z (..., time, latent_dim)`` with roll-outs of the bins before, side by side, in their places."""
        runs = _runs(rollout)
        if not runs.widths:
            return z
        # A GPU is told in one piece, from memory that the host need not wait for.
        places = torch.cat([runs.before, runs.source], -1)
        places = (places.pin_memory() if z.is_cuda else places).to(z.device, non_blocking=True)
        places = places.unsqueeze(-1).expand(*z.shape[:-2], -1, z.shape[-1])
        states = z.gather(-2, places[..., : runs.widths[0], :])
        bins, inputs = [z], self.prior.inputs
        for depth, width in enumerate(runs.widths):
            states, more = states[..., :width, :].contiguous(), {}
            if inputs is not None:
                into = (places[..., :width, :1] + depth + 1).clamp(max=inputs.shape[-2] - 1)
                u = inputs.expand(*z.shape[:-2], *inputs.shape[-2:])
                more["inputs"] = u.gather(-2, into.expand(*into.shape[:-1], u.shape[-1]))
            states = self.prior.transition(states, **more).rsample()
            bins.append(states)
        return torch.cat(bins, -2).gather(-2, places[..., runs.widths[0] :, :])

    def log_prob(self, value: Tensor) -> Tensor:
        encoder = dist.Normal(self.loc, self.scale).log_prob(value).sum(-1)
        if self.rollout is not None:
            encoder = torch.where(
                self.rollout.to(value.device, non_blocking=True), self.prior.log_factors(value), encoder
            )
        return self.prior.masked(encoder).sum(-1)

    def kl_given(self, prior: MarkovPath, value: Tensor) -> Tensor:
        """``sum_t KL( q(z_t) || p(z_t | z_{t-1}) )`` at the sampled previous states, shape of the batch.

        Bin by bin analytic where the prior's factor is Normal, the sampled log ratio where it is not.
        """
        successor = prior.into(slice(1, None), value[..., :-1, :]) if prior.num_steps > 1 else None
        if is_normal(prior.initial) and (successor is None or is_normal(successor)):
            kl = self._kl_of_normals(prior.initial.base_dist, successor and successor.base_dist)
        else:
            first = _kl_or_sampled(self._encoder(0), prior.initial, value[..., 0, :])
            kl = first.unsqueeze(-1)
            if successor is not None:
                kl = _along_time(
                    first, _kl_or_sampled(self._encoder(slice(1, None)), successor, value[..., 1:, :])
                )
        if self.rollout is not None:
            kl = kl.masked_fill(self.rollout.to(value.device, non_blocking=True), 0.0)
        return prior.masked(kl).sum(-1)

    def _kl_of_normals(self, initial: TorchDistribution, successor: TorchDistribution | None) -> Tensor:
        """Of all bins at once, ``(..., time)``: what cuts the encoder's tensors in pieces copies their gradients."""
        if successor is None:
            loc, scale = initial.loc.unsqueeze(-2), initial.scale.unsqueeze(-2)
        else:
            lead = successor.loc.shape[:-2]
            loc, scale = (
                torch.cat([a.expand(*lead, -1).unsqueeze(-2), b], -2)
                for a, b in ((initial.loc, successor.loc), (initial.scale, successor.scale))
            )
        shape = torch.broadcast_shapes(self.loc.shape, loc.shape)
        return _NormalKL.apply(*(x.expand(shape) for x in (self.loc, self.scale, loc, scale)))

    def _encoder(self, bins: int | slice) -> TorchDistribution:
        return dist.Normal(self.loc[..., bins, :], self.scale[..., bins, :]).to_event(1)


def is_normal(x: TorchDistribution) -> bool:
    """Independent Normals over a vector, and nothing that was made of them."""
    return (
        isinstance(x, torch.distributions.Independent)
        and x.reinterpreted_batch_ndims == 1
        and type(x.base_dist) is dist.Normal
    )


class _NormalKL(torch.autograd.Function):
    """``sum_d KL( Normal(m, s) || Normal(mu, sigma) )`` of tensors of one shape ``(..., d)``."""

    @staticmethod
    def forward(ctx, m: Tensor, s: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        difference, ratio = torch.sub(m, mu).div_(sigma), s / sigma
        ctx.save_for_backward(difference, ratio, sigma)
        kl = torch.addcmul(ratio.square(), difference, difference).sub_(1.0).mul_(0.5)
        return kl.sub_(ratio.log()).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        difference, ratio, sigma = ctx.saved_tensors
        g = grad.unsqueeze(-1) / sigma
        of_m = g * difference
        of_sigma = torch.addcmul(ratio.square(), difference, difference).neg_().add_(1.0).mul_(g)
        return of_m, (ratio - ratio.reciprocal()).mul_(g), -of_m, of_sigma


def _along_time(first: Tensor, rest: Tensor) -> Tensor:
    """Terms of the first bin ``(...)`` and of the others ``(..., num_steps - 1)`` as ``(..., num_steps)``."""
    batch = torch.broadcast_shapes(first.shape, rest.shape[:-1])
    return torch.cat([first.expand(batch).unsqueeze(-1), rest.expand(*batch, -1)], -1)


class _Runs(NamedTuple):
    """Runs of roll-out bins, side by side, the longest of every trial first: those that go on are the first ones.

    Attributes:
        before: ``(..., W)`` the bins before the runs; trials with fewer runs than others have bin 0 for the rest.
        widths: how many runs have a first, a second, ... bin, in the trial that has most; the first is W.
        source: ``(..., time)`` where every bin is in the list of all bins, then of all runs' first, second, ... bins.
    """

    before: Tensor
    widths: list[int]
    source: Tensor


def _runs(rollout: Tensor) -> _Runs:
    """The runs of True along the last dimension of ``(..., time)``, whose first bin is False."""
    num_bins, here = rollout.shape[-1], rollout.device
    flat = rollout.reshape(-1, num_bins)
    depth = _run_depth(flat)
    source = torch.arange(num_bins, device=here).repeat(len(flat), 1)
    row, last = (flat & ~functional.pad(flat[:, 1:], (0, 1))).nonzero(as_tuple=True)  # of every run
    length = depth[row, last]
    order = (row * num_bins - length).argsort()  # by trial, then the longest first
    number = torch.bincount(row, minlength=len(flat))
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=here) - (number.cumsum(0) - number)[row]
    before = row.new_zeros(len(flat), int(number.max()))
    before[row, column] = last - length
    widths = [int(column[length > level].max()) + 1 for level in range(int(depth.max()))]
    start = num_bins + torch.tensor([0, *widths], device=here).cumsum(0)
    source[flat] = start[depth[flat] - 1] + column.repeat_interleave(length)
    return _Runs(before.view(*rollout.shape[:-1], -1), widths, source.view(rollout.shape))


def _run_depth(rollout: Tensor) -> Tensor:
    """Length of the run of True that ends at each position (0 where False); the first position is False."""
    position = torch.arange(rollout.shape[-1], device=rollout.device)
    last_false = torch.where(rollout, 0, position).cummax(-1).values
    return position - last_false


def _kl_or_sampled(q: TorchDistribution, p: TorchDistribution, value: Tensor) -> Tensor:
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return q.log_prob(value) - p.log_prob(value)


def conditional_kl(q: TorchDistribution, p: TorchDistribution, value: Tensor) -> Tensor:
    """KL of a site's posterior from its prior: analytic where both sides allow it, else one-sample Monte Carlo.

    Args:
        q: the guide's distribution.
        p: the model's, given the sampled values of the sites before it.
        value: the value drawn from ``q``.

    Returns:
        the divergence (or an unbiased estimate), of shape ``q.batch_shape``.
    """
    if isinstance(q, RolloutPath) and isinstance(p, MarkovPath):
        return q.kl_given(p, value)
    return _kl_or_sampled(q, p, value)
