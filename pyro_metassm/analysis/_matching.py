"""What belongs together in different draws of a posterior, or at neighbouring points of a path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def assigned(known: np.ndarray, found: np.ndarray, gate: float) -> np.ndarray:
    """Which of ``known`` each of ``found`` is, one to one; -1 for none of them.

    Minimises the sum of squared distances of the pairs, where a point without a partner costs ``gate^2 / 2``, so that
    no pair is farther apart than ``gate``.

    Args:
        known: ``(A, q)``.
        found: ``(B, q)``.
        gate: largest distance of a pair.

    Returns:
        ``(B,)`` integers.
    """
    from scipy.optimize import linear_sum_assignment  # adds a filter of warnings when it is imported

    a, b = len(known), len(found)
    pair = np.full(b, -1)
    if not a or not b:
        return pair
    cost = np.square(found[:, None] - known).sum(-1)
    # B + A rows and columns: each may be left alone, with a partner that is nobody's.
    alone = gate**2 / 2
    full = np.zeros((b + a, a + b))
    full[:b, :a] = np.minimum(cost, 1e3 * gate**2)
    full[:b, a:] = full[b:, :a] = alone
    rows, columns = linear_sum_assignment(full)
    for row, column in zip(rows, columns, strict=True):
        if row < b and column < a and cost[row, column] <= gate**2:
            pair[row] = column
    return pair


def tracks(reference: np.ndarray, found: Sequence[np.ndarray], gate: float) -> list[np.ndarray]:
    """Which track each point of each draw belongs to: those of the reference first, others as they turn up.

    A track that the reference lacks is where its first point was.

    Args:
        reference: ``(A, q)``.
        found: for every draw ``(B_s, q)``.
        gate: largest distance within a track from where it is known.

    Returns:
        for every draw ``(B_s,)``, the numbers of the tracks.
    """
    known, result = reference, []
    for points in found:
        pair = assigned(known, points, gate)
        new = np.flatnonzero(pair < 0)
        pair[new] = len(known) + np.arange(len(new))
        known = np.concatenate([known, points[new]]) if len(new) else known
        result.append(pair)
    return result


def placed(values: Sequence[np.ndarray], where: Sequence[np.ndarray], number: int, missing) -> np.ndarray:
    """Values of every draw ``(B_s, ...)`` in the columns that they belong to, ``(S, number, ...)``."""
    first = np.asarray(values[0])
    out = np.full((len(values), number, *first.shape[1:]), missing, dtype=first.dtype)
    for row, (of_draw, columns) in enumerate(zip(values, where, strict=True)):
        out[row, columns] = of_draw
    return out
