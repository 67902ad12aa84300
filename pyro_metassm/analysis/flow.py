"""The flow of learned dynamics on a plane, with its posterior spread and where data have been."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.analysis._maps import At, Place, Source, to_numpy
from pyro_metassm.analysis._region import Region, visited
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

NEAR = 2.0  # cells of the grid: how far a visited state makes its neighbourhood visited
Grid = int | Sequence[np.ndarray]


def flow_field(
    fit: Fit,
    at: At,
    *,
    grid: Grid = 25,
    plane: tuple[int, int] = (0, 1),
    principal: bool = False,
    recs: Recordings | None = None,
    num_draws: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    r"""Mean displacement in a bin, ``E[z_{t+1} - z_t | z_t = z, e]``, on a plane of latents, for draws of the
    embedding.

    The plane is that of two latents, or of two principal axes of the visited states; all else is at its mean over
    these. Visited states are the posterior means of the latents in ``recs`` (of all of them for an embedding that is
    no recording's); without ``recs`` those of 64 paths of 200 bins of the model itself, from its initial state on.

    Args:
        fit: a fit.
        at: a recording's name (or several: a dimension ``recording``), an embedding ``(embedding_dim,)``, draws of it
            ``(draw, embedding_dim)``, or draws at several points ``(point, draw, embedding_dim)``.
        grid: points along each side, over the visited states; or the coordinates of both sides, which are then the
            same at all places.
        plane: the two latents, or principal axes, to look at.
        principal: the plane is that of principal axes; 0 is the one of largest variance.
        recs: data that say where the dynamics have been seen.
        num_draws: of a recording's embedding, and of the model's global sites (also beside a single embedding); 0 for
            their means alone.
        seed: of the draws.

    Returns:
        over ``draw``, ``y`` and ``x`` (the sides of the grid) and ``axis`` (2): ``displacement (draw, y, x, axis)`` in
        the plane, per bin; ``speed (draw, y, x)``, the length of the displacement in *all* latents over the bin width,
        per s; ``speed_mean`` and ``speed_sd (y, x)`` over the draws; ``displacement_sd (y, x, axis)``; ``density (y,
        x)`` of visited states, a Gaussian kernel estimate (Scott's width) relative to its maximum; ``visited (y, x)``:
        a visited state lies within two cells. ``x_value``, ``y_value``: the coordinates of the sides; ``center
        (latent_dim)`` and ``axes (axis, latent_dim)`` place the plane: ``z = center + x axes[0] + y axes[1]``.

    Raises:
        ValueError: an unknown recording, an embedding of another size, a plane or grid that is none, a transition
            without a mean or with inputs.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> dict(pm.analysis.flow_field(fit, "w=5", grid=10, num_draws=4, recs=recs)["displacement"].sizes)
        {'draw': 4, 'y': 10, 'x': 10, 'axis': 2}
    """
    source = Source("flow_field", fit, at, num_draws, seed)
    plane = _plane(source, plane)
    sides = _sides(grid)
    return source.stacked(
        [
            _field(source, place, visited(source, place, recs), plane, principal, sides)
            for place in source.places
        ]
    )


def _plane(source: Source, plane: tuple[int, int]) -> tuple[int, int]:
    known = isinstance(plane, tuple | list) and len(plane) == 2
    if not (known and all(isinstance(k, int | np.integer) and 0 <= k < source.latent_dim for k in plane)):
        raise ValueError(
            f"flow_field: needed a plane of two of the {source.latent_dim} latents, numbered from 0, got {plane!r}"
        )
    if plane[0] == plane[1]:
        raise ValueError(f"flow_field: needed two different latents, got {plane!r}")
    return int(plane[0]), int(plane[1])


def _sides(grid: Grid) -> int | tuple[np.ndarray, np.ndarray]:
    if isinstance(grid, int | np.integer):
        checks.integers(least=2, grid=grid)
        return int(grid)
    sides = [np.asarray(side) for side in grid] if isinstance(grid, list | tuple) else []
    if len(sides) != 2 or any(not _rises(s) for s in sides):
        raise ValueError(
            "flow_field: needed a grid as a number of points, or as the coordinates of its two sides, each rising, "
            f"got {grid!r}"
        )
    return sides[0].astype(float), sides[1].astype(float)


def _rises(side: np.ndarray) -> bool:
    known = side.dtype.kind in "if" and side.ndim == 1 and len(side) > 1 and np.isfinite(side).all()
    return bool(known and (np.diff(side) > 0).all())


def _field(source: Source, place: Place, region: Region, plane, principal: bool, sides) -> xr.Dataset:
    axes = region.axes[list(plane)] if principal else np.eye(source.latent_dim)[list(plane)]
    center = (
        region.center - (region.center @ axes.T) @ axes
    )  # in the plane, coordinates count from the origin
    states = region.states @ axes.T
    if isinstance(sides, int):
        low, high = np.quantile(states, [0.005, 0.995], axis=0)
        margin = 0.1 * (high - low) + 1e-6
        x, y = (np.linspace(a, b, sides) for a, b in zip(low - margin, high + margin, strict=True))
    else:
        x, y = sides
    points = np.stack(np.meshgrid(x, y), -1)
    maps = source.maps(place)
    z = torch.as_tensor(center + points.reshape(-1, 2) @ axes, device=source.fit.device)
    change = to_numpy(maps.displacement(z.expand(maps.num_draws, -1, -1)))
    speed = np.linalg.norm(change, axis=-1).reshape(-1, len(y), len(x)) / source.bin_width
    moved = (change @ axes.T).reshape(-1, len(y), len(x), 2)
    cell = np.array([x[1] - x[0], y[1] - y[0]])
    near = Region.of(states / cell) if np.ptp(states, axis=0).any() else None
    close = near.nearest(points / cell) * near.scale < NEAR if near else np.zeros(points.shape[:2], bool)
    return xr.Dataset(
        {
            "displacement": (("draw", "y", "x", "axis"), moved),
            "speed": (("draw", "y", "x"), speed, {"units": "1/s"}),
            "speed_mean": (("y", "x"), speed.mean(0), {"units": "1/s"}),
            "speed_sd": (("y", "x"), speed.std(0), {"units": "1/s"}),
            "displacement_sd": (("y", "x", "axis"), moved.std(0)),
            "density": (("y", "x"), _density(states, points)),
            "visited": (("y", "x"), close),
            "x_value": (("x",), x),
            "y_value": (("y",), y),
            "center": (("latent_dim",), center),
            "axes": (("axis", "latent_dim"), axes),
        },
        attrs={"plane": list(plane), "principal": int(principal), "bin_width": source.bin_width},
    )


def _density(states: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Gaussian kernel estimate of the density of states ``(M, 2)`` at points ``(..., 2)``, over its largest value."""
    region = Region.of(states)
    width = region.sd * len(states) ** (-1 / 6)  # Scott's rule in two dimensions
    at = region.coordinates(points.reshape(-1, 2)) / width
    of = region.coordinates(states) / width
    square = (at**2).sum(1)[:, None] + (of**2).sum(1) - 2 * at @ of.T
    density = np.exp(-0.5 * square.clip(min=0)).mean(1)
    return (density / max(density.max(), np.finfo(float).tiny)).reshape(points.shape[:-1])
