"""Priors of read-outs as wide as a new recording's own neurons have them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import pyro_metassm as pm
from pyro_metassm import adaptation, adapter, own_tuning, read_outs
from pyro_metassm.own_tuning import with_own_tuning
from pyro_metassm.read_outs import ReadOutPrior

LATENT, SD = 2, 0.5
SHARED = torch.tensor([[1.0, 0.2, -0.3], [0.2, 0.5, 0.0], [-0.3, 0.0, 2.0]], dtype=torch.float64)
PRIOR = ReadOutPrior(
    torch.tensor([0.0, 0.0, 1.0]).double(), SHARED, 10.0, torch.zeros(2).double(), torch.eye(2).double()
)


def problem(sizes, widths, counts=False, num_bins=30):
    """Recordings of these numbers of neurons, whose weights are of these sizes: states, model and data."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(len(sizes), 3, num_bins, LATENT))
    found = []
    for r, (name, size) in enumerate(sizes.items()):
        predictor = z[r] @ (widths[r] * rng.normal(size=(LATENT, size))) + rng.normal(0.3, 0.3, size=size)
        y = rng.poisson(np.exp(predictor)) if counts else predictor + SD * rng.normal(size=predictor.shape)
        y = y.astype(float)
        y[0, : num_bins // 2, 0] = np.nan
        found.append(pm.Recording(name, y, bin_width=0.02))
    recs = pm.Recordings(found)
    family = pm.likelihoods.Poisson if counts else pm.likelihoods.Gaussian
    sizes_of = {"latent_dim": LATENT, "embedding_dim": 1, "hidden_dim": 4}
    model = pm.models.MetaSSM(recs, **sizes_of, likelihood=family).double()
    if not counts:
        with torch.no_grad():
            model.observation.log_sd.fill_(math.log(SD))
    return model, torch.tensor(z), recs.batch(model.names, dtype=torch.float64)


def evidence(covariance, z, batch, r):
    """Of one recording, up to a constant: every neuron's observations jointly Normal, and the inverse Wishart."""
    total = 0.0
    for n in range(batch.num_neurons[r]):
        seen = batch.mask[r, ..., n]
        x = torch.cat([z[r][seen], torch.ones_like(z[r][seen][:, :1])], -1)
        joint = x @ covariance @ x.mT + SD**2 * torch.eye(len(x)).double()
        y = torch.distributions.MultivariateNormal(x @ PRIOR.mean, joint)
        total = total + y.log_prob(batch.observations[r, ..., n][seen])
    inverse = torch.linalg.inv(covariance)
    worth = LATENT + 2
    return total - 0.5 * worth * (torch.logdet(covariance) + (inverse * SHARED).sum())


def test_of_most_evidence_among_all_covariances(monkeypatch):
    """The gradient of the evidence, written out densely, vanishes there; in each of two recordings."""
    monkeypatch.setattr(own_tuning, "ROUNDS", 300)
    model, z, batch = problem({"a": 4, "b": 7}, (0.3, 2.0), num_bins=10)
    found = with_own_tuning(PRIOR, model, z, batch)
    assert set(found.own) == {"a", "b"} and not PRIOR.own
    assert torch.equal(found.covariance, SHARED)
    for r, name in enumerate(("a", "b")):
        at, elsewhere = (x.clone().requires_grad_() for x in (found.own[name], SHARED))
        (slope,) = torch.autograd.grad(evidence(at, z, batch, r), at)
        (reference,) = torch.autograd.grad(evidence(elsewhere, z, batch, r), elsewhere)
        assert slope.abs().max() < 1e-4 * reference.abs().max()


def test_neurons_without_a_curvature_say_as_little_as_neurons_that_nobody_saw(monkeypatch):
    monkeypatch.setattr(own_tuning, "ROUNDS", 100)
    model, z, batch = problem({"a": 6}, (1.0,), counts=True)
    mask = batch.mask.clone()
    mask[..., 2] = False
    unseen = with_own_tuning(PRIOR, model, z, dataclasses.replace(batch, mask=mask)).own["a"]
    every = with_own_tuning(PRIOR, model, z, batch).own["a"]

    def broken(*arguments, known=read_outs.curvature):
        *parts, second = known(*arguments)
        second[..., 2] = torch.nan
        return *parts, second

    monkeypatch.setattr(read_outs, "curvature", broken)
    found = with_own_tuning(PRIOR, model, z, batch).own["a"]
    torch.testing.assert_close(found, unseen, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, every, rtol=1e-2)


def test_read_outs_end_at_their_modes():
    model, z, batch = problem({"a": 4, "b": 7}, (0.3, 2.0))
    found = with_own_tuning(PRIOR, model, z, batch)
    for r, name in enumerate(("a", "b")):
        place, precision = model.neurons.slice(name), torch.linalg.inv(found.own[name])
        rows = torch.cat([model.read_out.weight[place], model.read_out.bias[place].unsqueeze(-1)], -1)
        for n in range(batch.num_neurons[r]):
            seen = batch.mask[r, ..., n]
            x = torch.cat([z[r][seen], torch.ones_like(z[r][seen][:, :1])], -1)
            y = batch.observations[r, ..., n][seen]
            mode = torch.linalg.solve(x.mT @ x / SD**2 + precision, x.mT @ y / SD**2 + precision @ PRIOR.mean)
            torch.testing.assert_close(rows[n].detach(), mode)


@pytest.mark.parametrize("width", [0.1, 0.3, 1.0])
def test_counts_of_weakly_tuned_neurons_have_a_narrow_prior(width):
    """Weights of 200 neurons have the size that they were drawn with, however far it is from that of known ones."""
    model, z, batch = problem({"a": 200}, (width,), counts=True, num_bins=100)
    own = with_own_tuning(PRIOR, model, z, batch).own["a"]
    # Five standard errors of the size of 200 normal weights, each known to about 0.06 from 300 counts of about 1.4.
    error = 5 * 2**0.5 / 200**0.5 * (width**2 + 0.06**2)
    share = (LATENT + 2) / (LATENT + 2 + 200)  # of what the prior has
    for k in range(LATENT):
        expected = share * float(SHARED[k, k]) + (1 - share) * width**2
        assert abs(float(own[k, k]) - expected) < error + 0.01


def test_adaptations_to_counts_use_it_and_others_do_not(monkeypatch):
    seen = []

    def watched(prior, *arguments):
        seen.append(with_own_tuning(prior, *arguments))
        return seen[-1]

    monkeypatch.setattr(adaptation, "with_own_tuning", watched)
    quick = {"num_steps": 2, "progress": False}
    for family, number in ((pm.likelihoods.Gaussian, 0), (pm.likelihoods.Poisson, 1)):
        recs = pm.simulate.limit_cycles([2.5, 5.0, 4.0], num_trials=4, num_steps=20)
        if family is pm.likelihoods.Poisson:
            rng = np.random.default_rng(0)
            recs = pm.Recordings(
                [
                    pm.Recording(
                        r.name, rng.poisson(np.ones(r.observations.shape)).astype(float), bin_width=0.02
                    )
                    for r in recs.values()
                ]
            )
        old = recs.drop(["w=4"])
        torch.manual_seed(0)
        model = pm.models.MetaSSM(old, latent_dim=2, embedding_dim=1, hidden_dim=8, likelihood=family)
        fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=8), old, warm_start_steps=2, **quick)
        priors = []
        taken = adapter.Adapter.penalty

        def penalty(self, terms, batch, taken=taken, priors=priors):
            priors.append(self.prior)
            return taken(self, terms, batch)

        with monkeypatch.context() as patch:
            patch.setattr(adapter.Adapter, "penalty", penalty)
            pm.adapt(fit, recs.select(["w=4"]), num_starts=4, search_steps=3, **quick)
        assert len(seen) == number
        assert all(set(prior.own) == ({"w=4"} if number else set()) for prior in priors) and priors
