"""Return maps of orbits of a map that samples a flow: closed orbits to a fraction of a bin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_metassm.analysis._maps import Maps
from pyro_metassm.analysis._newton import newton_step

NODES = 6  # states that an interpolation goes through
STEPS = 15
GIVE_UP = 3
TOLERANCE = 1e-8  # of |P(x) - x| over the scale
PERTURBED = 1e-5  # by how much, over the scale, for derivatives of the return map
NEAR = 0.25  # of the orbit's extent: how near a return comes to where it began
SMALLEST = 0.02  # extent, over the scale, below which an orbit is a point


@dataclass(frozen=True)
class Cycles:
    """A closed orbit of every draw.

    Attributes:
        bins: its period, ``(S,)``.
        multipliers: the ``d - 1`` eigenvalues of the return map's derivative, ``(S, d - 1)``.
        good: whether there is one, ``(S,)``.
        path: states at equal steps of time along it, ``(S, phases, d)``.
    """

    bins: Tensor
    multipliers: Tensor
    good: Tensor
    path: Tensor


def closed_orbits(maps: Maps, x: Tensor, scale: float, longest: int, phases: int) -> Cycles:
    r"""The closed orbits that orbits through ``x (S, d)`` are close to.

    The section is the plane through ``x`` across the displacement there. ``P`` takes a point of it to where the
    orbit, interpolated through six states in a row, next crosses it in the same direction, near where it began.
    Newton's method solves ``P(x) = x``, with the derivative from central differences; where it makes things worse,
    the orbit's own return is where it goes on from. A search that has been worse three times is given up.

    Args:
        maps: of S draws.
        x: where to begin.
        scale: of the region.
        longest: bins within which an orbit must return.
        phases: of the path.
    """
    number, size = x.shape
    normal = maps.displacement(x[:, None])[:, 0]
    normal = normal / normal.norm(dim=-1, keepdim=True).clamp(min=1e-300)
    across = torch.cat([normal.unsqueeze(-1), _eye(x).expand(number, -1, -1)], -1)
    basis = torch.linalg.qr(across)[0][..., 1:size]
    section, h = Section(x.clone(), normal, basis), PERTURBED * scale
    best, worse = x.new_full((number,), torch.inf), torch.zeros(number, dtype=torch.int, device=x.device)
    x, best_x, plain, bins = x.clone(), x.clone(), x.clone(), torch.zeros_like(best)
    slopes = x.new_zeros(number, size - 1, size - 1)
    rows, window = torch.arange(number, device=x.device), longest
    for _ in range(STEPS):
        at = section.of(rows)
        after, slope, time, found = _return(maps.subset(rows), x[rows], at, window, h, SMALLEST * scale)
        gap = torch.einsum("sij,si->sj", at.basis, after - x[rows])
        error = torch.where(found, gap.norm(dim=-1), torch.inf)
        better = error < best[rows]
        new = rows[better]
        best[new], best_x[new], plain[new] = error[better], x[new], after[better]
        slopes[new], bins[new] = slope[better], time[better]
        worse[rows[~better]] += 1
        step = newton_step(slope - _eye(slope), gap)
        length = step.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        step = torch.einsum("sij,sj->si", at.basis, step * (NEAR * scale / length).clamp(max=1.0))
        x[rows] = torch.where(better.unsqueeze(-1), x[rows] + step, plain[rows])
        going = (worse[rows] < GIVE_UP) & best[rows].isfinite() & (best[rows] > TOLERANCE * scale)
        rows = rows[going]
        if not len(rows):
            break
        window = min(longest, int(1.3 * float(bins[rows].max())) + 2 * NODES)
    good = best <= TOLERANCE * scale
    path = x.new_full((number, phases, size), torch.nan)
    if bool(good.any()):
        start = best_x[good][:, None]
        window = int(float(bins[good].max())) + 2 * NODES
        orbit = torch.cat([start, maps.subset(good.nonzero()[:, 0]).path(start, window)[:, 0]], 1)
        times = torch.arange(phases, dtype=x.dtype, device=x.device) / phases
        path[good] = interpolated(
            orbit, times * bins[good][:, None] + 2
        )  # where there are nodes on either side
    return Cycles(bins, torch.linalg.eigvals(slopes), good, path)


@dataclass(frozen=True)
class Section:
    """Planes ``(S, ...)``: a point, the direction across, and ``d - 1`` orthonormal directions along, as columns."""

    origin: Tensor
    normal: Tensor
    basis: Tensor

    def of(self, rows: Tensor) -> Section:
        return Section(self.origin[rows], self.normal[rows], self.basis[rows])


def interpolated(path: Tensor, times: Tensor) -> Tensor:
    """States at times in bins, ``(S, Q)``, of paths ``(S, L, d)`` from time 0 on, through the six nearest states."""
    first = (times.floor() - 2).clamp(0, path.shape[1] - NODES)
    index = first.long().unsqueeze(-1) + torch.arange(NODES, device=path.device)
    rows = torch.arange(len(path), device=path.device)[:, None, None]
    return (_weights(times - first).unsqueeze(-1) * path[rows, index]).sum(-2)


def _return(maps: Maps, x: Tensor, section: Section, window: int, h: float, smallest: float):
    """Where and when orbits from points ``x (S, d)`` of a section return to it near where they began.

    Orbits from neighbours of a point, ``h`` away, cross where the point's own does: the derivative is of one formula.

    Returns:
        states ``(S, d)``, the derivative along the section ``(S, d - 1, d - 1)``, bins ``(S,)``, and whether it
        returns ``(S,)``.
    """
    size = x.shape[-1]
    along = h * section.basis.mT
    states = torch.cat([x[:, None], x[:, None] + along, x[:, None] - along], 1)
    path = torch.cat([states.unsqueeze(-2), maps.path(states, window)], -2)  # (S, 2 d - 1, window + 1, d)
    height = torch.einsum("smld,sd->sml", path - section.origin[:, None, None], section.normal)
    first, away = height[:, 0], (path[:, 0] - x[:, None]).norm(dim=-1)
    extent = away.amax(-1, keepdim=True)
    up = (first[:, :-1] < 0) & (first[:, 1:] >= 0)
    up &= (away[:, :-1].minimum(away[:, 1:]) < NEAR * extent) & (extent > smallest)
    up[:, :2], up[:, window - 2 :] = False, False
    found = up.any(-1)
    begin = torch.where(found, up.int().argmax(-1), 2) - 2
    index = begin[:, None] + torch.arange(NODES, device=x.device)
    rows = torch.arange(len(path), device=x.device)[:, None]
    nodes, heights = (
        path[rows, :, index].movedim(1, 2),
        height[rows, :, index].movedim(1, 2),
    )  # (S, M, NODES, ...)
    time = _zero(heights)
    state = (_weights(time).unsqueeze(-1) * nodes).sum(-2)
    slope = torch.einsum("sij,ski->sjk", section.basis, state[:, 1:size] - state[:, size:]) / (2 * h)
    found = found & state.isfinite().all(-1).all(-1)
    return state[:, 0], torch.where(found[:, None, None], slope, 0.0), begin + time[:, 0], found


def _zero(heights: Tensor) -> Tensor:
    """Where the polynomial through values at nodes 0 to 5, ``(..., 6)``, is zero between nodes 2 and 3."""
    nodes = torch.arange(NODES, dtype=heights.dtype, device=heights.device)
    powers = torch.linalg.inv(nodes[:, None] ** nodes)  # coefficients = powers @ values
    terms = (powers @ heights.unsqueeze(-1)).squeeze(-1)
    low, high = heights[..., 2], heights[..., 3]
    t = 2 - low / torch.where(high == low, 1.0, high - low)
    for _ in range(6):
        exponents = nodes[1:]
        value = (terms * t.unsqueeze(-1) ** nodes).sum(-1)
        rise = (terms[..., 1:] * exponents * t.unsqueeze(-1) ** (exponents - 1)).sum(-1)
        t = (t - value / torch.where(rise == 0, 1.0, rise)).clamp(1.0, 4.0)
    return t


def _weights(t: Tensor) -> Tensor:
    """Lagrange's weights of nodes 0 to 5 at ``t (...)``, ``(..., 6)``."""
    nodes = torch.arange(NODES, dtype=t.dtype, device=t.device)
    factors = (t[..., None, None] - nodes) / (nodes[:, None] - nodes + _eye(nodes))
    return torch.where(_eye(nodes).bool(), 1.0, factors).prod(-1)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
