"""A fit to adapt, by regressions that are cut short."""

import pytest
from adapted_fits import FIT
from fits import parts
from problems import recordings

import pyro_metassm as pm
from pyro_metassm import adaptation
from pyro_metassm.recordings import Recordings


@pytest.fixture(autouse=True, scope="module")
def brief_regressions():
    """Nothing here asks how well read-outs fit; test_few_shot.py does."""
    regression = adaptation.fit_read_outs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            adaptation, "fit_read_outs", lambda *a, **options: regression(*a, **(options | {"num_steps": 4}))
        )
        yield


@pytest.fixture(scope="module")
def old() -> Recordings:
    return recordings()


@pytest.fixture(scope="module")
def fit(old) -> pm.Fit:
    return pm.fit(*parts(old), old, **FIT)
