"""What a reader may not do while it reads, watched: run code, import, leave its folder, take long, take memory."""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from hostile import Target

SECONDS = 10.0  # of the processor, for one case
# Bytes by which the largest memory of the process may grow beyond what it was after the first good file.
MEMORY = 2**30
# What the interpreter says of everything that could run what a file holds; `compile` alone, without `exec`, is how
# numpy reads a header (ast.literal_eval).
FORBIDDEN = (
    "exec", "pickle.find_class", "marshal.loads", "marshal.load", "os.system", "os.exec", "os.fork", "os.posix_spawn",
    "subprocess.Popen", "ctypes.dlopen", "code.__new__", "shutil.", "os.remove", "os.rename", "socket.",
    "urllib.Request", "webbrowser.open",
)  # fmt: skip
# Where Python itself looks for what is installed: a checkpoint is compared with the versions that there are, and
# `importlib.metadata` opens every place of the path again once its caches are dropped, archives that are not there too.
SEARCHED = frozenset(map(os.path.abspath, sys.path))
LAZY = ("xarray.namedarray._array_api",)  # what libraries import at odd moments, whatever a file says
_seen: list[str] | None = None
_folder = ""
_hooked = False


class Hang(BaseException):
    """Longer than a case may take; no Exception, so that no reader makes a refusal of it."""


@dataclass
class Report:
    """What came of the cases of one target."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)  # of the errors that refusals came from
    failures: list[str] = field(default_factory=list)
    worst_seconds: float = 0.0
    worst_growth: int = 0

    def add(self, other: Report) -> None:
        self.cases += other.cases
        self.outcomes += other.outcomes
        self.kinds += other.kinds
        self.failures += other.failures
        self.worst_seconds = max(self.worst_seconds, other.worst_seconds)
        self.worst_growth = max(self.worst_growth, other.worst_growth)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event == "import" and args[0] not in sys.modules:
        _seen.append(f"import of {args[0]}")
    elif event == "open" and args[0] in ("<string>", "<unknown>"):
        pass  # Python looks for the line of a syntax error: NumPy parses headers of arrays as literals
    elif event == "open" and isinstance(args[0], str) and args[1] is not None:
        path = os.path.abspath(args[0])
        writes = any(letter in str(args[1]) for letter in "wax+")
        about = os.path.dirname(
            path
        )  # of what is installed there: a build leaves *.egg-info beside the sources
        described = about.endswith((".egg-info", ".dist-info")) and os.path.dirname(about) in SEARCHED
        known = path in SEARCHED or described or path.startswith(("/proc/", "/sys/", "/dev/", sys.prefix))
        if not path.startswith(_folder) and (writes or not known):
            _seen.append(f"open of {path} ({args[1]})")
    elif event.startswith(FORBIDDEN) and (event, *args) != ("ctypes.dlopen", None):  # of the process itself
        _seen.append(f"{event} {str(args)[:200]}")


def _on_alarm(signum: int, frame: Any) -> None:
    raise Hang


def case(target: Target, report: Report, words: str, *, may: tuple[str, ...] = ()) -> None:
    """Read what the target has written, and say what came of it.

    Args:
        target: whose files are there.
        report: to add to.
        words: to find the case again.
        may: what it may do none the less, as the beginning of what the interpreter calls it: a checkpoint is
            followed by the next, for one.
    """
    global _seen, _folder, _hooked
    if not _hooked:
        sys.addaudithook(_hook)  # for good: Python has no way to take one off
        _hooked = True
    before = peak()
    found: list[str] = []
    wrong: str | None = None
    signal.signal(signal.SIGPROF, _on_alarm)
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _folder, _seen = str(target.folder), found
    try:
        result = target.read()
    except ValueError as error:
        _seen = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome = "refused"
        report.kinds[_origin(error)] += 1
        if not str(error).replace("\n", "").isprintable():
            wrong = f"a message that changes a terminal: {str(error)[:200]!r}"
        if str(target.path) not in str(error):
            wrong = f"does not name the file: {str(error)[:200]!r}"
        if _origin(error) == "MemoryError" or "allocate" in str(error):
            wrong = f"asked for too much memory: {str(error)[:200]!r}"
    except Hang:
        outcome, wrong = "hang", f"longer than {SECONDS} s"
    except BaseException as error:
        outcome, wrong = "other error", f"{type(error).__name__}: {str(error)[:200]!r}"
    else:
        _seen = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome, wrong = "read", target.unsound(result)
    finally:
        _seen = None
        signal.setitimer(signal.ITIMER_PROF, 0)
    found = [text for text in found if not text.startswith(may)]
    seconds, growth = time.process_time() - started, peak() - before
    if wrong is None and found:
        wrong = "; ".join(sorted(set(found))[:3])
    if wrong is None and growth > MEMORY:
        wrong = f"took {growth / 2**20:.0f} MiB"
    report.cases += 1
    report.outcomes[outcome] += 1
    report.worst_seconds = max(report.worst_seconds, seconds)
    report.worst_growth = max(report.worst_growth, growth)
    if wrong is not None:
        report.failures.append(f"{words}: {wrong}")
        report.outcomes["FAILED"] += 1


def _origin(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__


def peak() -> int:
    """The largest memory that the process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def limit_memory(spare: int = 3 * 2**30) -> None:
    """Let an allocation of more than this beyond what there is now fail, rather than take the machine down."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    size = pages * resource.getpagesize() + spare
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def warm(target: Target, number: int = 30) -> None:
    """Read the good files and some bad ones first, so that what libraries import on the way is there."""
    for name in LAZY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    target.read()
    for seed in range(number):
        target.write(Random(f"warm {seed}"))
        with contextlib.suppress(Exception):
            target.read()


def folder_of(name: str) -> Path:
    """Where the files of a target lie: in memory if the system has such a place."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
    return base / f"metassm-fuzz-{os.getpid()}" / name


def clear(folder: Path) -> None:
    """Remove what `folder_of` stands for."""
    shutil.rmtree(folder.parent, ignore_errors=True)
