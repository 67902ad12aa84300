"""Forecasts scored at every step ahead, from their draws (public in `pyro_metassm.metrics`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm._draw_scores import crps, rank_levels
from pyro_metassm._scored_neurons import constant_rates, spiking_neurons
from pyro_metassm._scores import are_counts, explained, poisson, smooth
from pyro_metassm.draws import forecast_chunks, forecast_trials, observation, to_numpy
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

SCORES = ("bits_per_spike", "r2", "crps")


def forecast_scores(
    fit: Fit,
    recs: Recordings,
    *,
    context: int,
    horizon: int,
    null: Recordings | None = None,
    smoothing_sd: float = 0.05,
    levels: Sequence[float] = (0.5, 0.9),
    num_samples: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    r"""Forecasts scored at every step ahead, made for counts: bits per spike, smoothed r2, CRPS and coverage.

    - ``bits_per_spike``: of the mean forecast rates over constant ones, each neuron's mean over all bins scored (or
      that of ``null``): the mean over steps, weighted by their spikes, is :func:`fp_bps`. NaN for what is no count.
    - ``r2``: of the mean forecast rates, rates and observations both smoothed along the forecast bins of each trial by
      one Gaussian (no bin before ``context`` enters), around each neuron's mean over trials at that step.
    - ``crps``: of draws of observations, per bin and neuron in units of the data; lower is better (:func:`crps`).
    - ``coverage``: share of the observations within the central interval of each of ``levels``, by the rank among the
      draws, ties at random (:func:`rank_levels`), so that calibrated forecasts of counts cover what they say.

    Args:
        fit: a fit that knows the recordings.
        recs: trials to forecast; those that end before ``context`` are left out, with a warning.
        context: bins given.
        horizon: bins forecast.
        null: recordings whose mean rates are the null model of bits per spike, such as the training trials.
        smoothing_sd: of ``r2``, in s; 0 does not smooth.
        levels: of the intervals.
        num_samples: draws, two or more.
        seed: of the draws.

    Returns:
        a Dataset over ``(recording, horizon_step)``, ``coverage`` over ``level`` too, with the coordinate
        ``lead_time`` (s); NaN where nothing was observed.

    Raises:
        ValueError: an unknown recording, sizes out of range, levels outside (0, 1), no trial as long as ``context``.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> scores = pm.metrics.forecast_scores(fit, recs, context=10, horizon=5, num_samples=4)
        >>> scores["coverage"].dims
        ('recording', 'horizon_step', 'level')
    """
    checks.integers(context=context, horizon=horizon)
    checks.integers(2, num_samples=num_samples)
    if not 0 <= smoothing_sd < np.inf:
        raise ValueError(f"forecast_scores: needed a finite smoothing_sd of at least 0 s, got {smoothing_sd}")
    if np.ndim(levels) != 1 or not len(levels) or not all(0 < level < 1 for level in levels):
        raise ValueError(
            f"forecast_scores: needed levels between 0 and 1, such as (0.5, 0.9), got {levels!r}"
        )
    spiking = spiking_neurons(fit, recs)
    shape = (len(recs), horizon)
    found = {name: np.full(shape, np.nan) for name in SCORES}
    coverage = np.full((*shape, len(levels)), np.nan)
    for row, (name, recording) in enumerate(recs.items()):
        trials = forecast_trials(recs, name, context)
        seen = np.full((len(trials), horizon, recording.num_neurons), np.nan)
        inside = recording.observations[trials, context : context + horizon]
        seen[:, : inside.shape[1]] = inside
        rates, ranked, place = (np.full(seen.shape, np.nan) for _ in range(3))
        rng = np.random.default_rng(seed)
        with machine.alone():
            for rows, mean, drawn in _forecasts(fit, recs, name, trials, context, horizon, num_samples, seed):
                rates[rows] = mean
                ranked[rows] = crps(drawn, seen[rows])
                place[rows] = rank_levels(drawn, seen[rows], rng)
        chosen = spiking[name]
        counts = chosen.any() and are_counts(seen[..., chosen])
        if counts and not (rates[..., chosen] < 0).any():
            base = None if null is None else constant_rates(null[name])[chosen]
            found["bits_per_spike"][row] = _bits(rates[..., chosen], seen[..., chosen], base)
        width = smoothing_sd / recs.bin_width
        smoothed, truth = (
            smooth(np.where(np.isnan(seen), np.nan, values), width) for values in (rates, seen)
        )
        for step in range(horizon):
            there = ~np.isnan(seen[:, step])
            if not there.any():
                continue
            found["r2"][row, step] = explained(truth[:, step], smoothed[:, step], (0,))
            found["crps"][row, step] = ranked[:, step][there].mean()
            away = np.abs(place[:, step][there] - 0.5)
            coverage[row, step] = [(away <= level / 2).mean() for level in levels]
    steps = np.arange(1, horizon + 1)
    coords = {
        "recording": list(recs),
        "horizon_step": steps,
        "level": list(levels),
        "lead_time": ("horizon_step", steps * recs.bin_width, {"units": "s"}),
    }
    dims = ("recording", "horizon_step")
    variables: dict[str, tuple] = {name: (dims, values) for name, values in found.items()}
    variables["coverage"] = ((*dims, "level"), coverage)
    attrs = {"context": context, "smoothing_sd": smoothing_sd, "num_samples": num_samples, "seed": seed}
    return xr.Dataset(variables, coords, attrs)


def _forecasts(
    fit: Fit,
    recs: Recordings,
    name: str,
    trials: list[int],
    context: int,
    horizon: int,
    num_samples: int,
    seed: int,
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Some trials at a time, all their draws together: rows, mean rates and drawn observations ``(draw, ...)``."""
    position = {trial: row for row, trial in enumerate(trials)}
    means: list[np.ndarray] = []
    drawn: list[np.ndarray] = []
    for chunk in forecast_chunks(fit, recs, name, trials, context, horizon, num_samples, seed):
        y = observation(fit.model, chunk.latents, chunk.batch)
        means.append(y.mean[:, 0].double().sum(0).cpu().numpy())
        drawn.append(to_numpy(y.sample()[:, 0]))
        if chunk.draws.stop == num_samples:
            rows = [position[int(trial)] for trial in chunk.trials]
            yield rows, np.sum(means, 0) / num_samples, np.concatenate(drawn)
            means, drawn = [], []


def _bits(rates: np.ndarray, spikes: np.ndarray, null: np.ndarray | None) -> np.ndarray:
    """Bits per spike of each step ``(time,)`` for ``(trial, time, neuron)``."""
    if null is None:
        count = (~np.isnan(spikes)).sum((0, 1))
        null = np.nansum(spikes, (0, 1)) / np.maximum(count, 1)
    result = np.full(spikes.shape[1], np.nan)
    for step in range(spikes.shape[1]):
        y, r = spikes[:, step], rates[:, step]
        seen = ~np.isnan(y)
        if y[seen].sum():
            gain = poisson(y[seen], r[seen], "rates")
            gain -= poisson(y[seen], np.broadcast_to(null, y.shape)[seen], "null_rates")
            result[step] = gain / (y[seen].sum() * np.log(2.0))
    return result
