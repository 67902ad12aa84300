"""Where two branches of fixed points meet and end, or are born."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def folds(
    s: np.ndarray, position: np.ndarray, unstable: np.ndarray, count: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Folds (saddle-node bifurcations) of every draw: two branches, of which one has one more unstable eigenvalue, end
    or begin between the same two points of the path, and the draw has two fixed points fewer or more.

    Args:
        s: of the points of the path.
        position: ``(S, P, B, d)``, NaN where a draw lacks a branch.
        unstable: ``(S, P, B)``, the number of unstable eigenvalues.
        count: ``(S, P)``, of all fixed points.

    Returns:
        ``(S, F)``, the ``s`` halfway between the two points, NaN where a draw lacks a fold, which is the same one in
        different draws if the same branches meet in the same order; and ``(S, F, d)``, halfway between the two fixed
        points where they were last, or first, seen.
    """
    found: dict[tuple[int, int, int, int], dict[int, tuple[float, np.ndarray]]] = {}
    for draw in range(len(position)):
        seen: dict[tuple[int, int, int], int] = {}
        for k in range(len(s) - 1):
            change = int(np.sign(count[draw, k + 1] - count[draw, k]))
            if abs(count[draw, k + 1] - count[draw, k]) < 2:
                continue
            last, lacking = (k, k + 1) if change < 0 else (k + 1, k)
            gone = np.isfinite(position[draw, last]).all(-1) & ~np.isfinite(position[draw, lacking]).all(-1)
            for a, b in _pairs(position[draw, last], unstable[draw, last], np.flatnonzero(gone)):
                number = seen[a, b, change] = seen.get((a, b, change), -1) + 1
                place = (s[k] + s[k + 1]) / 2, position[draw, last, [a, b]].mean(0)
                found.setdefault((a, b, change, number), {})[draw] = place
    result = np.full((len(position), len(found)), np.nan)
    where = np.full((len(position), len(found), position.shape[-1]), np.nan)
    for column, of_draws in enumerate(found.values()):
        for draw, (share, middle) in of_draws.items():
            result[draw, column], where[draw, column] = share, middle
    order = np.argsort(np.array([np.nanmedian(column) for column in result.T]), kind="stable")
    return result[:, order], where[:, order]


def _pairs(position: np.ndarray, unstable: np.ndarray, among: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs of branches that may have met, the nearest first, each branch in one."""
    near = sorted(
        (float(np.linalg.norm(position[a] - position[b])), int(a), int(b))
        for number, a in enumerate(among)
        for b in among[number + 1 :]
        if abs(unstable[a] - unstable[b]) == 1
    )
    used: set[int] = set()
    for _, a, b in near:
        if not used & {a, b}:
            used |= {a, b}
            yield a, b
