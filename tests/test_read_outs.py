"""Read-outs given the states, and the prior that fitted recordings give others' read-outs, against closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

import pyro_metassm as pm
from pyro_metassm import read_outs
from pyro_metassm.likelihoods import Gaussian
from pyro_metassm.neurons import NeuronTable, ReadOut
from pyro_metassm.read_outs import ReadOutPrior, common_shift, fit_read_outs, rows_of, second_moments

COVARIANCE = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.5, 0.0], [0.0, 0.0, 2.0]]).double()


def model_of(rows):
    """What has these read-outs ``(M, N, d + 1)``."""
    table = NeuronTable([f"r{r}" for r in range(len(rows))], [rows.shape[1]] * len(rows))
    read_out = ReadOut(table, rows.shape[-1] - 1).double()
    with torch.no_grad():
        read_out.weight.copy_(rows[..., :-1].flatten(0, 1))
        read_out.bias.copy_(rows[..., -1].flatten())
    return SimpleNamespace(read_out=read_out, neurons=table, observation=Gaussian(table))


def normal_rows(num_recordings, num_neurons, seed=0):
    """Independent rows of Normal((0, 0, 3), COVARIANCE)."""
    torch.manual_seed(seed)
    white = torch.randn(num_recordings, num_neurons, 3).double()
    return white @ torch.linalg.cholesky(COVARIANCE).mT + torch.tensor([0.0, 0.0, 3.0]).double()


def test_the_prior_is_that_of_the_rows():
    prior = ReadOutPrior.of(model_of(normal_rows(40, 100)))
    assert torch.equal(prior.mean[:2], torch.zeros(2).double())  # whatever their mean in the sample
    number, variance = 4000, COVARIANCE.diagonal()
    assert abs(prior.mean[2] - 3.0) < 5 * (variance[2] / number) ** 0.5
    # An entry of the covariance of normal rows has the variance (s_ii s_jj + s_ij^2) / n.
    error = ((variance.outer(variance) + COVARIANCE**2) / number).sqrt()
    assert ((prior.covariance - COVARIANCE).abs() < 5 * error).all()


def test_recordings_that_differ_by_sampling_alone_are_no_reason_to_doubt_the_prior():
    """The estimate of the excess over 2 / n is of the order of its standard error or below zero."""
    number, num_recordings = 50, 40
    error = 2 / number * (2 / (2 * num_recordings)) ** 0.5
    assert ReadOutPrior.of(model_of(normal_rows(num_recordings, number))).concentration > 2 / (5 * error)
    assert ReadOutPrior.of(model_of(normal_rows(1, number))).concentration == float("inf")


def test_concentration_is_that_of_a_wishart():
    """Second moments from a Wishart of 10 degrees of freedom, then neurons from these."""
    torch.manual_seed(0)
    degrees, number = 10, 40
    white = torch.randn(1000, degrees, 2).double() @ torch.linalg.cholesky(COVARIANCE[:2, :2]).mT
    moments = white.mT @ white / degrees
    weight = torch.randn(1000, number, 2).double() @ torch.linalg.cholesky(moments).mT
    rows = torch.cat([weight, torch.randn(1000, number, 1).double()], -1)
    # Variance of a second moment: 2 / 10 from the Wishart, 2 / n from the sample, and their product.
    expected = degrees / (1 + 2 / number)
    # A squared deviation varies by about 1.8 of its mean (chi squared of 10); 2000 of them.
    assert abs(ReadOutPrior.of(model_of(rows)).concentration / expected - 1) < 5 * 1.8 / 2000**0.5


def test_density_is_a_normals_up_to_its_constant():
    torch.manual_seed(0)
    prior = ReadOutPrior.of(model_of(normal_rows(5, 20)))
    reference = MultivariateNormal(prior.mean, prior.covariance)
    for shape in ((3,), (7, 3), (2, 4, 3)):
        rows = torch.randn(shape).double()
        constant = reference.log_prob(prior.mean)
        torch.testing.assert_close(prior.log_prob(rows, "any"), reference.log_prob(rows) - constant)


def test_common_shifts_are_regressions_and_their_spread_is_known():
    torch.manual_seed(0)
    rows = normal_rows(400, 30)
    mean, scale = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 1.0]).double()
    shifts = mean + scale * torch.randn(400, 2).double()
    rows[..., 2] = (rows[..., :2] * shifts.unsqueeze(1)).sum(-1) + 1e-3 * torch.randn(400, 30).double()
    found = common_shift(second_moments(list(rows)))
    expected = torch.linalg.lstsq(rows[7, :, :2], rows[7, :, 2:]).solution.squeeze(-1)
    torch.testing.assert_close(found[7], expected, rtol=1e-2, atol=1e-2)  # but for a ridge of 1e-4
    prior = ReadOutPrior.of(model_of(rows))
    assert ((prior.shift_mean - mean).abs() < 5 * scale / 400**0.5 + 0.01).all()
    error = 5 * (2 / 400) ** 0.5
    spread = torch.diag(scale**2)
    assert ((prior.shift_covariance - spread).abs() < error * scale.outer(scale) + 0.02).all()
    assert torch.equal(common_shift(torch.zeros(3, 3)), torch.zeros(2))  # nothing to regress on


def test_rows_come_in_the_order_of_the_batch():
    recs = pm.simulate.limit_cycles([3.0, 5.0, 4.0], num_trials=2, num_steps=10, num_neurons=(3, 6))
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=4)
    with torch.no_grad():
        model.read_out.bias.copy_(torch.arange(float(model.neurons.total)))
    batch = recs.batch(model.names, names=["w=4", "w=3"])
    rows = rows_of(model, batch)
    assert [r.shape for r in rows] == [(recs[name].num_neurons, 3) for name in ("w=4", "w=3")]
    for name, own in zip(("w=4", "w=3"), rows, strict=True):
        place = model.neurons.slice(name)
        assert own[:, 2].tolist() == list(range(place.start, place.stop))
        torch.testing.assert_close(own[:, :2], model.read_out.weight[place])
    expected = sum(torch.outer(row, row) for row in rows[1]) / len(rows[1])
    torch.testing.assert_close(second_moments(rows)[1], expected)


# ---- the regression --------------------------------------------------------------------------------------


def problem(num_trials, num_bins, seed=0, num_neurons=6, same=False):
    """States, and a model of two recordings that observe them; noise known, sd 0.5."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2, num_trials, num_bins, 2))
    if same:
        z[:] = z[:, :1]
    noise = rng.normal(size=(2, 1 if same else num_trials, num_bins, num_neurons))
    y = z @ rng.normal(size=(2, 1, 2, num_neurons)) + 1.0 + 0.5 * noise
    y[1, :, num_bins // 2 : num_bins - 1] = np.nan
    y[0, :, : num_bins // 2, 1] = np.nan  # one of the neurons
    recs = pm.Recordings(
        [
            pm.Recording("a", y[0, ..., :4].copy(), bin_width=0.02),
            pm.Recording("b", y[1], bin_width=0.02),
        ]
    )
    torch.manual_seed(seed)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=4).double()
    with torch.no_grad():
        model.observation.log_sd.fill_(np.log(0.5))
    model.observation.log_sd.requires_grad_(False)
    return model, torch.tensor(z), recs.batch(model.names, dtype=torch.double)


def closed_form(model, z, batch, prior):
    """``(Z^T Z / s^2 + P)^-1 (Z^T y / s^2 + P m)`` of every neuron, over the bins that were seen."""
    result = []
    precision = torch.linalg.inv(prior.covariance)
    for r, width in enumerate(batch.num_neurons):
        for n in range(width):
            seen = batch.mask[r, ..., n]
            design = torch.cat([z[r][seen], torch.ones_like(z[r][seen][:, :1])], -1)
            y = batch.observations[r, ..., n][seen]
            gram = design.mT @ design / 0.25 + precision
            result.append(torch.linalg.solve(gram, design.mT @ y / 0.25 + precision @ prior.mean))
    return torch.stack(result)


PRIOR = ReadOutPrior(
    torch.tensor([0.0, 0.0, 3.0]).double(), COVARIANCE / 4, 10.0, torch.zeros(2), torch.eye(2)
)


def fitted(model, z, batch, **options):
    fit_read_outs(model, z, batch, torch.Generator().manual_seed(0), **options)
    return torch.cat(rows_of(model, batch)).detach()


@pytest.mark.parametrize(
    ("size", "afresh", "num_steps"), [((1, 1), True, 200), ((1, 4), True, 400), ((6, 20), False, 300)]
)
def test_with_a_prior_it_is_a_ridge_regression(size, afresh, num_steps):
    model, z, batch = problem(*size)
    expected = closed_form(model, z, batch, PRIOR)
    found = fitted(model, z, batch, prior=PRIOR, afresh=afresh, num_steps=num_steps)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    assert (model.observation.log_sd == np.log(0.5)).all()  # does not ask for a gradient, and stays
    if size == (1, 1):  # what one bin says nothing of is as the prior has it
        unseen = torch.linalg.solve(PRIOR.covariance, found.mT - PRIOR.mean.unsqueeze(-1)).mT
        design = torch.cat([z[:, 0, 0], torch.ones(2, 1).double()], -1)[[0] * 4 + [1] * 6]
        along = (unseen * design).sum(-1, keepdim=True) / design.square().sum(-1, keepdim=True)
        torch.testing.assert_close(unseen, along * design, atol=2e-2, rtol=0)


def test_the_prior_weighs_as_much_where_a_step_takes_some_of_the_trials(monkeypatch):
    """Trials that are all alike: whichever a step takes, the optimum is that of all."""
    model, z, batch = problem(5, 4, same=True)
    monkeypatch.setattr(read_outs, "ELEMENTS", 2 * batch.observations[:, 0].numel())
    expected = closed_form(model, z, batch, PRIOR)
    torch.testing.assert_close(
        fitted(model, z, batch, prior=PRIOR, num_steps=250), expected, atol=2e-3, rtol=0
    )


def test_it_can_go_on_from_the_read_outs_as_they_are():
    model, z, batch = problem(3, 5)
    before = torch.cat(rows_of(model, batch)).detach().clone()
    assert torch.equal(fitted(model, z, batch, num_steps=0, afresh=False), before)
    started = fitted(model, z, batch, num_steps=0)
    assert torch.equal(fitted(model, z, batch, num_steps=0, afresh=False), started)
    assert not torch.equal(started, before)


@pytest.mark.parametrize("family", ["Gaussian", "Poisson"])
def test_counts_start_on_the_scale_of_the_link(family):
    """Many counts a bin, far from what the steps could make up for: by least squares for an identity link."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1, 5, 30, 2))
    y = rng.poisson(200.0 + 10.0 * z @ rng.normal(size=(2, 4))) * 1.0
    y[0, 1:3, :, 0] = np.nan  # a neuron that was not there all the time
    recs = pm.Recordings([pm.Recording("a", y[0], bin_width=0.02)])
    likelihood = getattr(pm.likelihoods, family)
    model = pm.models.MetaSSM(
        recs, latent_dim=2, embedding_dim=1, hidden_dim=4, likelihood=likelihood
    ).double()
    found = fitted(model, torch.tensor(z), recs.batch(model.names, dtype=torch.double), num_steps=0)
    design = np.concatenate([z[0], np.ones((5, 30, 1))], -1)
    expected = []
    for values in np.moveaxis(y[0], -1, 0):
        seen = np.isfinite(values)
        expected.append([0.0, 0.0, np.log(values[seen].mean())])
        if family == "Gaussian":
            expected[-1] = np.linalg.lstsq(design[seen], values[seen], rcond=None)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=0.05)  # but for small ridges


@pytest.mark.parametrize("family", ["Gaussian", "Poisson", "NegativeBinomial"])
def test_read_outs_come_close_to_the_best_given_the_states(family):
    """Against five times the steps: what is left is far below what SVI moves in its first steps."""
    noise = "gaussian" if family == "Gaussian" else "poisson"
    recs = pm.simulate.limit_cycles([3.0, 5.0], noise=noise, num_trials=40, num_neurons=(10, 15), seed=2)
    z = torch.tensor(np.stack([recs.truth[n]["latents"].values for n in recs.names])).float()
    likelihood = getattr(pm.likelihoods, family)
    losses = []
    for more in ({}, {"num_steps": 400}):
        model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=likelihood)
        batch = recs.batch(model.names)
        fit_read_outs(model, z, batch, torch.Generator().manual_seed(0), **more)
        with torch.no_grad():
            y = model.likelihood(model.read_out(z, batch.recording, batch.width), batch.recording)
            losses.append(float(-(y.log_prob(batch.observations) * batch.mask).sum() / batch.mask.sum()))
    assert losses[0] - losses[1] < 1e-3
