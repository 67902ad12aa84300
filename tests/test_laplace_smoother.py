"""Smoothed paths and Newton's read-outs against exact posteriors, finite differences and scipy's optimiser."""

import numpy as np
import pytest
import torch
from problems import KINDS, kind_of, recordings
from scipy.optimize import minimize

import pyro_metassm as pm
from pyro_metassm.laplace_smoother import Chain, smoothed
from pyro_metassm.observations import curvature, of_single_neurons
from pyro_metassm.read_outs import refit_read_outs
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
