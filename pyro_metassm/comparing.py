"""Which of several fits describes held-out trials best: scores, and the standard errors of their differences."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm._scores import spike_information
from pyro_metassm.draws import (
    forecast_chunks,
    forecast_trials,
    log_weights,
    observation,
    posterior_chunks,
    to_numpy,
)
from pyro_metassm.global_sites import declared
from pyro_metassm.observations import counted, in_support
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit, check_fit

LOWER_IS_BETTER = ("crps",)
RELIABLE = 0.7  # Pareto shape up to which importance sampling can be trusted (Vehtari et al., 2024)
FEWEST = 25  # draws of which a fifth, the tail, are the five that a fit to it needs
EQUAL = 1e-3  # nats between the largest and the smallest weight, rounding of float32 included
SITES = {"kl_embedding", "kl_latents"}


def compare(
    fits: Mapping[str, Fit],
    test: Recordings,
    *,
    context: int | None = None,
    horizon: int | None = None,
    num_samples: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    r"""Scores of several fits on trials that none of them has seen, beside one another.

    With draws ``e ~ q(e)`` (and of global sites) from the training trials, ``z_s ~ q(z | y, e)`` and the weights
    ``w_s = p(y | z_s) p(z_s | e) / q(z_s | y, e)`` of every trial, the columns are, higher is better but for ``crps``:

    - ``elbo``: ``mean log w_s``, and ``iw``: ``log mean w_s``, a tighter bound of the log density of a trial given the
      training data (Burda et al., 2016); nats per trial. ``psis``: the same with Pareto-smoothed weights, what
      leave-one-out cross-validation estimates from training trials; its ``khat`` tells whether to trust it;
    - ``bits_per_spike`` of counts: of the neurons that the guide does not see, where there are any, else of all (in
      recordings that are not all counts, of the neurons that all fits have as counts);
    - of forecasts from bin ``context`` on: ``forecast_log_score``, ``log mean_s p(y_tn | z_s)`` (nats), ``crps`` (in
      units of the data), both per bin and neuron, and ``forecast_bits_per_spike`` of counts.

    Args:
        fits: by name; all know the recordings.
        test: trials that were not trained on. Trials are exchangeable, time bins are not: every score is of trials.
        context: bins that forecasts are given; default half of the median length.
        horizon: bins forecast; default up to that length.
        num_samples: draws behind every score.
        seed: of the draws.

    Returns:
        a row for each fit, the highest ``psis`` first; columns ``(score, "mean")``, ``(score, "difference")`` from the
        best fit by that score, and ``(score, "se")``, the standard error over trials of that difference;
        ``("khat", "median")``, and ``("khat", "above 0.7")``, the share of trials whose weights are not to be trusted.

    Raises:
        ValueError: no fit, an unknown recording, latent sites besides the embedding and the latents, no trial as long
            as ``context``.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> train, test = recs.split()
        >>> fits = {}
        >>> for dim in (1, 2):
        ...     model = pm.models.MetaSSM(recs, latent_dim=dim, embedding_dim=1)
        ...     options = {"num_steps": 5, "warm_start_steps": 5, "progress": False}
        ...     fits[f"{dim} latents"] = pm.fit(model, pm.guides.DKF(model), train, **options)
        >>> table = pm.compare(fits, test, num_samples=10)
        >>> sorted(table.index)
        ['1 latents', '2 latents']
    """
    if not fits:
        raise ValueError("compare: needed fits by name, got none")
    checks.integers(2, num_samples=num_samples)
    _check(fits, test)
    context, horizon = _window(test, context, horizon)
    scores: dict[str, dict[str, np.ndarray]] = {name: {} for name in fits}
    spiking = {name: _spiking(fits, recording) for name, recording in test.items()}
    parts = {
        name: {
            each: posterior_scores(fit, test, each, num_samples, seed, spiking[each])
            | forecast_scores(fit, test, each, context, horizon, num_samples, seed, spiking[each])[1]
            for each in test
        }
        for name, fit in fits.items()
    }
    for key in dict.fromkeys(key for of in parts.values() for part in of.values() for key in part):
        # Scores of counts are those of the recordings that have some, by all fits.
        having = [each for each in test if all(key in of[each] for of in parts.values())]
        for name, of in parts.items() if having else ():
            scores[name][key] = np.concatenate([of[each][key] for each in having])
    return _table(scores).sort_values(("psis", "mean"), ascending=False)


def _check(fits: Mapping[str, Fit], test: Recordings) -> None:
    for name, fit in fits.items():
        check_fit(fit)
        more = sorted(
            str(key).removeprefix("kl_")
            for key in set(fit.history) - SITES - {f"kl_{site}" for site in declared(fit.model)}
            if str(key).startswith("kl_")
        )
        if more:
            raise ValueError(
                f"compare: {name!r} has the latent sites {more}; needed none besides the embedding, the latents "
                "and PyroSamples"
            )
    discrete = {
        name: np.concatenate([counted(fit.model, each) for each in test]) for name, fit in fits.items()
    }
    if len({each.tobytes() for each in discrete.values()}) > 1:
        warnings.warn(
            "compare: densities of numbers and probabilities of counts are not on one scale; of "
            f"{[n for n, d in discrete.items() if not d.all()]} (densities) and "
            f"{[n for n, d in discrete.items() if d.any()]} (counts) compare bits per spike and crps alone",
            stacklevel=3,
        )


def _spiking(fits: Mapping[str, Fit], recording: Recording) -> np.ndarray:
    """Neurons of a recording that are scored in bits per spike, bool ``(N,)``."""
    if recording.has_counts:
        return np.ones(recording.num_neurons, dtype=bool)
    return np.logical_and.reduce([counted(fit.model, recording.name) for fit in fits.values()])


def _window(test: Recordings, context: int | None, horizon: int | None) -> tuple[int, int]:
    usual = int(np.median(np.concatenate([recording.lengths for recording in test.values()])))
    context = max(1, usual // 2) if context is None else context
    horizon = max(1, usual - context) if horizon is None else horizon
    checks.integers(context=context, horizon=horizon)
    return context, horizon


@machine.alone()
def posterior_scores(
    fit: Fit, test: Recordings, name: str, num_samples: int, seed: int, spiking: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """``elbo``, ``iw``, ``psis`` and ``khat`` of every trial; of neurons ``spiking (N,)`` their ``bits_per_spike``."""
    recording = test[name]
    spiking = np.zeros(recording.num_neurons, dtype=bool) if spiking is None else spiking
    log_w, rates = np.empty((num_samples, recording.num_trials)), np.zeros(recording.values.shape)
    for chunk in posterior_chunks(fit, test, name, num_samples, seed):
        y = observation(fit.model, chunk.latents, chunk.batch)
        log_w[chunk.draws, chunk.trials] = to_numpy(log_weights(fit, chunk, y))
        if spiking.any():
            rates[chunk.trials, : chunk.batch.num_bins] += y.mean[:, 0].double().sum(0).cpu().numpy()
    smoothed, khat = pareto_smoothed(log_w)
    found = {"elbo": log_w.mean(0), "iw": _log_mean(log_w), "psis": _log_mean(smoothed), "khat": khat}
    if spiking.any():
        unseen = recording.held_out_neurons & spiking
        chosen = unseen if unseen.any() else spiking
        spikes = recording.observations[..., chosen]
        found |= _information("bits_per_spike", rates[..., chosen] / num_samples, spikes)
    return found


def pareto_smoothed(log_w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pareto-smoothed log weights ``(draw, trial)`` on the scale of those given, and the shapes ``(trial,)``.

    Reference: Vehtari et al., Pareto smoothed importance sampling (JMLR 2024); computed by ArviZ.
    """
    smoothed, khat = log_w.copy(), np.empty(log_w.shape[1])
    for trial, weights in enumerate(log_w.T):
        # Equal weights have no tail to smooth; where no tail can be fitted, nothing is to be trusted.
        khat[trial] = 0.0 if np.ptp(weights) < EQUAL else np.inf
        if len(weights) < FEWEST:
            continue
        with contextlib.suppress(ValueError):  # of ArviZ, for a tail that it cannot fit
            found, shape = _psislw(weights) if khat[trial] else (weights, 0.0)
            # It normalises. Only the largest weights were smoothed: the smallest tells by what.
            least = weights.argmin()
            found = found + (weights[least] - found[least])
            if np.isfinite(found).all() and np.isfinite(shape):
                smoothed[:, trial], khat[trial] = found, shape
    return smoothed, khat


def _psislw(log_w: np.ndarray) -> tuple[np.ndarray, float]:
    log_w = np.ascontiguousarray(log_w)
    try:
        from arviz_stats.base import array_stats
    except ImportError:  # ArviZ 0.x
        import arviz

        found, shape = arviz.psislw(log_w)
    else:
        found, shape = array_stats.psislw(-log_w)  # of log likelihoods, whose inverses are the weights
    return np.asarray(found), float(np.asarray(shape))


def _log_mean(log_w: np.ndarray) -> np.ndarray:
    """``log mean exp`` over the draws."""
    return np.logaddexp.reduce(log_w, 0) - math.log(len(log_w))


def forecast_scores(
    fit: Fit,
    test: Recordings,
    name: str,
    context: int,
    horizon: int,
    num_samples: int,
    seed: int,
    spiking: np.ndarray | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The trials that have data after ``context``, and of them ``forecast_log_score``, ``crps`` and, of neurons
    ``spiking (N,)``, ``forecast_bits_per_spike``."""
    recording, rows = test[name], forecast_trials(test, name, context)
    seen = np.full((len(rows), horizon, recording.num_neurons), np.nan)
    inside = recording.observations[rows, context : context + horizon]
    seen[:, : inside.shape[1]] = inside
    with_data = ~np.isnan(seen).all((1, 2))
    truth = torch.as_tensor(np.nan_to_num(seen), dtype=fit.dtype, device=fit.device)
    there = torch.as_tensor(~np.isnan(seen), device=fit.device)
    log_density = np.full(seen.shape, -np.inf)
    distance, spread, mean = (np.zeros(seen.shape) for _ in range(3))
    position = {trial: row for row, trial in enumerate(rows)}
    pairs = {}
    with machine.alone():
        for chunk in forecast_chunks(fit, test, name, rows, context, horizon, num_samples, seed):
            places = [position[int(trial)] for trial in chunk.trials]
            y = observation(fit.model, chunk.latents, chunk.batch)
            log_density[places] = np.logaddexp(log_density[places], _log_sum(y, truth[places], there[places]))
            drawn = y.sample()[:, 0]
            half = len(drawn) // 2
            distance[places] += to_numpy((drawn - truth[places]).abs().sum(0))
            spread[places] += to_numpy((drawn[:half] - drawn[half : 2 * half]).abs().sum(0))
            mean[places] += to_numpy(y.mean[:, 0].sum(0))
            pairs[chunk.draws.start] = half
    scores = {
        "forecast_log_score": log_density - math.log(num_samples),
        # E |x - y| - E |x - x'| / 2 (Gneiting and Raftery, 2007), with independent draws x, x'.
        "crps": distance / num_samples - 0.5 * spread / max(sum(pairs.values()), 1),
    }
    result = {key: _mean_of_seen(value, seen)[with_data] for key, value in scores.items()}
    if spiking is not None and spiking.any() and with_data.any():
        mean, seen = mean[with_data][..., spiking], seen[with_data][..., spiking]
        result |= _information("forecast_bits_per_spike", mean / num_samples, seen)
    return np.asarray(rows)[with_data], result


def _log_sum(y, truth: Tensor, there: Tensor) -> np.ndarray:
    """``log sum_s p(y_tn | z_s)``, ``(trial, time, neuron)``; of a joint distribution its share of a neuron."""
    density = y.log_prob(truth if y.event_shape else in_support(y, truth, there))[:, 0]
    if y.event_shape:
        density = (density / truth.shape[-1]).unsqueeze(-1).expand(*density.shape, truth.shape[-1])
    return to_numpy(density.logsumexp(0))


def _mean_of_seen(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    there = ~np.isnan(seen)
    return (values * there).sum((1, 2), where=there) / np.maximum(there.sum((1, 2)), 1)


def _information(key: str, rates: np.ndarray, spikes: np.ndarray) -> dict[str, np.ndarray]:
    if (rates < 0).any():
        return {}  # not those of a count likelihood
    gain = spike_information(rates, spikes)
    total = np.nansum(spikes)
    return {key: gain * (len(spikes) / (total * math.log(2.0)) if total else math.nan)}


def _table(scores: Mapping[str, Mapping[str, np.ndarray]]) -> pd.DataFrame:
    """Means over the trials, and differences from the best with their standard errors, trial by trial."""
    columns: dict[tuple[str, str], dict[str, float]] = {}
    names = list(scores)
    for key in scores[names[0]]:
        if any(key not in of for of in scores.values()):
            continue
        if key == "khat":
            shapes = {name: scores[name][key] for name in names}
            columns[key, "median"] = {name: float(np.median(of)) for name, of in shapes.items()}
            columns[key, f"above {RELIABLE}"] = {
                name: float((of > RELIABLE).mean()) for name, of in shapes.items()
            }
            continue
        means = {name: float(scores[name][key].mean()) for name in names}
        columns[key, "mean"] = means
        best = (min if key in LOWER_IS_BETTER else max)(names, key=means.__getitem__)
        differences = {name: scores[name][key] - scores[best][key] for name in names}
        columns[key, "difference"] = {name: float(d.mean()) for name, d in differences.items()}
        columns[key, "se"] = {
            name: float(d.std(ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.nan
            for name, d in differences.items()
        }
    return pd.DataFrame(columns, index=names)
