"""Time of one full step of SVI (batch, ELBO, backward, clipping, optimiser): the library beside two baselines.

    python tests/benchmarks/svi_step.py [--case limit_cycles ...] [--json FILE] [--threads 1 2] [--repeats 20]

All methods run in one process and take turns, each at every number of threads; a method's time is the median at its own
best one. ``flop`` is the arithmetic of the step (see ``_flop.py``), ``matmul_gflops`` the rate at which this machine
multiplies matrices, measured in the same run: their ratio is the time that the step cannot go below as it is.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from _cases import CASES, TINY, Case, data, library, recordings
from _flop import matmul_gflops, products, synchronize
from _loop import Loop
from _pyro_sites import PyroSites
from _report import write

from pyro_metassm import _machine as machine

METHODS = ("library", "loop", "pyro_sites")
SECONDS = 15.0  # a method and number of threads; slow methods are run less often
FEWEST = 3
WARM_UP = 15  # memory that is kept from step to step takes some to settle


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", nargs="+", choices=[*CASES, "tiny"], default=list(CASES))
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and all")
    parser.add_argument(
        "--repeats", type=int, default=20, help="of the library; slower methods may get fewer"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--skip", nargs="+", choices=METHODS[1:], default=[])
    args = parser.parse_args(argv)
    cpus = os.cpu_count() or 1
    threads = args.threads or ([1] if args.device != "cpu" else sorted({1, cpus}))
    before = torch.get_num_threads()
    results = {}
    try:
        for name in args.case:
            case = TINY if name == "tiny" else CASES[name]
            results[name] = measure(case, args.device, threads, args.repeats, args.skip)
            print(table(name, results[name]), flush=True)
            write(args.json, results)
    finally:
        torch.set_num_threads(before)
    return results


def measure(case: Case, device: str, threads: list[int], repeats: int, skip: list[str]) -> dict:
    """All numbers of one case."""
    arrays = data(case)
    makers: dict[str, Callable] = {
        "library": lambda: library(case, recordings(arrays), device),
        "loop": lambda: Loop(case, arrays, device),
        "pyro_sites": lambda: PyroSites(case, arrays, device),
    }
    methods = {name: make().take_step for name, make in makers.items() if name not in skip}
    times: dict[str, dict[int, list[float]]] = {name: {} for name in methods}
    rates = {}
    # As in `fit`: memory stays with the process from step to step. All methods gain from it.
    with machine.memory_kept():
        for number in threads:
            torch.set_num_threads(number)
            rates[number] = matmul_gflops(device)
            for name, taken in alternate(methods, number, repeats, device).items():
                times[name][number] = taken
    return summary(case, device, times, rates)


def alternate(
    methods: dict[str, Callable], threads: int, repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of the steps of every method, taken in turns after some that warm up."""

    def timed(name: str) -> float:
        # The library shares its work among threads as `fit` does, which leaves PyTorch's own operations one.
        gc.collect()  # no method pays for another's garbage
        with machine.threads(threads) if name == "library" else nullcontext():
            begin = time.perf_counter()
            methods[name]()
            synchronize(device)
            return time.perf_counter() - begin

    def warmed_up(name: str) -> float:
        first = [timed(name)]
        while len(first) < WARM_UP and sum(first) < SECONDS:
            first.append(timed(name))
        return min(first)

    expected = {name: warmed_up(name) for name in methods}
    counts = {name: min(repeats, max(FEWEST, int(SECONDS / seconds))) for name, seconds in expected.items()}
    taken: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(repeats):
        for name in methods:
            # Spread evenly over the turns. On a busy machine two threads may be far slower than they promised.
            slow = sum(taken[name]) > 2 * SECONDS
            if turn * counts[name] % repeats < counts[name] and not slow:
                taken[name].append(timed(name))
    return taken


def summary(case: Case, device: str, times: dict, rates: dict[int, float]) -> dict:
    medians = {name: {n: 1e3 * statistics.median(t) for n, t in by.items()} for name, by in times.items()}
    best = {name: min(by, key=by.__getitem__) for name, by in medians.items()}
    result: dict = {f"{name}_ms": medians[name][best[name]] if name in medians else None for name in METHODS}
    by_part = products(case)
    result |= {
        "flop": sum(by_part.values()),
        "matmul_gflops": max(rates.values()),
        "flop_by_part": by_part,
        "matmul_gflops_by_threads": rates,
        "ratio": {name: result[f"{name}_ms"] / result["library_ms"] for name in medians},
        "ms_by_threads": medians,
        "range_ms": {n: [[1e3 * min(t), 1e3 * max(t)] for t in by.values()] for n, by in times.items()},
        "repeats": {name: [len(t) for t in by.values()] for name, by in times.items()},
    }
    result |= {f"{name}_threads": number for name, number in best.items()}
    result["matmul_limit_ms"] = 1e-6 * result["flop"] / result["matmul_gflops"]
    accelerator = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    result["machine"] = {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "device": accelerator or device,
        "load": os.getloadavg()[0],
    }
    result["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    return result


def table(case: str, result: dict) -> str:
    lines = [f"{'case':<14}{'method':<12}{'threads':>8}{'median ms':>12}{'x library':>11}{'min-max ms':>20}"]
    for name, by_threads in result["ms_by_threads"].items():
        for (number, ms), (low, high) in zip(by_threads.items(), result["range_ms"][name], strict=True):
            mark = "*" if number == result[f"{name}_threads"] else " "
            ratio = ms / result["library_ms"]
            lines.append(
                f"{case:<14}{name:<12}{number:>7}{mark}{ms:>12.1f}{ratio:>11.2f}{f'{low:.1f} - {high:.1f}':>20}"
            )
    limit = result["matmul_limit_ms"]
    lines.append(
        f"{result['flop'] / 1e9:.2f} Gflop a step at {result['matmul_gflops']:.0f} Gflop/s are {limit:.1f} ms; "
        f"the library takes {result['library_ms'] / limit:.1f} times that\n"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
