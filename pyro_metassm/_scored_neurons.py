"""Which neurons a score is of, by their likelihood, and what it is measured against."""

from __future__ import annotations

import numpy as np

from pyro_metassm.observations import counted
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit, check_fit


def varying_neurons(fit: Fit, name: str) -> np.ndarray:
    """Neurons of which the variance explained is scored: all of one kind, else those that are no counts."""
    check_fit(fit)
    counts = counted(fit.model, name)
    return np.ones_like(counts) if counts.all() else ~counts


def spiking_neurons(fit: Fit, recs: Recordings) -> dict[str, np.ndarray]:
    """Neurons that are scored in bits per spike: the counts by the model, all where it has none anywhere."""
    check_fit(fit)
    counts = {name: counted(fit.model, name) for name in recs}
    return counts if any(each.any() for each in counts.values()) else {n: ~each for n, each in counts.items()}


def constant_rates(recording: Recording) -> np.ndarray:
    """Mean count per bin of each neuron ``(neuron,)``, at least half a spike in all."""
    bins = recording.mask.sum((0, 1))
    return np.maximum(recording.values.sum((0, 1), dtype=np.float64), 0.5) / np.maximum(bins, 1)
