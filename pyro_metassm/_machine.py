"""How a fit uses the machine: its threads and its memory, for as long as it runs."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from pyro_metassm import native

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
LARGEST = 2**31 - 1
LIMIT = 2**25  # what glibc raises its own threshold to, at most, as a process uses larger and larger blocks


@contextmanager
def threads(number: int) -> Iterator[None]:
    """``number`` threads for a fit on a CPU.

    What is compiled or works in blocks shares its work among them. PyTorch's own operations use one: its threads would
    spin while they wait for the next operation, on the very cores that the others work on, and a core that is busy
    with something else would hold up every one of them.
    """
    before = torch.get_num_threads(), native.threads
    torch.set_num_threads(1)
    native.threads = number
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        native.threads = before[1]


@contextmanager
def memory_kept() -> Iterator[None]:
    """Memory that is freed stays with the process until the end, on Linux with glibc; elsewhere nothing changes.

    A step frees large tensors and the next one wants them again. By default the C library returns such blocks to the
    system, which hands them out page by page, each cleared first: for wide data that takes longer than the arithmetic.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(MMAP_THRESHOLD, LARGEST)
    library.mallopt(TRIM_THRESHOLD, LARGEST)
    try:
        yield
    finally:
        library.mallopt(MMAP_THRESHOLD, LIMIT)
        library.mallopt(TRIM_THRESHOLD, 2 * LIMIT)
        library.malloc_trim(0)


def random_forked(device: torch.device) -> AbstractContextManager[None]:
    """The random states of the CPU and of this device, put back at the end."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _glibc() -> ctypes.CDLL | None:
    if platform.system() != "Linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
