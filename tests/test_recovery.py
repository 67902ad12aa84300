"""Recovery of what simulations know: slow, run by `make test-slow`."""

import numpy as np
import pytest
from scipy.stats import spearmanr

import pyro_metassm as pm

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cycles():
    recs = pm.simulate.limit_cycles([-5.0, -2.5, 2.5, 5.0], seed=4)
    train, test = recs.split(seed=4)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
    return recs, test, pm.fit(model, pm.guides.DKF(model), train, num_steps=200, seed=4, progress=False)


def test_limit_cycles_are_forecast(cycles):
    _, test, fit = cycles
    score = pm.metrics.forecast_r2(fit, test, context=50, horizon=50).sel(horizon_step=50)
    assert float(score.mean()) >= 0.97 and float(score.min()) >= 0.95
    assert float(pm.metrics.reconstruction_r2(fit, test).min()) >= 0.98


def test_embeddings_are_in_the_order_of_the_speeds(cycles):
    recs, test, fit = cycles
    embedding = pm.posterior(fit, test, num_samples=50)["posterior"]["embedding"].squeeze("embedding_dim")
    fast = [n for n in recs.names if recs.truth[n].attrs["speed"] == 5.0]
    slow = [n for n in recs.names if recs.truth[n].attrs["speed"] == 2.5]
    # The sign of a velocity is not in the data; every draw tells the two speeds apart, on the same side.
    gap = embedding.sel(recording=fast).min("recording") - embedding.sel(recording=slow).max("recording")
    gap_down = embedding.sel(recording=slow).min("recording") - embedding.sel(recording=fast).max("recording")
    assert bool((gap > 0).all()) or bool((gap_down > 0).all())


def test_intervals_of_rates_cover(cycles):
    recs, test, fit = cycles
    tree = pm.posterior(fit, test, num_samples=100, seed=1)
    inside = []
    for name in recs.names:
        low, high = np.quantile(tree[f"{name}/posterior"]["rates"].values[0], [0.05, 0.95], axis=0)
        truth = test.truth[name]["rates"].values
        inside.append(((truth >= low) & (truth <= high)).mean())
    # Mean-field bins and learned parameters: not exact, but neither empty nor everything.
    assert 0.5 < np.mean(inside) <= 1.0


def test_six_speeds_are_ranked():
    recs = pm.simulate.limit_cycles(np.linspace(1.0, 5.0, 6), num_trials=64, seed=5)
    train, test = recs.split(seed=5)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
    fit = pm.fit(model, pm.guides.DKF(model), train, num_steps=150, seed=5, progress=False)
    embedding = fit.statistics[:, 0].numpy()
    assert abs(spearmanr(embedding, np.linspace(1.0, 5.0, 6)).statistic) >= 0.94
    score = pm.metrics.forecast_r2(fit, test, context=50, horizon=50).sel(horizon_step=50)
    assert float(score.mean()) >= 0.95


def test_poisson_recovers_rates_where_a_random_start_collapses():
    recs = pm.simulate.limit_cycles(
        [-5.0, -2.5, 2.5, 5.0], noise="poisson", num_neurons=100, num_trials=96, seed=6
    )
    train, test = recs.split(seed=6)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=pm.likelihoods.Poisson)
    guide = pm.guides.DKF(model)

    def worst(fit):
        tree = pm.posterior(fit, test, num_samples=20)
        return min(
            float(
                pm.metrics.r2(
                    test.truth[n]["rates"].values,
                    tree[f"{n}/posterior"]["rates"].mean(("chain", "draw")).values,
                )
            )
            for n in recs.names
        )

    assert worst(pm.fit(model, guide, train, num_steps=200, seed=6, progress=False)) >= 0.9
    assert worst(pm.fit(model, guide, train, num_steps=200, seed=6, warm_start=False, progress=False)) < 0.5
