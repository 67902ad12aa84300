"""What the compiled networks share: which numbers they are for, on how many threads, and whether they are right."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyro_metassm import native

BITS = {torch.float32: 32, torch.float64: 64}


def library(source: Path, dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled C file for numbers of this kind; None where there is none."""
    return native.library(source, f"BITS={BITS[dtype]}") if dtype in BITS else None


def workers(most: int) -> int:
    """Threads to share work among, of which there is enough for so many."""
    return min(native.threads or torch.get_num_threads(), most)


def agree(
    one: Callable[..., Tensor],
    other: Callable[..., Tensor],
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
) -> bool:
    """Whether two functions of tensors of these shapes are the same, in value and gradient, on one example.

    Compilers have errors too: a wrong gradient must not go unseen.
    """
    with torch.inference_mode(False), torch.enable_grad():
        sizes = [math.prod(shape) for shape in shapes]
        numbers = torch.arange(max(sizes) + len(sizes), dtype=dtype, device="cpu").sin()
        leaves = [
            numbers[i : i + size].view(shape).requires_grad_()
            for i, (size, shape) in enumerate(zip(sizes, shapes, strict=True))
        ]
        pairs = []
        for way in (one, other):
            y = way(*leaves)
            pairs.append((y, *torch.autograd.grad((y * y).sum(), leaves)))
        return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*pairs, strict=True))
