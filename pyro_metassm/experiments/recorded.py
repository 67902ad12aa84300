"""Real recordings for the experiments: where they are, and how they are made ready (bins, neurons, trials)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pyro_metassm import io
from pyro_metassm._selecting import generator_of
from pyro_metassm.recordings import Recording

WHERE = {
    "reaching": (
        "two recordings or more of reaches as .npz or netCDF files (metassm reads what pm.io.read reads): public ones "
        "are DANDI 000688 (centre-out, monkeys C, M and T) and 000070 (maze) at https://dandiarchive.org, and "
        "the processed Chewie recordings of https://github.com/nerdslab/myow-neuro"
    ),
    "decisions": (
        "recordings of several mice as .npz or netCDF files (metassm reads what pm.io.read reads): public ones are "
        "Steinmetz et al. 2019, DANDI 000017 at https://dandiarchive.org, or https://figshare.com/articles/9598406"
    ),
}


def files(experiment: str, folder: str | Path | None, pattern: Iterable[str]) -> list[Path]:
    """The recordings of an experiment in a folder, in the order of their names.

    Raises:
        ValueError: no folder, or none of the files in it: says where public data is and how to get it.
    """
    needed = f"experiment {experiment}: needed a folder (--data) with {WHERE[experiment]}"
    if folder is None:
        raise ValueError(
            f"{needed}; name the files as {', '.join(pattern)} (NWB: pm.io.write_npz(pm.read_nwb(...), path))"
        )
    found = sorted({path for one in pattern for path in Path(folder).glob(one)})
    if not found:
        raise ValueError(f"{needed}; got {folder}, which has none of {', '.join(pattern)}")
    return found


def read(
    path: Path,
    *,
    factor: int = 1,
    least_hz: float = 0.0,
    copies: float = 1.0,
    bin_width: float | None = None,
) -> Recording:
    """A recording with bins summed by ``factor``, without near-silent neurons and copies; ``attrs`` say how many.

    Args:
        path: the file.
        factor: bins that become one; see :func:`summed`.
        least_hz: mean rate from which a neuron is kept.
        copies: correlation from which the second of two neurons is left out: one recorded twice makes held-out neurons
            easy, or hard, by chance.
        bin_width: what to take the bins for, in s, where recordings of nearly equal bins are pooled; the true one is
            kept as ``attrs["true_bin_width"]``.
    """
    recording = summed(io.read(path), factor)
    more = {
        "neurons_in_file": recording.num_neurons,
        "true_bin_width": recording.bin_width,
        "least_hz": least_hz,
    }
    recording = active(recording, least_hz, copies)
    return recording._replace(
        attrs=recording.attrs | more, bin_width=recording.bin_width if bin_width is None else bin_width
    )


def active(recording: Recording, least_hz: float, copies: float = 1.0) -> Recording:
    """The recording without neurons below a mean rate and without copies of others, as of :func:`read`."""
    rate = recording.values.sum((0, 1), dtype=np.float64) / np.maximum(recording.mask.sum((0, 1)), 1)
    recording = of_neurons(recording, rate / recording.bin_width >= least_hz)
    return of_neurons(recording, ~_copies(recording, copies)) if copies < 1 else recording


def bin_width_of(path: Path) -> float:
    """The width of a file's bins, in s."""
    return io.read(path).bin_width


def _copies(recording: Recording, least: float) -> np.ndarray:
    """Neurons that correlate with an earlier one by at least so much, bool ``(neurons,)``."""
    series = recording.values[recording.mask.any(2)].astype(np.float64)
    scale = series.std(0)
    correlation = np.corrcoef(series[:, scale > 0].T)
    found = np.zeros(recording.num_neurons, bool)
    found[scale > 0] = (np.triu(np.atleast_2d(correlation), 1) >= least).any(0)
    return found


def summed(recording: Recording, factor: int) -> Recording:
    """Counts of ``factor`` bins in a row summed, behaviour averaged; what is left at a trial's end is cut off.

    A summed bin is missing where one of its bins is. Trials of which nothing is left are left out.
    """
    if factor == 1:
        return recording
    bins = recording.num_bins // factor
    lengths = recording.lengths // factor

    def groups(values: np.ndarray) -> np.ndarray:
        cut = values[:, : bins * factor]
        return cut.reshape(len(cut), bins, factor, *cut.shape[2:])

    whole = groups(recording.mask).all(2)
    counts = np.where(whole, groups(recording.values).sum(2), np.nan)
    counts[np.arange(bins) >= lengths[:, None]] = np.nan
    rows = np.flatnonzero((lengths > 0) & (~np.isnan(counts)).any((1, 2)))
    left = recording.take(rows)
    return Recording(
        left.name,
        counts[rows],
        bin_width=recording.bin_width * factor,
        lengths=lengths[rows],
        behavior=None if recording.behavior is None else groups(recording.behavior).mean(2)[rows],
        condition=left.condition,
        neuron_ids=left.neuron_ids,
        held_out_neurons=left.held_out_neurons,
        attrs=left.attrs,
    )


def hold_out_neurons(recording: Recording, share: float, seed: int = 0) -> Recording:
    """The recording with a share of its neurons, drawn by its name and the seed, held out for co-smoothing."""
    number = round(share * recording.num_neurons)
    held_out = np.zeros(recording.num_neurons, bool)
    held_out[generator_of("neurons", recording.name, seed).permutation(recording.num_neurons)[:number]] = True
    return recording._replace(held_out_neurons=held_out)


def fewer(recording: Recording, trials: int | None = None, neurons: int | None = None) -> Recording:
    """The first trials and the most active neurons, for a small version of an experiment."""
    recording = recording if trials is None else recording.take(np.arange(min(trials, recording.num_trials)))
    if neurons is not None and neurons < recording.num_neurons:
        rate = recording.values.sum((0, 1)) / np.maximum(recording.mask.sum((0, 1)), 1)
        chosen = np.zeros(recording.num_neurons, bool)
        chosen[np.argsort(-rate, kind="stable")[:neurons]] = True
        recording = of_neurons(recording, chosen)
    return recording


def of_neurons(recording: Recording, chosen: np.ndarray) -> Recording:
    """The recording with some of its neurons, bool ``(neurons,)``; what ``attrs`` hold by neuron goes along.

    Raises:
        ValueError: no neuron chosen, or trials of which nothing is left.
    """
    attrs = {
        key: value[chosen] if isinstance(value, np.ndarray) and value.shape == chosen.shape else value
        for key, value in recording.attrs.items()
    }
    ids = recording.neuron_ids
    return Recording(
        recording.name,
        recording.observations[..., chosen],
        bin_width=recording.bin_width,
        inputs=recording.inputs,
        behavior=recording.behavior,
        condition=recording.condition,
        neuron_ids=np.flatnonzero(chosen) if ids is None else ids[chosen],
        held_out_neurons=recording.held_out_neurons[chosen],
        attrs=attrs,
        lengths=recording.lengths,
    )


def conditions(recording: Recording) -> np.ndarray:
    """The condition of every trial; one for all where the recording has none."""
    return np.zeros(recording.num_trials) if recording.condition is None else recording.condition
