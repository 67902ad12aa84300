"""A fit, and the folder that it was saved into."""

import dataclasses
import math
from pathlib import Path

import pytest

import pyro_metassm as pm
from pyro_metassm import saving
from pyro_metassm.guides.encoders import RecurrentEncoder

QUICK = {"num_steps": 3, "warm_start": False, "progress": False}


@pytest.fixture(scope="module")
def recs():
    return pm.simulate.limit_cycles([2.5, 5.0, -5.0], num_trials=6, num_steps=12, num_neurons=(3, 7))


@pytest.fixture(scope="module")
def fit(recs):
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    guide = pm.guides.DKF(model, hidden_dim=6, common_dim=5, embedding_encoder=RecurrentEncoder)
    made = pm.fit(model, guide, recs, **QUICK, seed=4, validation=recs, validation_every=2)
    attrs = {"note": "ä", "sizes": (1, 2.5, None), "nan": math.nan, "nested": {"on": [True, -math.inf]}}
    return dataclasses.replace(made, attrs=attrs)


@pytest.fixture
def folder(fit, tmp_path) -> Path:
    saving.save(fit, tmp_path / "fit")
    return tmp_path / "fit"
