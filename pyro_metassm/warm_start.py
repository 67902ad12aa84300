"""Starting from the data: latent frames, dynamics and embeddings first, then read-outs; the full model comes after.

Plain SVI on many recordings reconstructs long before it forecasts, because every recording's latent frame is arbitrary.
The start ties the frames: (1) per recording a subspace of its neurons in a canonical orientation, in the scale in which
its neurons' read-outs are as large as other recordings', (2) roll-outs of the shared, adapted dynamics in these frames,
which are learned on top together with an amortised embedding, (3) the read-out of every neuron from its recording's
frame, through the model's own likelihood.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from pyro_metassm.frames import Frames, canonical_frames, roots
from pyro_metassm.laplace_smoother import Chain, log_evidence, smoothed
from pyro_metassm.linear_systems import noisy_counts, regressed, through_linear_systems
from pyro_metassm.optimizers import adam, one_cycle, skip_where
from pyro_metassm.read_outs import (
    Units,
    fit_read_outs,
    kinds_of,
    refit_read_outs,
    rows_of,
    second_moments,
    write_read_outs,
)
from pyro_metassm.rebuilding import deviations
from pyro_metassm.recordings import Batch, Recordings, sample_trials
from pyro_metassm.teaching import teach
from pyro_metassm.tempering import tempered
from pyro_metassm.windows import BOUND, TiedFrames, Windows, growing

OBSERVATIONS = 2**25  # smoothed again and again where data are noisy, about,
LEAST_TRIALS = 8  # but no fewer trials of a recording
SETTLING = 2  # rounds of smoothing with the learned dynamics and of read-outs
SHARES = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02)  # of the process noise that draws leave
LOOK = 10  # steps between two looks at the loss: a look makes the host wait for a GPU
NUMBERS = (
    2**29
)  # observations that the start holds at a time, padding included; of larger pools it takes some trials


def initialise(
    model,
    guide,
    recs: Recordings,
    *,
    num_steps: int,
    seed: int,
    device: torch.device,
    on_step: Callable[[float], bool],
    smooth_counts: bool = False,
) -> None:
    """Start ``model`` and ``guide`` in place from the training data.

    Global sites take part as parameters and their posteriors are centred where these end; inputs of the transition do
    not take part: what they do is left to SVI.

    Args:
        model, guide: as given to :func:`pyro_metassm.fit`, already on ``device``.
        recs: the training recordings.
        num_steps: steps of the dynamics-first stage.
        seed: of the windows drawn.
        device: where to compute.
        on_step: called after every step with the roll-out loss, which is read every tenth step; true ends the stage.
        smooth_counts: start noisy counts from the paths of linear systems.
    """
    with guide.global_sites.as_parameters(model):
        _initialise(model, guide, recs, num_steps, seed, device, on_step, smooth_counts)


def _initialise(model, guide, recs, num_steps, seed, device, on_step, smooth_counts) -> None:
    dtype = model.process_noise.log_scale.dtype
    batch = recs.batch(model.names, trials=starting_trials(recs), dtype=dtype, device=device)
    with torch.no_grad():
        seen = batch.mask & batch.held_in[:, None, None, :]
        bins = seen.any(-1)  # (R, K, T)
        frames = canonical_frames(guide.read_in.features(batch), bins, model.latent_dim)
        guide.smoothing[batch.recording] = torch.tensor(frames.smoothing).to(guide.smoothing)
    rng = torch.Generator().manual_seed(seed)
    if smooth_counts and noisy_counts(model, guide, frames, batch):
        _initialise_smoothed(model, guide, recs, frames, batch, bins, num_steps, seed, rng, on_step)
        return
    fit_read_outs(model, frames.coordinates, batch, rng)
    stage = DynamicsFirst(model, guide, frames.coordinates, bins, batch.recording, _tuning(model, batch))
    stage.run(num_steps, rng, on_step)
    write_read_in(guide, frames, stage.frame, stage.offset, batch)
    write_read_outs(model, stage.frame, stage.offset, batch)
    with torch.no_grad():
        _, z, _ = guide.common_space(batch)
        _write_noise(model, guide, z, bins, batch)
    fit_read_outs(model, z, batch, rng, num_steps=40, afresh=False)


def _initialise_smoothed(model, guide, recs, frames, every, bins, num_steps, seed, rng, on_step) -> None:
    """Dynamics from paths of linear systems, then from paths that they themselves smooth; read-outs of all trials."""
    batch, features, bins = _some_trials(recs, model, guide, every, bins, seed)
    linear = through_linear_systems(model, features, frames.of(features, bins), bins, batch)
    frames = linear.frames
    tuning = _tuning(model, batch)
    stage = DynamicsFirst(model, guide, linear.paths, bins, batch.recording, tuning, frames.coordinates)
    stage.run(num_steps - num_steps // 2, rng, on_step)
    frame, offset = stage.frame.detach().clone(), stage.offset.detach().clone()
    write_read_outs(model, frame, offset, batch)
    with torch.no_grad():
        e = _embeddings(guide, stage.states(frames.coordinates), bins, batch)
        paths, draws = stage.states(linear.paths), stage.states(linear.draws)
        write_likeliest_noise(model, e, paths, draws, batch)
        for _ in range(SETTLING):
            paths, draws = smoothed_by(model, e, paths, batch)
            refit_read_outs(tempered(model), draws, batch)
        w = stage.coordinates(paths)
    frames = regressed(features, w, bins, frames.smoothing)
    stage.windows, stage.read = Windows(w, bins), Windows(frames.coordinates, bins)
    stage.run(num_steps // 2, rng, on_step)
    write_read_in(guide, frames, stage.frame, stage.offset, batch)
    with torch.no_grad():
        inverse = torch.linalg.inv(frame)
        moved = ((stage.offset - offset).unsqueeze(-2) @ inverse).squeeze(-2)
        write_read_outs(model, stage.frame @ inverse, moved, batch)
        e = _embeddings(guide, stage.states(frames.coordinates), bins, batch)
        paths, draws = stage.states(w), stage.states(TiedFrames(frame, offset).coordinates(draws))
        write_likeliest_noise(model, e, paths, draws, batch)
        _, z, _ = guide.common_space(every)
        for _ in range(SETTLING):
            z, draws = smoothed_by(model, e, z, every)
            _write_first_states(model, draws, every.time_mask)
            refit_read_outs(tempered(model), draws, every)
    if list(model.observation.parameters()):
        fit_read_outs(model, draws, every, rng, num_steps=40, afresh=False)
        refit_read_outs(tempered(model), draws, every)
    teach(model, guide, draws, e, every, rng)


def _tuning(model, batch: Batch) -> Tensor:
    """Second moments of the read-outs of a batch's recordings."""
    return second_moments([r[:, :-1] for r in _comparable_rows(model, batch)])


def _embeddings(guide, z: Tensor, bins: Tensor, batch: Batch) -> Tensor:
    """``(R, 1, embedding_dim)``."""
    return guide.embedding_statistics(z, bins.unsqueeze(-1), batch).unsqueeze(-2).chunk(2, -1)[0]


def _some_trials(recs: Recordings, model, guide, batch: Batch, bins: Tensor, seed: int):
    """As many trials as paths are smoothed of: their batch, features, and bins where anything was seen."""
    number = max(LEAST_TRIALS, OBSERVATIONS // batch.observations[:, 0].numel())
    if number < batch.num_trials:
        _, trials = sample_trials(recs, number, np.random.default_rng(seed))
        like = batch.observations
        batch = recs.batch(model.names, trials=trials, dtype=like.dtype, device=like.device)
        bins = (batch.mask & batch.held_in[:, None, None, :]).any(-1)
    with torch.no_grad():
        return batch, guide.read_in.features(batch), bins


@torch.no_grad()
def write_likeliest_noise(model, e: Tensor, paths: Tensor, draws: Tensor, batch: Batch) -> None:
    """First states of draws, and the process noise of most evidence: what draws leave is mostly their own spread.

    Args:
        model: whose ``process_noise`` and ``initial`` are written.
        e: embeddings ``(R, 1, embedding_dim)``.
        paths, draws: ``(R, K, T, latent_dim)``.
        batch: the data.
    """
    _write_first_states(model, draws, batch.time_mask)
    dynamics = model.dynamics_of(e, batch.recording)
    both = batch.time_mask[:, :, 1:] & batch.time_mask[:, :, :-1]
    squares = (draws[:, :, 1:] - dynamics(draws[:, :, :-1])).square().where(both.unsqueeze(-1), 0.0)
    # The median of the recordings: one whose paths went astray would decide for all.
    left = (squares.sum((1, 2)) / both.sum((1, 2)).clamp(min=1).unsqueeze(-1)).median(0).values.sqrt()
    part, z = batch.part(trials=slice(LEAST_TRIALS)), paths[:, :LEAST_TRIALS]
    most, best = -torch.inf, left.log()
    for share in SHARES:
        model.process_noise.log_scale.copy_((share * left).clamp(0.002, 1.0).log())
        chain = _chain(model, dynamics)
        path = smoothed(tempered(model), chain, z, part, num_steps=2)
        evidence, z = float(log_evidence(tempered(model), chain, path, part).sum()), path.mean.to(z)
        if evidence < most:
            break
        most, best = evidence, model.process_noise.log_scale.clone()
    model.process_noise.log_scale.copy_(best)


@torch.no_grad()
def smoothed_by(model, e: Tensor, paths: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Paths given the model's dynamics, from where they are, and draws of them; ``(R, K, T, latent_dim)`` both.

    Trials whose paths leave what roll-outs are held to, such as those with bursts of counts, stay where they are.
    """
    paths = paths.clamp(-BOUND, BOUND)
    chain = _chain(model, model.dynamics_of(e, batch.recording))
    number = max(LEAST_TRIALS, OBSERVATIONS // batch.observations[:, 0].numel())
    pairs = []
    for first in range(0, batch.num_trials, number):
        trials = slice(first, first + number)
        path = smoothed(tempered(model), chain, paths[:, trials], batch.part(trials=trials))
        pair = path.mean.to(paths), path.rsample().to(paths)
        within = (torch.cat(pair, -1).abs() <= BOUND).all(-1, keepdim=True).all(-2, keepdim=True)
        pairs.append([torch.where(within, z, paths[:, trials]) for z in pair])
    mean, draws = (torch.cat(parts, 1) for parts in zip(*pairs, strict=True))
    return mean, draws


def _chain(model, dynamics) -> Chain:
    initial = model.initial
    return Chain(dynamics, model.process_noise().pow(-2).diag(), initial.loc, initial.scale.pow(-2).diag())


def starting_trials(recs: Recordings) -> dict[str, np.ndarray]:
    """The trials to start from: all, or as many of each recording, spread over it, as ``NUMBERS`` have room for."""
    size = max(r.num_bins for r in recs.values()) * max(r.num_neurons for r in recs.values())
    most = max(1, NUMBERS // (len(recs) * size))
    return {
        name: np.linspace(0, r.num_trials - 1, most).round().astype(np.int64)
        for name, r in recs.items()
        if r.num_trials > most
    }


def _comparable_rows(model, batch: Batch) -> list[Tensor]:
    """The read-outs of a batch's recordings, each kind of neurons in its own units."""
    rows, kinds = [r.detach() for r in rows_of(model, batch)], kinds_of(model, batch)
    units = Units.of(rows, kinds, model.observation.num_kinds)
    return [units(r, k) for r, k in zip(rows, kinds, strict=True)]


class DynamicsFirst(TiedFrames):
    """Roll-outs of the adapted dynamics in learned frames, ``w = z F + o``, with an amortised embedding.

    Loss: the squared error of noise-free roll-outs against the canonical coordinates ``w`` (unit variance), over
    lengths that grow from 5 to 25 bins, plus a small weight on the KL of the embedding and a larger one on the
    divergence between the spread of a recording's read-outs and that of all. The latter keeps one scale for all
    recordings: their data alone would let each have its own, and a small oscillation would look as a large one does.

    Args:
        model, guide: what is started.
        w: canonical coordinates ``(R, K, T, d)``.
        bins: ``(R, K, T)`` bool, where anything was seen.
        recording: rows ``(R,)`` of the recordings in the model's tables.
        tuning: second moment of every recording's read-outs from ``w``, ``(R, d, d)``.
        read: coordinates as the guide reads them off the data, from which the embedding is inferred; default ``w``.
    """

    num_windows = 32  # per recording and step
    kl_weight = 1e-4
    tuning_weight = 0.3  # with less of it recordings of one family part: each group of a size of its own
    rates = (1e-2, 3e-2)  # peak learning rates of the networks and of the frames

    def __init__(
        self,
        model,
        guide,
        w: Tensor,
        bins: Tensor,
        recording: Tensor,
        tuning: Tensor,
        read: Tensor | None = None,
    ):
        frame, tuning = natural_frames(tuning)
        super().__init__(frame, w.new_zeros(w.shape[0], w.shape[-1]))
        self.parts = (model, guide)  # in a tuple: not ours
        self.windows, self.recording, self.tuning = Windows(w, bins), recording, tuning
        self.read = self.windows if read is None or read is w else Windows(read, bins)
        with torch.no_grad():
            z = self.states(self.read.w)
            step = (z[:, :, 1:] - z[:, :, :-1])[bins[:, :, 1:] & bins[:, :, :-1]]
        if len(step) > 1 and hasattr(guide.encode_embedding, "step_scale"):
            guide.encode_embedding.step_scale.copy_(step.std(0).clamp(min=1e-3))

    def run(self, num_steps: int, rng: torch.Generator, on_step: Callable[[float], bool]) -> None:
        model, guide = self.parts
        own = {id(p) for part in (model.read_out, model.observation) for p in part.parameters()}
        own |= {id(p) for p in deviations(model)}  # what recordings share comes first: the embedding says it
        networks = [p for p in model.parameters() if id(p) not in own] + list(
            guide.encode_embedding.parameters()
        )
        parts = (networks, [self.frame, self.offset])
        optimizer = adam([{"params": p, "lr": r} for p, r in zip(parts, self.rates, strict=True)])
        schedule = one_cycle(optimizer, num_steps)
        seen = float("nan")
        for step in range(num_steps):
            loss = self.loss(growing(step / max(num_steps, 1), self.windows.longest), rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_([p for part in parts for p in part], 1.0)
            skip_where(optimizer, ~norm.isfinite())
            optimizer.step()
            schedule.step()
            if step == 0 or (step + 1) % LOOK == 0:
                seen = float(loss.detach())
            if on_step(seen):
                break

    def loss(self, length: int, rng: torch.Generator) -> Tensor:
        model, _ = self.parts
        e, kl = self.embedding(rng)
        dynamics = model.dynamics_of(e, self.recording)
        error = self.roll_out_error(dynamics, *self.windows.draw(self.num_windows, length, rng)).mean()
        return error + self.kl_weight * kl + self.tuning_weight * self.tuning_divergence()

    def tuning_divergence(self) -> Tensor:
        """Mean over the recordings of ``KL( Normal(0, F B F^T) || Normal(0, I) )``: their read-outs against all's."""
        moment = self.frame @ self.tuning @ self.frame.mT
        trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
        return 0.5 * (trace - torch.linalg.slogdet(moment)[1] - moment.shape[-1]).mean()

    def embedding(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A draw of every recording's embedding from a few random trials, ``(R, 1, embedding_dim)``, and its KL."""
        _, guide = self.parts
        trials, bins = self.read.w.shape[1:3]
        count = int(torch.randint(1, min(8, trials) + 1, (), generator=rng))
        crop = int(torch.randint(min(50, bins), min(150, bins) + 1, (), generator=rng))
        w, seen = self.read.crops(count, crop, rng)
        mean, variance = guide.encode_embedding(self.states(w), seen)
        mean, variance = mean.mean(1, keepdim=True), variance.mean(1, keepdim=True)
        e = mean + variance.sqrt() * torch.randn(mean.shape, generator=rng, dtype=mean.dtype).to(mean.device)
        return e, 0.5 * (mean**2 + variance - 1 - variance.log()).sum(-1).mean()


def natural_frames(tuning: Tensor) -> tuple[Tensor, Tensor]:
    """Frames in which the read-outs of every recording have the same spread, and latents unit variance on the whole.

    Args:
        tuning: second moments ``B (R, d, d)`` of the read-outs from canonical coordinates.

    Returns:
        the symmetric ``F (R, d, d)`` with ``F B F^T = s^2 I``, and ``B / s^2``; directions that no neuron reads get a
        little of the largest. Where the recordings' latents differ in size, ``s`` is such that their mean square is
        one.
    """
    root, inverse = roots(tuning)
    square = root.square().sum((-1, -2)).mean() / root.shape[-1]
    return inverse * square.sqrt(), root @ root / square


@torch.no_grad()
def write_read_in(guide, frames: Frames, frame: Tensor, offset: Tensor, batch: Batch) -> None:
    """``z = (w - o) F^-1 = features @ (weight F^-1) + (bias - o) F^-1`` into the first channels of the read-in."""
    inverse = torch.linalg.inv(frame)
    dim, read_in = inverse.shape[-1], guide.read_in
    for r, name in enumerate(batch.names):
        rows, row = read_in.neurons.slice(name), int(batch.recording[r])
        read_in.weight[rows] = 0.0
        # The read-in divides by the root of the number of neurons; projections so far were plain sums.
        own = frames.weight[r, : batch.num_neurons[r]] @ inverse[r]
        read_in.weight[rows, :dim] = own * batch.held_in[r].sum().to(own.dtype).sqrt()
        read_in.bias[row] = 0.0
        read_in.bias[row, :dim] = (frames.bias[r] - offset[r]) @ inverse[r]


def _write_noise(model, guide, z: Tensor, bins: Tensor, batch: Batch) -> None:
    """Process noise from the one-step residuals, first state from the first bins."""
    e = _embeddings(guide, z, bins, batch)
    both = bins[:, :, 1:] & bins[:, :, :-1]
    if both.any():
        residual = z[:, :, 1:] - model.dynamics_of(e, batch.recording)(z[:, :, :-1])
        variance = residual.square()[both].mean(0)
        # The noise of the frame enters one residual and, with the other sign, the next: their covariance takes it out.
        pairs = both[:, :, 1:] & both[:, :, :-1]
        shared = torch.zeros_like(variance)
        if pairs.any():
            shared = (residual[:, :, 1:] * residual[:, :, :-1])[pairs].mean(0)
            if not guide.smoothing.any():  # noise that is smoothed is not as this has it
                guide.start_posterior(torch.maximum(-shared, 0.05 * variance).sqrt())
        noise = torch.maximum(variance + 2 * shared, 0.05 * variance)
        model.process_noise.log_scale.copy_(noise.sqrt().clamp(0.002, 1.0).log())
    _write_first_states(model, z, bins)


def _write_first_states(model, z: Tensor, bins: Tensor) -> None:
    first = z[:, :, 0][bins[:, :, 0]]
    if len(first) > 1:
        model.initial.loc.copy_(first.mean(0))
        model.initial.log_scale.copy_(first.std(0).clamp(min=0.05).log())
