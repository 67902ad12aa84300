"""Read-outs given the states: a regression in the model's own family, and what one recording's say of another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor

from pyro_metassm.observations import curvature, observed
from pyro_metassm.optimizers import adam, one_cycle
from pyro_metassm.recordings import Batch

ELEMENTS = 500_000  # observations a step of the regression
LEAST = 1.0  # slope or curvature in a neuron's bias, in counts, below which its read-out stays as it is


@dataclass(frozen=True)
class Units:
    """Read-outs of different kinds of neurons made comparable, ``(c, d)`` to ``(c / u, (d - m) / u)``.

    A neuron's read-out is in the units of its predictor: of the data, of their logarithm, ... Between recordings of one
    kind sizes are compared as they are; between kinds they mean nothing.

    Attributes:
        size: ``u (num_kinds,)``, the root mean square of a kind's weights; 1 where there is one kind.
        origin: ``m (num_kinds,)``, the mean of its biases; 0 where there is one kind.
    """

    size: Tensor
    origin: Tensor

    @classmethod
    def of(cls, rows: Sequence[Tensor], kinds: Sequence[Tensor], num_kinds: int) -> Units:
        """From read-outs ``(N_i, latent_dim + 1)`` and the kinds of their neurons ``(N_i,)``."""
        every, kind = torch.cat(list(rows)), torch.cat(list(kinds))
        size, origin = every.new_ones(num_kinds), every.new_zeros(num_kinds)
        for number in range(num_kinds if num_kinds > 1 else 0):
            own = kind == number
            chosen = every[own] if own.any() else every  # of a kind never met as of all
            size[number] = chosen[:, :-1].square().mean().sqrt().clamp(min=1e-6)
            origin[number] = chosen[:, -1].mean()
        return cls(size, origin)

    def __call__(self, rows: Tensor, kinds: Tensor) -> Tensor:
        """Read-outs in these units."""
        origin = torch.cat([torch.zeros_like(rows[:, :-1]), self.origin[kinds].unsqueeze(-1)], -1)
        return (rows - origin) / self.size[kinds].unsqueeze(-1)


@dataclass(frozen=True)
class ReadOutPrior:
    """An empirical prior of a neuron's read-out, ``(c_n, d_n) ~ Normal(mean, covariance)``, from fitted recordings.

    Attributes:
        mean: ``(latent_dim + 1,)``; zero for the weights, since the sign of a neuron's tuning is arbitrary.
        covariance: ``(latent_dim + 1, latent_dim + 1)``.
        concentration: neurons that a recording's second moment of read-outs is worth, given how much these differ
            between recordings; infinite where they differ as little as samples of ``N`` neurons do.
        shift_mean, shift_covariance: ``(latent_dim,)`` and ``(latent_dim, latent_dim)`` over the recordings of the
            common shift ``s_i`` in ``d_n = c_n s_i + rest``: where in the latent space a recording lies.
        units: in which all of this is.
        own: covariances of some recordings by their names, in place of ``covariance``
            (:func:`pyro_metassm.own_tuning.with_own_tuning`).
    """

    mean: Tensor
    covariance: Tensor
    concentration: float
    shift_mean: Tensor
    shift_covariance: Tensor
    units: Units = Units(torch.ones(1), torch.zeros(1))  # of one kind
    own: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, model, names: Sequence[str] | None = None) -> ReadOutPrior:
        """From the read-outs of a fitted model's recordings: these, or all."""
        table = torch.cat([model.read_out.weight, model.read_out.bias.unsqueeze(-1)], -1)
        places = [model.neurons.slice(name) for name in names or model.neurons.names]
        parts, kinds = (
            [table[place] for place in places],
            [model.observation.kinds[place] for place in places],
        )
        units = Units.of(parts, kinds, model.observation.num_kinds)
        parts = [units(part, kind) for part, kind in zip(parts, kinds, strict=True)]
        rows = torch.cat(parts)
        mean = rows.mean(0)
        mean[:-1] = 0.0
        covariance = (rows - mean).mT @ (rows - mean) / len(rows)
        covariance.diagonal().add_(1e-4 * covariance.diagonal().mean())
        white = torch.linalg.cholesky(covariance[:-1, :-1])
        differences, sampling = [], []
        for part in parts:
            own = torch.linalg.solve_triangular(white, part[:, :-1].mT, upper=False).mT
            differences.append(((own.mT @ own).diagonal() / len(own) - 1).square().mean())
            sampling.append(2 / len(own))
        # Second moments of n normal rows vary by 2 / n.
        excess = float(torch.stack(differences).mean()) - sum(sampling) / len(sampling)
        concentration = 2 / excess if excess > 0 else float("inf")
        shifts = common_shift(second_moments(parts))
        spread = (shifts - shifts.mean(0)).mT @ (shifts - shifts.mean(0)) / len(shifts)
        spread.diagonal().add_(0.01)  # as far as latents of unit variance may be off anyway
        return cls(mean, covariance, concentration, shifts.mean(0), spread, units)

    def precision(self, name: str) -> Tensor:
        """Of read-outs of a recording, ``(latent_dim + 1, latent_dim + 1)``."""
        return torch.linalg.inv(self.own.get(name, self.covariance))

    def log_prob(self, rows: Tensor, name: str) -> Tensor:
        """Of read-outs ``(..., latent_dim + 1)`` of a recording in its units, up to a constant."""
        error = rows - self.mean
        return -0.5 * (error @ self.precision(name) * error).sum(-1)

    def of_rows(self, kinds: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Means ``(N, latent_dim + 1)`` and precisions of read-outs of a recording's neurons of these kinds."""
        size, origin = self.units.size[kinds].unsqueeze(-1), self.units.origin[kinds]
        mean = self.mean * size
        mean[:, -1] += origin
        return mean, self.precision(name) / size.unsqueeze(-1).square()

    def of_batch(self, model, batch: Batch) -> Tensor:
        """Of the read-outs of a batch's recordings, summed, up to a constant."""
        each = zip(batch.names, rows_of(model, batch), kinds_of(model, batch), strict=True)
        return torch.cat([self.log_prob(self.units(rows, kinds), name) for name, rows, kinds in each]).sum()


def rows_of(model, batch: Batch) -> list[Tensor]:
    """The read-outs ``(N_i, latent_dim + 1)`` of a batch's recordings."""
    rows = torch.cat([model.read_out.weight, model.read_out.bias.unsqueeze(-1)], -1)
    return [rows[model.neurons.slice(name)] for name in batch.names]


def kinds_of(model, batch: Batch) -> list[Tensor]:
    """The kinds ``(N_i,)`` of observations of the neurons of a batch's recordings."""
    kinds = model.observation.kinds
    return [kinds[model.neurons.slice(name)] for name in batch.names]


def second_moments(rows: list[Tensor]) -> Tensor:
    """Mean over the neurons of every recording of the outer products of their rows, ``(R, d, d)``."""
    return torch.stack([r.mT @ r / len(r) for r in rows])


def common_shift(moments: Tensor) -> Tensor:
    """``s (..., d)`` of least squares in ``d_n = c_n s + rest``, from second moments of rows ``(c_n, d_n)``."""
    gram = moments[..., :-1, :-1]
    ridge = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-12)
    gram = gram + ridge * torch.eye(gram.shape[-1]).to(gram)
    return torch.linalg.solve(gram, moments[..., :-1, -1:]).squeeze(-1)


def fit_read_outs(
    model,
    z: Tensor,
    batch: Batch,
    rng: torch.Generator,
    *,
    num_steps: int = 80,
    prior: ReadOutPrior | None = None,
    afresh: bool = True,
) -> None:
    """Maximise the model's own likelihood of every neuron given the states, in place.

    Args:
        model: whose ``read_out`` and ``observation`` are fitted.
        z: states ``(R, K, T, latent_dim)``.
        batch: what was observed then.
        rng: of the trials drawn where there are many observations.
        num_steps: steps of Adam after a start by least squares (by the mean counts).
        prior: added to the likelihood.
        afresh: False goes on from the read-outs as they are.
    """
    if afresh:
        start_read_outs(model, z, batch)
    parameters = [*model.read_out.parameters(), *model.observation.parameters()]
    # A short memory of the gradients' scale: they shrink by orders of magnitude as the noise is found.
    optimizer = adam(parameters, lr=0.1, betas=(0.8, 0.99))
    schedule = one_cycle(optimizer, num_steps)
    trials = max(1, min(z.shape[1], ELEMENTS // batch.observations[:, 0].numel()))
    for _ in range(num_steps):
        rows = slice(None) if trials == z.shape[1] else torch.randperm(z.shape[1], generator=rng)[:trials]
        y = model.likelihood(model.read_out(z[:, rows], batch.recording, batch.width), batch.recording)
        mask = batch.mask[:, rows]
        total = observed(y, mask).log_prob(batch.observations[:, rows]).sum()
        if prior is not None:
            share = trials / z.shape[1]
            total = total + share * prior.of_batch(model, batch)
        loss = -total / mask.sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def refit_read_outs(
    model,
    z: Tensor,
    batch: Batch,
    *,
    num_steps: int = 3,
    ridge: float = 1.0,
    prior: ReadOutPrior | None = None,
) -> list[Tensor]:
    """The likeliest read-outs given the states by Newton's steps on all of the data, from where they are, in place.

    Exact where :func:`fit_read_outs` takes noisy steps; for families of single neurons, whose own parameters stay.
    Steps are halved for neurons that they do not help. Silent neurons, of which there is no likeliest, stay as they
    are.

    Args:
        model: whose ``read_out`` is fitted.
        z: states ``(R, K, T, latent_dim)``; draws from their posterior are as good as the posterior.
        batch: what was observed then.
        num_steps: of Newton's.
        ridge: precision of a Normal prior, of the weights around zero and of a tenth of it of the biases around where
            they are.
        prior: in place of that.

    Returns:
        the information of the data about the read-outs where they end, ``(N_i, latent_dim + 1, latent_dim + 1)``: the
        curvature of a neuron's log likelihood.
    """
    informations = []
    for r, name in enumerate(batch.names):
        place = model.read_out.neurons.slice(name)
        x = torch.cat([z[r], torch.ones_like(z[r][..., :1])], -1).flatten(0, 1)  # (bins, d + 1)
        squares = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(1)
        rows = torch.cat([model.read_out.weight[place], model.read_out.bias[place].unsqueeze(-1)], -1)
        if prior is None:
            diagonal = x.new_full((x.shape[-1],), ridge)
            diagonal[-1] *= 0.1
            penalty = diagonal.diag()
            origin = torch.cat([torch.zeros_like(rows[:, :-1]), rows[:, -1:]], -1)
        else:
            origin, penalty = prior.of_rows(model.observation.kinds[place], name)
        share, best = torch.ones_like(rows[:, :1]), None
        for _ in range(num_steps + 1):
            parts = curvature(model, (x @ rows.mT).view(*z[r].shape[:2], -1), batch, r)
            log_prob, slope, second = (part.flatten(0, 1) for part in parts)
            change = rows - origin
            pull = (penalty @ change.unsqueeze(-1)).squeeze(-1)
            total = log_prob.sum(0, dtype=torch.float64) - 0.5 * (pull * change).sum(-1)
            information = (second.mT @ squares).unflatten(-1, penalty.shape[-2:])
            step = torch.linalg.solve(information + penalty, (slope.mT @ x - pull).unsqueeze(-1)).squeeze(-1)
            # A neuron that has not fired would go on to minus infinity, a little with every call.
            step = step * (torch.maximum(second.sum(0), slope.sum(0).abs()) >= LEAST).unsqueeze(-1)
            # Exponentials are as expanded where predictors change by one; of longer steps the logarithm.
            far = (x @ step.mT).abs().amax(0).clamp(min=1.0).unsqueeze(-1)
            step = step * ((1 + far.log()) / far)
            better = (total > best[2] if best else total == total).unsqueeze(-1)
            share = torch.where(better, (2 * share).clamp(max=1.0), 0.5 * share)
            if best:
                rows, step = (torch.where(better, a, b) for a, b in zip((rows, step), best[:2], strict=True))
                total = torch.maximum(total, best[2])
                information = torch.where(better.unsqueeze(-1), information, best[3])
            best = rows, step, total, information
            rows = rows + share * step
        assert best is not None
        model.read_out.weight[place], model.read_out.bias[place] = best[0][:, :-1], best[0][:, -1]
        informations.append(best[3])
    return informations


def in_latents(read_out, frame: Tensor, offset: Tensor, batch: Batch) -> SimpleNamespace:
    """From read-outs of canonical coordinates to those of the latents, ``c = F b`` and ``d = m + o b``.

    Args:
        read_out: of all recordings.
        frame, offset: ``F (R, d, d)`` and ``o (R, d)``.
        batch: of which recordings.

    Returns:
        ``neurons``, ``weight`` and ``bias``, as ``read_out`` has them.
    """
    weight, bias = read_out.weight.detach().clone(), read_out.bias.detach().clone()
    for r, name in enumerate(batch.names):
        rows = read_out.neurons.slice(name)
        bias[rows] += weight[rows] @ offset[r]
        weight[rows] = weight[rows] @ frame[r].mT
    return SimpleNamespace(neurons=read_out.neurons, weight=weight, bias=bias)


@torch.no_grad()
def write_read_outs(model, frame: Tensor, offset: Tensor, batch: Batch) -> None:
    """The model's read-outs of canonical coordinates into those of the latents: :func:`in_latents`, in place."""
    turned = in_latents(model.read_out, frame, offset, batch)
    model.read_out.weight.copy_(turned.weight)
    model.read_out.bias.copy_(turned.bias)


@torch.no_grad()
def start_read_outs(model, z: Tensor, batch: Batch) -> None:
    """Least squares; for neurons with another link than the identity, no tuning and each one's mean."""
    read_out = model.read_out
    predictor = read_out(z[:, :8, :1], batch.recording, batch.width)
    mean = model.likelihood(predictor, batch.recording).mean
    identity = torch.isclose(mean, predictor).all(2).all(1)  # (R, N)
    for r, name in enumerate(batch.names):
        rows, width = read_out.neurons.slice(name), batch.num_neurons[r]
        mask = batch.mask[r, ..., :width]
        seen = mask.any(-1)
        mask, y = mask[seen], batch.observations[r, ..., :width][seen]  # zero where a neuron is missing
        count = mask.sum(0)
        counts = ((y >= 0) & (y == y.round())).all(0)  # about the link's scale
        start = ((y.sum(0) + 0.5) / count.clamp(min=1)).log().where(counts, torch.nan)
        at = model.observation.predictor_at(y.sum(0) / count.clamp(min=1), rows)
        if at is not None:
            start = torch.where(at.isnan(), start, torch.where((count > 0) & ~at.isinf(), at, 0.0))
        linear = identity[r, :width] | start.isnan()
        if not linear.any():
            read_out.weight[rows], read_out.bias[rows] = 0.0, start
            continue
        design = torch.cat([z[r], torch.ones_like(z[r][..., :1])], -1)[seen]
        moment = (design.mT @ y).mT.unsqueeze(-1)  # (N, d + 1, 1)
        if mask.all():
            gram = (design.mT @ design).unsqueeze(0)
        else:
            squares = (design.unsqueeze(-1) * design.unsqueeze(-2)).flatten(1)
            gram = (mask.to(y.dtype).mT @ squares).unflatten(1, (design.shape[1], -1))
        mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-6)
        gram = gram + 1e-4 * mean[:, None, None] * torch.eye(design.shape[1]).to(gram)
        solution = torch.linalg.solve(gram, moment).squeeze(-1)
        read_out.weight[rows] = solution[:, :-1].where(linear.unsqueeze(-1), 0.0)
        read_out.bias[rows] = torch.where(linear, solution[:, -1], start)
