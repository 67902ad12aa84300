"""One recording, checked once: `Recording` (public as `pyro_metassm.recordings.Recording`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_metassm import _attributes as attributes
from pyro_metassm import _checks as checks
from pyro_metassm import _dataset, _selecting, _smoothing


class Recording:
    """One recording: observations of the same neurons over trials and time, checked and made read-only.

    Args:
        name: Identifies the recording everywhere: a non-empty str without "/", not a group name of ArviZ.
        observations: `(trials, time, neurons)` array, tensor or DataArray (dims `trial`, `time`, `neuron` in
            any order), or a list of `(time_k, neurons)`. NaN = missing. Counts per bin, or any real numbers.
            Integers become float32; float32 and float64 stay.
        bin_width: Width of a bin in seconds.
        mask: `(trials, time)` or `(trials, time, neurons)` bool, or a list of trials; True = observed.
        inputs: Known inputs `(trials, time, dims)` or a list of `(time_k, dims)`; no gaps within a trial.
        behavior: As `inputs`, but NaN = missing. `attrs["behavior_names"]` may name its dims.
        condition: `(trials,)` numbers or str.
        neuron_ids: `(neurons,)` unique numbers or str.
        held_out_neurons: Neurons that the guide must not see but the likelihood scores: bool `(neurons,)`
            or integer indices.
        attrs: Anything to keep: str, numbers, bools, None, lists, dicts and arrays of these. What
            `attrs["trials"]` holds, arrays with a row a trial, goes along with `take`; what `attrs["neurons"]`
            holds, with a row a neuron, are coordinates of the neurons.
        lengths: `(trials,)` bins of each trial. By default those of the list given, else the last observed
            bin + 1.

    Attributes:
        values: `(trials, time, neurons)`, zero where missing or past a trial's length. NaN is replaced here,
            once, since a mask alone leaves NaN gradients.
        observations: The same with NaN where missing.
        mask: `(trials, time, neurons)` bool, True = observed.
        lengths, inputs, behavior, condition, neuron_ids, held_out_neurons, attrs, name, bin_width: As above.

    Raises:
        ValueError: What was needed, what came and what to do: wrong ranks or sizes, infinities, trials
            without any observation, nothing at all, a bin width in milliseconds, a name that cannot be a
            node of the result tree.

    Example:
        >>> import numpy as np
        >>> Recording("a", np.ones((8, 50, 3)), bin_width=0.02)
        Recording('a': 8 trials x 50 bins x 3 neurons, 20 ms bins, 0% missing)
    """

    name: str
    bin_width: float
    values: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    inputs: np.ndarray | None
    behavior: np.ndarray | None
    condition: np.ndarray | None
    neuron_ids: np.ndarray | None
    held_out_neurons: np.ndarray
    attrs: dict[str, Any]
    _arrays: dict[str, np.ndarray]
    _tensors: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor | None]]

    def __init__(
        self,
        name: str,
        observations: Any,
        *,
        bin_width: float,
        mask: Any = None,
        inputs: Any = None,
        behavior: Any = None,
        condition: Any = None,
        neuron_ids: Any = None,
        held_out_neurons: Any = None,
        attrs: Mapping[str, Any] | None = None,
        lengths: Any = None,
    ) -> None:
        name = checks.name_of(name)
        bin_width = checks.bin_width_of(name, bin_width)
        array, listed = checks.padded(name, "observations", observations, "neurons")
        if 0 in array.shape:
            raise checks.fail(
                name, "at least one trial, bin and neuron", f"shape {array.shape}", "leave this recording out"
            )
        num_trials, num_bins, num_neurons = array.shape
        if lengths is not None:
            listed = checks.lengths_of(name, lengths, num_trials, num_bins)
        observed = ~np.isnan(array)
        if mask is not None:
            observed &= checks.mask_of(name, mask, array.shape, listed)
        bins = observed.any(axis=2)
        if not bins.any(axis=1).all():
            empty = np.flatnonzero(~bins.any(axis=1))
            raise checks.fail(
                name,
                "at least one observation in every trial",
                f"none in {len(empty)} of {num_trials} trials ({checks.some(empty)})",
                "leave these trials out",
            )
        values = np.where(observed, array, array.dtype.type(0))
        if np.isinf(values).any():
            k, t, n = np.argwhere(np.isinf(values))[0]
            raise checks.fail(
                name,
                "finite observations",
                f"infinity (first in trial {k}, bin {t}, neuron {n})",
                "put NaN where a value is missing",
            )
        last = num_bins - bins[:, ::-1].argmax(axis=1)
        lengths = last if listed is None else listed
        if (last > lengths).any():
            raise checks.fail(
                name,
                "no observation past a trial's length",
                f"some in trials {checks.some(np.flatnonzero(last > lengths))}",
                "correct `lengths` or mask them",
            )
        if inputs is not None:
            inputs = checks.series_of(name, "inputs", inputs, num_bins, lengths)
            gaps = np.isnan(inputs).any(axis=2)
            within = gaps & (np.arange(num_bins) < lengths[:, None])
            if within.any():
                k, t = np.argwhere(within)[0]
                raise checks.fail(
                    name,
                    "finite inputs in every bin of a trial (they drive the latents there, observed or not)",
                    f"NaN (first in trial {k}, bin {t})",
                    "fill the gaps",
                )
            inputs[gaps] = 0.0
        if behavior is not None:
            behavior = checks.series_of(name, "behavior", behavior, num_bins, lengths)
            named = np.size((attrs or {}).get("behavior_names", [""] * behavior.shape[2]))
            if named != behavior.shape[2]:
                needed = f'attrs["behavior_names"] of the {behavior.shape[2]} dims of the behavior'
                raise checks.fail(name, needed, f"{named}", "pass one name each")
        self._set(
            name=name,
            bin_width=bin_width,
            values=values,
            mask=observed,
            lengths=lengths.astype(np.int64),
            inputs=inputs,
            behavior=behavior,
            condition=None
            if condition is None
            else checks.labels_of(name, "condition", condition, num_trials),
            neuron_ids=None if neuron_ids is None else checks.neuron_ids_of(name, neuron_ids, num_neurons),
            held_out_neurons=checks.held_out_of(name, held_out_neurons, num_neurons),
            attrs=attributes.attrs_of(name, attrs, num_trials, num_neurons),
        )

    def _set(self, **fields: Any) -> None:
        # Tensors are made from the writeable arrays (torch warns of others); users get locked views.
        arrays = {key: field for key, field in fields.items() if isinstance(field, np.ndarray)}
        views = {key: array.view() for key, array in arrays.items()}
        for view in views.values():
            view.flags.writeable = False
        self.__dict__.update({**fields, **views, "_arrays": arrays, "_tensors": {}})

    def _replace(self, **fields: Any) -> Recording:
        """The same with other fields, known to be sound."""
        new = object.__new__(type(self))
        mine = self.__dict__ | self._arrays  # not the locked views: tensors are made of them
        new._set(**{key: fields.get(key, mine[key]) for key in Recording.__annotations__ if key[0] != "_"})
        return new

    def __setattr__(self, key: str, value: Any) -> None:
        raise AttributeError(
            f"recording {self.name!r} is read-only: make another Recording to change {key!r}"
        )

    def __reduce__(self) -> tuple[Any, ...]:  # pickle and deepcopy would lose the locks on the arrays
        return type(self).from_xarray, (self.to_xarray(),)

    @property
    def has_counts(self) -> bool:
        """Whether all values are whole numbers of at least zero, and not smoothed ones."""
        return "smoothed_s" not in self.attrs and bool(
            (self.values >= 0).all() and (self.values == np.round(self.values)).all()
        )

    @property
    def num_trials(self) -> int:
        """Number of trials."""
        return self.values.shape[0]

    @property
    def num_bins(self) -> int:
        """Number of bins of the (padded) arrays; trial k has `lengths[k]` of them."""
        return self.values.shape[1]

    @property
    def num_neurons(self) -> int:
        """Number of neurons, held-out ones included."""
        return self.values.shape[2]

    @functools.cached_property
    def observations(self) -> np.ndarray:
        """`(trials, time, neurons)` with NaN where missing or past a trial's length."""
        array = np.where(self.mask, self.values, self.values.dtype.type(np.nan))
        array.flags.writeable = False
        return array

    def __repr__(self) -> str:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        bins = f"{high}" if low == high else f"{low}-{high}"
        missing = 100.0 * (1.0 - self.mask.sum() / (self.lengths.sum() * self.num_neurons))
        held_out = f" ({self.held_out_neurons.sum()} held out)" if self.held_out_neurons.any() else ""
        return (
            f"Recording({self.name!r}: {self.num_trials} trials x {bins} bins x {self.num_neurons} neurons"
            f"{held_out}, {1000 * self.bin_width:g} ms bins, {missing:.2g}% missing)"
        )

    def take(self, trial_indices: Any) -> Recording:
        """The recording with some of its trials, in the order given.

        Args:
            trial_indices: `(chosen,)` integers, or bool `(trials,)`.

        Returns:
            A new recording with as many bins (padding included) as this one.

        Raises:
            ValueError: No trial chosen, or one that is not there.

        Example:
            >>> Recording("a", np.ones((8, 50, 3)), bin_width=0.02).take([0, 5]).num_trials
            2
        """
        indices = checks.trials_of(self.name, trial_indices, self.num_trials)
        attrs = dict(self.attrs)
        if "trials" in attrs:
            attrs["trials"] = {key: array[indices] for key, array in attrs["trials"].items()}
        keys = ("values", "mask", "lengths", "inputs", "behavior", "condition")
        return self._replace(
            attrs=attrs, **{k: None if self.__dict__[k] is None else self.__dict__[k][indices] for k in keys}
        )

    def only(self, neurons: np.ndarray) -> Recording:
        """The recording as if no others than these neurons, bool `(neurons,)`, had been observed."""
        mask = self.mask & neurons
        return self._replace(values=np.where(mask, self.values, self.values.dtype.type(0)), mask=mask)

    def crop(self, start: int | None, stop: int | None) -> Recording:
        """The recording in a window of time bins; shorter trials keep what they have of it.

        Args:
            start: First bin (None: 0).
            stop: The bin after the last one (None: to the end).

        Returns:
            A new recording.

        Raises:
            ValueError: An empty window, or trials that have no observation in it.

        Example:
            >>> Recording("a", np.ones((8, 50, 3)), bin_width=0.02).crop(10, 30).num_bins
            20
        """
        first, last = _selecting.window_of(self.name, start, stop, self.num_bins)
        _selecting.refuse_empty(self.name, self.mask, first, last)
        cut = {
            key: None if self.__dict__[key] is None else self.__dict__[key][:, first:last].copy()
            for key in ("values", "mask", "inputs", "behavior")
        }
        return self._replace(lengths=np.clip(self.lengths - first, 0, last - first), **cut)

    def smooth(self, sd_s: float) -> Recording:
        r"""The recording with every neuron smoothed over time within each trial.

        `y'_t = sum_s w(s - t) y_s / sum_s w(s - t)` over the observed bins `s` of the trial, `w` a Gaussian of
        `sd_s` seconds, cut at five of them. What is missing stays so. The result is real-valued: count
        likelihoods refuse it (`attrs["smoothed_s"]` is `sd_s`).

        Args:
            sd_s: Standard deviation in seconds, above zero.

        Returns:
            A new recording.

        Raises:
            ValueError: Not a positive number of seconds, milliseconds, or a recording that was smoothed before.

        Example:
            >>> recording = Recording("a", np.eye(50)[None, :, :3], bin_width=0.02)
            >>> recording.smooth(0.04).values[0, 0].round(2).tolist()
            [0.33, 0.29, 0.2]
        """
        return self._replace(
            values=_smoothing.smoothed(self, sd_s), attrs=self.attrs | {"smoothed_s": float(sd_s)}
        )

    def check_counts(self) -> None:
        """Refuse what is no spike count; the count likelihoods call this.

        Raises:
            ValueError: Smoothed counts; a negative or fractional observation, with its trial, bin and neuron.

        Example:
            >>> Recording("a", np.ones((8, 50, 3)), bin_width=0.02).check_counts()
        """
        if "smoothed_s" in self.attrs:
            raise checks.fail(
                self.name,
                "counts for a count likelihood",
                f"counts smoothed over {self.attrs['smoothed_s']:g} s",
                "pass the recording before smooth(), or use a Gaussian likelihood",
            )
        checks.refuse(
            self,
            (self.values < 0) | (self.values != np.floor(self.values)),
            "counts (0, 1, 2, ...) for a count likelihood",
            "pass unsmoothed spike counts per bin (not rates), or use a Gaussian likelihood",
        )

    def to_xarray(self) -> xr.Dataset:
        """All of it as a Dataset, which `from_xarray` turns back without loss, through netCDF too.

        Returns:
            `observations` and `mask (trial, time, neuron)`, `lengths (trial)`, `held_out_neurons (neuron)`;
            where given `inputs (trial, time, input_dim)`, `behavior (trial, time, behavior_dim)`,
            `condition (trial)`, the coordinates `neuron` and those of `attrs["neurons"]`; `attributes`, a
            JSON text; the attrs `name` and `bin_width`.

        Example:
            >>> ds = Recording("a", np.ones((8, 50, 3)), bin_width=0.02).to_xarray()
            >>> dict(ds.sizes)
            {'trial': 8, 'time': 50, 'neuron': 3}
        """
        return _dataset.of(self)

    @classmethod
    def from_xarray(cls, ds: xr.Dataset) -> Recording:
        """The recording in a Dataset as `to_xarray` makes it; checked like any other data.

        Args:
            ds: Needs `observations (trial, time, neuron)` and the attrs `name` and `bin_width`, no more.

        Returns:
            The recording.

        Raises:
            ValueError: Something needed is missing, or anything that `Recording` refuses.

        Example:
            >>> Recording.from_xarray(Recording("a", np.ones((8, 50, 3)), bin_width=0.02).to_xarray()).name
            'a'
        """
        name, observations, fields = _dataset.fields(ds)
        return cls(name, observations, **fields)

    @property
    def num_inputs(self) -> int:
        """Dims of the inputs, 0 without."""
        return 0 if self.inputs is None else self.inputs.shape[-1]

    @functools.cached_property
    def complete(self) -> bool:
        """Whether every neuron was observed in every bin of the arrays."""
        return bool(self.mask.all())

    def on(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, mask and inputs as tensors, kept for the next batch."""
        if (dtype, device) not in self._tensors:
            values, mask, inputs = (self._arrays.get(key) for key in ("values", "mask", "inputs"))
            self._tensors[dtype, device] = (
                torch.from_numpy(values).to(device, dtype),
                torch.from_numpy(mask).to(device),
                None if inputs is None else torch.from_numpy(inputs).to(device, dtype),
            )
        return self._tensors[dtype, device]

    def trials(
        self, rows: np.ndarray, index: Tensor, stop: int, dtype: torch.dtype, masked: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values, mask (if asked for) and inputs of some trials, up to a bin; `index` are `rows` on the device."""
        values, mask, inputs = self.on(dtype, index.device)
        return (
            values[:, :stop].index_select(0, index),
            mask[:, :stop].index_select(0, index) if masked else None,
            None if inputs is None else inputs[:, :stop].index_select(0, index),
        )
