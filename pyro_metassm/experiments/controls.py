"""Negative controls: recordings that look like the family's and are of other dynamics. Does adaptation say so?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import xarray as xr

from pyro_metassm._selecting import generator_of
from pyro_metassm.experiments.systems import together
from pyro_metassm.recordings import Recording, Recordings

RELAXATION = 0.5  # s, of the Ornstein-Uhlenbeck process


def unrelated(held_out: Recordings, seed: int) -> Recordings:
    """Two recordings of dynamics that no recording of the family has, as many trials as there are held out.

    1. The most damped of the held-out Duffing recordings, time reversed: the distribution of every single bin is the
       family's, and energy grows where it should shrink. (An undamped one, reversed, would be a member.)
    2. An Ornstein-Uhlenbeck process of unit variance in place of the latents: nothing to forecast but a decay.
    """
    damped = min(held_out, key=lambda name: held_out.truth[name].attrs.get("a", math.inf))
    return together([reversed_in_time(held_out, damped), ornstein_uhlenbeck(held_out[damped], seed)])


def reversed_in_time(recs: Recordings, name: str) -> Recordings:
    """One recording with its trials backwards."""
    recording, truth = recs[name], recs.truth[name]
    attrs = {"system": "reversed", "of": dict(truth.attrs)}
    new = f"{name} reversed"
    backwards = truth.isel(time=slice(None, None, -1))
    backwards.attrs = attrs
    return Recordings(
        [Recording(new, recording.observations[:, ::-1], bin_width=recording.bin_width, attrs=attrs)],
        truth={new: backwards},
    )


def ornstein_uhlenbeck(like: Recording, seed: int, noise_sd: float = 0.1) -> Recordings:
    """Two latents that forget where they were within ``RELAXATION`` s, seen by as many neurons as ``like`` has."""
    name = "ornstein-uhlenbeck"
    rng = generator_of("control", name, seed)
    shape = (like.num_trials, like.num_bins, 2)
    keep = math.exp(-like.bin_width / RELAXATION)
    latents = rng.standard_normal(shape)
    for t in range(1, like.num_bins):
        latents[:, t] = keep * latents[:, t - 1] + math.sqrt(1 - keep**2) * latents[:, t]
    read_out = rng.standard_normal((2, like.num_neurons)) / math.sqrt(2)
    rates = latents @ read_out
    attrs: dict[str, Any] = {"system": name, "relaxation": RELAXATION}
    y = (rates + noise_sd * rng.standard_normal(rates.shape)).astype(np.float32)
    truth = xr.Dataset(
        {
            "latents": (("trial", "time", "latent_dim"), latents),
            "rates": (("trial", "time", "neuron"), rates.astype(np.float32)),
            "read_out": (("latent_dim", "neuron"), read_out),
            "offset": (("neuron",), np.zeros(like.num_neurons)),
        },
        attrs=attrs,
    )
    return Recordings([Recording(name, y, bin_width=like.bin_width, attrs=attrs)], truth={name: truth})
