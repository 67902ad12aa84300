"""One recording in one netCDF file, through `Recording.to_xarray`."""

from __future__ import annotations

import os

import xarray as xr

from pyro_metassm.io._files import LARGEST, reading
from pyro_metassm.io._hdf5 import inspect
from pyro_metassm.recordings import Recording


def write_netcdf(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a recording, compressed and without loss.

    Args:
        recording: The recording.
        path: The file, which is replaced if it exists.

    Example:
        >>> import numpy as np, tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "a.nc"
        >>> write_netcdf(Recording("a", np.ones((8, 50, 3)), bin_width=0.02), path)
        >>> read_netcdf(path)
        Recording('a': 8 trials x 50 bins x 3 neurons, 20 ms bins, 0% missing)
    """
    dataset = recording.to_xarray()
    encoding = {key: {"zlib": True, "complevel": 4} for key in dataset.data_vars if dataset[key].ndim == 3}
    dataset.to_netcdf(path, engine="h5netcdf", encoding=encoding)


def read_netcdf(path: str | os.PathLike[str]) -> Recording:
    """Read a recording that `write_netcdf` wrote, or any file with the variables of `Recording.from_xarray`.

    Args:
        path: The file.

    Returns:
        The recording, checked like any other data.

    Raises:
        ValueError: No netCDF file, or no recording in it.
        FileNotFoundError: No such file.

    Example:
        See `write_netcdf`.
    """
    with reading(path, "recording in a netCDF file"):
        inspect(path, LARGEST)
        # Times are seconds as plain numbers here: nothing is to be read as a date.
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as dataset:
            return Recording.from_xarray(dataset.load())
