"""What the dynamics of a fit do, recording by recording and along a path between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_metassm import analysis
from pyro_metassm.reporting.asked import Asked, Missing, attempt

STARTS, CYCLE_STARTS = 12, 1  # of searches, for every draw
BINS = 600  # that orbits are followed before a cycle is looked for
POINTS, DRAWS_ALONG = 25, 8  # of the path
PROBES = 3  # recordings that are tried first
ALIKE = 1e-10  # distance in dynamics over the flow itself, below which there is none

Result = xr.Dataset | Missing


@dataclass(frozen=True)
class Place:
    """What the dynamics of one recording do."""

    field: Result
    points: Result
    cycles: Result


@dataclass(frozen=True)
class Map:
    """The map of the recordings.

    Attributes:
        mean, sd: of the embeddings' posteriors, ``(recording, embedding_dim)``.
        distances: of :func:`pyro_metassm.analysis.embedding_map`.
        along: of :func:`pyro_metassm.analysis.bifurcation`.
        places: by recording.
        without: why there are no dynamics to look at, if there are none.
    """

    names: list[str]
    mean: np.ndarray
    sd: np.ndarray
    distances: Result
    along: Result
    places: dict[str, Place]
    without: str | None = None

    @property
    def alike(self) -> bool:
        """Whether all recordings have the same dynamics."""
        found = self.distances
        if isinstance(found, Missing) or len(self.names) < 2:
            return False
        return bool(found["dynamics_distance"].max() <= ALIKE * found["flow"].max())

    def nearest(self, name: str) -> tuple[str, float] | None:
        """The recording whose dynamics are closest, and their difference over the flow itself (root mean squares)."""
        found = self.distances
        if isinstance(found, Missing) or len(self.names) < 2 or self.alike:
            return None
        apart = found["dynamics_distance"].mean("draw").sel(recording=name)
        others = apart.drop_sel(recording_=name)
        other = str(others["recording_"].values[int(others.values.argmin())])
        flow = found["flow"].mean("draw").sel(recording=[name, other]).mean()
        return other, float(np.sqrt(float(others.min()) / float(flow))) if float(flow) > 0 else float("nan")


def find(asked: Asked, tell: Callable[[], Any]) -> Map:
    """Everything that the dynamics allow; ``tell`` is called after each recording, and after each of two more parts."""
    fit, names = asked.fit, asked.names
    if not names:
        nothing = Missing("the fit knows the embedding of no recording")
        return Map(names, np.zeros((0, 1)), np.zeros((0, 1)), nothing, nothing, {}, nothing.why)
    with torch.no_grad():
        posterior = fit.guide.embedding_posterior(fit.statistics[[fit.names.index(name) for name in names]])
        mean, sd = (x[:, 0].double().cpu().numpy() for x in (posterior.mean, posterior.stddev))
    draws: dict[str, Any] = {"num_draws": asked.num_draws, "seed": asked.seed}
    # A model of which the dynamics cannot be looked at fails at every recording, and for one reason.
    probes = [attempt(lambda name=name: _probe(asked, name)) for name in names[:PROBES]]  # type: ignore[misc]
    failed = [probe for probe in probes if isinstance(probe, Missing)]
    if len(failed) == len(probes):
        return Map(names, mean, sd, failed[0], failed[0], {}, failed[0].why)
    recs = asked.all_data
    distances = attempt(
        lambda: analysis.embedding_map(fit, recs, num_draws=min(asked.num_draws, 10), seed=asked.seed)
    )
    tell()
    path: dict[str, Any] = {"num_points": POINTS, "num_draws": min(asked.num_draws, DRAWS_ALONG)}
    along: Result = Missing("a path needs two recordings or more")
    found = Map(names, mean, sd, distances, along, {})
    if found.alike:
        along = Missing("all recordings have the same dynamics, whatever their embeddings")
    elif len(names) > 1:
        along = attempt(lambda: analysis.bifurcation(fit, 0, recs=recs, seed=asked.seed, **path))
    tell()
    places = {}
    for name in names:
        places[name] = _place(asked, name, draws)
        tell()
    return Map(names, mean, sd, distances, along, places)


def _probe(asked: Asked, name: str) -> xr.Dataset:
    return analysis.fixed_points(asked.fit, name, recs=asked.data(name), num_draws=0, num_starts=1)


def _place(asked: Asked, name: str, draws: dict[str, Any]) -> Place:
    fit, data, size = asked.fit, asked.data(name), asked.fit.model.latent_dim
    given = {"recs": data, **draws}
    cycles: Result = Missing("a single latent has no cycles")
    field: Result = Missing("a single latent has no plane to draw a flow on")
    if size > 1:
        # In more than two latents the plane in which the states vary most says more than any two latents.
        field = attempt(lambda: analysis.flow_field(fit, name, principal=size > 2, **given))
        cycles = attempt(
            lambda: analysis.limit_cycles(fit, name, num_starts=CYCLE_STARTS, num_bins=BINS, **given)
        )
    points = attempt(lambda: analysis.fixed_points(fit, name, num_starts=STARTS, **given))
    return Place(field, points, cycles)
