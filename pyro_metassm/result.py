"""What a fit is: trained copies, how they were trained, and what is known of every recording's embedding."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import xarray as xr
from torch import Tensor

from pyro_metassm.guides.base import AmortizedGuide
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.recordings import Recordings

ELEMENTS = 4_000_000  # observations a chunk of the passes over the data


@dataclass(eq=False)
class Fit:
    """The result of :func:`pyro_metassm.fit`; everything done with a fit takes it.

    Attributes:
        model, guide: trained copies.
        history: over ``step``: ``elbo``, ``log_likelihood``, ``kl_latents``, ``kl_embedding`` (nats, full data),
            ``gradient_norm`` (of the ELBO per observed number), ``learning_rate``, ``seconds`` of the step, and
            ``validation_elbo`` where it was asked for.
        statistics: what the guide gathered of the embeddings from the training trials, ``(recording, ...)``.
        seed: of the fit.
        attrs: plain values that are saved with it: ``bin_width`` (s) of the training data, ``rollout_error`` (by
            recording, see :func:`pyro_metassm.rollouts.rollout_errors`), ``adaptation`` (see
            :func:`pyro_metassm.adapt`), and what you add.
    """

    model: MetaSSM
    guide: AmortizedGuide
    history: xr.Dataset
    statistics: Tensor
    seed: int = 0
    attrs: dict = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The recordings that the fit knows."""
        return self.model.names

    @property
    def device(self) -> torch.device:
        return self.statistics.device

    @property
    def dtype(self) -> torch.dtype:
        return self.statistics.dtype

    def save(self, path: str | Path) -> None:
        """Write the fit into the folder ``path`` as safetensors and JSON; :func:`pyro_metassm.load` reads it."""
        from pyro_metassm import saving  # saving builds fits, so it imports this module

        saving.save(self, path)

    def __repr__(self) -> str:
        steps = self.history.sizes.get("step", 0)
        return (
            f"Fit({type(self.model).__name__} with {type(self.guide).__name__}, {len(self.names)} recordings, "
            f"latent_dim={self.model.latent_dim}, embedding_dim={self.model.embedding_dim}, {steps} steps)"
        )


def check_fit(fit: object) -> None:
    """Raise ``TypeError`` for what is no fit, most often a model."""
    if not isinstance(fit, Fit):
        raise TypeError(
            f"needed a fit, what fit = pm.fit(model, guide, recs) returns, got {type(fit).__name__}; pass the fit, "
            "which has the trained copy of the model and what it knows of the recordings"
        )


def trial_chunks(recs: Recordings, name: str) -> list[list[int]]:
    """Trials of a recording in chunks of at most ``ELEMENTS`` observations, at least one trial each."""
    recording = recs[name]
    size = max(1, ELEMENTS // (recording.num_bins * recording.num_neurons))
    return [
        list(range(first, min(first + size, recording.num_trials)))
        for first in range(0, recording.num_trials, size)
    ]


def embedding_statistics(model, guide, recs: Recordings) -> Tensor:
    """The guide's statistics of every recording's embedding from all its trials, ``(len(model.names), ...)``.

    Recordings of the model that ``recs`` does not hold get NaN: their embedding is then inferred from whatever trials
    are looked at.
    """
    rows = {name: recording_statistics(guide, recs, name) for name in recs}
    unknown = torch.full_like(next(iter(rows.values())), torch.nan)
    return torch.stack([rows.get(name, unknown) for name in model.names])


@torch.no_grad()
def recording_statistics(
    guide, recs: Recordings, name: str, trials: list[int] | None = None, context: int | None = None
) -> Tensor:
    """The guide's statistics of one recording's embedding; a mean over trials, so that chunks are averaged exactly.

    Args:
        guide: an amortised guide.
        recs: the data.
        name: the recording.
        trials: its trials to take; None for all.
        context: the first bins to take of each; None for all.
    """
    parameter = next(guide.parameters())
    total, weight = parameter.new_zeros(2 * guide.model.embedding_dim), 0
    for chunk in trial_chunks(recs, name):
        chunk = chunk if trials is None else [trial for trial in chunk if trial in trials]
        if not chunk:
            continue
        batch = recs.batch(
            guide.model.names,
            names=[name],
            trials={name: chunk},
            dtype=parameter.dtype,
            device=parameter.device,
        )
        batch = batch if context is None else batch.part(bins=slice(context))
        _, frame, share = guide.common_space(batch)
        with_data = int((share > 0).any(-2).sum())
        statistics = guide.embedding_statistics(frame, share, batch)[0]
        total, weight = total + statistics * with_data, weight + with_data
    return total / weight if weight else statistics  # without data: the prior's
