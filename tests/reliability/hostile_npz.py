"""Hostile `.npz` files: announced arrays, members and the zip around them."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import mutations
import numpy as np
from hostile import Target, recording

import pyro_metassm as pm


class Npz(Target):
    def __init__(self, folder: Path):
        super().__init__(folder)
        pm.io.write_npz(recording(), self.path)
        with np.load(self.path) as file:
            self.arrays = {key: file[key] for key in file.files}
        self.attributes = json.loads(str(self.arrays["attributes"]))
        self.data = self.path.read_bytes()

    @property
    def path(self) -> Path:
        return self.folder / "a.npz"

    def write(self, rng: Random) -> None:
        kind = rng.randrange(8)
        if kind == 0:
            self.path.write_bytes(mutations.some_bytes(rng, self.data))
            return
        members = {f"{key}.npy": _npy(array) for key, array in self.arrays.items()}
        for _ in range(rng.choice((1, 1, 2))):
            name = rng.choice(list(members))
            match kind:
                case 1 | 2:
                    members[name] = mutations.npy(rng, self.arrays[name[:-4]])
                case 3:
                    members[name] = _npy(mutations.array(rng))
                case 4:
                    text = mutations.json_text(rng, self.attributes).decode("utf-8", "replace")
                    members["attributes.npy"] = _npy(np.array(text))
                case 5:
                    members.pop(name)
                    members[str(rng.choice(mutations.VALUES[16:30]))[:60000] + rng.choice(("", ".npy"))] = (
                        b"x" * 9
                    )
        self.path.write_bytes(_zip(rng, members, hostile=kind >= 6))

    def read(self) -> Any:
        return pm.io.read(self.path)


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, allow_pickle=True)  # nothing here is an object
    return out.getvalue()


def _zip(rng: Random, members: dict[str, bytes], *, hostile: bool) -> bytes:
    """A zip file; a hostile one has other packings, lies about sizes, members twice, overlaid or with odd names."""
    out = io.BytesIO()
    packings = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    bomb = rng.randrange(40) if hostile else 0
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            packing = rng.choice(packings if hostile else packings[:2])
            if bomb == 1 and name == "spikes.npy":
                data, packing = _npy(np.zeros((40, 1000, 1000), np.uint8)), zipfile.ZIP_DEFLATED
            info = zipfile.ZipInfo(name)
            info.compress_type = packing
            archive.writestr(info, data)
        if bomb == 2:
            for number in range(1100):
                archive.writestr(f"more{number}.npy", b"")
    data = out.getvalue()
    if not hostile or bomb in (1, 2):
        return data
    changed = bytearray(data)
    for mark, places in (
        (b"PK\x01\x02", ((20, 4), (24, 4), (42, 4), (8, 2), (10, 2))),
        (b"PK\x03\x04", ((18, 4), (22, 4))),
    ):
        at = -1
        while (at := data.find(mark, at + 1)) >= 0:
            if rng.random() < 0.15:
                place, width = rng.choice(places)
                value = rng.choice((0, 1, 8, 100, 65535, 2**31 - 1, 2**32 - 1)) % 2 ** (8 * width)
                changed[at + place : at + place + width] = value.to_bytes(width, "little")
    end = rng.choice((b"", b"", b"", b"\0" * 30, b"PK\x05\x06"))
    return rng.choice((b"", b"", b"", b"#!/bin/sh\n")) + bytes(changed) + end
