"""Posterior means of rates and of their forecasts, without keeping draws (public in `pyro_metassm.metrics`)."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from pyro_metassm import _machine as machine
from pyro_metassm.draws import Chunk, forecast_chunks, observation, posterior_chunks
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit


def mean_rates(fit: Fit, recs: Recordings, name: str, num_samples: int = 50, seed: int = 0) -> np.ndarray:
    """Posterior mean rates of one recording, without keeping the draws.

    Args:
        fit: a fit that knows the recording.
        recs: trials of it.
        name: the recording.
        num_samples: draws behind the mean.
        seed: of the draws, as in :func:`pyro_metassm.posterior`.

    Returns:
        ``(trial, time, neuron)``, expected observation per bin; NaN in bins that a trial lacks.
    """
    recording = recs[name]
    chunks = posterior_chunks(fit, recs, name, num_samples, seed)
    rates = _mean_over_draws(fit, chunks, recording.values.shape, range(recording.num_trials), num_samples)
    rates[np.arange(recording.num_bins) >= recording.lengths[:, None]] = np.nan
    return rates


def mean_forecasts(
    fit: Fit,
    recs: Recordings,
    name: str,
    trials: list[int],
    context: int,
    horizon: int,
    num_samples: int,
    seed: int,
) -> np.ndarray:
    """Posterior mean forecasts ``(trial, horizon, neuron)`` of some trials of a recording."""
    chunks = forecast_chunks(fit, recs, name, trials, context, horizon, num_samples, seed)
    return _mean_over_draws(fit, chunks, (len(trials), horizon, recs[name].num_neurons), trials, num_samples)


@machine.alone()
def _mean_over_draws(
    fit: Fit, chunks: Iterable[Chunk], shape: tuple[int, ...], trials: Iterable[int], num_samples: int
) -> np.ndarray:
    """Mean rates ``shape = (trial, time, neuron)`` of the given trials, summed chunk by chunk in float64."""
    total = np.zeros(shape)
    position = {trial: row for row, trial in enumerate(trials)}
    for chunk in chunks:
        mean = observation(fit.model, chunk.latents, chunk.batch).mean[:, 0]  # (draw, trial, time, neuron)
        rows = [position[int(trial)] for trial in chunk.trials]
        total[rows, : mean.shape[2]] += mean.double().sum(0).cpu().numpy()
    return total / num_samples
