"""Starting from the data: latent frames, dynamics and embeddings first, then read-outs; the full model comes after.

Plain SVI on many recordings reconstructs long before it forecasts, because every recording's latent frame is arbitrary.
The start ties the frames: (1) per recording a subspace of its neurons in a canonical orientation, (2) roll-outs of the
shared, adapted dynamics in these frames, which are learned on top together with an amortised embedding, (3) the
read-out of every neuron from its recording's frame, through the model's own likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pyro_metassm.dynamics import AdaptedMLP
from pyro_metassm.guides.encoders import smooth
from pyro_metassm.optimizers import adam, one_cycle
from pyro_metassm.recordings import Batch, Recordings

RIDGE = (
    0.02  # of the largest variance: keeps directions that hold only noise from being blown up by whitening
)
READ_OUT_ELEMENTS = 500_000  # observations a step of the read-outs' regression
LOOK = 10  # steps between two looks at the loss: a look makes the host wait for a GPU
KERNELS = (0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # sd in bins


@dataclass(frozen=True)
class Frame:
    """Canonical coordinates of one recording, ``w = features @ weight + bias``, about unit variance."""

    weight: Tensor  # (N, latent_dim)
    bias: Tensor  # (latent_dim,)


def canonical_frame(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Whiten a recording's projections and orient them by their flow.

    With white ``w``, the one-step operator ``A = E[w_t (w_{t+1} - w_{t-1})^T] / 2`` does not depend on the basis in
    which a system was observed: the eigenvectors of its symmetric part (ascending) are the axes, the signs of its
    antisymmetric part fix reflections, so that similar systems get similar frames.

    Args:
        x: ``(K, T, d)``.
        seen: ``(K, T)`` bool.

    Returns:
        ``matrix (d, d)`` and ``offset (d,)`` with ``w = x @ matrix + offset``.
    """
    flat = x[seen]
    mean = flat.mean(0)
    cov = (flat - mean).mT @ (flat - mean) / len(flat)
    values, vectors = torch.linalg.eigh(cov)
    whiten = vectors * (values.clamp(min=0) + RIDGE * values[-1].clamp(min=1e-12)).rsqrt()
    w = (x - mean) @ whiten
    both = (seen[:, 2:] & seen[:, 1:-1] & seen[:, :-2]).unsqueeze(-1)
    if both.any():
        change = (w[:, 2:] - w[:, :-2]) * both
        operator = torch.einsum("ktd,kte->de", w[:, 1:-1] * both, change) / (2 * both.sum())
    else:  # trials of one or two bins say nothing of a flow
        operator = torch.zeros_like(cov)
    axes = torch.linalg.eigh((operator + operator.mT) / 2)[1]
    turn = axes.mT @ ((operator - operator.mT) / 2) @ axes
    signs = torch.ones(len(turn), dtype=x.dtype, device=x.device)
    for axis in range(1, len(turn)):
        rotation = signs[axis - 1] * turn[axis - 1, axis]
        signs[axis] = -1.0 if rotation < 0 else 1.0
    matrix = whiten @ (axes * signs)
    return matrix, -mean @ matrix


def lagged_subspace(features: Tensor, seen: Tensor, dim: int) -> Tensor:
    """Directions of the neurons that vary together over time, ``(N, dim)``, orthonormal, largest first.

    Eigenvectors of the symmetrised covariance between neighbouring bins, which noise that is independent from bin to
    bin does not enter. Fewer neurons than ``dim``: the rest are zeros.
    """
    if features.shape[1] > 1:
        a, b = features[:, :-1], features[:, 1:]
        lagged = torch.einsum("ktn,ktm->nm", a, b) / (seen[:, :-1] & seen[:, 1:]).sum().clamp(min=1)
    else:
        lagged = torch.einsum("ktn,ktm->nm", features, features) / seen.sum().clamp(min=1)
    _, vectors = torch.linalg.eigh((lagged + lagged.mT) / 2)
    basis = features.new_zeros(features.shape[-1], dim)
    count = min(dim, features.shape[-1])
    basis[:, :count] = vectors.flip(-1)[:, :count]
    return basis


def noise_share(x: Tensor, seen: Tensor) -> Tensor:
    """Share of the variance of ``x (K, T, d)`` that is independent from bin to bin, from its covariance at lags 0-2."""

    def covariance(lag: int) -> Tensor:
        a, b = x[:, : x.shape[1] - lag], x[:, lag:]
        both = (seen[:, : x.shape[1] - lag] & seen[:, lag:]).unsqueeze(-1)
        return (a * b * both).sum() / both.sum().clamp(min=1)

    # For a smooth signal c(lag) = c(0) - a lag^2 near 0; what the variance has beyond that is noise.
    return 1 - (4 * covariance(1) - covariance(2)) / (3 * covariance(0)).clamp(min=1e-12)


def initialise(
    model,
    guide,
    recs: Recordings,
    *,
    num_steps: int,
    seed: int,
    device: torch.device,
    on_step: Callable[[float], None],
) -> None:
    """Start ``model`` and ``guide`` in place from the training data.

    Args:
        model, guide: as given to :func:`pyro_metassm.fit`, already on ``device``.
        recs: the training recordings.
        num_steps: steps of the dynamics-first stage.
        seed: of the windows drawn.
        device: where to compute.
        on_step: called after every step with the roll-out loss, which is read every tenth step.
    """
    dtype = model.process_noise.log_scale.dtype
    batch = recs.batch(model.names, dtype=dtype, device=device)
    with torch.no_grad():
        seen = batch.mask & batch.held_in[:, None, None, :]
        features = guide.read_in.features(batch)
        bins = seen.any(-1)  # (R, K, T)
        frames, w = _frames(features, bins, model.latent_dim, guide)
    stage = DynamicsFirst(model, guide, w, bins)
    rng = torch.Generator().manual_seed(seed)
    stage.run(num_steps, rng, on_step)
    _write_read_in(guide, stage, frames, batch)
    with torch.no_grad():
        _, z, _ = guide.common_space(batch)
        _write_noise(model, guide, z, bins, stage, batch)
    _fit_read_outs(model, z, batch, rng)


def _frames(features: Tensor, bins: Tensor, dim: int, guide) -> tuple[list[Frame], Tensor]:
    bases = [lagged_subspace(f, b, dim) for f, b in zip(features, bins, strict=True)]
    x = torch.stack([f @ basis for f, basis in zip(features, bases, strict=True)])
    guide.smoothing.fill_(_smoothing(x, bins))
    x = smooth(x, bins.unsqueeze(-1).to(x.dtype), float(guide.smoothing))
    frames, w = [], []
    for basis, projected, seen in zip(bases, x, bins, strict=True):
        matrix, offset = canonical_frame(projected, seen)
        frames.append(Frame(basis @ matrix, offset))
        w.append(projected @ matrix + offset)
    return frames, torch.stack(w)


def _smoothing(x: Tensor, bins: Tensor) -> float:
    """Width of the kernel that predicts a bin best from its neighbours; 0 where there is next to no noise."""
    share = torch.stack([noise_share(a, b) for a, b in zip(x, bins, strict=True)]).mean()
    if share < 0.05 or x.shape[-2] < 3:
        return 0.0
    weight = bins.unsqueeze(-1).to(x.dtype)
    scale = ((x**2) * weight).sum((1, 2, 3), keepdim=True).clamp(min=1e-12)
    errors = [(((smooth(x, weight, sd, leave_out=True) - x) ** 2) * weight / scale).sum() for sd in KERNELS]
    return KERNELS[int(torch.stack(errors).argmin())]


class DynamicsFirst(nn.Module):
    """Roll-outs of the adapted dynamics in learned frames, ``w = z F + o``, with an amortised embedding.

    Loss: the squared error of noise-free roll-outs against the canonical coordinates ``w`` (unit variance), over
    lengths that grow from 5 to 25 bins, plus a small weight on the KL of the embedding.
    """

    windows = 32  # per recording and step
    lengths = (5, 25)
    kl_weight = 1e-4
    rates = (1e-2, 3e-2)  # peak learning rates of the networks and of the frames

    def __init__(self, model, guide, w: Tensor, bins: Tensor):
        super().__init__()
        num, _, _, dim = w.shape
        self.parts = (model, guide)  # in a tuple: not ours
        self.w, self.bins = w, bins
        times = torch.arange(1, bins.shape[-1] + 1, device=w.device)
        self.ends = (bins * times).amax(-1)  # (R, K): one after the last bin with data
        self.trials_with_data = bins.any(-1).to(torch.float32).cpu()
        self.frame = nn.Parameter(torch.eye(dim, dtype=w.dtype, device=w.device).repeat(num, 1, 1))
        self.offset = nn.Parameter(w.new_zeros(num, dim))
        step = (w[:, :, 1:] - w[:, :, :-1])[bins[:, :, 1:] & bins[:, :, :-1]]
        if len(step) and hasattr(guide.encode_embedding, "step_scale"):
            guide.encode_embedding.step_scale.copy_(step.std(0).clamp(min=1e-3))

    def states(self, w: Tensor) -> Tensor:
        """Canonical coordinates ``(R, ..., d)`` to latents."""
        flat = (w.flatten(1, -2) - self.offset.unsqueeze(1)) @ torch.linalg.inv_ex(self.frame).inverse
        return flat.reshape(w.shape)

    def run(self, num_steps: int, rng: torch.Generator, on_step: Callable[[float], None]) -> None:
        model, guide = self.parts
        own = {id(p) for part in (model.read_out, model.observation) for p in part.parameters()}
        networks = [p for p in model.parameters() if id(p) not in own] + list(
            guide.encode_embedding.parameters()
        )
        parts = (networks, [self.frame, self.offset])
        optimizer = adam([{"params": p, "lr": r} for p, r in zip(parts, self.rates, strict=True)])
        schedule = one_cycle(optimizer, num_steps)
        seen = float("nan")
        for step in range(num_steps):
            share = min(1.0, 2 * step / max(num_steps, 1))
            length = min(
                round(self.lengths[0] + share * (self.lengths[1] - self.lengths[0])), self.w.shape[-2] - 1
            )
            loss = self.loss(max(length, 1), rng)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for part in parts for p in part], 1.0)
            optimizer.step()
            schedule.step()
            if step == 0 or (step + 1) % LOOK == 0:
                seen = float(loss.detach())
            on_step(seen)

    def loss(self, length: int, rng: torch.Generator) -> Tensor:
        model, _ = self.parts
        e, kl = self.embedding(rng)
        dynamics = model.adapt_dynamics(e)
        target, weight = self.draw_windows(length, rng)  # (R, V, L+1, d), (R, V, L+1)
        rolled = roll_out(dynamics, self.states(target[..., :1, :]), length)
        predicted = (rolled.flatten(1, 2) @ self.frame + self.offset.unsqueeze(1)).reshape(rolled.shape)
        error = ((predicted - target[..., 1:, :]) ** 2).mean(-1).clamp(max=4.0)
        valid = weight[..., 1:] * weight[..., :1]
        return (error * valid).sum() / valid.sum().clamp(min=1) + self.kl_weight * kl

    def embedding(self, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A draw of every recording's embedding from a few random trials, ``(R, 1, embedding_dim)``, and its KL."""
        _, guide = self.parts
        num, trials, bins, _ = self.w.shape
        count = int(torch.randint(1, min(8, trials) + 1, (), generator=rng))
        rows = self._trials(count, rng)
        crop = int(torch.randint(min(50, bins), min(150, bins) + 1, (), generator=rng))
        start = int(torch.randint(0, bins - crop + 1, (), generator=rng))
        pick = torch.arange(num, device=self.w.device)[:, None]
        seen = self.bins[pick, rows, start : start + crop].unsqueeze(-1)
        mean, variance = guide.encode_embedding(self.states(self.w[pick, rows, start : start + crop]), seen)
        mean, variance = mean.mean(1, keepdim=True), variance.mean(1, keepdim=True)
        e = mean + variance.sqrt() * torch.randn(mean.shape, generator=rng, dtype=mean.dtype).to(mean.device)
        return e, 0.5 * (mean**2 + variance - 1 - variance.log()).sum(-1).mean()

    def draw_windows(self, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        num, _, bins, _ = self.w.shape
        rows = self._trials(self.windows, rng).unsqueeze(-1)
        pick = torch.arange(num, device=self.w.device)[:, None, None]
        start = torch.rand(num, self.windows, 1, generator=rng).to(self.w.device)
        start = (start * (self.ends[pick, rows] - length).clamp(min=1)).long().clamp(max=bins - length - 1)
        times = start + torch.arange(length + 1, device=self.w.device)
        return self.w[pick, rows, times], self.bins[pick, rows, times].to(self.w.dtype)

    def _trials(self, count: int, rng: torch.Generator) -> Tensor:
        """Random trials that have data, ``(R, count)``, with replacement."""
        rows = torch.multinomial(self.trials_with_data, count, replacement=True, generator=rng)
        return rows.to(self.w.device)


def roll_out(dynamics: Callable[[Tensor], Tensor], z: Tensor, num_steps: int, bound: float = 10.0) -> Tensor:
    """What follows ``z (R, V, 1, d)`` without noise, ``(R, V, num_steps, d)``; clamped, so that nothing explodes."""
    if isinstance(dynamics, AdaptedMLP):
        return dynamics.rollout(z, num_steps, bound)
    path = []
    for _ in range(num_steps):
        z = dynamics(z).clamp(-bound, bound)
        path.append(z)
    return torch.cat(path, -2)


@torch.no_grad()
def _write_read_in(guide, stage: DynamicsFirst, frames: list[Frame], batch: Batch) -> None:
    """``z = (w - o) F^-1 = features @ (weight F^-1) + (bias - o) F^-1`` into the first channels of the read-in."""
    inverse = torch.linalg.inv(stage.frame)
    dim = inverse.shape[-1]
    read_in = guide.read_in
    for r, (name, frame) in enumerate(zip(batch.names, frames, strict=True)):
        rows, row = read_in.neurons.slice(name), int(batch.recording[r])
        read_in.weight[rows] = 0.0
        # The read-in divides by the root of the number of neurons; projections so far were plain sums.
        read_in.weight[rows, :dim] = (
            frame.weight[: batch.num_neurons[r]] @ inverse[r] * batch.held_in[r].sum().sqrt()
        )
        read_in.bias[row] = 0.0
        read_in.bias[row, :dim] = (frame.bias - stage.offset[r]) @ inverse[r]


def _write_noise(model, guide, z: Tensor, bins: Tensor, stage: DynamicsFirst, batch: Batch) -> None:
    """Process noise from the one-step residuals, first state from the first bins."""
    statistics = guide.embedding_statistics(z, bins.unsqueeze(-1), batch)
    e = statistics.unsqueeze(-2).chunk(2, -1)[0]
    both = bins[:, :, 1:] & bins[:, :, :-1]
    if both.any():
        residual = (z[:, :, 1:] - model.adapt_dynamics(e)(z[:, :, :-1]))[both]
        model.process_noise.log_scale.copy_(residual.std(0).clamp(0.01, 1.0).log())
    first = z[:, :, 0][bins[:, :, 0]]
    if len(first) > 1:
        model.initial.loc.copy_(first.mean(0))
        model.initial.log_scale.copy_(first.std(0).clamp(min=0.05).log())


def _fit_read_outs(model, z: Tensor, batch: Batch, rng: torch.Generator, num_steps: int = 80) -> None:
    """Maximise the model's own likelihood of every neuron given the frame: a regression in the given family."""
    read_out = model.read_out
    with torch.no_grad():
        for r, name in enumerate(batch.names):
            rows = read_out.neurons.slice(name)
            width = batch.num_neurons[r]
            seen = batch.mask[r, ..., :width]
            y = batch.observations[r, ..., :width]
            design = torch.cat([z[r], torch.ones_like(z[r][..., :1])], -1)[seen.any(-1)]
            target = y[seen.any(-1)]
            if (target >= 0).all() and (target == target.round()).all():  # counts: about the link's scale
                level = (target.mean(0) + 0.5 / len(target)).log()
                read_out.weight[rows] = 0.0
                read_out.bias[rows] = level
            else:
                gram = design.mT @ design
                gram.diagonal().add_(1e-4 * gram.diagonal().mean())
                solution = torch.linalg.solve(gram, design.mT @ target)
                read_out.weight[rows] = solution[:-1].mT
                read_out.bias[rows] = solution[-1]
    parameters = [*read_out.parameters(), *model.observation.parameters()]
    # A short memory of the gradients' scale: they shrink by orders of magnitude as the noise is found.
    optimizer = adam(parameters, lr=0.1, betas=(0.8, 0.99))
    schedule = one_cycle(optimizer, num_steps)
    trials = max(1, min(z.shape[1], READ_OUT_ELEMENTS // batch.observations[:, 0].numel()))
    for _ in range(num_steps):
        rows = slice(None) if trials == z.shape[1] else torch.randperm(z.shape[1], generator=rng)[:trials]
        y = model.likelihood(read_out(z[:, rows], batch.recording, batch.width), batch.recording)
        mask = batch.mask[:, rows] if not y.event_shape else batch.mask[:, rows].any(-1)
        loss = -(y.log_prob(batch.observations[:, rows]) * mask).sum() / mask.sum().clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
