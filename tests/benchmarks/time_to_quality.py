"""Seconds of fitting until the demo's data are forecast well: what users feel.

    python tests/benchmarks/time_to_quality.py [--seeds 0 1 2] [--plain] [--json FILE]

The demo's simulation, split and model (``pyro_metassm/experiments/demo.py``) are fitted by ``pm.fit`` itself. After the
warm start and every few steps the clock stops, and the forecast of held-out trials 50 bins ahead is scored (r2, mean
over the recordings). Reported: when it first passes 0.98, and where the fit ends. ``--plain`` does the same for the
plain recipe, a random start and a constant learning rate of 1e-3, and gives up after ``--plain-seconds``.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from unittest import mock

import torch
from _report import write

import pyro_metassm as pm
from pyro_metassm import training
from pyro_metassm.experiments.demo import CONTEXT, HORIZON, VELOCITIES

SAMPLES = 20  # draws behind the forecasts on the way; with more, r2 is a little higher


class Enough(Exception):
    """Ends a fit that has shown what it was to show."""


class Watch:
    """A clock that runs while the fit does, and what the forecasts scored on the way."""

    def __init__(self, test: pm.Recordings, target: float, every: int, stop_after: float):
        self.test, self.target, self.every, self.stop_after = test, target, every, stop_after
        self.scores: list[tuple[int, float, float]] = []  # step, seconds of fitting, r2
        self.begin, self.excluded = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin - self.excluded

    @property
    def passed(self) -> tuple[int, float, float] | None:
        return next((score for score in self.scores if score[2] > self.target), None)

    @property
    def done(self) -> bool:
        return self.seconds > self.stop_after or (self.stop_after < math.inf and self.passed is not None)

    def look(self, trainer: training.Trainer) -> None:
        """Score the state as it stands; making a result of it counts as fitting, as it does for a user."""
        fit = trainer.result()
        seconds = self.seconds
        self.scores.append((trainer.step, seconds, score(fit, self.test, SAMPLES)))
        trainer.model.train(), trainer.guide.train()
        self.excluded += self.seconds - seconds


def score(fit: pm.Fit, test: pm.Recordings, num_samples: int = 100) -> float:
    r2 = pm.metrics.forecast_r2(fit, test, context=CONTEXT, horizon=HORIZON, num_samples=num_samples)
    return float(r2.sel(horizon_step=HORIZON).mean())


def watched(watch: Watch, constant_rate: bool) -> type[training.Trainer]:
    """The trainer that ``fit`` is given: the library's own, looked at on the way."""

    class Watched(training.Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if constant_rate:
                self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)

        def warm_start(self, *args, **kwargs):
            super().warm_start(*args, **kwargs)
            watch.look(self)

        def take_step(self):
            super().take_step()
            if self.step % watch.every == 0 and watch.passed is None:
                watch.look(self)
            if watch.done:
                raise Enough

    return Watched


def run(seed: int, plain: bool, args: argparse.Namespace) -> dict:
    """One fit."""
    recs = pm.simulate.limit_cycles(VELOCITIES, num_trials=args.num_trials, seed=seed)
    train, test = recs.split(test_fraction=0.25, seed=seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        guide = pm.guides.DKF(model)
    if plain:
        options = {"warm_start": False, "learning_rate": 1e-3, "num_steps": args.plain_steps}
        watch = Watch(test, args.target, 5 * args.every, args.plain_seconds)
    else:
        options = {"num_steps": args.num_steps, "warm_start_steps": args.warm_start_steps}
        watch = Watch(test, args.target, args.every, math.inf)
    end = {}
    with mock.patch.object(training, "Trainer", watched(watch, plain)):
        try:
            fit = training.fit(model, guide, train, seed=seed, progress=False, **options)
        except Enough:
            pass
        else:
            end = {"end_seconds": watch.seconds, "end_r2": score(fit, test)}
            end |= {name: float(fit.history.attrs[name]) for name in ("warm_start_seconds", "svi_seconds")}
    step, seconds, _ = watch.passed or (None, None, None)
    result = {"recipe": "plain" if plain else "default", "seed": seed, "target": args.target}
    result |= {"seconds": seconds, "step": step, "scores": watch.scores, **end}
    return result


def line(result: dict) -> str:
    text = f"{result['recipe']:<8} seed {result['seed']}  "
    best = max((r2 for _, _, r2 in result["scores"]), default=math.nan)
    if result["seconds"] is not None:
        where = f"step {result['step']}" if result["step"] else "the warm start"
        text += f"r2 > {result['target']} after {result['seconds']:.1f} s, at {where}"
    elif result["scores"]:
        steps, seconds, _ = result["scores"][-1]
        text += f"not reached, best r2 {best:.3f} after {steps} steps, {seconds:.1f} s"
    else:
        text += "not reached, stopped before it was looked at"
    if "end_r2" in result:
        text += (
            f"; at the end, {result['end_seconds']:.1f} s (warm start {result['warm_start_seconds']:.1f} s), "
        )
        text += f"r2 {result['end_r2']:.4f}"
    return text


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--plain", action="store_true", help="the plain recipe, too")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    parser.add_argument("--target", type=float, default=0.98)
    parser.add_argument(
        "--every", type=int, default=10, help="steps between looks; five times as many if plain"
    )
    parser.add_argument("--num-steps", type=int, default=300, help="of the cycle of the learning rate")
    parser.add_argument("--warm-start-steps", type=int, default=1000)
    parser.add_argument("--num-trials", type=int, default=128)
    parser.add_argument("--plain-steps", type=int, default=2000)
    parser.add_argument(
        "--plain-seconds", type=float, default=600.0, help="where the plain recipe is given up"
    )
    args = parser.parse_args(argv)
    results = []
    for plain in (False, True) if args.plain else (False,):
        for seed in args.seeds:
            results.append(run(seed, plain, args))
            print(line(results[-1]), flush=True)
            write(args.json, results)
    return results


if __name__ == "__main__":
    main()
