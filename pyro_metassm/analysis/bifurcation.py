"""How fixed points and cycles come, go and change their stability along a path through the embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_metassm import _checks as checks
from pyro_metassm.analysis import _matching as matching
from pyro_metassm.analysis._folds import folds
from pyro_metassm.analysis._maps import Place, Source, to_numpy
from pyro_metassm.analysis._region import Region, visited
from pyro_metassm.analysis.fixed_points import find as find_points
from pyro_metassm.analysis.fixed_points import rates
from pyro_metassm.analysis.limit_cycles import Found
from pyro_metassm.analysis.limit_cycles import find as find_cycles
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit, check_fit

GATE = 0.3  # over the scale: how far a branch may move from one point of the path to the next
HALVINGS = 5  # of a step of the path, where a branch moves farther
STARTS, STARTS_OF_DRAWS, CYCLE_STARTS = 64, 12, 6
BINS, LONGEST = 400, 400
Waypoint = str | np.ndarray | torch.Tensor


def bifurcation(
    fit: Fit,
    along: int | Sequence[Waypoint],
    *,
    num_points: int = 31,
    with_cycles: bool = True,
    recs: Recordings | None = None,
    num_draws: int = 50,
    seed: int = 0,
) -> xr.Dataset:
    r"""Fixed points and limit cycles along a path through the embeddings, as branches with posterior bands.

    Between waypoints the path is straight, ``e(s) = (1 - s) e_a + s e_b``, draw by draw: the bands are what the
    posterior of the recordings at its waypoints leaves open. At every point the fixed points (:func:`fixed_points`)
    and the attracting cycles (:func:`limit_cycles`) of the middle of the draws are looked for anew and from those of
    the point before, and joined to branches by the assignment of smallest squared distance, within 0.3 of the
    region's scale; where a fixed point finds no other within that, the step is halved, up to five times. Those of the
    draws are joined to the branches that are there, and what is left over to branches that are elsewhere on the path.

    Args:
        fit: a fit.
        along: waypoints, two or more, each a recording's name or an embedding ``(embedding_dim,)``; or the number of a
            principal axis of the recordings' embeddings, along which the path goes through 0 as far as they lie. Of a
            path of embeddings alone all draws are the same, but for global sites.
        num_points: of the path.
        with_cycles: look for cycles, too.
        recs: data that say which states are visited: all of them; without them the model's own paths at the ends and
            in the middle of the path, as for :func:`flow_field`.
        num_draws: of the embeddings at the waypoints; 0 for their means alone.
        seed: of the draws and the starts.

    Returns:
        over ``draw``, ``point`` (coordinate ``s``, the share of the path's length) and ``branch``: ``position
        (latent_dim)``, ``growth_rate`` and ``frequency (eigenvalue)`` by falling growth, ``num_unstable``,
        ``stable``, as of :func:`fixed_points`; ``crossing (draw, branch, crossing)``, the ``s`` where the number of
        unstable eigenvalues of a branch changes, linear between points, and ``crossing_frequency`` (Hz), which is 0
        unless it is a Hopf bifurcation; ``fold (draw, fold)``, the ``s`` where two branches meet and end or begin, a
        saddle-node bifurcation, to half a step of the path, and ``fold_position (latent_dim)``; ``count (draw,
        point)`` of all fixed points, those on no branch, too; over ``cycle``: ``period`` (s), ``radius``, the extrema
        ``low`` and ``high (latent_dim)``, ``cycle_growth_rate`` (1/s, of the slowest multiplier), ``cycle_stable``;
        ``embedding (draw, point, embedding_dim)``. NaN (-1, False) where there is none.

    Raises:
        ValueError: fewer than two waypoints, a principal axis that there is not, and as :func:`flow_field`.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> found = pm.analysis.bifurcation(fit, ["w=2.5", "w=5"], num_points=3, num_draws=2, with_cycles=False)
        >>> dict(found["embedding"].sizes)
        {'draw': 2, 'point': 3, 'embedding_dim': 1}
    """
    check_fit(fit)
    checks.integers(least=2, num_points=num_points)
    draws, middle = _path(fit, along, num_points, num_draws, seed)
    source = Source("bifurcation", fit, np.swapaxes(draws, 0, 1), num_draws, seed)
    places = [
        Place(place.label, None, place.draws, torch.as_tensor(e[None], device=fit.device))
        for place, e in zip(source.places, middle, strict=True)
    ]
    region = _region(source, places, recs)
    s = np.linspace(0.0, 1.0, num_points)
    with source.threads():
        found = _fixed_points(source, places, region, seed, s)
        if with_cycles and source.latent_dim > 1:
            found = found.merge(_cycles(source, places, region, seed))
    found["embedding"] = (("draw", "point", "embedding_dim"), draws)
    found.attrs.update(scale=region.scale, bin_width=source.bin_width)
    return found.assign_coords(s=("point", s))


def _path(fit: Fit, along, num_points: int, num_draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of the draws ``(S, num_points, d)`` and of their middle ``(num_points, d)``."""
    if isinstance(along, int | np.integer) and not isinstance(along, bool):
        known = fit.statistics[fit.statistics.isfinite().all(-1)]
        means = to_numpy(fit.guide.embedding_posterior(known).mean[:, 0].double())
        axes = np.linalg.svd(means - means.mean(0), full_matrices=False)[2]
        if not 0 <= along < min(len(axes), means.shape[1]):
            raise ValueError(
                f"bifurcation: needed a principal axis from 0 to {min(len(axes), means.shape[1]) - 1}, got {along}"
            )
        reach = np.abs(means @ axes[along]).max()
        ends = [-reach * axes[along], reach * axes[along]]
        return _path(fit, ends, num_points, num_draws, seed)
    if isinstance(along, str) or not isinstance(along, Sequence | np.ndarray) or len(along) < 2:
        raise ValueError(
            "bifurcation: needed two waypoints or more (recordings' names or embeddings), or the number of a "
            f"principal axis, got {along!r}"
        )
    sources = [Source("bifurcation", fit, stop, num_draws, seed) for stop in along]
    if any(source.dim is not None for source in sources):
        raise ValueError("bifurcation: needed one recording or embedding at every waypoint, got several")
    stops = [source.places[0] for source in sources]
    number = max(len(stop.draws) for stop in stops)
    if any(len(stop.draws) not in (1, number) for stop in stops):
        raise ValueError("bifurcation: needed waypoints with the same number of draws")
    draws = np.stack([np.broadcast_to(to_numpy(x.draws), (number, x.draws.shape[1])) for x in stops], 1)
    middle = np.stack([to_numpy(x.mean[0]) for x in stops])
    lengths = np.linalg.norm(np.diff(middle, axis=0), axis=-1)
    if not lengths.all():
        raise ValueError("bifurcation: needed waypoints that differ from each other")
    at = np.concatenate([[0.0], np.cumsum(lengths)]) / lengths.sum()
    s = np.linspace(0.0, 1.0, num_points)
    piece = np.searchsorted(at, s, side="right").clip(1, len(at) - 1)
    share = ((s - at[piece - 1]) / (at[piece] - at[piece - 1]))[:, None]
    along_path = lambda x: (1 - share) * x[..., piece - 1, :] + share * x[..., piece, :]
    return along_path(draws), along_path(middle)


def _region(source: Source, places: Sequence[Place], recs: Recordings | None) -> Region:
    if recs is not None:
        return visited(source, places[0], recs)
    chosen = [places[0], places[len(places) // 2], places[-1]]
    return Region.of(np.concatenate([visited(source, place, None).states for place in chosen]))


def _fixed_points(
    source: Source, places: Sequence[Place], region: Region, seed: int, s: np.ndarray
) -> xr.Dataset:
    middle, before = [], np.zeros((0, source.latent_dim))
    for place in places:
        here = find_points(source.maps_of_mean(place), region, STARTS, seed, before)[0]
        middle.append(here.position)
        before = here.position
    gate = GATE * region.scale

    def between(first: Tensor, last: Tensor, near: np.ndarray) -> np.ndarray:
        halfway = Place("halfway", None, first, (first + last) / 2)
        return find_points(source.maps_of_mean(halfway), region, STARTS, seed, near)[0].position

    def step(k: int) -> np.ndarray:
        ends = places[k].mean, places[k + 1].mean
        return _linked(middle[k], middle[k + 1], gate, *ends, between)

    branches = _branches(middle, [step(k) for k in range(len(places) - 1)])
    known, there_of_middle = _nearest_known(middle, branches)
    number = known.shape[1]
    shape = source.num_draws, len(places), number
    position = np.full((*shape, source.latent_dim), np.nan)
    eigenvalues = np.full((*shape, source.latent_dim), np.nan + 0j)
    count = np.zeros(shape[:2], int)
    for k, place in enumerate(places):
        found = find_points(source.maps(place), region, STARTS_OF_DRAWS, seed, middle[k])
        for draw, of_draw in enumerate(found):
            count[draw, k] = len(of_draw.position)
            pair = _joined(known[k], there_of_middle[k], of_draw.position, gate)
            position[draw, k, pair[pair >= 0]] = of_draw.position[pair >= 0]
            eigenvalues[draw, k, pair[pair >= 0]] = of_draw.eigenvalues[pair >= 0]
    there = np.isfinite(position).all(-1)
    growth, frequency = rates(eigenvalues, source.bin_width)
    unstable = np.where(there, (np.abs(eigenvalues) > 1).sum(-1), -1)
    crossing, turning = _crossings(s, growth, np.abs(frequency), unstable)
    fold, fold_position = folds(s, position, unstable, count)
    each = ("draw", "point", "branch")
    return xr.Dataset(
        {
            "position": ((*each, "latent_dim"), position),
            "growth_rate": (
                (*each, "eigenvalue"),
                np.where(there[..., None], growth, np.nan),
                {"units": "1/s"},
            ),
            "frequency": (
                (*each, "eigenvalue"),
                np.where(there[..., None], frequency, np.nan),
                {"units": "Hz"},
            ),
            "num_unstable": (each, unstable),
            "stable": (each, unstable == 0),
            "crossing": (("draw", "branch", "crossing"), crossing),
            "crossing_frequency": (("draw", "branch", "crossing"), turning, {"units": "Hz"}),
            "fold": (("draw", "fold"), fold),
            "fold_position": (("draw", "fold", "latent_dim"), fold_position),
            "count": (("draw", "point"), count),
        }
    )


def _cycles(source: Source, places: Sequence[Place], region: Region, seed: int) -> xr.Dataset:
    options: dict[str, Any] = {"num_bins": BINS, "longest": LONGEST, "seed": seed}
    middle: list[Found] = []
    for place in places:
        before = middle[-1].path[:, 0] if middle else None
        middle.append(
            find_cycles(source.maps_of_mean(place), region, CYCLE_STARTS, **options, more=before)[0]
        )
    gate, path = GATE * region.scale, [f.place for f in middle]
    pairs = [matching.assigned(*two, gate) for two in zip(path, path[1:], strict=False)]
    known, there_of_middle = _nearest_known(path, _branches(path, pairs))
    number = known.shape[1]
    shape = source.num_draws, len(places), number
    period, radius, growth = (np.full(shape, np.nan) for _ in range(3))
    low, high = (np.full((*shape, source.latent_dim), np.nan) for _ in range(2))
    for k, place in enumerate(places):
        near = [middle[j].path[:, 0] for j in (k, k - 1, k + 1) if 0 <= j < len(places)]
        if not any(len(x) for x in near):
            continue
        found = find_cycles(source.maps(place), region, 0, **options, more=np.concatenate(near))
        for draw, of_draw in enumerate(found):
            pair = _joined(known[k], there_of_middle[k], of_draw.place, gate)
            for here, branch in enumerate(pair.tolist()):
                if branch < 0:
                    continue
                period[draw, k, branch] = of_draw.bins[here] * source.bin_width
                radius[draw, k, branch] = of_draw.place[here, -1]
                low[draw, k, branch] = of_draw.path[here].min(0)
                high[draw, k, branch] = of_draw.path[here].max(0)
                slowest = np.log(np.maximum(np.abs(of_draw.multipliers[here]).max(), 1e-300))
                growth[draw, k, branch] = slowest / period[draw, k, branch]
    each = ("draw", "point", "cycle")
    return xr.Dataset(
        {
            "period": (each, period, {"units": "s"}),
            "radius": (each, radius),
            "low": ((*each, "latent_dim"), low),
            "high": ((*each, "latent_dim"), high),
            "cycle_growth_rate": (each, growth, {"units": "1/s"}),
            "cycle_stable": (each, growth < 0),
        }
    )


def _linked(
    here: np.ndarray,
    there: np.ndarray,
    gate: float,
    first: Tensor,
    last: Tensor,
    between: Callable[[Tensor, Tensor, np.ndarray], np.ndarray],
    halvings: int = HALVINGS,
) -> np.ndarray:
    """Which of the points ``here`` (at the embedding ``first``) each of those ``there`` is; -1 for none.

    Where fewer than could be are found again the step is halved: of points that are about to merge one moves fast.
    """
    pair = matching.assigned(here, there, gate)
    if not halvings or (pair >= 0).sum() == min(len(here), len(there)):
        return pair
    halfway = between(first, last, here)
    middle = (first + last) / 2
    before = _linked(here, halfway, gate, first, middle, between, halvings - 1)
    after = _linked(halfway, there, gate, middle, last, between, halvings - 1)
    return np.where(after >= 0, before[after.clip(0)], -1) if len(before) else after


def _branches(places: Sequence[np.ndarray], pairs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Which branch each point belongs to; ``pairs`` are which of a place's points each of the next place's is."""
    result, number = [np.arange(len(places[0]))], len(places[0])
    for pair in pairs:
        new = pair < 0
        branch = np.where(new, -1, result[-1][pair.clip(0)] if len(result[-1]) else -1)
        branch[new] = number + np.arange(int(new.sum()))
        number += int(new.sum())
        result.append(branch)
    return result


def _nearest_known(
    places: Sequence[np.ndarray], branches: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Where every branch is, ``(point, branch, q)``: at the nearest point that has it, where this one lacks it.

    Returns:
        this, and which points have it, ``(point, branch)``.
    """
    number = max((int(b.max()) + 1 for b in branches if len(b)), default=0)
    known = np.full((len(places), number, places[0].shape[1]), np.nan)
    for k, (place, branch) in enumerate(zip(places, branches, strict=True)):
        known[k, branch] = place
    there = np.isfinite(known).all(-1)
    if not number:
        return known, there
    index = np.arange(len(places))
    nearest = np.abs(index[:, None, None] - index[None, :, None]) + np.where(there, 0, 10 * len(places))
    return np.take_along_axis(known, nearest.argmin(1)[..., None], 0), there


def _joined(known: np.ndarray, there: np.ndarray, found: np.ndarray, gate: float) -> np.ndarray:
    """Which branch each point of a draw is: one of those that are there, else one that is elsewhere; -1 for none."""
    result = np.full(len(found), -1)
    for which in (there, ~there):
        left = np.flatnonzero(result < 0)
        pair = matching.assigned(known[which], found[left], gate)
        result[left[pair >= 0]] = np.flatnonzero(which)[pair[pair >= 0]]
    return result


def _crossings(s: np.ndarray, growth: np.ndarray, frequency: np.ndarray, unstable: np.ndarray):
    """Where the number of unstable eigenvalues changes along branches, and how fast what crosses turns."""
    found: dict[tuple[int, int], list[tuple[float, float]]] = {}
    both = (unstable[:, 1:] >= 0) & (unstable[:, :-1] >= 0)
    for draw, k, branch in np.argwhere(both & (unstable[:, 1:] != unstable[:, :-1])):
        order = min(unstable[draw, k, branch], unstable[draw, k + 1, branch])  # the first that crosses
        low, high = growth[draw, k, branch, order], growth[draw, k + 1, branch, order]
        share = low / (low - high) if low != high else 0.5
        # A pair crosses in a Hopf bifurcation; one that crosses alone is real there, whatever it is nearby.
        pair = abs(unstable[draw, k + 1, branch] - unstable[draw, k, branch]) > 1
        of_both = frequency[draw, k : k + 2, branch, order]
        turning = (1 - share) * of_both[0] + share * of_both[1] if pair else 0.0
        place = s[k] + share * (s[k + 1] - s[k])
        found.setdefault((draw, branch), []).append((float(place), float(turning)))
    most = max(map(len, found.values()), default=0)
    result = np.full((2, unstable.shape[0], unstable.shape[2], most), np.nan)
    for (draw, branch), rows in found.items():
        result[:, draw, branch, : len(rows)] = np.array(rows).T
    return result[0], result[1]
