"""Scores of draws against truths (public in `pyro_metassm.metrics`): CRPS, and where the truth stands among them."""

from __future__ import annotations

from typing import Any

import numpy as np


def crps(draws: Any, truth: Any) -> np.ndarray:
    r"""Continuous ranked probability score of draws, the fair estimate: lower is better, in units of the data.

    ``mean_s |x_s - y| - sum_{s < s'} |x_s - x_s'| / (S (S - 1))``: unbiased for ``E |x - y| - E |x - x'| / 2`` of the
    distribution that the draws come from, whatever their number.

    Args:
        draws: ``(draw, ...)``, two or more.
        truth: ``(...)``; NaN where there is none.

    Returns:
        ``(...)``, NaN where the truth is.

    Raises:
        ValueError: fewer than two draws, other shapes.

    Reference: Gneiting and Raftery (2007); Ferro (2014) for the fair form.

    Example:
        >>> crps(np.array([0.0, 2.0]), 1.0)  # 1 - 2 / 2
        array(0.)
    """
    x, y = np.asarray(draws, np.float64), np.asarray(truth, np.float64)
    if x.ndim < 1 or len(x) < 2 or x.shape[1:] != y.shape:
        raise ValueError(
            f"crps: needed two or more draws (draw, ...) of the shape of the truth, got {x.shape}, {y.shape}"
        )
    number = len(x)
    # Sorted, the s-th draw is the larger one of s pairs and the smaller one of the others.
    weights = 2.0 * np.arange(number) - (number - 1)
    spread = np.tensordot(weights, np.sort(x, 0), 1) / (number * (number - 1))
    return np.asarray(np.abs(x - y).mean(0) - spread)


def rank_levels(draws: Any, truth: Any, rng: np.random.Generator) -> np.ndarray:
    """Where the truth stands among the draws, in (0, 1), ties and the place within a rank at random.

    Uniform where truth and draws come from one distribution, also of counts, whose intervals between quantiles hold
    more than they say: so the share of levels within ``(1 - p) / 2`` of the ends is the coverage of ``p`` intervals.

    Args:
        draws: ``(draw, ...)``.
        truth: ``(...)``; NaN where there is none.
        rng: of the ties.

    Returns:
        ``(...)``, NaN where the truth is.

    Example:
        >>> level = rank_levels(np.array([1.0, 2.0, 3.0]), 2.5, np.random.default_rng(0))
        >>> bool(0.5 < level < 0.75)  # above two of three draws: the third quarter
        True
    """
    x, y = np.asarray(draws, np.float64), np.asarray(truth, np.float64)
    below, equal = (x < y).sum(0), (x == y).sum(0)
    level = (below + rng.random(y.shape) * (equal + 1)) / (len(x) + 1)
    return np.where(np.isnan(y), np.nan, level)
