"""Seconds, not milliseconds: what a session's times must look like."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import pandas as pd

from pyro_metassm import _checks as checks
from pyro_metassm.io import tables

SLOWEST = 0.1  # Hz: the fastest unit of a session fires more often
LONGEST_SESSION = 86_400.0  # s
LONGEST_TRIAL = 300.0  # s: trials of a session whose fastest unit is that slow
LONGEST_LAG = 5.0  # s


def check(
    name: str,
    trains: Sequence[np.ndarray],
    trials: pd.DataFrame,
    window: tuple[float, float] | None,
    lag: float,
) -> None:
    """Refuse what can only be milliseconds.

    Spike times: where the fastest unit fires less than every ten seconds *and* the session lasts over a day, or half of
    the trials over five minutes. A window: over 100 s and over ten times the longest trial. A lag: 5 s and more.

    Raises:
        ValueError: Saying which of them, and why; a lag that is no number.
    """
    if not isinstance(lag, int | float | np.number):
        raise checks.fail(name, "a lag in seconds", repr(lag), "pass a number, such as 0.1")
    if not np.isfinite(lag) or abs(lag) >= LONGEST_LAG:
        raise checks.fail(
            name,
            f"a lag under {LONGEST_LAG:g} s",
            f"{lag:g}",
            f"pass seconds; if these are milliseconds, {lag / 1000:g}",
        )
    durations = (trials["stop_time"] - trials["start_time"]).to_numpy(np.float64)
    durations = durations[np.isfinite(durations)]
    if (durations < 0).any():
        raise checks.fail(
            name,
            "trials that stop after they start",
            f"{(durations < 0).sum()} that do not",
            "correct the table",
        )
    if window is not None and len(durations):
        length = window[1] - window[0]
        if length > 100.0 and length > 10 * durations.max():
            shorter = (window[0] / 1000, window[1] / 1000)
            raise checks.fail(
                name,
                "a window in seconds",
                f"{window}, while the longest trial has {durations.max():g} s",
                f"if these are milliseconds, window={shorter}",
            )
    spans = [train[-1] - train[0] for train in trains if len(train) > 1]
    rates = [
        len(train) / span
        for train, span in zip([t for t in trains if len(t) > 1], spans, strict=True)
        if span > 0
    ]
    if not rates or max(rates) >= SLOWEST:
        return
    long_trials = len(durations) > 0 and float(np.median(durations)) > LONGEST_TRIAL
    if max(spans) > LONGEST_SESSION or long_trials:
        usual = f" and a usual trial lasts {np.median(durations):g}" if len(durations) else ""
        raise checks.fail(
            name,
            "times in seconds",
            f"spikes over {max(spans):g}, of which the fastest unit has {max(rates):.2g} in each{usual}",
            "these are milliseconds: divide all times by 1000",
        )


def event_times(name: str, trials: pd.DataFrame, column: str) -> np.ndarray:
    """The times of an event by trial, NaN where it did not happen; a warning counts those far from their trials.

    Raises:
        ValueError: An unknown column, one that holds no numbers, or most of them far from their trials.
    """
    values = tables.column_of(name, trials, column, "trials")
    times = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
    times = np.where(np.isfinite(times), times, np.nan)
    if np.isnan(times).all():
        raise checks.fail(
            name, f"times (s) in the column {column!r}", "no number in it", "align to another column"
        )
    start, stop = (trials[key].to_numpy(np.float64) for key in ("start_time", "stop_time"))
    slack = np.nanmax(stop - start) if np.isfinite(stop - start).any() else np.inf
    outside = (times < start - slack) | (times > stop + slack)
    if 2 * outside.sum() <= np.isfinite(times).sum():
        if outside.any():
            text = f"{outside.sum()} of {len(times)} times of {column} lie far outside of their trials"
            warnings.warn(f"recording {name!r}: {text}", UserWarning, stacklevel=5)
    else:
        k = int(np.flatnonzero(outside)[0])
        raise checks.fail(
            name,
            f"a column of times (s, of the session) near their trials, to align to {column!r}",
            f"{times[k]:g} in a trial from {start[k]:g} to {stop[k]:g}",
            "these may be milliseconds, or relative to the trial, or no times: choose or correct the column",
        )
    return times
