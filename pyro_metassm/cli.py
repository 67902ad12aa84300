"""The command line: ``metassm demo``, ``fit``, ``forecast``, ``adapt``, ``report``, ``experiment``."""

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

    fit = commands.add_parser("fit", help="fit recordings from .npz, netCDF, .zarr or .nwb files together")
    fit.add_argument("files", nargs="+", metavar="FILE")
    fit.add_argument("--out", required=True, help="folder to write into")
    fit.add_argument("--latent-dim", type=int, default=8)
    fit.add_argument("--embedding-dim", type=int, default=2)
    fit.add_argument("--rank", type=int, default=2)
    fit.add_argument(
        "--likelihood",
        metavar="FAMILY",
        help="a family of pyro_metassm.likelihoods in lower case: poisson, negative-binomial, zero-inflated-gamma, "
        "... (default: poisson for counts, else gaussian)",
    )
    fit.add_argument("--steps", type=int, default=1000, dest="num_steps")
    fit.add_argument("--trials-per-step", type=int, default=32)
    fit.add_argument("--learning-rate", type=float, default=1e-2)
    fit.add_argument(
        "--kl-warmup-steps",
        type=int,
        default=0,
        help="steps until divergences have their weight; four fifths "
        "of all for counts in bins of 10 or 20 ms (default: 0)",
    )
    fit.add_argument("--test-fraction", type=float, default=0.25)
    fit.add_argument("--context", type=int, help="bins given to forecasts (default: half of the usual trial)")
    fit.add_argument("--num-samples", type=int, default=25, help="posterior draws written")
    fit.add_argument("--save-trials", type=int, default=16, help="held-out trials of each recording written")
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--device", default="auto")
    _add_bins(fit)
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
    _add_bins(forecast)
    forecast.set_defaults(command=_forecast)

    adapt = commands.add_parser("adapt", help="adapt a saved fit to recordings that it does not know")
    adapt.add_argument("run", help="folder that `metassm fit` or Fit.save wrote")
    adapt.add_argument("new", nargs="+", metavar="FILE")
    adapt.add_argument("--out", required=True, help="folder to write into")
    adapt.add_argument(
        "--trials", type=int, default=8, dest="num_trials", help="adapt from 1, 2, 4, ... of so many trials"
    )
    adapt.add_argument(
        "--steps", type=int, default=None, dest="num_steps", help="steps of SVI (default: 50, of counts 500)"
    )
    adapt.add_argument(
        "--train",
        nargs="+",
        choices=("read_in", "read_out", "embedding"),
        default=("read_in", "read_out"),
        help="parts of a new recording to train (default: read_in read_out)",
    )
    adapt.add_argument(
        "--test-fraction",
        type=float,
        help="share of the trials to score on (default: the others, at most 128)",
    )
    adapt.add_argument(
        "--context", type=int, help="bins given to forecasts (default: half of the usual trial)"
    )
    adapt.add_argument("--horizon", type=int, help="bins forecast (default: up to the usual trial's end)")
    adapt.add_argument(
        "--scratch-steps", type=int, default=300, help="steps of the model from scratch (0: without it)"
    )
    adapt.add_argument("--num-samples", type=int, default=25, help="posterior draws written")
    adapt.add_argument("--save-trials", type=int, default=16, help="test trials of each recording written")
    adapt.add_argument("--seed", type=int, default=0)
    adapt.add_argument("--device", default="auto")
    _add_bins(adapt)
    adapt.set_defaults(command=_adapt)

    report = commands.add_parser(
        "report", help="write one HTML page of a saved fit: scores, map, every recording"
    )
    report.add_argument("run", help="folder that `metassm fit`, `adapt`, `demo` or Fit.save wrote")
    report.add_argument("--out", default="report.html", help="file to write (default: report.html)")
    report.add_argument(
        "--data",
        nargs="+",
        default=(),
        metavar="FILE",
        help="the recordings, for scores beside simple predictions (default: the trials that the run wrote)",
    )
    report.add_argument("--context", type=int, help="bins given to forecasts (default: as the run)")
    report.add_argument("--horizon", type=int, help="bins forecast (default: as the run)")
    report.add_argument("--num-samples", type=int, default=20, help="posterior draws of trials")
    report.add_argument("--num-draws", type=int, default=20, help="posterior draws of embeddings")
    report.add_argument("--seed", type=int, default=0)
    _add_bins(report)
    report.set_defaults(command=_report)

    experiment = commands.add_parser(
        "experiment", help="do a study of simulated or real recordings, or go on with it"
    )
    experiments = experiment.add_subparsers(required=True, metavar="NAME")
    for name, text in (
        ("bifurcations", "Duffing and Hopf oscillators: all methods, adapted to unseen ones from few trials"),
        ("limit_cycles", "cycles of different speed, two recordings and twenty: ours and shared dynamics"),
        ("harder", "counts, more noise, too many latents, chaos; the way from the paper's recipe to ours"),
    ):
        one = experiments.add_parser(name, help=text)
        one.add_argument("--out", help=f"folder to write into (default: {name}, or {name}-small)")
        one.add_argument("--seeds", type=int, nargs="+", default=[0], help="the tables are over all of them")
        one.add_argument("--small", action="store_true", help="a small version of everything")
        one.add_argument("--workers", type=int, default=1, help="processes at work, a thread each")
        if name == "harder":
            one.add_argument("--parts", nargs="+", help="default: all")
        else:
            one.add_argument(
                "--methods", nargs="+", dest="names", metavar="METHOD", help="default: those of the study"
            )
        if name != "limit_cycles":
            one.add_argument("--held-out-seed", type=int, default=1000, help="of the unseen recordings")
        one.set_defaults(command=_experiment, name=name)
    for name, text in (
        ("reaching", "real reaches: pool recordings of monkeys, adapt to an unseen one, decode the hand"),
        ("decisions", "real decisions: pool recordings of mice (Neuropixels), adapt to unseen ones"),
    ):
        one = experiments.add_parser(name, help=text)
        one.add_argument(
            "--data", metavar="FOLDER", help="with the recordings; without it: where public ones are"
        )
        one.add_argument("--out", help=f"folder to write into (default: {name}, or {name}-small)")
        one.add_argument("--seeds", type=int, nargs="+", default=[0], help="the tables are over all of them")
        one.add_argument("--small", action="store_true", help="fewer trials, neurons and steps")
        one.set_defaults(command=_experiment, name=name)
    return parser


def _add_bins(parser: argparse.ArgumentParser) -> None:
    """How NWB files are binned: the arguments of `read_nwb`."""
    group = parser.add_argument_group("NWB files")
    group.add_argument("--bin-width", type=float, help="seconds; needed for .nwb files")
    group.add_argument("--align-to", metavar="COLUMN", help="column of the trials (default: start_time)")
    group.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("START", "STOP"),
        help="seconds around it (default: whole trials)",
    )
    group.add_argument("--lag", type=float, help="seconds by which behavior follows (default: 0)")
    group.add_argument("--behavior", nargs="+", metavar="SERIES", help="such as Velocity/cursor_vel")
    group.add_argument(
        "--where", nargs="+", metavar="COLUMN=VALUE", help="trials to take; a,b for several values"
    )
    group.add_argument("--units", nargs="+", metavar="COLUMN=VALUE", help="units to take")
    group.add_argument("--condition", nargs="+", metavar="COLUMN", help="columns of the trials")


def _bins(options: dict) -> dict:
    """The arguments of `read_nwb` among the options, which lose them."""
    keys = ("bin_width", "align_to", "window", "lag", "behavior", "where", "units", "condition")
    bins = {key: value for key in keys if (value := options.pop(key)) is not None}
    for key in ("where", "units"):
        if key in bins:
            bins[key] = dict(_choice(text) for text in bins[key])
    if "window" in bins:
        bins["window"] = tuple(bins["window"])
    if len(bins.get("condition", ())) == 1:
        (bins["condition"],) = bins["condition"]
    return bins


def _choice(text: str) -> tuple[str, list]:
    """`COLUMN=a,b` as the column and its values, numbers and truth values as such."""
    column, sign, values = text.partition("=")
    if not (column and sign and values):
        raise ValueError(f"{text}: needed COLUMN=VALUE, or COLUMN=VALUE,VALUE")
    found: list = []
    for value in values.split(","):
        known = {"true": True, "false": False}.get(value.lower())
        try:
            found += [float(value), value] if known is None else [known, value]
        except ValueError:
            found.append(value)
    return column, found


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

    bins = _bins(options)
    numbers = experiment.run(files, out, bins=bins, **options)
    last = max(numbers["forecast_r2"], key=int)
    numbers[label := f"forecast_r2, {last} bins ahead"] = numbers["forecast_r2"][last]
    for score in (
        "reconstruction_r2",
        label,
        "bits_per_spike",
        "forecast_bits_per_spike",
        "co_bps",
        "velocity_r2",
    ):
        for name, value in numbers.get(score, {}).items():
            print(f"{score:26}{name:40}{value:>9.4f}")
    print(f"fitted in {numbers['seconds']['fit']:.0f} s; results and pictures in {out}/")


def _forecast(run: str, files, out: str, **options) -> None:
    from pathlib import Path

    from pyro_metassm.experiments import reading, report
    from pyro_metassm.experiments.files import load_fit
    from pyro_metassm.posterior import forecast

    recs = reading.recordings(files, _bins(options))
    report.write_tree(forecast(load_fit(run), recs, **options), Path(out))
    print(f"forecasts of {len(recs)} recordings in {out}")


def _adapt(run: str, new, out: str, **options) -> None:
    from pyro_metassm.experiments import adapting, adapting_report

    bins = _bins(options)
    numbers = adapting.run(run, new, out, bins=bins, **options)
    print("\n".join(adapting_report.lines(numbers)))
    seconds = numbers["seconds"]
    beside = f", from scratch in {seconds['scratch']:.0f} s" if "scratch" in seconds else ""
    print(f"adapted in {seconds['adapt']:.0f} s{beside}; results and pictures in {out}/")


def _report(run: str, out: str, **options) -> None:
    from pyro_metassm.experiments import runs

    path = runs.write_page(run, out, bins=_bins(options), **options)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, for any browser")


def _experiment(name: str, out: str | None, small: bool, **options) -> None:
    import importlib
    from functools import partial

    run = importlib.import_module(f"pyro_metassm.experiments.{name}").run
    run(out or (f"{name}-small" if small else name), small=small, say=partial(print, flush=True), **options)
