"""Times to bins: edges free of accumulated round-off, counts of spikes, means of sampled series."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from decimal import Context, Decimal
from typing import Any

import numpy as np

from pyro_metassm import _checks as checks

EXACT = Context(prec=800)  # digits: enough for any sum of doubles as they are written
WHOLE = 1e-6  # of a bin: a window that misses a whole number of bins by no more has that number


def bin_spikes(
    spike_times: Sequence[Any],
    times: Any,
    *,
    window: tuple[float, float],
    bin_width: float,
) -> np.ndarray:
    r"""Spike counts in bins around events.

    Bin k around the event at `a` is `[a + window[0] + k bin_width, a + window[0] + (k + 1) bin_width)`, half-open, so
    that every spike in the window is counted exactly once. The edges are made once, in decimal arithmetic on the
    numbers as they are written, and then rounded to doubles: a spike at 0.3 s belongs to the bin that starts at
    `3 * 0.1` s (in doubles 0.30000000000000004), and windows that touch share their edge.

    Args:
        spike_times: Times of the spikes of each unit in seconds, `(spikes,)` arrays, sorted or not.
        times: `(events,)` seconds.
        window: Start and stop around each event, in seconds; a whole number of bins.
        bin_width: In seconds.

    Returns:
        `(events, bins, units)` float32.

    Raises:
        ValueError: No units, a window that is no whole number of bins, events that are not finite, milliseconds.

    Example:
        >>> bin_spikes([[0.1, 0.3, 0.35], [0.0]], [0.0], window=(0.0, 0.4), bin_width=0.1)[0].T
        array([[0., 1., 0., 2.],
               [1., 0., 0., 0.]], dtype=float32)
    """
    if not len(spike_times):
        raise ValueError("bin_spikes: needed the spike times of one or more units, got none")
    width = checks.bin_width_of("bin_spikes", bin_width)
    num_bins = num_bins_of("bin_spikes", window, width)
    edges = edges_of(times, window[0], width, num_bins)
    return np.stack([counts(finite(train, str(n)), edges) for n, train in enumerate(spike_times)], axis=-1)


def window_of(caller: str, window: Any) -> tuple[float, float]:
    """Start and stop of a window.

    Raises:
        ValueError: It is not two finite numbers, or empty.
    """
    try:
        start, stop = (float(side) for side in window)
    except (TypeError, ValueError):
        start = stop = 0.0
    if not (np.isfinite([start, stop]).all() and stop > start):
        raise ValueError(
            f"{caller}: needed a window (start, stop) in s, got {window!r}; use such as (-0.1, 0.5)"
        )
    return start, stop


def num_bins_of(caller: str, window: tuple[float, float], bin_width: float) -> int:
    """The bins of a window, which must be a whole number.

    Raises:
        ValueError: It is not, or the window is empty.
    """
    start, stop = window_of(caller, window)
    exact = (stop - start) / bin_width
    number = round(exact)
    if number < 1 or abs(exact - number) > WHOLE:
        near = start + max(number, 1) * bin_width
        raise ValueError(
            f"{caller}: needed a window of whole bins ({bin_width:g} s), got {window} ({exact:g} bins); "
            f"use such as ({start:g}, {near:g})"
        )
    return number


def edges_of(times: Any, start: float, bin_width: float, num_bins: int, shift: float = 0.0) -> np.ndarray:
    """Edges `time + shift + start + k bin_width` of bins around events: the doubles nearest to the decimal sums.

    Args:
        times: `(events,)`, finite.
        start, bin_width, shift: In the unit of the times.
        num_bins: Of each event.

    Returns:
        `(events, num_bins + 1)` float64, never descending.
    """
    array = np.asarray(times, dtype=np.float64)
    if array.ndim != 1 or not np.isfinite(array).all():
        bad = "" if array.ndim != 1 else f" with {(~np.isfinite(array)).sum()} that are not finite"
        raise ValueError(
            f"times: needed finite times (events,), got shape {array.shape}{bad}; leave such events out"
        )
    add, number = EXACT.add, lambda value: Decimal(repr(float(value)))
    first, width = add(number(start), number(shift)), number(bin_width)
    offsets = [add(first, EXACT.multiply(width, Decimal(k))) for k in range(num_bins + 1)]
    return np.array([[float(add(number(t), offset)) for offset in offsets] for t in array]).reshape(
        len(array), num_bins + 1
    )


def counts(train: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Spikes with `edges[..., k] <= t < edges[..., k + 1]`, of a sorted train; float32."""
    before = np.searchsorted(train, edges.ravel(), side="left").reshape(edges.shape)
    return np.diff(before, axis=-1).astype(np.float32)


def finite(train: Any, unit: str) -> np.ndarray:
    """A spike train, sorted; spikes without a time are counted in a warning.

    Raises:
        ValueError: It is no array of numbers `(spikes,)`.
    """
    array = np.asarray(train)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "biuf"):
        raise ValueError(
            f"unit {unit}: needed spike times (spikes,) in s, got {array.dtype} of shape {array.shape}"
        )
    array = array.astype(np.float64)
    good = np.isfinite(array)
    if not good.all():
        warnings.warn(
            f"unit {unit}: {(~good).sum()} of {len(array)} spike times are not finite, and not counted",
            UserWarning,
            stacklevel=3,
        )
        array = array[good]
    return array if (array[1:] >= array[:-1]).all() else np.sort(array)


def bin_means(times: np.ndarray, values: np.ndarray, edges: np.ndarray, step: float) -> np.ndarray:
    """A sampled series in bins: the mean of the samples in `[edge_k, edge_k+1)`, NaN samples left out.

    A bin without samples, where the series is slower than the bins, gets the line between the samples on both sides
    of its centre if these are neighbours in the series (no gap of more than two and a half usual sampling intervals),
    else NaN.

    Args:
        times: `(samples,)` ascending.
        values: `(samples, dims)`.
        edges: `(bins + 1,)`.
        step: The usual sampling interval.

    Returns:
        `(bins, dims)`, NaN where nothing is known.
    """
    num_bins, dims = len(edges) - 1, values.shape[1]
    means = np.full((num_bins, dims), np.nan)
    if len(times) == 0:
        return means
    bins = np.searchsorted(edges, times, side="right") - 1
    inside = (bins >= 0) & (bins < num_bins)
    known = np.isfinite(values) & inside[:, None]
    sums, number = np.zeros((num_bins, dims)), np.zeros((num_bins, dims))
    rows = np.clip(bins, 0, num_bins - 1)
    np.add.at(sums, rows, np.where(known, values, 0.0))
    np.add.at(number, rows, known)
    np.divide(sums, number, out=means, where=number > 0)
    empty = np.bincount(rows[inside], minlength=num_bins) == 0
    if empty.any() and len(times) > 1:
        centres = 0.5 * (edges[:-1] + edges[1:])[empty]
        right = np.searchsorted(times, centres, side="left")
        between = (right > 0) & (right < len(times))
        right = np.clip(right, 1, len(times) - 1)
        gap = times[right] - times[right - 1]
        near = between & (gap <= 2.5 * step) & (gap > 0)
        share = np.divide(centres - times[right - 1], gap, out=np.zeros_like(gap), where=gap > 0)[:, None]
        line = (1 - share) * values[right - 1] + share * values[right]
        means[empty] = np.where(near[:, None], line, np.nan)
    return means
