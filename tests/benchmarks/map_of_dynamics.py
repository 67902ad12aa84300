"""Fixed points, stability and periods of fits of the bifurcation study, beside the analytic truth.

    python tests/benchmarks/map_of_dynamics.py FIT [FIT ...] [--seeds 0 1 2] [--revise] [--held-out 16]
        [--held-out-seed 1000] [--trials 40] [--json FILE]

``FIT`` are folders that ``Fit.save`` wrote, of fits to ``Bifurcations().training(seed)`` with these seeds;
``--held-out N`` also adapts each to the study's unseen recordings with N trials, and then revises it with these and the
known ones together. Learned positions are mapped to the
truth's coordinates by :func:`pyro_metassm.plots.align` on test trials. A fixed point is found if one lies within 15 %
of the range of the true latents. Where the truth itself is marginal (a = 0, b = 0, mu = 0: a rate of 0) stability is
not counted. Bands are the fit's own, from 100 draws; with ``--revise`` those of :func:`pyro_metassm.revise`. With
``--trials`` fewer trials are simulated, of the same systems and neurons. The seconds are of the fixed points of all
recordings, 100 draws each, and of the revision.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _report import write
from scipy.integrate import solve_ivp

import pyro_metassm as pm
from pyro_metassm import analysis
from pyro_metassm.experiments.systems import Bifurcations, split
from pyro_metassm.plots import align

FOUND = 0.15  # of the range
DRAWS = 100


def true_period(attrs: Mapping[Any, Any]) -> float | None:
    """In s; None without a limit cycle."""
    mu = attrs.get("mu", 0.0)
    if mu <= 0:
        return None

    def section(t, z):
        return z[0]

    section.direction = 1
    flow = lambda t, z: [z[1], -z[0] + (mu - z[0] ** 2) * z[1]]
    times = solve_ivp(flow, (0, 200), [2 * mu**0.5, 0.0], events=section, rtol=1e-9, atol=1e-9).t_events[0]
    return float(times[-1] - times[-2])


def measure(fit: pm.Fit, train: pm.Recordings, test: pm.Recordings, name: str, seed: int) -> dict:
    """A recording's row."""
    some = test.select([name]).take_trials(min(16, test[name].num_trials))
    known = align(pm.posterior(fit, some, num_samples=10), name)
    attrs, latents = test.truth[name].attrs, test.truth[name]["latents"].values
    width = np.ptp(latents.reshape(-1, 2), axis=0)
    true = pm.simulate.fixed_points(test.truth[name])
    truth = list(zip(true["position"].values, true["growth_rate"].values, strict=True))
    found = analysis.fixed_points(fit, name, recs=train, num_draws=0).isel(draw=0)
    at = known.to_truth(found["position"].values)
    row: dict[str, Any] = {"recording": name, "true": len(truth), "found": len(at), "align_r2": known.r2}
    pairs = []
    for position, rate in truth:
        error = np.abs((at - position) / width).max(-1)
        if len(at) and error.min() < FOUND:
            k = int(error.argmin())
            growth = found["growth_rate"].values[k].max()
            marginal = bool(np.abs(rate).min() < 1e-9)
            right = None if marginal else (growth > 0) == (rate.max() > 0)
            pairs.append((position, k, float(error[k]), right, float(growth), float(rate.max())))
    row |= {"missed": len(truth) - len(pairs), "invented": len(at) - len({k for _, k, *_ in pairs})}
    row |= {
        "error": [p[2] for p in pairs],
        "stability": [None if p[3] is None else bool(p[3]) for p in pairs],
    }
    row |= {"growth": [p[4] for p in pairs], "true_growth": [p[5] for p in pairs]}
    row |= {"mu": attrs.get("mu"), "true_period": true_period(attrs)}
    cycles = analysis.limit_cycles(fit, name, recs=train, num_draws=0).isel(draw=0)
    periods = cycles["period"].values[cycles["stable"].values]
    row["periods"] = periods.tolist()
    if row["true_period"]:
        near = np.abs(periods - row["true_period"]).min() / row["true_period"] if len(periods) else np.inf
        row["period_error"] = float(near)
    drawn = analysis.fixed_points(fit, name, recs=train, num_draws=DRAWS, num_starts=16, seed=seed)
    z, growth = known.to_truth(drawn["position"].values), drawn["growth_rate"].values.max(-1)
    # In truth coordinates a fixed point has two; a band is of each.
    row["position band"], row["growth band"] = [], []
    for position, *_, true in pairs:
        k = int(np.abs((np.nanmean(z, axis=0) - position) / width).max(-1).argmin())
        row["position band"] += _band(z[:, k], position)
        row["growth band"] += _band(growth[:, [k]], np.array([true]))
    if row["true_period"]:
        drawn = analysis.limit_cycles(fit, name, recs=train, num_draws=DRAWS, num_starts=0, seed=seed)
        values = drawn["period"].values
        if values.shape[1]:
            k = int(np.abs(np.nanmean(values, 0) - row["true_period"]).argmin())
            row["period band"] = _band(values[:, [k]], np.array([row["true_period"]]))
    return row


def _band(draws: np.ndarray, truth: np.ndarray) -> list[tuple[bool, float]]:
    """Of each coordinate: whether the 90 % band holds the truth, and how many sd it is away."""
    low, high = np.nanquantile(draws, [0.05, 0.95], axis=0)
    away = (truth - np.nanmean(draws, 0)) / np.maximum(np.nanstd(draws, 0), 1e-12)
    return [(bool(a), float(b)) for a, b in zip((truth >= low) & (truth <= high), away, strict=True)]


def crossing(rows: list[dict]) -> float | None:
    """Where the growth rate of the focus of the Hopf recordings is 0, between recordings."""
    points = sorted((r["mu"], r["growth"][0]) for r in rows if r["mu"] is not None and r["growth"])
    for (m0, g0), (m1, g1) in zip(points, points[1:], strict=False):
        if g0 <= 0 < g1:
            return m0 - g0 * (m1 - m0) / (g1 - g0)
    return None


def summary(rows: list[dict]) -> dict:
    flat = lambda key: [x for r in rows for x in r.get(key, [])]
    right = [x for x in flat("stability") if x is not None]
    error = flat("error")
    result: dict[str, Any] = {
        "recordings": len(rows),
        "true": sum(r["true"] for r in rows),
        "missed": sum(r["missed"] for r in rows),
        "invented": sum(r["invented"] for r in rows),
        "error median, largest": (float(np.median(error)), float(np.max(error))),
        "share within 5 %": float(np.mean(np.array(error) <= 0.05)),
        "stability right": (sum(right), len(right)),
        "crossing": crossing(rows),
        "period errors": [round(r["period_error"], 4) for r in rows if "period_error" in r],
    }
    for what in ("position", "growth", "period"):
        if scores := flat(f"{what} band"):
            away = np.array([s[1] for s in scores])
            result[f"{what} band"] = {
                "coverage": round(float(np.mean([s[0] for s in scores])), 3),
                "number": len(scores),
                "median |z|": round(float(np.median(np.abs(away))), 2),
            }
    return result


def _timed(function: Callable, *arguments, **options) -> tuple[Any, dict[str, float]]:
    """What a function returns, and its seconds: of the clock, and of all its threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function(*arguments, **options)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return result, {key: round(value, 1) for key, value in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fits", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--revise", action="store_true")
    parser.add_argument("--held-out", type=int, default=0)
    parser.add_argument("--held-out-seed", type=int, default=Bifurcations.held_out_seed)
    parser.add_argument("--trials", type=int, default=Bifurcations.num_train)
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    result = []
    for path, seed in zip(options.fits, options.seeds, strict=True):
        fit = pm.load(path)
        family = Bifurcations(
            num_train=options.trials,
            num_test=min(Bifurcations.num_test, options.trials),
            held_out_seed=options.held_out_seed,
        )
        train, test = family.training(seed)
        cases = [("known", fit, train, test)]
        if options.held_out:
            pool, unseen = family.held_out()
            few = split(pool, options.held_out)[0]
            cases.append(("held out", pm.adapt(fit, few, seed=seed, progress=False), few, unseen))
        for which, of, seen, unseen in cases:
            seconds = {}
            if options.revise:
                together = train if seen is train else pm.Recordings([*train.values(), *seen.values()])
                of, seconds["revise"] = _timed(pm.revise, of, together)
            rows = [measure(of, seen, unseen, name, seed) for name in seen.names]
            _, seconds[f"fixed points, {len(seen)} x {DRAWS}"] = _timed(
                analysis.fixed_points, of, list(seen.names), num_draws=DRAWS
            )
            found = {"fit": path, "seed": seed, "which": which, "rows": rows, "seconds": seconds}
            result.append(found | {"summary": summary(rows)})
            shown = result[-1]["summary"] | {"seconds": seconds}
            print(path, which, *(f"\n  {key}: {value}" for key, value in shown.items()), flush=True)
    if options.json:
        write(Path(options.json), {"fits": result})


if __name__ == "__main__":
    main()
