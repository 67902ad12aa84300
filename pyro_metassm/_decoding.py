"""Behaviour decoded from reconstructed and from forecast activity (public in `pyro_metassm.metrics`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm._by_recording import by_recording, named
from pyro_metassm._mean_rates import mean_forecasts, mean_rates
from pyro_metassm._scores import mean_r2, velocity_decoder, velocity_r2
from pyro_metassm.draws import forecast_trials
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit, check_fit


def decoding_r2(
    fit: Fit,
    train: Recordings,
    test: Recordings,
    *,
    dims: Iterable[int | str] | None = None,
    lag: float = 0.0,
    num_samples: int = 50,
    seed: int = 0,
) -> xr.DataArray:
    """:func:`velocity_r2` of the recordings' behaviour from posterior mean rates, by recording.

    Args:
        fit: a fit that knows the recordings.
        train: trials to learn the decoder from.
        test: trials to score it on.
        dims: dims of the behaviour: positions, or names in ``attrs["behavior_names"]``; default all.
        lag: by how much the behaviour follows the rates, in s (rounded to bins; motor cortex leads by about
            0.1 s).
        num_samples: draws behind the posterior mean.
        seed: of the draws.

    Returns:
        ``(recording,)``, over the recordings of ``test``.

    Raises:
        ValueError: a recording without behaviour, an unknown dim; and as :func:`velocity_r2`.
    """
    check_fit(fit)
    checks.integers(num_samples=num_samples)
    shift, dims = round(lag / test.bin_width), None if dims is None else list(dims)

    def score(name: str, recording: Recording) -> float:
        parts: list[np.ndarray] = []
        for recs in (train, test):
            rates = mean_rates(fit, recs, name, num_samples, seed)
            parts += _lagged(rates, _behavior(recs[name], dims), shift)
        return velocity_r2(*parts)

    return by_recording("decoding_r2", test, score)


def forecast_decoding_r2(
    fit: Fit,
    train: Recordings,
    test: Recordings,
    *,
    context: int,
    horizon: int,
    dims: Iterable[int | str] | None = None,
    lag: float = 0.0,
    num_samples: int = 50,
    seed: int = 0,
) -> xr.Dataset:
    r"""Behaviour decoded from forecast activity, beside the same bins decoded from reconstructed activity.

    One ridge decoder for each recording, learned from the reconstructed rates of its training trials as in
    :func:`decoding_r2`, reads both (figure 6 of Vermani et al., 2025). R2 is averaged over the dims of the behaviour.

    Args:
        fit, train, test, dims, lag, num_samples, seed: as of :func:`decoding_r2`.
        context: bins given; test trials that end before are left out, with a warning.
        horizon: bins forecast.

    Returns:
        over ``recording``: ``reconstruction`` and ``forecast``, of all bins ``context <= t < context + horizon``
        together; over ``horizon_step`` as well: ``reconstruction_by_step`` and ``forecast_by_step``, each around the
        mean over trials at that step. With a lag it is the rates that these bins are of. NaN where too little is left.

    Raises:
        ValueError: a recording without behaviour, an unknown dim or recording, no trial as long as ``context``.
    """
    check_fit(fit)
    checks.integers(context=context, horizon=horizon, num_samples=num_samples)
    shift, dims = round(lag / test.bin_width), None if dims is None else list(dims)
    ways = ("reconstruction", "forecast")
    whole = {way: np.full(len(test), np.nan) for way in ways}
    steps = {way: np.full((len(test), horizon), np.nan) for way in ways}
    for row, (name, recording) in enumerate(test.items()):
        behavior = named(name, _behavior, recording, dims)
        learned = mean_rates(fit, train, name, num_samples, seed)
        pair = _lagged(learned, named(name, _behavior, train[name], dims), shift)
        decode = named(name, velocity_decoder, *pair)
        trials = forecast_trials(test, name, context)
        reconstructed = mean_rates(fit, test, name, num_samples, seed)[trials, context : context + horizon]
        ahead = mean_forecasts(fit, test, name, trials, context, horizon, num_samples, seed)
        bins = reconstructed.shape[1]  # fewer than the horizon where no trial is as long
        y = _window(behavior[trials], context + shift, bins)
        decoded = {"reconstruction": decode(reconstructed), "forecast": decode(ahead[:, :bins])}
        known = ~np.isnan(np.concatenate([y, *decoded.values()], -1)).any(-1)
        for way, velocity in decoded.items():
            whole[way][row] = mean_r2(y[known], velocity[known])
            for step in range(bins):
                there = known[:, step]
                steps[way][row, step] = mean_r2(y[there, step], velocity[there, step])
    leads = ("horizon_step", np.arange(1, horizon + 1) * test.bin_width, {"units": "s"})
    coords = {"recording": list(test), "horizon_step": np.arange(1, horizon + 1), "lead_time": leads}
    variables: dict[str, Any] = {way: (("recording",), whole[way]) for way in ways}
    variables |= {f"{way}_by_step": (("recording", "horizon_step"), steps[way]) for way in ways}
    return xr.Dataset(variables, coords, {"context": context, "lag": lag, "num_samples": num_samples})


def _window(series: np.ndarray, start: int, bins: int) -> np.ndarray:
    """Bins ``start <= t < start + bins`` of ``(trial, time, dims)``, NaN where there are none."""
    padded = np.full((len(series), bins, series.shape[-1]), np.nan)
    at = np.arange(start, start + bins)
    inside = (at >= 0) & (at < series.shape[1])
    padded[:, inside] = series[:, at[inside]]
    return padded


def _lagged(rates: np.ndarray, behavior: np.ndarray, shift: int) -> list[np.ndarray]:
    """Rates and behaviour such that bin t of the one goes with bin t + shift of the other."""
    stop = max(rates.shape[1] - abs(shift), 0)
    of_rates, of_behavior = (max(-shift, 0), max(shift, 0))
    return [rates[:, of_rates : of_rates + stop], behavior[:, of_behavior : of_behavior + stop]]


def _behavior(recording: Recording, dims: Sequence[int | str] | None) -> np.ndarray:
    if recording.behavior is None:
        raise ValueError("needed behaviour to decode, got none; make it with pm.Recording(..., behavior=...)")
    names = [str(name) for name in recording.attrs.get("behavior_names", [])]
    size = recording.behavior.shape[-1]
    chosen: list[Any] = (
        list(range(size)) if dims is None else [names.index(d) if d in names else d for d in dims]
    )
    if not chosen or not all(isinstance(d, int) and 0 <= d < size for d in chosen):
        raise ValueError(
            f"needed dims of the behaviour as positions below {size} or names of {names}, got {dims}"
        )
    return recording.behavior[..., chosen]
