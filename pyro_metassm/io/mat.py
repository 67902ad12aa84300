"""Trials in MATLAB files, up to version 7 and 7.3: `read_mat`."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from pyro_metassm.io._files import naming, reading, refuse_claims
from pyro_metassm.io._hdf5 import own, refuse_foreign, to_read
from pyro_metassm.io.structures import from_dict
from pyro_metassm.recordings import Recording

DEEPEST = 16  # structures within structures
ITEM = 1024  # bytes that a cell or a field counts for: each takes about as much in memory, and time


class Budget:
    """What may be read of a file of some bytes, its cells counted whenever they are met: they can be in themselves."""

    def __init__(self, size: int) -> None:
        self.size, self.claimed = size, 0

    def take(self, claimed: int) -> None:
        self.claimed += claimed
        refuse_claims(self.claimed, self.size)


def read_mat(
    path: str | os.PathLike[str],
    *,
    bin_width: float,
    variable: str | None = None,
    name: str | None = None,
    **fields: Any,
) -> Recording:
    """Read a structure of trials from a MATLAB file: a struct array with an element a trial, or one struct of arrays.

    Numbers, text, logicals, cells and structs are read, from files of version 7.3 (HDF5) as from earlier ones; objects
    and function handles are not, and nothing is ever unpickled.

    Args:
        path: The file.
        bin_width: In seconds.
        variable: The variable that holds the trials, `"session.trials"` for one within another. None: all variables of
            the file are the fields, or the only one is what holds them.
        name: Of the recording; the file's name without its suffix by default.
        **fields: As :func:`pyro_metassm.from_dict` takes them: `observations="spikes"`, `behavior=`, `condition=`,
            `neuron_first=`, ...

    Returns:
        The recording, checked like any other data.

    Raises:
        ValueError: No MATLAB file, or one cut short; variables or fields that are missing (those that there are are
            listed); anything that `Recording` refuses.
        FileNotFoundError: No such file.

    Example:
        >>> import numpy as np, scipy.io, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mouse.mat"
        >>> scipy.io.savemat(path, {"spikes": np.ones((8, 50, 3)), "side": np.arange(8)})
        >>> read_mat(path, bin_width=0.02, condition="side")
        Recording('mouse': 8 trials x 50 bins x 3 neurons, 20 ms bins, 0% missing)
    """
    with reading(path, "MATLAB file that can be read (copy it again if it was cut short)"):
        found = _new(path) if h5py.is_hdf5(path) else _old(path)
    trials: Any = found
    for part in (variable or "").split(".") if variable else ():
        if not isinstance(trials, dict) or part not in trials:
            known = ", ".join(sorted(trials)) if isinstance(trials, dict) else "an array of trials"
            raise ValueError(f"{path}: needed a variable {variable!r}, got only {known}; use one of these")
        trials = trials[part]
    if variable is None and len(found) == 1 and isinstance(only := next(iter(found.values())), (dict, list)):
        trials = only
    if isinstance(trials, dict) and len(trials) == 0:
        raise ValueError(f"{path}: needed variables, got none; save the trials into it")
    with naming(path, "recording in a MATLAB file"):
        return from_dict(Path(path).stem if name is None else name, trials, bin_width=bin_width, **fields)


def _old(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The variables of a file up to version 7, through scipy."""
    try:
        import scipy.io
    except ImportError as error:
        raise ImportError("read_mat needs scipy for files before version 7.3: pip install scipy") from error
    claimed = 0
    for _, shape, _ in scipy.io.whosmat(path):
        if any(size < 0 for size in shape):
            raise ValueError(f"needed sizes of at least 0, got {shape}")
        claimed += 8 * math.prod(map(int, shape))
    refuse_claims(claimed, os.path.getsize(path))
    loaded = scipy.io.loadmat(path, squeeze_me=False, struct_as_record=True, chars_as_strings=True)
    return {key: _plain(value) for key, value in loaded.items() if not key.startswith("__")}


def _plain(value: Any, depth: int = 0) -> Any:
    """Structs as dicts, arrays of them and cells as lists, text as str; None for what is none of these."""
    if depth > DEEPEST:
        raise ValueError(f"needed structures at most {DEEPEST} deep, got deeper ones")
    if not isinstance(value, np.ndarray) or type(value) is not np.ndarray:
        return None  # objects and function handles have classes of their own
    if value.dtype.names:
        rows = [
            {field: _plain(row[field], depth + 1) for field in value.dtype.names}
            for row in value.ravel(order="F")
        ]
        return rows[0] if value.size == 1 else rows
    if value.dtype.kind == "O":
        return [_plain(item, depth + 1) for item in value.ravel(order="F")]
    if value.dtype.kind == "U":
        return str(value.ravel()[0]) if value.size == 1 else "" if value.size == 0 else list(value.ravel())
    return value if value.dtype.kind in "biuf" else None


def _new(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The variables of a file of version 7.3."""
    with h5py.File(path, "r") as file:
        budget = Budget(os.path.getsize(path))
        return {key: _item(file, own(file, key), budget, 0) for key in file if not key.startswith("#")}


def _item(file: Any, item: Any, budget: Budget, depth: int) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"needed structures at most {DEEPEST} deep, got deeper ones")
    if not isinstance(item, (h5py.Group, h5py.Dataset)):
        raise ValueError(f"needed groups and data sets, got a {type(item).__name__}")
    refuse_foreign(item)
    budget.take(ITEM)
    if isinstance(item, h5py.Group):
        fields = list(item)
        for field in fields:
            own(item, field)
        # In an array of structs each field is a table of references that is no cell by itself.
        many = fields and all(
            isinstance(item[f], h5py.Dataset)
            and item[f].dtype.kind == "O"
            and "MATLAB_class" not in item[f].attrs
            for f in fields
        )
        if not many:
            return {field: _item(file, item[field], budget, depth + 1) for field in fields}
        columns = {field: _references(file, item[field], budget, depth) for field in fields}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    kind = item.attrs.get("MATLAB_class", b"")
    kind = kind.decode() if isinstance(kind, bytes) else str(kind)
    if item.dtype.kind == "O":
        return _references(file, item, budget, depth)
    budget.take(to_read(item))
    if item.dtype.kind not in "biuf" or "MATLAB_object_decode" in item.attrs:
        return "" if kind == "char" else None
    if "MATLAB_empty" in item.attrs:  # then the numbers are the sizes
        shape = tuple(int(size) for size in np.ravel(item[()]))
        return "" if kind == "char" else [] if kind == "cell" else np.zeros(shape if 0 in shape else (0, 0))
    array = item[()].T
    if kind == "char":
        return "".join(map(chr, array.ravel())) if array.ndim < 2 or array.shape[0] == 1 else None
    if kind in ("function_handle", "opaque"):
        return None
    return array.astype(bool) if kind == "logical" else array


def _references(file: Any, item: Any, budget: Budget, depth: int) -> list[Any]:
    if h5py.check_ref_dtype(item.dtype) is not h5py.Reference:
        raise ValueError(f"needed references in {item.name}, got {item.dtype}")
    budget.take(math.prod(item.shape or ()) * ITEM + to_read(item))
    return [_item(file, file[reference], budget, depth + 1) for reference in np.ravel(item[()])]
