"""Draws of a fit's posterior, of its forecasts and of a model's prior, as trees that ArviZ reads."""

from __future__ import annotations

import dataclasses
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_metassm import _checks as checks
from pyro_metassm import trees
from pyro_metassm.global_sites import named, prior_draws
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.observations import observed
from pyro_metassm.recordings import Batch, Recording, Recordings
from pyro_metassm.result import Fit, recording_statistics

ELEMENTS = 8_000_000  # numbers a chunk of draws: about 32 MiB a tensor, some ten tensors at a time
NETWORK_WIDTH = 1024  # numbers per draw and bin that the networks hold while they run


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some draws of some trials of one recording."""

    draws: slice
    trials: np.ndarray
    batch: Batch
    embedding: Tensor  # (S, 1, 1, embedding_dim)
    latents: Tensor  # (S, 1, K, T, latent_dim); the hooks see the global sites of the same draws
    path: TorchDistribution  # of the guide, that these latents were drawn from (up to the context)


def posterior(
    fit: Fit,
    recs: Recordings,
    *,
    num_samples: int = 100,
    predictive: bool = False,
    log_likelihood: bool = False,
    chunk_size: int | None = None,
    seed: int = 0,
) -> xr.DataTree:
    """Draws of the embeddings, latents and rates of recordings that the fit knows.

    The embedding of a recording comes from the trials that it was trained on (from the trials given, if the model knows
    the recording and the fit has not seen it); the latents come from the trials given.

    Args:
        fit: a fit that knows the recordings.
        recs: trials of them: those of the training, or others.
        num_samples: draws.
        predictive: also draw observations (``posterior_predictive``).
        log_likelihood: also the log likelihood of every trial (``log_likelihood``, nats).
        chunk_size: trials worked on at a time; None chooses for a few hundred MiB.
        seed: of the draws.

    Returns:
        a tree: ``posterior`` (``embedding (chain, draw, recording, embedding_dim)``, and the model's global sites, over
        ``model.dims`` where these name their dimensions), ``sample_stats`` (the fit's history), and a child for every
        recording with ``posterior`` (``latents``, ``rates``: expected observation per bin), ``observed_data``,
        ``constant_data`` and what was asked for. float32, bins that a trial lacks are NaN.

    Raises:
        ValueError: a recording that the fit does not know, ``num_samples < 1``.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> tree = pm.posterior(fit, recs, num_samples=10)
        >>> tree["posterior"]["embedding"].dims
        ('chain', 'draw', 'recording', 'embedding_dim')
    """
    checks.integers(num_samples=num_samples)
    embeddings, children = {}, {}
    for name, recording in recs.items():
        shape = (num_samples, recording.num_trials, recording.num_bins)
        latents = np.full((*shape, fit.model.latent_dim), np.nan, np.float32)
        rates = np.full((*shape, recording.num_neurons), np.nan, np.float32)
        drawn = np.full_like(rates, np.nan) if predictive else None
        per_trial = np.empty((num_samples, recording.num_trials), np.float32) if log_likelihood else None
        embedding = np.empty((num_samples, fit.model.embedding_dim), np.float32)
        for chunk in posterior_chunks(fit, recs, name, num_samples, seed, chunk_size):
            y = observation(fit.model, chunk.latents, chunk.batch)
            bins = chunk.batch.time_mask[0].cpu().numpy()
            where = (chunk.draws, chunk.trials, slice(bins.shape[1]))
            embedding[chunk.draws] = to_numpy(chunk.embedding[:, 0, 0])
            latents[where] = np.where(bins[..., None], to_numpy(chunk.latents[:, 0]), np.nan)
            rates[where] = np.where(bins[..., None], to_numpy(y.mean[:, 0]), np.nan)
            if drawn is not None:
                drawn[where] = np.where(bins[..., None], to_numpy(y.sample()[:, 0]), np.nan)
            if per_trial is not None:
                density = observed(y, chunk.batch.mask).log_prob(chunk.batch.observations)
                per_trial[chunk.draws, chunk.trials] = to_numpy(density[:, 0])
        embeddings[name] = embedding
        groups: dict[str, dict[str, np.ndarray]] = {"posterior": {"latents": latents, "rates": rates}}
        if drawn is not None:
            groups["posterior_predictive"] = {"observations": drawn}
        if per_trial is not None:
            groups["log_likelihood"] = {"observations": per_trial}
        children[name] = trees.recording_groups(recording, groups, recs.truth.get(name))
    shared = trees.of_globals(fit.model, _global_draws(fit, num_samples, seed))
    return trees.tree(embeddings, children, fit.history, {"seed": seed}, shared)


def forecast(
    fit: Fit,
    recs: Recordings,
    *,
    context: int,
    horizon: int,
    num_samples: int = 100,
    predictive: bool = False,
    chunk_size: int | None = None,
    seed: int = 0,
) -> xr.DataTree:
    """Draws of what comes after the first ``context`` bins of every trial.

    The guide sees the first ``context`` bins; from its draw of the last state there, the model's transition is run for
    ``horizon`` bins. Nothing at or after bin ``context`` of a trial reaches its forecast. The embedding comes from the
    trials that the fit was trained on; for a recording that it was not trained on, from the context bins. A transition
    that reads inputs is given those of the forecast bins, zeros behind the end of a trial.

    Args:
        fit: a fit that knows the recordings.
        recs: trials to forecast; trials that end before ``context`` are left out, with a warning that counts them.
        context: bins given, at least 1.
        horizon: bins forecast, at least 1; they may lie behind the end of the data.
        num_samples: draws.
        predictive: also draw observations.
        chunk_size: trials worked on at a time; None chooses.
        seed: of the draws.

    Returns:
        a tree as :func:`posterior`'s, with ``predictions`` (``latents``, ``rates``; ``observations`` if asked for) over
        the forecast bins in place of ``posterior``, and ``observed_data`` there (NaN where there is none).

    Raises:
        ValueError: an unknown recording, ``context`` or ``horizon`` below 1, no trial as long as ``context``.
    """
    checks.integers(context=context, horizon=horizon, num_samples=num_samples)
    embeddings, children = {}, {}
    for name, recording in recs.items():
        rows = forecast_trials(recs, name, context)
        ended = int((recording.lengths[rows] < context + horizon).sum())
        if fit.model.reads_inputs and ended:
            warnings.warn(
                f"recording {name!r}: the inputs of {ended} of {len(rows)} trials end before bin {context + horizon}, "
                "to which they are forecast; they count as zero from there on",
                stacklevel=2,
            )
        shape = (num_samples, len(rows), horizon)
        embedding = np.empty((num_samples, fit.model.embedding_dim), np.float32)
        values = {"latents": np.empty((*shape, fit.model.latent_dim), np.float32)}
        values["rates"] = np.empty((*shape, recording.num_neurons), np.float32)
        if predictive:
            values["observations"] = np.empty_like(values["rates"])
        position = {trial: row for row, trial in enumerate(rows)}
        for chunk in forecast_chunks(fit, recs, name, rows, context, horizon, num_samples, seed, chunk_size):
            y = observation(fit.model, chunk.latents, chunk.batch)
            where = (chunk.draws, [position[t] for t in chunk.trials])
            embedding[chunk.draws] = to_numpy(chunk.embedding[:, 0, 0])
            values["latents"][where] = to_numpy(chunk.latents[:, 0])
            values["rates"][where] = to_numpy(y.mean[:, 0])
            if predictive:
                values["observations"][where] = to_numpy(y.sample()[:, 0])
        embeddings[name] = embedding
        window = slice(context, context + horizon)
        children[name] = trees.recording_groups(
            recording, {"predictions": values}, recs.truth.get(name), rows, window
        )
    shared = trees.of_globals(fit.model, _global_draws(fit, num_samples, seed))
    attrs = {"seed": seed, "context": context, "horizon": horizon}
    return trees.tree(embeddings, children, fit.history, attrs, shared)


def prior_predictive(
    model: MetaSSM, recs: Recordings, *, num_samples: int = 100, seed: int = 0
) -> xr.DataTree:
    """Draws of the model before it has seen data, in the shape of the recordings given.

    Args:
        model: a model (or ``fit.model``: then of the trained parameters with embeddings from their prior).
        recs: recordings of the model, for the numbers of trials, bins and neurons.
        num_samples: draws.
        seed: of the draws.

    Returns:
        a tree with ``prior`` (``embedding``) and, for every recording, ``prior`` (``latents``, ``rates``) and
        ``prior_predictive`` (``observations``); bins that a trial lacks are NaN.
    """
    checks.integers(num_samples=num_samples)
    embeddings, children = {}, {}
    parameter = next(model.parameters())
    with _seeded(seed, "", parameter.device):
        shared = prior_draws(model, num_samples)
    for name, recording in recs.items():
        shape = (num_samples, recording.num_trials, recording.num_bins)
        latents = np.full((*shape, model.latent_dim), np.nan, np.float32)
        rates, drawn = (np.full((*shape, recording.num_neurons), np.nan, np.float32) for _ in range(2))
        embedding = np.empty((num_samples, model.embedding_dim), np.float32)
        batch = recs.batch(model.names, names=[name], dtype=parameter.dtype, device=parameter.device)
        bins = batch.time_mask[0].cpu().numpy()[..., None]  # maybe fewer than the recording's arrays have
        size = max(1, ELEMENTS // (batch.observations.numel() + NETWORK_WIDTH * batch.time_mask.numel()))
        with _seeded(seed, name, parameter.device), torch.no_grad():
            for first in range(0, num_samples, size):
                draws = slice(first, min(first + size, num_samples))
                with model.given(_of(shared, draws)):
                    with pyro.plate("draw", draws.stop - draws.start, dim=-3):
                        sites = poutine.trace(poutine.uncondition(model)).get_trace(batch).nodes
                    y = observation(model, sites["latents"]["value"], batch)
                embedding[draws] = to_numpy(sites["embedding"]["value"][:, 0, 0])
                values = (sites["latents"]["value"], y.mean, sites["observations"]["value"])
                for target, value in zip((latents, rates, drawn), values, strict=True):
                    target[draws, :, : bins.shape[1]] = np.where(bins, to_numpy(value[:, 0]), np.nan)
        embeddings[name] = embedding
        groups = {"prior": {"latents": latents, "rates": rates}, "prior_predictive": {"observations": drawn}}
        children[name] = trees.recording_groups(recording, groups, recs.truth.get(name))
    groups_of_all = trees.of_globals(model, shared)
    return trees.tree(embeddings, children, None, {"seed": seed}, groups_of_all, group="prior")


def posterior_chunks(
    fit: Fit,
    recs: Recordings,
    name: str,
    num_samples: int,
    seed: int,
    chunk_size: int | None = None,
    rows: list[int] | None = None,
    context: int | None = None,
) -> Iterator[Chunk]:
    """Draws of the guide for one recording, some trials and draws at a time; ``context`` cuts the trials there.

    The random state is the same whatever other recordings there are; it is restored when the iterator ends.
    """
    recording = recs[name]
    rows = list(range(recording.num_trials)) if rows is None else rows
    bins = recording.num_bins if context is None else context
    per_draw = bins * (recording.num_neurons + NETWORK_WIDTH)
    many = min(num_samples, max(1, ELEMENTS // per_draw))
    trials_at_once = max(1, ELEMENTS // (per_draw * many)) if chunk_size is None else chunk_size
    fit.model.neurons.check([name], [recording.num_neurons])
    statistics = fit.statistics[[fit.names.index(name)]]
    if not bool(statistics.isfinite().all()):  # not seen in training: of the trials at hand, all of them
        statistics = recording_statistics(fit.guide, recs, name, rows, context).unsqueeze(0)
    shared = _global_draws(fit, num_samples, seed)
    with _seeded(seed, name, fit.device), torch.no_grad():
        for first in range(0, num_samples, many):
            draws, embedding = slice(first, min(first + many, num_samples)), None
            own = _of(shared, draws)
            for start in range(0, len(rows), trials_at_once):
                trials = np.array(rows[start : start + trials_at_once])
                batch = recs.batch(
                    fit.names, names=[name], trials={name: trials}, dtype=fit.dtype, device=fit.device
                )
                batch = dataclasses.replace(batch, embedding_statistics=statistics)
                batch = batch if context is None else batch.first_bins(context)
                # One embedding a draw for all trials: the first chunk draws it, the others are given it.
                known: dict[str, Tensor] = {} if embedding is None else {"embedding": embedding}
                with pyro.plate("draw", draws.stop - draws.start, dim=-3):
                    sites = (
                        poutine.trace(poutine.condition(fit.guide, data=own | known)).get_trace(batch).nodes
                    )
                embedding, latents = sites["embedding"]["value"], sites["latents"]
                with fit.model.given(own):
                    yield Chunk(draws, trials, batch, embedding, latents["value"], latents["fn"])


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
    for chunk in posterior_chunks(fit, recs, name, num_samples, seed, chunk_size, rows, context):
        prior = fit.model.path_prior(chunk.embedding, _ahead(chunk, recs[name], context, horizon))
        z, path = chunk.latents[..., -1:, :], []
        for step in range(horizon):
            z = prior.into(slice(step, step + 1), z).sample()
            path.append(z)
        yield dataclasses.replace(chunk, latents=torch.cat(path, -2))


def _ahead(chunk: Chunk, recording: Recording, context: int, horizon: int) -> Batch:
    """The batch with the inputs of the bins after ``context``; they are zero where a trial has ended."""
    if chunk.batch.inputs is None or recording.inputs is None:
        return chunk.batch
    window = slice(context, context + horizon)
    known = torch.as_tensor(recording.inputs[chunk.trials, window]).to(chunk.batch.inputs)
    inputs = known.new_zeros(1, len(known), horizon, known.shape[-1])
    inputs[0, :, : known.shape[1]] = known
    return dataclasses.replace(chunk.batch, inputs=inputs)


def _global_draws(fit: Fit, num_samples: int, seed: int) -> dict[str, Tensor]:
    """Draws of the posterior of the global sites, ``(num_samples, 1, 1, *event)``, the same for all recordings."""
    if not named(fit.model):
        return {}
    with _seeded(seed, "", fit.device), torch.no_grad(), pyro.plate("draw", num_samples, dim=-3):
        return fit.guide.global_sites()


def _of(shared: dict[str, Tensor], draws: slice) -> dict[str, Tensor]:
    return {name: values[draws] for name, values in shared.items()}


def forecast_trials(recs: Recordings, name: str, context: int) -> list[int]:
    """The trials with at least ``context`` bins; a warning counts the others.

    Raises:
        ValueError: if there is none.
    """
    lengths = recs[name].lengths
    rows = np.flatnonzero(lengths >= context).tolist()
    if not rows:
        raise ValueError(
            f"recording {name!r}: needed trials of at least context = {context} bins to forecast, the longest has "
            f"{lengths.max()}; choose a shorter context"
        )
    if len(rows) < len(lengths):
        warnings.warn(
            f"recording {name!r}: {len(lengths) - len(rows)} of {len(lengths)} trials end before context = {context} "
            "and are not forecast",
            stacklevel=3,
        )
    return rows


def observation(model: MetaSSM, latents: Tensor, batch: Batch):
    """The distribution of every observation given latents ``(S, R, K, T, latent_dim)``."""
    return model.likelihood(model.read_out(latents, batch.recording, batch.width), batch.recording)


def to_numpy(x: Tensor) -> np.ndarray:
    return x.detach().to("cpu", torch.float32).numpy()


def _seeded(seed: int, name: str, device: torch.device):
    """A random state of this seed and recording, for a while."""
    return _Seeded(seed ^ zlib.crc32(name.encode()), device)


class _Seeded:
    def __init__(self, seed: int, device: torch.device):
        self.seed, self.fork = seed, torch.random.fork_rng([device] if device.type == "cuda" else [])

    def __enter__(self):
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error):
        return self.fork.__exit__(*error)
