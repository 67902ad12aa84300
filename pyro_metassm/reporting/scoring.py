"""The scores of a page: of the fit on the trials given, beside simple predictions from the training trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from pyro_metassm import baselines, metrics
from pyro_metassm._scored_neurons import spiking_neurons, varying_neurons
from pyro_metassm._scores import are_counts, bits_per_spike, explained
from pyro_metassm.observations import counted
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.reporting.asked import Asked, Missing, Scores, attempt
from pyro_metassm.result import Fit

LEVEL = 0.9  # of the intervals whose coverage is shown
FIT = "fit"
LABELS = {
    "reconstruction_r2": "Reconstruction, R²",
    "forecast_r2": "Forecast, R²",
    "fp_bps": "Forecast, bits per spike",
    "forecast_bits_per_spike": "Forecast, bits per spike",
    "bits_per_spike": "Rates of neurons that were seen, bits per spike",
    "co_bps": "Held-out neurons, bits per spike",
    "velocity_r2": "Velocity decoded from rates, R²",
    "forecast_velocity_r2": "Velocity decoded from forecast rates, R²",
    "psth_r2": "Averages by condition (PSTH), R²",
    "coverage": f"Share of observations in {100 * LEVEL:.0f} % forecast intervals ({LEVEL:.2f} if calibrated)",
}


@dataclass
class Found:
    """What was measured: ``scores``; ``curve`` and ``coverage (recording, horizon_step)``; what is missing, and why."""

    scores: Scores = field(default_factory=dict)
    curve: xr.DataArray | None = None
    coverage: xr.DataArray | None = None
    missing: list[str] = field(default_factory=list)
    num_ended: int = 0


def label_of(score: str) -> str:
    """A score as people call it; ``"forecast_r2, 5 bins ahead"`` keeps what stands behind the comma."""
    key, comma, rest = score.partition(",")
    return LABELS.get(key, key.replace("_", " ")) + comma + rest


def measure(asked: Asked) -> Found:
    """Everything that the data allow."""
    found = Found()
    if asked.recs is None:
        return found
    recs, fit = asked.recs, asked.fit
    draws: dict[str, Any] = {"num_samples": asked.num_samples, "seed": asked.seed}
    window: dict[str, Any] = {"context": asked.context, "horizon": asked.horizon}
    made = attempt(lambda: metrics.reconstruction_r2(fit, recs, **draws))
    _keep(found, "reconstruction_r2", made)
    long = [recording for name in recs if (recording := asked.late(name)) is not None]
    if not long:
        found.missing.append(f"no trial is longer than the {asked.context} bins that forecasts are given")
        return found
    late = Recordings(long)
    found.num_ended = sum(r.num_trials for r in recs.values()) - sum(r.num_trials for r in late.values())
    curve = attempt(lambda: metrics.forecast_r2(fit, late, **window, **draws))
    if isinstance(curve, Missing):
        found.missing.append(f"forecast_r2: {curve.why}")
        return found
    found.curve = curve
    scored = (
        curve.notnull().all("recording")
        if curve.notnull().all("recording").any()
        else curve.notnull().any("recording")
    )
    step = int(curve["horizon_step"].values[scored.values][-1]) if scored.any() else asked.horizon
    ahead = f"forecast_r2, {bins(step)} ({step * recs.bin_width:.3g} s) ahead"
    _keep(found, ahead, curve.sel(horizon_step=step))
    levels = attempt(
        lambda: metrics.forecast_scores(fit, late, **window, levels=(LEVEL,), **draws)["coverage"]
    )
    if not isinstance(levels, Missing):
        found.coverage = levels.isel(level=0)
        _keep(found, "coverage", found.coverage.mean("horizon_step"))
    if asked.train is None:
        return found
    train = asked.train.select(list(late))
    others = attempt(lambda: simple_forecasts(fit, train, late, **window, steps=[step]))
    for name, scores in found.scores.get(ahead, {}).items():
        scores |= (
            {}
            if isinstance(others, Missing)
            else others.get(f"forecast_r2, {bins(step)} ahead", {}).get(name, {})
        )
    if not any(_has_more(fit, recording) for recording in late.values()):
        return found
    table = attempt(lambda: baselines.table(fit, train, late, **window, **draws))
    if isinstance(table, Missing):
        found.missing.append(f"baselines: {table.why}")
        return found
    for (score, name), row in table.iterrows():
        cells = {(FIT if method == "model" else str(method)): float(v) for method, v in row.items()}
        cells = {method: value for method, value in cells.items() if np.isfinite(value)}
        found.scores.setdefault(str(score), {})[str(name)] = cells
    return found


def _has_more(fit: Fit, recording: Recording) -> bool:
    """Whether the table of baselines has a score of a recording: of counts, of behaviour or of conditions."""
    spiking = counted(fit.model, recording.name).any() and recording.has_counts
    return bool(spiking) or recording.behavior is not None or recording.condition is not None


def _keep(found: Found, score: str, values: xr.DataArray | Missing) -> None:
    if isinstance(values, Missing):
        found.missing.append(f"{score}: {values.why}")
        return
    names = [str(name) for name in values["recording"].values]
    cells = {name: float(v) for name, v in zip(names, values.values, strict=True) if np.isfinite(v)}
    if cells:
        found.scores[score] = {name: {FIT: value} for name, value in cells.items()}


def bins(number: int) -> str:
    return f"{number} bin" + "s" * (number != 1)


def simple_forecasts(
    fit: Fit, train: Recordings, test: Recordings, *, context: int, horizon: int, steps: Sequence[int]
) -> Scores:
    """What forecasts that know no dynamics reach: those of :mod:`pyro_metassm.baselines`, of the trials long enough.

    Returns:
        ``"forecast_r2, 5 bins ahead"`` for each of ``steps``, as :func:`pyro_metassm.metrics.forecast_r2`, and
        ``forecast_bits_per_spike``, as :func:`pyro_metassm.metrics.fp_bps`; what is not defined is left out.
    """
    found: Scores = {}
    spiking = spiking_neurons(fit, test)
    window = slice(context, context + horizon)

    def put(score: str, name: str, method: str, value: float) -> None:
        if np.isfinite(value):
            found.setdefault(score, {}).setdefault(name, {})[method] = float(value)

    for name in test:
        rows = np.flatnonzero(test[name].lengths > context)
        if not len(rows):
            continue
        one, seen = train[name], test[name].take(rows)
        varying = varying_neurons(fit, name)
        y = seen.observations[:, window].astype(np.float64)
        counts = y[..., spiking[name]]
        for method, rates in {
            "mean rate": baselines.mean_rate(one, seen)[:, window],
            "psth": baselines.psth(one, seen)[:, window],
            "persistence": baselines.persistence(one, seen, context=context, horizon=horizon)[
                :, : y.shape[1]
            ],
        }.items():
            for k in (k for k in steps if k <= y.shape[1]):
                score = explained(y[:, k - 1][..., varying], rates[:, k - 1][..., varying], (0,))
                put(f"forecast_r2, {bins(k)} ahead", name, method, score)
            if spiking[name].any() and are_counts(counts):
                bits = bits_per_spike(rates[..., spiking[name]], counts)
                put("forecast_bits_per_spike", name, method, bits)
    return found
