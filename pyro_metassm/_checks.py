"""The checks at the door of `pyro_metassm.recordings`: anything array-like in, plain numpy arrays out.

Every failed check is a `ValueError` made by `fail`, in one style: what was needed, what came, what to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

# A recording's name becomes a node of the result tree, beside these groups of ArviZ.
GROUP_NAMES = frozenset(
    {
        "posterior",
        "prior",
        "posterior_predictive",
        "prior_predictive",
        "log_likelihood",
        "log_prior",
        "sample_stats",
        "sample_stats_prior",
        "observed_data",
        "constant_data",
        "predictions",
        "predictions_constant_data",
        "unconstrained_posterior",
    }
)
LARGEST_TEXT = 2**28  # bytes of an array of text: each takes the room of the longest
LONGEST_BIN = 5.0  # seconds; nobody bins a recording that coarsely, but many write 20 and mean milliseconds


def fail(name: Any, needed: str, got: str, do: str) -> ValueError:
    """The one form of an error about a recording (returned, for the caller to raise)."""
    return ValueError(f"recording {name!r}: needed {needed}, got {got}; {do}")


def unknown(name: str, known: Iterable[str]) -> ValueError:
    """The error about a recording that a model lacks (returned, for the caller to raise)."""
    names = some([repr(other) for other in known])
    return fail(
        name,
        f"a recording that the model or fit knows ({names})",
        "another one",
        "make the model with it and fit again",
    )


def lacking(what: str, name: Any, there: Iterable[str]) -> KeyError:
    """The error about a name in what is looked up by the names of recordings (returned, for the caller to raise)."""
    return KeyError(f"no {what} {name!r}; there are {some([repr(other) for other in there]) or 'none'}")


def refuse(recording: Any, bad: np.ndarray, needed: str, do: str) -> None:
    """Raise the error about the first of bad observations, `bad (trials, time, neurons)`, if there is any."""
    if not bad.any():
        return
    k, t, n = np.argwhere(bad)[0]
    ids = recording.neuron_ids
    which = f"neuron {n}" if ids is None else f"neuron {n} ({ids[n]})"
    value = f"{recording.values[k, t, n]:g} in trial {k}, bin {t}, {which}"
    raise fail(recording.name, needed, f"{value} and {bad.sum() - 1} more such values", do)


def some(items: Sequence[Any] | np.ndarray, limit: int = 8) -> str:
    """A few of many numbers or names, for a message: `"3, 5, 9 and 40 more"`."""
    listed = [str(item) for item in list(items)[:limit]]
    more = len(items) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")


def name_of(value: Any) -> str:
    """A recording's name, checked: a non-empty str that can be a node of a result tree."""
    if not isinstance(value, str) or not value.strip():
        raise fail(value, "a name", repr(value), "pass a non-empty str")
    if "/" in value or "\\" in value or value in (".", "..") or not value.isprintable():
        raise fail(
            value,
            'a name without "/", backslashes and control characters',
            repr(value),
            "names become nodes of the result tree and folders, rename it",
        )
    if value in GROUP_NAMES:
        raise fail(value, "a name that is no group of ArviZ", repr(value), "rename the recording")
    return value


def bin_width_of(name: str, value: Any) -> float:
    """A bin width in seconds, checked: positive, finite, and not plainly in milliseconds."""
    try:
        width = float(value)
    except (TypeError, ValueError):
        raise fail(name, "a bin_width in seconds", repr(value), "pass a number, such as 0.02") from None
    if not (math.isfinite(width) and width > 0):
        raise fail(name, "a positive, finite bin_width in seconds", repr(value), "pass such as 0.02")
    if width >= LONGEST_BIN:
        raise fail(
            name,
            f"a bin_width under {LONGEST_BIN:g} s",
            f"{width:g}",
            f"pass seconds; if these are milliseconds, bin_width={width / 1000:g}",
        )
    return width


def as_numpy(value: Any) -> np.ndarray:
    """A numpy array of a tensor, a DataArray, a masked array (masked = NaN) or anything numpy reads."""
    if isinstance(value, xr.DataArray):
        value = value.values
    elif isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype in (torch.float16, torch.bfloat16) else value).numpy()
    if isinstance(value, np.ma.MaskedArray) and value.dtype.kind in "biuf":
        dtype = np.float64 if value.dtype == np.float64 else np.float32
        return np.where(np.ma.getmaskarray(value), dtype(np.nan), value.data.astype(dtype))
    return np.asarray(value)


def numeric(name: str, what: str, value: Any) -> np.ndarray:
    """Real numbers as float32, or float64 where they came so."""
    try:
        array = as_numpy(value)
    except ValueError as error:  # ragged nested lists
        raise fail(
            name, f"{what} as an array of numbers", f"an error of numpy ({error})", "pass arrays"
        ) from error
    if array.dtype.kind not in "biuf":
        raise fail(name, f"{what} of real numbers", f"dtype {array.dtype}", "convert to float or integer")
    return array.astype(
        np.float64 if array.dtype.kind == "f" and array.itemsize >= 8 else np.float32, copy=False
    )


def in_order(name: str, what: str, value: Any, dims: tuple[str, ...]) -> Any:
    """A DataArray with its dims in the order of `dims`; anything else as it is, to be read by position."""
    if not isinstance(value, xr.DataArray):
        return value
    present = [dim for dim in dims if dim in value.dims]
    if present and len(present) < len(dims):
        raise fail(name, f"{what} with dims {dims}", f"dims {value.dims}", "rename the dims of the DataArray")
    order = (*dims[:2], ..., *dims[2:]) if present else value.dims
    return value.transpose(*order)


def is_list(value: Any) -> bool:
    """Whether this is a list of trials (an array of objects, as MATLAB files give, is one too)."""
    return isinstance(value, (list, tuple)) or (
        isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 1
    )


def padded(name: str, what: str, value: Any, last: str) -> tuple[np.ndarray, np.ndarray | None]:
    """A float array `(trials, time, last)` of an array or of a list of `(time_k, last)`.

    Returns:
        The array, padded with NaN, and the lengths `(trials,)` of a list (None for an array).
    """
    if not is_list(value):
        dims = ("trial", "time", "neuron") if last == "neurons" else ("trial", "time")
        array = numeric(name, what, in_order(name, what, value, dims))
        if array.ndim != 3:
            raise fail(
                name,
                f"{what} of shape (trials, time, {last}), or a list of (time_k, {last})",
                f"shape {array.shape}",
                "add the missing axis (one trial: x[None]; one column: x[..., None])",
            )
        return array, None
    if len(value) == 0:
        raise fail(name, f"{what} with at least one trial", "an empty list", "pass one array a trial")
    trials = [numeric(name, f"{what}[{k}]", trial) for k, trial in enumerate(value)]
    for k, trial in enumerate(trials):
        if trial.ndim != 2:
            raise fail(
                name, f"{what} of shape (time_k, {last})", f"shape {trial.shape} in trial {k}", "reshape it"
            )
        if trial.shape[1] != trials[0].shape[1]:
            raise fail(
                name,
                f"the same number of {last} in every trial of {what}",
                f"{trials[0].shape[1]} in trial 0 and {trial.shape[1]} in trial {k}",
                "put NaN where one was not recorded",
            )
    lengths = np.array([len(trial) for trial in trials])
    array = np.full(
        (len(trials), lengths.max(), trials[0].shape[1]),
        np.nan,
        dtype=np.result_type(*{trial.dtype for trial in trials}),
    )
    for row, trial in zip(array, trials, strict=True):
        row[: len(trial)] = trial
    return array, lengths


def mask_of(name: str, value: Any, shape: tuple[int, int, int], lengths: np.ndarray | None) -> np.ndarray:
    """A mask `(trials, time, neurons)` from such an array, from `(trials, time)` or from a list of trials."""
    if is_list(value):
        parts = [as_numpy(part) for part in value]
        limit = lengths if lengths is not None else np.full(shape[0], shape[1])
        sizes = [len(part) if part.ndim in (1, 2) else -1 for part in parts]
        if len(parts) != shape[0] or any(
            size != n if lengths is not None else not 0 <= size <= n
            for size, n in zip(sizes, limit, strict=False)
        ):
            raise fail(
                name,
                f"a mask for {shape[0]} trials, each as long as its observations",
                f"{len(parts)} trials with {some(sizes)} bins",
                "pass one (time_k,) or (time_k, neurons) array a trial",
            )
        value = np.zeros((shape[0], shape[1], *parts[0].shape[1:]), dtype=parts[0].dtype)
        for k, part in enumerate(parts):
            if part.shape[1:] != value.shape[2:]:
                raise fail(
                    name, "masks of one rank and width", f"{part.shape} in trial {k}", "make them alike"
                )
            value[k, : len(part)] = part
    dims = ("trial", "time", "neuron") if np.ndim(value) == 3 else ("trial", "time")
    mask = as_numpy(in_order(name, "mask", value, dims))
    if mask.shape not in (shape, shape[:2]):
        raise fail(
            name,
            f"a mask of shape {shape[:2]} or {shape}",
            f"shape {mask.shape}",
            "True = observed, one per bin",
        )
    if mask.dtype.kind not in "biu" or (mask.dtype.kind != "b" and not np.isin(mask, (0, 1)).all()):
        raise fail(name, "a bool mask", f"dtype {mask.dtype}", "pass True where there is data")
    mask = mask.astype(bool)
    return np.broadcast_to(mask[..., None] if mask.ndim == 2 else mask, shape)


def series_of(name: str, what: str, value: Any, num_bins: int, lengths: np.ndarray) -> np.ndarray:
    """Inputs or behaviour as a fresh array `(trials, num_bins, dims)`, padded with NaN."""
    array, given = padded(name, what, value, "dims")
    if len(array) != len(lengths):
        raise fail(name, f"{what} for {len(lengths)} trials", f"{len(array)} trials", "pass one row a trial")
    if given is not None and (given != lengths).any():
        k = int(np.flatnonzero(given != lengths)[0])
        raise fail(
            name,
            f"{what} as long as the observations ({lengths[k]} bins in trial {k})",
            f"{given[k]} bins",
            "cut them to the same bins",
        )
    if given is None and array.shape[1] != num_bins:
        raise fail(
            name, f"{what} with {num_bins} bins", f"{array.shape[1]} bins", "use the bins of the observations"
        )
    if array.shape[2] == 0:
        raise fail(name, f"{what} with at least one column", "none", f"leave {what}=None")
    if np.isinf(array).any():
        raise fail(name, f"finite {what}", "infinities", "put NaN where a value is missing")
    full = np.full((len(array), num_bins, array.shape[2]), np.nan, dtype=array.dtype)
    full[:, : array.shape[1]] = array
    return full


def labels_of(name: str, what: str, value: Any, size: int) -> np.ndarray:
    """Labels `(size,)`: numbers as they came, text as the narrowest str dtype (as files give it back)."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        value = texts(name, what, list(value))
    array = as_numpy(value)
    if array.shape != (size,):
        raise fail(name, f"{what} of shape ({size},)", f"shape {array.shape}", "pass one label each")
    if array.dtype.kind in "OSUT":
        if not all(isinstance(item, (str, bytes)) for item in array.tolist()):
            raise fail(name, f"{what} of numbers or str", "mixed or other objects", "convert to str")
        array = texts(
            name, what, [item.decode() if isinstance(item, bytes) else item for item in array.tolist()]
        )
    elif array.dtype.kind not in "biuf":
        raise fail(name, f"{what} of numbers or str", f"dtype {array.dtype}", "convert to str")
    return array.copy()


def texts(name: str, what: str, items: list[str]) -> np.ndarray:
    """An array of text, in which every item takes the room of the longest."""
    longest = max(map(len, items), default=0)
    if 4 * longest * len(items) > LARGEST_TEXT:
        raise fail(
            name, f"{what} of short texts", f"{len(items)} of up to {longest} characters", "shorten them"
        )
    return np.array(items, dtype=str)


def held_out_of(name: str, value: Any, num_neurons: int) -> np.ndarray:
    """Held-out neurons as bool `(neurons,)`, from such a mask or from integer indices."""
    array = as_numpy([] if value is None else value)
    held_out = np.zeros(num_neurons, dtype=bool)
    if array.size == 0 and array.dtype.kind != "b":
        return held_out
    indices = array.dtype.kind in "iu" and array.ndim == 1
    if indices and (array >= -num_neurons).all() and (array < num_neurons).all():
        held_out[array] = True
    elif array.dtype.kind == "b" and array.shape == (num_neurons,):
        held_out = array.copy()
    else:
        raise fail(
            name,
            f"held_out_neurons as bool ({num_neurons},) or as integer indices below {num_neurons}",
            f"dtype {array.dtype}, shape {array.shape}" + (f", up to {array.max()}" if indices else ""),
            "mark neurons of this recording",
        )
    if held_out.all():
        raise fail(name, "a neuron that the guide may see", "all of them held out", "hold out fewer")
    return held_out


def lengths_of(name: str, value: Any, num_trials: int, num_bins: int) -> np.ndarray:
    """Trial lengths in bins, `(trials,)` integers from 1 to `num_bins`."""
    array = as_numpy(value)
    if array.shape != (num_trials,) or array.dtype.kind not in "iu":
        got = f"dtype {array.dtype}, shape {array.shape}"
        raise fail(name, f"lengths as integers ({num_trials},)", got, "give the bins of each trial")
    if (array < 1).any() or (array > num_bins).any():
        raise fail(name, f"lengths from 1 to {num_bins}", f"{array.min()} to {array.max()}", "count bins")
    return array.astype(np.int64)


def trials_of(name: str, value: Any, num_trials: int) -> np.ndarray:
    """Trial indices, at least one, from integers or a bool mask; negative ones count from the end."""
    array = as_numpy(value)
    if array.ndim == 1 and array.dtype.kind in "biu":
        try:
            indices = np.arange(num_trials)[array]
        except IndexError as error:
            raise fail(name, f"indices of its {num_trials} trials", str(error), "correct them") from error
        if len(indices) > 0:
            return indices
    got = "none" if array.size == 0 or array.dtype.kind == "b" else f"{array.dtype} of shape {array.shape}"
    raise fail(name, "a list of trial indices, at least one", got, "pass integers, such as [0, 3]")


def neuron_ids_of(name: str, value: Any, num_neurons: int) -> np.ndarray:
    """Neuron ids, `(neurons,)` and all different."""
    array = labels_of(name, "neuron_ids", value, num_neurons)
    unique, counts = np.unique(array, return_counts=True)
    if len(unique) < num_neurons:
        raise fail(
            name, "different neuron_ids", f"{some(unique[counts > 1])} more than once", "make them unique"
        )
    return array


def integers(least: int = 1, **numbers: Any) -> None:
    """Raise ``ValueError`` for an argument that is not an integer of at least `least`, by its name."""
    for name, number in numbers.items():
        if not isinstance(number, int | np.integer) or number < least:
            raise ValueError(f"{name}: needed an integer of at least {least}, got {number!r}")
