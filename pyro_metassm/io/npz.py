"""One recording in one `.npz` file of plain arrays."""

from __future__ import annotations

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from pyro_metassm import _attributes as attributes
from pyro_metassm.io._files import LARGEST, reading, refuse_claims
from pyro_metassm.recordings import Recording

MOST_ARRAYS = 1000
LONGEST_HEADER = 10_000  # bytes of an array's header: what numpy parses
PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what numpy writes; others pack a million to one
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
    with reading(path, "recording in an .npz file"):
        return _recording(_arrays(path), Path(path).stem if name is None else name)


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
        "attributes": attributes.to_json(recording.attrs),
    }
    for key in ("inputs", "behavior", "condition", "neuron_ids"):
        if getattr(recording, key) is not None:
            arrays[key] = getattr(recording, key)
    np.savez_compressed(path, **arrays)


def _arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """All arrays of the file, after a look at what they claim to be."""
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if len(members) > MOST_ARRAYS:
            raise ValueError(f"needed at most {MOST_ARRAYS} arrays, got {len(members)}; leave some out")
        refuse_claims(sum(member.file_size for member in members), os.path.getsize(path), LARGEST)
        for member in members:
            key = member.filename.removesuffix(".npy")
            if key in arrays:
                raise ValueError(f"needed different arrays, got two called {key!r}")
            if member.compress_type not in PACKINGS:
                raise ValueError(f"needed arrays as numpy packs them, got {member.filename} packed otherwise")
            with archive.open(member) as file:
                _check_header(file, member)
            with archive.open(member) as file:
                arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def _check_header(file: IO[bytes], member: zipfile.ZipInfo) -> None:
    """Refuse an array that is not plain numbers or text, or that says it is longer than it is."""
    version = np.lib.format.read_magic(file)
    length = file.read(2 if version == (1, 0) else 4)
    (size,) = struct.unpack("<H" if version == (1, 0) else "<I", length)
    if size > LONGEST_HEADER:  # numpy reads it before it asks
        raise ValueError(f"{member.filename}: needed a header of at most {LONGEST_HEADER} bytes, got {size}")
    file.seek(-len(length), os.SEEK_CUR)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    # Of no size are texts of no length, which numpy makes one character long.
    if dtype.kind not in "biufSU" or dtype.itemsize == 0:
        raise ValueError(
            f"{member.filename}: needed numbers or text, got {dtype} (Object arrays are not read: they are pickles)"
        )
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"needed all of {member.filename}, got less than its header says; copy it again")


def _recording(arrays: dict[str, np.ndarray], name: str) -> Recording:
    missing = [key for key in FIELDS[:3] if key not in arrays]
    if missing:
        raise ValueError(
            f"needed {', '.join(FIELDS[:3])}, got no {', '.join(missing)} but {sorted(arrays)}; add it"
        )
    spikes, bin_width = arrays["spikes"], arrays["bin_width_s"]
    if bin_width.size != 1:
        raise ValueError(f"bin_width_s: needed one number, a bin_width in seconds, got {bin_width.size}")
    given = {key: arrays[key] for key in FIELDS[3:] + OURS[:-1] if key in arrays}
    if "attributes" in arrays:
        attrs = attributes.from_json(str(arrays["attributes"].item()))
    else:
        attrs = _attrs(
            {key: array for key, array in arrays.items() if key not in FIELDS + OURS}, spikes.shape
        )
    return Recording(name, spikes, bin_width=bin_width.item(), mask=arrays["mask"], attrs=attrs, **given)


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
