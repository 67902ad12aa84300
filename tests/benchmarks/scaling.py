"""Time and peak memory of a step of SVI, of ``posterior`` and of ``forecast``, against the size of the problem.

    python tests/benchmarks/scaling.py [--json FILE] [--quick] [--threads 1]

Every point is a process of its own, forked from one that has imported the library and done nothing else. Its peak
memory is the highest resident size that the kernel saw (``ru_maxrss``) above that before: exact however short the peak,
which a sampler is not, and free of what other points have left behind.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from _cases import Case, data, library, recordings
from _report import write

import pyro_metassm as pm
from pyro_metassm.draws import ELEMENTS

BASE = Case((30,) * 4, num_bins=100, trials_per_step=32, num_trials=32)
# The library works on some ten tensors of a chunk of draws at a time (pyro_metassm/posterior.py).
BUDGET_MB = 10 * 4 * ELEMENTS / 2**20
READ = Case((30,) * 2, num_bins=100, trials_per_step=8, num_trials=8)  # what is drawn from
Point = tuple[str, int, Case]  # what, the size that varies, the case


def points(quick: bool) -> dict[str, list[Point]]:
    """Title -> points; sizes are doubled from one to the next, or nearly."""
    trials, bins, neurons = (8, 16, 32, 64, 128), (50, 100, 200, 400, 800), (25, 50, 100, 200, 400)
    latents, numbers, draws = (2, 4, 8, 16, 32), (1, 4, 16, 64, 128), (16, 64, 256, 1024)
    step = {
        "trials": [(n, replace(BASE, trials_per_step=n, num_trials=n)) for n in trials],
        "bins": [(n, replace(BASE, num_bins=n)) for n in bins],
        "neurons": [(n, replace(BASE, num_neurons=(n,) * 4)) for n in neurons],
        "latents": [(n, replace(BASE, latent_dim=n)) for n in latents],
        "recordings, 128 trials a step": [
            (n, replace(BASE, num_neurons=(30,) * n, trials_per_step=128 // n, num_trials=max(32, 128 // n)))
            for n in numbers
        ],
    }
    result: dict[str, list[Point]] = {}
    for title, rows in step.items():
        result[f"step: {title}"] = [("step", n, case) for n, case in rows][:: 4 if quick else 1]
    for what in ("posterior", "forecast"):
        result[f"{what}: draws"] = [(what, n, READ) for n in draws][:: 2 if quick else 1]
    return result


def measure(what: str, size: int, case: Case, threads: int, seconds: float) -> dict[str, float]:
    """Time and memory of one point; ``size`` is the number of draws where it is drawn."""
    torch.set_num_threads(threads)
    start = _resident_mb()
    arrays = data(case)
    trainer = library(case, recordings(arrays))
    if what == "step":
        taken = _times(trainer.take_step, seconds)
        return {"ms": 1e3 * statistics.median(taken), "peak_mb": _peak_mb() - start}
    fit, recs = trainer.result(), trainer.recs
    arguments = {"context": case.num_bins // 2, "horizon": case.num_bins // 2} if what == "forecast" else {}
    getattr(pm, what)(fit, recs, num_samples=2, **arguments)
    before = _resident_mb()
    begin = time.perf_counter()
    tree = getattr(pm, what)(fit, recs, num_samples=size, **arguments)
    elapsed = time.perf_counter() - begin
    peak, result = _peak_mb() - before, sum(node.dataset.nbytes for node in tree.subtree) / 2**20
    # The result grows with the draws, as it must; what is needed beside it must not.
    numbers = {"ms": 1e3 * elapsed, "draws_per_s": size / elapsed, "peak_mb": peak, "result_mb": result}
    return numbers | {"working_mb": max(0.0, peak - result), "budget_mb": BUDGET_MB}


def _times(step: Callable[[], None], seconds: float) -> list[float]:
    taken: list[float] = []
    for _ in range(2):
        step()
    while len(taken) < 3 or (sum(taken) < seconds and len(taken) < 20):
        begin = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begin)
    return taken


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def table(title: str, rows: list[tuple[int, dict[str, float]]]) -> str:
    """Rows with their time over the first's, and the same by unit of size where the size is that of the work."""
    drawn = "draws_per_s" in rows[0][1]
    head = f"{title:<38}{'ms':>10}{'x first':>9}{'by unit':>9}{'peak MB':>9}"
    lines = [head + (f"{'draws/s':>9}{'result MB':>11}{'beside it':>11}{'budget MB':>11}" if drawn else "")]
    first_size, first = rows[0]
    for size, row in rows:
        ratio = row["ms"] / first["ms"]
        by_unit = "" if "recordings" in title else f"{ratio * first_size / size:.2f}"
        text = f"{size:>38}{row['ms']:>10.1f}{ratio:>9.2f}{by_unit:>9}{row['peak_mb']:>9.0f}"
        if drawn:
            over = "!" if row["working_mb"] > row["budget_mb"] else " "
            text += f"{row['draws_per_s']:>9.0f}{row['result_mb']:>11.0f}{row['working_mb']:>11.0f}"
            text += f"{row['budget_mb']:>10.0f}{over}"
        lines.append(text)
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--quick", action="store_true", help="the two ends of every table")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro_metassm", "_cases"])
    results: dict[str, list] = {}
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for title, of_title in points(args.quick).items():
            seconds = 0.5 if args.quick else 2.0
            rows = [(p[1], pool.submit(measure, *p, args.threads, seconds).result()) for p in of_title]
            results[title] = [{"size": size} | row for size, row in rows]
            print(table(title, rows), flush=True)
            write(args.json, results)
    return results


if __name__ == "__main__":
    main()
