"""Fixed points of learned dynamics: where they are, what they are, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.analysis import _matching as matching
from pyro_metassm.analysis._maps import At, Maps, Place, Source, to_numpy
from pyro_metassm.analysis._newton import distinct, roots
from pyro_metassm.analysis._region import Region, visited
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

TOLERANCE = 1e-9  # of |f(z) - z|, over the scale of the region
GATE = 0.5  # distance over the scale, within which a point of another draw is the same point
STARTS_OF_MEAN = 256  # where one search serves all draws
MISSING = {"num_unstable": -1, "stable": False, "type": "", "probability": 0.0}
COMPLEX = 1e-9  # imaginary part of an eigenvalue above which it turns


@dataclass(frozen=True)
class Found:
    """The fixed points of one draw: ``position (F, d)``, ``eigenvalues (F, d)`` by falling modulus."""

    position: np.ndarray
    eigenvalues: np.ndarray


def fixed_points(
    fit: Fit,
    at: At,
    *,
    recs: Recordings | None = None,
    num_draws: int = 100,
    num_starts: int = 48,
    seed: int = 0,
) -> xr.Dataset:
    r"""All fixed points ``f_e(z) = z`` in the visited region, for draws of the embedding, matched to one another.

    ``f_e(z) = E[z_{t+1} | z_t = z, e]``. Newton's method with backtracking, in float64 and with exact Jacobians, from
    ``num_starts`` states of every draw (half of them visited, half between two visited ones), and from the fixed
    points of the middle of the draws, which are looked for from 256. A solution has ``|f(z) - z| <= 1e-9`` of the
    region's scale (the root mean square distance of visited states from their mean); two within 1e-3 of it are one,
    and so are two within 0.05 if what lies halfway is within ten times the tolerance. They are kept in the box around
    the visited states along their principal axes, widened by 10 % on either side. Of a continuous attractor single
    points are found, as many as the starts lead to.

    In different draws a point is the same if it is one in the assignment that minimises the sum of squared distances
    to the points of the middle of the draws (those that these lack: to where they first turned up), within half the
    scale.

    Args:
        fit: a fit.
        at: a recording's name (or several: a dimension ``recording``), an embedding ``(embedding_dim,)``, draws of it
            ``(draw, embedding_dim)``, or draws at several points ``(point, draw, embedding_dim)``.
        recs: data that say which states are visited, as for :func:`flow_field`.
        num_draws: of a recording's embedding; 0 for its posterior mean alone.
        num_starts: of every draw.
        seed: of the draws and the starts.

    Returns:
        over ``draw`` and ``fixed_point``, by falling ``probability`` (the share of draws that have the point):
        ``position (draw, fixed_point, latent_dim)``; ``eigenvalue_real``, ``eigenvalue_imag (draw, fixed_point,
        eigenvalue)`` of the Jacobian of a bin, by falling modulus; in continuous time, ``log(eigenvalue) / dt``,
        ``growth_rate`` (1/s) and ``frequency`` (Hz); ``num_unstable``, eigenvalues outside the unit circle;
        ``stable``, there is none; ``type``: "node" or "focus" (as the leading eigenvalue turns), stable or unstable,
        "saddle" if some are inside and some outside; ``nearest``, the distance to the nearest visited state over the
        scale. Where a draw lacks a point they are NaN, -1, False and "". ``count (draw)``: their number.

    Raises:
        ValueError: as :func:`flow_field`.

    References:
        Sussillo and Barak, Neural Computation 25 (2013), for the idea of looking at trained networks so.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> found = pm.analysis.fixed_points(fit, ["w=2.5", "w=5"], num_draws=4)
        >>> found["position"].dims
        ('recording', 'draw', 'fixed_point', 'latent_dim')
    """
    checks.integers(num_starts=num_starts)
    source = Source("fixed_points", fit, at, num_draws, seed)
    parts = []
    with source.threads():
        for place in source.places:
            region = visited(source, place, recs)
            of_mean = find(source.maps_of_mean(place), region, STARTS_OF_MEAN, seed)[0]
            found = find(source.maps(place), region, num_starts, seed, of_mean.position)
            parts.append(_dataset(source, place, region, of_mean, found))
    return source.stacked(parts, MISSING)


def find(
    maps: Maps, region: Region, num_starts: int, seed: int, more: np.ndarray | None = None
) -> list[Found]:
    """The fixed points of every draw in a region; ``more`` are further starts, ``(N, latent_dim)``."""
    starts = region.starts(num_starts, seed)
    starts = starts if more is None else np.concatenate([more, starts])
    z = torch.as_tensor(starts, device=maps.embedding.device).expand(maps.num_draws, -1, -1)
    z, good = roots(maps, z, region.scale, TOLERANCE)
    good = good & torch.as_tensor(region.contains(to_numpy(z)), device=good.device)
    position, there = distinct(maps, z, good, region.scale, TOLERANCE)
    if not position.shape[1]:
        size = position.shape[-1]
        return [Found(np.zeros((0, size)), np.zeros((0, size), complex)) for _ in range(maps.num_draws)]
    # Empty places are where the draw has another point, or anywhere: their eigenvalues are not looked at.
    eigenvalues = to_numpy(torch.linalg.eigvals(maps.jacobian(position)[1].nan_to_num()))
    order = np.lexsort((-eigenvalues.imag, -np.abs(eigenvalues).round(12)), axis=-1)
    eigenvalues = np.take_along_axis(eigenvalues, order, -1)
    return [
        Found(p[k], v[k]) for p, v, k in zip(to_numpy(position), eigenvalues, to_numpy(there), strict=True)
    ]


def kinds(eigenvalues: np.ndarray) -> np.ndarray:
    """Types of fixed points with eigenvalues ``(..., d)`` by falling modulus, as text."""
    outside = (np.abs(eigenvalues) > 1).sum(-1)
    turning = np.abs(eigenvalues[..., 0].imag) > COMPLEX
    size = eigenvalues.shape[-1]
    stability = np.where(outside == 0, "stable ", np.where(outside == size, "unstable ", ""))
    shape = np.where((outside > 0) & (outside < size), "saddle", np.where(turning, "focus", "node"))
    return np.char.add(stability, shape)


def rates(eigenvalues: np.ndarray, bin_width: float) -> tuple[np.ndarray, np.ndarray]:
    """``log(eigenvalue) / dt``: growth per s, and Hz."""
    with np.errstate(divide="ignore"):
        continuous = np.log(eigenvalues.astype(complex)) / bin_width
    return continuous.real, continuous.imag / (2 * np.pi)


def _dataset(source: Source, place: Place, region: Region, of_mean: Found, found: list[Found]) -> xr.Dataset:
    where = matching.tracks(of_mean.position, [f.position for f in found], GATE * region.scale)
    number = max((int(w.max()) + 1 for w in where if len(w)), default=0)
    position = matching.placed([f.position for f in found], where, number, np.nan)
    eigenvalues = matching.placed([f.eigenvalues for f in found], where, number, np.nan + 0j)
    there = np.isfinite(position).all(-1)
    order = np.argsort(-there.mean(0), kind="stable")
    order = order[there[:, order].any(0)]
    position, eigenvalues, there = position[:, order], eigenvalues[:, order], there[:, order]
    outside = np.where(there, (np.abs(eigenvalues) > 1).sum(-1), -1)
    growth, frequency = rates(eigenvalues, source.bin_width)
    growth, frequency = (np.where(there[..., None], values, np.nan) for values in (growth, frequency))
    one, each = ("draw", "fixed_point"), ("draw", "fixed_point", "eigenvalue")
    return xr.Dataset(
        {
            "position": (("draw", "fixed_point", "latent_dim"), position),
            "eigenvalue_real": (each, eigenvalues.real),
            "eigenvalue_imag": (each, eigenvalues.imag),
            "growth_rate": (each, growth, {"units": "1/s"}),
            "frequency": (each, frequency, {"units": "Hz"}),
            "num_unstable": (one, outside),
            "stable": (one, outside == 0),
            "type": (one, np.where(there, kinds(eigenvalues), "").astype("<U15")),
            "nearest": (one, np.where(there, region.nearest(np.nan_to_num(position)), np.nan)),
            "count": (("draw",), there.sum(1)),
            "probability": (("fixed_point",), there.mean(0) if number else np.zeros(0)),
        },
        coords={"fixed_point": np.arange(len(order))},
        attrs={"scale": region.scale, "bin_width": source.bin_width},
    )
