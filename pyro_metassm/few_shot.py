"""Where a new recording lies in a fitted family: its frame, searched for from many starts.

With everything shared frozen, a new recording is known up to the affine map from its canonical coordinates to the
latents, ``latent_dim (latent_dim + 1)`` numbers whatever the number of neurons. They are searched for:

1. many starts of two kinds (:mod:`~pyro_metassm.starts`): canonical frames of what the fitted model itself draws, since
   canonical coordinates do not depend on who observed; and frames in which read-outs are as large as the known ones,
   which hold where the trials have hardly left rest;
2. the likely ones are improved by gradient: roll-outs of the frozen dynamics, at the embedding that the frozen encoder
   infers, against the data, with the read-outs of the known recordings as a prior;
3. of the last few that is taken for which the data have most evidence (:mod:`~pyro_metassm.frame_evidence`), or that
   rolls out best where the model has no such evidence; how far the others lie from it is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_metassm.frame_evidence import of_frames
from pyro_metassm.frames import Frames
from pyro_metassm.optimizers import adam, one_cycle
from pyro_metassm.read_outs import ReadOutPrior, common_shift, second_moments
from pyro_metassm.recordings import Batch
from pyro_metassm.starts import SIMULATED, simulated_starts, starts_by_read_outs
from pyro_metassm.windows import LENGTHS, TiedFrames, Windows, growing

# Roll-out error that is the fitted family's own, in variances of latents, whose scale is about one.
FLOOR = 0.002
ENCODED = 400  # bins of each recording that a step infers the embedding from
ROUGHLY = 128  # the same while there are many starts: most of the arithmetic is theirs
ELEMENTS = 2**26  # numbers at a time while starts are judged, for the memory
LOOK = 10  # steps between two looks at the error: a look makes the host wait for a GPU
SCREENED = 24  # windows of each recording that starts are judged by
# Starts kept (of each kind until the last), windows a step, learning rate: many are judged again once they have moved.
STAGES = ((48, 4, 3e-2), (12, 8, 3e-2), (8, 32, 1e-2))


@dataclass(frozen=True)
class Found:
    """The likeliest frames of R recordings.

    Attributes:
        frame, offset: ``(R, d, d)`` and ``(R, d)``, as of :class:`~pyro_metassm.windows.TiedFrames`.
        error: mean squared error of roll-outs, in variances, ``(R,)``; NaN without two bins to compare.
        embedding_spread: ``(R, embedding_dim)``, sd over the last starts, weighted by how likely they are.
    """

    frame: Tensor
    offset: Tensor
    error: Tensor
    embedding_spread: Tensor


def search(
    model,
    guide,
    frames: Frames,
    bins: Tensor,
    rows: list[Tensor],
    batch: Batch,
    *,
    prior: ReadOutPrior,
    embeddings: Tensor,
    num_starts: int,
    num_steps: int,
    rng: torch.Generator,
    on_step: Callable[[float], None],
) -> Found:
    """The frame of every new recording, with everything else as it is.

    Args:
        model, guide: fitted; nothing in them is changed.
        frames: canonical frames of the new recordings.
        bins: ``(R, K, T)`` bool, where anything was seen.
        rows: their read-outs from canonical coordinates, ``(N_i, d + 1)`` each, in the units of the prior.
        batch: their data.
        prior: of read-outs from the latents.
        embeddings: means of the known recordings' embeddings, ``(M, embedding_dim)``.
        num_starts: starts of each recording and kind.
        num_steps: gradient steps.
        rng: of everything random.
        on_step: called after every step with the mean roll-out error, which is read every tenth step.
    """
    arguments = (model, guide, frames, bins, rows, batch.recording, prior, embeddings)

    def simulated(number: int) -> _Search:
        frame, offset = simulated_starts(model, frames.coordinates, bins, embeddings, number, rng)
        return _Search(*arguments, frame=frame, offset=offset)

    def by_read_outs(number: int) -> _Search:
        frame, offset = starts_by_read_outs(rows, prior, number, rng)
        return _Search(*arguments, frame=frame, offset=offset)

    at_once = _starts_at_once(frames, bins)
    with pyro.validation_enabled(False):  # a start may lie anywhere
        # Apart until they have moved: before, the one that is right may look the worse.
        kinds = [_screened(of, num_starts, at_once, rng) for of in (simulated, by_read_outs)]
        for number, (kept, num_windows, rate) in enumerate(STAGES):
            if number == len(STAGES) - 1:
                kinds = [kinds[0].joined(kinds[1])]
            steps = (num_steps + len(STAGES) - 1 - number) // len(STAGES)
            for problem in kinds:
                problem.keep(kept, rng)
                # A step of both kinds is told once.
                tell = on_step if problem is kinds[0] else lambda error: None
                problem.run(steps, num_windows, rate, rng, tell, grow=number == 0)
        (problem,) = kinds
        log_weight, error, e = problem.keep(kept, rng)
        evidence = of_frames(model, guide, frames, problem, bins, batch)
        if evidence is not None:
            known = evidence + problem.known.log_prob(e) + problem.log_prior().detach()
            log_weight = _in_place_of(log_weight, known)
    best = log_weight.argmax(0), torch.arange(log_weight.shape[1], device=log_weight.device)
    # The likeliest as zero: squares of small differences.
    weight, e = log_weight.softmax(0).unsqueeze(-1), (e - e[best]).nan_to_num()
    spread = ((weight * e.square()).sum(0) - (weight * e).sum(0).square()).clamp(min=0).sqrt()
    error = error[best].where((bins.sum(-1) > 1).any(-1), torch.nan)
    return Found(problem.frame[best].detach(), problem.offset[best].detach(), error, spread)


def _in_place_of(log_weight: Tensor, better: Tensor) -> Tensor:
    """The ``better`` log weights ``(S, R)`` of every recording for which any of them is finite."""
    finite = better.isfinite()
    return better.where(finite, -torch.inf).where(finite.any(0), log_weight)


def _starts_at_once(frames: Frames, bins: Tensor) -> int:
    """Starts that are judged at a time, for the memory."""
    width = 64  # of the encoders' hidden layers, about
    per_start = max(bins.shape[0] * ENCODED * width, 8 * SIMULATED * frames.coordinates[0, 0].numel())
    return max(1, ELEMENTS // per_start)


def _screened(starts: Callable[[int], _Search], number: int, at_once: int, rng: torch.Generator) -> _Search:
    """The likeliest of a number of starts, judged a few at a time."""
    problem: _Search | None = None
    for first in range(0, number, at_once):
        more = starts(min(at_once, number - first))
        problem = more if problem is None else problem.joined(more)
        problem.keep(STAGES[0][0], rng)
    assert problem is not None
    return problem


def _normal(embeddings: Tensor) -> torch.distributions.Distribution:
    """What the known recordings' embeddings say of another's: a Normal, no narrower than a tenth of the prior."""
    centred = embeddings - embeddings.mean(0)
    covariance = centred.mT @ centred / len(embeddings)
    covariance = covariance + 0.01 * torch.eye(covariance.shape[-1]).to(covariance)
    return torch.distributions.MultivariateNormal(embeddings.mean(0), covariance)


class _Search(TiedFrames):
    """S frames of each of R recordings, and how likely they are."""

    def __init__(
        self, model, guide, frames, bins, rows, recording, prior, embeddings, *, frame: Tensor, offset: Tensor
    ):
        super().__init__(frame, offset)
        self.arguments = (model, guide, frames, bins, rows, recording, prior, embeddings)
        self.parts, self.recording = (model, guide), recording
        self.first, self.starts = frames.coordinates[:, :, :1], bins[:, :, 0]  # the first bins of trials
        self.known = _normal(embeddings)
        self.windows = Windows(frames.coordinates, bins)
        self.prior = prior
        self.moments = second_moments(rows)
        number = torch.tensor([float(len(r)) for r in rows])
        self.concentration = number.clamp(max=prior.concentration).to(frame)
        # Roll-outs of neighbouring bins err together: a window counts as one observation of a state.
        self.observations = bins.sum((-1, -2)).to(frame) * frame.shape[-1] / LENGTHS[1]

    def log_prior(self) -> Tensor:
        """Of the read-outs ``c = F b``, ``d = m + o b``, ``(S, R)``, against the known recordings'.

        ``nu (log |F| - tr(P F B F^T) / 2)``, as a Wishart density has it for the second moment of the ``c``, with
        ``|F|^nu`` the volume of read-outs that a frame stands for; and a Normal density of their common shift.
        """
        turned = torch.cat([self.frame, torch.zeros_like(self.offset).unsqueeze(-1)], -1)
        one = torch.ones_like(self.offset[..., :1])
        turn = torch.cat([turned, torch.cat([self.offset, one], -1).unsqueeze(-2)], -2)
        moments = turn @ self.moments @ turn.mT
        precision = torch.linalg.inv(self.prior.covariance[:-1, :-1])
        square = (precision * moments[..., :-1, :-1]).sum((-1, -2))
        tuning = self.concentration * (torch.linalg.slogdet(self.frame)[1] - 0.5 * square)
        shift = common_shift(moments) - self.prior.shift_mean
        return tuning - 0.5 * (shift @ torch.linalg.inv(self.prior.shift_covariance) * shift).sum(-1)

    def log_weight(self, error: Tensor, e: Tensor) -> Tensor:
        """Log posterior density up to a constant, ``(S, R)``; the size of the errors is unknown and profiled out.

        Roll-outs, the first states of trials under the model, the embedding among the known ones, and the read-outs.
        """
        model, _ = self.parts
        first = model.initial_state(e.unsqueeze(-2)).log_prob(self.states(self.first).squeeze(-2))
        first = (first - torch.linalg.slogdet(self.frame)[1].unsqueeze(-1)) * self.starts
        family = FLOOR * self.frame.square().sum((-1, -2)) / self.frame.shape[-1]  # in canonical coordinates
        roll_outs = -0.5 * self.observations * (error + family).log()
        return roll_outs + first.sum(-1) + self.known.log_prob(e) + self.log_prior()

    def joined(self, other: _Search) -> _Search:
        """The starts of both."""
        frame, offset = torch.cat([self.frame, other.frame]), torch.cat([self.offset, other.offset])
        return _Search(*self.arguments, frame=frame.detach(), offset=offset.detach())

    def errors(self, num_windows: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Roll-out errors ``(S, R)`` and inferred embeddings ``(S, R, embedding_dim)``.

        Of many starts most are given up: their embeddings are inferred from fewer bins, and held in a step's gradient.
        """
        model, guide = self.parts
        last = len(self.frame) <= STAGES[1][0]
        trials, bins = self.windows.w.shape[1:3]
        count = min(4, trials)
        encoded = (ENCODED if last else ROUGHLY) // count
        w, seen = self.windows.crops(count, min(bins, max(1, encoded)), rng)
        z = self.states(w)
        many = z.shape[:2]
        with torch.set_grad_enabled(last and torch.is_grad_enabled()):
            mean, _ = guide.encode_embedding(z.flatten(0, 1), seen.repeat(many[0], 1, 1, 1))
        e = mean.mean(1).unflatten(0, many)
        dynamics = model.dynamics_of(e.unsqueeze(-2), self.recording)
        return self.roll_out_error(dynamics, *self.windows.draw(num_windows, length, rng)), e

    def run(self, num_steps, num_windows, rate, rng, on_step, *, grow: bool) -> None:
        optimizer = adam([self.frame, self.offset], lr=rate)
        schedule = one_cycle(optimizer, num_steps)
        seen = float("nan")
        for step in range(num_steps):
            length = growing(step / num_steps if grow else 1.0, self.windows.longest)
            error, e = self.errors(num_windows, length, rng)
            loss = -(self.log_weight(error, e) / self.observations.clamp(min=1)).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % LOOK == 0:
                seen = float(error.detach().amin(0).mean())
            on_step(seen)

    @torch.no_grad()
    def keep(self, number: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the likeliest starts of every recording, best first; their log weights, errors and embeddings.

        ``number`` of them at most; the last few are judged by more windows.
        """
        number = min(number, len(self.frame))
        error, e = self.errors(SCREENED * 4 if number <= STAGES[-1][0] else SCREENED, self._length(), rng)
        log_weight, best = self.log_weight(error, e).nan_to_num(nan=-torch.inf).topk(number, 0)
        columns = torch.arange(self.frame.shape[1], device=best.device)
        self.frame = torch.nn.Parameter(self.frame[best, columns])
        self.offset = torch.nn.Parameter(self.offset[best, columns])
        return log_weight, error[best, columns], e[best, columns]

    def _length(self) -> int:
        return growing(1.0, self.windows.longest)
