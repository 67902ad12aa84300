"""Recordings from the files that a command is given, whatever their format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_metassm import io
from pyro_metassm.io.nwb import read_nwb
from pyro_metassm.recordings import Recording, Recordings


def recordings(files: Sequence[str | Path], bins: Mapping[str, Any] | None = None) -> Recordings:
    """All recordings in some files: one in each, but all of a Zarr store, which are read when they are needed.

    Args:
        files: ``.npz``, netCDF, ``.zarr`` or ``.nwb``, here or (NWB) elsewhere.
        bins: how NWB files are binned, arguments of :func:`pyro_metassm.read_nwb`; ``bin_width`` is needed for them.

    Raises:
        ValueError: files that cannot be read, NWB files without ``bin_width``, ``bins`` without NWB files.
    """
    found: list[Recording] = []
    bins = {key: value for key, value in (bins or {}).items() if value is not None}
    suffixes = [Path(file).suffix.lower() for file in files]
    if bins and ".nwb" not in suffixes:
        raise ValueError(
            f"needed an .nwb file for {', '.join(sorted(bins))}, got none; other files have their bins"
        )
    for file, suffix in zip(files, suffixes, strict=True):
        if suffix == ".zarr":
            found += io.open_zarr(file).values()
        elif suffix == ".nwb":
            if "bin_width" not in bins:
                raise ValueError(
                    f"{file}: needed a bin width for an NWB file, got none; pass such as --bin-width 0.02"
                )
            found.append(read_nwb(file, **bins))
        else:
            found.append(io.read(file))
    return Recordings(found)
