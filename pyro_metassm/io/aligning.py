"""Spike trains, trials and behaviour of one session to a `Recording`: what every loader of times shares."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from pyro_metassm import _checks as checks
from pyro_metassm.io import binning, seconds, tables
from pyro_metassm.recordings import Recording

TOUCH = 1e-6  # s: intervals closer than this touch, and a bin may reach out of one by no more


@dataclasses.dataclass(frozen=True)
class Series:
    """A sampled series: `times (samples,)` in s, and `read(first, stop)`, which gives `(stop - first, dims)`."""

    path: str
    times: np.ndarray
    read: Callable[[int, int], np.ndarray]
    columns: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Session:
    """What a file knows of a session, with its trials and units chosen.

    Attributes:
        trains: Spike times of each unit, sorted.
        trials: Table with `start_time` and `stop_time` in s.
        observed: Of each unit the intervals `(intervals, 2)` in which it was observed; None: from the first trial or
            spike of the session to the last.
        invalid: Intervals `(intervals, 2)` in which nothing was.
    """

    name: str
    trains: Sequence[np.ndarray]
    trials: pd.DataFrame
    observed: Sequence[np.ndarray] | None = None
    invalid: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How time is cut: see `pyro_metassm.read_nwb`."""

    align_to: str
    window: tuple[float, float] | None
    bin_width: float
    lag: float
    overlap: Literal["warn", "error"]


def recording_of(
    session: Session,
    how: Alignment,
    series: Sequence[Series],
    *,
    condition: Any = None,
    neuron_ids: Any = None,
    held_out_neurons: Any = None,
    attrs: Mapping[str, Any] | None = None,
    per_trial: Mapping[str, np.ndarray] | None = None,
) -> Recording:
    """The recording of a session.

    Args:
        session: The data.
        how: The windows and bins.
        series: Behaviour, side by side.
        condition: Column or columns of the trials.
        neuron_ids, held_out_neurons, attrs: As `Recording` takes them.
        per_trial: More arrays with a row a trial, for `attrs["trials"]`.

    Raises:
        ValueError: Anything in milliseconds, windows without a spike, no trial left, series that go back in time.
    """
    name, trials = session.name, session.trials
    width = checks.bin_width_of(name, how.bin_width)
    if how.window is not None:
        binning.window_of(f"recording {name!r}", how.window)
    seconds.check(name, session.trains, trials, how.window, how.lag)
    if how.overlap not in ("warn", "error"):
        raise checks.fail(name, 'overlap="warn" or "error"', repr(how.overlap), "choose one")
    times = seconds.event_times(name, trials, how.align_to)
    edges, lengths = _edges(name, trials, times, how, width)
    keep = np.isfinite(times) & (lengths > 0)
    _dropped(name, ~np.isfinite(times), f"have no {how.align_to}")
    _dropped(name, np.isfinite(times) & (lengths == 0), "are shorter than a bin")
    y = np.stack([binning.counts(train, edges) for train in session.trains], axis=-1)
    inside = np.arange(edges.shape[1] - 1) < lengths[:, None]
    if not (y * inside[..., None]).any():
        raise _no_spikes(session, edges[keep])
    mask = _observed(session, edges) & inside[..., None]
    lost = (y * (inside[..., None] & ~mask)).sum()
    if lost:
        _warn(
            name, f"{int(lost)} spikes in the windows lie where their unit was not observed, and are missing"
        )
    unseen = keep & ~mask.any((1, 2))
    _dropped(name, unseen, "lie where no unit was observed")
    keep &= ~unseen
    if not keep.any():
        raise checks.fail(name, "a trial that can be used", "none", "see the warnings")
    _check_overlap(session, edges[keep], lengths[keep], how.overlap)
    longest = int(lengths[keep].max())
    behavior = _behavior(name, series, times[keep], lengths[keep], how, width)
    chosen = trials[keep]
    rows = tables.plain_columns(chosen) | {key: array[keep] for key, array in (per_trial or {}).items()}
    more: dict[str, Any] = {"align_to": how.align_to, "trials": rows}
    if how.window is not None:
        more["window"] = [float(side) for side in how.window]
    if series:
        more |= {"behavior_names": [c for one in series for c in one.columns], "behavior_lag": how.lag}
    return Recording(
        name,
        y[keep, :longest],
        bin_width=width,
        mask=mask[keep, :longest],
        lengths=lengths[keep],
        behavior=behavior,
        condition=tables.conditions_of(name, chosen, condition),
        neuron_ids=neuron_ids,
        held_out_neurons=held_out_neurons,
        attrs=dict(attrs or {}) | more,
    )


def _warn(name: str, text: str) -> None:
    warnings.warn(f"recording {name!r}: {text}", UserWarning, stacklevel=4)


def _dropped(name: str, which: np.ndarray, why: str) -> None:
    if which.any():
        text = f"{which.sum()} of {len(which)} trials {why}, and are left out "
        warnings.warn(
            f"recording {name!r}: {text}({checks.some(np.flatnonzero(which))})", UserWarning, stacklevel=4
        )


def _edges(name, trials, times, how: Alignment, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the bins `(trials, bins + 1)` and how many of them each trial has; trials without a time have none."""
    good = np.isfinite(times)
    at = np.where(good, times, 0.0)
    if how.window is not None:
        number = binning.num_bins_of(f"recording {name!r}", how.window, width)
        return binning.edges_of(at, how.window[0], width, number), np.where(good, number, 0)
    # A bin that ends with the trial, but for round-off, belongs to it.
    stops = trials["stop_time"].to_numpy(np.float64)
    whole = np.floor((stops - times) / width + binning.WHOLE)
    lengths = np.where(np.isfinite(whole), np.maximum(np.nan_to_num(whole), 0), 0).astype(np.int64)
    if not lengths.any():
        raise checks.fail(
            name, f"a trial of at least one bin ({width:g} s) after {how.align_to}", "none", "use finer bins"
        )
    return binning.edges_of(at, 0.0, width, int(lengths.max())), lengths


def _observed(session: Session, edges: np.ndarray) -> np.ndarray:
    """Whether a unit was observed all through a bin, `(trials, bins, units)`."""
    shape = (edges.shape[0], edges.shape[1] - 1)
    mask = np.empty((*shape, len(session.trains)), dtype=bool)
    if session.observed is None:
        mask[:] = _within(np.array([_span(session)]), edges)[..., None]
    else:
        known: dict[bytes, np.ndarray] = {}  # most often all units have the same intervals
        for unit, intervals in enumerate(session.observed):
            key = intervals.tobytes()
            if key not in known:
                known[key] = _within(intervals, edges)
            mask[..., unit] = known[key]
    for start, stop in () if session.invalid is None else session.invalid:
        mask[(edges[:, :-1] < stop - TOUCH) & (edges[:, 1:] > start + TOUCH)] = False
    return mask


def _within(intervals: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Whether bins lie in one of the intervals `(intervals, 2)`; those that touch are one."""
    if len(intervals) == 0:
        return np.zeros((edges.shape[0], edges.shape[1] - 1), dtype=bool)
    ordered = intervals[np.argsort(intervals[:, 0], kind="stable")]
    reach = np.maximum.accumulate(ordered[:, 1])
    first = np.concatenate([[True], ordered[1:, 0] > reach[:-1] + TOUCH])
    starts, stops = ordered[first, 0], reach[np.append(np.flatnonzero(first)[1:] - 1, len(reach) - 1)]
    own = np.searchsorted(starts, edges[:, :-1] + TOUCH, side="right") - 1
    return (own >= 0) & (edges[:, 1:] <= stops[np.maximum(own, 0)] + TOUCH)


def _span(session: Session) -> tuple[float, float]:
    """From when to when there was a session: from the first to the last trial or spike."""
    low = [train[0] for train in session.trains if len(train)] + [session.trials["start_time"].min()]
    high = [train[-1] for train in session.trains if len(train)] + [session.trials["stop_time"].max()]
    return float(np.min(low)), float(np.nextafter(np.max(high), np.inf))


def _check_overlap(session: Session, edges: np.ndarray, lengths: np.ndarray, overlap: str) -> None:
    starts, stops = edges[:, 0], edges[np.arange(len(edges)), lengths]
    order = np.argsort(starts, kind="stable")
    reach = np.maximum.accumulate(stops[order])[:-1]
    first, last = starts[order][1:], np.minimum(reach, stops[order][1:])
    pairs = last > first
    if not pairs.any():
        return
    bounds = np.stack([first[pairs], last[pairs]], axis=1)
    spikes = sum(int(binning.counts(train, bounds).sum()) for train in session.trains)
    text = (
        f"{pairs.sum()} of {len(edges)} windows begin before an earlier one has ended: {spikes} spikes stand in two "
        "trials or more"
    )
    if overlap == "error":
        raise checks.fail(session.name, "windows that do not overlap", text, "shorten the window")
    _warn(session.name, text)


def _behavior(
    name, series: Sequence[Series], times, lengths, how: Alignment, width: float
) -> np.ndarray | None:
    """All series in the bins, `lag` later, `(trials, bins, dims)`; only the samples around the windows are read."""
    if not series:
        return None
    start, num_bins = (0.0 if how.window is None else how.window[0]), int(lengths.max())
    edges = binning.edges_of(times, start, width, num_bins, how.lag)
    inside = np.arange(num_bins) < lengths[:, None]
    parts = []
    for one in series:
        back = np.flatnonzero(np.diff(one.times) < 0)
        if len(back):
            raise checks.fail(
                name,
                f"{one.path} with ascending timestamps",
                f"{one.times[back[0]]:g} s and then {one.times[back[0] + 1]:g} s ({len(back)} times so)",
                "the clock was set back: cut the file there",
            )
        step = float(np.median(np.diff(one.times))) if len(one.times) > 1 else 0.0
        part = np.full((*inside.shape, len(one.columns)), np.nan)
        for row, its, length in zip(part, edges, lengths, strict=True):
            first, stop = np.searchsorted(one.times, [its[0], its[length]])
            first, stop = max(first - 1, 0), min(stop + 1, len(one.times))
            if stop > first:
                values = np.asarray(one.read(first, stop), dtype=np.float64).reshape(stop - first, -1)
                row[:length] = binning.bin_means(one.times[first:stop], values, its[: length + 1], step)
        parts.append(part)
    behavior = np.concatenate(parts, axis=-1)
    if np.isinf(behavior).any():
        behavior[np.isinf(behavior)] = np.nan
    unknown = (np.isnan(behavior).any(-1) & inside).sum()
    if unknown == inside.sum():
        spans = ", ".join(
            f"{one.path}: {one.times[0]:g} to {one.times[-1]:g} s" for one in series if len(one.times)
        )
        raise checks.fail(
            name,
            "behavior in the windows",
            f"none ({spans or 'no samples'}; the windows: {edges.min():g} to {edges.max():g} s)",
            "choose another series, or behavior=None",
        )
    if unknown:
        _warn(name, f"behavior is missing (NaN) in {unknown} of {inside.sum()} bins")
    return behavior.astype(np.float32)


def _no_spikes(session: Session, edges: np.ndarray) -> ValueError:
    low = min((train[0] for train in session.trains if len(train)), default=np.nan)
    high = max((train[-1] for train in session.trains if len(train)), default=np.nan)
    return checks.fail(
        session.name,
        "spikes in the windows",
        f"none (spikes: {low:g} to {high:g} s; windows: {edges.min():g} to {edges.max():g} s)",
        "look whether one of them is in milliseconds, or on another clock",
    )
