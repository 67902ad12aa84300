"""Scores of a fit on data: explained variance, bits per spike, and the Neural Latents Benchmark's decoding
scores.

Those on arrays (:func:`r2`, :func:`bits_per_spike`, :func:`velocity_r2`, :func:`psth_r2`) know nothing of a
fit; the others take a fit and recordings, score posterior means recording by recording and return a DataArray
over `recording`. NaN in the data is ignored everywhere; a score that is not defined (nothing to explain, no
spikes) is NaN. Of a mixed likelihood bits per spike are those of the neurons that it has as counts, and explained
variance, in a recording of several kinds, that of the others.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm._by_recording import by_recording, named
from pyro_metassm._decoding import decoding_r2, forecast_decoding_r2
from pyro_metassm._draw_scores import crps, rank_levels
from pyro_metassm._forecast_scores import forecast_scores
from pyro_metassm._mean_rates import mean_forecasts, mean_rates
from pyro_metassm._scored_neurons import constant_rates, spiking_neurons, varying_neurons
from pyro_metassm._scores import bits_per_spike, explained, psth_r2, r2, velocity_decoder, velocity_r2
from pyro_metassm.draws import forecast_trials
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit, check_fit

__all__ = [
    "bits_per_spike",
    "co_bps",
    "crps",
    "decoding_r2",
    "forecast_decoding_r2",
    "forecast_r2",
    "forecast_scores",
    "fp_bps",
    "mean_forecasts",
    "mean_rates",
    "psth_r2",
    "r2",
    "rank_levels",
    "rate_bps",
    "reconstruction_r2",
    "velocity_decoder",
    "velocity_r2",
]


def forecast_r2(
    fit: Fit, recs: Recordings, *, context: int, horizon: int, num_samples: int = 100, seed: int = 0
) -> xr.DataArray:
    r"""Share of the variance that the posterior mean forecast explains, for every step ahead.

    At each step ``1 - SSE / SST`` over trials and neurons, ``SST`` around each neuron's mean over the trials
    at that
    step: 0 is a forecast that knows the average trial.

    Args:
        fit: a fit that knows the recordings.
        recs: trials to forecast; those that end before ``context`` are left out, with a warning.
        context: bins given.
        horizon: bins forecast.
        num_samples: draws behind the posterior mean; they are not kept.
        seed: of the draws, as in :func:`pyro_metassm.forecast`.

    Returns:
        ``(recording, horizon_step)`` with steps 1 to ``horizon`` and the coordinate ``lead_time`` (s); NaN
        where all trials, or all but one, have ended.

    Raises:
        ValueError: an unknown recording, ``context`` or ``horizon`` below 1, no trial as long as ``context``.
        FloatingPointError: latents that leave the finite numbers.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> dict(pm.metrics.forecast_r2(fit, recs, context=10, horizon=5, num_samples=4).sizes)
        {'recording': 2, 'horizon_step': 5}
    """
    checks.integers(context=context, horizon=horizon, num_samples=num_samples)
    scores = np.full((len(recs), horizon), np.nan)
    for row, (name, recording) in enumerate(recs.items()):
        trials = forecast_trials(recs, name, context)
        rates = mean_forecasts(fit, recs, name, trials, context, horizon, num_samples, seed)
        seen = recording.observations[trials, context : context + horizon].astype(np.float64)
        chosen = varying_neurons(fit, name)
        seen, rates = seen[..., chosen], rates[..., chosen]
        for step in range(seen.shape[1]):
            scores[row, step] = explained(seen[:, step], rates[:, step], (0,))
    steps = np.arange(1, horizon + 1)
    lead_time = ("horizon_step", steps * recs.bin_width, {"units": "s"})
    coords = {"recording": list(recs), "horizon_step": steps, "lead_time": lead_time}
    attrs = {"context": context, "num_samples": num_samples, "seed": seed}
    return xr.DataArray(scores, coords, ("recording", "horizon_step"), "forecast_r2", attrs)


def reconstruction_r2(fit: Fit, recs: Recordings, *, num_samples: int = 50, seed: int = 0) -> xr.DataArray:
    """Share of the variance that the posterior mean rates explain (:func:`r2`), by recording.

    Args:
        fit: a fit that knows the recordings.
        recs: trials of them.
        num_samples: draws behind the posterior mean; they are not kept.
        seed: of the draws.

    Returns:
        ``(recording,)``.

    Raises:
        ValueError: a recording that the fit does not know.
    """
    checks.integers(num_samples=num_samples)

    def score(name: str, recording: Recording) -> float:
        chosen = varying_neurons(fit, name)
        rates = mean_rates(fit, recs, name, num_samples, seed)
        return r2(recording.observations[..., chosen], rates[..., chosen])

    return by_recording("reconstruction_r2", recs, score)


def rate_bps(
    fit: Fit, recs: Recordings, *, null: Recordings | None = None, num_samples: int = 50, seed: int = 0
) -> xr.DataArray:
    """Bits per spike (:func:`bits_per_spike`) of the posterior mean rates of all neurons, by recording.

    The guide sees what it is scored on (but for held-out neurons): a high score may be an overfit, see
    :func:`co_bps`.

    Args:
        fit: a fit of counts that knows the recordings.
        recs: trials of them.
        null: recordings of the same names whose mean rates are the null model (such as the training trials; a
            neuron silent there counts as half a spike); default ``recs``, as in the benchmark.
        num_samples: draws behind the posterior mean.
        seed: of the draws.

    Returns:
        ``(recording,)``.

    Raises:
        ValueError: an unknown recording, observations that are no counts, negative rates (a Gaussian fit).
    """
    checks.integers(num_samples=num_samples)

    spiking = spiking_neurons(fit, recs)

    def score(name: str, recording: Recording) -> float:
        return _bits(
            mean_rates(fit, recs, name, num_samples, seed), recording.observations, null, name, spiking[name]
        )

    return by_recording("rate_bps", recs, score)


def co_bps(
    fit: Fit, recs: Recordings, *, null: Recordings | None = None, num_samples: int = 50, seed: int = 0
) -> xr.DataArray:
    """Co-smoothing: bits per spike of the held-out neurons alone, which the guide does not see.

    Args:
        fit, null, num_samples, seed: as in :func:`rate_bps`.
        recs: trials of the recordings, made with ``held_out_neurons``.

    Returns:
        ``(recording,)``; NaN for recordings without held-out neurons.

    Raises:
        ValueError: no recording has held-out neurons; and as :func:`rate_bps`.
    """
    check_fit(fit)
    checks.integers(num_samples=num_samples)
    if not any(recording.held_out_neurons.any() for recording in recs.values()):
        raise ValueError(
            "co_bps: needed neurons that the guide does not see, got none in any recording; make the recordings "
            "with pm.Recording(..., held_out_neurons=...), before the fit"
        )

    spiking = spiking_neurons(fit, recs)

    def score(name: str, recording: Recording) -> float:
        held_out = recording.held_out_neurons & spiking[name]
        if not held_out.any():
            return float("nan")
        return _bits(
            mean_rates(fit, recs, name, num_samples, seed), recording.observations, null, name, held_out
        )

    return by_recording("co_bps", recs, score)


def fp_bps(
    fit: Fit,
    recs: Recordings,
    *,
    context: int,
    horizon: int | None = None,
    null: Recordings | None = None,
    num_samples: int = 50,
    seed: int = 0,
) -> xr.DataArray:
    """Forward prediction: bits per spike of the bins after ``context``, which the guide does not see.

    Args:
        fit, recs, null, num_samples, seed: as in :func:`rate_bps`; the default null model is the mean over
            these bins.
        context: bins given; trials that end before are left out, with a warning.
        horizon: bins to score; default up to the end of the longest trial.

    Returns:
        ``(recording,)``.

    Raises:
        ValueError: no trial as long as ``context``, nothing after it; and as :func:`rate_bps`.
    """
    checks.integers(context=context, horizon=1 if horizon is None else horizon, num_samples=num_samples)
    scores, spiking = {}, spiking_neurons(fit, recs)
    for name, recording in recs.items():
        trials = forecast_trials(recs, name, context)
        steps = min(int(recording.lengths.max()) - context, horizon or recording.num_bins)
        if steps < 1:
            raise ValueError(
                f"recording {name!r}: needed bins after context = {context} to score, got none; "
                "choose a shorter context"
            )
        rates = mean_forecasts(fit, recs, name, trials, context, steps, num_samples, seed)
        spikes = recording.observations[trials, context : context + steps]
        scores[name] = named(name, _bits, rates, spikes, null, name, spiking[name])
    return xr.DataArray(list(scores.values()), {"recording": list(scores)}, ("recording",), "fp_bps")


def _bits(
    rates: np.ndarray, spikes: np.ndarray, null: Recordings | None, name: str, chosen: np.ndarray
) -> float:
    if not chosen.any():
        return float("nan")
    null_rates = None if null is None else constant_rates(null[name])[chosen]
    return bits_per_spike(rates[..., chosen], spikes[..., chosen], null_rates)
