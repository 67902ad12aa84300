"""C beside the Python: compiled at first use with the system's compiler, kept in the user's cache, run on threads.

Where there is no compiler, or the environment says ``METASSM_NATIVE=0``, there is no library, and PyTorch does the
work. The reason is logged at the level DEBUG.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger(__name__)

# Nothing here lets the compiler forget NaN or reorder a sum.
FLAGS = (
    "-std=gnu11",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
)
# What compilers call "this processor": the first that is understood.
MACHINE = (
    "-march=native",
    "-mcpu=native",
    "",
)


def library(source: Path, *macros: str) -> ctypes.CDLL | None:
    """The library of a C file, or None where there is none to be had; ``macros`` like ``"BITS=32"``."""
    if os.environ.get("METASSM_NATIVE") == "0":
        return None
    return _load(source, macros)


@functools.cache
def _load(source: Path, macros: tuple[str, ...]) -> ctypes.CDLL | None:
    command = _compiler()
    if command is None:
        logger.debug("%s is not compiled: found no C compiler", source.name)
        return None
    for flag in MACHINE:
        call = [*command, *FLAGS, *filter(None, [flag]), *(f"-D{m}" for m in macros), str(source)]
        try:
            return _open(source, call)
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            reason = getattr(error, "stderr", None) or error
            logger.debug("%s is not compiled with %s: %s", source.name, flag or "plain flags", reason)
    return None


def _compiler() -> list[str] | None:
    if os.name != "posix":
        return None
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return words
    return None


def _open(source: Path, call: list[str]) -> ctypes.CDLL:
    # All macros of the compiler: its version, and what this processor can do. A home folder may be shared by unlike
    # machines, and a compiler may be replaced. The text with its headers, which may change as the file does.
    machine, text = _run([*call, "-dM", "-E"]), _run([*call, "-E"])
    key = hashlib.sha256(b"\0".join([machine, text, *map(os.fsencode, call)])).hexdigest()[:20]
    name = f"{source.stem.strip('_')}-{key}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyro_metassm"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} is another user's")
        if not (folder / name).exists():
            _compile(call, folder, name)
        return ctypes.CDLL(str(folder / name))
    except (OSError, RuntimeError) as error:  # no home, not writable, no room, no programs allowed there
        logger.debug("not kept for the next time: %s", error)
        with tempfile.TemporaryDirectory() as private:
            _compile(call, Path(private), name)
            return ctypes.CDLL(str(Path(private) / name))


def _compile(call: list[str], folder: Path, name: str) -> None:
    """Other processes may be doing the same: the library appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=folder) as private:
        _run([*call, "-o", str(Path(private) / name)])
        os.replace(Path(private) / name, folder / name)


def _run(call: list[str]) -> bytes:
    return subprocess.run(call, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120).stdout


threads: int | None = None  # that the work is shared among; None: as many as PyTorch uses
_pool: tuple[int, ThreadPoolExecutor] | None = None


def on_threads(call: Callable[[int], object], count: int) -> None:
    """``call(0)`` here and, where threads are free for it, ``call(1) ... call(count - 1)`` beside it.

    For calls that share their work among them, so that each does what the others leave.
    """
    global _pool
    futures = []
    if count > 1:
        if _pool is None or _pool[0] != os.getpid():  # threads do not live on in a forked process
            _pool = os.getpid(), ThreadPoolExecutor(os.cpu_count(), "metassm")
        with contextlib.suppress(RuntimeError):  # an interpreter that is about to end starts no more threads
            for worker in range(1, count):
                futures.append(_pool[1].submit(call, worker))
    try:
        call(0)
    finally:
        for future in futures:
            if not future.cancel():
                future.result()
