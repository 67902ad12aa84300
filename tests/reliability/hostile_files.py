"""Hostile files for everything that reads one: each target makes good files once, and a changed one for every case."""

from __future__ import annotations

import shutil
from pathlib import Path

from hostile import Target
from hostile_fits import Checkpoints, Fits, Studies
from hostile_hdf5 import Mat, Nlb, Nwb, OldMat
from hostile_netcdf import NetCDF
from hostile_npz import Npz
from hostile_zarr import Zarr

TARGETS: dict[str, type[Target]] = {
    "npz": Npz, "netcdf": NetCDF, "zarr": Zarr, "nlb": Nlb, "mat": Mat, "old_mat": OldMat, "nwb": Nwb, "fit": Fits,
    "checkpoint": Checkpoints, "settings": Studies,
}  # fmt: skip


def made(name: str, folder: Path) -> Target:
    """The target of this name, in a fresh folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return TARGETS[name](folder)
