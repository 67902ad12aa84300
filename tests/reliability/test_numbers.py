"""Whatever a recording holds, a fit and what is done with it end in finite results or in an error in words."""

import os

import hypothesis
import numpy as np
import pytest
import random_recordings
import torch

import pyro_metassm as pm

TINY = {"num_steps": 2, "warm_start_steps": 2, "progress": False}


@hypothesis.settings(
    max_examples=12, phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(random_recordings.case())
@pytest.mark.filterwarnings("ignore")  # forecasts tell of trials that are too short for them
def test_recordings_of_every_kind(case):
    random_recordings.check(case)


@pytest.mark.slow
@hypothesis.settings(
    max_examples=int(os.environ.get("METASSM_CASES", "100")),
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(random_recordings.case())
@pytest.mark.filterwarnings("ignore")
def test_many_recordings_of_every_kind(case):
    random_recordings.check(case)


def fitted(values, family=pm.likelihoods.Poisson, **options):
    recs = pm.Recordings([pm.Recording("a", values, bin_width=0.02)])
    torch.manual_seed(0)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=4, likelihood=family)
    return pm.fit(model, pm.guides.DKF(model, hidden_dim=4), recs, **TINY | options), recs


RNG = np.random.default_rng(0)
EXTREMES = {
    "a million counts in a bin": np.where(RNG.random((4, 6, 3)) < 0.3, 1_000_000, 0),
    "neurons that never change": np.ones((4, 6, 3)),
    "silence": np.zeros((4, 6, 3)),
    "one trial": RNG.poisson(1.0, (1, 6, 3)),
    "trials of one bin": RNG.poisson(1.0, (4, 1, 3)),
    "one number": np.ones((1, 1, 1)),
    "2000 neurons": RNG.poisson(0.1, (2, 5, 2000)),
    "10000 bins": RNG.poisson(0.1, (1, 10_000, 2)),
}


@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
def test_extremes_are_fitted(values):
    fit, recs = fitted(values)
    assert np.isfinite(fit.history["elbo"]).all()
    tree = pm.posterior(fit, recs, num_samples=2)
    assert np.isfinite(tree["a/posterior/rates"]).all() and (tree["a/posterior/rates"] >= 0).all()


def test_a_learning_rate_far_too_high_stops_with_the_last_good_state():
    recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=4, num_steps=8, num_neurons=3)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=4)
    guide = pm.guides.DKF(model, hidden_dim=4)
    with pytest.raises(pm.NonFiniteLossError, match=r"step \d+.*w=") as caught:
        pm.fit(model, guide, recs, learning_rate=1e30, warm_start=False, num_steps=50, progress=False)
    state = caught.value.fit.model.state_dict()
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


@pytest.mark.parametrize("what", ["latents", "rates"])
def test_draws_that_are_not_finite_are_told_by_recording_trial_and_bin(what):
    fit, recs = fitted(RNG.normal(size=(3, 6, 3)), pm.likelihoods.Gaussian)
    with torch.no_grad():
        if what == "rates":
            fit.model.read_out.bias.fill_(torch.inf)
        else:
            fit.model.process_noise.log_scale.fill_(1e4)
    where = r"^recording 'a': needed finite {}, got others in 4 of 4 draws, first in trial 0, bin {}; "
    with pytest.raises(FloatingPointError, match=where.format(what, 3)):
        pm.forecast(fit, recs, context=3, horizon=2, num_samples=4)
    if what == "rates":
        with pytest.raises(FloatingPointError, match=where.format(what, 0)):
            pm.posterior(fit, recs, num_samples=4)


def test_observations_that_are_not_finite_are_told_by_trial_bin_and_neuron():
    values = np.ones((3, 4, 2))
    values[1, 2, 0] = np.inf
    with pytest.raises(
        ValueError, match=r"recording 'a': needed finite observations.*trial 1, bin 2, neuron 0"
    ):
        pm.Recording("a", values, bin_width=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of_data", [np.float32, np.float64])
def test_the_precision_is_the_models(dtype, of_data):
    """Data of either precision go into a model of either; parameters, statistics and draws inside are the model's."""
    recs = pm.Recordings([pm.Recording("a", RNG.normal(size=(3, 5, 2)).astype(of_data), bin_width=0.02)])
    model = pm.models.MetaSSM(recs, latent_dim=1, embedding_dim=1, hidden_dim=3).to(dtype)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=3).to(dtype), recs, **TINY)
    assert fit.dtype == dtype and {p.dtype for p in fit.guide.parameters()} == {dtype}
    assert pm.posterior(fit, recs, num_samples=2)["a/posterior/latents"].dtype == np.float32  # as documented
