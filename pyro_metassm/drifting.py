"""Does a recording stay the same? A fit of its first trials, scored on its last ones."""

from __future__ import annotations

from collections.abc import Callable

import xarray as xr

from pyro_metassm.metrics import rate_bps
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit


def drift(
    fit: Callable[[Recordings], Fit],
    recs: Recordings,
    *,
    share: float = 1 / 3,
    score: Callable[[Fit, Recordings], xr.DataArray] = rate_bps,
    test_fraction: float = 0.25,
    seed: int = 0,
) -> xr.Dataset:
    """Score the last third of every recording by a fit on its first third, beside held-out trials of the first.

    The fit sees ``1 - test_fraction`` of the first trials; what it loses from the others of them to the last trials is
    drift, of the neurons or of what the animal does, and not the price of being held out.

    Args:
        fit: makes a fit of the recordings that it is given.
        recs: recordings with their trials in the order in which they were recorded.
        share: of the trials at each end, at most a half.
        score: of a fit on trials, ``(recording,)``, higher is better: :func:`pyro_metassm.metrics.co_bps`, or
            ``functools.partial(pm.metrics.fp_bps, context=10)``.
        test_fraction: share of the first trials that is held out.
        seed: of the draw of these.

    Returns:
        over ``recording``: ``first`` and ``last``, the scores, and ``drift``, the last minus the first.

    Raises:
        ValueError: a fit in place of a function, a share that is not within (0, 0.5], recordings with too few trials.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=24, num_steps=20, noise="poisson")
        >>> def fit(train):
        ...     model = pm.models.MetaSSM(train, latent_dim=2, embedding_dim=1, likelihood=pm.likelihoods.Poisson)
        ...     options = {"num_steps": 5, "warm_start_steps": 5, "progress": False}
        ...     return pm.fit(model, pm.guides.DKF(model), train, **options)
        >>> list(pm.drift(fit, recs))
        ['first', 'last', 'drift']
    """
    if not callable(fit):
        raise ValueError(
            f"drift: needed a function that makes a fit of the recordings that it is given, got {type(fit).__name__}"
        )
    first, last = recs.ends(share)
    train, same = first.split(test_fraction, seed)
    made = fit(train)
    found = {"first": score(made, same), "last": score(made, last)}
    return xr.Dataset(found | {"drift": found["last"] - found["first"]}, attrs={"share": share, "seed": seed})
