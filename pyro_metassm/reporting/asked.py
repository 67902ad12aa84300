"""What a page is made of: the fit, the data beside it, and what was found; what cannot be found says why."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit, check_fit

T = TypeVar("T")
Scores = dict[str, dict[str, dict[str, float]]]
"""By score, recording and method."""
HORIZON = 50  # bins forecast, at most, unless told


@dataclass(frozen=True)
class Missing:
    """What could not be found, and why."""

    why: str


@dataclass(frozen=True)
class Told:
    """What is known of a fit beside it: what a run wrote when it was made.

    Attributes:
        scores: of held-out trials.
        facts: names and values for the overview.
        about: in a sentence, what the scores are of.
        notes: remarks.
    """

    scores: Scores = field(default_factory=dict)
    facts: tuple[tuple[str, str], ...] = ()
    about: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A fit, and what its page is to be about.

    Attributes:
        fit: the fit.
        recs: trials to look at.
        train: trials that it was fitted to.
        told: what is known beside.
        context, horizon: of forecasts, in bins.
        num_samples: posterior draws of trials.
        num_draws: of embeddings.
        seed: of all of them.
    """

    fit: Fit
    recs: Recordings | None
    train: Recordings | None
    told: Told
    context: int
    horizon: int
    num_samples: int
    num_draws: int
    seed: int

    @property
    def names(self) -> list[str]:
        """The recordings with a section, whose embedding is known: those of the data first."""
        there = self.fit.statistics.isfinite().all(-1).tolist()
        known = [name for name, good in zip(self.fit.names, there, strict=True) if good]
        given = [] if self.recs is None else [name for name in self.recs if name in known]
        return given + [name for name in known if name not in given]

    def data(self, name: str) -> Recordings | None:
        """The trials of a recording, if there are any."""
        return self.recs.select([name]) if self.recs is not None and name in self.recs else None

    @property
    def all_data(self) -> Recordings | None:
        """The trials, if they are of all recordings of the page."""
        there = self.recs is not None and set(self.names) <= set(self.recs)
        return self.recs.select(self.names) if self.recs is not None and there else None

    def late(self, name: str) -> Recording | None:
        """The trials of a recording that can be forecast, if there are any."""
        if self.recs is None or name not in self.recs:
            return None
        rows = np.flatnonzero(self.recs[name].lengths > self.context)
        return self.recs[name].take(rows) if len(rows) else None


def window_of(recs: Recordings | None, context: int | None, horizon: int | None) -> tuple[int, int]:
    """Bins given and bins forecast: half of the usual trial, and what follows, 50 bins at most."""
    usual = 2 if recs is None else min(int(np.median(r.lengths)) for r in recs.values())
    context = max(1, usual // 2) if context is None else context
    horizon = min(max(1, usual - context), HORIZON) if horizon is None else horizon
    checks.integers(context=context, horizon=horizon)
    return context, horizon


def refuse(fit: Fit, recs: Recordings | None, train: Recordings | None) -> None:
    """Raise for data that are not the fit's.

    Raises:
        ValueError: recordings that it does not know, with another number of neurons or in other bins; training trials
            that lack a recording of the others.
    """
    check_fit(fit)
    for data in (recs, train):
        for recording in () if data is None else data.values():
            fit.model.neurons.check([recording.name], [recording.num_neurons])
            fit.model.observation.check(recording)
        width = fit.attrs.get("bin_width")
        if data is not None and width is not None and not math.isclose(data.bin_width, width, rel_tol=1e-6):
            raise ValueError(
                f"report: needed bins of {width:g} s, as the fit was made with, got {data.bin_width:g} s"
            )
    if train is not None and recs is not None and (lacking := [n for n in recs if n not in train]):
        raise ValueError(
            f"report: needed training trials of all recordings, got none of {checks.some(lacking)}"
        )


def attempt(make: Callable[[], T]) -> T | Missing:
    """What a function finds, or why it cannot; its warnings are the page's business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return make()
        except (ValueError, FloatingPointError) as error:
            return Missing(str(error))


def of_mean(values: xr.DataArray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sd over draws, of those that have a value; NaN of none."""
    there = values.notnull().sum("draw")
    mean = values.mean("draw").where(there > 0)
    return mean.values, values.std("draw").where(there > 0).values


def methods_of(scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The methods of a score, in their order."""
    return list(dict.fromkeys(method for row in scores.values() for method in row))
