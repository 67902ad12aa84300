"""Trials as Python has them, a dict of arrays or a list of dicts: `from_dict`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pyro_metassm import _checks as checks
from pyro_metassm.recordings import Recording


def from_dict(
    name: str,
    trials: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    bin_width: float,
    observations: str = "spikes",
    behavior: str | None = None,
    inputs: str | None = None,
    condition: str | None = None,
    neuron_first: bool = False,
    neuron_ids: Any = None,
    held_out_neurons: Any = None,
    attrs: Mapping[str, Any] | None = None,
) -> Recording:
    """A recording from a structure of trials.

    Args:
        name: Of the recording.
        trials: A dict of fields, each an array or a list with an entry a trial; or a list with a dict a trial.
        bin_width: In seconds.
        observations: The field with `(time_k, neurons)` numbers of each trial, or `(trials, time, neurons)`; trials may
            be of unequal lengths.
        behavior, inputs: Fields with `(time_k, dims)` of each trial.
        condition: The field with the condition of each trial.
        neuron_first: All of these fields are `(neurons, time_k)` and `(dims, time_k)`, as MATLAB often has them.
        neuron_ids, held_out_neurons: As `pm.Recording` takes them.
        attrs: As `pm.Recording` takes them. Other fields with one number or text a trial go to `attrs["trials"]`, the
            names of the rest to `attrs["left_in_file"]`.

    Returns:
        The recording, checked like any other data.

    Raises:
        ValueError: A field that is missing (those that there are are listed), or anything that `Recording` refuses.

    Example:
        >>> import numpy as np
        >>> trials = [{"spikes": np.ones((bins, 3)), "side": side} for bins, side in ((20, "left"), (30, "right"))]
        >>> from_dict("mouse", trials, bin_width=0.02, condition="side")
        Recording('mouse': 2 trials x 20-30 bins x 3 neurons, 20 ms bins, 0% missing)
    """
    name = checks.name_of(name)
    fields = _fields(name, trials)
    used = [field for field in (observations, behavior, inputs, condition) if field is not None]
    for field in used:
        if field not in fields:
            raise checks.fail(
                name,
                f"a field {field!r}",
                f"only {checks.some(sorted(map(str, fields)), 40)}",
                "use one of these",
            )
    series = {
        key: _series(name, field, fields[field], neuron_first)
        for key, field in (("observations", observations), ("behavior", behavior), ("inputs", inputs))
        if field is not None
    }
    number = len(series["observations"])
    own, left = {}, []
    for field, value in fields.items():
        if field in used:
            continue
        labels = _labels(value, number)
        if labels is None:
            left.append(str(field))
        else:
            own[str(field)] = labels
    more: dict[str, Any] = {}
    if own:
        more["trials"] = own
    if left:
        more["left_in_file"] = sorted(left)
    labels = None if condition is None else _labels(fields[condition], number)
    if condition is not None and labels is None:
        raise checks.fail(
            name, f"one number or text a trial in {condition!r}", "something else", "use another field"
        )
    return Recording(
        name,
        series.pop("observations"),
        bin_width=bin_width,
        condition=labels,
        neuron_ids=neuron_ids,
        held_out_neurons=held_out_neurons,
        attrs=dict(attrs or {}) | more,
        **series,
    )


def _fields(name: str, trials: Any) -> Mapping[str, Any]:
    """Field -> an entry a trial."""
    if isinstance(trials, Mapping):
        return trials
    if not isinstance(trials, (list, tuple)) or not trials or not all(isinstance(t, Mapping) for t in trials):
        raise checks.fail(
            name,
            "a dict of fields or a list of a dict a trial",
            f"{type(trials).__name__}",
            "pass one of these",
        )
    keys = list(trials[0])
    for k, trial in enumerate(trials):
        if set(trial) != set(keys):
            odd = sorted(map(str, set(trial) ^ set(keys)))
            raise checks.fail(
                name,
                "the same fields in every trial",
                f"{checks.some(odd)} not in both trial 0 and {k}",
                "add them",
            )
    return {key: [trial[key] for trial in trials] for key in keys}


def _series(name: str, field: str, value: Any, neuron_first: bool) -> Any:
    """An array `(trials, time, dims)` or a list of `(time_k, dims)`."""
    if checks.is_list(value):
        arrays = [np.asarray(part) for part in value]
        for k, array in enumerate(arrays):
            if array.ndim != 2 or array.dtype.kind not in "biuf":
                needed = f"{field!r} of {'(dims, time_k)' if neuron_first else '(time_k, dims)'} numbers in each trial"
                raise checks.fail(
                    name, needed, f"{array.dtype} of shape {array.shape} in trial {k}", "reshape it"
                )
        return [array.T if neuron_first else array for array in arrays]
    array = checks.as_numpy(value)
    if array.ndim != 3:
        raise checks.fail(
            name,
            f"{field!r} as (trials, time, dims), or a list of arrays",
            f"shape {array.shape}",
            "reshape it",
        )
    return array.transpose(0, 2, 1) if neuron_first else array


def _labels(value: Any, number: int) -> np.ndarray | None:
    """One number or text a trial, or None if it is something else."""
    if checks.is_list(value):
        items = [v.item() if isinstance(v, np.ndarray) and v.size == 1 else v for v in value]
        if len(items) != number or not all(isinstance(v, (str, bool, int, float, np.generic)) for v in items):
            return None
        array = (
            np.array(items)
            if not any(isinstance(v, str) for v in items)
            else np.array([str(v) for v in items])
        )
    else:
        array = np.asarray(value)
        if array.shape in ((number, 1), (1, number)):  # vectors of MATLAB
            array = array.reshape(number)
    return array if array.shape == (number,) and array.dtype.kind in "biufUS" else None
