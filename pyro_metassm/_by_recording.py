"""A score of every recording, and errors that name theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import xarray as xr

from pyro_metassm.recordings import Recording, Recordings

T = TypeVar("T")


def by_recording(score: str, recs: Recordings, of: Callable[[str, Recording], float]) -> xr.DataArray:
    """``(recording,)``, of a function of name and recording."""
    values = [named(name, of, name, recording) for name, recording in recs.items()]
    return xr.DataArray(values, {"recording": list(recs)}, ("recording",), score)


def named(name: str, function: Callable[..., T], *args: Any) -> T:
    """The result, or the error with the recording's name."""
    try:
        return function(*args)
    except ValueError as error:
        if str(error).startswith("recording "):
            raise
        raise ValueError(f"recording {name!r}: {error}") from error
