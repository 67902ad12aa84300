"""A fit to draw from, and one of counts."""

import pytest
from drawn_fits import fit_for
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.recordings import Recordings


@pytest.fixture(scope="module")
def fit(recs) -> pm.Fit:
    return fit_for(recs)


@pytest.fixture(scope="module")
def counts() -> Recordings:
    return recordings(counts=True)


@pytest.fixture(scope="module")
def counts_fit(counts) -> pm.Fit:
    return fit_for(counts, pm.likelihoods.Poisson)
