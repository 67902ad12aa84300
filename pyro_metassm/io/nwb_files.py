"""NWB files: opening them, here or elsewhere, and finding series, trials and units in them without reading all."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pyro_metassm import _checks as checks
from pyro_metassm.io._files import naming, refuse_claims
from pyro_metassm.io._hdf5 import inspect_links, refuse_reading
from pyro_metassm.io.aligning import Series

NOT_READ = ("spike_times", "obs_intervals", "waveform_mean", "waveform_sd", "waveforms", "electrodes")


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
    """An open `pynwb.NWBFile`: nothing but its structure is read.

    Args:
        path: Of a file here, or an address (`https://`, `s3://`, `memory://`, ...) for fsspec.

    Raises:
        ImportError: pynwb or fsspec are not installed.
        FileNotFoundError: No such file.
        ValueError: No NWB file, or one that was cut short.
    """
    try:
        import pynwb
    except ImportError as error:
        raise ImportError('read_nwb needs pynwb: pip install "pyro-metassm[nwb]"') from error
    import h5py

    with contextlib.ExitStack() as stack:
        if "://" in path:
            try:
                import fsspec
            except ImportError as error:
                raise ImportError(
                    'addresses need fsspec (and aiohttp for https://, s3fs for s3://): pip install "pyro-metassm[nwb]"'
                ) from error
            source: Any = stack.enter_context(fsspec.open(path, "rb"))
        else:
            if not Path(path).is_file():
                raise FileNotFoundError(f"{path}: no such file")
            source = path
        with naming(path, "NWB file that can be read (copy it again if it was cut short)"):
            file = stack.enter_context(h5py.File(source, "r"))
            inspect_links(file)
            nwb = stack.enter_context(pynwb.NWBHDF5IO(file=file, mode="r", load_namespaces=True)).read()
        with naming(path, "recording in an NWB file"):
            yield nwb


def all_series(nwb: Any) -> dict[str, Any]:
    """Every time series of a file by its path, such as `processing/behavior/Velocity/cursor_vel`."""
    from pynwb import TimeSeries

    found: dict[str, Any] = {}
    for item in nwb.objects.values():
        if isinstance(item, TimeSeries):
            parts, parent = [item.name], item.parent
            while parent is not None and parent is not nwb:
                parts.append(parent.name)
                parent = parent.parent
            top = "acquisition" if item.name in nwb.acquisition and len(parts) == 1 else None
            if len(parts) > 1 and parts[-1] in nwb.processing:
                top = "processing"
            found["/".join([*([top] if top else []), *reversed(parts)])] = item
    return found


def series_of(nwb: Any, name: str, wanted: str) -> Series:
    """The series whose path is, or ends with, `wanted`.

    Raises:
        ValueError: None or several, with those that there are; one without numbers or times.
    """
    known = all_series(nwb)
    exact = [path for path in known if path == wanted.strip("/")]
    paths = exact or [path for path in known if path.endswith("/" + wanted.strip("/"))]
    if len(paths) != 1:
        got = (
            f"several, {', '.join(sorted(paths))}"
            if paths
            else f"only {checks.some(sorted(known), 40) or 'none'}"
        )
        raise checks.fail(name, f"a time series {wanted!r}", got, "use one of these")
    series = known[paths[0]]
    data, shape = series.data, np.shape(series.data)
    if len(shape) not in (1, 2) or np.dtype(getattr(data, "dtype", float)).kind not in "biuf":
        raise checks.fail(
            name, f"{paths[0]} with numbers (samples, dims)", f"shape {shape}", "use another series"
        )
    refuse_reading(data, largest=sys.maxsize)  # of which windows are read
    refuse_claims(8 * shape[0], 8 * shape[0])  # the times, all of them
    if series.timestamps is not None:
        times = np.asarray(whole(series.timestamps), dtype=np.float64)
    elif series.rate:
        times = float(series.starting_time or 0.0) + np.arange(shape[0]) / float(series.rate)
    else:
        raise checks.fail(name, f"{paths[0]} with timestamps or a rate", "neither", "use another series")
    if len(times) != shape[0]:
        raise checks.fail(
            name,
            f"{paths[0]} with a timestamp for each of its {shape[0]} samples",
            f"{len(times)}",
            "the file may be cut short: copy it again",
        )
    scale, offset = float(series.conversion or 1.0), float(getattr(series, "offset", 0.0) or 0.0)
    return Series(
        paths[0],
        times,
        lambda first, stop: np.asarray(data[first:stop], dtype=np.float64) * scale + offset,
        _column_names(series, 1 if len(shape) == 1 else shape[1]),
    )


def _column_names(series: Any, dims: int) -> tuple[str, ...]:
    """Names of the dims: those of `comments="columns=[x,y]"`, as the files of the benchmark have it, else numbers."""
    comments = str(series.comments or "")
    if "columns=[" in comments:
        given = [part.strip() for part in comments.split("columns=[", 1)[1].split("]", 1)[0].split(",")]
        if len(given) == dims:
            return tuple(f"{series.name}_{column}" for column in given)
    return (series.name,) if dims == 1 else tuple(f"{series.name}_{number}" for number in range(dims))


def trials_of(nwb: Any, name: str) -> tuple[pd.DataFrame, dict[str, np.ndarray], list[str]]:
    """The trials: a table of the plain columns, arrays of those with several numbers a trial, names of the rest."""
    if nwb.trials is None or len(nwb.trials) == 0:
        other = sorted(nwb.intervals) if nwb.intervals else []
        raise checks.fail(
            name,
            "a table of trials",
            f"none (intervals: {checks.some(other) or 'none'})",
            "add trials to the file",
        )
    return _table(nwb.trials, ())


def _table(table: Any, skip: tuple[str, ...]) -> tuple[pd.DataFrame, dict[str, np.ndarray], list[str]]:
    columns: dict[str, np.ndarray] = {}
    wide: dict[str, np.ndarray] = {}
    rest: list[str] = []
    found = {key: table[key] for key in table.colnames if key not in skip}
    plain = {key for key, column in found.items() if type(column).__name__ in ("VectorData", "EnumData")}
    refuse_reading(*(found[key].data for key in plain))  # all together
    for key, column in found.items():
        values = column.data[:] if key in plain else None
        array = None if values is None else np.asarray(values)
        if array is not None and array.dtype.kind == "O" and array.ndim == 1:
            texts = [item.decode() if isinstance(item, bytes) else item for item in array.tolist()]
            if key in ("electrode_group", "group"):
                texts = [getattr(item, "name", item) for item in texts]
            array = np.array(texts, dtype=object) if all(isinstance(t, str) for t in texts) else None
        if array is None or len(array) != len(table):
            rest.append(key)
        elif array.ndim == 1:
            columns[key] = array
        elif array.dtype.kind in "biuf":
            wide[key] = array
        else:
            rest.append(key)
    return pd.DataFrame(columns), wide, rest


def units_of(nwb: Any, name: str) -> pd.DataFrame:
    """The plain columns of the units, with `id`, `electrode_group` and what is said of the (first) electrode."""
    units = nwb.units
    if units is None or len(units) == 0 or "spike_times" not in units.colnames:
        raise checks.fail(
            name, "units with spike_times", "none in the file", "sort the spikes, or use a file that has them"
        )
    table, _, _ = _table(units, NOT_READ)
    table.insert(0, "id", np.asarray(whole(units.id.data)))
    if "electrodes" in units.colnames:
        region = units["electrodes"]
        rows, number = _first_rows(region)
        electrodes = getattr(region, "target", region).table
        for key, own in (("electrode_group", "group_name"), ("location", "location")):
            if key not in table and own in electrodes.colnames:
                values = np.asarray(whole(electrodes[own].data), dtype=object)[rows]
                texts = [v.decode() if isinstance(v, bytes) else str(v) for v in values]
                table[key] = np.where(number > 0, texts, "")
    return table


def _first_rows(region: Any) -> tuple[np.ndarray, np.ndarray]:
    """The row of each unit's first electrode, and how many it has."""
    if not hasattr(region, "target"):  # one electrode a unit, without an index
        rows = np.asarray(whole(region.data)).reshape(-1)
        return rows, np.ones(len(rows), dtype=int)
    ends = np.asarray(whole(region.data), dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]])
    flat = np.asarray(whole(region.target.data), dtype=np.int64)
    number = ends - starts
    safe = np.append(flat, 0)[np.minimum(starts, len(flat))]
    return np.where(number > 0, safe, 0), number


def ragged(column: Any, rows: np.ndarray) -> list[np.ndarray]:
    """The entries of a ragged column in some rows; no other is read."""
    ends = np.asarray(whole(column.data), dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    refuse_reading(column.target.data)
    return [np.asarray(column.target.data[starts[row] : ends[row]], dtype=np.float64) for row in rows]


def whole(data: Any) -> Any:
    """All of some data, after a look at what they claim."""
    refuse_reading(data)
    return data[:]
