"""Where a new recording lies in a fitted family: frames searched for from many starts that the model itself draws.

With everything shared frozen, a new recording is known up to the affine map from its canonical coordinates to the
latents, ``latent_dim (latent_dim + 1)`` numbers whatever the number of neurons. They are searched for:

1. many starts: the fitted model is run from its initial states at embeddings of its recordings, as many trials as there
   are data; the canonical frame of such a simulation is a guess of the new recording's, since canonical coordinates do
   not depend on who observed;
2. the likely ones are improved by gradient: roll-outs of the frozen dynamics, at the embedding that the frozen encoder
   infers, against the data, with the read-outs of the known recordings as a prior;
3. the likeliest is taken; how far the others lie from it is reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_metassm import _machine as machine
from pyro_metassm.frames import Frames, canonical_frame
from pyro_metassm.optimizers import adam, one_cycle
from pyro_metassm.read_outs import ReadOutPrior, common_shift, second_moments
from pyro_metassm.windows import LENGTHS, TiedFrames, Windows, growing, roll_out

JITTER = 0.15  # sd of the embeddings of the starts around those of known recordings, in their spread
FLOOR = (
    0.002  # roll-out error that is the fitted family's own, in variances of latents, whose scale is about one
)
ENCODED = 400  # bins of each recording that a step infers the embedding from
ROUGHLY = 128  # the same while there are many starts: most of the arithmetic is theirs
SIMULATED = 16  # trials, at most, whose canonical frame is a start
ELEMENTS = 2**26  # numbers at a time while starts are judged, for the memory
LOOK = 10  # steps between two looks at the error: a look makes the host wait for a GPU
SCREENED = 24  # windows of each recording that starts are judged by
STAGES = (
    (96, 4, 3e-2),
    (24, 8, 3e-2),
    (8, 32, 1e-2),
)  # (starts kept, windows a step, learning rate): many are judged again once they have moved


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
    recording: Tensor,
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
        recording: ``(R,)`` rows of the model's tables.
        prior: of read-outs from the latents.
        embeddings: means of the known recordings' embeddings, ``(M, embedding_dim)``.
        num_starts: starts of each recording.
        num_steps: gradient steps.
        rng: of everything random.
        on_step: called after every step with the mean roll-out error, which is read every tenth step.
    """
    kept, width = STAGES[0][0], 64  # of the encoders' hidden layers, about
    per_start = max(bins.shape[0] * ENCODED * width, 8 * SIMULATED * frames.coordinates[0, 0].numel())
    at_once = max(1, ELEMENTS // per_start)
    problem: _Search | None = None
    with pyro.validation_enabled(False):  # a start may lie anywhere
        for first in range(0, num_starts, at_once):
            number = min(at_once, num_starts - first)
            frame, offset = _starts(model, frames.coordinates, bins, embeddings, number, rng)
            more = _Search(model, guide, frames, bins, rows, recording, prior, embeddings, frame, offset)
            problem = more if problem is None else problem.joined(more)
            problem.keep(min(kept, len(problem.frame)), rng)
        assert problem is not None
        for number, (kept, num_windows, rate) in enumerate(STAGES):
            problem.keep(min(kept, len(problem.frame)), rng)
            share = (num_steps + len(STAGES) - 1 - number) // len(STAGES)
            problem.run(share, num_windows, rate, rng, on_step, grow=number == 0)
        log_weight, error, e = problem.keep(len(problem.frame), rng)
    # The likeliest as zero: squares of small differences.
    weight, e = log_weight.softmax(0).unsqueeze(-1), (e - e[:1]).nan_to_num()
    spread = ((weight * e.square()).sum(0) - (weight * e).sum(0).square()).clamp(min=0).sqrt()
    error = error[0].where((bins.sum(-1) > 1).any(-1), torch.nan)
    return Found(problem.frame[0].detach(), problem.offset[0].detach(), error, spread)


@torch.no_grad()
def _starts(model, w: Tensor, bins: Tensor, embeddings: Tensor, number: int, rng: torch.Generator):
    """Frames and offsets ``(S, R, ...)`` from canonical frames of simulated trials, seen where the data are."""
    most = bins.sum(-1).topk(min(SIMULATED, bins.shape[1]), -1).indices  # the trials with most data
    bins = bins.take_along_dim(most.unsqueeze(-1), 1)
    trials, time = bins.shape[1:]
    device, dtype, dim = w.device, w.dtype, w.shape[-1]
    spread = embeddings.std(0, correction=0)
    picked = torch.randint(len(embeddings), (number,), generator=rng)
    noise = torch.randn(number, embeddings.shape[-1], generator=rng, dtype=dtype).to(device)
    e = (embeddings[picked.to(device)] + JITTER * spread * noise).unsqueeze(-2)  # (S, 1, embedding_dim)
    seed = int(torch.randint(2**31, (), generator=rng))
    with machine.random_forked(device):
        torch.manual_seed(seed)
        z = model.initial_state(e).expand((number, trials)).sample().unsqueeze(-2)
    path = z if time == 1 else torch.cat([z, roll_out(model.adapt_dynamics(e), z, time - 1)], -2)
    path = path + 0.01 * torch.randn(path.shape, generator=rng, dtype=dtype).to(device)
    same = bool((bins == bins[:1]).all())
    pairs = [
        canonical_frame(path, seen.expand(number, trials, time)) for seen in (bins[:1] if same else bins)
    ]
    pairs = pairs * (len(bins) if same else 1)
    frame, offset = (torch.stack(parts, 1) for parts in zip(*pairs, strict=True))
    # A frame's signs are decided by its flow; with little of it they may come out wrong.
    flip = torch.where(torch.rand(number, 1, 1, dim, generator=rng) < 0.5, -1.0, 1.0).to(w)
    flip[: number // 2] = 1.0
    return frame * flip, offset * flip.squeeze(-2)


def _normal(embeddings: Tensor) -> torch.distributions.Distribution:
    """What the known recordings' embeddings say of another's: a Normal, no narrower than a tenth of the prior."""
    centred = embeddings - embeddings.mean(0)
    covariance = centred.mT @ centred / len(embeddings)
    covariance = covariance + 0.01 * torch.eye(covariance.shape[-1]).to(covariance)
    return torch.distributions.MultivariateNormal(embeddings.mean(0), covariance)


class _Search(TiedFrames):
    """S frames of each of R recordings, and how likely they are."""

    def __init__(self, model, guide, frames, bins, rows, recording, prior, embeddings, frame, offset):
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
        pairs = ((self.frame, other.frame), (self.offset, other.offset))
        return _Search(*self.arguments, *(torch.cat(pair).detach() for pair in pairs))

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
        """Keep the likeliest starts of every recording, best first; their log weights, errors and embeddings."""
        error, e = self.errors(SCREENED * 4 if number <= STAGES[-1][0] else SCREENED, self._length(), rng)
        log_weight, best = self.log_weight(error, e).nan_to_num(nan=-torch.inf).topk(number, 0)
        columns = torch.arange(self.frame.shape[1], device=best.device)
        self.frame = torch.nn.Parameter(self.frame[best, columns])
        self.offset = torch.nn.Parameter(self.offset[best, columns])
        return log_weight, error[best, columns], e[best, columns]

    def _length(self) -> int:
        return growing(1.0, self.windows.longest)
