"""Work on tensors over neurons in pieces that stay in a processor's cache, on several threads.

The observations of a batch, ``(R, K, T, N)``, are by far its largest tensor. Elementwise work on all of it at once is
bound by fresh memory; the same work piece by piece reuses small buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_metassm import native

CACHED = 2**18  # numbers of one piece on a CPU: a few such buffers fit a core's cache
LARGE = 2**20  # numbers from which it pays to wake other threads


Block = tuple[slice, slice, slice]
"""Recordings, trials and neurons."""


def blocks(
    shape: tuple[int, ...], device: torch.device, num_neurons: Sequence[int] | None = None
) -> list[list[Block]]:
    """Pieces of ``(R, K, T, N)``: several recordings, or some trials of one, without the padding common to them.

    Those of the same recordings are listed together. On other devices than a CPU there is one piece.
    """
    num, trials, bins, width = shape
    size = trials * bins * width
    if device.type != "cpu" or num * size <= CACHED:
        return [[(slice(0, num), slice(0, trials), slice(0, width))]]
    some, result = max(1, CACHED // size), []
    for row in range(0, num, some):
        rows = slice(row, min(row + some, num))
        neurons = slice(0, width if num_neurons is None else min(width, max(num_neurons[rows])))
        few = max(1, CACHED // (bins * neurons.stop)) if size > CACHED else trials
        result.append([(rows, slice(k, min(k + few, trials)), neurons) for k in range(0, trials, few)])
    return result


def each_block(
    x: Tensor, work: Callable[[slice, slice, slice], None], num_neurons: Sequence[int] | None = None
) -> None:
    """``work(recordings, trials, neurons)`` for all blocks of ``x (R, K, T, N)``, without gradients.

    The neurons are all N where the recordings' numbers of them are not given, or on another device than a CPU.

    Blocks of different recordings may be worked on at the same time by several threads; those of the same recordings
    are one after the other, always in the same order, so that sums over trials can be made in place and do not depend
    on the number of threads.
    """
    groups = blocks(x.shape, x.device, num_neurons)

    def work_on(number: int) -> None:
        for block in groups[number]:
            work(*block)

    share(work_on, len(groups), x)


def share(work: Callable[[int], None], number: int, x: Tensor) -> None:
    """``work(0) ... work(number - 1)``, without gradients: among threads where ``x``, what it is about, is large."""
    taken = itertools.count()

    def worker(_: int) -> None:
        with torch.no_grad():  # which holds for a thread
            while (mine := next(taken)) < number:
                work(mine)

    threads = native.threads if native.threads and x.numel() >= LARGE and x.device.type == "cpu" else 1
    native.on_threads(worker, min(threads, number))


def everywhere(mask: Tensor) -> Tensor:
    """``mask (..., R, K, T, N)``, or ``(..., R, 1, 1, N)`` of it where it was expanded: the same in every bin.

    Told by its strides, so without reading it.
    """
    return mask[..., :1, :1, :] if mask.stride(-2) == mask.stride(-3) == 0 else mask
