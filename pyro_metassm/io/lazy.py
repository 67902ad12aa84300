"""A recording whose arrays stay in a store until they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_metassm import _attributes as attributes
from pyro_metassm import _checks as checks
from pyro_metassm._recording import Recording
from pyro_metassm._selecting import refuse_empty, window_of


class Store:
    """The whole arrays of the recording that was last looked at: of all recordings of a store, one is in memory."""

    def __init__(self) -> None:
        self.owner: LazyRecording | None = None
        self.arrays: dict[str, np.ndarray] = {}

    def __deepcopy__(self, memo: Any) -> Store:
        return Store()


class LazyRecording(Recording):
    """A :class:`Recording` that reads its arrays from a store when they are asked for.

    `lengths`, `condition`, `neuron_ids`, `held_out_neurons` and `attrs` are in memory, `values`, `mask`, `inputs` and
    `behavior` are read at every use, and kept for one recording of a store at a time. A batch reads its trials alone.
    """

    _source: Mapping[str, Any]
    _store: Store
    _rows: np.ndarray
    _bins: slice
    _about: dict[str, Any]

    @classmethod
    def of(cls, about: dict[str, Any], arrays: Mapping[str, Any], store: Store) -> LazyRecording:
        """A recording of arrays as Zarr has them: `values (trial, time, neuron)`, `mask`, `inputs`, `behavior`.

        Raises:
            ValueError: Sizes that do not fit each other, or coordinates that `Recording` refuses.
        """
        name = checks.name_of(about["name"])
        values, mask = arrays["values"], arrays["mask"]
        if len(values.shape) != 3 or 0 in values.shape:
            raise checks.fail(name, "values (trial, time, neuron)", f"shape {values.shape}", "write it again")
        num_trials, num_bins, num_neurons = values.shape
        if mask.shape not in (values.shape, values.shape[:2]):
            raise checks.fail(name, f"a mask of shape {values.shape[:2]}", f"{mask.shape}", "write it again")
        for key in ("inputs", "behavior"):
            if key in arrays and (len(arrays[key].shape) != 3 or arrays[key].shape[:2] != values.shape[:2]):
                raise checks.fail(
                    name, f"{key} {(num_trials, num_bins, 'dims')}", f"{arrays[key].shape}", "write it again"
                )
        if about["dtype"] not in ("float32", "float64"):
            raise checks.fail(name, "float32 or float64", repr(about["dtype"]), "write it again")
        condition, ids = about.get("condition"), about.get("neuron_ids")
        fields = {
            "name": name,
            "bin_width": checks.bin_width_of(name, about["bin_width"]),
            "lengths": checks.lengths_of(name, about["lengths"], num_trials, num_bins),
            "condition": None
            if condition is None
            else checks.labels_of(name, "condition", condition, num_trials),
            "neuron_ids": None if ids is None else checks.neuron_ids_of(name, ids, num_neurons),
            "held_out_neurons": checks.held_out_of(name, about["held_out_neurons"], num_neurons),
            "attrs": attributes.attrs_of(name, about["attributes"], num_trials, num_neurons),
        }
        return cls._made(fields, arrays, store, np.arange(num_trials), slice(0, num_bins), about)

    @classmethod
    def _made(cls, fields, source, store, rows, bins, about) -> LazyRecording:
        new = object.__new__(cls)
        for field in fields.values():
            if isinstance(field, np.ndarray):
                field.flags.writeable = False
        new.__dict__.update(
            fields, _source=source, _store=store, _rows=rows, _bins=bins, _about=about, _tensors={}
        )
        return new

    def _part(self, **changes: Any) -> LazyRecording:
        keys = ("name", "bin_width", "lengths", "condition", "neuron_ids", "held_out_neurons", "attrs")
        fields = {key: changes.get(key, self.__dict__[key]) for key in keys}
        rows, bins = changes.get("rows", self._rows), changes.get("bins", self._bins)
        return self._made(fields, self._source, self._store, rows, bins, self._about)

    def load(self) -> Recording:
        """The recording in memory."""
        keys = ("lengths", "condition", "neuron_ids", "held_out_neurons", "attrs")
        more: dict[str, Any] = {key: getattr(self, key) for key in keys}
        series = {key: getattr(self, key) for key in ("mask", "inputs", "behavior")}
        return Recording(self.name, self.values, bin_width=self.bin_width, **more, **series)

    # What the store has is read here, and nowhere else.

    def _read(self, key: str, rows: np.ndarray | None = None, stop: int | None = None) -> np.ndarray:
        """Some rows (of this recording) of an array, up to a bin; values zero where missing, the mask by neuron."""
        own = self._rows if rows is None else self._rows[rows]
        bins = slice(self._bins.start, self._bins.stop if stop is None else self._bins.start + stop)
        try:
            array = self._source[key].read(own, bins)
        except (ValueError, OSError, RuntimeError, KeyError) as error:
            raise ValueError(
                f"recording {self.name!r}: needed {key} of trials {checks.some(own)}, got damaged chunks ({error}); "
                "copy the store again"
            ) from error
        if key == "mask":
            shape = (*array.shape[:2], self.num_neurons)
            return np.ascontiguousarray(
                np.broadcast_to(array[..., None] if array.ndim == 2 else array, shape)
            )
        if key == "values":
            array = array.astype(self._about["dtype"], copy=False)
        if key != "behavior" and not np.isfinite(array).all():
            raise checks.fail(self.name, f"finite {key}", "others in the store", "copy the store again")
        return array

    def _whole(self, key: str) -> np.ndarray | None:
        if key not in self._source:
            return None
        if self._store.owner is not self:
            self._store.owner, self._store.arrays = self, {}
        kept = self._store.arrays
        if key not in kept:
            kept[key] = self._read(key)
            kept[key].flags.writeable = False
        return kept[key]

    values = property(
        lambda self: self._whole("values"), doc="`(trials, time, neurons)`, read from the store."
    )
    mask = property(
        lambda self: self._whole("mask"), doc="`(trials, time, neurons)` bool, read from the store."
    )
    inputs = property(lambda self: self._whole("inputs"), doc="Read from the store, or None.")
    behavior = property(lambda self: self._whole("behavior"), doc="Read from the store, or None.")

    @property  # a cached one would stay in memory
    def observations(self) -> np.ndarray:
        """`(trials, time, neurons)` with NaN where missing, read from the store."""
        return np.where(self.mask, self.values, self.values.dtype.type(np.nan))

    @property
    def complete(self) -> bool:
        """Whether the whole recording of the store has no missing bin."""
        return bool(self._about["complete"])

    @property
    def has_counts(self) -> bool:
        """Whether all values are whole numbers of at least zero."""
        return bool(self._about["counts"]) or super().has_counts

    num_trials = property(lambda self: len(self._rows), doc="Number of trials.")
    num_bins = property(lambda self: self._bins.stop - self._bins.start, doc="Number of bins.")
    num_neurons = property(lambda self: int(self._source["values"].shape[2]), doc="Number of neurons.")

    @property
    def num_inputs(self) -> int:
        """Dims of the inputs, 0 without."""
        return int(self._source["inputs"].shape[2]) if "inputs" in self._source else 0

    def trials(
        self, rows: np.ndarray, index: Tensor, stop: int, dtype: torch.dtype, masked: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values, mask and inputs of some trials up to a bin, read from the store and not kept."""
        values = torch.from_numpy(self._read("values", rows, stop)).to(index.device, dtype)
        mask = torch.from_numpy(self._read("mask", rows, stop)).to(index.device) if masked else None
        if "inputs" not in self._source:
            return values, mask, None
        return values, mask, torch.from_numpy(self._read("inputs", rows, stop)).to(index.device, dtype)

    def take(self, trial_indices: Any) -> LazyRecording:
        """The recording with some of its trials; see `Recording.take`. Nothing is read."""
        indices = checks.trials_of(self.name, trial_indices, self.num_trials)
        attrs = dict(self.attrs)
        if "trials" in attrs:
            attrs["trials"] = {key: array[indices] for key, array in attrs["trials"].items()}
        condition = None if self.condition is None else self.condition[indices]
        return self._part(
            rows=self._rows[indices], lengths=self.lengths[indices], condition=condition, attrs=attrs
        )

    def crop(self, start: int | None, stop: int | None) -> LazyRecording:
        """The recording in a window of time bins; see `Recording.crop`. The mask is read: no trial may be empty."""
        first, last = window_of(self.name, start, stop, self.num_bins)
        refuse_empty(self.name, self.mask, first, last)
        bins = slice(self._bins.start + first, self._bins.start + last)
        return self._part(bins=bins, lengths=np.clip(self.lengths - first, 0, last - first))

    def _replace(self, **fields: Any) -> Recording:
        return self.load()._replace(**fields)

    def __reduce__(self) -> tuple[Any, ...]:
        return Recording.from_xarray, (self.to_xarray(),)

    def __repr__(self) -> str:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        bins = f"{high}" if low == high else f"{low}-{high}"
        return (
            f"Recording({self.name!r}: {self.num_trials} trials x {bins} bins x {self.num_neurons} neurons, "
            f"{1000 * self.bin_width:g} ms bins, in a store)"
        )
