"""Which bins and trials of a recording: windows and random draws, checked."""

from __future__ import annotations

import zlib

import numpy as np

from pyro_metassm import _checks as checks


def refuse_empty(name: str, mask: np.ndarray, first: int, last: int) -> None:
    """Raise where trials of `mask (trials, time, neurons)` have no observation in a window of bins."""
    empty = np.flatnonzero(~mask[:, first:last].any(axis=(1, 2)))
    if len(empty):
        raise checks.fail(
            name,
            f"an observation of every trial in bins {first} to {last - 1}",
            f"none in {len(empty)} of {len(mask)} trials ({checks.some(empty)})",
            "leave these trials out first: recording.take(...)",
        )


def window_of(name: str, start: int | None, stop: int | None, num_bins: int) -> tuple[int, int]:
    """First and last + 1 of a window of bins, checked."""
    first, last = 0 if start is None else int(start), num_bins if stop is None else min(int(stop), num_bins)
    if not 0 <= first < last:
        raise checks.fail(
            name, f"a window within {num_bins} bins", f"{start} to {stop}", "use 0 <= start < stop"
        )
    return first, last


def generator_of(purpose: str, name: str, seed: int) -> np.random.Generator:
    """Randomness for one recording: seeded by its name as well, so that no recording depends on the others."""
    return np.random.default_rng([seed, zlib.crc32(name.encode()), zlib.crc32(purpose.encode())])
