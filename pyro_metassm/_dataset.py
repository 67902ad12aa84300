"""A recording as an `xarray.Dataset`, and back: what `Recording.to_xarray` and `from_xarray` do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm import _attributes as attributes

if TYPE_CHECKING:
    from pyro_metassm._recording import Recording


def of(recording: Recording) -> xr.Dataset:
    """The Dataset of a recording."""
    dims = ("trial", "time", "neuron")
    variables: dict[str, Any] = {
        "observations": (dims, recording.observations),
        "mask": (dims, recording.mask),
        "lengths": (dims[:1], recording.lengths),
        "held_out_neurons": (dims[2:], recording.held_out_neurons),
        "attributes": ((), attributes.to_json(recording.attrs)),
    }
    coords: dict[str, Any] = {
        "time": ("time", np.arange(recording.num_bins) * recording.bin_width, {"units": "s"})
    }
    for key, last in (("inputs", "input_dim"), ("behavior", "behavior_dim")):
        if getattr(recording, key) is not None:
            variables[key] = ((*dims[:2], last), getattr(recording, key))
    if recording.condition is not None:
        variables["condition"] = (dims[:1], recording.condition)
    if recording.neuron_ids is not None:
        coords["neuron"] = (dims[2:], recording.neuron_ids)
    for key, rows in recording.attrs.get("neurons", {}).items():
        if key not in variables | coords and rows.ndim == 1:
            coords[key] = (dims[2:], rows)
    return xr.Dataset(variables, coords, {"name": recording.name, "bin_width": recording.bin_width})


def fields(ds: xr.Dataset) -> tuple[Any, Any, dict[str, Any]]:
    """Name, observations and the other arguments of the recording in a Dataset."""
    missing = [key for key in ("name", "bin_width") if key not in ds.attrs]
    missing += [key for key in ("observations",) if key not in ds.data_vars]
    if missing:
        raise ValueError(
            "a recording as a Dataset: needed `observations` and the attrs `name` and `bin_width`, "
            f"got none of {missing}; make such a Dataset with Recording.to_xarray()"
        )
    given = {
        key: ds[key]
        for key in ("mask", "lengths", "inputs", "behavior", "condition", "held_out_neurons")
        if key in ds.data_vars
    }
    if "neuron" in ds.coords:
        given["neuron_ids"] = ds["neuron"]
    attrs = attributes.from_json(str(ds["attributes"].item())) if "attributes" in ds else {}
    more = {"bin_width": ds.attrs["bin_width"], "attrs": attrs}
    return ds.attrs["name"], ds["observations"], given | more
