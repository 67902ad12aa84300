"""Is the embedding a smooth map of the systems' parameters? Quadratic fits in both directions, within each family."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

PARAMETERS = {"duffing": ("a", "b"), "hopf": ("mu",)}


def explained_by_quadratics(
    embeddings: Mapping[str, Sequence[float]], attrs: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows ``family, of, given, r2, r2_left_out, num_recordings``.

    Args:
        embeddings: of recordings, by name.
        attrs: of the truths of these recordings (``system`` and its parameters).
    """
    rows: list[dict[str, Any]] = []
    for family, parameters in PARAMETERS.items():
        names = [name for name in embeddings if attrs[name]["system"] == family]
        if not names:
            continue
        e = np.array([embeddings[name] for name in names])
        p = np.array([[attrs[name][parameter] for parameter in parameters] for name in names])
        said = ", ".join(parameters)
        found = [("embedding", said, *quadratic_r2(p, e))]
        found += [(q, "embedding", *quadratic_r2(e, p[:, [d]])) for d, q in enumerate(parameters)]
        keys = ("of", "given", "r2", "r2_left_out")
        rows += [
            {"family": family, **dict(zip(keys, row, strict=True)), "num_recordings": len(names)}
            for row in found
        ]
    return rows


def quadratic_r2(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Variance of ``y (N, q)`` that a quadratic function of ``x (N, p)`` explains; and with each row left out in turn.

    NaN where there are no more rows than coefficients.
    """
    pairs = itertools.combinations_with_replacement(range(x.shape[1]), 2)
    design = np.column_stack([np.ones(len(x)), x, *(x[:, i] * x[:, j] for i, j in pairs)])
    if len(x) <= design.shape[1]:
        return float("nan"), float("nan")
    hat = design @ np.linalg.pinv(design)
    total = np.square(y - y.mean(0)).sum()
    residual = y - hat @ y
    left_out = residual / np.clip(1 - hat.diagonal(), 1e-12, None)[:, None]
    return float(1 - np.square(residual).sum() / total), float(1 - np.square(left_out).sum() / total)
