"""Spikes and epochs as pynapple has them: `from_pynapple`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from pyro_metassm import _checks as checks
from pyro_metassm.io import binning, tables
from pyro_metassm.io.aligning import Alignment, Series, Session, recording_of
from pyro_metassm.recordings import Recording


def from_pynapple(
    units: Mapping[Any, Any],
    epochs: Any,
    *,
    name: str,
    bin_width: float,
    align_to: str = "start_time",
    window: tuple[float, float] | None = None,
    lag: float = 0.0,
    behavior: Any = None,
    where: tables.Choice = None,
    condition: str | Sequence[str] | None = None,
    held_out: str | None = None,
    overlap: Literal["warn", "error"] = "warn",
    attrs: Mapping[str, Any] | None = None,
) -> Recording:
    """A recording from pynapple's `TsGroup` and `IntervalSet`, binned as :func:`pyro_metassm.read_nwb` says.

    A bin outside of the group's `time_support` is missing: give the group the session as its `time_support`, else it
    ends with the last spike.

    Args:
        units: A `TsGroup`, or any mapping from unit ids to spike times in seconds.
        epochs: The trials: an `IntervalSet`, whose metadata are columns beside `start_time` and `stop_time`, or an
            array `(trials, 2)`.
        name: Of the recording.
        bin_width: In seconds.
        align_to, window, lag, where, condition, overlap: As in :func:`pyro_metassm.read_nwb`.
        behavior: A `Tsd` or `TsdFrame`, or several.
        held_out: Name of the metadata of the units that says which are held out.
        attrs: As `pm.Recording` takes them.

    Returns:
        The recording; metadata of the units are in `attrs["neurons"]`.

    Raises:
        ValueError: As :func:`pyro_metassm.read_nwb`.

    Example:
        >>> units = {7: np.arange(0.0, 10.0, 0.05), 9: np.arange(0.0, 10.0, 0.4)}
        >>> from_pynapple(units, [[1.0, 2.0], [4.0, 5.0]], name="mouse", bin_width=0.1)
        Recording('mouse': 2 trials x 10 bins x 2 neurons, 100 ms bins, 0% missing)
    """
    name = checks.name_of(name)
    trials = _trials(name, epochs)
    trials = trials[tables.chosen_rows(name, trials, where, "trials")].reset_index(drop=True)
    if not hasattr(units, "keys"):
        raise checks.fail(
            name, "spike times by unit", type(units).__name__, "pass a TsGroup, or a dict such as {1: times}"
        )
    ids = list(units.keys())
    if not ids:
        raise checks.fail(name, "at least one unit", "none", "pass a TsGroup")
    trains = [binning.finite(_times(units[unit]), str(unit)) for unit in ids]
    silent = [unit for unit, train in zip(ids, trains, strict=True) if len(train) == 0]
    if silent:
        text = f"{len(silent)} of {len(ids)} units have no spikes ({checks.some(silent)})"
        warnings.warn(f"recording {name!r}: {text}", UserWarning, stacklevel=2)
    support = getattr(units, "time_support", None)
    observed = None if support is None else [_intervals(name, support)] * len(ids)
    table = pd.DataFrame(getattr(units, "metadata", pd.DataFrame(index=ids))).loc[ids]
    neurons = tables.plain_columns(table)
    held = (
        None if held_out is None else tables.column_of(name, table, held_out, "units").to_numpy().astype(bool)
    )
    several = (
        list(behavior) if isinstance(behavior, (list, tuple)) else [] if behavior is None else [behavior]
    )
    return recording_of(
        Session(name, trains, trials, observed),
        Alignment(align_to, window, bin_width, lag, overlap),
        [_series(number, one) for number, one in enumerate(several)],
        condition=condition,
        neuron_ids=np.array(ids),
        held_out_neurons=held,
        attrs=dict(attrs or {}) | ({"neurons": neurons} if neurons else {}),
    )


def _trials(name: str, epochs: Any) -> pd.DataFrame:
    intervals = _intervals(name, epochs)
    table = pd.DataFrame({"start_time": intervals[:, 0], "stop_time": intervals[:, 1]})
    if len(table) == 0:
        raise checks.fail(name, "at least one trial", "no epochs", "pass an IntervalSet")
    metadata = getattr(epochs, "metadata", None)
    if metadata is not None:
        for column in metadata.columns:
            table[str(column)] = np.asarray(metadata[column])
    return table


def _intervals(name: str, epochs: Any) -> np.ndarray:
    if hasattr(epochs, "start") and hasattr(epochs, "end"):
        return np.stack([np.asarray(epochs.start, float), np.asarray(epochs.end, float)], axis=1)
    array = np.asarray(epochs, dtype=float)
    if array.ndim != 2 or array.shape[1] != 2:
        raise checks.fail(
            name, "epochs (trials, 2): starts and ends in s", f"shape {array.shape}", "pass an IntervalSet"
        )
    return array


def _times(unit: Any) -> np.ndarray:
    return np.asarray(unit.t if hasattr(unit, "t") else unit)


def _series(number: int, one: Any) -> Series:
    values = np.asarray(one.d if hasattr(one, "d") else one.values, dtype=np.float64)
    values = values.reshape(len(values), -1)
    columns = getattr(one, "columns", None)
    names = [f"behavior_{number}_{k}" for k in range(values.shape[1])] if columns is None else columns
    return Series(
        f"behavior {number}",
        _times(one).astype(np.float64),
        lambda first, stop: values[first:stop],
        tuple(str(column) for column in names),
    )
