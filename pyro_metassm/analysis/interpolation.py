"""Trajectories on a grid of embeddings, and what they predict for a recording."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.analysis._maps import At, Maps, Source, row_of, to_numpy
from pyro_metassm.result import Fit

Decoder = Callable[[np.ndarray], np.ndarray]


def interpolate(
    fit: Fit,
    grid_around: At,
    *,
    num_bins: int = 50,
    spacing: float = 0.25,
    size: int = 3,
    plane: tuple[int, ...] = (0, 1),
    initial: np.ndarray | None = None,
    recording: str | None = None,
    decoder: Decoder | None = None,
    num_draws: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    r"""Noise-free trajectories from one state, under embeddings on a grid around one, and what they mean for neurons.

    ``z_{t+1} = E[z' | z_t, e + spacing r (i a_x + j a_y)]``, with ``r`` the root mean square distance of the
    recordings' embeddings from their mean and ``a`` the directions of two embedding dimensions; with a single one the
    grid is a row.

    Args:
        fit: a fit.
        grid_around: a recording's name, an embedding ``(embedding_dim,)`` or draws of it ``(draw, embedding_dim)``.
        num_bins: of the trajectories, the initial state among them.
        spacing: of the grid, in units of ``r``; far from all recordings learned dynamics may explode.
        size: points along each side, odd, so that the middle is ``grid_around``.
        plane: embedding dimensions of the grid.
        initial: the first state, ``(latent_dim,)``; None for the mean of the model's initial state.
        recording: whose neurons to predict; default ``grid_around``, if it is a recording.
        decoder: takes predicted rates ``(..., time, neuron)`` of that recording to behaviour ``(..., time, output)``.
        num_draws: of a recording's embedding; 0 for its posterior mean alone.
        seed: of the draws.

    Returns:
        over ``draw``, ``row`` and ``column`` of the grid: ``embedding (embedding_dim)``; ``latents (time,
        latent_dim)``; with a recording ``rates (time, neuron)``, expected observations per bin, and with a decoder
        ``decoded (time, output)``; ``time`` in s.

    Raises:
        ValueError: an even ``size``, a plane that is none, a spacing that is not above 0, a first state of another
            size, a recording that the fit does not know, a decoder without a recording or that returns another shape,
            and as :func:`flow_field`.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20, num_neurons=12)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=2)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> pm.analysis.interpolate(fit, "w=5", num_bins=10, num_draws=2)["rates"].shape
        (2, 3, 3, 10, 12)
    """
    checks.integers(num_bins=num_bins, size=size)
    source = Source("interpolate", fit, grid_around, num_draws, seed)
    if source.dim is not None:
        raise ValueError("interpolate: needed one embedding or one recording, got several")
    (place,), dim = source.places, fit.model.embedding_dim
    if not (isinstance(spacing, int | float | np.number) and np.isfinite(spacing) and spacing > 0):
        raise ValueError(f"interpolate: needed a spacing above 0, got {spacing!r}")
    plane = (plane[0],) if dim == 1 and plane == (0, 1) else plane
    known = isinstance(plane, tuple | list) and len(plane) == min(2, dim) and len(set(plane)) == len(plane)
    if not (known and all(isinstance(k, int | np.integer) and 0 <= k < dim for k in plane)):
        raise ValueError(
            f"interpolate: needed a plane of two of the {dim} embedding dimensions, got {plane!r}"
        )
    if size % 2 == 0:
        raise ValueError(f"interpolate: needed an odd size, so that the grid has a middle, got {size}")
    if recording is None and place.row is not None:
        recording = str(place.label)
    if decoder is not None and recording is None:
        raise ValueError(
            "interpolate: needed a recording whose rates the decoder takes, got none; pass recording="
        )
    statistics = fit.statistics[fit.statistics.isfinite().all(-1)]
    means = to_numpy(fit.guide.embedding_posterior(statistics).mean[:, 0].double())
    radius = float(np.sqrt(np.square(means - means.mean(0)).sum(-1).mean())) or 1.0
    offsets = spacing * radius * (np.arange(size) - size // 2)
    rows, columns = (offsets, offsets) if len(plane) == 2 else (np.zeros(1), offsets)
    shift = np.zeros((len(rows), len(columns), dim))
    shift[..., plane[0]] += columns
    if len(plane) == 2:
        shift[..., plane[1]] += rows[:, None]
    e = place.draws[:, None, None] + torch.as_tensor(shift, device=fit.device)
    draws = torch.arange(len(e), device=fit.device).repeat_interleave(shift.shape[0] * shift.shape[1])
    maps = Maps(
        source.model,
        e.reshape(-1, dim),
        place.row,
        {key: value[draws] for key, value in source.of_draws.items()},
    )
    start = _initial(source, maps, initial)
    z = (
        torch.cat([start[:, None], maps.path(start[:, None], num_bins - 1)[:, 0]], 1)
        if num_bins > 1
        else start[:, None]
    )
    grid = (source.num_draws, *shift.shape[:2])
    lead = ("draw", "row", "column")
    found = {
        "embedding": ((*lead, "embedding_dim"), to_numpy(e)),
        "latents": ((*lead, "time", "latent_dim"), to_numpy(z).reshape(*grid, num_bins, -1)),
    }
    if recording is not None:
        rates = _rates(source, maps, z, recording).reshape(*grid, num_bins, -1)
        found["rates"] = ((*lead, "time", "neuron"), rates)
        if decoder is not None:
            decoded = np.asarray(decoder(rates))
            if decoded.shape[:-1] != rates.shape[:-1]:
                raise ValueError(
                    f"interpolate: needed a decoder from {rates.shape} to {(*rates.shape[:-1], 'outputs')}, got "
                    f"{decoded.shape}"
                )
            found["decoded"] = ((*lead, "time", "output"), decoded)
    time = ("time", np.arange(num_bins) * source.bin_width, {"units": "s"})
    attrs = {"plane": list(plane), "radius": radius, "recording": recording or ""}
    return xr.Dataset(found, coords={"time": time}, attrs=attrs)


def _initial(source: Source, maps: Maps, initial: np.ndarray | None) -> torch.Tensor:
    """The first states, ``(S, latent_dim)``."""
    if initial is None:
        with torch.no_grad(), maps.model.given(maps.shared):
            mean = maps.model.initial_state(maps.embedding).mean
        return mean.expand(maps.num_draws, 1, 1, -1)[:, 0, 0]
    value = np.asarray(checks.as_numpy(initial), float)
    if value.shape != (source.latent_dim,) or not np.isfinite(value).all():
        raise ValueError(
            f"interpolate: needed a finite first state ({source.latent_dim},), got shape {value.shape}"
        )
    return torch.as_tensor(value, device=maps.embedding.device).expand(maps.num_draws, -1)


def _rates(source: Source, maps: Maps, z: torch.Tensor, recording: str) -> np.ndarray:
    """Expected observations of a recording's neurons along paths ``(S, T, latent_dim)``."""
    row = row_of(source.caller, source.fit, recording)
    rows = torch.tensor([row], device=z.device)
    number = source.model.neurons.num_neurons[row]
    with torch.no_grad(), maps.model.given(maps.shared):
        predictor = maps.model.read_out(z[:, None, None], rows, number)
        return to_numpy(maps.model.likelihood(predictor, rows).mean[:, 0, 0])
