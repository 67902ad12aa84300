"""Few-shot adaptation to recordings of every shape, of models of every kind."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from adapted_fits import FIT, SMALL, check_finite, check_old, some
from fits import parts, state
from members import COMPARISONS
from problems import recordings
from torch import nn

import pyro_metassm as pm
from pyro_metassm import adaptation, adapter
from pyro_metassm.recordings import Recordings

CASES = {
    "one trial": {"x": (4, (12,))},
    "one neuron": {"x": (1, (12, 7))},
    "one bin": {"x": (4, (1, 1, 1))},
    "two bins": {"x": (4, (2,))},
    "nothing to speak of": {"x": (1, (1,))},
    "unequal": {"x": (4, (30, 2)), "y": (5, (2,))},
    "many": {"x": (4, tuple([40] * 20))},
}


@pytest.mark.parametrize("case", CASES)
def test_recordings_of_every_shape(fit, case):
    new = some(CASES[case])
    result = pm.adapt(fit, new, train=adaptation.PARTS, **SMALL)
    check_old(fit, result)
    check_finite(result)
    errors = [result.attrs["adaptation"][name]["rollout_error"] for name in new.names]
    known = [bool((np.isfinite(r.observations).any(-1).sum(-1) > 1).any()) for r in new.values()]
    assert np.isfinite(errors).tolist() == known
    assert np.isfinite(pm.posterior(result, new, num_samples=2)["posterior"]["embedding"]).all()


@pytest.mark.parametrize("family", ["Poisson", "NegativeBinomial"])
def test_counts(family):
    old = recordings(counts=True)
    fit = pm.fit(*parts(old, getattr(pm.likelihoods, family)), old, **FIT)
    result = pm.adapt(fit, some(counts=True), **SMALL)
    check_old(fit, result)
    check_finite(result)
    assert result.guide.read_in.counts.all()
    ceiling = result.model.observation.log_ceiling[9:13].exp()  # twice the largest count of each neuron
    largest = torch.tensor(np.nanmax(some(counts=True)["x"].observations, (0, 1))).float()
    torch.testing.assert_close(ceiling, 2 * largest)


def test_read_ins_of_counts_have_those_that_the_fit_has_learned_as_their_prior(old, fit, monkeypatch):
    """A Normal's minus log density, up to its constant, besides the read-outs'; of real numbers there is none."""
    counts = recordings(counts=True)
    counts = Recordings([r._replace(held_out_neurons=np.arange(r.num_neurons) == 2) for r in counts.values()])
    known = pm.fit(*parts(counts, pm.likelihoods.Poisson), counts.select(["a", "b"]), **FIT)
    with torch.no_grad():  # as a start from the data leaves the neurons that the guide does not see
        for name in counts:
            known.guide.read_in.weight[known.model.neurons.slice(name)][2:3] = 0.0
    rows = torch.cat([known.guide.read_in.weight[known.model.neurons.slice(name)] for name in ("a", "b")])
    precision = adapter.read_in_precision(known)
    assert precision is not None and adapter.read_in_precision(fit) is None
    torch.testing.assert_close(1 / precision, rows[rows.any(-1)].square().mean(0))
    seen, penalty = [], adapter.Adapter.penalty

    def watched(self, terms, batch):
        found = penalty(self, terms, batch)
        weight = self.guide.read_in.weight
        normal = dist.Normal(torch.zeros(len(precision)), precision.rsqrt())
        expected = normal.log_prob(torch.zeros(())).sum() * len(weight) - normal.log_prob(weight).sum()
        seen.append((torch.as_tensor(found).detach(), (expected / self.scale).detach()))
        return found

    monkeypatch.setattr(adaptation.ReadOutPrior, "of_batch", lambda *_: torch.zeros(()))
    monkeypatch.setattr(adapter.Adapter, "penalty", watched)
    pm.adapt(known, some(counts=True), **SMALL)
    for found, expected in seen:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert len(seen) == 3 and float(seen[-1][1]) > 1e-3
    seen.clear()
    pm.adapt(known, some(counts=True), train="read_out", **SMALL)
    assert [float(found) for found, _ in seen] == [0.0] * 3


def test_double_precision(old):
    model, guide = parts(old)
    fit = pm.fit(model.double(), guide.double(), old, **FIT)
    result = pm.adapt(fit, some(), train=adaptation.PARTS, **SMALL)
    check_old(fit, result)
    assert result.dtype == torch.float64
    kinds = {value.dtype for value in state(result.model, result.guide).values()}
    assert kinds == {torch.float64, torch.bool}


@pytest.mark.parametrize("kind", [k for k in COMPARISONS if k is not pm.models.SingleSession])
def test_the_comparison_methods(old, kind):
    model = kind(old, latent_dim=2, embedding_dim=2, hidden_dim=6)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=5), old, **FIT)
    result = pm.adapt(fit, some(), **SMALL)
    check_old(fit, result)
    check_finite(result)


def test_a_linear_model_with_an_amortised_guide(old):
    model = pm.models.LinearGaussian(old, latent_dim=2)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=5), old, **FIT)
    check_finite(pm.adapt(fit, some(), **SMALL))


class Own(pm.models.MetaSSM):
    """A gain per neuron and a noise per recording, and a floor of the noise that all recordings share."""

    def __init__(self, recordings, **options):
        super().__init__(recordings, **options)
        self.gain = nn.Parameter(torch.ones(self.neurons.total))
        self.noise = nn.Parameter(torch.zeros(len(self.names)))
        self.observation.floor = nn.Parameter(torch.tensor(-1.0))
        self.register_buffer("kind", torch.arange(len(self.names)))

    def likelihood(self, predictor, recording):
        gain = self.neurons.gather(self.gain, recording, predictor.shape[-1])[:, None, None, :]
        y = self.observation(predictor * gain, recording)
        scale = y.scale + self.noise[recording].exp().view(-1, 1, 1, 1) + self.observation.floor.exp()
        return dist.Normal(y.loc, scale)


def test_tables_of_a_users_own_are_adapted_and_what_is_shared_is_not(old, monkeypatch):
    model = Own(old, latent_dim=2, embedding_dim=1, hidden_dim=4)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=4), old, **FIT)
    joined, new_ones = adapter.joined, []

    def watched(first, second):
        new_ones.append(second)
        return joined(first, second)

    monkeypatch.setattr(adapter, "joined", watched)
    start, end = (pm.adapt(fit, some(), **(SMALL | {"num_steps": n})) for n in (0, 3))
    check_old(fit, end)
    assert end.model.gain.shape == (15,) and end.model.noise.shape == (5,)
    for key in ("gain", "noise"):
        before, after = getattr(start.model, key), getattr(end.model, key)
        assert (before[-2:] != after[-2:]).all(), key
    for model, _ in new_ones:  # nor while the new ones were fitted
        assert torch.equal(model.observation.floor, fit.model.observation.floor)
