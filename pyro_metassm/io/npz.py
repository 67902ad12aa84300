"""One recording in one `.npz` file of plain arrays."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pyro_metassm import _checks as checks
from pyro_metassm.recordings import Recording

LARGEST = 16 * 2**30  # bytes; a compressed file may claim any size, which is checked before it is allocated
FIELDS = ("spikes", "mask", "bin_width_s", "condition", "behavior")
OURS = ("lengths", "inputs", "neuron_ids", "held_out_neurons", "attributes")
PER_NEURON = ("brain_area",)


def read_npz(path: str | os.PathLike[str], name: str | None = None) -> Recording:
    """Read a recording from arrays in an `.npz` file.

    Needed are `spikes (trials, bins, neurons)`, `mask (trials, bins)` or `(trials, bins, neurons)`, True where there
    is data, and `bin_width_s`. `condition (trials,)`, `behavior (trials, bins, dims)` and `behavior_names` are known.
    Other texts, numbers and arrays become `attrs`; arrays `(trials,)` go to `attrs["trials"]`; further series
    `(trials, bins, ...)` stay in the file, and `attrs["left_in_file"]` names them.

    Args:
        path: The file.
        name: Of the recording; the file's name without its suffix by default.

    Returns:
        The recording, checked like any other data.

    Raises:
        ValueError: No such file of arrays, arrays missing or of wrong shapes, or anything that `Recording` refuses.
        FileNotFoundError: No such file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "monkey.npz"
        >>> np.savez(path, spikes=np.ones((8, 50, 3), np.uint8), mask=np.ones((8, 50), bool), bin_width_s=0.02)
        >>> read_npz(path)
        Recording('monkey': 8 trials x 50 bins x 3 neurons, 20 ms bins, 0% missing)
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        arrays = _arrays(path)
        return _recording(arrays, Path(path).stem if name is None else name)
    except (ValueError, OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no recording in an .npz file: {error}") from error


def write_npz(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a recording as `read_npz` reads it, compressed and without loss (the name is the file's).

    Args:
        recording: The recording.
        path: The file, which is replaced if it exists.

    Raises:
        ValueError: A path that does not end in `.npz` (numpy would write to another one).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.npz"
        >>> write_npz(Recording("a", np.ones((8, 50, 3)), bin_width=0.02), path)
        >>> read_npz(path).num_neurons
        3
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"{path}: needed a file ending in .npz, got {Path(path).suffix!r}; rename it")
    values, mask = recording.values, recording.mask
    # Counts are small as integers, and come back as float32; anything else is kept as it is.
    whole = values.dtype == np.float32 and values.min() >= 0 and (values == np.floor(values)).all()
    if whole and values.max() < 2**24:
        values = values.astype(np.min_scalar_type(int(values.max())))
    arrays: dict[str, Any] = {
        "spikes": values,
        "mask": mask[..., 0] if (mask == mask[..., :1]).all() else mask,
        "bin_width_s": recording.bin_width,
        "lengths": recording.lengths,
        "held_out_neurons": recording.held_out_neurons,
        "attributes": checks.to_json(recording.attrs),
    }
    for key in ("inputs", "behavior", "condition", "neuron_ids"):
        if getattr(recording, key) is not None:
            arrays[key] = getattr(recording, key)
    np.savez_compressed(path, **arrays)


def _arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of the file, after a look at what they claim to be."""
    with zipfile.ZipFile(path) as archive:
        total = sum(member.file_size for member in archive.infolist())
        if total > LARGEST:
            raise ValueError(f"needed at most {LARGEST} bytes, got {total}; split the recording")
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(file)
                if math.prod(shape) * dtype.itemsize > member.file_size and not dtype.hasobject:
                    raise ValueError(
                        f"needed all of {member.filename}, got less than its header says; copy it again"
                    )
    with np.load(path, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def _recording(arrays: dict[str, np.ndarray], name: str) -> Recording:
    missing = [key for key in FIELDS[:3] if key not in arrays]
    if missing:
        raise ValueError(
            f"needed {', '.join(FIELDS[:3])}, got no {', '.join(missing)} but {sorted(arrays)}; add it"
        )
    spikes = arrays["spikes"]
    given = {key: arrays[key] for key in FIELDS[3:] + OURS[:-1] if key in arrays}
    if "attributes" in arrays:
        attrs = checks.from_json(str(arrays["attributes"].item()))
    else:
        attrs = _attrs(
            {key: array for key, array in arrays.items() if key not in FIELDS + OURS}, spikes.shape
        )
    bin_width: Any = arrays["bin_width_s"]
    return Recording(name, spikes, bin_width=bin_width, mask=arrays["mask"], attrs=attrs, **given)


def _attrs(extra: dict[str, np.ndarray], shape: tuple[int, ...]) -> dict[str, Any]:
    """What else a file holds; which axis an array has is told by its length, where that is not in doubt."""
    attrs: dict[str, Any] = {}
    trials, left_in_file = {}, []
    for key, array in extra.items():
        if array.ndim >= 2 and array.shape[:2] == shape[:2]:
            left_in_file.append(key)
        elif (
            array.shape == shape[:1] and shape[0] != shape[-1] and key not in (*PER_NEURON, "behavior_names")
        ):
            trials[key] = array
        else:
            attrs[key] = array.tolist() if key == "behavior_names" else array
    return (
        attrs
        | ({"trials": trials} if trials else {})
        | ({"left_in_file": left_in_file} if left_in_file else {})
    )
