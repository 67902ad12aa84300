"""Many recordings in one Zarr store, read in whole or trial by trial: `write_zarr`, `open_zarr`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pyro_metassm import _attributes as attributes
from pyro_metassm import _checks as checks
from pyro_metassm.io._files import naming, said
from pyro_metassm.io._stores import StoredArray, metadata
from pyro_metassm.io.lazy import LazyRecording, Store
from pyro_metassm.recordings import Recording, Recordings

FORMAT, VERSION = "pyro_metassm recordings", 1
CHUNK = 2**18  # numbers of a chunk: whole trials, at least one
SERIES = ("values", "mask", "inputs", "behavior")
SMALL = ("lengths", "condition", "neuron_ids", "held_out_neurons")


def write_zarr(
    recordings: Recording | Mapping[str, Recording] | Iterable[Recording],
    path: str | os.PathLike[str],
    *,
    append: bool = False,
) -> None:
    """Write recordings into a Zarr store, compressed, with a checksum for every chunk, and without loss.

    They are taken one by one, so that a generator can write more than fits into memory. A recording is listed in the
    store once it is complete: a run that was interrupted leaves those that were. What is known of simulations
    (`Recordings.truth`) is not written.

    Args:
        recordings: One, several, or what yields them.
        path: The folder of the store, which is replaced if it is one of recordings.
        append: Add to the store instead.

    Raises:
        ValueError: A name twice, or a folder that holds something else.
        ImportError: zarr is not installed.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pool.zarr"
        >>> write_zarr((Recording(name, np.ones((8, 50, 3)), bin_width=0.02) for name in "ab"), path)
        >>> open_zarr(path).names
        ('a', 'b')
    """
    zarr = _zarr()
    several: Iterable[Recording]
    if isinstance(recordings, Recording):
        several = [recordings]
    else:
        several = recordings.values() if isinstance(recordings, Mapping) else recordings
    known: list[str] = []
    if Path(path).exists():
        known = list(_header(path)["names"])  # and refuses to replace what is no store of recordings
    root = (
        zarr.open_group(str(path), mode="a")
        if append and known
        else zarr.create_group(str(path), overwrite=True)
    )
    known = known if append else []
    root.attrs.update({"format": FORMAT, "version": VERSION, "names": known})
    for recording in several:
        if recording.name in known:
            raise checks.fail(recording.name, "one recording of a name", "a second one", "rename it")
        _write(zarr, root.create_group(f"r{len(known)}", overwrite=True), recording)
        known = [*known, recording.name]
        root.attrs["names"] = known
    if not known:
        raise ValueError(f"{path}: needed at least one recording to write, got none")


def open_zarr(path: str | os.PathLike[str], names: Iterable[str] | None = None) -> Recordings:
    """Open the recordings in a Zarr store: their numbers are read from it when they are needed.

    A batch of training reads the trials that it has, no others. What looks at a whole recording (making a model,
    `summary`, writing another file) reads it, and the store keeps the last one so read in memory. `take_trials`,
    `split` and `crop` read nothing but masks; `recording.load()` is the recording in memory.

    Checked when the store is opened: sizes, kinds of numbers, the coordinates and attrs, and that no chunk is missing.
    Checked when numbers are read: the checksums of their chunks, and that they are finite. Everything else was checked
    when the recordings were written.

    Args:
        path: The folder that `write_zarr` wrote.
        names: The recordings to open, in this order; None: all.

    Returns:
        The recordings.

    Raises:
        ValueError: No store of recordings, one that is damaged, or names that it does not have.
        FileNotFoundError: No such folder.
        ImportError: zarr is not installed.

    Example:
        See `write_zarr`.
    """
    zarr, header = _zarr(), _header(path)
    known = {name: number for number, name in enumerate(header["names"])}
    wanted = list(known) if names is None else [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in known:
            raise ValueError(f"{path}: needed a recording {name!r}, got only {checks.some(list(known), 40)}")
    store = Store()
    with naming(path, "recordings in a Zarr store"):
        return Recordings([_open(zarr, path, f"r{known[name]}", name, store) for name in wanted])


def read_zarr(path: str | os.PathLike[str], name: str | None = None) -> Recording:
    """Read one recording of a Zarr store into memory: the one of this name, or the only one.

    Raises:
        ValueError: As `open_zarr`; several recordings and no name.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.zarr"
        >>> write_zarr(Recording("a", np.ones((8, 50, 3)), bin_width=0.02), path)
        >>> read_zarr(path)
        Recording('a': 8 trials x 50 bins x 3 neurons, 20 ms bins, 0% missing)
    """
    recs = open_zarr(path, None if name is None else [name])
    if len(recs) > 1:
        raise ValueError(f"{path}: needed one recording, got {len(recs)}; use pm.open_zarr, or a name")
    (recording,) = recs.values()
    with naming(path, "recording in a Zarr store"):
        return recording.load() if isinstance(recording, LazyRecording) else recording


def _zarr() -> Any:
    try:
        import zarr
    except ImportError as error:
        raise ImportError('Zarr stores need zarr: pip install "pyro-metassm[zarr]"') from error
    return zarr


def _header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The names in a store, after a look whether it is one."""
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such store")
    try:
        attrs = metadata(path).get("attributes", {})
        names = attrs.get("names")
    except Exception as error:  # what is no JSON, is nested too deep, is no dict
        raise ValueError(
            f"{path}: needed a Zarr store of recordings, got something else: {said(error)}"
        ) from error
    if (
        attrs.get("format") != FORMAT
        or not isinstance(names, list)
        or not all(isinstance(n, str) for n in names)
    ):
        raise ValueError(f"{path}: needed a Zarr store that pm.io.write_zarr wrote, got another one")
    if attrs.get("version") != VERSION:
        raise ValueError(
            f"{path}: needed version {VERSION}, got {str(attrs.get('version'))[:40]!r}; it is of another release"
        )
    return attrs


def _write(zarr: Any, group: Any, recording: Recording) -> None:
    values, mask = recording.values, recording.mask
    whole = recording.has_counts and values.dtype == np.float32 and values.max() < 2**24
    arrays = {
        # Counts are small as integers, and come back as they were.
        "values": values.astype(np.min_scalar_type(int(values.max()))) if whole else values,
        "mask": mask[..., 0] if (mask == mask[..., :1]).all() else mask,
        "inputs": recording.inputs,
        "behavior": recording.behavior,
    }
    for key, array in arrays.items():
        if array is not None:
            per_chunk = max(1, CHUNK // int(np.prod(array.shape[1:])))
            created = group.create_array(
                key,
                shape=array.shape,
                dtype=array.dtype,
                chunks=(min(per_chunk, array.shape[0]), *array.shape[1:]),
                compressors=[zarr.codecs.ZstdCodec(level=3), zarr.codecs.Crc32cCodec()],
                fill_value=False if array.dtype.kind == "b" else 0,
                dimension_names=(
                    "trial",
                    "time",
                    {"inputs": "input_dim", "behavior": "behavior_dim"}.get(key, "neuron"),
                )[: array.ndim],
                config={"write_empty_chunks": True},  # so that a chunk that is missing is one that was lost
            )
            created[...] = array
    small = {key: getattr(recording, key) for key in SMALL if getattr(recording, key) is not None}
    about = {
        "name": recording.name,
        "bin_width": recording.bin_width,
        "dtype": values.dtype.name,
        "complete": recording.complete,
        "counts": recording.has_counts,
        "attributes": recording.attrs,
    }
    group.attrs["recording"] = attributes.to_json(small | about)


def _open(zarr: Any, path: str | os.PathLike[str], group: str, name: str, store: Store) -> LazyRecording:
    about = attributes.from_json(str(metadata(path, group)["attributes"]["recording"]))
    arrays = {}
    for key in SERIES:
        if key in SERIES[:2] or (Path(path) / group / key).exists():
            try:
                arrays[key] = StoredArray(zarr, path, group, key)
            except ValueError as error:
                raise ValueError(f"recording {name!r}: {error}") from error
    for key, array in arrays.items():
        if array.dtype.kind not in ("b" if key == "mask" else "iuf"):
            raise checks.fail(name, f"{key} of numbers", f"{array.dtype}", "write it again")
    if about["name"] != name:
        raise checks.fail(name, "the recording of this name", repr(about["name"]), "write the store again")
    return LazyRecording.of(about, arrays, store)
