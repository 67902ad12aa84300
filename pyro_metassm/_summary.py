"""What `Recordings.summary` computes: numbers of each recording, and warnings of what will hurt a fit."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from pyro_metassm.recordings import Recording

DUPLICATE = 0.999  # correlation from which two neurons count as one
DRIFT = 0.5  # change over the session, as a share of the mean
FEW_COUNTS = 0.01  # per bin
FEW_TRIALS = 10


def table(recordings: list[Recording]) -> xr.Dataset:
    """The Dataset over `recording`; warns once for each recording with problems."""
    rows = []
    for recording in recordings:
        rows.append(_describe(recording))
        if problems := _problems(recording, rows[-1]):
            warnings.warn(f"recording {recording.name!r}: {'; '.join(problems)}", UserWarning, stacklevel=3)
    variables = {key: ("recording", np.array([row[key] for row in rows])) for key in rows[0]}
    bin_width = recordings[0].bin_width
    return xr.Dataset(variables, {"recording": [r.name for r in recordings]}, {"bin_width": bin_width})


def _describe(recording: Recording) -> dict[str, float]:
    values, mask = recording.values, recording.mask
    silent, duplicated = _silent_and_duplicated(values, mask)
    correlation, change = _drift(values, mask)
    existing = int(recording.lengths.sum()) * recording.num_neurons
    return {
        "num_trials": recording.num_trials,
        "num_neurons": recording.num_neurons,
        "bins_min": int(recording.lengths.min()),
        "bins_max": int(recording.lengths.max()),
        "missing_fraction": 1.0 - mask.sum() / existing,
        "mean_per_bin": values.sum(dtype=np.float64) / mask.sum(),
        "trials_per_neuron": recording.num_trials / recording.num_neurons,
        "silent_neurons": silent,
        "duplicated_neurons": duplicated,
        "drift": change,
        "drift_correlation": correlation,
    }


def _problems(recording: Recording, row: dict[str, float]) -> list[str]:
    problems = []
    if row["silent_neurons"]:
        problems.append(f"{row['silent_neurons']} of {recording.num_neurons} neurons are silent or constant")
    if row["duplicated_neurons"]:
        problems.append(
            f"{row['duplicated_neurons']} neurons duplicate another one (correlation above {DUPLICATE})"
        )
    # Three standard errors of a rank correlation under no drift (1 / sqrt(trials - 1)), and no less than 0.5.
    if abs(row["drift_correlation"]) > max(0.5, 3 / max(recording.num_trials - 1, 1) ** 0.5) and (
        abs(row["drift"]) > DRIFT
    ):
        problems.append(f"the mean activity drifts by {100 * row['drift']:+.0f}% over the session")
    if recording.has_counts and row["mean_per_bin"] < FEW_COUNTS:
        problems.append(f"only {row['mean_per_bin']:.2g} counts per bin on average (wider bins will help)")
    if recording.num_trials < FEW_TRIALS:
        problems.append(f"only {recording.num_trials} trials")
    return problems


def _silent_and_duplicated(values: np.ndarray, mask: np.ndarray) -> tuple[int, int]:
    """How many neurons never vary, and how many of the others repeat an earlier one."""
    high = np.max(values, axis=(0, 1), where=mask, initial=-np.inf)
    low = np.min(values, axis=(0, 1), where=mask, initial=np.inf)
    alive = np.flatnonzero(high > low)
    series = values.reshape(-1, values.shape[-1])[:, alive]
    observed = mask.reshape(series.shape[0], -1)[:, alive]
    mean = series.sum(axis=0, dtype=np.float64) / np.maximum(observed.sum(axis=0), 1)
    series = np.where(observed, series - mean.astype(series.dtype), 0)
    series /= np.sqrt(np.einsum("sn,sn->n", series, series, dtype=np.float64)).astype(series.dtype)
    # |x - x'|^2 = 2 (1 - correlation) for unit vectors. Sixteen random projections estimate it for all pairs
    # at the price of a 16-column product; only pairs that may be close are then compared in full.
    projected = series.T @ np.random.default_rng(0).standard_normal((len(series), 16)).astype(series.dtype)
    norm = np.einsum("np,np->n", projected, projected)
    distance = (norm[:, None] + norm - 2 * projected @ projected.T) / 16
    first, second = np.nonzero(np.triu(distance < 10 * (1 - DUPLICATE), k=1))
    copies = {
        int(j) for i, j in zip(first, second, strict=True) if np.dot(series[:, i], series[:, j]) > DUPLICATE
    }
    return values.shape[-1] - len(alive), len(copies)


def _drift(values: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Rank correlation of the trials' mean activity with their order, and its relative change.

    Activity is `|y|` (the count itself); a trial's mean is taken relative to what the neurons observed in it
    give on average: neurons that are missing in some trials do not look like drift.
    """
    observed = mask.sum(axis=1)  # (trials, neurons)
    activity = np.abs(values).sum(axis=1, dtype=np.float64)
    usual = activity.sum(axis=0) / np.maximum(observed.sum(axis=0), 1)
    expected = observed @ usual
    level = activity.sum(axis=1)[expected > 0] / expected[expected > 0]
    if len(level) < 3 or level.min() == level.max():
        return 0.0, 0.0
    order = np.arange(len(level))
    ranks = np.searchsorted(np.sort(level), level, side="left") + np.searchsorted(
        np.sort(level), level, side="right"
    )
    change = np.polyfit(order, level, 1)[0] * (len(level) - 1) / level.mean()
    return float(np.corrcoef(order, ranks)[0, 1]), float(change)
