"""What `Recordings.summary` computes: numbers of each recording, and findings of what will hurt a fit."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from pyro_metassm import _findings as findings

if TYPE_CHECKING:
    from pyro_metassm.recordings import Recording


def table(recordings: list[Recording]) -> xr.Dataset:
    """The Dataset over `recording`; warns once for each recording with findings."""
    rows, told = [], []
    for recording in recordings:
        row, found = _describe(recording)
        rows.append(row)
        told.append("\n".join(found))
        if found:
            warnings.warn(f"recording {recording.name!r}: {'; '.join(found)}", UserWarning, stacklevel=3)
    variables = {key: ("recording", np.array([row[key] for row in rows])) for key in rows[0]}
    variables["findings"] = ("recording", np.array(told, dtype=str))
    bin_width = recordings[0].bin_width
    return xr.Dataset(variables, {"recording": [r.name for r in recordings]}, {"bin_width": bin_width})


def _describe(recording: Recording) -> tuple[dict[str, float], list[str]]:
    values, mask = recording.values, recording.mask
    silent, rare, copies, alike = findings.of_neurons(recording)
    correlation, change, drifting = findings.drift(values, mask)
    odd = findings.odd_trials(values, mask)
    existing = int(recording.lengths.sum()) * recording.num_neurons
    row: dict[str, float] = {
        "num_trials": recording.num_trials,
        "num_neurons": recording.num_neurons,
        "bins_min": int(recording.lengths.min()),
        "bins_max": int(recording.lengths.max()),
        "missing_fraction": 1.0 - mask.sum() / existing,
        "mean_per_bin": values.sum(dtype=np.float64) / mask.sum(),
        "trials_per_neuron": recording.num_trials / recording.num_neurons,
        "bins_per_neuron": float(mask.any(2).sum()) / recording.num_neurons,
        "silent_neurons": silent,
        "rare_neurons": rare,
        "duplicated_neurons": copies,
        "coinciding_neurons": alike,
        "drift": change,
        "drift_correlation": correlation,
        "drifting_neurons": drifting,
        "odd_trials": len(odd),
    }
    return row, findings.in_words(recording, row, odd)
