"""Scores of a recording of counts: co-smoothing, forecasts and velocity, trial by trial, for errors and differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyro_metassm import baselines, metrics
from pyro_metassm._scores import gained, mean_r2, ratio, velocity_decoder
from pyro_metassm.draws import forecast_trials
from pyro_metassm.experiments.pooling_settings import Setting
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit

BOOTSTRAPS = 200


def row_of(fit: Fit, train: Recordings, test: Recordings, name: str, setting: Setting) -> dict:
    """What :func:`score` gives of a fit's rates of a recording, with its embedding and the trials that it is from."""
    trials = forecast_trials(test, name, setting.context + 1)
    ahead = metrics.mean_forecasts(
        fit, test, name, trials, setting.context, setting.horizon, setting.num_samples, 0
    )
    learned, predicted = (metrics.mean_rates(fit, recs, name, setting.num_samples) for recs in (train, test))
    embedding = fit.statistics[fit.names.index(name), : fit.model.embedding_dim].tolist()
    scores = score(learned, predicted, ahead, train[name], test[name], setting)
    return {"trials": train[name].num_trials, "recording": name, **scores, "embedding": embedding}


def simple_scores(train: Recording, test: Recording, setting: Setting) -> dict[str, dict]:
    """The scores of the simple predictions, by method."""
    late = test.take(np.flatnonzero(test.lengths > setting.context))
    window = slice(setting.context, setting.context + setting.horizon)
    found: dict[str, tuple[Any, Any, Any]] = {}
    for label, predict in (("mean rate", baselines.mean_rate), ("psth", baselines.psth)):
        found[label] = (predict(train, train), predict(train, test), predict(train, late)[:, window])
    found["smoothing"] = (baselines.smoothing(train, train), baselines.smoothing(train, test), None)
    lasting = baselines.persistence(train, late, context=setting.context, horizon=setting.horizon)
    found["persistence"] = (None, None, lasting)
    return {label: score(*rates, train, test, setting) for label, rates in found.items()}


def score(
    learned: np.ndarray | None,
    predicted: np.ndarray | None,
    ahead: np.ndarray | None,
    train: Recording,
    test: Recording,
    setting: Setting,
) -> dict[str, Any]:
    """Scores of one method's rates of a recording, with what their standard errors over trials are made from.

    Args:
        learned, predicted: rates of the training and of the test trials ``(trial, time, neuron)``; None: has none.
        ahead: forecasts of the test trials longer than the context ``(trial, horizon, neuron)``; None: has none.
        train, test: the trials.
        setting: context and horizon.

    Returns:
        ``co`` and ``fp``, each ``[gains, spikes]`` of every trial (nats over the mean rate in the bins scored, and
        counts), ``velocity`` and ``forecast_velocity``, each ``[r2, standard error over trials]``: what is not defined
        is left out. The decoder is learned from ``learned``.
    """
    window = slice(setting.context, setting.context + setting.horizon)
    rows = np.flatnonzero(test.lengths > setting.context)
    held_out, future = test.held_out_neurons, test.observations[rows, window]
    found: dict[str, Any] = {}
    if predicted is not None and held_out.any():
        found["co"] = _gains(predicted[..., held_out], test.observations[..., held_out])
    if ahead is not None and len(rows):
        ahead = ahead[:, : future.shape[1]]
        found["fp"] = _gains(ahead, future)
    if learned is None or predicted is None or train.behavior is None or test.behavior is None:
        return found
    decode = velocity_decoder(learned, train.behavior[..., :2])
    velocity = test.behavior[..., :2]
    found["velocity"] = _r2(velocity, decode(predicted))
    if ahead is not None and len(rows):
        found["forecast_velocity"] = _r2(velocity[rows, window], decode(ahead))
    return found


def bits(
    pair: Sequence[Sequence[float]], minus: Sequence[Sequence[float]] | None = None
) -> tuple[float, float]:
    """Bits per spike of ``[gains, spikes]`` and their standard error over trials; of a difference, trial by trial."""
    gains, spikes = (np.array(values) for values in pair)
    gains = gains if minus is None else gains - np.array(minus[0])
    value, error = ratio(gains, spikes)
    return value / math.log(2), error / math.log(2)


def _gains(rates: np.ndarray, spikes: np.ndarray) -> list[list[float]]:
    return [values.tolist() for values in gained(rates, spikes)]


def _r2(truth: np.ndarray, decoded: np.ndarray) -> list[float]:
    """R2 averaged over dims, and the standard error from resampled trials."""
    known = ~(np.isnan(truth).any(-1) | np.isnan(decoded).any(-1))
    rows = [np.flatnonzero(trial) for trial in known]

    def of(trials: np.ndarray) -> float:
        y, x = (np.concatenate([values[k, rows[k]] for k in trials]) for values in (truth, decoded))
        return mean_r2(y, x)

    rng = np.random.default_rng(0)
    drawn = [of(rng.integers(len(rows), size=len(rows))) for _ in range(BOOTSTRAPS)]
    return [of(np.arange(len(rows))), float(np.nanstd(drawn, ddof=1))]
