"""The tensors of the Neural Latents Benchmark: `read_nlb`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pyro_metassm import _checks as checks
from pyro_metassm.io._files import LARGEST, naming, reading, refuse_claims
from pyro_metassm.io._hdf5 import inspect
from pyro_metassm.recordings import Recording

SPIKES = ("spikes_heldin", "spikes_heldout", "spikes_heldin_forward", "spikes_heldout_forward")


def read_nlb(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    part: Literal["train", "eval"] = "train",
    *,
    bin_width: float | None = None,
    name: str | None = None,
) -> Recording:
    """Read spikes from the benchmark's HDF5 files: what `make_train_input_tensors` and its kin of `nlb_tools` write.

    Known are `{part}_spikes_heldin (trials, bins, neurons)`, `{part}_spikes_heldout`, both with `_forward`, and
    `{part}_behavior`, at the top of a file or in the one group that a target file has (`mc_maze_small`,
    `mc_maze_small_20`, ...). The neurons of the recording are the held-in ones, then the held-out ones; the forward
    bins follow the others. What a part lacks, as the held-out neurons and the forward bins of the evaluation without
    its target file, is missing, not zero: the neurons and bins are those of any of the files.

    Args:
        path: One file, or several that belong together (train, eval and target).
        part: "train" or "eval".
        bin_width: In seconds; by default told by the group of a target file (5 ms, 20 ms where its name ends in `_20`).
        name: Of the recording, the same for both parts; by default the group of a target file, else the (first) file's
            name without its suffix.

    Returns:
        The recording, with `held_out_neurons`, and `attrs["forward_bins"]`, the number of bins at the end that the
        benchmark predicts. Behaviour is NaN in them. Behaviour without a time axis is in `attrs["trials"]`.

    Raises:
        ValueError: No such file of tensors, the part missing (what there is is listed), shapes that do not fit, or no
            bin width.
        FileNotFoundError: No such file.

    Example:
        >>> import h5py, numpy as np, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "train_input.h5"
        >>> with h5py.File(path, "w") as file:
        ...     file["train_spikes_heldin"], file["train_spikes_heldout"] = np.ones((8, 35, 5)), np.ones((8, 35, 2))
        >>> read_nlb(path, bin_width=0.02)
        Recording('train_input': 8 trials x 35 bins x 7 neurons (2 held out), 20 ms bins, 0% missing)
    """
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if part not in ("train", "eval"):
        raise ValueError(f'read_nlb: needed part="train" or "eval", got {part!r}')
    shapes, arrays, group = _arrays(paths, part)
    with naming(" and ".join(map(str, paths)), "recording in these files"):
        name = checks.name_of(name or group or Path(paths[0]).stem)
        if bin_width is None:
            if group is None:
                raise checks.fail(name, "a bin_width", "no target file that tells it", "pass such as 0.005")
            bin_width = 0.02 if group.endswith("_20") else 0.005
        size = sum(os.path.getsize(path) for path in paths)
        return _recording(name, part, bin_width, shapes, arrays, size)


def _recording(
    name: str,
    part: str,
    bin_width: float,
    shapes: dict[str, tuple[int, ...]],
    arrays: dict[str, np.ndarray],
    size: int,
) -> Recording:
    """All blocks where they belong, what there is none of missing."""
    seen = arrays.get("spikes_heldin")
    if seen is None or seen.ndim != 3:
        raise checks.fail(
            name,
            f"{part}_spikes_heldin (trials, bins, neurons)",
            f"only {checks.some(sorted(shapes), 30)}",
            "add it",
        )
    # Neurons and forward bins as in any of the files, so that both parts are of one recording.
    sizes = {
        what: next((shapes[f"{p}_{what}"] for p in (part, "train", "eval") if f"{p}_{what}" in shapes), None)
        for what in SPIKES
    }
    num_out = next((s[2] for s in (sizes[SPIKES[1]], sizes[SPIKES[3]]) if s and len(s) == 3), 0)
    forward = next((s[1] for s in (sizes[SPIKES[2]], sizes[SPIKES[3]]) if s and len(s) == 3), 0)
    trials, bins, num_in = seen.shape
    refuse_claims(4 * trials * (bins + forward) * (num_in + num_out), size)
    values = np.full((trials, bins + forward, num_in + num_out), np.nan, dtype=np.float32)
    for what, rows, columns in (
        (SPIKES[0], slice(0, bins), slice(0, num_in)),
        (SPIKES[1], slice(0, bins), slice(num_in, None)),
        (SPIKES[2], slice(bins, None), slice(0, num_in)),
        (SPIKES[3], slice(bins, None), slice(num_in, None)),
    ):
        if what in arrays:
            block = values[:, rows, columns]
            if arrays[what].shape != block.shape:
                raise checks.fail(
                    name,
                    f"{part}_{what} of shape {block.shape}",
                    f"{arrays[what].shape}",
                    "use files that belong together",
                )
            block[:] = arrays[what]
    attrs: dict[str, Any] = {"forward_bins": forward, "part": part}
    behavior = arrays.get("behavior")
    if behavior is not None and behavior.ndim == 3 and behavior.shape[:2] == (trials, bins):
        full = np.full((trials, bins + forward, behavior.shape[2]), np.nan, dtype=np.float32)
        full[:, :bins] = behavior
        behavior = full
    elif behavior is not None:
        if len(behavior) != trials:
            raise checks.fail(
                name,
                f"{part}_behavior of {trials} trials",
                f"shape {behavior.shape}",
                "use files that belong together",
            )
        attrs["trials"], behavior = {"behavior": behavior}, None
    held_out = np.arange(num_in + num_out) >= num_in
    return Recording(
        name, values, bin_width=bin_width, behavior=behavior, held_out_neurons=held_out, attrs=attrs,
        lengths=np.full(trials, bins + forward),
    )  # fmt: skip


def _arrays(
    paths: Sequence[Any], part: str
) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray], str | None]:
    """The shapes of everything in the files, the arrays of the part, and the group of a target file."""
    import h5py

    shapes: dict[str, tuple[int, ...]] = {}
    arrays: dict[str, np.ndarray] = {}
    group = None
    for path in paths:
        with reading(path, "tensors of the benchmark"):
            inspect(path, LARGEST)
            with h5py.File(path, "r") as file:
                groups = [key for key in file if isinstance(file[key], h5py.Group)]
                if len(groups) > 1:
                    raise ValueError(
                        f"needed the tensors of one data set, got the groups {', '.join(groups)}"
                    )
                group = groups[0] if groups else group
                for holder in [file, *(file[key] for key in groups)]:
                    for key in holder:
                        item = holder[key]
                        if not isinstance(item, h5py.Dataset) or key in shapes:
                            continue
                        shapes[key] = item.shape
                        what = key.removeprefix(f"{part}_")
                        if what != key and what in (*SPIKES, "behavior") and item.dtype.kind in "biuf":
                            arrays[what] = item[()].astype(np.float32)
    return shapes, arrays, group
