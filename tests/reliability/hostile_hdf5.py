"""Hostile HDF5 files of other makers: the benchmark's tensors, MATLAB files (and earlier ones), NWB."""

from __future__ import annotations

import sys
import zlib
from abc import abstractmethod
from pathlib import Path
from random import Random
from typing import Any

import h5py
import mutations
import numpy as np
import scipy.io
from hostile import Target, changed_hdf5

import pyro_metassm as pm

sys.path.append(str(Path(__file__).resolve().parents[1]))
SECRET = 41.0  # stands in another file alone


class Hdf5(Target):
    """A sound file, of which data sets, attributes and links are changed, at times bytes of the container."""

    raw = True  # whether bytes of the container are changed: libhdf5 reads them, in C
    suffix = "h5"

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.make(self.path)
        self.data = self.path.read_bytes()
        self.secret = folder / "secret.h5"
        self.names: list[str] = []
        self.groups = ["/"]
        with h5py.File(self.path) as file:
            file.visititems(
                lambda name, item: (
                    self.groups if isinstance(item, h5py.Group) else self.names
                ).append(name)
            )  # fmt: skip
        with h5py.File(self.secret, "w") as file:
            for name in self.names:
                file[name] = np.full((6, 9, 4), SECRET)

    @property
    def path(self) -> Path:
        return self.folder / f"a.{self.suffix}"

    @abstractmethod
    def make(self, path: Path) -> None:
        """Write a good file."""

    def write(self, rng: Random) -> None:
        if self.raw and rng.random() < 0.1:
            self.path.write_bytes(mutations.some_bytes(rng, self.data))
            return
        changed_hdf5(self.path, self.data, rng, lambda file: self.change(rng, file))

    def change(self, rng: Random, file: h5py.File) -> None:
        """Change one thing in a file."""
        name = rng.choice(self.names)
        kind = rng.randrange(11)
        old = file[name]
        kept = dict(old.attrs) if rng.random() < 0.8 else {}
        match kind:
            case 0 | 1:
                del file[name]
                file[name] = mutations.array(rng)
            case 2:
                value = old[()]
                del file[name]
                some = rng.choice((0, -1, 1e308, np.nan, 2**31, 7))
                if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.size:
                    value = value.astype(rng.choice(("f8", "i8", "f4")))
                    with np.errstate(all="ignore"):
                        value.flat[rng.randrange(value.size)] = some
                    value = rng.choice((value, value[:-1], value[..., None], value.T))
                file[name] = value
            case 3 | 4:
                owner = rng.choice((old, old, file[rng.choice(self.groups)]))
                keys = [
                    *owner.attrs,
                    "MATLAB_class",
                    "MATLAB_empty",
                    "DIMENSION_LIST",
                    "CLASS",
                    "neurodata_type",
                    "x",
                ]
                value = rng.choice((*mutations.VALUES, mutations.array(rng), ["a", "b" * 1000]))
                key = rng.choice(keys)
                if rng.random() < 0.2 and key in owner.attrs:
                    del owner.attrs[key]
                else:
                    owner.attrs[key] = str(value) if isinstance(value, dict) else value
                return
            case 5 | 6:
                del file[name]
                shape = rng.choice(
                    ((10**12,), (10**6,) * 3, (2**40, 1), (1000,) * 3, (0, 3), (2**62,), (1, 10**7))
                )
                chunks = tuple(min(size, rng.choice((16, 16, 900))) or 1 for size in shape)
                file.create_dataset(
                    name, shape, dtype=rng.choice(("u1", "f8", "S1", "S1000", h5py.string_dtype(), h5py.ref_dtype)),
                    chunks=chunks, fillvalue=None, compression=rng.choice((None, "gzip")),
                )  # fmt: skip
            case 7:
                del file[name]
                match rng.randrange(5):
                    case 0:
                        file[name] = h5py.ExternalLink(
                            rng.choice((self.secret.name, "/etc/passwd")), f"/{name}"
                        )
                        return
                    case 1:
                        file[name] = h5py.SoftLink(
                            rng.choice((f"/{name}", f"/{self.names[0]}", "/nowhere", "/"))
                        )
                        return
                    case 2:
                        file.create_dataset(name, old.shape, "u1", external=[(str(self.secret), 0, 216)])
                    case 3:
                        layout = h5py.VirtualLayout(old.shape, "f8")
                        layout[...] = h5py.VirtualSource(str(self.secret), name, (6, 9, 4))
                        file.create_virtual_dataset(name, layout)
                    case 4:
                        file[name] = file[rng.choice((*self.names, *self.groups))]
                        return
            case 8:
                group = file[rng.choice(self.groups)].require_group(rng.choice(("g", "h")))
                for _ in range(rng.choice((1, 3, 30))):  # a ladder: twice as many ways down at every step
                    group["self"] = rng.choice((file, group))
                    group["y"] = (below := group.create_group("x"))
                    group = below
                return
            case 9:
                del file[name]
                kind_of = rng.choice(
                    (h5py.string_dtype(), h5py.vlen_dtype("f8"), h5py.ref_dtype, h5py.regionref_dtype)
                )
                new = file.create_dataset(name, rng.choice(((6,), (), (5000,), (1, 6), (6, 9, 4))), kind_of)
                if kind_of == h5py.ref_dtype:
                    new[...] = file[rng.choice((*self.groups, *self.names, name))].ref
                elif rng.random() < 0.5:
                    longest = 100_000 if new.size < 1000 else 1000  # a file of 2 GB may take as much
                    new[...] = "long" * rng.choice((1, 1000, longest))
            case 10:
                del file[rng.choice((name, name, rng.choice(self.groups[1:] or [name])))]
                return
        for key, value in kept.items():
            file[name].attrs[key] = value

    def unsound(self, result: Any) -> str | None:
        if any(
            part is not None and (np.asarray(part) == SECRET).any()
            for part in (getattr(result, "values", None), getattr(result, "behavior", None))
        ):
            return "data of another file"
        return super().unsound(result)


class Nlb(Hdf5):
    def make(self, path: Path) -> None:
        rng = np.random.default_rng(0)
        with h5py.File(path, "w") as file:
            group = file.create_group("mc_maze_small_20")
            for number, (holder, part) in enumerate(((file, "train"), (group, "eval"))):
                for kind, neurons in (("heldin", 3), ("heldout", 2)):
                    holder[f"{part}_spikes_{kind}"] = rng.poisson(1.0, (6 - number, 9, neurons)).astype(float)
                    holder[f"{part}_spikes_{kind}_forward"] = rng.poisson(1.0, (6 - number, 4, neurons)) * 1.0
            file["train_behavior"] = rng.normal(size=(6, 9, 2))

    def read(self) -> Any:
        return pm.read_nlb(self.path)


class Mat(Hdf5):
    """Of version 7.3: a struct array, a table of references for each field."""

    suffix = "mat"

    def make(self, path: Path) -> None:
        rng = np.random.default_rng(0)
        with h5py.File(path, "w", userblock_size=512) as file:
            store, group = file.create_group("#refs#"), file.create_group("trials")
            group.attrs["MATLAB_class"] = np.bytes_("struct")
            fields = {
                "spikes": rng.poisson(1.0, (6, 9, 4)),
                "hand": rng.normal(size=(6, 9, 2)),
                "side": np.arange(6),
            }
            for field, values in fields.items():
                table = group.create_dataset(field, (1, 6), dtype=h5py.ref_dtype)
                for k, value in enumerate(values):
                    item = store.create_dataset(f"{field}{k}", data=np.atleast_2d(value).T)
                    item.attrs["MATLAB_class"] = np.bytes_("double")
                    table[0, k] = item.ref

    def read(self) -> Any:
        return pm.read_mat(self.path, bin_width=0.02, variable="trials", behavior="hand", condition="side")


class OldMat(Target):
    """Of versions 4, 5 and 7: bytes changed within what is packed, and around it."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        rng = np.random.default_rng(0)
        fields = {"spikes": rng.poisson(1.0, (6, 9, 4)).astype(np.uint8), "side": np.arange(6.0), "note": "a"}
        trials = [
            {"spikes": part * 1.0, "hand": rng.normal(size=(9, 2)), "side": "l"} for part in fields["spikes"]
        ]
        self.files = []
        for what, how in ((fields, {}), ({"trials": trials}, {}), ({"trials": trials, "f": fields}, {}),
                          ({"spikes": np.ones((6, 9))}, {"format": "4"})):  # fmt: skip
            scipy.io.savemat(self.path, what, **how)
            self.files.append(self.path.read_bytes())
        scipy.io.savemat(self.path, {"trials": trials})

    @property
    def path(self) -> Path:
        return self.folder / "a.mat"

    def write(self, rng: Random) -> None:
        data = rng.choice(self.files)
        if rng.random() < 0.4 and data[:6] == b"MATLAB":  # the same, packed, after the change
            head, rest = data[:128], data[128:]
            packed = zlib.compress(mutations.some_bytes(rng, rest))
            if rng.random() < 0.02:
                packed = zlib.compress(rest[:8] + bytes(2**28))
            element = (15).to_bytes(4, "little") + len(packed).to_bytes(4, "little") + packed
            self.path.write_bytes(head + element)
            return
        self.path.write_bytes(mutations.some_bytes(rng, data))

    def read(self) -> Any:
        return pm.read_mat(self.path, bin_width=0.02)


class Nwb(Hdf5):
    suffix = "nwb"

    def make(self, path: Path) -> None:
        import nwb_layouts

        nwb_layouts.centre_out(path, num_trials=6, num_units=3)

    def change(self, rng: Random, file: h5py.File) -> None:
        names = self.names  # what is read, more than specifications and descriptions
        near = ("units/", "intervals/", "processing/", "general/extracellular_ephys/electrodes/")
        self.names = [name for name in names if name.startswith(near)] if rng.random() < 0.85 else names
        try:
            super().change(rng, file)
        finally:
            self.names = names

    def read(self) -> Any:
        return pm.read_nwb(
            self.path, bin_width=0.02, align_to="move_onset_time", window=(-0.14, 0.56), condition="target_id",
            behavior="Velocity/cursor_vel", units={"quality": "good"},
        )  # fmt: skip
