"""The demo: four limit cycles of two speeds, from simulated recordings to forecasts and pictures (paper, 5.1)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pyro_metassm import metrics, simulate
from pyro_metassm.experiments import report
from pyro_metassm.guides import DKF
from pyro_metassm.models import MetaSSM
from pyro_metassm.posterior import forecast, posterior
from pyro_metassm.recordings import Recordings
from pyro_metassm.training import fit

VELOCITIES = (-5.0, -2.5, 2.5, 5.0)
CONTEXT, HORIZON = 50, 50
STEPS = (1, 10, 30, 50)
SHOWN = 8  # held-out trials of each recording whose draws are written


def run(
    out: str | Path, *, seed: int = 0, num_steps: int = 300, num_trials: int = 128, progress: bool = True
) -> dict:
    """Simulate, fit, forecast held-out trials, write results and pictures.

    The sign of a velocity is not in the data: mirroring latents and read-out leaves every observation as it was. So
    the embedding is compared with the speed, ``|velocity|``.

    Args:
        out: folder to write ``fit/``, ``posterior.nc``, ``forecast.nc``, ``metrics.json`` and the pictures into.
        seed: of the simulation, the split and the fit.
        num_steps: steps of SVI after the warm start.
        num_trials: trials simulated of each recording; a quarter is held out.
        progress: show progress bars.

    Returns:
        what ``metrics.json`` holds.
    """
    out = report.folder(out)
    seconds: dict[str, float] = {}
    with report.timed(seconds, "simulate"):
        recs = simulate.limit_cycles(VELOCITIES, num_trials=num_trials, seed=seed)
        train, test = recs.split(test_fraction=0.25, seed=seed)
    with report.timed(seconds, "fit"):
        model = MetaSSM(recs, latent_dim=2, embedding_dim=1)
        result = fit(model, DKF(model), train, num_steps=num_steps, seed=seed, progress=progress)
    with report.timed(seconds, "posterior"):
        # The scores use all of them.
        shown = test.take_trials(min(SHOWN, test[test.names[0]].num_trials), seed=seed)
        tree = posterior(result, shown, num_samples=50, seed=seed)
    with report.timed(seconds, "forecast"):
        ahead = forecast(result, shown, context=CONTEXT, horizon=HORIZON, num_samples=50, seed=seed)
        score = metrics.forecast_r2(result, test, context=CONTEXT, horizon=HORIZON, seed=seed)
    with report.timed(seconds, "write"):
        result.save(out / "fit")
        report.write_tree(tree, out / "posterior.nc")
        report.write_tree(ahead, out / "forecast.nc")
    # Parts of "fit".
    seconds |= {phase: result.history.attrs[f"{phase}_seconds"] for phase in ("warm_start", "svi")}
    numbers = {
        "forecast_r2": {str(k): report.by_recording(score.sel(horizon_step=k)) for k in STEPS},
        "reconstruction_r2": report.by_recording(metrics.reconstruction_r2(result, test, seed=seed)),
        "elbo": float(result.history["elbo"][-20:].mean()),
        "embedding": {n: result.statistics[i, :1].tolist() for i, n in enumerate(result.names)},
        "speed": {name: abs(velocity) for name, velocity in zip(recs.names, VELOCITIES, strict=True)},
        "seed": seed,
    }
    with report.timed(seconds, "pictures"):
        _pictures(result, recs, tree, ahead, score, out)
    return report.write_metrics(numbers | {"seconds": seconds}, out)


def _pictures(result, recs: Recordings, tree, ahead, score, out: Path) -> None:
    import matplotlib.pyplot as plt

    from pyro_metassm import plots

    figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    speed = {name: recs.truth[name].attrs["speed"] for name in recs.names}
    plots.embedding(tree, ax=ax, against=speed)
    ax.set_xlabel("true speed |w| (rad/s)")
    report.save_figure(figure, out / "embedding.png")

    figure = plots.trace_panels(ahead, tree, recs.names, context=CONTEXT)
    report.save_figure(figure, out / "traces.png")

    figure, axes = plt.subplots(2, len(recs), figsize=(3.2 * len(recs), 6), layout="constrained")
    for column, name in zip(axes.T, recs.names, strict=True):
        plots.flow_comparison(result, tree, name, recs.truth[name], axes=column)
    report.save_figure(figure, out / "flow.png")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    plots.history(result, ax=left)
    plots.forecast_curve(score, ax=right)
    right.set_ylim(min(0.9, float(np.nanmin(score))), 1.0)
    report.save_figure(figure, out / "history.png")
