"""What the intervals of a fit cover: the demo's limit cycles, simulated by the fitted model and by the world.

    python tests/benchmarks/intervals.py [--seeds 0 1 2] [--num-steps 300] [--rollout-probability 0.2] [--json FILE]

For every seed the demo's problem (``pyro_metassm/experiments/demo.py``) is simulated and fitted. ``pm.calibration``
then takes (1) new recordings from the model, embeddings from the prior, (2) new trials of the recordings trained on,
(3) the held-out trials of the simulation itself, latents mapped to the true ones by the training trials. Reported: the
share of truths in central 50 and 90 % intervals, its standard error over trials, (1) over recordings, and k-hat.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from _report import write

import pyro_metassm as pm
from pyro_metassm.experiments.demo import VELOCITIES


def run(seed: int, args: argparse.Namespace) -> list[dict]:
    """Fit, and calibrate in three ways."""
    recs = pm.simulate.limit_cycles(VELOCITIES, num_trials=args.num_trials, seed=seed)
    train, test = recs.split(test_fraction=0.25, seed=seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        guide = pm.guides.DKF(model, rollout_probability=args.rollout_probability)
    steps = {"num_steps": args.num_steps, "warm_start_steps": args.warm_start_steps}
    fit = pm.fit(model, guide, train, seed=seed, progress=False, **steps)
    like = train.take_trials(min(32, train[train.names[0]].num_trials))
    ways: dict[str, dict] = {
        "model, new recordings": {"like": like, "num_simulations": args.num_simulations},
        "model, new trials": {"like": like, "new_recordings": False, "num_simulations": 2},
        "world, held-out trials": {
            "simulate": lambda _: test,
            "align": train,
            "new_recordings": False,
            "num_simulations": 1,
        },
    }
    results = []
    for way, options in ways.items():
        begin = time.perf_counter()
        found = pm.calibration(fit, num_samples=args.num_samples, seed=seed, progress=False, **options)
        shapes = found["khat"].values[~np.isnan(found["khat"].values)]
        result = {"seed": seed, "data": way, "khat": float(np.median(shapes))}
        for key in found["quantity"].values:
            cell = found.sel(quantity=key)
            result[str(key)] = [cell["coverage"].values.tolist(), cell["coverage_se"].values.tolist()]
        results.append(result | {"seconds": time.perf_counter() - begin})
    return results


def line(result: dict) -> str:
    text = f"seed {result['seed']}  {result['data']:<23}"
    for key in ("embedding", "latents", "rates"):
        if key in result:
            pairs = [f"{mean:.3f} ({error:.3f})" for mean, error in zip(*result[key], strict=True)]
            text += f"  {key} {' '.join(pairs)}"
    return f"{text}  k-hat {result['khat']:.1f}  {result['seconds']:.0f} s"


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--warm-start-steps", type=int, default=1000)
    parser.add_argument("--num-trials", type=int, default=128)
    parser.add_argument("--num-simulations", type=int, default=5)
    parser.add_argument("--num-samples", type=int, default=99)
    parser.add_argument("--rollout-probability", type=float, default=0.2)
    args = parser.parse_args(argv)
    results = []
    for seed in args.seeds:
        results += run(seed, args)
        print("\n".join(map(line, results[-3:])), flush=True)
        write(args.json, results)
    return results


if __name__ == "__main__":
    main()
