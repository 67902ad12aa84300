"""Overdispersed counts against scipy's negative binomial, and what they spare a regression."""

import numpy as np
import torch
from scipy import stats
from scipy.special import gammaln

import pyro_metassm as pm
from pyro_metassm.observations import curvature
from pyro_metassm.read_outs import refit_read_outs, start_read_outs
from pyro_metassm.tempering import tempered


def started(y, likelihood=pm.likelihoods.Poisson):
    recs = pm.Recordings([pm.Recording("a", y, bin_width=0.02)])
    torch.manual_seed(0)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=likelihood).double()
    model.observation.start(recs)
    return model, recs.batch(model.names, dtype=torch.float64)


def test_counts_are_negative_binomial_of_the_models_rates():
    rng = np.random.default_rng(0)
    y = rng.poisson(3.0, (2, 6, 3)).astype(float)
    y[0, 1, 2] = np.nan
    model, batch = started(y)
    predictor = torch.randn(2, 6, 3, dtype=torch.float64)
    rate = model.likelihood(predictor.unsqueeze(0), batch.recording).mean[0].numpy()
    r = 4.0
    found, slope, _ = curvature(tempered(model, r), predictor, batch, 0)
    mask, value = batch.mask[0].numpy(), batch.observations[0].numpy()
    full = stats.nbinom.logpmf(value, r, r / (r + rate))
    # What is left out depends on the count alone.
    left_out = r * np.log(r) + gammaln(value + r) - gammaln(r) - gammaln(value + 1)
    shifted = full - left_out + (value + r) * np.log(r)
    np.testing.assert_allclose(found.numpy()[mask], shifted[mask], atol=1e-9)
    # Of a Poisson count the slope is as large as the information of r counts leaves it.
    plain = curvature(model, predictor, batch, 0)[1]
    np.testing.assert_allclose(slope.numpy(), plain.numpy() * (r / (r + rate)) * mask, atol=1e-9)
    assert (found.numpy()[~mask] == 0).all()


def test_other_families_are_seen_as_they_are():
    model, batch = started(np.ones((1, 5, 2)), pm.likelihoods.NegativeBinomial)
    predictor = torch.randn(1, 5, 2, dtype=torch.float64)
    for a, b in zip(
        curvature(model, predictor, batch, 0), curvature(tempered(model), predictor, batch, 0), strict=True
    ):
        assert torch.equal(a, b)


def test_a_burst_at_a_state_that_is_off_bends_the_read_out_less_than_half():
    """Thousands of counts at a state that is three units off; elsewhere hundreds say what is right."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(1, 4, 100, 2))
    z[0, 0, 0] = 8.0, 0.0
    truth = np.array([0.9, -0.4])
    y = rng.poisson(np.exp(z[0] @ truth))[..., None].astype(float)
    wrong = z.copy()
    wrong[0, 0, 0] = 5.0, 0.0
    errors = []
    for seen in (lambda model: model, tempered):
        model, batch = started(y)
        states = torch.tensor(wrong)
        start_read_outs(model, states, batch)
        refit_read_outs(seen(model), states, batch, num_steps=20)
        errors.append(np.abs(model.read_out.weight[0].detach().numpy() - truth).max())
    assert errors[1] < 0.5 * errors[0], errors
