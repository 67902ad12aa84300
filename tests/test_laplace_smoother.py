"""Smoothed paths and Newton's read-outs against exact posteriors, finite differences and scipy's optimiser."""

import numpy as np
import pytest
import torch
from problems import KINDS, kind_of, recordings
from scipy.optimize import minimize
from scipy.stats import multivariate_normal

import pyro_metassm as pm
from pyro_metassm.laplace_smoother import Chain, log_evidence, smoothed
from pyro_metassm.observations import curvature, of_single_neurons
from pyro_metassm.read_outs import ReadOutPrior, refit_read_outs
from pyro_metassm.recordings import Recording, Recordings

SINGLE = [
    pm.likelihoods.Gaussian,
    pm.likelihoods.StudentT,
    pm.likelihoods.Poisson,
    pm.likelihoods.SoftplusPoisson,
    pm.likelihoods.NegativeBinomial,
    pm.likelihoods.ZeroInflatedPoisson,
    pm.likelihoods.Bernoulli,
    pm.likelihoods.Binomial,
    pm.likelihoods.LogNormal,
    pm.likelihoods.Gamma,
]


def started(recs, likelihood):
    torch.manual_seed(0)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=likelihood).double()
    return model, recs.batch(model.names, dtype=torch.float64)


def chain_of(model, dynamics):
    noise, first = model.process_noise().detach(), model.initial.scale.detach()
    return Chain(dynamics, noise.pow(-2).diag(), model.initial.loc.detach(), first.pow(-2).diag())


def test_linear_and_gaussian_is_exact():
    """One step from anywhere; missing bins and a neuron held out."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(3, 7, 4))
    y[0, 3], y[1, 0], y[2, 5, 1] = np.nan, np.nan, np.nan
    held_out = np.array([False, True, False, False])
    recs = Recordings([Recording(name, y, bin_width=0.02, held_out_neurons=held_out) for name in "ab"])
    torch.manual_seed(1)
    model = pm.models.LinearGaussian(recs, latent_dim=2).double()
    batch = recs.batch(model.names, dtype=torch.float64)
    exact = pm.guides.ExactSmoother(model).latents_posterior(batch)
    start = torch.randn(2, 3, 7, 2, dtype=torch.float64)
    found = smoothed(model, chain_of(model, model.dynamics), start, batch, num_steps=1)
    torch.testing.assert_close(found.mean, exact.mean.detach(), rtol=0, atol=1e-10)
    z = torch.randn(2, 3, 7, 2, dtype=torch.float64)  # and so is the density, hence the precision
    torch.testing.assert_close(found.log_prob(z), exact.log_prob(z).detach(), rtol=1e-10, atol=1e-8)


def test_evidence_of_linear_gaussian_data_is_that_of_one_large_normal():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(2, 5, 3))
    y[0, 2], y[1, 3, 1] = np.nan, np.nan
    recs = Recordings([Recording("a", y, bin_width=0.02)])
    torch.manual_seed(1)
    model = pm.models.LinearGaussian(recs, latent_dim=2).double()
    batch = recs.batch(model.names, dtype=torch.float64)
    chain = chain_of(model, model.dynamics)
    path = smoothed(model, chain, torch.zeros(1, 2, 5, 2, dtype=torch.float64), batch, num_steps=1)
    found = log_evidence(model, chain, path, batch)[0]
    a, b = (x.detach().numpy() for x in (model.dynamics.weight, model.dynamics.bias))
    c, d = (x.detach().numpy() for x in (model.read_out.weight, model.read_out.bias))
    mean, noise = [model.initial.loc.detach().numpy()], model.process_noise().detach().numpy()
    # z = M w + ..., with w the first state and the steps' noise.
    scales = np.concatenate([model.initial.scale.detach().numpy(), *[noise] * 4])
    matrix = np.zeros((10, 10))
    for t in range(5):
        matrix[2 * t : 2 * t + 2, 2 * t : 2 * t + 2] = np.eye(2)
        if t:
            matrix[2 * t : 2 * t + 2] += a @ matrix[2 * t - 2 : 2 * t]
            mean.append(a @ mean[-1] + b)
    read = np.kron(np.eye(5), c)
    at_zero = model.likelihood(torch.zeros(1, 1, 1, 3, dtype=torch.float64), batch.recording)
    covariance = read @ matrix @ np.diag(scales**2) @ matrix.T @ read.T
    covariance += np.diag(np.tile(at_zero.stddev.detach().numpy().ravel() ** 2, 5))
    centre = read @ np.concatenate(mean) + np.tile(d, 5)
    for k in range(2):
        seen = ~np.isnan(y[k].ravel())
        exact = multivariate_normal(centre[seen], covariance[np.ix_(seen, seen)]).logpdf(y[k].ravel()[seen])
        np.testing.assert_allclose(float(found[k]), exact, rtol=1e-9)


def test_the_mode_of_counts_under_nonlinear_dynamics_is_that_of_an_optimiser():
    recs = recordings(counts=True, missing=True, shapes={"a": (4, (6,))})
    model, batch = started(recs, pm.likelihoods.Poisson)
    with torch.no_grad():
        model.process_noise.log_scale.fill_(np.log(0.5))

    def dynamics(z):
        return z + 0.5 * torch.sin(2 * z.flip(-1))

    def energy(flat):
        z = torch.tensor(flat, dtype=torch.float64).view(1, 1, 6, 2).requires_grad_()
        first = model.initial_state(torch.zeros(1)).log_prob(z[:, :, 0]).sum()
        steps = torch.distributions.Normal(dynamics(z[:, :, :-1]), 0.5).log_prob(z[:, :, 1:]).sum()
        y = model.likelihood(model.read_out(z, batch.recording, batch.width), batch.recording)
        total = -(first + steps + y.log_prob(batch.observations)[batch.mask].sum())
        return float(total.detach()), torch.autograd.grad(total, z)[0].flatten().numpy()

    start = torch.zeros(1, 1, 6, 2, dtype=torch.float64)
    found = smoothed(model, chain_of(model, dynamics), start, batch, num_steps=30)
    reached, slope = energy(found.mean.flatten().numpy())
    best = minimize(energy, np.zeros(12), jac=True, method="BFGS", options={"gtol": 1e-9})
    assert reached <= best.fun + 1e-6  # a lower mode would do as well
    assert np.abs(slope).max() < 1e-4


@pytest.mark.parametrize("family", SINGLE, ids=lambda family: family.__name__)
def test_slopes_and_curvatures_are_finite_differences(family):
    recs = recordings(kind=kind_of(family), shapes={"a": (3, (7, 4)), "b": (2, (5,))})
    model, batch = started(recs, family)
    assert of_single_neurons(model, batch)
    predictor = 0.3 * torch.randn(2, 7, 3, dtype=torch.float64)
    log_prob, slope, second = curvature(model, predictor, batch, 0)
    step = 1e-4
    up, down = (curvature(model, predictor + s, batch, 0)[0] for s in (step, -step))
    torch.testing.assert_close(slope, (up - down) / (2 * step), rtol=1e-5, atol=1e-5)
    by_differences = -(up - 2 * log_prob + down) / step**2
    torch.testing.assert_close(second, by_differences.clamp(min=0), rtol=1e-3, atol=1e-4)
    unseen = ~batch.mask[0]
    assert unseen.any() and all(bool((x[unseen] == 0).all()) for x in (log_prob, slope, second))


@pytest.mark.parametrize(
    "family", [pm.likelihoods.Poisson, pm.likelihoods.NegativeBinomial, pm.likelihoods.Bernoulli]
)
def test_newtons_read_outs_are_those_of_an_optimiser(family):
    recs = recordings(kind=kind_of(family), shapes={"a": (2, (20, 30))})
    model, batch = started(recs, family)
    with torch.no_grad():
        model.read_out.weight.zero_(), model.read_out.bias.zero_()
    z = torch.randn(1, 2, 30, 2, dtype=torch.float64)
    design = torch.cat([z[0], torch.ones_like(z[0, ..., :1])], -1)
    refit_read_outs(model, z, batch, num_steps=30, ridge=2.0)

    def energy(flat):
        c = torch.tensor(flat).view(2, 3)
        log_prob, slope, _ = curvature(model, design @ c.mT, batch, 0)
        penalty = torch.tensor([2.0, 2.0, 0.2])  # the biases began at zero
        gradient = penalty * c - torch.einsum("ktn,ktd->nd", slope, design)
        return float(0.5 * (penalty * c**2).sum() - log_prob.sum()), gradient.flatten().numpy()

    best = minimize(energy, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-8}).x.reshape(2, 3)
    np.testing.assert_allclose(model.read_out.weight.detach().numpy(), best[:, :2], atol=1e-5)
    np.testing.assert_allclose(model.read_out.bias.detach().numpy(), best[:, 2], atol=1e-5)


def test_a_prior_of_read_outs_takes_the_place_of_the_ridge():
    recs = recordings(counts=True, shapes={"a": (2, (20,)), "b": (4, (9,))})
    model, batch = started(recs, pm.likelihoods.Poisson)
    torch.manual_seed(1)
    with torch.no_grad():
        model.read_out.weight.normal_(), model.read_out.bias.normal_()
    prior = ReadOutPrior.of(model)
    z = torch.randn(2, 1, 20, 2, dtype=torch.float64)
    refit_read_outs(model, z, batch, num_steps=30, prior=prior)

    def energy(flat):
        c = torch.tensor(flat).view(2, 3).requires_grad_()
        predictor = torch.cat([z[0], torch.ones_like(z[0, ..., :1])], -1) @ c.mT
        y = model.likelihood(predictor.unsqueeze(0), batch.recording[:1])
        value, mask = batch.observations[:1, ..., :2], batch.mask[:1, ..., :2]
        total = -prior.log_prob(c, "a").sum() - y.log_prob(value)[mask].sum()
        return float(total.detach()), torch.autograd.grad(total, c)[0].flatten().numpy()

    best = minimize(energy, np.zeros(6), jac=True, method="BFGS", options={"gtol": 1e-8}).x.reshape(2, 3)
    np.testing.assert_allclose(model.read_out.weight[:2].detach().numpy(), best[:, :2], atol=1e-5)
    np.testing.assert_allclose(model.read_out.bias[:2].detach().numpy(), best[:, 2], atol=1e-5)


def test_steps_are_short_where_an_exponential_is_not_its_expansion():
    """From a rate far too low to bursts, in fewer steps than the halving of Newton's would take."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1, 4, 100, 2))
    z[0, 0, :3] *= 8
    truth = np.array([[1.2, 0.3], [-0.5, 1.0]])
    recs = Recordings(
        [Recording("a", rng.poisson(np.exp(z[0] @ truth.T - 2.0)).astype(float), bin_width=0.02)]
    )
    model, batch = started(recs, pm.likelihoods.Poisson)
    with torch.no_grad():
        model.observation.log_ceiling.fill_(30.0)
        model.read_out.weight.zero_(), model.read_out.bias.fill_(-6.0)
    design = torch.cat([torch.tensor(z), torch.ones(1, 4, 100, 1)], -1).flatten(0, 2).numpy()
    counts = batch.observations[0].flatten(0, 1).numpy()
    refit_read_outs(model, torch.tensor(z), batch, num_steps=10)

    def energy(flat):
        c = flat.reshape(2, 3)
        change = c - [0.0, 0.0, -6.0]
        penalty, x = np.array([1.0, 1.0, 0.1]), design @ c.T
        gradient = penalty * change - (counts - np.exp(x)).T @ design
        return 0.5 * (penalty * change**2).sum() - (counts * x - np.exp(x)).sum(), gradient.ravel()

    start = np.c_[truth, [-2.0, -2.0]].ravel()
    best = minimize(energy, start, jac=True, method="BFGS", options={"gtol": 1e-6}).x.reshape(2, 3)
    np.testing.assert_allclose(model.read_out.weight.detach().numpy(), best[:, :2], atol=1e-3)


def test_silent_neurons_stay_as_they_are():
    """Their likeliest bias is minus infinity; once the rate stands for less than a count they are left alone."""
    y = np.zeros((2, 30, 2))
    y[..., 1] = np.arange(30) % 2
    recs = Recordings([Recording("a", y, bin_width=0.02)])
    model, batch = started(recs, pm.likelihoods.Poisson)
    start = np.log(0.5 / 60)
    with torch.no_grad():
        model.read_out.weight.zero_(), model.read_out.bias.fill_(start)
    z = torch.randn(1, 2, 30, 2, dtype=torch.float64)
    for _ in range(3):
        refit_read_outs(model, z, batch)
    bias = model.read_out.bias.detach().numpy()
    assert bias[0] == start and np.exp(bias[1]) > 0.2
    assert (model.read_out.weight[0] == 0).all() and (model.read_out.weight[1] != 0).all()


def test_joint_likelihoods_are_told_from_those_of_single_neurons():
    model, batch = started(recordings(), pm.likelihoods.LowRankGaussian)
    assert not of_single_neurons(model, batch)
    assert set(KINDS) >= {kind_of(family) for family in SINGLE}
