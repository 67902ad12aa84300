"""One session in a Neurodata Without Borders file: `read_nwb`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from pyro_metassm import _checks as checks
from pyro_metassm.io import binning, nwb_files, tables
from pyro_metassm.io.aligning import Alignment, Session, recording_of
from pyro_metassm.recordings import Recording

HELD_OUT = "heldout"  # the column of the units in the files of the Neural Latents Benchmark


def read_nwb(
    path: str | os.PathLike[str],
    *,
    bin_width: float,
    align_to: str = "start_time",
    window: tuple[float, float] | None = None,
    lag: float = 0.0,
    behavior: str | Sequence[str] | None = None,
    where: tables.Choice = None,
    units: tables.Choice = None,
    condition: str | Sequence[str] | None = None,
    held_out: str | None = None,
    overlap: Literal["warn", "error"] = "warn",
    name: str | None = None,
) -> Recording:
    """Read the trials of a session from an NWB file, binned around an event.

    The file is opened lazily. Read are the tables, the spike times of the chosen units, the timestamps of the behaviour
    and its samples around the windows.

    A bin is `[a + k bin_width, a + (k + 1) bin_width)`, see :func:`pyro_metassm.bin_spikes`. It is missing for a unit
    that was not observed all through it: outside of the unit's `obs_intervals`, in `invalid_times`, or, in a file
    without `obs_intervals`, before the first or behind the last trial or spike. Behaviour is resampled to the bins,
    `lag` later: the mean of the samples in `[edge + lag, next edge + lag)`; in bins without a sample the line between
    the samples on both sides, unless there is a gap.

    Args:
        path: The file, or an address for fsspec (`https://`, `s3://`, ...).
        bin_width: In seconds.
        align_to: Column of the trials with the times of the event.
        window: Start and stop around it in seconds, a whole number of bins. None: each trial from the event to its
            `stop_time`, as many whole bins as there are.
        lag: Seconds by which the behaviour of a bin is later than its spikes.
        behavior: Time series, one or several side by side, by their paths or the ends of them:
            `"Velocity/cursor_vel"`, `"hand_vel"`.
        where: Which trials: column -> value or list of values, or a function of the table to bools.
        units: Which units, in the same way: `{"quality": "good"}`.
        condition: Column of the trials, or several, which are joined.
        held_out: Column of the units that says which are held out; None: `"heldout"` where there is one.
        overlap: Whether windows that overlap (a spike in two trials) are counted in a warning or an error.
        name: Of the recording; the file's name without its suffix by default.

    Returns:
        The recording: `neuron_ids` are the units' ids, `attrs["neurons"]` their other columns (`electrode_group`,
        `location`, ...), `attrs["trials"]` the columns of the trials, `attrs["subject"]` the subject.

    Raises:
        ValueError: No NWB file, or one cut short; unknown columns, series or values (those that there are are listed);
            milliseconds; no trial left; no spike in any window.
        FileNotFoundError: No such file.
        ImportError: Without pynwb, or for addresses without fsspec.

    Example:
        >>> read_nwb(  # doctest: +SKIP
        ...     "sub-C_ses-CO-20131003_behavior+ecephys.nwb", align_to="move_onset_time", window=(-0.14, 0.56),
        ...     bin_width=0.02, lag=0.1, behavior="Velocity/cursor_vel", where={"result": "R"}, condition="target_id",
        ... )
    """
    source = os.fspath(path)
    name = PurePosixPath(source.replace("\\", "/")).stem if name is None else name
    name = checks.name_of(name)
    wanted = [behavior] if isinstance(behavior, str) else behavior or ()
    if not isinstance(wanted, Sequence) or not all(isinstance(one, str) for one in wanted):
        raise checks.fail(
            name, "a path of a series, or several, as behavior", repr(behavior), "pass such as 'hand_vel'"
        )
    with nwb_files.opened(source) as nwb:
        trials, wide, left = nwb_files.trials_of(nwb, name)
        table = nwb_files.units_of(nwb, name)
        rows = np.flatnonzero(tables.chosen_rows(name, trials, where, "trials"))
        own = np.flatnonzero(tables.chosen_rows(name, table, units, "units"))
        trials, table = trials.iloc[rows].reset_index(drop=True), table.iloc[own].reset_index(drop=True)
        session = _session(nwb, name, trials, own, table["id"].to_numpy())
        attrs: dict[str, Any] = {"neurons": tables.plain_columns(table.drop(columns=["id"]))}
        attrs |= {"left_in_file": left} if left else {}
        attrs |= _about(nwb)
        return recording_of(
            session,
            Alignment(align_to, window, bin_width, lag, overlap),
            [nwb_files.series_of(nwb, name, one) for one in wanted],
            condition=condition,
            neuron_ids=table["id"].to_numpy(),
            held_out_neurons=_held_out(name, table, held_out),
            attrs=attrs,
            per_trial={key: array[rows] for key, array in wide.items()},
        )


def _session(nwb, name: str, trials, rows: np.ndarray, ids: np.ndarray) -> Session:
    units = nwb.units
    raw = nwb_files.ragged(units["spike_times"], rows)
    trains = [binning.finite(train, str(unit)) for train, unit in zip(raw, ids, strict=True)]
    silent = [unit for unit, train in zip(ids, trains, strict=True) if len(train) == 0]
    if silent:
        _warn(name, f"{len(silent)} of {len(trains)} units have no spikes ({checks.some(silent)})")
    observed = None
    if "obs_intervals" in units.colnames:
        observed = [part.reshape(-1, 2) for part in nwb_files.ragged(units["obs_intervals"], rows)]
    early = sum(int(np.searchsorted(train, 0.0)) for train in trains) if observed is None else 0
    if observed is not None:
        known = [(train, part) for train, part in zip(trains, observed, strict=True) if len(part)]
        early = sum(int(((train < p.min()) | (train > p.max())).sum()) for train, p in known)
    if early:
        _warn(
            name, f"{early} spikes lie outside of the session" + ("" if observed else " (before its time 0)")
        )
    invalid = None
    if nwb.invalid_times is not None and len(nwb.invalid_times):
        invalid = np.stack(
            [np.asarray(nwb_files.whole(nwb.invalid_times[key].data)) for key in ("start_time", "stop_time")],
            1,
        )
    return Session(name, trains, trials, observed, invalid)


def _held_out(name: str, table, held_out: str | None) -> np.ndarray | None:
    if held_out is None and HELD_OUT not in table:
        return None
    column = tables.column_of(name, table, held_out or HELD_OUT, "units")
    return column.to_numpy().astype(bool)


def _about(nwb) -> dict[str, str]:
    """What the file says of the session."""
    subject = getattr(nwb.subject, "subject_id", None)
    about = {"session": nwb.identifier, "subject": subject, "session_start_time": nwb.session_start_time}
    return {key: str(value) for key, value in about.items() if value}


def _warn(name: str, text: str) -> None:
    warnings.warn(f"recording {name!r}: {text}", UserWarning, stacklevel=4)
