"""Hostile files by the hundred thousand: `python tests/reliability/fuzz.py [--cases N] [--only NAME]`.

A child process reads them, so that a crash or a hang in C is seen and counted, and goes on with the next case. Every
failure is named by its target and number: `--only npz --first 4711 --cases 1` is that case again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

# Cases of the full form, by what they cost and what they can find: 100,000 in all.
SHARES = {
    "npz": 0.575, "settings": 0.2, "fit": 0.12, "netcdf": 0.03, "zarr": 0.03, "nlb": 0.015, "mat": 0.015,
    "checkpoint": 0.013, "nwb": 0.002,
}  # fmt: skip
MOST_CRASHES = 20  # of a target, each a child started again
WRITES = {"checkpoint": ("os.remove", "os.rename", "shutil.")}  # in its own folder
STALL = 120.0  # seconds without a finished case, after which the child is ended


def work(name: str, first: int, last: int, progress: str) -> None:
    """The child: cases ``first`` to ``last - 1`` of a target, and a report on the standard output."""
    import torch
    import watching
    from hostile_files import made

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    target = made(name, watching.folder_of(name))
    try:
        watching.warm(target)
        watching.limit_memory()
        report = watching.Report()
        with open(progress, "r+b", buffering=0) as file:
            for number in range(first, last):
                os.pwrite(file.fileno(), struct.pack("<Q", number), 0)
                target.write(Random(f"{name} {number}"))
                watching.case(target, report, f"{name} {number}", may=WRITES.get(name, ()))
    finally:
        watching.clear(target.folder)
    print(
        json.dumps(
            vars(report) | {"outcomes": report.outcomes, "kinds": report.kinds, "peak": watching.peak()}
        )
    )


def run(name: str, first: int, last: int, folder: Path) -> dict:
    """All cases of a target in children, each as long as it lives."""
    total = {
        "cases": 0,
        "crashes": 0,
        "outcomes": Counter(),
        "kinds": Counter(),
        "failures": [],
        "worst_seconds": 0.0,
        "worst_growth": 0,
        "peak": 0,
    }
    started, progress = time.perf_counter(), folder / "progress"
    while first < last:
        end = min(last, first + 5000)
        progress.write_bytes(struct.pack("<Q", first))
        call = [sys.executable, __file__, "--work", name, str(first), str(end), str(progress)]
        child = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, errors, stalled = _watched(child, progress)
        if child.returncode == 0:
            report = json.loads(out.splitlines()[-1])
            first = end
        else:
            (at,) = struct.unpack("<Q", progress.read_bytes())
            why = "hung in C" if stalled else f"ended the process ({child.returncode}): {errors[-300:]}"
            report = {"cases": at + 1 - first, "failures": [f"{name} {at}: {why}"], "outcomes": {"crash": 1}}
            first = at + 1
            total["crashes"] += 1
            if total["crashes"] > MOST_CRASHES:
                report["failures"].append(f"{name}: stopped after {MOST_CRASHES} crashes")
                first = last
        total["cases"] += report["cases"]
        for key in ("outcomes", "kinds"):
            total[key].update(report.get(key, {}))
        total["failures"] += report["failures"]
        for key in ("worst_seconds", "worst_growth", "peak"):
            total[key] = max(total[key], report.get(key, 0))
    return total | {"seconds": time.perf_counter() - started}


def _watched(child: subprocess.Popen, progress: Path) -> tuple[str, str, bool]:
    last, since = b"", time.monotonic()
    while True:
        try:
            return *child.communicate(timeout=2), False
        except subprocess.TimeoutExpired:
            now = progress.read_bytes()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > STALL:
                child.kill()
                return *child.communicate(), True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000, help="in all, or of the one target")
    parser.add_argument("--only", choices=SHARES, help="one target alone")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work[0], int(args.work[1]), int(args.work[2]), args.work[3])
        return 0
    counts = {args.only: args.cases} if args.only else {n: round(args.cases * s) for n, s in SHARES.items()}
    folder = Path(f"/tmp/metassm-fuzz-{os.getpid()}")
    folder.mkdir()
    figures = {}
    print(
        f"{'target':<12}{'cases':>8}{'read':>8}{'refused':>9}{'failed':>8}{'s':>8}{'worst s':>9}{'more MiB':>10}"
    )
    for name, count in counts.items():
        found = figures[name] = run(name, args.first, args.first + count, folder)
        outcomes = found["outcomes"]
        print(
            f"{name:<12}{found['cases']:>8}{outcomes['read']:>8}{outcomes['refused']:>9}{len(found['failures']):>8}"
            f"{found['seconds']:>8.0f}{found['worst_seconds']:>9.2f}{found['worst_growth'] / 2**20:>10.0f}",
            flush=True,
        )
        print(f"            refused for: {dict(found['kinds'].most_common(12))}")
        for failure in found["failures"][:20]:
            print(f"    {failure}")
    shutil.rmtree(folder)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return 1 if any(found["failures"] for found in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
