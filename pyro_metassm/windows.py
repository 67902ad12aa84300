"""Random stretches of trials, and frames of recordings whose dynamics are rolled out against them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pyro_metassm.dynamics import AdaptedMLP

LENGTHS = (5, 25)  # bins of roll-outs, at first and from half of the steps on
BOUND = 10.0  # of latents, whose scale is about one
FAR = 10.0  # variances from the mean from which on a bin is no likelier to begin a window


class Windows:
    r"""Stretches of canonical coordinates where trials have data.

    They begin at a bin with probability proportional to ``1 + |w|^2 / d`` (at most ``1 + FAR``): half of them anywhere,
    half by leverage, the bin's share in the second moment of ``w``. States far from rest are few, in the first bins of
    long trials often, and nothing else says what the flow is there; forecasts from there are lost without.

    Args:
        w: ``(R, K, T, d)``, of about unit variance.
        bins: ``(R, K, T)`` bool, where anything was seen.
    """

    def __init__(self, w: Tensor, bins: Tensor):
        self.w, self.bins = w, bins
        time = bins.shape[-1]
        # One after the last bin with data.
        self.ends = (bins * torch.arange(1, time + 1, device=w.device)).amax(-1)
        weight = (1 + w.detach().square().mean(-1).clamp(max=FAR)).where(bins, 0.0)
        self.cumulative = weight.cumsum(-1)
        # Of a recording without data any trial, so that there is something.
        of_trials = self.cumulative[..., -1] + ~bins.any(-1).any(-1, keepdim=True)
        self.of_trials = of_trials.to(torch.float32).cpu()
        self.rows = torch.arange(len(w), device=w.device)[:, None, None]

    @property
    def longest(self) -> int:
        """Steps of the longest window."""
        return max(1, self.w.shape[-2] - 1)

    def draw(self, number: int, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """``number`` windows of each recording, ``(R, V, length + 1, d)``, and which of their bins were seen, bool.

        They begin at a bin with data, early enough to end before the data do, or at the first of them.
        """
        trials = self._trials(number, rng).unsqueeze(-1)
        last = (self.ends[self.rows, trials] - length - 1).clamp(min=0)
        cumulative = self.cumulative[self.rows[..., 0], trials[..., 0]]  # (R, V, T)
        share = torch.rand(len(self.w), number, 1, generator=rng).to(cumulative)
        start = torch.searchsorted(cumulative, share * cumulative.gather(-1, last), right=True)
        times = start + torch.arange(length + 1, device=start.device)
        inside, times = times < self.w.shape[-2], times.clamp(max=self.w.shape[-2] - 1)
        return self.w[self.rows, trials, times], self.bins[self.rows, trials, times] & inside

    def crops(self, trials: int, bins: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """``bins`` of a few random trials, ``(R, trials, bins, d)``, and which were seen, ``(R, trials, bins, 1)``."""
        w, seen = self.draw(trials, bins - 1, rng)
        return w, seen.unsqueeze(-1)

    def _trials(self, count: int, rng: torch.Generator) -> Tensor:
        """Random trials that have data, ``(R, count)``: all different where there are enough."""
        enough = bool(((self.of_trials > 0).sum(-1) >= count).all())
        picked = torch.multinomial(self.of_trials, count, replacement=not enough, generator=rng)
        return picked.to(self.w.device)


class TiedFrames(nn.Module):
    """Learned frames ``w = z F + o`` between canonical coordinates and latents, any number for each recording.

    Args:
        frame: ``F (..., R, d, d)``.
        offset: ``o (..., R, d)``.
    """

    def __init__(self, frame: Tensor, offset: Tensor):
        super().__init__()
        self.frame, self.offset = nn.Parameter(frame), nn.Parameter(offset)

    def states(self, w: Tensor) -> Tensor:
        """Canonical coordinates ``(R, ..., d)`` to latents, with the frames' leading dimensions."""
        flat = (w.flatten(1, -2) - self.offset.unsqueeze(-2)) @ torch.linalg.inv_ex(self.frame).inverse
        return flat.unflatten(-2, w.shape[1:-1])

    def coordinates(self, z: Tensor) -> Tensor:
        """Latents ``(..., R, V, L, d)`` to canonical coordinates."""
        flat = z.flatten(-3, -2) @ self.frame + self.offset.unsqueeze(-2)
        return flat.unflatten(-2, z.shape[-3:-1])

    def roll_out_error(self, dynamics: Callable[[Tensor], Tensor], target: Tensor, seen: Tensor) -> Tensor:
        """Mean squared error of noise-free roll-outs from the first bins of windows, ``(..., R)``; clamped.

        Args:
            dynamics: of the recordings, for the frames' leading dimensions.
            target: windows ``(R, V, L + 1, d)``.
            seen: ``(R, V, L + 1)`` bool.
        """
        rolled = roll_out(dynamics, self.states(target[..., :1, :]), target.shape[-2] - 1)
        error = (self.coordinates(rolled) - target[..., 1:, :]).square().mean(-1).clamp(max=4.0)
        valid = seen[..., 1:] & seen[..., :1]
        return (error * valid).sum((-1, -2)) / valid.sum((-1, -2)).clamp(min=1)


def growing(progress: float, longest: int) -> int:
    """Length of roll-outs at a share of the steps: from 5 to 25 bins over the first half."""
    shortest, length = LENGTHS
    return min(round(shortest + min(1.0, 2 * progress) * (length - shortest)), longest)


def roll_out(dynamics: Callable[[Tensor], Tensor], z: Tensor, num_steps: int, bound: float = BOUND) -> Tensor:
    """What follows ``z (R, V, 1, d)`` without noise, ``(R, V, num_steps, d)``; clamped, so that nothing explodes."""
    if isinstance(dynamics, AdaptedMLP):
        return dynamics.rollout(z, num_steps, bound)
    path = []
    for _ in range(num_steps):
        z = dynamics(z).clamp(-bound, bound)
        path.append(z)
    return torch.cat(path, -2)
