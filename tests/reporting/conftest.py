"""A fit whose page is written quickly."""

import sys

import numpy as np
import pytest
from reported import IMAGE, fitted, recordings

import pyro_metassm as pm
from pyro_metassm.reporting import album, mapping


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Shorter paths between recordings: most of the time of a page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapping, "POINTS", 4)
        patch.setattr(mapping, "DRAWS_ALONG", 1)
        patch.setattr(mapping, "BINS", 150)
        patch.setattr(sys.modules["pyro_metassm.analysis.bifurcation"], "BINS", 150)
        patch.setattr(album, "SHARP", 50)
        yield


@pytest.fixture(scope="module")
def data():
    train, test = recordings().split(test_fraction=0.4)
    cut = test[IMAGE].observations.copy()
    cut[0, 5:] = np.nan  # ends before the forecasts begin
    short = pm.Recording(IMAGE, cut, bin_width=0.02, condition=test[IMAGE].condition)
    return train, pm.Recordings([short if r.name == IMAGE else r for r in test.values()])


@pytest.fixture(scope="module")
def fit(data):
    return fitted(data[0])
