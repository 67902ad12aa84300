"""How much evidence the data have for frames of new recordings, under a fitted model's own path distribution."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from pyro_metassm.frames import Frames
from pyro_metassm.laplace_smoother import Chain, log_evidence, smoothed
from pyro_metassm.observations import of_single_neurons
from pyro_metassm.read_outs import in_latents
from pyro_metassm.recordings import Batch
from pyro_metassm.teaching import stretch
from pyro_metassm.tempering import tempered
from pyro_metassm.windows import BOUND, TiedFrames

TRIALS = 4  # that frames are compared by, at most: four trials tell frames apart


@torch.no_grad()
def of_frames(model, guide, frames: Frames, tied: TiedFrames, bins: Tensor, batch: Batch) -> Tensor | None:
    r"""Laplace's approximation of ``log p(y | F, o)`` for S frames of each of R recordings, ``(S, R)``.

    States are integrated out under the dynamics at the embedding that the guide infers in that frame; read-outs are
    those from canonical coordinates, turned. Unlike the error of roll-outs it knows how large the noise of
    observations is, so that it counts every bin of a trial that hardly leaves rest.

    Args:
        model, guide: fitted, with read-outs from canonical coordinates for the batch's recordings.
        frames: canonical frames of the recordings.
        tied: of the frames to be judged.
        bins: ``(R, K, T)`` bool, where anything was seen.
        batch: the data.

    Returns:
        not finite where a frame leads nowhere; None for a joint likelihood of the neurons, which has no such
        approximation.
    """
    if not of_single_neurons(model, batch):
        return None
    part = stretch(batch, slice(0, TRIALS), slice(None))
    states = tied.states(frames.coordinates).clamp(-BOUND, BOUND)
    sound = states.isfinite().all(-1).all(-1).all(-1)
    seen = tempered(model)
    result = []
    for frame, offset, z in zip(tied.frame, tied.offset, states, strict=True):
        z = z.nan_to_num()
        e = guide.embedding_posterior(guide.embedding_statistics(z, bins.unsqueeze(-1), batch)).mean
        first = model.initial_state(e).expand((len(z), 1))
        chain = Chain(
            model.dynamics_of(e, batch.recording),
            model.process_noise().pow(-2).diag(),
            first.mean[:, 0],
            first.variance[:, 0].reciprocal().diag_embed(),
        )
        turned = in_latents(model.read_out, frame.nan_to_num(), offset.nan_to_num(), batch)
        view = SimpleNamespace(**vars(seen) | {"read_out": turned})
        try:
            path = smoothed(view, chain, z[:, :TRIALS], part)
            result.append(log_evidence(view, chain, path, part).sum(-1))
        except torch.linalg.LinAlgError:  # a frame in which no path is likely
            result.append(z.new_full((len(z),), -torch.inf))
    return torch.stack(result).to(states).where(sound, -torch.inf)
