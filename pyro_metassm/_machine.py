"""How a fit uses the machine: its threads, its memory and the random state, for as long as it runs."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from pyro_metassm import native

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # of glibc's mallopt
LARGEST = 2**31 - 1
LIMIT = 2**25  # what glibc raises its own threshold to, at most, as a process uses larger and larger blocks


_lock = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """No other thread is in such a block meanwhile; also a decorator, ``@alone()``.

    Pyro's stack of handlers, PyTorch's default generator and number of threads belong to the process: two programs that
    ran at once in two threads would draw each other's numbers and see each other's handlers. So they take turns; to run
    at once is for processes. A generator must not hold it while it waits: it may be left waiting for good.
    """
    with _lock:
        yield


def _unlock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # the thread that held it does not live on in a forked process
    os.register_at_fork(after_in_child=_unlock)


@contextmanager
def threads(number: int | None) -> Iterator[None]:
    """``number`` threads for a fit on a CPU, while no other thread fits; None is PyTorch's present number.

    What is compiled or works in blocks shares its work among them. PyTorch's own operations use one: its threads would
    spin while they wait for the next operation, on the very cores that the others work on, and a core that is busy
    with something else would hold up every one of them.
    """
    with alone():
        before = torch.get_num_threads(), native.threads
        torch.set_num_threads(1)
        native.threads = number or before[0]
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


@contextmanager
def random_forked(device: torch.device | None = None, *, alone: bool = True) -> Iterator[None]:
    """The random states of the CPU and of this device, put back at the end; no other thread draws meanwhile.

    Args:
        device: besides the CPU.
        alone: False in a generator, whose caller is to see that no other thread draws (:func:`alone`).
    """
    others = [device] if device is not None and device.type == "cuda" else []
    with _lock if alone else nullcontext(), torch.random.fork_rng(others):
        yield


def _glibc() -> ctypes.CDLL | None:
    if platform.system() != "Linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
