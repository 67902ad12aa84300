"""Guides that are taught with some of the neurons hidden."""

from dataclasses import replace

import numpy as np
import torch
from members import EMBEDDING, SIZES
from problems import recordings
from pyro import poutine

import pyro_metassm as pm
from pyro_metassm.models import MetaSSM
from pyro_metassm.recordings import Recording, Recordings


def seen_by(guide, batch, monkeypatch) -> torch.Tensor:
    """The mask that the guide reads a batch with."""
    read, found = guide.read_in.forward, []
    with monkeypatch.context() as patch:
        patch.setattr(guide.read_in, "forward", lambda b: found.append(b.mask) or read(b))
        poutine.trace(guide).get_trace(batch)
    return found[0]


def test_the_number_of_hidden_neurons_is_uniform(monkeypatch):
    """Of N neurons each hidden with chance s, s uniform on (0, 1), any number from 0 to N is hidden equally often."""
    num_neurons, num_trials = 4, 4000
    values = np.ones((num_trials, 2, num_neurons)) * np.arange(2)[:, None]
    recs = Recordings([Recording("a", values, bin_width=0.02)])
    model = MetaSSM(recs, latent_dim=2, embedding_dim=1)
    guide = pm.guides.DKF(model, hidden_dim=5, neuron_dropout=1 - 1e-7)
    guide.read_in.start(recs)
    torch.manual_seed(0)
    seen = seen_by(guide, recs.batch(model.names), monkeypatch)[0]
    assert (seen[:, 0] == seen[:, 1]).all()  # the same in all bins of a trial
    times = torch.bincount((~seen[:, 0]).sum(-1), minlength=num_neurons + 1)
    p = 1 / (num_neurons + 1)
    assert (times - p * num_trials).abs().max() < 5 * (num_trials * p * (1 - p)) ** 0.5
    by_neuron = (~seen[:, 0]).double().mean(0)
    assert (by_neuron - 0.5).abs().max() < 5 * (0.25 / num_trials) ** 0.5


def test_hidden_neurons_are_missing_for_the_guide_and_scored_by_the_model(monkeypatch):
    """While training, else all are seen: the posterior is that without them, the likelihood that of all of them."""
    recs = recordings(counts=True)
    torch.manual_seed(0)
    model = MetaSSM(recs, **SIZES, likelihood=pm.likelihoods.Poisson)
    guide = pm.guides.DKF(model, hidden_dim=5, rollout_probability=0.0, neuron_dropout=0.8)
    guide.read_in.start(recs)
    batch = recs.batch(model.names)
    e = {"embedding": torch.zeros(len(recs), 1, EMBEDDING)}

    def trace(training, batch):
        torch.manual_seed(1)
        return poutine.trace(poutine.condition(guide.train(training), data=e)).get_trace(batch)

    def posterior(training, batch):
        return trace(training, batch).nodes["latents"]["fn"].loc

    torch.manual_seed(1)
    hidden = batch.mask & ~seen_by(guide.train(), batch, monkeypatch)
    assert hidden.any() and (seen_by(guide.eval(), batch, monkeypatch) == batch.mask).all()
    other = replace(batch, observations=torch.where(hidden, batch.observations + 3, batch.observations))
    taught = posterior(True, batch)
    torch.testing.assert_close(posterior(True, other), taught, rtol=0, atol=0)
    torch.testing.assert_close(posterior(False, replace(batch, mask=batch.mask & ~hidden)), taught)
    assert not torch.allclose(posterior(False, other), posterior(False, batch))
    drawn = poutine.trace(guide.train()).get_trace(batch)
    scored = poutine.trace(poutine.replay(model, drawn)).get_trace(batch)
    assert (scored.nodes["observations"]["fn"].observed == batch.mask).all()
