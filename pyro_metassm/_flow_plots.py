"""Pictures of latent dynamics, learned and true (public in `pyro_metassm.plots`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr

from pyro_metassm import _machine as machine
from pyro_metassm.result import Fit
from pyro_metassm.simulate import flow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID = 25  # points along each side
SUBSTEPS = 20  # of the integration over one bin
Limits = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class AffineMap:
    """Between learned and true latents, which agree up to an affine map at best.

    ``truth = latents @ matrix + offset``, and back ``latents = truth @ back_matrix + back_offset``; ``r2``
    says how well the true latents are met.
    """

    matrix: np.ndarray
    offset: np.ndarray
    back_matrix: np.ndarray
    back_offset: np.ndarray
    r2: float

    def to_truth(self, latents: np.ndarray) -> np.ndarray:
        """``(..., latent_dim)`` to ``(..., truth_dim)``."""
        return latents @ self.matrix + self.offset

    def to_latents(self, truth: np.ndarray) -> np.ndarray:
        """``(..., truth_dim)`` to ``(..., latent_dim)``."""
        return truth @ self.back_matrix + self.back_offset


def align(tree: xr.DataTree, recording: str) -> AffineMap:
    """The affine map from a recording's posterior mean latents to its true latents, by least squares.

    Args:
        tree: of :func:`pyro_metassm.posterior` of simulated recordings (with ``constant_data/true_latents``).
        recording: its name.

    Returns:
        the map. With as many latents as true ones its back is the exact inverse, else a regression of its
        own.

    Raises:
        ValueError: a recording that the tree lacks, or one without true latents.
    """
    z, _ = _latents(tree, recording)
    constant = part(tree, recording, "constant_data")
    if "true_latents" not in constant:
        raise ValueError(
            f"align: needed the true latents of recording {recording!r} in the tree, got none; they come "
            "with pm.posterior of simulated recordings"
        )
    z, truth = (
        z.reshape(-1, z.shape[-1]),
        constant["true_latents"].values.reshape(-1, constant.sizes["truth_dim"]),
    )
    known = np.isfinite(z).all(1) & np.isfinite(truth).all(1)
    z, truth = z[known].astype(np.float64), truth[known].astype(np.float64)
    matrix, offset = _regression(z, truth)
    if z.shape[1] == truth.shape[1]:
        back_matrix = np.linalg.inv(matrix)
        back_offset = -offset @ back_matrix
    else:
        back_matrix, back_offset = _regression(truth, z)
    error = ((truth - z @ matrix - offset) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum()
    return AffineMap(matrix, offset, back_matrix, back_offset, float(1 - error))


def flow_field(
    fit: Fit,
    recording: str,
    ax: Axes | None = None,
    lim: float | Limits | None = None,
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
    if recording not in fit.names:
        raise ValueError(f"flow_field: needed one of the recordings {fit.names}, got {recording!r}")
    aligned = _map(align, tree, recording)
    size = fit.model.latent_dim
    if size < 2 or (aligned is not None and aligned.matrix.shape[1] != 2):
        raise ValueError(f"flow_field: needed two or more latents (and a plane of true ones), got {size}")
    z, width = _rollouts(fit, recording) if tree is None else _latents(tree, recording)
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
    _draw(ax, derivative, visited, lim, 1.0 if width is None else width, width is None, speed_max, colorbar)
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
    lim: float | Limits | None = None,
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
    derivative = _over_a_bin(flow(truth), bin_width)
    ax = new_axes(ax)
    _draw(ax, derivative, truth["latents"].values, lim, bin_width or 1.0, False, speed_max, colorbar)
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
    if axes is None:
        import matplotlib.pyplot as plt

        axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharex=True, sharey=True)[1]
    learned, true = axes
    known = align(tree, recording)
    _, width = _latents(tree, recording)
    # The truth of the same trials: both pictures are drawn where these have been.
    visited = part(tree, recording, "constant_data")["true_latents"].values
    shown = xr.Dataset({"latents": (("trial", "time", "latent_dim"), visited)}, attrs=truth.attrs)
    lim = _limits(None, visited)
    points, near = _grid(lim, visited)
    speed = np.linalg.norm(_over_a_bin(flow(truth), width)(points[near]), axis=-1) / (width or 1.0)
    top = float(np.quantile(speed, 0.95))
    shared: dict[str, Any] = {"lim": lim, "speed_max": top, "colorbar": False}
    flow_field(fit, recording, learned, tree=tree, align=known, num_trials=num_trials, **shared)
    true_flow_field(shown, true, bin_width=width, **shared)
    figures = {ax.figure for ax in (learned, true)}
    _colorbar([learned, true] if len(figures) == 1 else true, top, "s", "max")
    return np.asarray([learned, true], object)


def displacement(fit: Fit, recording: str, states: np.ndarray) -> np.ndarray:
    """Mean displacement in a bin of states ``(..., latent_dim)``, at the recording's mean embedding."""
    row = fit.names.index(recording)
    z = torch.as_tensor(states.reshape(1, 1, -1, states.shape[-1]), dtype=fit.dtype, device=fit.device)
    with torch.no_grad(), fit.model.given(fit.guide.global_sites.medians()):
        dynamics = fit.model.dynamics_of(_embedding(fit, row), torch.tensor([row], device=fit.device))
        change = _successor(fit.model, z, dynamics).mean - z
    return change.cpu().numpy().reshape(states.shape)


def part(tree: xr.DataTree, *names: str) -> xr.Dataset:
    """The Dataset of a node."""
    for name in names:
        tree = tree.children[name]
    return tree.to_dataset()


def new_axes(ax: Any = None) -> Axes:
    """The axes given, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # here: importing the library must not choose a backend

    return plt.subplots(figsize=(5, 4), layout="constrained")[1]


# ---- parts -----------------------------------------------------------------------------------------------


def _embedding(fit: Fit, row: int) -> torch.Tensor:
    """Posterior mean of a recording's embedding, ``(1, 1, embedding_dim)`` as the model's plates have it."""
    return fit.guide.embedding_posterior(fit.statistics[row : row + 1]).mean


def _map(align_: bool | AffineMap, tree: xr.DataTree | None, recording: str) -> AffineMap | None:
    if not isinstance(align_, bool):
        return align_
    if not align_:
        return None
    if tree is None:
        raise ValueError("flow_field: needed a tree of pm.posterior to align with, got none; pass tree=...")
    return align(tree, recording)


def _latents(tree: xr.DataTree, recording: str) -> tuple[np.ndarray, float | None]:
    """Posterior mean latents ``(trial, time, latent_dim)`` and the bin width in s."""
    if recording not in tree.children or "posterior" not in tree[recording].children:
        raise ValueError(
            f"needed recording {recording!r} in a tree of pm.posterior, got {list(tree.children)}"
        )
    latents = part(tree, recording, "posterior")["latents"].mean(("chain", "draw"))
    time = latents["time"].values
    z = latents.transpose("trial", "time", "latent_dim").values
    return z, float(time[1] - time[0]) if len(time) > 1 else None


def _rollouts(fit: Fit, recording: str, trials: int = 64, bins: int = 100) -> tuple[np.ndarray, None]:
    """Paths of the model itself, ``(trial, time, latent_dim)``."""
    row = fit.names.index(recording)
    e = _embedding(fit, row)
    medians = fit.model.given(fit.guide.global_sites.medians())
    with torch.no_grad(), machine.random_forked(fit.device), medians:
        torch.manual_seed(0)
        dynamics = fit.model.dynamics_of(e, torch.tensor([row], device=fit.device))
        z = [fit.model.initial_state(e).expand((1, trials)).sample().unsqueeze(-2)]
        for _ in range(bins - 1):
            z.append(_successor(fit.model, z[-1], dynamics).sample())
    return torch.cat(z, -2)[0].cpu().numpy(), None


def _successor(model, z: torch.Tensor, dynamics):
    """The transition, of inputs that are zero where it reads any."""
    if not model.reads_inputs:
        return model.transition(z, dynamics)
    return model.transition(z, dynamics, inputs=z.new_zeros(*z.shape[:-1], model.config.get("input_dim", 1)))


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


def _regression(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
    return weights, y.mean(0) - x.mean(0) @ weights


def _limits(lim: float | Limits | None, visited: np.ndarray) -> Limits:
    if lim is None:
        points = visited.reshape(-1, 2)
        low, high = np.nanquantile(points, [0.005, 0.995], axis=0)
        margin = 0.1 * (high - low) + 1e-6
        (x0, y0), (x1, y1) = (low - margin).tolist(), (high + margin).tolist()
        return (x0, x1), (y0, y1)
    return ((-lim, lim), (-lim, lim)) if isinstance(lim, int | float) else lim


def _grid(lim: Limits, visited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points ``(GRID, GRID, 2)``, rows along y, and which of them lie within two cells of a visited state."""
    x, y = (np.linspace(*side, GRID) for side in lim)
    points = np.stack(np.meshgrid(x, y), -1)
    states = visited.reshape(-1, 2)
    states = states[np.isfinite(states).all(1)]
    cell = np.array([x[1] - x[0], y[1] - y[0]])
    near = np.zeros(points.shape[:2], bool)
    for part in np.array_split(states, max(len(states) // 1000, 1)):
        distance = np.abs((points[:, :, None] - part) / cell)
        near |= ((distance**2).sum(-1) < 2.0**2).any(-1)
    return points, near


def _draw(ax, derivative, visited, lim, per: float, per_bin: bool, speed_max, colorbar: bool) -> None:
    """Stream lines near visited states, grey elsewhere; ``per`` turns displacements into speeds."""
    lim = _limits(lim, visited)
    points, near = _grid(lim, visited)
    x, y = points[0, :, 0], points[:, 0, 1]
    ax.pcolormesh(
        x, y, np.where(near, np.nan, 1.0), cmap="Greys", vmin=0.0, vmax=6.0, rasterized=True, zorder=0
    )
    change = derivative(points) / per
    change[~near] = np.nan
    u, v = np.ma.masked_invalid(change[..., 0]), np.ma.masked_invalid(change[..., 1])
    speed = np.ma.sqrt(u**2 + v**2)
    if speed.count():
        top = float(speed.max()) if speed_max is None else speed_max
        cmap, norm = _scale(top)
        ax.streamplot(
            x, y, u, v, color=speed, cmap=cmap, norm=norm, density=1.2, linewidth=1.2, arrowsize=0.8, zorder=2
        )
        if colorbar:
            _colorbar(ax, top, "bin" if per_bin else "s", "neither" if speed_max is None else "max")
    ax.set_xlim(*lim[0])
    ax.set_ylim(*lim[1])
    ax.set_aspect("equal")


def _scale(top: float) -> tuple[Any, Any]:
    """Colours of speeds from 0 to ``top``, none of them too light for white paper."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, Normalize

    return ListedColormap(colormaps["cividis_r"](np.linspace(0.2, 1.0, 256))), Normalize(0.0, top or 1.0)


def _colorbar(ax: Any, top: float, unit: str, extend: str) -> None:
    from matplotlib.cm import ScalarMappable

    cmap, norm = _scale(top)
    figure = (ax[0] if isinstance(ax, list) else ax).figure
    figure.colorbar(
        ScalarMappable(norm, cmap), ax=ax, label=f"speed (per {unit})", extend=extend, aspect=30, pad=0.02
    )
