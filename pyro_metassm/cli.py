"""The command line: ``metassm demo``, ``fit``, ``forecast`` (also ``python -m pyro_metassm``)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for input that cannot be used, with one line that says why)."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    try:
        command(**options)
    except (ValueError, OSError) as error:
        print(f"metassm: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metassm", description="Meta-dynamical state space models of many recordings."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="simulate four limit cycles, fit, forecast, draw pictures")
    demo.add_argument("--out", default="demo", help="folder to write into (default: demo)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--steps", type=int, default=300, dest="num_steps", help="steps of SVI after the warm start"
    )
    demo.add_argument(
        "--trials", type=int, default=128, dest="num_trials", help="trials simulated of each recording"
    )
    demo.set_defaults(command=_demo)

    fit = commands.add_parser("fit", help="fit recordings from .npz or netCDF files together")
    fit.add_argument("files", nargs="+", metavar="FILE")
    fit.add_argument("--out", required=True, help="folder to write into")
    fit.add_argument("--latent-dim", type=int, default=8)
    fit.add_argument("--embedding-dim", type=int, default=2)
    fit.add_argument("--rank", type=int, default=2)
    fit.add_argument(
        "--likelihood", choices=("gaussian", "poisson", "negative-binomial"), help="default: by the data"
    )
    fit.add_argument("--steps", type=int, default=1000, dest="num_steps")
    fit.add_argument("--trials-per-step", type=int, default=32)
    fit.add_argument("--learning-rate", type=float, default=1e-2)
    fit.add_argument("--test-fraction", type=float, default=0.25)
    fit.add_argument("--context", type=int, help="bins given to forecasts (default: half of the usual trial)")
    fit.add_argument("--num-samples", type=int, default=25, help="posterior draws written")
    fit.add_argument("--save-trials", type=int, default=16, help="held-out trials of each recording written")
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--device", default="auto")
    fit.set_defaults(command=_fit)

    forecast = commands.add_parser(
        "forecast", help="forecast trials in files with a saved fit that knows them"
    )
    forecast.add_argument("run", help="folder that `metassm fit` or Fit.save wrote")
    forecast.add_argument("files", nargs="+", metavar="FILE")
    forecast.add_argument("--out", required=True, help="netCDF file to write")
    forecast.add_argument("--context", type=int, required=True, help="bins given")
    forecast.add_argument("--horizon", type=int, required=True, help="bins forecast")
    forecast.add_argument("--num-samples", type=int, default=25)
    forecast.add_argument("--seed", type=int, default=0)
    forecast.set_defaults(command=_forecast)
    return parser


# The commands import what they need when they run: `metassm --help` answers at once.


def _demo(out: str, **options) -> None:
    from pyro_metassm.experiments import demo

    numbers = demo.run(out, **options)
    print(
        f"\n{'recording':12}{'reconstruction':>16}"
        + "".join(f"{'k = ' + k:>10}" for k in numbers["forecast_r2"])
    )
    for name, value in numbers["reconstruction_r2"].items():
        row = "".join(f"{scores[name]:>10.4f}" for scores in numbers["forecast_r2"].values())
        print(f"{name:12}{value:>16.4f}{row}")
    print(f"fitted in {numbers['seconds']['fit']:.0f} s; results and pictures in {out}/")


def _fit(files, out: str, **options) -> None:
    from pyro_metassm.experiments import files as experiment

    numbers = experiment.run(files, out, **options)
    for score in ("reconstruction_r2", "bits_per_spike", "forecast_bits_per_spike", "velocity_r2"):
        for name, value in numbers.get(score, {}).items():
            print(f"{score:26}{name:40}{value:>9.4f}")
    print(f"fitted in {numbers['seconds']['fit']:.0f} s; results and pictures in {out}/")


def _forecast(run: str, files, out: str, **options) -> None:
    from pathlib import Path

    from pyro_metassm import io, saving
    from pyro_metassm.experiments import report
    from pyro_metassm.posterior import forecast
    from pyro_metassm.recordings import Recordings

    path = Path(run) / "fit" if (Path(run) / "fit").is_dir() else Path(run)
    recs = Recordings([io.read(file) for file in files])
    report.write_tree(forecast(saving.load(path), recs, **options), Path(out))
    print(f"forecasts of {len(recs)} recordings in {out}")
