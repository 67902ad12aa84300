"""`pm.compare`: exact where the posterior is exact, scores by closed forms, and the right model chosen."""

import copy

import numpy as np
import pytest
import scipy.stats
import torch
from problems import linear_gaussian, recordings
from test_linear_gaussian import as_fit, evidences

import pyro_metassm as pm
from pyro_metassm.comparing import pareto_smoothed

SIZES = {"latent_dim": 2, "embedding_dim": 1, "hidden_dim": 16}


@pytest.fixture(scope="module")
def exact():
    recs = recordings(missing=False)
    model = linear_gaussian(recs)
    return recs, as_fit(model, pm.guides.ExactSmoother(model))


def counts_of(seed):
    """Two recordings of overdispersed counts, and two of Poisson counts, of the same rates; (train, test) of each."""
    rng = np.random.default_rng(seed)
    time, made = np.arange(30), {"nb": [], "poisson": []}
    for row in range(2):
        phase = rng.uniform(0, 6.28, (40, 1, 1))
        wave = np.concatenate([np.cos(0.3 * time[:, None] + phase), np.sin(0.3 * time[:, None] + phase)], -1)
        rate = np.exp(0.8 * wave @ rng.normal(size=(2, 15)) + 1.0)
        made["nb"].append(pm.Recording(f"r{row}", rng.poisson(rng.gamma(1.0, rate)), bin_width=0.02))
        made["poisson"].append(pm.Recording(f"r{row}", rng.poisson(rate), bin_width=0.02))
    return {name: pm.Recordings(parts).split(0.4, seed=seed) for name, parts in made.items()}


@pytest.fixture(scope="module")
def counts():
    return counts_of(0)


def fitted(train, family, **options):
    torch.manual_seed(0)
    model = pm.models.MetaSSM(train, **SIZES, likelihood=family)
    options = {"num_steps": 60, "warm_start_steps": 100, "progress": False} | options
    return pm.fit(model, pm.guides.DKF(model, hidden_dim=16), train, **options)


def test_with_the_exact_posterior_every_bound_is_the_evidence(exact):
    recs, fit = exact
    table = pm.compare({"exact": fit}, recs, context=1, num_samples=20).loc["exact"]
    trials = sum(r.num_trials for r in recs.values())
    truth = evidences(fit.model, recs).sum() / trials
    for score in ("elbo", "iw", "psis"):
        assert table[score, "mean"] == pytest.approx(truth, rel=1e-6)
        assert table[score, "difference"] == 0.0 and table[score, "se"] == 0.0
    assert "bits_per_spike" not in table  # the data are no counts


def test_weights_of_a_wrong_proposal_average_to_the_truth():
    """Normal(0, 1) weighted to Normal(0.5, 1) with mass e^3: light tails, hardly smoothed."""
    x = np.random.default_rng(0).normal(size=(4000, 2))
    log_w = 3.0 + scipy.stats.norm.logpdf(x, 0.5) - scipy.stats.norm.logpdf(x)
    smoothed, khat = pareto_smoothed(log_w)
    assert khat.shape == (2,) and (khat < 0.5).all()
    assert np.log(np.exp(smoothed).mean(0)) == pytest.approx(3.0, abs=0.05)
    assert np.median(np.abs(smoothed - log_w)) < 1e-9  # all but the tail as they were
    heavy = 2.0 * np.random.default_rng(1).standard_exponential((500, 1))  # weights of Pareto shape 2
    assert pareto_smoothed(heavy)[1][0] > 1.0
    equal, khat = pareto_smoothed(np.full((50, 1), -7.0))
    assert (equal == -7.0).all() and khat[0] == 0.0


def test_scores_of_forecasts_are_those_of_the_predictive_normal(exact):
    """Where no neuron reads the latents, every bin's predictive distribution is a known Normal."""
    recs, fit = exact
    one = recs.select(recs.names[:1])
    name, context = one.names[0], 1
    fit = copy.deepcopy(fit)
    with torch.no_grad():
        fit.model.read_out.weight.zero_()
    sd = fit.model.observation.log_sd.exp().detach().numpy()[fit.model.neurons.slice(name)]
    mean = fit.model.read_out.bias.detach().numpy()[fit.model.neurons.slice(name)]
    table = pm.compare({"a": fit}, one, context=context, horizon=3, num_samples=4000).loc["a"]
    seen = one[name].observations[:, context : context + 3]
    logs = scipy.stats.norm.logpdf(seen, mean, sd)
    z = (seen - mean) / sd
    crps = sd * (z * (2 * scipy.stats.norm.cdf(z) - 1) + 2 * scipy.stats.norm.pdf(z) - np.pi**-0.5)
    weights = np.where(np.isnan(seen), np.nan, 1.0)
    each = [np.nanmean(x * weights, (1, 2)) for x in (logs, crps)]
    assert table["forecast_log_score", "mean"] == pytest.approx(np.nanmean(each[0]), abs=1e-4)
    assert table["crps", "mean"] == pytest.approx(np.nanmean(each[1]), rel=0.02)


@pytest.mark.parametrize("truth", ["nb", "poisson"])
def test_the_family_that_made_the_counts_is_not_beaten(counts, truth):
    train, test = counts[truth]
    fits = {
        "poisson": fitted(train, pm.likelihoods.Poisson),
        "nb": fitted(train, pm.likelihoods.NegativeBinomial),
    }
    table = pm.compare(fits, test, num_samples=30)
    behind, error = -table.loc["poisson", ("psis", "difference")], table.loc["poisson", ("psis", "se")]
    if truth == "nb":
        assert table.index[0] == "nb" and behind > 4 * error
    else:  # a negative binomial can be all but Poisson
        assert behind <= 2 * error
    for name, fit in fits.items():
        bits = pm.metrics.rate_bps(fit, test, num_samples=30)
        spikes = np.array([np.nansum(r.observations) for r in test.values()])
        trials = np.array([r.num_trials for r in test.values()])
        # Every recording's trials average to its own score.
        expected = (bits.values * trials).sum() / trials.sum()
        assert spikes.min() > 0
        assert table.loc[name, ("bits_per_spike", "mean")] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_negative_binomial_is_preferred_to_poisson_where_it_made_the_counts_alone(seed):
    """By far in nats per trial and in forecasts; of Poisson counts its one parameter more gains nothing."""
    gains = {}
    for truth, (train, test) in counts_of(seed).items():
        families = {"poisson": pm.likelihoods.Poisson, "nb": pm.likelihoods.NegativeBinomial}
        fits = {name: fitted(train, family, seed=seed) for name, family in families.items()}
        table = pm.compare(fits, test, num_samples=30, seed=seed)
        for score in ("psis", "forecast_log_score"):
            gain = table.loc["nb", (score, "mean")] - table.loc["poisson", (score, "mean")]
            gains[truth, score] = gain / table[score, "se"].max()
    assert gains["nb", "psis"] > 4 and gains["nb", "forecast_log_score"] > 4, gains
    assert gains["poisson", "psis"] < 2 and gains["poisson", "forecast_log_score"] < 2, gains


def test_standard_errors_are_of_paired_differences(exact):
    recs, fit = exact
    other = as_fit(fit.model, fit.guide)
    table = pm.compare({"a": fit, "b": other}, recs, context=1, num_samples=8)
    assert (table["elbo", "difference"] == 0.0).all() and (table["elbo", "se"] == 0.0).all()


def test_what_cannot_be_compared_is_refused(exact, counts):
    recs, fit = exact
    with pytest.raises(ValueError, match="got none"):
        pm.compare({}, recs)
    with pytest.raises(ValueError, match="num_samples"):
        pm.compare({"a": fit}, recs, num_samples=1)
    train, test = counts["nb"]
    quick = {"num_steps": 1, "warm_start": False}
    fits = {
        "gaussian": fitted(train, pm.likelihoods.Gaussian, **quick),
        "poisson": fitted(train, pm.likelihoods.Poisson, **quick),
    }
    with pytest.warns(UserWarning, match="not on one scale"):
        table = pm.compare(fits, test, num_samples=2)
    assert "bits_per_spike" not in table or table["bits_per_spike", "mean"].notna().all()
    with pytest.raises(ValueError, match="recording"):
        pm.compare({"a": fit}, test)
