"""The map: where recordings lie, how far apart their dynamics are, and what changes between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr

from pyro_metassm.recordings import Recordings
from pyro_metassm.reporting import html, pictures
from pyro_metassm.reporting.album import Album
from pyro_metassm.reporting.asked import Asked, Missing, of_mean
from pyro_metassm.reporting.mapping import Map, Place

FEW = 12  # recordings of which three pictures stand beside each other
LEAST = 0.5  # share of the draws from which a fixed point or cycle is counted
GUIDE = (
    "All spreads are over draws of the embedding from the guide's posterior, given the fitted networks: they hold no "
    "error of these, and are too narrow; pm.revise(fit, recs) makes a fit whose draws hold more of it."
)
REVISED = (
    "All spreads are over draws of the embedding and of the last layer of the networks (pm.revise). They hold no "
    "error of the other layers, nor of the read-outs."
)


def parts(asked: Asked, found: Map, album: Album, keys: dict[str, str]) -> Iterator[str]:
    """The map of all recordings; ``keys``: of their sections."""
    if not found.names:
        yield html.note("The fit knows the embedding of no recording.")
        return
    yield html.paragraph(REVISED if "revision" in asked.fit.attrs else GUIDE)
    yield html.table(glance(asked, found), links=keys)
    yield html.paragraph(
        "Embedding: posterior mean ± sd. Fixed points and cycles: those of half of the draws or more, in the region "
        "that is visited; rates are of the slowest direction, below 0 it decays."
    )
    color, label = coloured(asked, found)
    size = found.mean.shape[1]
    few = len(found.names) <= FEW
    wide, tall = (4.2, 3.8) if few else (7.4, 5.6)
    height = tall if size > 1 else min(1.2 + 0.28 * len(found.names), 12.0)
    more = "" if size < 3 else f" Of {size} dims the first two."
    ellipses = album.picture(
        pictures.embeddings(found, color, label),
        (wide, height),
        "The embeddings of the recordings with their posterior spread",
        "Each recording's dynamical embedding: mean and 90 % of the posterior." + more,
    )
    apart = []
    if found.alike:
        yield html.note("All recordings have the same dynamics: the embedding changes nothing in this model.")
    elif isinstance(found.distances, xr.Dataset) and len(found.names) > 2:
        side = 3.8 if few else 5.4
        apart = [
            album.picture(
                pictures.distances(found, key),
                (side, side),
                f"Matrix of distances between recordings, in {what}",
                told,
            )
            for key, what, told in (
                (
                    "distance",
                    "embedding",
                    "How far the recordings are apart on the map, in the order of its longest direction.",
                ),
                (
                    "dynamics_distance",
                    "dynamics",
                    "How differently their dynamics move the states that they visit: 0 moves every state alike.",
                ),
            )
        ]
    yield html.pictures([ellipses, *apart])
    if found.without is not None:
        yield html.note(f"No map of the dynamics: {found.without}")
        return
    if isinstance(found.distances, Missing):
        yield html.note(f"No distances: {found.distances.why}")
    yield html.heading("What changes along the map", 3)
    if isinstance(found.along, Missing):
        yield html.note(f"No path: {found.along.why}.")
        return
    yield album.picture(
        pictures.branches(found.along),
        (7.2, 4.6),
        "Fixed points and limit cycles along a path through the embeddings",
        "Along the longest direction of the recordings' embeddings, through 0: fixed points (black) and the extrema of "
        "cycles (orange), solid where stable and dashed where not, with 90 % bands.",
    )
    yield html.items(crossings(found.along))


def glance(asked: Asked, found: Map) -> list[dict[str, str]]:
    """A row for each recording."""
    neurons = dict(zip(asked.fit.model.neurons.names, asked.fit.model.neurons.num_neurons, strict=True))
    errors = asked.fit.attrs.get("rollout_error")
    errors = errors if isinstance(errors, dict) else {}
    rows = []
    for k, name in enumerate(found.names):
        row = {"recording": name, "neurons": str(neurons[name])}
        row["embedding"] = embedding(found, k)
        if name in found.places:
            place = found.places[name]
            row["fixed points"] = counted(place)
            row["slowest rate (1/s)"] = slowest(place)
            row["period of cycle (s)"] = periods(place)
        if name in errors:
            row["roll-out error"] = html.number(errors[name])
        near = found.nearest(name) if len(found.names) > 2 else None
        if near is not None:
            row["closest in dynamics"] = near[0]
        rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return [{column: row.get(column, "–") for column in columns} for row in rows]


def embedding(found: Map, row: int) -> str:
    """Mean and sd of each dim."""
    pairs = zip(found.mean[row], found.sd[row], strict=True)
    return ", ".join(f"{mean:.2f} ± {sd:.2f}" for mean, sd in pairs)


def likely(data: xr.Dataset, dim: str) -> xr.Dataset:
    """The fixed points or cycles that half of the draws have."""
    return data.isel({dim: data["probability"].values >= LEAST})


def kind_of(point: xr.Dataset) -> str:
    """The type that most draws say."""
    values = [kind for kind in point["type"].values.tolist() if kind]
    return max(sorted(set(values)), key=values.count) if values else "–"


def counted(place: Place) -> str:
    """How many fixed points of each type."""
    if isinstance(place.points, Missing):
        return "–"
    points = likely(place.points, "fixed_point")
    kinds = [kind_of(points.isel(fixed_point=k)) for k in range(points.sizes["fixed_point"])]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) or "none"


def slowest(place: Place) -> str:
    """The largest growth rate of a fixed point that is stable, else of any."""
    if isinstance(place.points, Missing):
        return "–"
    points = likely(place.points, "fixed_point")
    if not points.sizes["fixed_point"]:
        return "–"
    mean, sd = of_mean(points["growth_rate"].isel(eigenvalue=0))
    stable = points["stable"].mean("draw").values >= LEAST
    rows = np.flatnonzero(stable) if stable.any() else np.arange(len(mean))
    row = rows[int(np.abs(mean[rows]).argmin())]
    return plus_minus(mean[row], sd[row])


def periods(place: Place) -> str:
    """Of the cycles that attract."""
    if isinstance(place.cycles, Missing):
        return "–"
    cycles = likely(place.cycles, "cycle")
    mean, sd = of_mean(cycles["period"])
    stable = cycles["stable"].mean("draw").values >= LEAST
    return ", ".join(plus_minus(m, s) for m, s, good in zip(mean, sd, stable, strict=True) if good) or "none"


def plus_minus(mean: float, sd: float) -> str:
    return html.number(mean) if not sd > 0 else f"{html.number(mean)} ± {html.number(sd, 2)}"


def crossings(along: xr.Dataset) -> list[str]:
    """Where stability changes, or two fixed points meet, in words."""
    lines = []
    places, turning = along["crossing"], along["crossing_frequency"]
    for branch in range(along.sizes["branch"]):
        for k in range(along.sizes["crossing"]):
            of_draws = turning.isel(branch=branch, crossing=k).values
            known = of_draws[np.isfinite(of_draws)]
            hz = float(np.median(known)) if len(known) else 0.0
            what = f"turning at {html.number(hz)} Hz (a Hopf bifurcation)" if hz > 1e-6 else "without turning"
            lines += _place(
                places.isel(branch=branch, crossing=k).values,
                f"the stability of a fixed point changes, {what}",
            )
    for k in range(along.sizes.get("fold", 0)):
        lines += _place(along["fold"].isel(fold=k).values, "two fixed points meet and end, or begin (a fold)")
    return sorted(lines) or ["No fixed point on this path changes its stability."]


def _place(at: np.ndarray, what: str) -> list[str]:
    """A line on what is somewhere on the path; none if too few draws have it."""
    share = np.isfinite(at).mean() if len(at) else 0.0
    if share < LEAST:
        return []
    low, middle, high = np.nanquantile(at, [0.05, 0.5, 0.95])
    band = "" if high - low < 5e-4 else f" (90 % of the draws: {low:.3f} to {high:.3f})"
    return [f"At {middle:.3f} of the path{band} {what}; in {100 * share:.0f} % of the draws."]


def coloured(asked: Asked, found: Map) -> tuple[dict[str, Any] | None, str | None]:
    """A value of all recordings that tells them apart, from their attrs, and its name."""
    data: Recordings | None = asked.recs if asked.recs is not None else asked.train
    if data is None or not set(found.names) <= set(data):
        return None, None
    first = data[found.names[0]].attrs
    for key in ("subject", "task", *first):
        values = {name: data[name].attrs.get(key) for name in found.names}
        kinds = set(map(str, values.values()))
        numbers = all(
            isinstance(v, int | float) and not isinstance(v, bool) and np.isfinite(v) for v in values.values()
        )
        texts = all(isinstance(v, str) for v in values.values()) and len(kinds) < min(len(found.names), 8)
        if len(kinds) > 1 and (numbers or texts):
            return ({n: pictures.short(str(v)) for n, v in values.items()} if texts else values), str(key)
    return None, None
