"""Each recording's own section: what was observed and forecast, its dynamics, and what may be wrong with its data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from pyro_metassm.analysis import variance_explained
from pyro_metassm.posterior import forecast, posterior
from pyro_metassm.recordings import Recordings
from pyro_metassm.reporting import atlas, html, pictures, quality
from pyro_metassm.reporting.album import Album
from pyro_metassm.reporting.asked import Asked, Missing, Scores, attempt, of_mean
from pyro_metassm.reporting.mapping import Map
from pyro_metassm.trees import part

TRIALS = 4  # behind the pictures of a recording
DIMS = 6  # latents whose coordinates are listed
COMPONENTS = 12  # of the latents, whose sizes are listed
FAINT = 0.05  # of the first component's standard deviation: one below says next to nothing


@dataclass(frozen=True)
class Trees:
    """Posterior and forecasts of a few trials of one recording."""

    posterior: xr.DataTree
    forecast: xr.DataTree | Missing


def parts(
    asked: Asked, found: Map, name: str, scores: Scores, doctor: xr.Dataset | Missing, album: Album
) -> Iterator[str]:
    """The section of a recording."""
    row = found.names.index(name)
    sd = _components(asked, name)
    yield html.facts(_facts(asked, found, name, row, sd))
    faint = int((sd < FAINT * sd.max(initial=0)).sum())
    if faint:
        yield html.note(
            f"{faint} of {len(sd)} components of the latents move the read-out by less than {100 * FAINT:.0f} % of "
            "what the first does: fewer latents may do, or the divergences have shut them down while they had little "
            "to say (pm.fit(..., kl_warmup_steps=...))."
        )
    if isinstance(doctor, xr.Dataset) and name in doctor["recording"].values:
        told = str(doctor["findings"].sel(recording=name).item())
        yield html.heading("What its data may do to a fit", 4) if told else ""
        yield (
            html.items(told.splitlines())
            if told
            else html.note("Its data have no finding that would hurt a fit.")
        )
    own = quality.of_recording(scores, name)
    yield html.table(own)
    trees = _trees(asked, name)
    if trees is None:
        yield html.note(
            "No trials of this recording were given: its flow is drawn where the model's own paths go."
        )
    elif isinstance(trees, Missing):
        yield html.note(f"No posterior of its trials: {trees.why}")
    paths = part(trees.posterior, name, "posterior")["latents"] if isinstance(trees, Trees) else None
    shown = [_flow(found, name, paths, album)]
    if isinstance(trees, Trees):
        shown.append(_trial(trees, name, album))
    yield html.pictures(shown)
    yield from _dynamics(found, name)


def _components(asked: Asked, name: str) -> np.ndarray:
    """By how much the components of the latents move the read-out over these trials; empty where that is not known."""
    data = asked.data(name)
    if data is None:
        return np.empty(0)
    explained = attempt(lambda: variance_explained(asked.fit, data, num_draws=0, seed=asked.seed))
    return np.empty(0) if isinstance(explained, Missing) else explained["sd"].values.ravel()


def _facts(asked: Asked, found: Map, name: str, row: int, sd: np.ndarray) -> list[tuple[str, str]]:
    fit = asked.fit
    rows = []
    for label, data in (("trials fitted", asked.train), ("trials shown here", asked.recs)):
        if data is not None and name in data:
            one = data[name]
            lengths = sorted({int(one.lengths.min()), int(one.lengths.max())})
            bins = " to ".join(map(str, lengths))
            said = f"{one.num_trials} of {bins} bins"
            if one.has_counts:
                seconds = max(int(one.mask.sum()), 1) * one.bin_width
                total = one.values.sum(dtype=np.float64)
                said += f"; a neuron fires at {html.number(total / seconds)} Hz on average"
            rows.append((label, said))
    rows.append(("neurons", str(dict(zip(fit.names, fit.model.neurons.num_neurons, strict=True))[name])))
    rows.append(("embedding (mean ± sd)", atlas.embedding(found, row)))
    near = found.nearest(name)
    if near is not None:
        rows.append(
            ("closest in dynamics", f"{near[0]}: they differ by {100 * near[1]:.2g} % of the flow itself")
        )
    if sd.size:
        said = ", ".join(map(html.number, sd[:COMPONENTS])) + (", …" if sd.size > COMPONENTS else "")
        rows.append(("the read-out's sd by component of the latents", said))
    report = fit.attrs.get("adaptation")
    if isinstance(report, dict) and isinstance(report.get(name), dict):
        rows.append(
            ("adapted", ", ".join(f"{k.replace('_', ' ')} {_plain(v)}" for k, v in report[name].items()))
        )
    return rows


def _plain(value: object) -> str:
    return html.number(value) if isinstance(value, float) else str(value)


def _trees(asked: Asked, name: str) -> Trees | Missing | None:
    """Draws of the first trials that can be forecast, else of the first ones."""
    data = asked.data(name)
    if data is None:
        return None
    late = asked.late(name)
    one = data[name] if late is None else late
    some = Recordings([one.take(np.arange(min(TRIALS, one.num_trials)))])
    tree = attempt(lambda: posterior(asked.fit, some, num_samples=asked.num_samples, seed=asked.seed))
    if isinstance(tree, Missing):
        return tree
    ahead: xr.DataTree | Missing = Missing(f"no trial is longer than {asked.context} bins")
    if late is not None:
        window: dict[str, Any] = {
            "context": asked.context,
            "horizon": asked.horizon,
            "num_samples": asked.num_samples,
        }
        ahead = attempt(lambda: forecast(asked.fit, some, seed=asked.seed, **window))
    return Trees(tree, ahead)


def _flow(found: Map, name: str, paths: xr.DataArray | None, album: Album) -> str:
    place = found.places.get(name)
    if place is None or isinstance(place.field, Missing):
        return ""
    drawn = attempt(
        lambda: album.picture(
            pictures.flow(place, paths),
            (5.0, 4.6),
            f"Flow of {name} with its fixed points and cycles",
            "Its flow, where states were visited (grey: nowhere near), its fixed points, and any cycle in black"
            + ("" if paths is None else ", posterior means of two trials as thin lines from a dot")
            + ".",
        )
    )
    return html.note(f"No picture of the flow: {drawn.why}") if isinstance(drawn, Missing) else drawn


def _trial(trees: Trees, name: str, album: Album) -> str:
    ahead = None if isinstance(trees.forecast, Missing) else trees.forecast
    told = "Two neurons of a trial: observed (dots) and reconstructed, with 90 % bands of the rate."
    if ahead is not None:
        told = (
            "Two neurons of a trial: observed (dots), reconstructed up to the dotted line, and forecast from there, "
            "with 90 % bands of the rate."
        )
    drawn = attempt(
        lambda: album.picture(
            pictures.trial(trees.posterior, ahead, name),
            (6.0, 4.0),
            f"Activity of {name} as it was observed, reconstructed and forecast",
            told,
        )
    )
    return html.note(f"No picture of a trial: {drawn.why}") if isinstance(drawn, Missing) else drawn


def _dynamics(found: Map, name: str) -> Iterator[str]:
    """Fixed points and cycles as tables."""
    place = found.places.get(name)
    if place is None:
        return
    if isinstance(place.points, Missing):
        yield html.note(f"No fixed points: {place.points.why}")
    else:
        rows = fixed_points(place.points)
        yield html.table(rows) if rows else html.note("No fixed point in the region that is visited.")
    if isinstance(place.field, Missing):
        yield html.note(f"No flow: {place.field.why}")
    if isinstance(place.cycles, Missing):
        yield html.note(f"No limit cycles: {place.cycles.why}")
    else:
        yield html.table(limit_cycles(place.cycles))


def fixed_points(data: xr.Dataset) -> list[dict[str, str]]:
    """A row for each fixed point that a tenth of the draws has."""
    rows = []
    for k in np.flatnonzero(data["probability"].values >= 0.1):
        point = data.isel(fixed_point=k)
        position, _ = of_mean(point["position"])
        growth, spread = (x[0] for x in of_mean(point["growth_rate"]))
        hertz, _ = of_mean(abs(point["frequency"]))
        at = ", ".join(html.number(x) for x in position[:DIMS]) + (", …" if len(position) > DIMS else "")
        rows.append(
            {
                "fixed point": atlas.kind_of(point),
                "latents": at,
                "slowest rate (1/s)": atlas.plus_minus(growth, spread),
                "its frequency (Hz)": html.number(hertz[0]),
                "in draws": f"{100 * float(point['probability']):.0f} %",
            }
        )
    return rows


def limit_cycles(data: xr.Dataset) -> list[dict[str, str]]:
    """A row for each cycle that a tenth of the draws has."""
    rows = []
    for k in np.flatnonzero(data["probability"].values >= 0.1):
        cycle = data.isel(cycle=k)
        there = np.isfinite(cycle["period"].values)
        (period, radius), (period_sd, radius_sd) = np.transpose(
            [of_mean(cycle[key]) for key in ("period", "radius")]
        )
        growth, spread = (x[0] for x in of_mean(cycle["growth_rate"]))
        rows.append(
            {
                "limit cycle": "attracts" if cycle["stable"].values[there].mean() >= 0.5 else "repels",
                "period (s)": atlas.plus_minus(period, period_sd),
                "radius (latents)": atlas.plus_minus(radius, radius_sd),
                "slowest rate (1/s)": atlas.plus_minus(growth, spread),
                "in draws": f"{100 * float(cycle['probability']):.0f} %",
            }
        )
    return rows
