"""How well the future of a trial is forecast from its past, by where the past ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.comparing import forecast_scores
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit, check_fit


def leave_future_out(
    fit: Fit,
    test: Recordings,
    *,
    origins: Sequence[int],
    horizon: int,
    num_samples: int = 100,
    seed: int = 0,
) -> xr.DataArray:
    r"""Log score of forecasts from several origins: what takes the place of leave-one-out along time.

    The bins of a trial are not exchangeable: to leave one out and keep its neighbours says how well the model
    interpolates. Here everything from the origin ``c`` on is left out, and the next ``horizon`` bins are scored with
    draws ``z_s`` of :func:`pyro_metassm.forecast`::

        log mean_s p(y_tn | z_s),  mean over the observed (t, n) with c <= t < c + horizon

    Nothing is fitted again: the parameters come from the training trials, so give it other ones.

    Args:
        fit: a fit that knows the recordings.
        test: trials that were not trained on.
        origins: bins that forecasts are given, each at least 1.
        horizon: bins scored after each origin; fewer where a trial ends before.
        num_samples: draws behind every score.
        seed: of the draws.

    Returns:
        ``log_score (recording, trial, origin)``, nats per bin and neuron, higher is better; NaN for trials that have
        nothing after the origin, and for numbers that are no trial of the recording. For two fits,
        ``(a - b).mean(("recording", "trial"))`` is the difference by origin, trial by trial on the same data.

    Raises:
        ValueError: an unknown recording, sizes below 1, no trial of a recording as long as an origin.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> train, test = recs.split()
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), train, num_steps=5, warm_start_steps=5, progress=False)
        >>> score = pm.leave_future_out(fit, test, origins=(5, 10, 15), horizon=5, num_samples=20)
        >>> score.sizes
        Frozen({'recording': 2, 'trial': 2, 'origin': 3})
    """
    check_fit(fit)
    origins = list(origins)
    if not origins:
        raise ValueError("origins: needed at least one bin, got none")
    for origin in origins:
        checks.integers(origins=origin, horizon=horizon, num_samples=num_samples)
    most = max(recording.num_trials for recording in test.values())
    scores = np.full((len(test), most, len(origins)), np.nan)
    for row, name in enumerate(test):
        for column, origin in enumerate(origins):
            trials, found = forecast_scores(fit, test, name, origin, horizon, num_samples, seed)
            scores[row, trials, column] = found["forecast_log_score"]
    coords = {"recording": list(test), "trial": np.arange(most), "origin": origins}
    attrs = {"long_name": "log score", "units": "nats per bin and neuron", "horizon": horizon}
    return xr.DataArray(scores, coords, ("recording", "trial", "origin"), "log_score", attrs)
