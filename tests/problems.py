"""Small problems that the mathematical tests share: recordings that are unequal in every way, and their models."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

import pyro_metassm as pm
from pyro_metassm.recordings import Batch, Recording, Recordings

# name -> neurons, bins of each trial
SHAPES = {
    "a": (3, (7, 4, 6)),
    "b": (5, (5, 9)),
    "c": (1, (5, 8, 8, 2)),
}


KINDS = {
    "real": lambda rng, shape: rng.normal(size=shape),
    "counts": lambda rng, shape: rng.poisson(2.0, shape) * 1.0,
    "binary": lambda rng, shape: rng.binomial(1, 0.4, shape) * 1.0,
    "positive": lambda rng, shape: rng.gamma(2.0, 1.5, shape),
    # The first neuron counts, the others are positive; named so below.
    "mixed": lambda rng, shape: np.where(
        np.arange(shape[-1]) == 0, rng.poisson(2.0, shape), rng.gamma(2.0, 1.5, shape)
    ),
    "not negative": lambda rng, shape: rng.gamma(2.0, 1.5, shape) * rng.binomial(1, 0.6, shape),
}


def kind_of(family: type) -> str:
    """The kind of data, of ``KINDS``, that a likelihood is for."""
    if issubclass(family, pm.likelihoods.Mixed):
        return "mixed"
    return {
        "Gaussian": "real",
        "LowRankGaussian": "real",
        "StudentT": "real",
        "LogNormal": "positive",
        "Gamma": "positive",
        "ZeroInflatedGamma": "not negative",
        "Bernoulli": "binary",
    }.get(family.__name__, "counts")


def recordings(
    counts: bool = False, seed: int = 0, missing: bool = True, shapes=None, kind: str | None = None, **more
) -> Recordings:
    """Recordings of unequal neurons, trials and lengths, some bins and neurons missing (the first bin, too)."""
    values = KINDS[kind or ("counts" if counts else "real")]
    rng = np.random.default_rng(seed)
    result = []
    for name, (num_neurons, lengths) in (shapes or SHAPES).items():
        trials = []
        for k, length in enumerate(lengths):
            y = values(rng, (length, num_neurons))
            if missing and length > 2:
                y[length // 2] = np.nan  # a whole bin
                y[-1, 0] = np.nan  # a neuron in the last bin (in c: the bin)
                if k == 0:
                    y[0] = np.nan
            trials.append(y)
        # Lengths are stated: a trial may end with a bin that was not observed.
        width = max(lengths)
        array = np.full((len(lengths), width, num_neurons), np.nan)
        for row, y in zip(array, trials, strict=True):
            row[: len(y)] = y
        if kind == "mixed":
            more["neuron_ids"] = ["unit", *(f"ca {n}" for n in range(1, num_neurons))]
        result.append(Recording(name, array, bin_width=0.02, lengths=np.array(lengths), **more))
    return Recordings(result)


def linear_gaussian(recs: Recordings, latent_dim: int = 2, seed: int = 0) -> pm.models.LinearGaussian:
    """A linear-Gaussian model in float64, every parameter a random one."""
    torch.manual_seed(seed)
    model = pm.models.LinearGaussian(recs, latent_dim=latent_dim, embedding_dim=2).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
        model.dynamics.weight.add_(0.6 * torch.eye(latent_dim))
    return model


def garbage(batch: Batch, value: float) -> Batch:
    """The batch with ``value`` wherever there is no observation."""
    return dataclasses.replace(batch, observations=torch.where(batch.mask, batch.observations, value))
