"""What may be wrong with a recording: each finding a number, and in words with what to do. Nothing is removed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_metassm._checks import some

if TYPE_CHECKING:
    from pyro_metassm.recordings import Recording

DUPLICATE = 0.999  # correlation from which two neurons count as one
COINCIDENT = 0.8  # of counts and of their changes from bin to bin, from which two units share spikes
RARE_HZ = 0.1  # a count rate below which a neuron says next to nothing
DRIFT = 0.5  # change over the session, as a share of the mean
DRIFTING = 1.0  # the same of one neuron, beside
SIGMAS = 5.0  # of the correlation of its activity with the order of trials
ODD = 20.0  # squared distance of a trial from the others, in what is usual, from which it is out of line
LOUD = 3.0  # times the usual activity, or its inverse
FEW_COUNTS = 0.01  # per bin
ENOUGH_COUNTS = 0.05
FEW_TRIALS = 10
FEW_BINS = 10  # for each neuron: its read-out has some such number of weights


def in_words(recording: Recording, row: Mapping[str, float], odd: Sequence[int]) -> list[str]:
    """The findings, each with its number and what to do."""
    neurons, trials = recording.num_neurons, recording.num_trials
    found = []
    if row["silent_neurons"]:
        found.append(
            f"{row['silent_neurons']} of {neurons} neurons are silent or constant (they say nothing: leave them out)"
        )
    if row["rare_neurons"]:
        found.append(
            f"{row['rare_neurons']} of {neurons} neurons fire below {RARE_HZ} Hz (leave them out, or expect nothing of "
            "their read-outs)"
        )
    if row["duplicated_neurons"]:
        found.append(
            f"{row['duplicated_neurons']} neurons duplicate another one (correlation above {DUPLICATE}: keep one of "
            "each)"
        )
    if row["coinciding_neurons"]:
        found.append(
            f"{row['coinciding_neurons']} neurons share their spikes with another one (counts correlate above "
            f"{COINCIDENT}, bin by bin: a unit sorted twice or cross-talk, keep one of each)"
        )
    # Three standard errors of a rank correlation under no drift (1 / sqrt(trials - 1)), and no less than 0.5.
    if abs(row["drift_correlation"]) > max(0.5, 3 / max(trials - 1, 1) ** 0.5) and abs(row["drift"]) > DRIFT:
        found.append(
            f"the mean activity drifts by {100 * row['drift']:+.0f}% over the session (split it into recordings, or "
            "score its last third by a fit of its first: pm.drift)"
        )
    elif row["drifting_neurons"] > max(2, 0.05 * neurons):
        found.append(
            f"{row['drifting_neurons']} of {neurons} neurons drift by more than {100 * DRIFTING:.0f}% over the "
            "session, up or down (units come and go: split it into recordings, or see pm.drift)"
        )
    if len(odd):
        found.append(
            f"{len(odd)} of {trials} trials are out of line with the others ({some(odd)}: look at them, and "
            "leave out what is broken with recording.take)"
        )
    if recording.has_counts and row["mean_per_bin"] < FEW_COUNTS:
        wider = int(np.ceil(ENOUGH_COUNTS / max(row["mean_per_bin"], 1e-9)))
        found.append(
            f"only {row['mean_per_bin']:.2g} counts per bin on average (bins are too fine: make them up to {wider} "
            "times as wide)"
        )
    if trials < FEW_TRIALS:
        found.append(f"only {trials} trials (pool it with others, or adapt a fit of others to it: pm.adapt)")
    elif row["bins_per_neuron"] < FEW_BINS:
        found.append(
            f"only {row['bins_per_neuron']:.2g} bins for each of {neurons} neurons in {trials} trials (too few for "
            "that many read-outs: leave out neurons that fire least, or pool it with others)"
        )
    return found


def of_neurons(recording: Recording) -> tuple[int, int, int, int]:
    """How many neurons never vary; are all but silent; repeat an earlier one; share spikes with an earlier one.

    A neuron is counted once, by the first of these.
    """
    values, mask = recording.values, recording.mask
    high = np.max(values, axis=(0, 1), where=mask, initial=-np.inf)
    low = np.min(values, axis=(0, 1), where=mask, initial=np.inf)
    varies = high > low
    alive = np.flatnonzero(varies)
    if not len(alive):
        return len(varies), 0, 0, 0
    counts = recording.has_counts
    seconds = mask[..., alive].sum((0, 1)) * recording.bin_width
    rare = counts * (values[..., alive].sum((0, 1), dtype=np.float64) < RARE_HZ * seconds)
    series = values.reshape(-1, values.shape[-1])[:, alive]
    observed = mask.reshape(series.shape[0], -1)[:, alive]
    copies = _correlated(_unit(series, observed), DUPLICATE)
    alike: set[int] = set()
    if counts:
        # What two neurons have in common of the state of the animal changes slowly from bin to bin, spikes do not.
        change = np.diff(values[..., alive], axis=1).reshape(-1, len(alive))
        both = (mask[:, 1:] & mask[:, :-1])[..., alive].reshape(change.shape)
        rough = _correlated(_unit(change, both), COINCIDENT)
        alike = (rough & _correlated(_unit(series, observed), COINCIDENT)) - copies
    alike -= set(np.flatnonzero(rare).tolist())  # two spikes that coincide are no proof
    return values.shape[-1] - len(alive), int(np.sum(rare)), len(copies), len(alike)


def _unit(series: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Series ``(bins, neurons)`` centred and of unit length, zero where not observed."""
    mean = series.sum(axis=0, dtype=np.float64) / np.maximum(observed.sum(axis=0), 1)
    series = np.where(observed, series - mean.astype(series.dtype), 0)
    length = np.sqrt(np.einsum("sn,sn->n", series, series, dtype=np.float64))
    return series / np.where(length > 0, length, 1.0).astype(series.dtype)


def _correlated(series: np.ndarray, least: float) -> set[int]:
    """Neurons that correlate with an earlier one by more than this, of unit series ``(bins, neurons)``."""
    # |x - x'|^2 = 2 (1 - correlation) for unit vectors. Random projections estimate it for all pairs at the price of
    # a product of few columns; only pairs that may be close are then compared in full.
    columns = 16 if least > 0.99 else 64
    projected = series.T @ np.random.default_rng(0).standard_normal((len(series), columns)).astype(
        series.dtype
    )
    norm = np.einsum("np,np->n", projected, projected)
    distance = (norm[:, None] + norm - 2 * projected @ projected.T) / columns
    first, second = np.nonzero(np.triu(distance < 2 * (1 - least) * (5 if columns == 16 else 2), k=1))
    return {int(j) for i, j in zip(first, second, strict=True) if np.dot(series[:, i], series[:, j]) > least}


def drift(values: np.ndarray, mask: np.ndarray) -> tuple[float, float, int]:
    """Rank correlation of the trials' mean activity with their order, its relative change, and how many neurons drift.

    Activity is `|y|` (the count itself); a trial's mean is taken relative to what the neurons observed in it
    give on average: neurons that are missing in some trials do not look like drift.
    """
    level, _, activity, observed = _levels(values, mask)
    if len(level) < 3 or level.min() == level.max():
        return 0.0, 0.0, 0
    order = np.arange(len(level))
    ranks = np.searchsorted(np.sort(level), level, side="left") + np.searchsorted(
        np.sort(level), level, side="right"
    )
    change = np.polyfit(order, level, 1)[0] * (len(level) - 1) / level.mean()
    return float(np.corrcoef(order, ranks)[0, 1]), float(change), _drifting(activity, observed)


def _levels(values: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Activity of trials relative to what is expected ``(trial,)``, which trials, and by neuron ``(trial, neuron)``
    the mean over time and the bins observed."""
    observed = mask.sum(axis=1)  # (trials, neurons)
    activity = np.abs(values).sum(axis=1, dtype=np.float64)
    usual = activity.sum(axis=0) / np.maximum(observed.sum(axis=0), 1)
    expected = observed @ usual
    rows = np.flatnonzero(expected > 0)
    return activity[rows].sum(axis=1) / expected[rows], rows, activity / np.maximum(observed, 1), observed


def _drifting(activity: np.ndarray, observed: np.ndarray) -> int:
    """Neurons whose activity follows the order of the trials, beyond doubt, by more than ``DRIFTING`` of its mean."""
    seen = observed > 0
    number = np.maximum(seen.sum(0), 1)
    order = np.where(seen, np.arange(len(activity))[:, None], 0.0)
    x = np.where(seen, order - order.sum(0) / number, 0.0)
    # The square root makes the spread of counts even, so that a few loud trials do not decide.
    root = np.sqrt(activity)
    y = np.where(seen, root - np.where(seen, root, 0.0).sum(0) / number, 0.0)
    size = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    correlation = np.divide((x * y).sum(0), size, out=np.zeros_like(size), where=size > 0)
    mean = np.where(seen, activity, 0.0).sum(0) / number
    slope = np.divide(
        (x * np.where(seen, activity, 0.0)).sum(0),
        (x**2).sum(0),
        out=np.zeros_like(size),
        where=(x**2).sum(0) > 0,
    )
    change = np.abs(slope) * len(activity) > DRIFTING * mean
    return int(((np.abs(correlation) * np.sqrt(number - 1) > SIGMAS) & change).sum())


def odd_trials(values: np.ndarray, mask: np.ndarray) -> list[int]:
    """Trials far from the others: their activity, or how it is spread over the neurons.

    The distance of a trial is the mean over its neurons of the squared deviation from the neuron's median over trials,
    in the neuron's variance; a trial is odd beyond ``ODD`` times the median distance, which one of few Gaussian
    dimensions exceeds once in a million, or where its activity is ``LOUD`` times the usual or less than its inverse.
    """
    level, rows, activity, observed = _levels(values, mask)
    if len(rows) < FEW_TRIALS:
        return []
    usual = np.median(level)
    spread = 1.4826 * np.median(np.abs(level - usual))
    loud = (np.maximum(level, usual) > LOUD * np.minimum(level, usual)) & (
        np.abs(level - usual) > SIGMAS * spread
    )
    seen = observed > 0
    middle = np.nanmedian(np.where(seen, activity, np.nan), axis=0) if seen.any(0).all() else activity.mean(0)
    deviation = np.where(seen, activity - middle, 0.0)
    variance = (deviation**2).sum(0) / np.maximum(seen.sum(0), 1)
    scaled = np.divide(deviation**2, variance, out=np.zeros_like(deviation), where=variance > 0)
    distance = scaled.sum(1) / np.maximum(seen.sum(1), 1)
    far = distance > ODD * np.median(distance)
    return sorted({*rows[loud].tolist(), *np.flatnonzero(far).tolist()})
