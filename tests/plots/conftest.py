"""A fit whose pictures are looked at."""

import numpy as np
import pytest
from fits import parts

import pyro_metassm as pm


@pytest.fixture(scope="module")
def recs():
    recs = pm.simulate.limit_cycles([2.5, -5.0], num_trials=6, num_steps=14, num_neurons=(3, 5))
    shorter = recs["w=-5"].observations.copy()
    shorter[0, 4:], shorter[1, 10:], shorter[2, 3] = np.nan, np.nan, np.nan
    made = [recs["w=2.5"], pm.Recording("w=-5", shorter, bin_width=recs.bin_width)]
    return pm.Recordings(made, truth=recs.truth)


@pytest.fixture(scope="module")
def fit(recs):
    return pm.fit(
        *parts(recs), recs, num_steps=6, warm_start=False, progress=False, validation=recs, validation_every=3
    )


@pytest.fixture(scope="module")
def tree(fit, recs):
    return pm.posterior(fit, recs, num_samples=9)
