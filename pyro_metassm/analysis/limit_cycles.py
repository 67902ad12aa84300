"""Limit cycles of learned dynamics: their periods, how fast they attract, and how sure that is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.analysis import _matching as matching
from pyro_metassm.analysis._maps import At, Maps, Source, to_numpy
from pyro_metassm.analysis._region import Region, visited
from pyro_metassm.analysis._returns import SMALLEST, closed_orbits
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

PHASES = 64
SAME = 0.1  # largest distance between two orbits, over the radius, that are one
GATE = 0.5  # over the scale of the region: how far the same cycle may be in another draw
STARTS_OF_MEAN = 24


@dataclass(frozen=True)
class Found:
    """The cycles of one draw: ``path (C, phases, d)``, ``bins (C,)``, ``multipliers (C, d - 1)``."""

    path: np.ndarray
    bins: np.ndarray
    multipliers: np.ndarray

    @property
    def place(self) -> np.ndarray:
        """Mean and radius, ``(C, d + 1)``: by which cycles of different draws are told apart."""
        mean = self.path.mean(1)
        radius = np.sqrt(np.square(self.path - mean[:, None]).sum(-1).mean(-1))
        return np.concatenate([mean, radius[:, None]], -1)


def limit_cycles(
    fit: Fit,
    at: At,
    *,
    recs: Recordings | None = None,
    num_draws: int = 100,
    num_starts: int = 3,
    num_bins: int = 600,
    longest: int = 400,
    seed: int = 0,
) -> xr.Dataset:
    r"""Limit cycles of ``z -> E[z' | z, e]`` in the visited region, for draws of the embedding, matched to one
    another.

    Noise-free orbits are followed for ``num_bins`` bins from ``num_starts`` states (visited ones and states between
    two) of every draw, and of the middle of the draws from 24, whose cycles every draw's search begins from, too.
    From there Newton's method solves ``P(x) = x`` for the return map ``P`` to a plane across the orbit, where the
    orbit between its bins is interpolated through six states: a period is known to a small fraction of a bin if it is
    of ten or more. So cycles that attract are found, and others only where a draw's neighbours attract. A cycle is
    kept if all of it lies in the box that :func:`fixed_points` keeps to. What repeats after less than some eight bins
    is no cycle here.

    Args:
        fit: a fit with two latents or more.
        at: as for :func:`fixed_points`.
        recs: data that say which states are visited, as for :func:`flow_field`.
        num_draws: of a recording's embedding; 0 for its posterior mean alone.
        num_starts: of every draw; 0 for those of the middle of the draws alone.
        num_bins: that orbits are followed before a cycle is looked for.
        longest: the longest period, in bins.
        seed: of the draws and the starts.

    Returns:
        over ``draw`` and ``cycle``, by falling ``probability (cycle)``: ``period`` (s); ``radius``, the root mean
        square distance from the ``center (latent_dim)``; ``multiplier_real``, ``multiplier_imag (multiplier)``: the
        ``latent_dim - 1`` Floquet multipliers, by falling modulus, without the one along the cycle, which is 1;
        ``growth_rate (multiplier)``, ``log |multiplier| / period`` (1/s); ``stable``; ``path (phase, latent_dim)``,
        64 states at equal steps of time; ``count (draw)``. NaN (False) where a draw lacks a cycle.

    Raises:
        ValueError: as :func:`flow_field`; a single latent.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> pm.analysis.limit_cycles(fit, "w=5", num_draws=4)["period"].dims
        ('draw', 'cycle')
    """
    checks.integers(num_bins=num_bins)
    checks.integers(least=0, num_starts=num_starts)
    checks.integers(least=10, longest=longest)
    source = Source("limit_cycles", fit, at, num_draws, seed)
    if source.latent_dim < 2:
        raise ValueError("limit_cycles: needed two latents or more, got 1: there are no cycles on a line")
    parts = []
    with source.threads():
        for place in source.places:
            region = visited(source, place, recs)
            given: dict[str, Any] = {"num_bins": num_bins, "longest": longest, "seed": seed}
            of_mean = find(source.maps_of_mean(place), region, STARTS_OF_MEAN, **given)[0]
            found = find(source.maps(place), region, num_starts, **given, more=of_mean.path[:, 0])
            parts.append(_dataset(source, region, of_mean, found))
    return source.stacked(parts, {"stable": False, "probability": 0.0})


def find(
    maps: Maps,
    region: Region,
    num_starts: int,
    *,
    num_bins: int,
    longest: int,
    seed: int,
    more: np.ndarray | None = None,
) -> list[Found]:
    """The cycles of every draw in a region; ``more``, points ``(N, latent_dim)`` near cycles, are tried first."""
    device, size = maps.embedding.device, region.states.shape[1]
    empty = Found(np.zeros((0, PHASES, size)), np.zeros(0), np.zeros((0, size - 1), complex))
    found = [empty] * maps.num_draws
    if more is not None and len(more):
        points = torch.as_tensor(more, device=device).expand(maps.num_draws, -1, -1)
        _add(found, maps, points, region, longest)
    if num_starts:
        starts = torch.as_tensor(region.starts(num_starts, seed), device=device)
        paths = maps.path(starts.expand(maps.num_draws, -1, -1), num_bins)
        last = paths[:, :, -min(longest, num_bins) :]
        moving = (last - last.mean(2, keepdim=True)).norm(dim=-1).amax(2) > SMALLEST * region.scale
        _add(found, maps, torch.where(moving.unsqueeze(-1), paths[:, :, -1], torch.nan), region, longest)
    return found


def _add(found: list[Found], maps: Maps, points: torch.Tensor, region: Region, longest: int) -> None:
    """Look for cycles near points ``(S, N, d)``, NaN for none, and add those that are new to their draws."""
    known = to_numpy(points)
    pairs = [
        (draw, number)
        for draw, number in np.argwhere(np.isfinite(known).all(-1)).tolist()
        if not any(
            _distance(path, known[draw, number, None]) <= SAME * _radius(path) for path in found[draw].path
        )
    ]
    if not pairs:
        return
    draws, numbers = torch.as_tensor(pairs, device=points.device).mT
    cycles = closed_orbits(maps.subset(draws), points[draws, numbers], region.scale, longest, PHASES)
    paths, bins, multipliers = to_numpy(cycles.path), to_numpy(cycles.bins), to_numpy(cycles.multipliers)
    good = to_numpy(cycles.good) & region.contains(paths).all(-1)
    for k in np.flatnonzero(good):
        before = found[pairs[k][0]]
        if any(_distance(path, paths[k]) <= SAME * _radius(path) for path in before.path):
            continue
        found[pairs[k][0]] = Found(
            np.concatenate([before.path, paths[k, None]]),
            np.append(before.bins, bins[k]),
            np.concatenate([before.multipliers, _by_modulus(multipliers[k])[None]]),
        )


def _distance(path: np.ndarray, points: np.ndarray) -> float:
    """The largest distance of points ``(N, d)`` from a closed path of straight pieces ``(phases, d)``."""
    side = np.roll(path, -1, 0) - path
    share = ((points[:, None] - path) * side).sum(-1) / np.maximum(np.square(side).sum(-1), 1e-300)
    foot = path + share.clip(0, 1)[..., None] * side
    return float(np.linalg.norm(points[:, None] - foot, axis=-1).min(1).max())


def _radius(path: np.ndarray) -> float:
    return float(np.sqrt(np.square(path - path.mean(0)).sum(-1).mean()))


def _by_modulus(values: np.ndarray) -> np.ndarray:
    return values[np.lexsort((-values.imag, -np.abs(values).round(12)))]


def _dataset(source: Source, region: Region, of_mean: Found, found: list[Found]) -> xr.Dataset:
    where = matching.tracks(of_mean.place, [f.place for f in found], GATE * region.scale)
    number = max((int(w.max()) + 1 for w in where if len(w)), default=0)
    bins = matching.placed([f.bins for f in found], where, number, np.nan)
    there = np.isfinite(bins)
    order = np.argsort(-there.mean(0), kind="stable")
    order = order[there[:, order].any(0)]

    def column(values: list[np.ndarray]) -> np.ndarray:
        return matching.placed(values, where, number, np.nan)[:, order]

    period, there = bins[:, order] * source.bin_width, there[:, order]
    place, multipliers = column([f.place for f in found]), column([f.multipliers for f in found])
    with np.errstate(divide="ignore"):
        growth = np.log(np.abs(multipliers)) / period[..., None]
    one, each = ("draw", "cycle"), ("draw", "cycle", "multiplier")
    return xr.Dataset(
        {
            "period": (one, period, {"units": "s"}),
            "radius": (one, place[..., -1]),
            "center": (("draw", "cycle", "latent_dim"), place[..., :-1]),
            "multiplier_real": (each, multipliers.real),
            "multiplier_imag": (each, multipliers.imag),
            "growth_rate": (each, growth, {"units": "1/s"}),
            "stable": (one, there & (np.abs(np.nan_to_num(multipliers, nan=9.0)) < 1).all(-1)),
            "path": (("draw", "cycle", "phase", "latent_dim"), column([f.path for f in found])),
            "count": (("draw",), there.sum(1)),
            "probability": (("cycle",), there.mean(0)),
        },
        coords={"cycle": np.arange(len(order)), "phase": np.arange(PHASES) / PHASES},
        attrs={"scale": region.scale, "bin_width": source.bin_width},
    )
