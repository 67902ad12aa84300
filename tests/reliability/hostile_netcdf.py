"""Hostile netCDF files: data sets, attributes, links and the bytes of the container."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import h5py
import mutations
import numpy as np
from hostile import Target, changed_hdf5, recording

import pyro_metassm as pm


class NetCDF(Target):
    raw = True  # whether some cases change bytes of the container, which libhdf5 reads, in C

    def __init__(self, folder: Path):
        super().__init__(folder)
        pm.io.write_netcdf(recording(), self.path)
        self.data = self.path.read_bytes()
        with h5py.File(self.path) as file:
            self.attributes = json.loads(file["attributes"][()])
        self.secret = folder / "secret.nc"
        pm.io.write_netcdf(recording(1), self.secret)

    @property
    def path(self) -> Path:
        return self.folder / "a.nc"

    def write(self, rng: Random) -> None:
        kind = rng.randrange(12)
        if kind == 0 and self.raw:
            self.path.write_bytes(mutations.some_bytes(rng, self.data))
            return
        changed_hdf5(self.path, self.data, rng, lambda file: self._change(rng, file, kind))

    def _change(self, rng: Random, file: h5py.File, kind: int) -> None:
        names = list(file)
        name = rng.choice(names)
        match kind:
            case 1 | 2:
                data = mutations.array(rng)
                old = file[name]
                keep = dict(old.attrs) if rng.random() < 0.5 else {}
                del file[name]
                new = file.create_dataset(name, data=data)
                for key, value in keep.items():
                    new.attrs[key] = value
                _scale(rng, file, new)
            case 3 | 4:
                owner = rng.choice((file, file, file[name]))
                key = rng.choice(("name", "bin_width", "units", "_FillValue", "scale_factor", "add_offset", "dtype",
                                  "coordinates", "_Netcdf4Dimid", "NAME", "CLASS", "DIMENSION_LIST", "_NCProperties",
                                  "missing_value", "_Unsigned", "calendar", "flag_values", "grid_mapping"))  # fmt: skip
                value = rng.choice((*mutations.VALUES, mutations.array(rng), ["a", "b" * 1000]))
                owner.attrs[key] = json.dumps(value) if isinstance(value, dict) else value
            case 5:
                del file["attributes"]
                file["attributes"] = (
                    mutations.json_text(rng, self.attributes).replace(b"\0", b"").decode("utf-8", "replace")
                )
            case 6:
                del file[name]
                shape = rng.choice(
                    ((10**12,), (10**6, 10**6, 10**6), (2**40, 1), (1000, 1000, 1000), (0, 3), (2**62,))
                )
                chunks = tuple(min(size, 16) or 1 for size in shape)
                new = file.create_dataset(
                    name, shape, dtype=rng.choice(("u1", "f8", "S1", "S1000", h5py.string_dtype())), chunks=chunks,
                    fillvalue=None, compression=rng.choice((None, "gzip")),
                    maxshape=rng.choice((None, (None,) * len(shape))),
                )  # fmt: skip
                _scale(rng, file, new)
            case 7:
                del file[name]
                match rng.randrange(5):
                    case 0:
                        file[name] = h5py.ExternalLink(
                            rng.choice((self.secret.name, "/etc/passwd")), f"/{name}"
                        )
                    case 1:
                        file[name] = h5py.SoftLink(rng.choice((f"/{name}", "/mask", "/nowhere")))
                    case 2:
                        file.create_dataset(name, (6, 9, 4), "u1", external=[(str(self.secret), 0, 216)])
                    case 3:
                        layout = h5py.VirtualLayout((6, 9, 4), "f8")
                        layout[:] = h5py.VirtualSource(str(self.secret), name, (6, 9, 4))
                        file.create_virtual_dataset(name, layout)
                    case 4:
                        file[name] = file[rng.choice([other for other in names if other != name])]
            case 8:
                file.copy(name, rng.choice(("neuron", "behavior_dim", "time", "x", "posterior", "lengths2")))
            case 9:
                group = file.create_group(rng.choice(("g", "h")))
                for _ in range(rng.choice((1, 3, 30))):  # a ladder: twice as many ways down at every step
                    group["self"] = rng.choice((file, group))
                    following = group.create_group("x")
                    group["y"] = following
                    group = following
            case 10:
                kinds = (
                    h5py.string_dtype(),
                    h5py.vlen_dtype("f8"),
                    h5py.ref_dtype,
                    h5py.enum_dtype({"a": 1}, "i4"),
                )
                del file[name]
                new = file.create_dataset(
                    name, rng.choice(((6,), (4,), (), (5000,), (6, 9, 4))), rng.choice(kinds)
                )
                if rng.random() < 0.5:
                    longest = 100_000 if new.size < 1000 else 1000  # a file of 2 GB may take as much
                    new[...] = "long" * rng.choice((1, 1000, longest))
                _scale(rng, file, new)
            case 11:
                del file[name]
            case _:
                file[name].attrs["x" * rng.choice((1, 300))] = "y" * rng.choice((1, 60_000))

    def read(self) -> Any:
        return pm.io.read(self.path)

    def unsound(self, result: Any) -> str | None:
        behavior = getattr(result, "behavior", None)
        if behavior is not None and np.array_equal(behavior, recording(1).behavior):
            return "data of another file"
        return super().unsound(result)


def _scale(rng: Random, file: h5py.File, data: h5py.Dataset) -> None:
    """Dimensions for a new data set, as netCDF wants them, so that it is not refused for want of these."""
    for axis in range(data.ndim):
        known = ("trial", "time", "neuron", "input_dim")[axis % 4]
        if known not in file or file[known].shape != (data.shape[axis],):
            known = f"d{axis}_{rng.randrange(10**6)}"
            file.create_dataset(known, data.shape[axis : axis + 1], "f8", chunks=(16,))
            file[known].make_scale(known)
        data.dims[axis].attach_scale(file[known])
