"""Pictures of reaches: embeddings, condition-averaged latents, and reaches predicted around an inferred embedding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pyro_metassm import _machine as machine
from pyro_metassm import metrics, plots
from pyro_metassm.draws import observation, posterior_chunks
from pyro_metassm.experiments import pooling, report
from pyro_metassm.experiments.pooling_settings import Plan, Setting
from pyro_metassm.experiments.recorded import conditions
from pyro_metassm.plots._style import PALETTE
from pyro_metassm.posterior import posterior
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

GRID = (-1.0, 0.0, 1.0)  # half the spread of the known embeddings, about the inferred one
TRIALS = 64


def draw(recs: Recordings, plans: Sequence[Plan], setting: Setting, seed: int, out: Path) -> dict[str, str]:
    """Embeddings and latents of the first plan, interpolated embeddings of each; captions by the names of the files."""
    import matplotlib.pyplot as plt

    plan, shots = plans[0], max(setting.shots)
    fit = pooling.adapted_fit(out, plan, seed, shots)
    train, test = recs.split(setting.test_fraction, seed=0)
    shown = Recordings([r.take(np.arange(min(TRIALS, r.num_trials))) for r in test.values()])
    tree = posterior(fit, shown, num_samples=setting.num_samples)
    captions = {}
    figure, ax = plt.subplots(figsize=(6, 5), layout="constrained")
    subjects = {name: recs[name].attrs.get("subject", "unknown").split(" (")[0] for name in recs}
    plots.embedding(tree, ax=ax, color=subjects)
    report.save_figure(figure, out / "embedding.png")
    captions["embedding.png"] = (
        f"Embeddings by recording; {', '.join(plan.held_out)} adapted with {shots} trials"
    )

    figure, axes = plt.subplots(
        1, len(recs), figsize=(3.6 * len(recs), 3.6), squeeze=False, layout="constrained"
    )
    for ax, name in zip(axes[0], recs, strict=True):
        averaged_latents(tree, shown, name, ax)
    report.save_figure(figure, out / "latents.png")
    captions["latents.png"] = (
        "Latents of test trials averaged by condition (a colour each), in their first two principal components; "
        "dots are the first bins"
    )

    for plan in plans:
        name = plan.held_out[0]
        if recs[name].behavior is None or setting.embedding_dim < 2:
            continue
        figure = interpolation(pooling.adapted_fit(out, plan, seed, shots), train, test, name, setting)
        file = f"interpolation-{plan.name}.png"
        report.save_figure(figure, out / file)
        captions[file] = (
            f"{name}: reaches decoded from forecasts, by condition, on a grid of embeddings around the "
            "inferred one (centre)"
        )
    return captions


def colors_of(number: int) -> list:
    """A colour for each condition; around the circle where there are more than the palette has."""
    from matplotlib import colormaps

    return (
        list(PALETTE[:number])
        if number <= len(PALETTE)
        else list(colormaps["hsv"](np.arange(number) / number))
    )


def averaged_latents(tree, shown: Recordings, name: str, ax) -> None:
    """Condition averages of the posterior mean latents, in the plane in which these vary most."""
    latents = tree[name]["posterior"]["latents"].mean(("chain", "draw")).values
    of = conditions(shown[name])
    exists = np.isfinite(latents).all(-1)
    paths = []
    for condition in np.unique(of):
        rows = of == condition
        bins = exists[rows].mean(0) >= 0.5  # where half of the trials still run
        paths.append(np.nanmean(latents[rows][:, bins], 0))
    every = np.concatenate(paths)
    _, _, axes = np.linalg.svd(every - every.mean(0), full_matrices=False)
    plane = axes[: min(2, len(axes))].T
    for path, color in zip(paths, colors_of(len(paths)), strict=True):
        x = (path - every.mean(0)) @ plane
        ax.plot(*x.T[:2], color=color)
        ax.plot(*x.T[:2, :1], marker="o", markersize=4, color=color)
    ax.set_title(name, fontsize="small")
    ax.set_xlabel("PC 1")
    ax.set_ylabel("PC 2")


@machine.alone()
def forecast_with(
    fit: Fit,
    recs: Recordings,
    name: str,
    rows: list[int],
    shift: np.ndarray,
    context: int,
    horizon: int,
    num_samples: int,
) -> np.ndarray:
    """Mean forecasts ``(trial, horizon, neuron)`` with the embedding moved by ``shift (embedding_dim,)``.

    The states at the end of the context are those of the embedding as inferred; what moves is the dynamics.
    """
    total = np.zeros((len(rows), horizon, recs[name].num_neurons))
    position = {trial: row for row, trial in enumerate(rows)}
    for chunk in posterior_chunks(fit, recs, name, num_samples, 0, None, rows, context, horizon):
        prior = fit.model.path_prior(
            chunk.embedding + torch.as_tensor(shift).to(chunk.embedding), chunk.batch
        )
        z, path = chunk.latents[..., -1:, :], []
        for step in range(horizon):
            z = prior.into(slice(step, step + 1), z).sample()
            path.append(z)
        mean = observation(fit.model, torch.cat(path, -2), chunk.batch).mean[:, 0]
        total[[position[int(trial)] for trial in chunk.trials]] += mean.double().sum(0).cpu().numpy()
    return total / num_samples


def interpolation(fit: Fit, train: Recordings, test: Recordings, name: str, setting: Setting):
    """A grid of embeddings around the inferred one: the hand's path by condition, decoded from forecasts (figure 7)."""
    import matplotlib.pyplot as plt

    recording, behavior = test[name], train[name].behavior
    if behavior is None:
        raise ValueError(f"recording {name!r}: needed behaviour to decode, got none")
    learned = metrics.mean_rates(fit, train, name, setting.num_samples)
    decode = metrics.velocity_decoder(learned, behavior[..., :2])
    rows = np.flatnonzero(recording.lengths > setting.context).tolist()
    of = conditions(recording)[rows]
    known = fit.statistics[:, : fit.model.embedding_dim].numpy()
    half = np.maximum(0.5 * np.ptp(known, axis=0), 0.25)
    size = len(GRID)
    figure, axes = plt.subplots(
        size, size, figsize=(3 * size, 3 * size), sharex=True, sharey=True, layout="constrained"
    )
    for row, up in zip(axes, reversed(GRID), strict=True):
        for ax, right in zip(row, GRID, strict=True):
            shift = np.zeros(fit.model.embedding_dim, np.float32)
            shift[:2] = np.array([right, up]) * half[:2]
            rates = forecast_with(
                fit, test, name, rows, shift, setting.context, setting.horizon, setting.num_samples
            )
            velocity = decode(rates)
            for condition, color in zip(np.unique(of), colors_of(len(np.unique(of))), strict=True):
                path = np.cumsum(velocity[of == condition].mean(0), 0) * recording.bin_width
                path = np.concatenate([np.zeros((1, 2)), path])
                ax.plot(*path.T, color=color)
            ax.set_title(f"e + ({shift[0]:.2f}, {shift[1]:.2f})", fontsize="small")
            ax.set_aspect("equal", adjustable="box")
    for ax in axes[-1]:
        ax.set_xlabel("decoded x")
    for ax in axes[:, 0]:
        ax.set_ylabel("decoded y")
    (left, right), (bottom, top) = axes[0, 0].get_xlim(), axes[0, 0].get_ylim()
    flat = min(1, (top - bottom) / (right - left))
    figure.set_figheight(size * (0.5 + 3 * flat))  # no gaps between rows of panels
    return figure
