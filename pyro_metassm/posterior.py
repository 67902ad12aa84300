"""Draws of a fit's posterior, of its forecasts and of a model's prior, as trees that ArviZ reads."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm import draws as drawing
from pyro_metassm import keeping, trees
from pyro_metassm.dims import dims
from pyro_metassm.draws import (
    chunk_sizes,
    forecast_chunks,
    forecast_trials,
    global_draws,
    log_weights,
    observation,
    observations_of,
    of_draws,
    posterior_chunks,
    refuse_not_finite,
    seeded,
    to_numpy,
)
from pyro_metassm.global_sites import prior_draws
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.observations import observed
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit, check_fit

MAX_GIB = 4.0  # of what is kept of draws, unless more is asked for


@machine.alone()
def posterior(
    fit: Fit,
    recs: Recordings,
    *,
    num_samples: int = 100,
    predictive: bool = False,
    log_likelihood: bool = False,
    keep: Sequence[str] | None = None,
    chunk_size: int | None = None,
    max_gib: float = MAX_GIB,
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
        log_likelihood: also two log likelihoods of every trial (``log_likelihood``, nats), for leave-one-*trial*-out:
            bins are not exchangeable. ``observations`` is ``log p(y_k | z_k)``, given the latents; ``trials`` is
            ``log p(y_k | z_k) p(z_k | e) / q(z_k | y_k, e)``, an estimate of ``log p(y_k | e)`` from one draw, exact
            where the guide is. A trial's latents go with the trial, so this is what to leave trials out with.
        keep: None keeps the draws; any of ``("mean", "sd", "quantiles")`` keeps these statistics over the draws in
            their place, in the groups ``posterior_statistics`` and ``posterior_predictive_statistics``: ``rates_mean``,
            ``rates_sd`` and ``rates_quantiles``, with the dimension ``quantile`` (0.05, 0.25, 0.5, 0.75, 0.95), and so
            on. Embedding and log likelihoods are small and stay draws.
        chunk_size: trials worked on at a time; None chooses for a few hundred MiB.
        max_gib: what may be kept, in GiB; the work takes a few hundred MiB beside it.
        seed: of the draws.

    Returns:
        a tree: ``posterior`` (``embedding (chain, draw, recording, embedding_dim)``, and the model's global sites, over
        ``model.dims`` where these name their dimensions), ``sample_stats`` (the fit's history), and a child for every
        recording with ``posterior`` (``latents``, ``rates``: expected observation per bin), ``observed_data``,
        ``constant_data`` and what was asked for. float32, bins that a trial lacks are NaN.
        ``attrs["subject"]`` of the recordings is a coordinate along ``recording`` (``recording_subject`` where a global
        site has a dimension ``subject``), their conditions along ``trial``.

    Raises:
        ValueError: a recording that the fit does not know, ``num_samples < 1``; more than ``max_gib``, before anything
            is allocated, with what to ask for instead.
        FloatingPointError: draws that are not finite, with recording, trial and bin.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> tree = pm.posterior(fit, recs, num_samples=10)
        >>> tree["posterior"]["embedding"].dims
        ('chain', 'draw', 'recording', 'embedding_dim')
    """
    check_fit(fit)
    store = _store(keep, num_samples, chunk_size)
    stores = {
        name: store(
            (r.num_trials, r.num_bins), r.num_bins, _sizes(fit.model, r.num_neurons, observations=predictive)
        )
        for name, r in recs.items()
    }
    keeping.refuse_too_much(stores.values(), max_gib)
    of, embeddings, children = _dims(fit.model, recs), {}, {}
    for name, recording in recs.items():
        kept = stores.pop(name)
        embedding = np.empty((num_samples, fit.model.embedding_dim), np.float32)
        names = ("observations", "trials") if log_likelihood else ()
        per_trial = {key: np.empty((num_samples, recording.num_trials), np.float32) for key in names}
        for chunk in posterior_chunks(fit, recs, name, num_samples, seed, chunk_size):
            y, where = observation(fit.model, chunk.latents, chunk.batch), (chunk.draws, chunk.trials)
            embedding[chunk.draws] = to_numpy(chunk.embedding[:, 0, 0])
            values = {"latents": chunk.latents, "rates": y.mean}
            refuse_not_finite("rates", values["rates"], name, chunk.trials)
            if predictive:
                values["observations"] = y.sample()
            exists = chunk.batch.time_mask[0].cpu().numpy()
            kept.put(*where, {key: to_numpy(value[:, 0]) for key, value in values.items()}, exists)
            if log_likelihood:
                density = observed(y, chunk.batch.mask).log_prob(chunk.batch.observations)
                per_trial["observations"][where] = to_numpy(density[:, 0])
                per_trial["trials"][where] = to_numpy(log_weights(fit, chunk, y))
        embeddings[name] = embedding
        groups = _groups(kept, keep, "posterior", ("latents", "rates"), of)
        if predictive:
            groups |= _groups(kept, keep, "posterior_predictive", ("observations",), of)
        if log_likelihood:
            trial = (*trees.DRAWS, "trial")
            groups["log_likelihood"] = {key: (trial, value[None]) for key, value in per_trial.items()}
        children[name] = trees.recording_groups(recording, groups, recs.truth.get(name))
    shared = trees.of_globals(fit.model, global_draws(fit, num_samples, seed))
    return trees.tree(embeddings, children, fit.history, {"seed": seed}, shared, recs=recs)


def forecast(
    fit: Fit,
    recs: Recordings,
    *,
    context: int,
    horizon: int,
    num_samples: int = 100,
    predictive: bool = False,
    keep: Sequence[str] | None = None,
    chunk_size: int | None = None,
    max_gib: float = MAX_GIB,
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
        keep: statistics to keep in place of the draws, as of :func:`posterior`: in ``predictions_statistics``.
        chunk_size: trials worked on at a time; None chooses.
        max_gib: what may be kept, in GiB.
        seed: of the draws.

    Returns:
        a tree as :func:`posterior`'s, with ``predictions`` (``latents``, ``rates``; ``observations`` if asked for) over
        the forecast bins in place of ``posterior``, and ``observed_data`` there (NaN where there is none).

    Raises:
        ValueError: an unknown recording, ``context`` or ``horizon`` below 1, no trial as long as ``context``;
            more than ``max_gib``.
        FloatingPointError: draws that are not finite, with recording, trial and bin.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> tree = pm.forecast(fit, recs, context=12, horizon=4, num_samples=10)
        >>> tree["w=5/predictions"]["latents"].shape  # chain, draw, trial, time, latent_dim
        (1, 10, 8, 4, 2)
    """
    check_fit(fit)
    checks.integers(context=context, horizon=horizon)
    store = _store(keep, num_samples, chunk_size)
    rows: dict[str, list[int]] = {}
    for name in recs:  # no comprehension: its warning is to point at the caller
        rows[name] = forecast_trials(recs, name, context)
        ended = int((recs[name].lengths[rows[name]] < context + horizon).sum())
        if fit.model.reads_inputs and ended:
            warnings.warn(
                f"recording {name!r}: the inputs of {ended} of {len(rows[name])} trials end before bin "
                f"{context + horizon}, to which they are forecast; they count as zero from there on",
                stacklevel=2,
            )
    stores = {
        name: store(
            (len(rows[name]), horizon),
            context + horizon,
            _sizes(fit.model, r.num_neurons, observations=predictive),
        )
        for name, r in recs.items()
    }
    keeping.refuse_too_much(stores.values(), max_gib)
    of, embeddings, children = _dims(fit.model, recs), {}, {}
    names = ("latents", "rates", "observations") if predictive else ("latents", "rates")
    for name, recording in recs.items():
        kept, chosen = stores.pop(name), rows[name]
        embedding = np.empty((num_samples, fit.model.embedding_dim), np.float32)
        with machine.alone():  # not the whole function, whose warnings are to point at the caller
            for chunk in forecast_chunks(
                fit, recs, name, chosen, context, horizon, num_samples, seed, chunk_size
            ):
                y = observation(fit.model, chunk.latents, chunk.batch)
                embedding[chunk.draws] = to_numpy(chunk.embedding[:, 0, 0])
                values = {"latents": chunk.latents, "rates": y.mean}
                refuse_not_finite("rates", values["rates"], name, chunk.trials, context)
                if predictive:
                    values["observations"] = y.sample()
                places = np.searchsorted(chosen, chunk.trials)
                kept.put(
                    chunk.draws, places, {key: to_numpy(value[:, 0]) for key, value in values.items()}, None
                )
        embeddings[name] = embedding
        groups, window = _groups(kept, keep, "predictions", names, of), slice(context, context + horizon)
        children[name] = trees.recording_groups(recording, groups, recs.truth.get(name), chosen, window)
    attrs = {"seed": seed, "context": context, "horizon": horizon}
    shared = trees.of_globals(fit.model, global_draws(fit, num_samples, seed))
    return trees.tree(embeddings, children, fit.history, attrs, shared, recs=recs)


def prior_predictive(
    model: MetaSSM, recs: Recordings, *, num_samples: int = 100, max_gib: float = MAX_GIB, seed: int = 0
) -> xr.DataTree:
    """Draws of the model before it has seen data, in the shape of the recordings given.

    Args:
        model: a model (or ``fit.model``: then of the trained parameters with embeddings from their prior).
        recs: recordings of the model, for the numbers of trials, bins and neurons.
        num_samples: draws.
        max_gib: what may be kept, and what one draw of all trials may take while it is made, in GiB.
        seed: of the draws.

    Returns:
        a tree with ``prior`` (``embedding``) and, for every recording, ``prior`` (``latents``, ``rates``) and
        ``prior_predictive`` (``observations``); bins that a trial lacks are NaN, and so is what has left the finite
        numbers (a warning counts such draws).

    Raises:
        ValueError: a recording that the model does not know, ``num_samples < 1``, more than ``max_gib``.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> tree = pm.prior_predictive(model, recs, num_samples=10)
        >>> sorted(tree["w=5"].children)
        ['constant_data', 'observed_data', 'prior', 'prior_predictive']
    """
    store = _store(None, num_samples, None)
    stores = {
        name: store((r.num_trials, r.num_bins), r.num_bins, _sizes(model, r.num_neurons, observations=True))
        for name, r in recs.items()
    }
    keeping.refuse_too_much(stores.values(), max_gib, keep_helps=False)
    for name, r in recs.items():  # a draw is of all trials at once
        work = 4 * r.num_trials * r.num_bins * (r.num_neurons + drawing.NETWORK_WIDTH) / 2**30
        if work > max_gib:
            raise ValueError(
                f"recording {name!r}: needed at most max_gib={max_gib:g} GiB for the work on a draw, got {work:.3g} "
                f"GiB ({r.num_trials} trials of {r.num_bins} bins); ask for fewer trials (recs.take_trials(n)), or a "
                "larger max_gib"
            )
    of, embeddings, children = _dims(model, recs), {}, {}
    exploded = dict.fromkeys(recs, 0)
    parameter = next(model.parameters())
    with seeded(seed, "", parameter.device):
        shared = prior_draws(model, num_samples)
    for name, recording in recs.items():
        kept = stores.pop(name)
        embedding = np.empty((num_samples, model.embedding_dim), np.float32)
        batch = recs.batch(model.names, names=[name], dtype=parameter.dtype, device=parameter.device)
        exists, rows = batch.time_mask[0].cpu().numpy(), np.arange(recording.num_trials)
        per_draw = batch.observations.numel() + drawing.NETWORK_WIDTH * batch.time_mask.numel()
        size = max(1, drawing.ELEMENTS // per_draw)
        with seeded(seed, name, parameter.device), torch.no_grad():
            for first in range(0, num_samples, size):
                draws = slice(first, min(first + size, num_samples))
                # What is not finite is told below.
                with model.given(of_draws(shared, draws)), pyro.validation_enabled(False):
                    with pyro.plate("draw", draws.stop - draws.start, dim=-3):
                        sites = poutine.trace(model).get_trace(batch).nodes
                    drawn = observations_of(model, sites["latents"]["value"], batch)
                values = dict(zip(("latents", "observations", "rates"), drawn, strict=True))
                embedding[draws] = to_numpy(sites["embedding"]["value"][:, 0, 0])
                exploded[name] += int(values["latents"].isnan().flatten(1).any(1).sum())
                kept.put(draws, rows, {key: to_numpy(value[:, 0]) for key, value in values.items()}, exists)
        embeddings[name] = embedding
        groups = _groups(kept, None, "prior", ("latents", "rates"), of)
        groups |= _groups(kept, None, "prior_predictive", ("observations",), of)
        children[name] = trees.recording_groups(recording, groups, recs.truth.get(name))
    if some := [f"{name!r} ({number})" for name, number in exploded.items() if number]:
        warnings.warn(
            f"prior_predictive: of {num_samples} draws some have left the finite numbers, as dynamics do at embeddings "
            f"far from those that they are made for, and are NaN from there on: {checks.some(some)}",
            stacklevel=2,
        )
    of_all = trees.of_globals(model, shared)
    return trees.tree(embeddings, children, None, {"seed": seed}, of_all, "prior", recs=recs)


def _store(keep: Sequence[str] | None, num_samples: int, chunk_size: int | None):
    """Makes the store of a recording from its trials and bins, the bins that a chunk works on, and the sizes."""
    checks.integers(num_samples=num_samples)
    keeping.check(keep, num_samples)
    kind = keeping.AllDraws if keep is None else partial(keeping.Statistics, keep=tuple(keep))

    def store(shape: tuple[int, int], num_bins: int, sizes: Mapping[str, int]) -> keeping.Store:
        _, trials_at_once = chunk_sizes(sizes["rates"], num_bins, num_samples, chunk_size)
        return kind(num_samples, shape, sizes, trials_at_once)

    return store


def _sizes(model: MetaSSM, num_neurons: int, *, observations: bool) -> dict[str, int]:
    sizes = {"latents": model.latent_dim, "rates": num_neurons}
    return sizes | ({"observations": num_neurons} if observations else {})


def _dims(model: MetaSSM, recs: Recordings) -> dict[str, tuple[str, ...]]:
    """Dimensions of the model's sites, on one trial (a model may need its inputs)."""
    name, like = recs.names[0], next(model.parameters())
    return dims(
        model,
        recs.batch(model.names, names=[name], trials={name: [0]}, dtype=like.dtype, device=like.device),
    )


def _groups(
    kept: keeping.Store,
    keep: Sequence[str] | None,
    group: str,
    names: Iterable[str],
    of: Mapping[str, tuple[str, ...]],
) -> dict[str, keeping.Variables]:
    """A group of draws, or of statistics, with the dimensions that the model's sites have within a recording."""
    own = {name: tuple(d for d in of[name] if d != "recording") for name in ("latents", "observations")}
    own["rates"] = own["observations"]  # their means
    return {group if keep is None else f"{group}_statistics": kept.variables(names, own)}
