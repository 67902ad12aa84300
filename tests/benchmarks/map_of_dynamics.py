"""Fixed points, stability and periods of fits of the bifurcation study, beside the analytic truth.

    python tests/benchmarks/map_of_dynamics.py FIT [FIT ...] [--seeds 0 1 2] [--held-out 16] [--json FILE]

``FIT`` are folders that ``Fit.save`` wrote, of fits to ``Bifurcations().training(seed)`` with these seeds;
``--held-out N`` also adapts each to the study's unseen recordings with N trials. Learned positions are mapped to the
truth's coordinates by :func:`pyro_metassm.plots.align` on test trials. A fixed point is found if one lies within 15 %
of the range of the true latents. Where the truth itself is marginal (a = 0, b = 0, mu = 0: a rate of 0) stability is
not counted. Bands are those of the guide's posterior of the embedding, and of two others of it: with the spread of
the embedding over trials, and with that of its mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _report import write
from scipy.integrate import solve_ivp

import pyro_metassm as pm
from pyro_metassm import analysis
from pyro_metassm.experiments.systems import Bifurcations, split
from pyro_metassm.plots import align
from pyro_metassm.result import recording_statistics

FOUND = 0.15  # of the range
TRIALS = 32


def true_fixed_points(attrs: Mapping[Any, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Positions, and eigenvalues of the flow there (1/s)."""
    if attrs["system"] == "hopf":
        return [(np.zeros(2), np.linalg.eigvals([[0.0, 1.0], [-1.0, attrs["mu"]]]))]
    a, b, c = attrs["a"], attrs["b"], attrs["c"]
    x = [0.0] if b >= 0 else [0.0, -np.sqrt(-b / c), np.sqrt(-b / c)]
    return [(np.array([u, 0.0]), np.linalg.eigvals([[0.0, 1.0], [-b - 3 * c * u**2, a]])) for u in x]


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


def bands(fit: pm.Fit, recs: pm.Recordings, name: str, num_draws: int, seed: int) -> dict[str, np.ndarray]:
    """Draws of the embedding, ``(draw, embedding_dim)``, by what their spread is."""
    loc, variance = fit.statistics[fit.names.index(name)].double().numpy().reshape(2, -1)
    trials = range(min(recs[name].num_trials, TRIALS))
    means = [recording_statistics(fit.guide, recs, name, [k])[: len(loc)].double().numpy() for k in trials]
    spread = np.std(means, axis=0, ddof=1)
    noise = np.random.default_rng(seed).standard_normal((num_draws, len(loc)))
    kinds = {
        "guide": variance**0.5,
        "trials": spread,
        "trials/sqrt(n)": spread / recs[name].num_trials ** 0.5,
    }
    return {kind: loc + sd * noise for kind, sd in kinds.items()}


def measure(fit: pm.Fit, train: pm.Recordings, test: pm.Recordings, name: str, seed: int) -> dict:
    """A recording's row."""
    some = test.select([name]).take_trials(min(16, test[name].num_trials))
    known = align(pm.posterior(fit, some, num_samples=10), name)
    attrs, latents = test.truth[name].attrs, test.truth[name]["latents"].values
    width = np.ptp(latents.reshape(-1, 2), axis=0)
    truth = true_fixed_points(attrs)
    found = analysis.fixed_points(fit, name, recs=train, num_draws=0).isel(draw=0)
    at = known.to_truth(found["position"].values)
    row: dict[str, Any] = {"recording": name, "true": len(truth), "found": len(at), "align_r2": known.r2}
    pairs = []
    for position, rate in truth:
        error = np.abs((at - position) / width).max(-1)
        if len(at) and error.min() < FOUND:
            k = int(error.argmin())
            growth = found["growth_rate"].values[k].max()
            true = rate.real.max()
            marginal = bool(np.abs(rate.real).min() < 1e-9)
            right = None if marginal else (growth > 0) == (true > 0)
            pairs.append((position, k, float(error[k]), right, float(growth), float(true)))
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
    # In truth coordinates a fixed point has two; a band is of each.
    for kind, e in bands(fit, train, name, 100, seed).items():
        drawn = analysis.fixed_points(fit, e, recs=train.select([name]), num_starts=16)
        z = known.to_truth(drawn["position"].values)
        scores = []
        for position, *_ in pairs:
            middle = np.nanmean(z, axis=0)
            k = int(np.abs((middle - position) / width).max(-1).argmin())
            scores += _band(z[:, k], position)
        row[f"position {kind}"] = scores
        if row["true_period"]:
            drawn = analysis.limit_cycles(fit, e, recs=train.select([name]), num_starts=0)
            values = drawn["period"].values
            if values.shape[1]:
                k = int(np.abs(np.nanmean(values, 0) - row["true_period"]).argmin())
                row[f"period {kind}"] = _band(values[:, [k]], np.array([row["true_period"]]))
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
    for what in ("position", "period"):
        for kind in ("guide", "trials", "trials/sqrt(n)"):
            scores = flat(f"{what} {kind}")
            if scores:
                away = np.array([s[1] for s in scores])
                result[f"{what} band, {kind}"] = {
                    "coverage": round(float(np.mean([s[0] for s in scores])), 3),
                    "median |z|": round(float(np.median(np.abs(away))), 2),
                }
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("fits", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args(arguments)
    result = []
    for path, seed in zip(options.fits, options.seeds, strict=True):
        fit, family = pm.load(path), Bifurcations()
        train, test = family.training(seed)
        rows = [measure(fit, train, test, name, seed) for name in fit.names]
        result.append({"fit": path, "seed": seed, "which": "known", "rows": rows, "summary": summary(rows)})
        print(
            path,
            "known",
            *(f"\n  {key}: {value}" for key, value in result[-1]["summary"].items()),
            flush=True,
        )
        if options.held_out:
            pool, unseen = family.held_out()
            few = split(pool, options.held_out)[0]
            adapted = pm.adapt(fit, few, seed=seed, progress=False)
            rows = [measure(adapted, few, unseen, name, seed) for name in few.names]
            result.append(
                {"fit": path, "seed": seed, "which": "held out", "rows": rows, "summary": summary(rows)}
            )
            print(
                path,
                "held out",
                *(f"\n  {key}: {value}" for key, value in result[-1]["summary"].items()),
                flush=True,
            )
    if options.json:
        write(Path(options.json), {"fits": result})


if __name__ == "__main__":
    main()
