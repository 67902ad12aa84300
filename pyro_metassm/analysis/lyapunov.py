"""Lyapunov spectra of learned dynamics."""

from __future__ import annotations

import numpy as np
import torch
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.analysis._maps import At, Source, to_numpy
from pyro_metassm.analysis._region import visited
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit

BURN_IN = 200


def lyapunov(
    fit: Fit,
    at: At,
    *,
    num_bins: int = 1000,
    num_starts: int = 4,
    recs: Recordings | None = None,
    num_draws: int = 20,
    seed: int = 0,
) -> xr.Dataset:
    r"""Lyapunov exponents along noise-free orbits, by QR decompositions of products of Jacobians.

    ``J_t Q_{t-1} = Q_t R_t``, and the exponents are the means over ``num_bins`` bins of ``log |diag R_t| / dt``,
    after 200 bins that the orbit and ``Q`` take to settle. On a fixed point they are the growth rates of
    :func:`fixed_points`, on a cycle one is 0; a positive one is chaos. They are means over orbits from several
    starts, which may end on different attractors: ``spread`` tells.

    Args:
        fit: a fit.
        at: as for :func:`fixed_points`.
        num_bins: of an orbit.
        num_starts: orbits, from visited states and between them.
        recs: data that say which states are visited, as for :func:`flow_field`.
        num_draws: of a recording's embedding; 0 for its posterior mean alone.
        seed: of the draws and the starts.

    Returns:
        over ``draw`` and ``exponent``, falling: ``exponents`` (1/s); ``spread``, their standard deviation over the
        orbits; ``dimension (draw)``, that of Kaplan and Yorke. NaN where an orbit leaves the finite numbers.

    Raises:
        ValueError: as :func:`flow_field`.

    References:
        Benettin, Galgani, Giorgilli and Strelcyn, Meccanica 15 (1980).

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> pm.analysis.lyapunov(fit, "w=5", num_bins=20, num_draws=2)["exponents"].dims
        ('draw', 'exponent')
    """
    checks.integers(num_bins=num_bins, num_starts=num_starts)
    source = Source("lyapunov", fit, at, num_draws, seed)
    parts = []
    for place in source.places:
        region = visited(source, place, recs)
        maps = source.maps(place)
        starts = torch.as_tensor(region.starts(num_starts, seed), device=fit.device)
        z = starts.expand(maps.num_draws, -1, -1)
        q = torch.eye(source.latent_dim, dtype=z.dtype, device=z.device).expand(*z.shape[:2], -1, -1)
        total = torch.zeros_like(z)
        for step in range(BURN_IN + num_bins):
            z, jacobian = maps.jacobian(z)
            q, r = torch.linalg.qr((jacobian @ q).nan_to_num(posinf=0.0, neginf=0.0))
            if step >= BURN_IN:
                total = total + r.diagonal(dim1=-2, dim2=-1).abs().clamp(min=1e-300).log()
        exponents = to_numpy(torch.where(z.isfinite(), total, torch.nan)) / (num_bins * source.bin_width)
        exponents = -np.sort(-exponents, axis=-1)
        mean = exponents.mean(1)
        each = ("draw", "exponent")
        parts.append(
            xr.Dataset(
                {
                    "exponents": (each, mean, {"units": "1/s"}),
                    "spread": (each, exponents.std(1), {"units": "1/s"}),
                    "dimension": (("draw",), np.array([_kaplan_yorke(row) for row in mean])),
                },
                attrs={"bin_width": source.bin_width},
            )
        )
    return source.stacked(parts)


def _kaplan_yorke(exponents: np.ndarray) -> float:
    """``k + sum_{i <= k} l_i / |l_{k+1}|``, ``k`` the most exponents whose sum is not below 0."""
    sums = np.cumsum(exponents)
    if not np.isfinite(sums).all():
        return float("nan")
    k = int((sums >= 0).sum()) if sums[0] >= 0 else 0
    if k == 0:
        return 0.0
    return float(len(exponents)) if k == len(exponents) else k + float(sums[k - 1] / abs(exponents[k]))
