"""The map of the recordings: where they lie, how far apart their dynamics are, and what each direction changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.analysis._maps import At, Maps, Source, check_recordings, to_numpy
from pyro_metassm.analysis._region import Region, visited
from pyro_metassm.analysis.fixed_points import STARTS_OF_MEAN
from pyro_metassm.analysis.fixed_points import find as find_points
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit, check_fit

STATES = 48  # of every recording, that flows are compared on
STATES_OF_ONE = 300


def embedding_map(
    fit: Fit,
    recs: Recordings | None = None,
    *,
    attrs: Sequence[str] | Mapping[str, Mapping[str, Any]] = (),
    num_draws: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    r"""The posterior of every recording's embedding, and distances between recordings in embedding and in dynamics.

    The distance of two recordings in dynamics is the mean of ``|f_a(z) - f_b(z)|^2 / dt^2`` over states ``z`` that one
    of them visits, half of them of each: 0 where both move every such state alike, whatever their embeddings are.

    Args:
        fit: a fit; of its recordings those are taken whose embedding it knows.
        recs: data: their recordings are taken, and their latents are the visited states; without them all, with the
            states of the model's own paths, as for :func:`flow_field`.
        attrs: names of ``attrs`` of the recordings in ``recs``; or by name a value for every recording.
        num_draws: of the embeddings; 0 for their means alone.
        seed: of the draws.

    Returns:
        over ``draw`` and ``recording``: ``embedding (draw, recording, embedding_dim)``; its ``mean`` and ``covariance
        (recording, embedding_dim, embedding_dim_)`` in the guide's posterior; ``distance (draw, recording,
        recording_)``, Euclidean, and ``dynamics_distance`` likewise (1/s^2 times squared latents); ``flow`` ``(draw,
        recording)``, the mean of ``|f(z) - z|^2 / dt^2`` on the recording's own states, to compare with; and each of
        ``attrs`` as a coordinate along ``recording``.

    Raises:
        ValueError: attrs that a recording lacks or that are asked for without ``recs``, and as :func:`flow_field`.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> pm.analysis.embedding_map(fit, recs, attrs=["velocity"], num_draws=4)["velocity"].values
        array([2.5, 5. ])
    """
    check_fit(fit)
    if recs is not None:
        check_recordings("embedding_map", recs)
    known = [name for k, name in enumerate(fit.names) if bool(fit.statistics[k].isfinite().all())]
    names = known if recs is None else list(recs)
    source = Source("embedding_map", fit, names, num_draws, seed)
    values = _attributes(names, recs, attrs)
    rng = np.random.default_rng(seed)
    regions = [visited(source, place, recs).states for place in source.places]
    states = [region[rng.choice(len(region), STATES, replace=len(region) < STATES)] for region in regions]
    z = torch.as_tensor(np.concatenate(states), device=fit.device)
    moves = [
        to_numpy(maps.displacement(z.expand(maps.num_draws, -1, -1))) / source.bin_width
        for maps in map(source.maps, source.places)
    ]
    number = len(names)
    apart = np.zeros((source.num_draws, number, number))
    flow = np.zeros((source.num_draws, number))
    block = lambda x, k: x[:, STATES * k : STATES * (k + 1)]
    for a in range(number):
        flow[:, a] = np.square(block(moves[a], a)).sum(-1).mean(-1)
        for b in range(a):
            square = np.square(moves[a] - moves[b]).sum(-1)
            apart[:, a, b] = apart[:, b, a] = (block(square, a).mean(-1) + block(square, b).mean(-1)) / 2
    e = np.stack([to_numpy(place.draws) for place in source.places], 1)
    rows = [fit.names.index(name) for name in names]
    with torch.no_grad():
        posterior = fit.guide.embedding_posterior(fit.statistics[rows])
        mean, variance = (to_numpy(x[:, 0].double()) for x in (posterior.mean, posterior.variance))
    pair = ("draw", "recording", "recording_")
    return xr.Dataset(
        {
            "embedding": (("draw", "recording", "embedding_dim"), e),
            "mean": (("recording", "embedding_dim"), mean),
            "covariance": (
                ("recording", "embedding_dim", "embedding_dim_"),
                variance[..., None] * np.eye(e.shape[-1]),
            ),
            "distance": (pair, np.linalg.norm(e[:, :, None] - e[:, None], axis=-1)),
            "dynamics_distance": (pair, apart, {"units": "1/s^2"}),
            "flow": (("draw", "recording"), flow, {"units": "1/s^2"}),
        },
        coords={
            "recording": names,
            "recording_": names,
            **{key: ("recording", v) for key, v in values.items()},
        },
        attrs={"bin_width": source.bin_width},
    )


def sensitivity(
    fit: Fit, at: At, *, step: float = 0.1, recs: Recordings | None = None, num_draws: int = 20, seed: int = 0
) -> xr.Dataset:
    r"""What each direction of the embedding changes in the dynamics: speed, damping, the number of fixed points.

    ``speed`` is the root mean square of ``|f(z) - z| / dt`` over visited states, ``contraction`` the mean of ``-log
    |det df/dz| / dt``: how fast areas of neighbouring states shrink (damping if above 0). Their gradients are central
    differences over ``step`` times the recordings' spread, on the same states.

    Args:
        fit: a fit.
        at: as for :func:`fixed_points`.
        step: to either side, in units of the root mean square distance of the recordings' embeddings from their mean.
        recs: data that say which states are visited, as for :func:`flow_field`.
        num_draws: of a recording's embedding; 0 for its posterior mean alone.
        seed: of the draws.

    Returns:
        over ``draw`` and ``embedding_dim``: ``speed`` and ``contraction (draw)`` (1/s), ``speed_gradient`` and
        ``contraction_gradient (draw, embedding_dim)``; ``num_fixed_points (draw)`` and ``num_fixed_points_near (draw,
        embedding_dim, side)`` a step below (side -1) and above (1).

    Raises:
        ValueError: ``step`` that is not above 0, and as :func:`flow_field`.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> pm.analysis.sensitivity(fit, "w=5", num_draws=2)["speed_gradient"].dims
        ('draw', 'embedding_dim')
    """
    if not (isinstance(step, int | float) and np.isfinite(step) and step > 0):
        raise ValueError(f"sensitivity: needed a step above 0, got {step!r}")
    source = Source("sensitivity", fit, at, num_draws, seed)
    known = fit.statistics[fit.statistics.isfinite().all(-1)]
    means = to_numpy(fit.guide.embedding_posterior(known).mean[:, 0].double())
    spread = float(np.sqrt(np.square(means - means.mean(0)).sum(-1).mean()))
    h, size = step * (spread or 1.0), fit.model.embedding_dim
    parts = []
    for place in source.places:
        region = visited(source, place, recs)
        own = source.maps(place)
        measured = {0: _features(own, region, source.bin_width, seed)}
        for d in range(size):
            for side in (-1, 1):
                moved = place.draws.clone()
                moved[:, d] += side * h
                maps = Maps(source.model, moved, place.row, source.of_draws)
                measured[side * (d + 1)] = _features(maps, region, source.bin_width, seed)
        below, above = (np.stack([measured[s * (d + 1)] for d in range(size)], 1) for s in (-1, 1))
        slope = (above - below) / (2 * h)
        one, each = ("draw",), ("draw", "embedding_dim")
        parts.append(
            xr.Dataset(
                {
                    "speed": (one, measured[0][:, 0], {"units": "1/s"}),
                    "contraction": (one, measured[0][:, 1], {"units": "1/s"}),
                    "num_fixed_points": (one, measured[0][:, 2].astype(int)),
                    "speed_gradient": (each, slope[..., 0]),
                    "contraction_gradient": (each, slope[..., 1]),
                    "num_fixed_points_near": (
                        (*each, "side"),
                        np.stack([below, above], -1)[..., 2, :].astype(int),
                    ),
                },
                coords={"side": [-1, 1]},
                attrs={"step": h, "bin_width": source.bin_width},
            )
        )
    return source.stacked(parts)


def _features(maps: Maps, region: Region, bin_width: float, seed: int) -> np.ndarray:
    """Speed, contraction and number of fixed points of every draw, ``(S, 3)``."""
    rng = np.random.default_rng(seed)
    states = region.states[
        rng.choice(len(region.states), min(STATES_OF_ONE, len(region.states)), replace=False)
    ]
    z = torch.as_tensor(states, device=maps.embedding.device).expand(maps.num_draws, -1, -1)
    after, jacobian = maps.jacobian(z)
    speed = (after - z).square().sum(-1).mean(-1).sqrt() / bin_width
    shrink = -torch.linalg.slogdet(jacobian)[1].mean(-1) / bin_width
    starts = STARTS_OF_MEAN // 8
    number = [len(found.position) for found in find_points(maps, region, starts, seed)]
    return np.stack([to_numpy(speed), to_numpy(shrink), np.array(number, float)], 1)


def _attributes(names: list[str], recs: Recordings | None, attrs) -> dict[str, list]:
    if isinstance(attrs, Mapping):
        given = attrs
    else:
        checks_names = [attrs] if isinstance(attrs, str) else list(attrs)
        if checks_names and recs is None:
            raise ValueError(f"embedding_map: needed recs for their attrs {checks_names}, got none")
        known = recs if recs is not None else {}
        given = {
            key: {name: known[name].attrs[key] for name in names if key in known[name].attrs}
            for key in checks_names
        }
    for key, values in given.items():
        lacking = [name for name in names if name not in values]
        if lacking:
            raise ValueError(
                f"embedding_map: needed {key!r} of every recording, got none of {checks.some(lacking)}"
            )
    return {key: [values[name] for name in names] for key, values in given.items()}
