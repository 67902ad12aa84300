"""Hostile files for everything that reads one: each target makes good files once, and a changed one for every case."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import zipfile
from abc import ABC, abstractmethod
from pathlib import Path
from random import Random
from typing import Any

import h5py
import mutations
import numpy as np
import torch
from safetensors.torch import load, save

import pyro_metassm as pm
from pyro_metassm import checkpoints, saving
from pyro_metassm.experiments.settings import Settings
from pyro_metassm.guides.encoders import RecurrentEncoder


def recording(seed: int = 0) -> pm.Recording:
    """A small recording with everything that one may have."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (6, 9, 4)).astype(float)
    counts[1, 3:5] = np.nan
    return pm.Recording(
        "a", counts, bin_width=0.02, inputs=rng.normal(size=(6, 9, 2)), behavior=rng.normal(size=(6, 9, 2)),
        condition=list("aabbcc"), neuron_ids=list("wxyz"), held_out_neurons=[3],
        attrs={"behavior_names": ["u", "v"], "trials": {"side": np.arange(6), "cue": list("lrlrlr")},
               "nested": {"n": [1, None, True]}, "gain": np.array([[1.5, 2.5]])},
    )  # fmt: skip


class Target(ABC):
    """A reader and its files. ``write`` makes those of one case, from a source of randomness alone."""

    def __init__(self, folder: Path):
        self.folder = folder

    @property
    @abstractmethod
    def path(self) -> Path:
        """What is read; a refusal names it."""

    @abstractmethod
    def write(self, rng: Random) -> None:
        """Put the files of one case there."""

    @abstractmethod
    def read(self) -> Any:
        """Read them."""

    def unsound(self, result: Any) -> str | None:
        """What is wrong with a result, in words."""
        if not isinstance(result, pm.Recording):
            return f"a {type(result).__name__}"
        for key, value in vars(result).items():
            if isinstance(value, np.ndarray) and value.dtype.hasobject:
                return f"objects in {key}"
        if not np.isfinite(result.values).all() or result.values.shape != result.mask.shape:
            return "values that are not finite, or have another shape than the mask"
        if "/" in result.name or result.name in ("", ".", ".."):
            return f"the name {result.name!r}"
        result.take([0]).to_xarray()  # usable
        return None


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
        self.path.write_bytes(self.data)
        with h5py.File(self.path, "r+") as file:
            for _ in range(rng.choice((1, 1, 2))):
                with contextlib.suppress(Exception):  # what HDF5 itself does not write
                    self._change(rng, file, kind)

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
                    new[...] = "long" * rng.choice((1, 1000, 100_000))
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


class Fits(Target):
    """Folders of saved fits: the header, the tensors, and the header of these."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=4, num_steps=8, num_neurons=(3, 4))
        quick = {"num_steps": 2, "warm_start": False, "progress": False}
        small = {"latent_dim": 2, "embedding_dim": 1, "hidden_dim": 4}
        mixed = pm.likelihoods.Mixed.of({"w=2*": pm.likelihoods.Gaussian, "*": pm.likelihoods.Gaussian})
        self.made = []
        for family, encoder in ((pm.likelihoods.Gaussian, None), (mixed, RecurrentEncoder)):
            model = pm.models.MetaSSM(recs, **small, likelihood=family)
            guide = pm.guides.DKF(model, hidden_dim=4, **({"embedding_encoder": encoder} if encoder else {}))
            fit = pm.fit(model, guide, recs, **quick)
            fit.attrs["note"] = {"sizes": (1, 2.5, None), "nan": float("nan")}
            fit.save(self.path)
            data = (self.path / saving.TENSORS).read_bytes()
            self.made.append((json.loads((self.path / saving.HEADER).read_text()), data))

    @property
    def path(self) -> Path:
        return self.folder / "fit"

    def write(self, rng: Random) -> None:
        header, data = rng.choice(self.made)
        kind = rng.randrange(10)
        if kind >= 7:
            data = safetensors(rng, data)
        elif kind == 6:
            data = mutations.some_bytes(rng, data)
        (self.path / saving.TENSORS).write_bytes(data)
        if rng.random() < 0.98:
            header = header | {"sha256": saving._digest(self.path / saving.TENSORS)}
        text = json.dumps(header).encode() if kind >= 6 else mutations.json_text(rng, header)
        if kind < 6 and rng.random() < 0.5:  # a change deep within, of what constructors are given
            what = rng.choice(("model", "guide", "history", "names", "num_neurons", "attrs"))
            text = json.dumps(header | {what: mutations.json_value(rng, header[what])}).encode()
        (self.path / saving.HEADER).write_bytes(text)

    def read(self) -> Any:
        return pm.load(self.path)

    def unsound(self, result: Any) -> str | None:
        if not isinstance(result, pm.Fit) or not isinstance(result.model, pm.models.MetaSSM):
            return f"a {type(result).__name__}"
        return None if result.statistics.shape[0] == len(result.names) else "statistics of other recordings"


def safetensors(rng: Random, data: bytes) -> bytes:
    """Tensors announced as others: names, kinds, shapes and places."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    keys = [key for key in header if key != "__metadata__"]
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice(keys)
        match rng.randrange(6):
            case 0:
                header[key] = mutations.json_value(rng, header[key])
            case 1:
                header[key]["dtype"] = rng.choice((*saving.DTYPES, "F8_E4M3", "C64", "O", ""))
            case 2:
                header[key]["shape"] = rng.choice(
                    ([], [2**40], [0, 2**62], [-1], [1] * 70, [2**32, 2**32], [10**30])
                )
            case 3:
                header[key]["data_offsets"] = [rng.choice((0, 1, 2**40, 2**64 - 1)) for _ in range(2)]
            case 4:
                header[rng.choice(("../x", "model.", "history.x", "statistics", "guide.a.b", "\0"))] = (
                    header.pop(key)
                )
                keys = [key for key in header if key != "__metadata__"]
            case 5:
                header["__metadata__"] = rng.choice(({"a": "b"}, {}, {"checkpoint": "[" * 100_000}))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 7, 2**31, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + text + data[8 + size :]


class Checkpoints(Target):
    """Folders of running fits."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=3, num_steps=5, num_neurons=(2, 3))
        self.model = pm.models.MetaSSM(self.recs, latent_dim=1, embedding_dim=1, hidden_dim=3)
        self.guide = pm.guides.DKF(self.model, hidden_dim=3, read_in_dim=2)
        self.read()
        self.file = min(self.path.glob("*.safetensors"))
        self.data = self.file.read_bytes()
        (size,) = struct.unpack("<Q", self.data[:8])
        self.metadata = json.loads(self.data[8 : 8 + size])["__metadata__"]
        self.header = json.loads(self.metadata["checkpoint"])
        self.tensors = load(self.data)

    @property
    def path(self) -> Path:
        return self.folder / "run"

    def write(self, rng: Random) -> None:
        for other in self.path.glob("*"):
            if other != self.file:
                other.unlink()
        kind = rng.randrange(10)
        if kind == 0:
            self.file.write_bytes(mutations.some_bytes(rng, self.data))
            return
        if kind == 1:
            self.file.write_bytes(safetensors(rng, self.data))
            return
        header, tensors = self.header, dict(self.tensors)
        if kind <= 4:
            for _ in range(rng.choice((1, 1, 3))):
                key = rng.choice(list(tensors))
                match rng.randrange(4):
                    case 0:
                        del tensors[key]
                    case 1:
                        shape = rng.choice(((), (1,), (3, 2), (0,), (5056,)))
                        tensors[key] = torch.from_numpy(np.zeros(shape, rng.choice(("f4", "f8", "u1", "i8"))))
                    case 2:
                        tensors[key] = torch.full_like(tensors[key], rng.choice((0, 1, 127)))
                    case 3:
                        others = ("optimizer.x.y", "optimizer.99.step", "history.elbo", "model.x", "rng")
                        tensors[rng.choice(others)] = tensors[key]
                if not tensors:
                    break
            text = json.dumps(header)
        elif kind <= 7:  # deep within, past the comparison of specifications
            what = rng.choice([key for key in header if key not in ("specification", "format")])
            text = json.dumps(header | {what: mutations.json_value(rng, header[what])})
        else:
            text = mutations.json_text(rng, header).decode("utf-8", "replace")
        metadata = dict(self.metadata) | {"checkpoint": text}
        if "digest" in metadata:
            metadata["digest"] = checkpoints._digest(text, tensors)
        self.file.write_bytes(save({key: value.clone() for key, value in tensors.items()}, metadata))

    def read(self) -> Any:
        return pm.fit(
            self.model, self.guide, self.recs, num_steps=2, warm_start=False, progress=False, checkpoint=self.path,
            checkpoint_every=1,
        )  # fmt: skip

    def unsound(self, result: Any) -> str | None:
        steps = result.history.sizes["step"]
        return None if isinstance(result, pm.Fit) and steps == 2 else f"a history of {steps} steps"


class Pools(Target):
    """Zarr stores of recordings: their JSON, which claims sizes and codecs, and their chunks."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        pm.io.write_zarr([recording()], self.path)
        self.files = {path: path.read_bytes() for path in sorted(self.path.rglob("*")) if path.is_file()}

    @property
    def path(self) -> Path:
        return self.folder / "pool.zarr"

    def write(self, rng: Random) -> None:
        shutil.rmtree(self.path)
        changed = rng.choice(list(self.files))
        for path, data in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path == changed:
                if path.suffix == ".json" and rng.random() < 0.8:
                    data = mutations.json_text(rng, json.loads(data))
                elif rng.random() < 0.1:
                    continue
                else:
                    data = mutations.some_bytes(rng, data)
            path.write_bytes(data)

    def read(self) -> Any:
        return pm.io.read_zarr(self.path)


class Studies(Target):
    """The settings that a study finds in its folder."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.settings = Settings()
        self.settings.claim(folder)

    @property
    def path(self) -> Path:
        return self.folder

    def write(self, rng: Random) -> None:
        text = mutations.json_text(rng, self.settings.as_json())
        (self.folder / "settings.json").write_bytes(text)

    def read(self) -> Any:
        return self.settings.claim(self.folder)

    def unsound(self, result: Any) -> str | None:
        return None if result is None else "something"


TARGETS: dict[str, type[Target]] = {
    "npz": Npz, "netcdf": NetCDF, "fit": Fits, "checkpoint": Checkpoints, "settings": Studies,
    "zarr": Pools,
}  # fmt: skip


def made(name: str, folder: Path) -> Target:
    """The target of this name, in a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return TARGETS[name](folder)
