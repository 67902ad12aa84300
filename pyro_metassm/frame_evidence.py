"""How much evidence the data have for frames of new recordings, under a fitted model's own path distribution."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from pyro.distributions import MultivariateNormal, TorchDistribution
from torch import Tensor

from pyro_metassm.distributions import MarkovPath, is_normal
from pyro_metassm.frames import Frames
from pyro_metassm.laplace_smoother import Chain, log_evidence, smoothed
from pyro_metassm.observations import of_single_neurons
from pyro_metassm.read_outs import in_latents
from pyro_metassm.recordings import Batch
from pyro_metassm.tempering import tempered
from pyro_metassm.windows import BOUND, TiedFrames

TRIALS = 4  # that frames are compared by, at most: four trials tell frames apart


@torch.no_grad()
def of_frames(model, guide, frames: Frames, tied: TiedFrames, bins: Tensor, batch: Batch) -> Tensor | None:
    r"""Laplace's approximation of ``log p(y | F, o)`` for S frames of each of R recordings, ``(S, R)``.

    States are integrated out under the model's prior of paths at the embedding that the guide infers in that frame;
    read-outs are those from canonical coordinates, turned. Unlike the error of roll-outs it knows how large the noise
    of observations is, so that it counts every bin of a trial that hardly leaves rest.

    Args:
        model, guide: fitted, with read-outs from canonical coordinates for the batch's recordings.
        frames: canonical frames of the recordings.
        tied: of the frames to be judged.
        bins: ``(R, K, T)`` bool, where anything was seen.
        batch: the data.

    Returns:
        minus infinity where a frame leads nowhere; None for a model that has no such approximation: a joint likelihood
        of the neurons, or paths that are no chain of Normal steps of constant noise (:func:`normal_chain`).
    """
    if not of_single_neurons(model, batch):
        return None
    part = batch.part(trials=slice(TRIALS))
    states = tied.states(frames.coordinates).clamp(-BOUND, BOUND)
    sound = states.isfinite().all(-1).all(-1).all(-1)
    seen = tempered(model)
    result = []
    for frame, offset, z in zip(tied.frame, tied.offset, states.nan_to_num(), strict=True):
        e = guide.embedding_posterior(guide.embedding_statistics(z, bins.unsqueeze(-1), batch)).mean
        turned = in_latents(model.read_out, frame.nan_to_num(), offset.nan_to_num(), batch)
        view = SimpleNamespace(**vars(seen) | {"read_out": turned})
        evidence = _of_recordings(model, view, e, z[:, :TRIALS], part)
        if evidence is None:
            return None
        result.append(evidence)
    found = torch.stack(result).to(states)
    return found.where(sound & found.isfinite(), -torch.inf)


def _of_recordings(model, view: SimpleNamespace, e: Tensor, z: Tensor, batch: Batch) -> Tensor | None:
    """The evidence for one frame of each recording, ``(R,)``, from paths ``z (R, K, T, d)`` on; None as above."""
    z = z * batch.time_mask.unsqueeze(-1)
    chain = normal_chain(model.path_prior(e, batch), z)
    if chain is None:
        return None
    try:
        return log_evidence(view, chain, smoothed(view, chain, z, batch), batch).sum(-1)
    except torch.linalg.LinAlgError:  # one of the frames has no likely path; others' may be good
        if len(z) == 1:
            return z.new_full((1,), -torch.inf)
    rows = [slice(r, r + 1) for r in range(len(z))]
    alone = [_of_recordings(model, view, e[row], z[row], batch.part(row)) for row in rows]
    found = [x.to(z) for x in alone if x is not None]
    return torch.cat(found) if len(found) == len(z) else None


def normal_chain(prior: TorchDistribution, z: Tensor) -> Chain | None:
    """A prior of paths as a chain of Normal steps, ``z_{t+1} ~ Normal(f(z_t), W^-1)``, for trials ``(R, K)``.

    Its steps are the model's own, with their inputs and what a subclass made of them. Bins after a trial's end hang on
    nothing, so that how far the recording beside it goes on does not matter.

    Args:
        prior: of the paths.
        z: paths ``(R, K, T, latent_dim)`` near which it is needed.

    Returns:
        None where it is no :class:`MarkovPath`, where the first state or the steps are not Normal, where a recording's
        trials differ in their first state, or where the noise is not the same at all of these states.
    """
    num_recordings, num_trials, num_bins, dim = z.shape
    if not isinstance(prior, MarkovPath):
        return None
    first = _moments(prior.initial)
    if first is None:
        return None
    loc = first[0].expand(num_recordings, num_trials, dim)
    before = first[1].expand(num_recordings, num_trials, dim, dim)
    precision = torch.eye(dim).to(z)
    if num_bins > 1:
        steps = _moments(prior.into(slice(1, None), z[:, :, :-1]))
        if steps is None or not (steps[1] == steps[1][:, :1, :1]).all():
            return None
        precision = steps[1][:, 0, 0]
    if not ((loc == loc[:, :1]).all() and (before == before[:, :1]).all()):
        return None
    exists = torch.ones_like(z[..., :1], dtype=torch.bool)
    if prior.mask_of_bins is not None:
        exists = prior.mask_of_bins.unsqueeze(-1)

    def mean(states: Tensor) -> Tensor:
        if num_bins == 1:
            return states
        return prior.into(slice(1, None), states).mean.where(exists[:, :, 1:], 0.0)

    return Chain(mean, precision, loc[:, 0], before[:, 0])


def _moments(x: TorchDistribution) -> tuple[Tensor, Tensor] | None:
    """Mean ``(..., d)`` and precision ``(..., d, d)`` of a Normal over a vector; None of anything else."""
    if is_normal(x):
        return x.base_dist.loc, x.base_dist.scale.pow(-2).diag_embed()
    if type(x) is MultivariateNormal:
        return x.loc, x.precision_matrix
    return None
