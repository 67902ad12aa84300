"""Fitting files: recordings in, held-out scores, posterior, forecasts and pictures out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pyro_metassm import likelihoods, metrics, saving
from pyro_metassm.experiments import reading, report
from pyro_metassm.guides import DKF
from pyro_metassm.likelihoods.base import is_family
from pyro_metassm.models import MetaSSM
from pyro_metassm.observations import counted
from pyro_metassm.posterior import forecast, posterior
from pyro_metassm.recordings import Recordings
from pyro_metassm.reporting.scoring import simple_forecasts
from pyro_metassm.result import Fit
from pyro_metassm.training import fit

FAMILIES: dict[str, type[likelihoods.Likelihood]] = {
    re.sub("(?<=[a-z])(?=[A-Z])", "-", name).lower(): family
    for name, family in vars(likelihoods).items()
    if is_family(family)
}
"""The families that can be asked for on the command line: classes by their names, ``negative-binomial`` for one."""


def run(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    bins: Mapping[str, Any] | None = None,
    latent_dim: int = 8,
    embedding_dim: int = 2,
    rank: int = 2,
    likelihood: str | None = None,
    num_steps: int = 1000,
    trials_per_step: int = 32,
    learning_rate: float = 1e-2,
    kl_warmup_steps: int = 0,
    test_fraction: float = 0.25,
    context: int | None = None,
    num_samples: int = 25,
    save_trials: int = 16,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> dict:
    """Fit recordings from files together and write what was found.

    Args:
        files: ``.npz``, xarray netCDF or ``.nwb`` files of one recording each, or ``.zarr`` (:mod:`pyro_metassm.io`).
        out: folder to write into.
        bins: how NWB files are binned: arguments of :func:`pyro_metassm.read_nwb`.
        latent_dim, embedding_dim, rank: sizes of the model.
        likelihood: name of a family of ``pyro_metassm.likelihoods``, such as "negative-binomial" or "gamma"; None:
            Poisson for counts, else Gaussian.
        num_steps, trials_per_step, learning_rate, kl_warmup_steps: of SVI.
        test_fraction: share of each recording's trials held out; all scores are theirs.
        context: bins given to forecasts; None: half of the usual length of a trial (the
            shortest median of a recording); shorter trials are not forecast, and counted in a warning.
        num_samples: posterior draws written.
        save_trials: held-out trials of each recording whose draws are written (scores use all of them).
        seed: of the split, the fit and the draws.
        device: "cpu", "cuda" or "auto".
        progress: show progress bars.

    Returns:
        what ``metrics.json`` holds.

    Raises:
        ValueError: files that cannot be read, a family that is not there, or data that it cannot have produced.
    """
    if likelihood is not None and likelihood not in FAMILIES:
        raise ValueError(f"likelihood: needed one of {', '.join(sorted(FAMILIES))}, got {likelihood!r}")
    out = report.folder(out)
    seconds: dict[str, float] = {}
    with report.timed(seconds, "read"):
        recs = reading.recordings(files, bins)
        recs.summary()  # warns of what will hurt
        train, test = recs.split(test_fraction=test_fraction, seed=seed)
    family = FAMILIES[likelihood] if likelihood else likelihood_of(recs)
    with report.timed(seconds, "fit"):
        model = MetaSSM(
            recs, latent_dim=latent_dim, embedding_dim=embedding_dim, rank=rank, likelihood=family
        )
        result = fit(
            model,
            DKF(model),
            train,
            num_steps=num_steps,
            trials_per_step=trials_per_step,
            learning_rate=learning_rate,
            kl_warmup_steps=kl_warmup_steps,
            seed=seed,
            device=device,
            progress=progress,
        )
        result.save(out / "fit")
    context = max(1, usual_length(test) // 2) if context is None else context
    horizon = max(1, max(r.num_bins for r in test.values()) - context)
    shown = Recordings([r.take(np.arange(min(save_trials, r.num_trials))) for r in test.values()])
    with report.timed(seconds, "posterior"):
        tree = posterior(result, shown, num_samples=num_samples, seed=seed)
        report.write_tree(tree, out / "posterior.nc")
    with report.timed(seconds, "forecast"):
        ahead = forecast(result, shown, context=context, horizon=horizon, num_samples=num_samples, seed=seed)
        report.write_tree(ahead, out / "forecast.nc")
    with report.timed(seconds, "scores"):
        numbers = scores(
            result, train, test, context=context, horizon=horizon, num_samples=num_samples, seed=seed
        )
        numbers["simple_forecasts"] = simple_forecasts(
            result, train, test, context=context, horizon=horizon, steps=_steps(horizon)
        )
    numbers |= {
        "elbo": float(result.history["elbo"][-20:].mean()),
        "seed": seed,
        "test_fraction": test_fraction,
        "context": context,
        "horizon": horizon,
    }
    numbers["trials_written"] = {name: r.num_trials for name, r in shown.items()}
    with report.timed(seconds, "pictures"):
        _pictures(result, tree, ahead, test.names, context, out)
    return report.write_metrics(numbers | {"likelihood": family.__name__, "seconds": seconds}, out)


def likelihood_of(recs: Recordings) -> type[likelihoods.Likelihood]:
    """The family of observations where none is asked for: Poisson if all are counts, else Gaussian."""
    counts = all(recording.has_counts for recording in recs.values())
    return likelihoods.Poisson if counts else likelihoods.Gaussian


def usual_length(recs: Recordings) -> int:
    """Bins of a usual trial: the shortest median of a recording."""
    return min(int(np.median(recording.lengths)) for recording in recs.values())


def load_fit(run: str | Path, device: str = "cpu") -> Fit:
    """The fit in a folder that :func:`run` or ``Fit.save`` wrote."""
    path = Path(run) / "fit" if (Path(run) / "fit").is_dir() else Path(run)
    return saving.load(path, device=device)


def scores(
    result: Fit,
    train: Recordings,
    test: Recordings,
    *,
    context: int,
    horizon: int,
    num_samples: int,
    seed: int,
) -> dict:
    """What a fit is worth on test trials: scores by name, ``forecast_r2`` by steps ahead, each by recording.

    What the likelihood has as counts (or events) is scored in bits per spike as well, held-out neurons and behaviour
    where there are any; the null model of ``bits_per_spike`` and ``co_bps`` and the decoder of behaviour are made from
    ``train``.
    """
    draws: dict[str, Any] = {"num_samples": num_samples, "seed": seed}
    curve = metrics.forecast_r2(result, test, context=context, horizon=horizon, **draws)
    steps = _steps(horizon)
    numbers: dict = {
        "reconstruction_r2": report.by_recording(metrics.reconstruction_r2(result, test, **draws)),
        "forecast_r2": {str(k): report.by_recording(curve.sel(horizon_step=k)) for k in steps},
    }
    spiking = {name: counted(result.model, name) for name in test}
    if spikes := [name for name, each in spiking.items() if each.any()]:
        bps = metrics.rate_bps(result, test.select(spikes), null=train, **draws)
        ahead = metrics.fp_bps(result, test.select(spikes), context=context, horizon=horizon, **draws)
        numbers["bits_per_spike"] = report.by_recording(bps)
        numbers["forecast_bits_per_spike"] = report.by_recording(ahead)
        held_out = [name for name in spikes if (test[name].held_out_neurons & spiking[name]).any()]
        if held_out:
            co_smoothing = metrics.co_bps(result, test.select(held_out), null=train, **draws)
            numbers["co_bps"] = report.by_recording(co_smoothing)
    moving = [
        n
        for n, r in test.items()
        if r.behavior is not None and np.isfinite(r.behavior[..., :2]).any((0, 1)).all()
    ]
    if moving:  # the first two dims of the behaviour are the velocity, by the format of the files
        velocity = metrics.decoding_r2(
            result, train.select(moving), test.select(moving), dims=(0, 1), **draws
        )
        numbers["velocity_r2"] = report.by_recording(velocity)
    return numbers


def _steps(horizon: int) -> list[int]:
    """The steps ahead that are written."""
    return sorted({k for k in (1, 2, 5, 10, 20, 30, 50) if k < horizon} | {horizon})


def _pictures(result, tree, ahead, names, context: int, out: Path) -> None:
    import matplotlib.pyplot as plt

    from pyro_metassm import plots

    figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    plots.embedding(tree, ax=ax)
    report.save_figure(figure, out / "embedding.png")
    report.save_figure(plots.trace_panels(ahead, tree, names, context=context), out / "traces.png")
    figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    plots.history(result, ax=ax)
    report.save_figure(figure, out / "history.png")
