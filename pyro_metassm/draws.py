"""Draws of a fit's latents, some trials and some draws at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_metassm import _machine as machine
from pyro_metassm.global_sites import declared
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.observations import observed
from pyro_metassm.recordings import Batch, Recording, Recordings
from pyro_metassm.result import Fit, check_fit, recording_statistics

ELEMENTS = 8_000_000  # numbers a chunk of draws: about 32 MiB a tensor, some ten tensors at a time
NETWORK_WIDTH = 128  # numbers per draw and bin that the networks hold while they run, generously


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some draws of some trials of one recording."""

    draws: slice
    trials: np.ndarray
    batch: Batch
    embedding: Tensor  # (S, 1, 1, embedding_dim)
    latents: Tensor  # (S, 1, K, T, latent_dim); the hooks see the global sites of the same draws
    path: TorchDistribution  # of the guide, that these latents were drawn from (up to the context)


def posterior_chunks(
    fit: Fit,
    recs: Recordings,
    name: str,
    num_samples: int,
    seed: int,
    chunk_size: int | None = None,
    rows: list[int] | None = None,
    context: int | None = None,
    horizon: int = 0,
) -> Iterator[Chunk]:
    """Draws of the guide for one recording, some trials and draws at a time; ``context`` cuts the trials there.

    All draws of some trials come one after the other, then those of the next trials; ``horizon`` more bins are allowed
    for in the size of a chunk. Draws depend on the seed, on the recording and on how it is cut into chunks, on no other
    recording; the random state is restored when the iterator ends. It is to be iterated alone
    (:func:`pyro_metassm._machine.alone`).
    """
    check_fit(fit)
    recording = recs[name]
    rows = list(range(recording.num_trials)) if rows is None else rows
    bins = (recording.num_bins if context is None else context) + horizon
    many, trials_at_once = chunk_sizes(recording.num_neurons, bins, num_samples, chunk_size)
    fit.model.neurons.check([name], [recording.num_neurons])
    statistics = fit.statistics[[fit.names.index(name)]]
    if not bool(statistics.isfinite().all()):  # not seen in training: of the trials at hand, all of them
        statistics = recording_statistics(fit.guide, recs, name, rows, context).unsqueeze(0)
    # One embedding a draw for all trials: the first trials draw it, the others are given it.
    embeddings: dict[int, Tensor] = {}
    shared = global_draws(fit, num_samples, seed)
    with machine.random_forked(fit.device, alone=False), torch.no_grad():
        for start in range(0, len(rows), trials_at_once):
            trials = np.array(rows[start : start + trials_at_once])
            batch = recs.batch(
                fit.names, names=[name], trials={name: trials}, dtype=fit.dtype, device=fit.device
            )
            batch = dataclasses.replace(batch, embedding_statistics=statistics)
            batch = batch if context is None else batch.part(bins=slice(context))
            for first in range(0, num_samples, many):
                draws = slice(first, min(first + many, num_samples))
                known = {"embedding": embeddings[first]} if first in embeddings else {}
                own = of_draws(shared, draws)
                torch.manual_seed(_seed(seed, name, start, first))
                # What is not finite is told below, in words.
                with pyro.validation_enabled(False), pyro.plate("draw", draws.stop - draws.start, dim=-3):
                    program = poutine.condition(fit.guide, data=own | known)
                    sites = poutine.trace(program).get_trace(batch).nodes
                embeddings[first], latents = sites["embedding"]["value"], sites["latents"]
                refuse_not_finite("latents", latents["value"], name, trials)
                with fit.model.given(own):
                    yield Chunk(draws, trials, batch, embeddings[first], latents["value"], latents["fn"])


def chunk_sizes(
    num_neurons: int, num_bins: int, num_samples: int, chunk_size: int | None = None
) -> tuple[int, int]:
    """Draws, and trials, that are worked on at a time."""
    per_draw = num_bins * (num_neurons + NETWORK_WIDTH)
    many = min(num_samples, max(1, ELEMENTS // per_draw))
    return many, max(1, ELEMENTS // (per_draw * many)) if chunk_size is None else chunk_size


def forecast_chunks(
    fit: Fit,
    recs: Recordings,
    name: str,
    rows: list[int],
    context: int,
    horizon: int,
    num_samples: int,
    seed: int,
    chunk_size: int | None = None,
) -> Iterator[Chunk]:
    """As :func:`posterior_chunks`, with the latents of the ``horizon`` bins after ``context``."""
    for chunk in posterior_chunks(fit, recs, name, num_samples, seed, chunk_size, rows, context, horizon):
        prior = fit.model.path_prior(chunk.embedding, _ahead(chunk, recs[name], context, horizon))
        z, path = chunk.latents[..., -1:, :], []
        with pyro.validation_enabled(False):
            for step in range(horizon):
                z = prior.into(slice(step, step + 1), z).sample()
                path.append(z)
        latents = torch.cat(path, -2)
        refuse_not_finite("latents", latents, name, chunk.trials, context)
        yield dataclasses.replace(chunk, latents=latents)


def refuse_not_finite(what: str, values: Tensor, name: str, trials: np.ndarray, first_bin: int = 0) -> None:
    """Refuse draws ``(S, 1, K, T, ...)`` that have left the finite numbers, where they do so first.

    Raises:
        FloatingPointError: recording, trial and bin.
    """
    if bool(values.isfinite().all()):
        return
    bad = ~values[:, 0].isfinite().all(-1)  # (S, K, T)
    trial, time = bad.any(0).nonzero()[bad.any(0).nonzero()[:, 1].argmin()].tolist()
    many = int(bad.any(-1).any(-1).sum())
    raise FloatingPointError(
        f"recording {name!r}: needed finite {what}, got others in {many} of {len(bad)} draws, first in trial "
        f"{trials[trial]}, bin {first_bin + time}; look at fit.history: the training may have gone astray, and "
        "dynamics may explode away from the data (a smaller learning_rate, a shorter horizon)"
    )


def _ahead(chunk: Chunk, recording: Recording, context: int, horizon: int) -> Batch:
    """The batch with the inputs of the bins after ``context``; they are zero where a trial has ended."""
    if chunk.batch.inputs is None or recording.inputs is None:
        return chunk.batch
    window = slice(context, context + horizon)
    known = torch.as_tensor(recording.inputs[chunk.trials, window]).to(chunk.batch.inputs)
    inputs = known.new_zeros(1, len(known), horizon, known.shape[-1])
    inputs[0, :, : known.shape[1]] = known
    return dataclasses.replace(chunk.batch, inputs=inputs)


def global_draws(fit: Fit, num_samples: int, seed: int) -> dict[str, Tensor]:
    """Draws of the posterior of the global sites, ``(num_samples, 1, 1, *event)``, the same for all recordings."""
    if not declared(fit.model):
        return {}
    with seeded(seed, "", fit.device), torch.no_grad(), pyro.plate("draw", num_samples, dim=-3):
        return fit.guide.global_sites()


def of_draws(shared: dict[str, Tensor], draws: slice) -> dict[str, Tensor]:
    """Some of the draws of global sites."""
    return {name: values[draws] for name, values in shared.items()}


def forecast_trials(recs: Recordings, name: str, context: int, *, scored: bool = False) -> list[int]:
    """The trials with at least ``context`` bins, and one more to be scored; a warning counts the others.

    Raises:
        ValueError: if there is none.
    """
    lengths = recs[name].lengths
    rows = np.flatnonzero(lengths >= context + scored).tolist()
    least, do, lack, done = "at least", "forecast", "end before", "forecast"
    if scored:
        least, do, lack, done = "more than", "score", "have no bin after", "scored"
    if not rows:
        raise ValueError(
            f"recording {name!r}: needed trials of {least} context = {context} bins to {do}, the longest has "
            f"{lengths.max()}; choose a shorter context"
        )
    if len(rows) < len(lengths):
        warnings.warn(
            f"recording {name!r}: {len(lengths) - len(rows)} of {len(lengths)} trials {lack} context = {context} "
            f"and are not {done}",
            stacklevel=3,
        )
    return rows


def observation(model: MetaSSM, latents: Tensor, batch: Batch):
    """The distribution of every observation given latents ``(S, R, K, T, latent_dim)``, finite or not."""
    with pyro.validation_enabled(False):
        return model.likelihood(model.read_out(latents, batch.recording, batch.width), batch.recording)


def observations_of(model: MetaSSM, latents: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The latents, draws of observations and their means, NaN where latents have left the finite numbers.

    Far out under a prior with heavy tails dynamics explode, and no family draws from what is not a number.
    """
    finite = latents.isfinite().all(-1, keepdim=True)
    y = observation(model, torch.where(finite, latents, 0.0), batch)
    drawn, mean = (torch.where(finite, values, torch.nan) for values in (y.sample(), y.mean))
    return torch.where(finite, latents, torch.nan), drawn, mean


def log_weights(fit: Fit, chunk: Chunk, y: TorchDistribution) -> Tensor:
    """``log p(y_k | z_k) p(z_k | e) / q(z_k | y_k, e)`` of every draw and trial ``(S, K)``; ``y`` given the latents.

    Their exponentials are, on average over the draws of ``z``, the density of the trial given ``e``.
    """
    batch = chunk.batch
    terms = observed(y, batch.mask).log_prob(batch.observations)
    terms = terms + fit.model.path_prior(chunk.embedding, batch).log_prob(chunk.latents)
    return (terms - chunk.path.log_prob(chunk.latents))[:, 0]


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float32).numpy()


@contextlib.contextmanager
def seeded(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """A random state of this seed and recording, for a while."""
    with machine.random_forked(device):
        torch.manual_seed(_seed(seed, name))
        yield


def _seed(seed: int, *of: str | int) -> int:
    return seed ^ zlib.crc32("/".join(map(str, of)).encode())
