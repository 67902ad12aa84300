"""What is kept beside a recording's data: its `attrs`, checked, and as text for files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_metassm import _checks as checks

NUMBERS = re.compile("[<>|=](b1|[iu][1248]|f[248]|f16)")  # kinds of arrays as `to_json` writes them


def plain(name: str, value: Any) -> Any:
    """An entry of `attrs`: str, number, bool, None, list, dict with str keys, or array of these."""
    if isinstance(value, (xr.DataArray, torch.Tensor)):
        value = checks.as_numpy(value)
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        value = value.item()
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(name, item) for item in value]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufU":
        flat = (
            checks.texts(name, "attrs", value.ravel().tolist()) if value.dtype.kind == "U" else value.copy()
        )
        return flat.reshape(value.shape)
    raise checks.fail(
        name,
        "attrs of str, numbers, lists, dicts and arrays",
        f"a {type(value).__name__}",
        "convert it to str",
    )


def attrs_of(name: str, value: Any, num_trials: int, num_neurons: int) -> dict[str, Any]:
    """All attrs; the entries of `trials` as arrays with a row a trial, those of `neurons` with a row a neuron."""
    if not isinstance(value or {}, Mapping):
        raise checks.fail(name, "attrs as a dict", f"a {type(value).__name__}", "give every entry a name")
    attrs = plain(name, dict(value or {}))
    for table, number in (("trials", num_trials), ("neurons", num_neurons)):
        if table not in attrs:
            continue
        if not isinstance(attrs[table], dict):
            raise checks.fail(
                name, f'attrs["{table}"] as a dict of arrays', f"{type(attrs[table])}", "rename the entry"
            )
        attrs[table] = {key: _rows(name, table, rows) for key, rows in attrs[table].items()}
        for key, rows in attrs[table].items():
            if rows.shape[:1] != (number,):
                raise checks.fail(
                    name,
                    f'attrs["{table}"][{key!r}] of {number} rows',
                    f"shape {rows.shape}",
                    f"use one a {table[:-1]}",
                )
    return attrs


def _rows(name: str, table: str, rows: Any) -> np.ndarray:
    """An entry of `attrs["trials"]` or `attrs["neurons"]`."""
    if isinstance(rows, np.ndarray):
        return rows
    # Each text in its own room so far.
    objects = np.array(rows if isinstance(rows, list) else [], dtype=object)
    items = objects.ravel().tolist()
    if items and all(isinstance(item, str) for item in items):
        return checks.texts(name, f'attrs["{table}"]', items).reshape(objects.shape)
    if not all(isinstance(item, (bool, int, float)) for item in items):
        raise checks.fail(
            name, f'attrs["{table}"] of numbers or of text', "other or mixed entries", "use one kind a key"
        )
    return np.asarray(rows if isinstance(rows, list) else [])


def to_json(attrs: dict[str, Any]) -> str:
    """Attrs as text, arrays and their dtypes included."""

    def encode(array: np.ndarray) -> dict[str, Any]:
        return {"__array__": array.dtype.str, "shape": array.shape, "data": array.ravel().tolist()}

    return json.dumps(attrs, default=encode)


def from_json(text: str) -> dict[str, Any]:
    """The inverse of `to_json`.

    Raises:
        ValueError: text that it did not write.
    """

    def decode(entry: dict[str, Any]) -> Any:
        if "__array__" not in entry:
            return entry
        kind, data, shape = str(entry["__array__"]), entry.get("data"), entry.get("shape")
        if not (isinstance(data, list) and isinstance(shape, list) and all(type(n) is int for n in shape)):
            raise ValueError("attributes: needed arrays with data and a shape, got something else")
        if any(n < 0 for n in shape) or math.prod(shape) != len(data):
            raise ValueError(f"attributes: needed an array of shape {shape}, got {len(data)} numbers")
        # A width is not taken from a file: "<U1000000000" would allocate before anything is checked.
        if re.fullmatch("[<>|=]U[0-9]+", kind) and all(isinstance(item, str) for item in data):
            array = checks.texts("attributes", "arrays", data)
        elif NUMBERS.fullmatch(kind):
            array = np.array(data, dtype=kind)
        else:
            raise ValueError(f"attributes: needed arrays of numbers or text, got the kind {kind[:40]!r}")
        return array.reshape(shape)

    attrs = json.loads(text, object_hook=decode)
    if not isinstance(attrs, dict):
        raise ValueError(f"attributes: needed a JSON object, got {type(attrs).__name__}")
    return attrs
