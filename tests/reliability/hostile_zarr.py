"""Hostile Zarr stores: what is said of groups and arrays, chunks with their checksums made right again, links."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from random import Random
from typing import Any

import google_crc32c
import mutations
import numcodecs
import numpy as np
from hostile import Target, recording

import pyro_metassm as pm

CODECS: tuple[Any, ...] = (
    {"name": "gzip"}, {"name": "blosc"}, {"name": "transpose", "configuration": {"order": [2, 1, 0]}},
    {"name": "numcodecs.pickle"}, {"name": "vlen-utf8"}, {"name": "no.such"}, {"name": "zstd"}, "bytes", None,
    {"name": "sharding_indexed", "configuration": {"chunk_shape": [1, 1, 1], "codecs": [{"name": "bytes"}]}},
    {"name": "bytes", "configuration": {"endian": "big"}}, {"id": "pickle"},
)  # fmt: skip
SHAPES: tuple[Any, ...] = (
    [10**12, 9, 4], [10**30, 1, 1], [0, 9, 4], [-6, 9, 4], [6, 9], [6], [], [6, 9, 4, 1], "6", None, [6.0, 9, 4],
    [True, 9, 4], [2**31, 2**31, 2], [6, 9, 2**39], [7, 9, 4], [3, 9, 4], [6, 10, 4],
)  # fmt: skip
KINDS = (
    "float32",
    "float64",
    "int8",
    "uint64",
    "bool",
    "float16",
    "complex64",
    "string",
    "r16",
    "object",
    "|O",
    {},
    3,
)


class Zarr(Target):
    def __init__(self, folder: Path):
        super().__init__(folder)
        pm.io.write_zarr(recording(), self.path)
        self.files = {
            path.relative_to(self.path): path.read_bytes() for path in self.path.rglob("*") if path.is_file()
        }
        self.secret = folder / "secret.zarr"
        pm.io.write_zarr(recording(1), self.secret)

    @property
    def path(self) -> Path:
        return self.folder / "a.zarr"

    def write(self, rng: Random) -> None:
        shutil.rmtree(self.path)
        files = dict(self.files)
        links: dict[Path, Path] = {}
        for _ in range(rng.choice((1, 1, 2))):
            self._change(rng, files, links)
        for name, data in files.items():
            place = self.path / name
            with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
                # one name may be a file and a folder
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
        for name, target in links.items():
            place = self.path / name
            if not (place.parent.is_dir() and place.parent.resolve().is_relative_to(self.path.resolve())):
                continue  # under a file, or under another link: the secret is not to be changed
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            place.unlink(missing_ok=True)
            place.symlink_to(target)

    def _change(self, rng: Random, files: dict[Path, bytes], links: dict[Path, Path]) -> None:
        about = sorted(name for name in files if name.name == "zarr.json")
        chunks = sorted(name for name in files if name.name != "zarr.json")
        one = rng.choice(about)
        kind = rng.randrange(12)
        try:
            said = json.loads(files[one])
        except (ValueError, RecursionError):  # of a change before
            kind, said = 10, None
        array = rng.choice([name for name in about if len(name.parts) == 3])
        match kind:
            case 0 | 1:
                files[one] = mutations.json_text(rng, said)
            case 2 | 3 | 4:  # of an array, in place
                try:
                    said = json.loads(files[array])
                    match rng.randrange(6):
                        case 0:
                            said["shape"] = rng.choice(SHAPES)
                        case 1:
                            said["chunk_grid"]["configuration"]["chunk_shape"] = rng.choice(SHAPES)
                        case 2:
                            said["data_type"] = rng.choice(KINDS)
                        case 3:
                            said["codecs"][rng.randrange(len(said["codecs"]))] = rng.choice(CODECS)
                        case 4:
                            said["shape"] = rng.choice(SHAPES)
                            said["chunk_grid"]["configuration"]["chunk_shape"] = said["shape"]
                        case 5:
                            key = rng.choice(("fill_value", "chunk_key_encoding", "zarr_format", "node_type",
                                              "storage_transformers", "consolidated_metadata", "attributes",
                                              "dimension_names", "codecs"))  # fmt: skip
                            said[key] = rng.choice(mutations.VALUES)
                    files[array] = json.dumps(said).encode()
                except (ValueError, KeyError, TypeError, IndexError, RecursionError):
                    files[array] = b"{}"
            case 5:  # the recording within the attributes of its group
                group = next(name for name in about if len(name.parts) == 2)
                try:
                    said = json.loads(files[group])
                    inner = json.loads(said["attributes"]["recording"])
                    said["attributes"]["recording"] = mutations.json_text(rng, inner).decode(
                        "utf-8", "replace"
                    )
                    files[group] = json.dumps(said).encode()
                except (ValueError, KeyError, TypeError, RecursionError):
                    del files[group]
            case 6:
                files[rng.choice(chunks)] = mutations.some_bytes(rng, files[rng.choice(chunks)])
            case 7:  # bytes of what is packed, the checksum right
                name = rng.choice(chunks)
                files[name] = summed(mutations.some_bytes(rng, files[name][:-4]))
            case 8:  # other numbers, soundly packed: too many, too few, any, a bomb
                raw = rng.choice((b"", b"\0", b"\xff" * 216, b"\x7f\xf0" * 864, b"\0" * 1728, b"\0" * 2**28))
                if len(raw) == 2**28:
                    raw = raw if rng.random() < 0.1 else raw[: 2**20]
                files[rng.choice(chunks)] = summed(bytes(numcodecs.Zstd(1).encode(raw)))
            case 9:
                name = rng.choice((*chunks, *about, *{path.parent for path in files if len(path.parts) > 1}))
                target = rng.choice((self.secret / name, Path("/dev/zero"), Path("/etc/passwd"), self.path))
                links[name] = target
            case 10:
                del files[rng.choice(sorted(files))]
            case 11:
                name = rng.choice(sorted(files))
                more = rng.choice(
                    (".zarray", ".zgroup", ".zattrs", "c/99999999999", "c/x", "zarr.json", "c/0/0/1")
                )
                files[name.parent / more if name.name == "zarr.json" else name.parents[2] / more] = (
                    rng.choice((b"", b"{}", b'{"zarr_format": 2, "filters": [{"id": "pickle"}]}'))
                )

    def read(self) -> Any:
        return pm.io.read(self.path)

    def unsound(self, result: Any) -> str | None:
        behavior = getattr(result, "behavior", None)
        if behavior is not None and np.array_equal(behavior, recording(1).behavior):
            return "data of another store"
        return super().unsound(result)


def summed(data: bytes) -> bytes:
    """Bytes and their checksum, as the codec of this name writes them."""
    return data + google_crc32c.value(data).to_bytes(4, "little")
