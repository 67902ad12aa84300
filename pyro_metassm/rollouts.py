"""How well roll-outs of fitted dynamics follow recordings that the fit knows."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor

from pyro_metassm.recordings import Recordings
from pyro_metassm.result import trial_chunks
from pyro_metassm.windows import TiedFrames, Windows, growing

TRIALS = 64  # of a recording, at most
WINDOWS = 96
SPREAD = 1e-6  # variance, in that of all latents, below which a latent does not move


@torch.no_grad()
def rollout_errors(model, guide, recs: Recordings, statistics: Tensor, seed: int = 0) -> dict[str, float]:
    r"""Mean squared error of noise-free roll-outs of up to 25 bins, by recording, in variances of its latents.

    ``mean_t (z_t - f^t(z_0))^T S^-1 (z_t - f^t(z_0)) / d``, for stretches of the guide's frame ``z`` with covariance
    ``S`` over the recording, drawn as :class:`~pyro_metassm.windows.Windows` does, at the mean of its embedding, by the
    model's ``dynamics_of`` alone: what its transition adds (inputs) and what its trials differ in (``trial_embedding``)
    count as error. It is what :func:`pyro_metassm.adapt` reports of new recordings, so that these can be compared with
    the known ones.

    Args:
        model, guide: fitted.
        recs: recordings that the model knows.
        statistics: of all recordings' embeddings, as :class:`~pyro_metassm.result.Fit` has them.
        seed: of the stretches drawn.

    Returns:
        a number for each recording of ``recs``; NaN without two bins in a row.
    """
    result = {}
    for name in recs:
        rng = torch.Generator().manual_seed(seed)
        row = statistics[[model.names.index(name)]]
        rows = trial_chunks(recs, name)[0][:TRIALS]
        batch = recs.batch(model.names, names=[name], trials={name: rows}, dtype=row.dtype, device=row.device)
        _, z, share = guide.common_space(batch)
        bins = (share > 0).squeeze(-1)
        frame, offset = _whitening(z[0][bins[0]])
        tied = TiedFrames(frame.unsqueeze(0), offset.unsqueeze(0))
        windows = Windows(tied.coordinates(z), bins)
        length = growing(1.0, windows.longest)
        target, seen = windows.draw(WINDOWS, length, rng)
        if not bool((seen[..., 1:] & seen[..., :1]).any()):
            result[name] = float("nan")
            continue
        e = guide.embedding_posterior(row).mean
        # A fit that failed may be anywhere.
        with pyro.validation_enabled(False), model.given(guide.global_sites.medians()):
            dynamics = model.dynamics_of(e, batch.recording)
            error = tied.roll_out_error(dynamics, target, seen)
        result[name] = float(error)
    return result


def _whitening(z: Tensor) -> tuple[Tensor, Tensor]:
    """``F`` and ``o`` with ``z F + o`` of mean zero and unit covariance, for ``z (bins, d)``.

    Latents that do not move are to count nothing here, where :func:`pyro_metassm.frames.canonical_frame` keeps noise
    small: a floor of another size, and no orientation.
    """
    mean = z.mean(0)
    covariance = (z - mean).mT @ (z - mean) / len(z)
    least = SPREAD * covariance.diagonal().mean() + torch.finfo(z.dtype).tiny
    value, vector = torch.linalg.eigh(covariance.nan_to_num())
    frame = vector * value.clamp(min=least).rsqrt()
    return frame, -mean @ frame
