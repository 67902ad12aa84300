"""Families of observations against scipy.stats, and what they refuse."""

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from fits import QUICK
from problems import KINDS, garbage, kind_of, recordings
from scipy_families import COUNTS, FAMILIES, ORACLES, row, started

import pyro_metassm as pm
from pyro_metassm import likelihoods
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.observations import in_support, observed
from pyro_metassm.read_outs import fit_read_outs
from pyro_metassm.recordings import Recording, Recordings

SIGMAS = 5.0


SATURATING = [likelihoods.Poisson, likelihoods.NegativeBinomial, likelihoods.ZeroInflatedPoisson]


def test_every_family_has_an_oracle():
    joint = {likelihoods.LowRankGaussian}  # has tests of its own
    assert set(FAMILIES) == set(ORACLES) | joint, "add a family's scipy distribution to ORACLES"


@pytest.mark.parametrize("family", ORACLES)
def test_log_prob_is_that_of_scipy(family):
    recs = recordings(kind=kind_of(family))
    made = started(family, recs)
    batch = recs.select(["c", "a", "b"]).batch(recs.names, dtype=torch.float64)
    predictor = torch.randn(4, *batch.observations.shape, dtype=torch.float64) * 2  # 4 draws
    y = made(predictor, batch.recording)
    assert y.batch_shape == predictor.shape and y.event_shape == ()
    filled = in_support(y, batch.observations, batch.mask)  # zeros elsewhere
    value = y.log_prob(filled).detach().numpy()
    filled = filled.numpy()
    for r, name in enumerate(batch.names):
        neurons = batch.num_neurons[r]
        oracle = ORACLES[family](made, predictor[:, r, ..., :neurons].numpy(), made.neurons.slice(name))
        log_prob = oracle.logpmf if family in COUNTS else oracle.logpdf
        expected = log_prob(filled[r, ..., :neurons])
        np.testing.assert_allclose(value[:, r, ..., :neurons], expected, rtol=1e-9)
        np.testing.assert_allclose(y.mean[:, r, ..., :neurons].detach().numpy(), oracle.mean(), rtol=1e-9)


@pytest.mark.parametrize("family", ORACLES)
def test_draws_have_the_moments_of_scipy(family):
    recs = recordings(kind=kind_of(family), shapes={"a": (3, (2,))}, missing=False)
    made, num = started(family, recs), 20_000
    predictor = torch.tensor([[-1.0, 0.5, 1.5], [0.0, 1.0, 2.5]], dtype=torch.float64)[None, None]
    y = made(predictor, torch.tensor([0])).sample((num,)).numpy()[:, 0, 0]
    mean, var, kurtosis = ORACLES[family](made, predictor[0, 0].numpy(), slice(0, 3)).stats("mvk")
    assert (np.abs(y.mean(0) - mean) < SIGMAS * np.sqrt(var / num)).all()
    # The variance of a sample variance is var^2 (excess kurtosis + 2) / N, but for terms of 1 / N^2.
    assert (np.abs(y.var(0) - var) < SIGMAS * var * (np.sqrt((kurtosis + 2) / num) + 1 / num)).all()
    if family in COUNTS:
        assert (y >= 0).all() and (y == np.round(y)).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", [0.0, 50.0, -50.0])
def test_gradients_are_finite_where_values_are_missing(family, level):
    recs = recordings(kind=kind_of(family))
    made = family(NeuronTable.of(recs))
    made.start(recs)
    batch = garbage(recs.batch(recs.names), 1e4)  # what is missing may be anything finite
    predictor = (torch.randn(batch.observations.shape) + level).requires_grad_()
    density = observed(made(predictor, batch.recording), batch.mask).log_prob(batch.observations)
    density.sum().backward()
    assert density.isfinite().all() and predictor.grad.isfinite().all()
    assert (predictor.grad[~batch.mask] == 0).all() and (predictor.grad[batch.mask] != 0).any()
    for parameter in made.parameters():
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_never_observed_constant_or_observed_once(family):
    """Finite starts, densities and gradients; a neuron of zeros alone too, where zeros may be."""
    rng = np.random.default_rng(0)
    y = KINDS[kind_of(family)](rng, (4, 6, 5))
    y[..., 0], y[..., 1], y[..., 2] = np.nan, 1.0, np.nan
    y[2, 3, 2] = 1.0
    if kind_of(family) != "positive":
        y[..., 4] = 0.0
    recs = Recordings([Recording("a", y, bin_width=0.02)])
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=family)
    assert all(value.isfinite().all() for value in model.observation.state_dict().values())
    batch = recs.batch(model.names)
    fit_read_outs(model, torch.randn(1, 4, 6, 2), batch, torch.Generator(), num_steps=5)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    x = torch.randn(batch.observations.shape, requires_grad=True)
    density = observed(model.likelihood(x, batch.recording), batch.mask).log_prob(batch.observations)
    density.sum().backward()
    assert density.isfinite().all() and x.grad.isfinite().all()


def test_gaussian_starts_at_half_the_standard_deviation_of_what_was_observed():
    recs = recordings()
    made = likelihoods.Gaussian(NeuronTable.of(recs))
    made.start(recs)
    for name, recording in recs.items():
        sd = np.nanstd(recording.observations, axis=(0, 1))
        np.testing.assert_allclose(made.log_sd[made.neurons.slice(name)].exp().detach(), sd / 2, rtol=1e-5)


@pytest.mark.parametrize("family", SATURATING)
def test_counts_saturate_at_twice_the_largest_count(family):
    recs = recordings(counts=True)
    made = family(NeuronTable.of(recs))
    made.start(recs)
    for number, recording in enumerate(recs.values()):
        peak = np.maximum(np.nanmax(recording.observations, axis=(0, 1)), 1)
        x = torch.full((1, 1, 1, recording.num_neurons), 40.0)
        share = 1 - made.gate.detach().sigmoid()[0] if hasattr(made, "gate") else torch.tensor(1.0)
        peak = peak * share.numpy()
        np.testing.assert_allclose(
            made(x, torch.tensor([number])).mean[0, 0, 0].detach(), 2 * peak, rtol=1e-5
        )
        low = made(x - 45, torch.tensor([number])).mean[0, 0, 0].detach()  # as exp in the range of the data
        np.testing.assert_allclose(low / share, np.exp(-5.0), rtol=np.exp(-5.0) / (2 * peak.min()) * 1.01)


BAD = [(family, bad) for family in COUNTS for bad in (-1.0, 0.5)]
BAD += [(likelihoods.Bernoulli, 2.0), (likelihoods.ZeroInflatedGamma, -0.5)]
BAD += [(family, bad) for family in (likelihoods.Gamma, likelihoods.LogNormal) for bad in (0.0, -0.5)]


@pytest.mark.parametrize("family, bad", BAD)
def test_data_that_a_family_cannot_have_produced_are_refused(family, bad):
    y = np.ones((3, 4, 2))
    y[2, 1, 0] = bad
    recs = Recordings(
        [Recording("good", np.ones((3, 4, 2)), bin_width=0.02), Recording("bad", y, bin_width=0.02)]
    )
    words = rf"recording 'bad': needed .*got {bad:g} in trial 2, bin 1, neuron 0 and 0 more.*; \w+"
    with pytest.raises(ValueError, match=words):
        pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=family)
    model = pm.models.MetaSSM(recs.select(["good"]), latent_dim=2, embedding_dim=1, likelihood=family)
    swapped = Recordings([Recording("good", y, bin_width=0.02)])
    with pytest.raises(ValueError, match=r"recording 'good'.*in trial 2"):
        pm.fit(model, pm.guides.DKF(model), swapped, num_steps=1, progress=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_values_are_refused_by_no_family(family):
    y = np.ones((3, 4, 2))
    y[0, 0, 0] = np.nan
    family(NeuronTable(["a"], [2])).check(Recording("a", y, bin_width=0.02))


class OutOfFour(likelihoods.Binomial):
    num_trials = 4


class NoTrials(likelihoods.Binomial):
    num_trials = 0


class NoRank(likelihoods.LowRankGaussian):
    rank = 0


def test_binomial_counts_stay_within_the_trials():
    y = np.ones((3, 4, 2))
    y[0, 0, 1] = 3
    more = np.where(y == 3, 5, y)
    recs, larger = (Recordings([Recording("a", values, bin_width=0.02)]) for values in (y, more))
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=likelihoods.Binomial)
    assert model.observation.total_count.tolist() == [1, 3]
    with pytest.raises(ValueError, match=r"number of trials.*got 5 in trial 0, bin 0, neuron 1"):
        model.observation.check(larger["a"])
    stated = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=OutOfFour)
    assert stated.observation.total_count.tolist() == [4, 4]
    with pytest.raises(ValueError, match="got 5 in trial 0"):
        pm.models.MetaSSM(larger, latent_dim=2, embedding_dim=1, likelihood=OutOfFour)


@pytest.mark.parametrize("family, words", [(NoTrials, "num_trials: .*got 0"), (NoRank, "rank: .*got 0")])
def test_class_attributes_are_checked(family, words):
    with pytest.raises(ValueError, match=words):
        family(NeuronTable(["a"], [2]))


def test_missing_values_are_no_counts_to_refuse():
    y = np.ones((3, 4, 2))
    y[0, 0, 0] = np.nan
    Recordings([Recording("a", y, bin_width=0.02)])["a"].check_counts()


def test_joint_distributions_over_the_neurons_count_a_bin_if_any_neuron_was_seen():
    mask = torch.tensor([[[True, False], [False, False], [True, True]]])
    y = dist.MultivariateNormal(torch.zeros(1, 3, 2), torch.eye(2))
    x = torch.randn(1, 3, 2)
    expected = torch.as_tensor(scipy.stats.norm.logpdf(x[:, [0, 2]]).sum((-1, -2)), dtype=x.dtype)
    torch.testing.assert_close(observed(y, mask).log_prob(x), expected)
    with pytest.raises(ValueError, match=r"event shape torch.Size\(\[3, 2\]\)"):
        observed(dist.Normal(x, 1.0).to_event(2), mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_read_outs_start_at_predictors_of_the_means(family):
    """But for what the floor and the ceiling of a Gamma take off."""
    recs = recordings(kind=kind_of(family), shapes={"a": (4, (30, 30))}, missing=False)
    made = family(NeuronTable.of(recs)).double()
    made.start(recs)
    mean = torch.as_tensor(recs["a"].values.mean((0, 1)))
    x = made.predictor_at(mean, slice(0, 4))
    if x is None:
        return
    found = made(x.detach().expand(1, 1, 1, 4), torch.tensor([0])).mean.detach()[0, 0, 0]
    exact = not isinstance(made, likelihoods.Gamma)
    torch.testing.assert_close(found, mean, rtol=1e-6 if exact else 0.25, atol=0.0)


def low_rank(rank, recs):
    kind = type("Ranked", (likelihoods.LowRankGaussian,), {"rank": rank})
    return started(kind, recs)


@pytest.mark.parametrize("rank", [1, 2, 7])
def test_low_rank_noise_is_scored_as_the_marginal_of_the_neurons_seen(rank):
    """Bins seen in part against scipy's density of those neurons, for draws side by side too."""
    recs = recordings()
    made = low_rank(rank, recs)
    batch = garbage(recs.batch(recs.names, dtype=torch.float64), 1e4)
    predictor = torch.randn(2, *batch.observations.shape, dtype=torch.float64)
    y = made(predictor, batch.recording)
    whole = observed(y, batch.mask)
    assert whole.event_shape == batch.mask.shape[-2:] and whole.batch_shape == (2, *batch.mask.shape[:2])
    value = whole.log_prob(batch.observations)
    expected = torch.zeros_like(value)
    for r, name in enumerate(batch.names):
        loading = row(made, "loading", made.neurons.slice(name))
        cov = loading @ loading.T + np.diag(np.exp(2 * row(made, "log_sd", made.neurons.slice(name))))
        for s, k, t in np.ndindex(2, *batch.mask.shape[1:3]):
            seen = batch.mask[r, k, t].numpy()
            n = seen[: len(cov)].nonzero()[0]
            if len(n):
                expected[s, r, k] += scipy.stats.multivariate_normal(
                    predictor[s, r, k, t, n], cov[np.ix_(n, n)]
                ).logpdf(batch.observations[r, k, t, n])
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.expand((3, *whole.batch_shape)).log_prob(batch.observations)[1], value)
    torch.testing.assert_close(y.mean, predictor)


def test_draws_of_low_rank_noise_have_its_covariance():
    recs, num = recordings(shapes={"a": (3, (2,))}, missing=False), 20_000
    made = low_rank(2, recs)
    y = (
        made(torch.zeros(1, 1, 1, 3, dtype=torch.float64), torch.tensor([0]))
        .sample((num,))
        .numpy()[:, 0, 0, 0]
    )
    loading = row(made, "loading", slice(0, 3))
    cov = loading @ loading.T + np.diag(np.exp(2 * row(made, "log_sd", slice(0, 3))))
    error = np.sqrt((cov**2 + np.outer(cov.diagonal(), cov.diagonal())) / num)
    assert (np.abs(y.T @ y / num - cov) < SIGMAS * error).all()


def test_complete_low_rank_recordings_are_scored_as_those_with_a_mask_that_is_stored():
    """A mask that is the same in every bin is read once."""
    recs = recordings(missing=False, shapes={"a": (3, (4, 4)), "b": (2, (4, 4))})
    made, batch = low_rank(2, recs), recs.batch(recs.names, dtype=torch.float64)
    y = made(torch.randn(batch.observations.shape, dtype=torch.float64), batch.recording)
    steady = batch.mask[:, :1, :1].expand(batch.mask.shape)
    one, other = (observed(y, mask).log_prob(batch.observations) for mask in (steady, steady.contiguous()))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_fits_forecasts_and_draws(family):
    recs = recordings(kind=kind_of(family))
    torch.manual_seed(0)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=6, likelihood=family)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=5), recs, **QUICK)
    assert np.isfinite(fit.history["elbo"]).all()
    drawn = {"num_samples": 3, "predictive": True}
    tree = pm.posterior(fit, recs, log_likelihood=True, **drawn)
    assert np.isfinite(tree["a/log_likelihood"]["observations"]).all()
    ahead = pm.forecast(fit, recs, context=2, horizon=3, **drawn)
    prior = pm.prior_predictive(fit.model, recs, num_samples=3)
    groups = (tree["b/posterior_predictive"], ahead["b/predictions"], prior["b/prior_predictive"])
    for group in groups:
        y = group["observations"].values[0]  # (draw, trial, time, neuron), NaN after the end of a trial
        y = y[~np.isnan(y).all(-1)]
        assert len(y) and np.isfinite(y).all()
        fit.model.observation.check(Recording("drawn", y[:, None], bin_width=0.02))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_forecasts_of_an_oscillation_explain_what_comes(family):
    """Data drawn from the family itself: above half of what the true means explain, five bins ahead."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    names, trials, bins, neurons, steps = ["a", "b"], 48, 60, 40, slice(30, 35)
    frequency = np.array([2.5, 4.0])[:, None, None]
    phase = 2 * np.pi * (frequency * np.arange(bins) * 0.02 + rng.uniform(size=(2, trials, 1)))
    gain = 2.0 if family in (likelihoods.Bernoulli, likelihoods.Binomial) else 1.0  # bits say little
    x = gain * np.stack([np.cos(phase), np.sin(phase)], -1) @ rng.normal(size=(2, 1, 2, neurons))
    made = family(NeuronTable(names, [neurons, neurons]))
    with torch.no_grad():
        for parameter, value in {"log_sd": -0.7, "log_scale": -0.7, "log_shape": 1.0, "slope": 1.0}.items():
            if hasattr(made, parameter):
                getattr(made, parameter).fill_(value)
        y = made(torch.as_tensor(x).float(), torch.arange(2))
        drawn, mean = y.sample().numpy(), y.mean.numpy()
    recs = Recordings([Recording(n, values, bin_width=0.02) for n, values in zip(names, drawn, strict=True)])
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=family)
    train, test = recs.split(test_fraction=0.25)
    options = {"num_steps": 200, "warm_start_steps": 300, "progress": False}
    fit = pm.fit(model, pm.guides.DKF(model), train, **options)
    found = pm.metrics.forecast_r2(fit, test, context=30, horizon=5, num_samples=30).mean("horizon_step")
    best = [pm.metrics.r2(values[:, steps], m[:, steps]) for values, m in zip(drawn, mean, strict=True)]
    assert (found > 0.5 * np.array(best)).all(), (found.values, best)
