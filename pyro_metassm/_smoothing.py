"""Smoothing over time: what `Recording.smooth` does, and means with any weights for scores and baselines."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from pyro_metassm import _checks as checks

if TYPE_CHECKING:
    from pyro_metassm._recording import Recording

CUT = 5.0  # standard deviations at which the kernel ends: what is cut off has a weight of 6e-7


def smoothed(recording: Recording, sd_s: float) -> np.ndarray:
    """The values, smoothed over the observed bins of each trial; zero where missing.

    Raises:
        ValueError: As `Recording.smooth` says.
    """
    name = recording.name
    number = isinstance(sd_s, (int, float, np.number)) and not isinstance(sd_s, bool)
    if not (number and math.isfinite(sd_s) and sd_s > 0):
        raise checks.fail(name, "sd_s, a positive number of seconds", repr(sd_s), "pass such as 0.03")
    if sd_s >= checks.LONGEST_BIN:
        raise checks.fail(
            name,
            f"sd_s under {checks.LONGEST_BIN:g} s",
            f"{sd_s:g}",
            f"if these are milliseconds, {sd_s / 1000:g}",
        )
    if "smoothed_s" in recording.attrs:
        raise checks.fail(
            name,
            "a recording that is not smoothed",
            f"one smoothed over {recording.attrs['smoothed_s']:g} s",
            "smooth once",
        )
    values, mask, num_bins = recording.values, recording.mask, recording.num_bins
    reach = min(int(CUT * sd_s / recording.bin_width), num_bins - 1)
    weights = np.exp(-0.5 * (np.arange(reach + 1) * recording.bin_width / sd_s) ** 2)
    total, weight = values.astype(np.float64), mask.astype(np.float64)
    seen = weight.copy()
    for offset in range(1, reach + 1):
        for to, source in (
            (slice(offset, None), slice(None, -offset)),
            (slice(None, -offset), slice(offset, None)),
        ):
            total[:, to] += weights[offset] * values[:, source]
            weight[:, to] += weights[offset] * seen[:, source]
    return np.divide(total, weight, out=np.zeros_like(total), where=mask).astype(values.dtype)


def averaged(values: np.ndarray, seen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means along time of what was seen; NaN where no weight is on anything.

    Args:
        values: ``(trial, time, neuron)``, finite.
        seen: bool, of the same shape.
        weights: ``(time, time)``, a row for each bin of the result.
    """
    weight = np.einsum("st,ktn->ksn", weights, seen.astype(np.float64))
    total = np.einsum("st,ktn->ksn", weights, np.where(seen, values, 0.0).astype(np.float64))
    return np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
