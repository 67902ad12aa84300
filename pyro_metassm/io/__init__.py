"""Recordings from and to files. Files are data, never code: nothing is unpickled."""

from __future__ import annotations

import os
from pathlib import Path

from pyro_metassm.io.netcdf import read_netcdf, write_netcdf
from pyro_metassm.io.npz import read_npz, write_npz
from pyro_metassm.io.zarr import open_zarr, read_zarr, write_zarr
from pyro_metassm.recordings import Recording

__all__ = [
    "open_zarr", "read", "read_netcdf", "read_npz", "read_zarr", "write_netcdf", "write_npz", "write_zarr",
]  # fmt: skip


def read(path: str | os.PathLike[str]) -> Recording:
    """The recording in a file, by its suffix: `.npz` (`read_npz`), `.nc` (`read_netcdf`), `.zarr` (`read_zarr`).

    Args:
        path: The file.

    Returns:
        The recording.

    Raises:
        ValueError: Another suffix, or a file that holds no recording.
        FileNotFoundError: No such file.

    Example:
        >>> import numpy as np, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.nc"
        >>> write_netcdf(Recording("a", np.ones((8, 50, 3)), bin_width=0.02), path)
        >>> read(path).name
        'a'
    """
    match Path(path).suffix.lower():
        case ".npz":
            return read_npz(path)
        case ".nc" | ".nc4" | ".netcdf":
            return read_netcdf(path)
        case ".zarr":
            return read_zarr(path)
        case ".nwb":
            raise ValueError(
                f"{path}: needed bins for an NWB file, got none; use pm.read_nwb(path, bin_width=..., ...)"
            )
        case ".mat":
            raise ValueError(
                f"{path}: needed bins for a MATLAB file, got none; use pm.read_mat(path, bin_width=..., ...)"
            )
        case suffix:
            raise ValueError(
                f"{path}: needed a file ending in .npz, .nc or .zarr, got {suffix or 'no suffix'!r}; make a "
                "pm.Recording from the arrays in it"
            )
