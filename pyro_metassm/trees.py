"""Draws to `xarray.DataTree`s with named dimensions, as ArviZ reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_metassm.keeping import QUANTILES, Variables
from pyro_metassm.recordings import Recording, Recordings

DRAWS = ("chain", "draw")
SEEN = ("trial", "time", "neuron")


def tree(
    embeddings: Mapping[str, np.ndarray],
    children: Mapping[str, Mapping[str, xr.Dataset]],
    history: xr.Dataset | None,
    attrs: Mapping,
    shared: Mapping[str, xr.DataArray],
    group: str = "posterior",
    *,
    recs: Recordings,
) -> xr.DataTree:
    """The tree of all recordings.

    Args:
        embeddings: by recording, ``(draw, embedding_dim)``.
        children: by recording, its groups.
        history: of the fit, for ``sample_stats``.
        attrs: of the tree.
        shared: the other variables of all recordings.
        group: of the embeddings and of what is shared.
        recs: the recordings, for their subjects: the coordinate ``subject``, or ``recording_subject`` where what is
            shared has subjects as a dimension.
    """
    values = np.stack(list(embeddings.values()), 1)[None]
    dims = (*DRAWS, "recording", "embedding_dim")
    coords: dict[str, Any] = {"chain": [0], "draw": np.arange(values.shape[1]), "recording": list(embeddings)}
    coords["embedding_dim"] = np.arange(values.shape[-1])
    subjects = [str(recs[name].attrs.get("subject", "")) for name in embeddings]
    if any(subjects):
        taken = any("subject" in variable.dims for variable in shared.values())
        coords["recording_subject" if taken else "subject"] = ("recording", subjects)
    groups: dict[str, Any] = {group: xr.Dataset({"embedding": (dims, values)}, coords).assign(shared)}
    if history is not None:
        groups["sample_stats"] = history
    for name, parts in children.items():
        groups |= {f"{name}/{part}": dataset for part, dataset in parts.items()}
    result = xr.DataTree.from_dict(groups)
    result.attrs.update(attrs)
    return result


def of_globals(model, draws: Mapping[str, Tensor]) -> dict[str, xr.DataArray]:
    """Draws ``(draw, 1, 1, *event)`` of a model's global sites, over ``model.dims`` with ``model.coords``.

    Raises:
        ValueError: names of dims for another number of dimensions than a site has, or coordinates of another length.
    """
    result = {}
    coords: dict[str, Any] = {
        "recording": list(model.names),
        "embedding_dim": range(model.embedding_dim),
    } | model.coords
    for name, value in draws.items():
        values = value.flatten(0, 2)[None].detach().to("cpu", torch.float32).numpy()
        sizes = values.shape[2:]
        dims = tuple(model.dims.get(name, [f"{name}_dim_{number}" for number in range(len(sizes))]))
        wrong = [
            f"{d} ({len(coords[d])})"
            for d, n in zip(dims, sizes, strict=False)
            if len(coords.get(d, range(n))) != n
        ]
        if len(dims) != len(sizes) or wrong:
            raise ValueError(
                f"model.dims[{name!r}]: needed a name for each dimension of {tuple(sizes)}, with coords as long, "
                f"got {', '.join(wrong) or dims}"
            )
        own: dict[str, Any] = {d: list(coords.get(d, range(n))) for d, n in zip(dims, sizes, strict=True)}
        own |= {"chain": [0], "draw": np.arange(values.shape[1])}
        result[name] = xr.DataArray(values, own, ("chain", "draw", *dims))
    return result


def recording_groups(
    recording: Recording,
    groups: Mapping[str, Variables],
    truth: xr.Dataset | None = None,
    trials: list[int] | None = None,
    window: slice | None = None,
) -> dict[str, xr.Dataset]:
    """The groups of one recording: draws or statistics of them, and the data beside them.

    Args:
        recording: the data.
        groups: by group, its variables.
        truth: of a simulation.
        trials: the recording's trials that the draws are of; None for all.
        window: the bins that the draws are of; it may reach beyond the data.
    """
    rows = np.arange(recording.num_trials) if trials is None else np.asarray(trials)
    window = slice(0, recording.num_bins) if window is None else window
    bins = np.arange(window.start, window.stop)
    coords: dict[str, Any] = {
        "trial": rows,
        # Not as "units": xarray would take numbers of seconds for spans of time when it reads them back.
        "time": ("time", bins * recording.bin_width, {"long_name": "time (s)"}),
        "neuron": neuron_ids(recording),
    }
    known = coords | {"chain": [0], "quantile": list(QUANTILES)}
    condition = {} if recording.condition is None else {"condition": ("trial", recording.condition[rows])}
    result = {}
    for group, variables in groups.items():
        sizes = {d: n for of, values in variables.values() for d, n in zip(of, values.shape, strict=True)}
        result[group] = xr.Dataset(
            variables, {d: known.get(d, np.arange(n)) for d, n in sizes.items()} | condition
        )
    seen = {"observations": (SEEN, _window(recording.observations, rows, bins).astype(np.float32))}
    result["observed_data"] = xr.Dataset(seen, coords | condition)
    result["constant_data"] = _constant_data(recording, rows, bins, coords, truth)
    return result


def part(tree: xr.DataTree, *names: str) -> xr.Dataset:
    """The Dataset of a node."""
    for name in names:
        tree = tree.children[name]
    return tree.to_dataset()


def neuron_ids(recording: Recording) -> np.ndarray:
    """Ids of the neurons: those given, else their positions."""
    return np.arange(recording.num_neurons) if recording.neuron_ids is None else recording.neuron_ids


def _window(values: np.ndarray, rows: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """``values[rows][:, bins]`` of ``(trial, time, ...)``, NaN (or False) for bins behind the end."""
    inside = bins < values.shape[1]
    result = np.zeros((len(rows), len(bins), *values.shape[2:]), values.dtype)
    if values.dtype.kind == "f":
        result[:] = np.nan
    result[:, inside] = values[rows][:, bins[inside]]
    return result


def _constant_data(recording, rows, bins, coords, truth) -> xr.Dataset:
    data: dict[str, Any] = {"mask": (SEEN, _window(recording.mask, rows, bins))}
    data["length"] = (("trial",), recording.lengths[rows])
    data["held_out"] = (("neuron",), recording.held_out_neurons)
    extra: dict[str, Any] = {}
    if recording.condition is not None:
        data["condition"] = (("trial",), np.asarray(recording.condition)[rows])
    if recording.behavior is not None:
        data["behavior"] = (("trial", "time", "behavior_dim"), _window(recording.behavior, rows, bins))
        names = recording.attrs.get("behavior_names")
        extra["behavior_dim"] = (
            np.arange(recording.behavior.shape[-1]) if names is None else list(map(str, names))
        )
    if recording.inputs is not None:
        data["inputs"] = (("trial", "time", "input_dim"), _window(recording.inputs, rows, bins))
    if truth is not None:
        for name, variable in truth.data_vars.items():
            if variable.dims[:2] == ("trial", "time"):
                values = _window(variable.values, rows, bins)
                dims = tuple("truth_dim" if d == "latent_dim" else d for d in variable.dims)
            elif set(variable.dims) & {"trial", "time"}:
                continue
            else:
                values, dims = (
                    variable.values,
                    tuple("truth_dim" if d == "latent_dim" else d for d in variable.dims),
                )
            data[f"true_{name}"] = (dims, values)
    for key, rows in recording.attrs.get("neurons", {}).items():
        if key not in data | coords | extra and rows.ndim == 1:
            extra[key] = ("neuron", rows)
    return xr.Dataset(data, coords | extra)
