"""Families of observations against scipy.stats, and what they refuse."""

import inspect

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from problems import garbage, recordings

import pyro_metassm as pm
from pyro_metassm import likelihoods
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.observations import observed
from pyro_metassm.recordings import Recording, Recordings

SIGMAS = 5.0
FAMILIES = [
    family
    for name, family in vars(likelihoods).items()
    if inspect.isclass(family)
    and issubclass(family, likelihoods.Likelihood)
    and not (name.startswith("_") or inspect.isabstract(family))
]
COUNTS = [likelihoods.Poisson, likelihoods.NegativeBinomial]


def gaussian(family, predictor, rows):
    return scipy.stats.norm(predictor, np.exp(family.log_sd.detach().numpy()[rows]))


def rate_of(family, predictor, rows):
    """The saturating link in another form: 1 / rate = exp(-predictor) + 1 / ceiling."""
    return 1 / (np.exp(-predictor) + np.exp(-family.log_ceiling.numpy()[rows]))


def poisson(family, predictor, rows):
    return scipy.stats.poisson(rate_of(family, predictor, rows))


def negative_binomial(family, predictor, rows):
    r, rate = np.exp(family.log_dispersion.detach().numpy()[rows]), rate_of(family, predictor, rows)
    return scipy.stats.nbinom(r, r / (r + rate))


ORACLES = {
    likelihoods.Gaussian: gaussian,
    likelihoods.Poisson: poisson,
    likelihoods.NegativeBinomial: negative_binomial,
}


def started(family, recs):
    """A family in float64, its parameters random."""
    torch.manual_seed(0)
    made = family(NeuronTable.of(recs)).double()
    made.start(recs)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return made


def test_every_family_has_an_oracle():
    assert set(FAMILIES) == set(ORACLES), "add a family's scipy distribution to ORACLES"


@pytest.mark.parametrize("family", FAMILIES)
def test_log_prob_is_that_of_scipy(family):
    recs = recordings(counts=family in COUNTS)
    made = started(family, recs)
    batch = recs.select(["c", "a", "b"]).batch(recs.names, dtype=torch.float64)
    predictor = torch.randn(4, *batch.observations.shape, dtype=torch.float64) * 2  # 4 draws
    y = made(predictor, batch.recording)
    assert y.batch_shape == predictor.shape and y.event_shape == ()
    value = y.log_prob(batch.observations).detach().numpy()
    for r, name in enumerate(batch.names):
        neurons = batch.num_neurons[r]
        oracle = ORACLES[family](made, predictor[:, r, ..., :neurons].numpy(), made.neurons.slice(name))
        log_prob = oracle.logpmf if family in COUNTS else oracle.logpdf
        expected = log_prob(batch.observations[r, ..., :neurons].numpy())
        np.testing.assert_allclose(value[:, r, ..., :neurons], expected, rtol=1e-9)
        np.testing.assert_allclose(y.mean[:, r, ..., :neurons].detach().numpy(), oracle.mean(), rtol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_draws_have_the_moments_of_scipy(family):
    recs = recordings(counts=family in COUNTS, shapes={"a": (3, (2,))}, missing=False)
    made, num = started(family, recs), 20_000
    predictor = torch.tensor([[-1.0, 0.5, 1.5], [0.0, 1.0, 2.5]], dtype=torch.float64)[None, None]
    y = made(predictor, torch.tensor([0])).sample((num,)).numpy()[:, 0, 0]
    mean, var, kurtosis = ORACLES[family](made, predictor[0, 0].numpy(), slice(0, 3)).stats("mvk")
    assert (np.abs(y.mean(0) - mean) < SIGMAS * np.sqrt(var / num)).all()
    # The variance of a sample variance is var^2 (excess kurtosis + 2) / N.
    assert (np.abs(y.var(0) - var) < SIGMAS * var * np.sqrt((kurtosis + 2) / num)).all()
    if family in COUNTS:
        assert (y >= 0).all() and (y == np.round(y)).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("level", [0.0, 50.0, -50.0])
def test_gradients_are_finite_where_values_are_missing(family, level):
    recs = recordings(counts=family in COUNTS)
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
def test_start_is_finite_for_a_neuron_that_was_never_observed(family):
    y = np.random.default_rng(0).poisson(2.0, (4, 6, 3)) * 1.0
    y[..., 0] = np.nan
    recs = Recordings([Recording("a", y, bin_width=0.02)])
    made = family(NeuronTable.of(recs))
    made.start(recs)
    assert all(value.isfinite().all() for value in made.state_dict().values())


def test_gaussian_starts_at_half_the_standard_deviation_of_what_was_observed():
    recs = recordings()
    made = likelihoods.Gaussian(NeuronTable.of(recs))
    made.start(recs)
    for name, recording in recs.items():
        sd = np.nanstd(recording.observations, axis=(0, 1))
        np.testing.assert_allclose(made.log_sd[made.neurons.slice(name)].exp().detach(), sd / 2, rtol=1e-5)


@pytest.mark.parametrize("family", COUNTS)
def test_counts_saturate_at_twice_the_largest_count(family):
    recs = recordings(counts=True)
    made = family(NeuronTable.of(recs))
    made.start(recs)
    for row, recording in enumerate(recs.values()):
        peak = np.maximum(np.nanmax(recording.observations, axis=(0, 1)), 1)
        x = torch.full((1, 1, 1, recording.num_neurons), 40.0)
        np.testing.assert_allclose(made(x, torch.tensor([row])).mean[0, 0, 0].detach(), 2 * peak, rtol=1e-5)
        low = made(x - 45, torch.tensor([row])).mean[0, 0, 0].detach()  # as exp in the range of the data
        np.testing.assert_allclose(low, np.exp(-5.0), rtol=np.exp(-5.0) / (2 * peak.min()) * 1.01)


@pytest.mark.parametrize("family", COUNTS)
@pytest.mark.parametrize("bad, shown", [(-1.0, "-1"), (0.5, "0.5")])
def test_counts_refuse_what_is_no_count(family, bad, shown):
    y = np.ones((3, 4, 2))
    y[2, 1, 0] = bad
    recs = Recordings(
        [Recording("good", np.ones((3, 4, 2)), bin_width=0.02), Recording("bad", y, bin_width=0.02)]
    )
    words = rf"recording 'bad'.*{shown} in trial 2, bin 1, neuron 0"
    with pytest.raises(ValueError, match=words):
        pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=family)
    model = pm.models.MetaSSM(recs.select(["good"]), latent_dim=2, embedding_dim=1, likelihood=family)
    swapped = Recordings([Recording("good", y, bin_width=0.02)])
    with pytest.raises(ValueError, match=r"recording 'good'.*in trial 2"):
        pm.fit(model, pm.guides.DKF(model), swapped, num_steps=1, progress=False)


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
