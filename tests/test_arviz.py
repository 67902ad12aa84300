"""The installed ArviZ, 0.23 or 1.x, reads, summarises and plots what the library gives it."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest

import pyro_metassm as pm


@pytest.fixture(scope="module")
def az():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.23 announces its successor once a day
        import arviz

        return arviz


@pytest.fixture(scope="module")
def tree():
    recs = pm.simulate.limit_cycles([2.0, 3.0, 4.0], num_trials=6, num_steps=15, num_neurons=6)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=2, hidden_dim=8)
    fit = pm.fit(
        model, pm.guides.DKF(model, hidden_dim=4), recs, num_steps=3, warm_start_steps=3, progress=False
    )
    return pm.posterior(fit, recs, num_samples=40, predictive=True, log_likelihood=True)


def test_the_embedding_is_summarised_and_plotted(az, tree):
    data = pm.to_arviz(tree)
    table = az.summary(data, var_names=["embedding"], kind="stats", round_to="none")
    expected = tree["posterior"]["embedding"].mean(("chain", "draw")).values.ravel()
    np.testing.assert_allclose(table["mean"].astype(float), expected, rtol=1e-5)
    az.plot_forest(data, var_names=["embedding"], combined=True)
    az.plot_pair(data, var_names=["embedding"], coords={"embedding_dim": 0})
    plt.close("all")


def test_a_recording_has_its_groups(az, tree):
    data = pm.to_arviz(tree, "w=3")
    for group in ("posterior", "posterior_predictive", "log_likelihood", "observed_data", "constant_data"):
        assert group in (data.groups() if callable(data.groups) else [g.strip("/") for g in data.groups])
    np.testing.assert_array_equal(data["posterior"]["latents"], tree["w=3/posterior/latents"])
    table = az.summary(data, var_names=["latents"], coords={"trial": 0, "time": [0.0]}, kind="stats")
    assert len(table) == 2
    with pytest.raises(KeyError):
        pm.to_arviz(tree, "nobody")
