"""A look at the arrays of a Zarr store before they are read: they are as `write_zarr` makes them, and its own."""

from __future__ import annotations

import itertools
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np

from pyro_metassm.io._files import refuse_claims

KINDS = (
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float32", "float64",
)  # fmt: skip
CODECS = ["bytes", "zstd", "crc32c"]  # others could be of any package, and some unpickle
MOST_PER_ROW = 10_000  # chunks of a trial
NEEDED = "needed arrays as write_zarr makes them"


class StoredArray:
    """An array in a folder of a store, `shape` and `dtype` told by its `zarr.json`; `read` reads some rows of it."""

    def __init__(self, zarr: Any, store: str | os.PathLike[str], *parts: str) -> None:
        self.store, self.folder = Path(store), Path(store).joinpath(*parts)
        about = metadata(store, *parts)
        codecs = about.get("codecs")
        names = [codec.get("name") for codec in codecs] if isinstance(codecs, list) else codecs
        grid, keys = about["chunk_grid"], about["chunk_key_encoding"]
        if (
            about.get("node_type") != "array"
            or about.get("data_type") not in KINDS
            or names != CODECS
            or about.get("storage_transformers")
            or grid["name"] != "regular"
            or keys != {"name": "default", "configuration": {"separator": "/"}}
        ):
            raise ValueError(f"{self.folder.name}: {NEEDED}, got other kinds or codecs")
        self.shape = _sizes(about["shape"], self.folder.name)
        self.chunks = _sizes(grid["configuration"]["chunk_shape"], self.folder.name)
        self.dtype = np.dtype(about["data_type"])
        if len(self.chunks) != len(self.shape):
            raise ValueError(f"{self.folder.name}: {NEEDED}, got chunks {self.chunks} of {self.shape}")
        packed = self._packed()
        # As they come out of the store, counts become numbers of four bytes.
        refuse_claims(math.prod(self.shape) * max(self.dtype.itemsize, 4), packed)
        refuse_claims(math.prod(self.chunks) * self.dtype.itemsize, packed)
        self._array = zarr.open_array(str(self.folder), mode="r", zarr_format=3)

    def read(self, rows: np.ndarray, bins: slice) -> np.ndarray:
        """`(len(rows), bins, ...)`.

        Raises:
            ValueError: A chunk that is damaged, or would become larger than chunks are.
        """
        size = math.prod(self.chunks) * self.dtype.itemsize
        for first in np.unique(rows // self.chunks[0]).tolist():
            for path in self._files(first):
                with path.open("rb") as file:
                    if (found := _unpacked(file.read(18))) != size:
                        raise ValueError(f"needed chunks of {size} bytes, got {found} in {path.name}")
        if len(rows) and (np.diff(rows) == 1).all():
            return self._array[int(rows[0]) : int(rows[-1]) + 1, bins]
        return self._array.oindex[rows, bins]

    def _files(self, first: int) -> list[Path]:
        """The chunks whose first index this is."""
        steps = [range(-(-size // chunk)) for size, chunk in zip(self.shape, self.chunks, strict=True)][1:]
        return [self.folder.joinpath("c", str(first), *map(str, rest)) for rest in itertools.product(*steps)]

    def _packed(self) -> int:
        """Bytes of all chunks.

        Raises:
            ValueError: One is missing.
        """
        number = -(-self.shape[0] // self.chunks[0])
        each = math.prod(-(-s // c) for s, c in zip(self.shape[1:], self.chunks[1:], strict=True))
        if each > MOST_PER_ROW:
            raise ValueError(f"{self.folder.name}: {NEEDED}, got {each} chunks for a trial")
        names = {entry.name for entry in os.scandir(self.folder / "c")}
        # What is not there is not looked for: a file of a few bytes can claim any number of chunks.
        have = [int(name) for name in names if name.isdecimal() and len(name) < 12]
        have = [first for first in have if first < number]
        packed, found = 0, 0
        for folder, paths in itertools.groupby(
            (path for first in have for path in self._files(first)), lambda path: path.parent
        ):
            own(folder, self.store)
            for path in paths:
                if not os.path.lexists(path):
                    continue
                about = path.lstat()
                if not stat.S_ISREG(about.st_mode):
                    raise ValueError(f"{path.name}: needed data in the store itself, got a link or a folder")
                packed, found = packed + about.st_size, found + 1
        if found < number * each:
            raise ValueError(
                f"needed all chunks of {self.folder.name}, got {number * each - found} of {number * each} missing; "
                "copy the store again"
            )
        return packed


def metadata(store: str | os.PathLike[str], *parts: str) -> dict[str, Any]:
    """What a group or array of a store says of itself, `zarr.json` as it is: nothing of it is looked up or followed.

    Raises:
        ValueError: None, or one that lies elsewhere.
        OSError: It cannot be read.
    """
    path = Path(store).joinpath(*parts, "zarr.json")
    own(path, store)
    if not path.is_file():
        raise ValueError(f"needed {'/'.join((*parts, 'zarr.json'))}, got none; copy the store again")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("zarr_format") != 3:
        raise ValueError(f"{'/'.join(parts)}: needed Zarr of version 3, got something else")
    return found


def own(path: Path, store: str | os.PathLike[str]) -> None:
    """Refuse what a link leads out of the store.

    Raises:
        ValueError: It does.
    """
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(store)):
        raise ValueError(f"{path.name}: needed data in the store itself, got a link")


def _sizes(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= 3:
        raise ValueError(f"{name}: {NEEDED}, got a shape {str(value)[:40]}")
    if not all(type(size) is int and 0 < size < 2**40 for size in value):
        raise ValueError(f"{name}: {NEEDED}, got a shape {str(value)[:80]}")
    return tuple(value)


def _unpacked(head: bytes) -> int | None:
    """Bytes that a Zstandard frame says it holds (RFC 8878, 3.1.1.1); None if it does not."""
    if head[:4] != b"\x28\xb5\x2f\xfd" or len(head) < 6:
        return None
    flags = head[4]
    single = flags >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[flags & 3]
    width = (single, 2, 4, 8)[flags >> 6]
    if width == 0 or len(head) < start + width:
        return None
    return int.from_bytes(head[start : start + width], "little") + (256 if width == 2 else 0)
