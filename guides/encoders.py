"""Networks that read the common space: one trial to the embedding, one trial to its states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_metassm.native.mlp import plain


def smooth(x: Tensor, weight: Tensor, sd: float | Sequence[float], leave_out: bool = False) -> Tensor:
    """Weighted Gaussian smoothing along time; bins of weight 0 are filled from their neighbours.

    Args:
        x: ``(R, K, T, C)``.
        weight: ``(R, K, T, 1)``, how much each bin counts.
        sd: of the kernel in bins, of all recordings or of each, R numbers; 0 leaves ``x`` as it is.
        leave_out: predict each bin from its neighbours only.
    """
    widths = [sd] if isinstance(sd, int | float) else list(sd)
    widths = widths[:1] if len(set(widths)) == 1 else widths
    if max(widths) <= 0:
        return x
    reach = min(int(4 * max(widths)) + 1, x.shape[-2])
    lag = torch.arange(-reach, reach + 1, dtype=x.dtype)
    # On the host: a width of (nearly) none has a kernel of one bin.
    width = torch.tensor(widths, dtype=x.dtype).view(-1, 1, 1)
    kernel = torch.exp(-0.5 * (lag / width.clamp(min=1e-3)) ** 2)
    kernel = (kernel * (lag.abs() <= (4 * width).floor() + 1)).to(x.device)  # its own reach among wider ones
    if leave_out:
        kernel[..., reach] = 0.0

    def along_time(values: Tensor) -> Tensor:
        if len(widths) == 1:
            rows = values.movedim(-1, -2)
            flat = rows.reshape(-1, 1, rows.shape[-1])
        else:  # a recording is a channel, with a kernel of its own
            rows = values.permute(1, 3, 0, 2)
            flat = rows.flatten(0, 1)
        out = functional.conv1d(flat, kernel, padding=reach, groups=len(widths)).reshape(rows.shape)
        return out.movedim(-1, -2) if len(widths) == 1 else out.permute(2, 0, 3, 1)

    return along_time(x * weight) / along_time(weight).clamp(min=1e-6)


class EmbeddingEncoder(nn.Module, ABC):
    """One trial to the mean and the variance of the embedding, before averaging over trials (eq. 15).

    Args:
        latent_dim: channels of the frame.
        embedding_dim: size of the embedding.
        hidden_dim: width.
    """

    def __init__(self, latent_dim: int, embedding_dim: int, hidden_dim: int = 64):
        super().__init__()
        self.head = nn.Linear(hidden_dim, 2 * embedding_dim)
        with torch.no_grad():  # start narrow: an embedding that is noise teaches the dynamics to ignore it
            self.head.bias[embedding_dim:] = -4.0

    @abstractmethod
    def summary(self, frame: Tensor, seen: Tensor) -> Tensor:
        """``frame (R, K, T, latent_dim)``, ``seen (R, K, T, 1)`` to a trial's summary ``(R, K, hidden_dim)``."""

    def forward(self, frame: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.head(self.summary(frame, seen)).chunk(2, -1)
        return mean, log_variance.clamp(-12.0, 4.0).exp()


class SetEncoder(EmbeddingEncoder):
    """Mean over the bins of ``MLP([z_t, z_{t+1} - z_t])``: where the state is and how it moves, in any order."""

    def __init__(self, latent_dim: int, embedding_dim: int, hidden_dim: int = 64):
        super().__init__(latent_dim, embedding_dim, hidden_dim)
        self.net = nn.Sequential(
            nn.Linear(2 * latent_dim, hidden_dim), nn.SiLU(), nn.Linear(hidden_dim, hidden_dim), nn.SiLU()
        )
        # Steps are much smaller than states; their scale is set from the data by the warm start.
        self.step_scale: Tensor
        self.register_buffer("step_scale", torch.full((latent_dim,), 0.1))

    def summary(self, frame: Tensor, seen: Tensor) -> Tensor:
        both = functional.pad(seen[..., :-1, :] & seen[..., 1:, :], (0, 0, 0, 1))
        step = functional.pad(frame[..., 1:, :] - frame[..., :-1, :], (0, 0, 0, 1)) / self.step_scale
        # A trial without two bins in a row has states and no steps: its bins count as being at rest.
        use = torch.where(both.any(-2, keepdim=True), both, seen).to(frame.dtype)
        hidden = plain(self.net, torch.cat([frame, step * both], -1))
        return (use.mT @ hidden).squeeze(-2) / use.sum(-2).clamp(min=1)


class RecurrentEncoder(EmbeddingEncoder):
    """Last state of a gated recurrent network over the trial (the paper's choice)."""

    def __init__(self, latent_dim: int, embedding_dim: int, hidden_dim: int = 64):
        super().__init__(latent_dim, embedding_dim, hidden_dim)
        self.rnn = nn.GRU(latent_dim + 1, hidden_dim, batch_first=True)

    def summary(self, frame: Tensor, seen: Tensor) -> Tensor:
        rows = torch.cat([frame, seen.to(frame.dtype)], -1).flatten(0, 1)
        states, _ = self.rnn(rows)
        position = torch.arange(1, rows.shape[-2] + 1, device=rows.device)
        last = (position * seen.flatten(0, 1).squeeze(-1)).amax(-1).clamp(min=1) - 1
        return states[torch.arange(len(rows), device=rows.device), last].unflatten(0, frame.shape[:2])
