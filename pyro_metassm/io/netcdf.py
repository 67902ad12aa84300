"""One recording in one netCDF file, through `Recording.to_xarray`."""

from __future__ import annotations

import os
from pathlib import Path

import xarray as xr

from pyro_metassm.recordings import Recording

LARGEST = 16 * 2**30  # bytes; a compressed file may claim any size, which is checked before it is allocated


def write_netcdf(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Write a recording, compressed and without loss.

    Args:
        recording: The recording.
        path: The file, which is replaced if it exists.

    Example:
        >>> import numpy as np, tempfile
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
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        # Times are seconds as plain numbers here: nothing is to be read as a date.
        with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as dataset:
            if dataset.nbytes > LARGEST:
                raise ValueError(f"needed at most {LARGEST} bytes, got {dataset.nbytes}; split the recording")
            return Recording.from_xarray(dataset.load())
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no recording in a netCDF file: {error}") from error
