"""Trials that a model itself draws: as many as a guide needs to learn from where few were seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch import Tensor

from pyro_metassm.elbo import SequentialELBO, Terms
from pyro_metassm.recordings import Batch
from pyro_metassm.windows import BOUND

SURE = 1e-6  # variance of an embedding that is given


@torch.no_grad()
def paths(model, e: Tensor, batch: Batch, shape: tuple[int, ...] = ()) -> Tensor:
    """Paths of the trials at embeddings ``e``, ``(*shape, R, K, T, latent_dim)``, kept within bounds."""
    with pyro.validation_enabled(False):
        return model.path_prior(e, batch).sample(shape).nan_to_num().clamp(-BOUND, BOUND)


@torch.no_grad()
def observations(model, z: Tensor, batch: Batch) -> Tensor:
    """What the model draws given the states ``(R, K, T, latent_dim)``, ``(R, K, T, neuron)``."""
    with pyro.validation_enabled(False):
        return model.likelihood(model.read_out(z, batch.recording, batch.width), batch.recording).sample()


@torch.no_grad()
def like(batch: Batch, model, terms: Terms) -> Batch:
    """The batch with what the model draws in place of what was seen, at the embeddings and global sites of ``terms``.

    The path of a trial is, with even chances, one that the model draws, or that of ``terms``: the dynamics alone do not
    say where the trials of these recordings go, and the paths found for them are few.
    """
    e = terms.embedding
    with model.given(terms.values):
        drawn = paths(model, e, batch)
        of_model = torch.rand(drawn.shape[:2], device=drawn.device) < 0.5
        z = torch.where(of_model[..., None, None], drawn, terms.values["latents"])
        y = observations(model, z, batch)
    known = torch.cat([e, torch.full_like(e, SURE)], -1).squeeze(-2)
    return dataclasses.replace(
        batch, observations=y.where(batch.mask, 0.0).to(batch.observations.dtype), embedding_statistics=known
    )


def guide_elbo(elbo: SequentialELBO, model, guide, batch: Batch) -> Tensor:
    """The ELBO of a batch, with a gradient for the guide alone: of trials that the model drew, it learns nothing."""
    with _fixed(model), pyro.validation_enabled(False):
        return elbo.terms(model, guide, batch).elbo


@contextmanager
def _fixed(model) -> Iterator[None]:
    free = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in free:
            p.requires_grad_(False)
        yield
    finally:
        for p in free:
            p.requires_grad_(True)
