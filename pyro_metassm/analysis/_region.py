"""The states that data visit: where learned dynamics mean something."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm.analysis._maps import Place, Source, check_recordings, to_numpy
from pyro_metassm.draws import posterior_chunks, seeded
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

PATHS, BINS = 64, 200  # of the model itself, where there are no data
TRIALS, SAMPLES = 64, 5  # of data
STATES = 4000  # that are kept
MARGIN = 0.1  # of the region's width, beyond the outermost states on either side
LEAST = 1e-6  # of the largest sd: how far states vary at least along every axis


@dataclass(frozen=True)
class Region:
    """Visited states, and what lies among them.

    Attributes:
        states: ``(num_states, latent_dim)``.
        center: their mean.
        axes: their principal axes, ``(axis, latent_dim)``, orthonormal, by falling variance.
        sd: along these.
        scale: root mean square distance from the mean.
    """

    states: np.ndarray
    center: np.ndarray
    axes: np.ndarray
    sd: np.ndarray
    scale: float

    @classmethod
    def of(cls, states: np.ndarray) -> Region:
        """The region of states ``(num_states, latent_dim)``, all finite."""
        center = states.mean(0)
        _, spread, axes = np.linalg.svd(states - center, full_matrices=False)
        if len(spread) < states.shape[1]:  # fewer states than latents
            axes = np.linalg.qr(np.concatenate([axes, np.eye(states.shape[1])]).T)[0].T[: states.shape[1]]
            spread = np.concatenate([spread, np.zeros(states.shape[1] - len(spread))])
        sd = spread / np.sqrt(len(states))
        axes = axes * np.where(axes[np.arange(len(axes)), np.abs(axes).argmax(1)] < 0, -1.0, 1.0)[:, None]
        sd = np.maximum(sd, LEAST * sd[0] + np.finfo(float).tiny)
        return cls(states, center, axes, sd, float(np.sqrt((sd**2).sum())))

    def coordinates(self, z: np.ndarray) -> np.ndarray:
        """States along the principal axes, from the mean."""
        return (z - self.center) @ self.axes.T

    def contains(self, z: np.ndarray) -> np.ndarray:
        """Which states lie in the box around the visited ones along their axes, widened by 10 % on either side."""
        visited = self.coordinates(self.states)
        low, high = visited.min(0), visited.max(0)
        margin = MARGIN * (high - low) + 1e-3 * self.scale
        with np.errstate(invalid="ignore"):
            at = self.coordinates(z)
            return ((at >= low - margin) & (at <= high + margin)).all(-1)

    def nearest(self, z: np.ndarray) -> np.ndarray:
        """Distance from states ``(..., latent_dim)`` to the nearest visited one, over :attr:`scale`."""
        flat = z.reshape(-1, z.shape[-1])
        found = np.empty(len(flat))
        for start in range(0, len(flat), 500):
            part = flat[start : start + 500]
            found[start : start + 500] = np.linalg.norm(part[:, None] - self.states, axis=-1).min(1)
        return found.reshape(z.shape[:-1]) / self.scale

    def starts(self, number: int, seed: int) -> np.ndarray:
        """States to begin searches from: half of them visited, half between two visited ones."""
        rng = np.random.default_rng(seed)
        first, second = rng.integers(len(self.states), size=(2, number))
        share = rng.uniform(size=(number, 1)) * (np.arange(number) % 2)[:, None]
        return (1 - share) * self.states[first] + share * self.states[second]


def visited(source: Source, place: Place, recs: Recordings | None) -> Region:
    """The states visited at a place.

    Of data, if these are given: those of the recording, or of all of them for an embedding that is no recording's.
    Else of the model's own paths from its initial state, with process noise, at the middle of the embedding's draws.
    """
    if recs is not None:
        check_recordings(source.caller, recs)
        names = [str(place.label)] if place.row is not None else list(recs)
        known = [name for name in names if name in recs]
        if not known:
            raise ValueError(
                f"{source.caller}: needed recording {names[0]!r} in recs, got {checks.some(recs.names)}; leave recs "
                "out for the states that the model itself visits"
            )
        states = np.concatenate(
            [mean_latents(source.fit, recs.select([name]), name, source.seed) for name in known]
        )
    else:
        with seeded(source.seed, "visited", source.fit.device):
            states = to_numpy(source.maps_of_mean(place).noisy_path(PATHS, BINS)[0]).reshape(
                -1, source.latent_dim
            )
    states = states[np.isfinite(states).all(1)]
    scale = np.median(np.abs(states), 0) if len(states) else np.zeros(1)
    states = states[(np.abs(states) < 1e3 * (scale + 1e-12).max()).all(1)] if len(states) else states
    if len(states) < 2 or not np.ptp(states, axis=0).any():
        raise ValueError(
            f"{source.caller}: needed visited states that differ, got {len(states)} finite ones at {place.label!r}; "
            "pass recs=, the data, if the model's own paths explode"
        )
    rng = np.random.default_rng(source.seed)
    return Region.of(
        states if len(states) <= STATES else states[rng.choice(len(states), STATES, replace=False)]
    )


def mean_latents(fit: Fit, recs: Recordings, name: str, seed: int = 0) -> np.ndarray:
    """Posterior mean latents of up to 64 trials, ``(bins of all trials, latent_dim)``."""
    return np.concatenate(trial_latents(fit, recs, name, seed))


def trial_latents(fit: Fit, recs: Recordings, name: str, seed: int = 0) -> list[np.ndarray]:
    """Posterior mean latents of up to 64 trials, each ``(bins of the trial, latent_dim)``."""
    return [draws.mean(0) for draws in trial_draws(fit, recs, name, SAMPLES, seed)]


@machine.alone()
def trial_draws(fit: Fit, recs: Recordings, name: str, num_draws: int, seed: int = 0) -> list[np.ndarray]:
    """Posterior draws of the latents of up to 64 trials, each ``(draw, bins of the trial, latent_dim)``."""
    some = recs.select([name])
    some = some.take_trials(TRIALS) if recs[name].num_trials > TRIALS else some
    found: dict[int, list[np.ndarray]] = {}
    for chunk in posterior_chunks(fit, some, name, num_draws, seed):
        draws = to_numpy(chunk.latents[:, 0].double())
        there = to_numpy(chunk.batch.time_mask[0])
        for row, trial in enumerate(chunk.trials.tolist()):
            found.setdefault(trial, []).append(draws[:, row, there[row]])
    return [np.concatenate(parts) for parts in found.values()]
