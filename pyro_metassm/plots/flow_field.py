"""Pictures of latent dynamics, learned and true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from pyro_metassm import _machine as machine
from pyro_metassm._aligning import AffineMap, align, displacement, mean_embedding, successor, tree_latents
from pyro_metassm.plots import _fields as fields
from pyro_metassm.plots._style import new_axes
from pyro_metassm.result import Fit, check_fit
from pyro_metassm.simulate import flow as true_flow
from pyro_metassm.trees import part

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUBSTEPS = 20  # of the integration over one bin


def flow_field(
    fit: Fit,
    recording: str,
    ax: Axes | None = None,
    lim: float | fields.Limits | None = None,
    *,
    tree: xr.DataTree | None = None,
    align: bool | AffineMap = False,
    plane: tuple[int, int] = (0, 1),
    num_trials: int = 3,
    speed_max: float | None = None,
    colorbar: bool = True,
) -> Axes:
    """Stream lines of the learned dynamics of a recording, ``f_e(z) - z`` at the posterior mean of its
    embedding.

    Drawn only near states that the recording visits (without a tree: that the model's own paths visit).

    Args:
        fit: a fit that knows the recording.
        recording: its name.
        ax: where to draw.
        lim: half the width of the plane around 0, or ``((x0, x1), (y0, y1))``; default the visited states.
        tree: of :func:`pyro_metassm.posterior`; gives the visited states, and the bin width for speeds per s.
        align: draw in the true coordinates of a simulation: the map of :func:`align`, or True to make it from
            the tree.
        plane: the two latents to draw (all others at their mean); not with ``align``.
        num_trials: posterior means of trials to draw on top, with a tree.
        speed_max: upper end of the colours, for pictures beside each other.
        colorbar: add one.

    Returns:
        the axes.

    Raises:
        ValueError: an unknown recording, a single latent, ``align=True`` without a tree of a simulation.
    """
    check_fit(fit)
    if recording not in fit.names:
        raise ValueError(f"flow_field: needed one of the recordings {fit.names}, got {recording!r}")
    aligned = _map(align, tree, recording)
    size = fit.model.latent_dim
    if size < 2 or (aligned is not None and aligned.matrix.shape[1] != 2):
        raise ValueError(f"flow_field: needed two or more latents (and a plane of true ones), got {size}")
    z, width = _rollouts(fit, recording) if tree is None else tree_latents(tree, recording)
    center = np.nanmean(z, axis=(0, 1))

    def derivative(points: np.ndarray) -> np.ndarray:
        """Displacement per bin of points of the plane, in its coordinates."""
        if aligned is not None:
            return displacement(fit, recording, aligned.to_latents(points)) @ aligned.matrix
        states = np.broadcast_to(center, (*points.shape[:-1], size)).copy()
        states[..., list(plane)] = points
        return displacement(fit, recording, states)[..., list(plane)]

    visited = z[..., list(plane)] if aligned is None else aligned.to_truth(z)
    ax = new_axes(ax)
    fields.draw(
        ax, derivative, visited, lim, 1.0 if width is None else width, width is None, speed_max, colorbar
    )
    if tree is not None:
        for path in visited[:num_trials]:
            ax.plot(*path.T, color="black", linewidth=0.8, alpha=0.8)
            ax.plot(*path[0], "o", color="black", markersize=3)
    word, dims = ("latent", plane) if aligned is None else ("true latent", (0, 1))
    ax.set_xlabel(f"{word} {dims[0] + 1}")
    ax.set_ylabel(f"{word} {dims[1] + 1}")
    fitted = "" if aligned is None else f"\nmapped to the truth, $R^2$ = {aligned.r2:.3f}"
    ax.set_title(f"{recording}: learned{fitted}", fontsize="small")
    return ax


def true_flow_field(
    truth: xr.Dataset,
    ax: Axes | None = None,
    lim: float | fields.Limits | None = None,
    *,
    bin_width: float | None = None,
    speed_max: float | None = None,
    colorbar: bool = True,
) -> Axes:
    """Stream lines of the true dynamics of a simulated recording, near the states that it visits.

    Args:
        truth: ``recs.truth[name]`` of a simulation.
        ax: where to draw.
        lim: as for :func:`flow_field`.
        bin_width: in s; the mean speed over a bin, which is what learned dynamics show. None: the speed at an
            instant.
        speed_max, colorbar: as for :func:`flow_field`.

    Returns:
        the axes.

    Raises:
        ValueError: a Dataset of no simulation.

    Example:
        >>> import pyro_metassm as pm
        >>> truth = pm.simulate.limit_cycles([5.0], num_trials=8).truth["w=5"]
        >>> true_flow_field(truth).get_xlabel()
        'true latent 1'
    """
    derivative = _over_a_bin(true_flow(truth), bin_width)
    ax = new_axes(ax)
    fields.draw(ax, derivative, truth["latents"].values, lim, bin_width or 1.0, False, speed_max, colorbar)
    ax.set_xlabel("true latent 1")
    ax.set_ylabel("true latent 2")
    ax.set_title("true", fontsize="small")
    return ax


def flow_comparison(
    fit: Fit,
    tree: xr.DataTree,
    recording: str,
    truth: xr.Dataset,
    axes: Sequence[Axes] | None = None,
    *,
    num_trials: int = 3,
) -> np.ndarray:
    """The learned and the true flow of a simulated recording beside each other: same coordinates, limits and
    colours.

    Args:
        fit: a fit that knows the recording.
        tree: of :func:`pyro_metassm.posterior` of the simulated recordings.
        recording: its name.
        truth: ``recs.truth[recording]``.
        axes: two of them.
        num_trials: posterior means of trials to draw on the learned flow.

    Returns:
        the two axes.

    Raises:
        ValueError: as :func:`align` and :func:`true_flow_field`.
    """
    check_fit(fit)
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharex=True, sharey=True)[1]
    learned, true = axes
    known = align(tree, recording)
    _, width = tree_latents(tree, recording)
    # The truth of the same trials: both pictures are drawn where these have been.
    visited = part(tree, recording, "constant_data")["true_latents"].values
    shown = xr.Dataset({"latents": (("trial", "time", "latent_dim"), visited)}, attrs=truth.attrs)
    lim = fields.limits(None, visited)
    points, near = fields.grid(lim, visited)
    speed = np.linalg.norm(_over_a_bin(true_flow(truth), width)(points[near]), axis=-1) / (width or 1.0)
    top = float(np.quantile(speed, 0.95))
    shared: dict[str, Any] = {"lim": lim, "speed_max": top, "colorbar": False}
    flow_field(fit, recording, learned, tree=tree, align=known, num_trials=num_trials, **shared)
    true_flow_field(shown, true, bin_width=width, **shared)
    figures = {ax.figure for ax in (learned, true)}
    fields.colorbar([learned, true] if len(figures) == 1 else true, top, "s", "max")
    return np.asarray([learned, true], object)


# ---- parts -----------------------------------------------------------------------------------------------


def _map(align_: bool | AffineMap, tree: xr.DataTree | None, recording: str) -> AffineMap | None:
    if not isinstance(align_, bool):
        return align_
    if not align_:
        return None
    if tree is None:
        raise ValueError("flow_field: needed a tree of pm.posterior to align with, got none; pass tree=...")
    return align(tree, recording)


def _rollouts(fit: Fit, recording: str, trials: int = 64, bins: int = 100) -> tuple[np.ndarray, None]:
    """Paths of the model itself, ``(trial, time, latent_dim)``."""
    row = fit.names.index(recording)
    e = mean_embedding(fit, row)
    medians = fit.model.given(fit.guide.global_sites.medians())
    with torch.no_grad(), machine.random_forked(fit.device), medians:
        torch.manual_seed(0)
        dynamics = fit.model.dynamics_of(e, torch.tensor([row], device=fit.device))
        z = [fit.model.initial_state(e).expand((1, trials)).sample().unsqueeze(-2)]
        for _ in range(bins - 1):
            z.append(successor(fit.model, z[-1], dynamics).sample())
    return torch.cat(z, -2)[0].cpu().numpy(), None


def _over_a_bin(derivative: Callable, bin_width: float | None) -> Callable:
    """The displacement in one bin (Runge-Kutta's fourth-order rule), or the derivative itself."""
    if bin_width is None:
        return derivative
    h = bin_width / SUBSTEPS

    def change(points: np.ndarray) -> np.ndarray:
        z = points
        for _ in range(SUBSTEPS):
            first = derivative(z)
            second = derivative(z + h / 2 * first)
            third = derivative(z + h / 2 * second)
            z = z + h / 6 * (first + 2 * second + 2 * third + derivative(z + h * third))
        return z - points

    return change
