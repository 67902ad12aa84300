"""What a target of the fuzzer is: a reader, and hostile files for it."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np

import pyro_metassm as pm


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


def changed_hdf5(path: Path, data: bytes, rng: Random, change: Callable[[h5py.File], None]) -> None:
    """Write a good HDF5 file and change a thing or two in it."""
    path.unlink(missing_ok=True)  # who was refused may have it open until it is collected
    path.write_bytes(data)
    with h5py.File(path, "r+") as file:
        for _ in range(rng.choice((1, 1, 2))):
            with contextlib.suppress(Exception):  # what HDF5 itself does not write
                change(file)
