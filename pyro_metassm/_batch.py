"""What a model sees: `Batch`, and how recordings become one (public in `pyro_metassm.recordings`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_metassm import _checks as checks
from pyro_metassm._recording import Recording
from pyro_metassm.blocks import share


@dataclass(frozen=True, eq=False)
class Batch:
    """Trials of R recordings, padded to K trials, T bins and N neurons; made by `Recordings.batch`.

    Attributes:
        names: The R recordings.
        recording: `(R,)` long, the row of each in the model's tables.
        observations: `(R, K, T, N)`, zero where missing or padded.
        mask: `(R, K, T, N)` bool, True = observed; expanded from `(R, 1, 1, N)` where no bin is missing.
        time_mask: `(R, K, T)` bool, the bins that a trial has, observed or not.
        held_in: `(R, N)` bool, the real neurons that the guide may see.
        num_neurons: The R numbers of neurons.
        trial_scale: `(R, 1)`, trials of the recording per trial of it in this batch.
        inputs: `(R, K, T, input_dim)` or None.
        num_recordings: Size of the recording plate: all recordings, of which the batch may hold some.
        embedding_statistics: What a guide has gathered about the embeddings, where they must not come from
            the trials of this batch; None otherwise.
        conditions: Of each recording those of its trials in this batch (without the padding), or None where it
            has none; None for a batch that was not made from recordings.
    """

    names: tuple[str, ...]
    recording: Tensor
    observations: Tensor
    mask: Tensor
    time_mask: Tensor
    held_in: Tensor
    num_neurons: tuple[int, ...]
    trial_scale: Tensor
    inputs: Tensor | None
    num_recordings: int
    embedding_statistics: Tensor | None = None
    conditions: tuple[np.ndarray | None, ...] | None = None

    @property
    def num_trials(self) -> int:
        """K, trials of each recording in the batch, padding included."""
        return self.observations.shape[1]

    @property
    def num_bins(self) -> int:
        """T, bins of each trial, padding included."""
        return self.observations.shape[2]

    @property
    def width(self) -> int:
        """N, neurons of the largest recording in the batch."""
        return self.observations.shape[3]

    def condition_codes(self, conditions: Sequence[Any]) -> Tensor:
        """The place of every trial's condition in a list, `(R, K)` long; 0 in the padding.

        Raises:
            ValueError: A recording without conditions, or with one that the list lacks.
        """
        place = {str(condition): code for code, condition in enumerate(conditions)}
        codes = np.zeros((len(self.names), self.num_trials), dtype=np.int64)
        for row, name, own in zip(
            codes, self.names, self.conditions or (), strict=self.conditions is not None
        ):
            labels = ["none"] if own is None else [str(label) for label in own]
            if unknown := sorted(set(labels) - set(place)):
                raise checks.fail(
                    name,
                    f"trials of the conditions {checks.some(list(place))}",
                    checks.some(unknown),
                    "give each trial one of them, pm.Recording(..., condition=...)",
                )
            row[: len(labels)] = [place[label] for label in labels]
        return moved(codes, self.observations.device)

    def part(
        self,
        recordings: slice = slice(None),
        trials: slice = slice(None),
        bins: slice = slice(None),
    ) -> Batch:
        """Some recordings, trials and bins: nothing of the others is left anywhere."""
        of = (recordings, trials, bins)
        statistics, conditions = self.embedding_statistics, self.conditions
        return dataclasses.replace(
            self,
            names=self.names[recordings],
            recording=self.recording[recordings],
            observations=self.observations[of],
            mask=self.mask[of],
            time_mask=self.time_mask[of],
            held_in=self.held_in[recordings],
            num_neurons=self.num_neurons[recordings],
            trial_scale=self.trial_scale[recordings],
            inputs=None if self.inputs is None else self.inputs[of],
            embedding_statistics=None if statistics is None else statistics[recordings],
            conditions=None
            if conditions is None
            else tuple(own if own is None else own[trials] for own in conditions[recordings]),
        )

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {
            key: value.to(device) for key, value in fields.items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **moved)


def collate(
    recs: Mapping[str, Recording],
    table: Sequence[str],
    *,
    trials: Mapping[str, Any],
    names: Iterable[str] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """What `Recordings.batch` says."""
    chosen = [recs[name] for name in (recs if names is None else names)]
    known = {name: row for row, name in enumerate(table)}
    for recording in chosen:
        if recording.name not in known:
            raise checks.unknown(recording.name, known)
    chosen_names = tuple(recording.name for recording in chosen)
    if not chosen or len(set(chosen_names)) < len(chosen) or not set(trials) <= set(chosen_names):
        raise ValueError(
            f"batch: needed each recording once and trials of these only, got the recordings {chosen_names} "
            f"and trials of {tuple(trials)}; correct `names` or `trials`"
        )
    indices = []
    for recording in chosen:
        index = np.arange(recording.num_trials)
        if recording.name in trials:
            index = checks.trials_of(recording.name, trials[recording.name], recording.num_trials)
        indices.append(index)
    num_trials = max(len(index) for index in indices)
    lengths = np.zeros((len(chosen), num_trials), dtype=np.int64)
    for row, recording, index in zip(lengths, chosen, indices, strict=True):
        row[: len(index)] = recording.lengths[index]
    num_neurons = tuple(recording.num_neurons for recording in chosen)
    held_in = np.zeros((len(chosen), max(num_neurons)), dtype=bool)
    for seen, recording in zip(held_in, chosen, strict=True):
        seen[: recording.num_neurons] = ~recording.held_out_neurons

    shape = (len(chosen), num_trials, int(lengths.max()))
    observations = torch.empty(*shape, max(num_neurons), dtype=dtype, device=device)
    neurons = moved(np.arange(max(num_neurons)) < np.array(num_neurons)[:, None], device)
    # Where nothing is missing the mask says the same in every bin, and takes no memory.
    complete = bool((lengths == shape[2]).all()) and all(recording.complete for recording in chosen)
    mask = neurons[:, None, None, :].expand(observations.shape)
    mask = mask if complete else torch.zeros_like(mask, memory_format=torch.contiguous_format)
    num_inputs = chosen[0].num_inputs
    inputs = torch.zeros(*shape, num_inputs, dtype=dtype, device=device) if num_inputs else None
    all_rows = moved(np.concatenate(indices), device).split([len(index) for index in indices])

    def fill(r: int) -> None:
        recording, rows, time = chosen[r], all_rows[r], int(lengths[r].max())
        where = (r, slice(len(rows)), slice(time), slice(recording.num_neurons))
        values, observed, given = recording.trials(indices[r], rows, time, dtype, not complete)
        for trial, bin_, neuron in ((len(rows), 0, 0), (0, time, 0), (0, 0, recording.num_neurons)):
            observations[r, trial:, bin_:, neuron:] = 0.0  # the padding
        observations[where] = values
        if observed is not None:
            mask[where] = observed
        if inputs is not None and given is not None:
            inputs[r, : len(rows), :time] = given

    share(fill, len(chosen), observations)
    scale = [[recording.num_trials / len(index)] for recording, index in zip(chosen, indices, strict=True)]
    return Batch(
        names=chosen_names,
        recording=moved(np.array([known[name] for name in chosen_names]), device),
        observations=observations,
        mask=mask,
        time_mask=moved(np.arange(shape[2]) < lengths[..., None], device),
        held_in=moved(held_in, device),
        num_neurons=num_neurons,
        trial_scale=moved(np.array(scale), device).to(dtype),
        inputs=inputs,
        num_recordings=len(recs),
        conditions=tuple(
            None if recording.condition is None else recording.condition[index]
            for recording, index in zip(chosen, indices, strict=True)
        ),
    )


def moved(array: np.ndarray, device: torch.device) -> Tensor:
    """A small array on a device; from pinned memory, so that the host does not wait for a GPU."""
    tensor = torch.from_numpy(array)
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)
