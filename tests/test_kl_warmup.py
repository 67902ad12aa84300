"""Divergences count little in early steps, where the fit is told so."""

import numpy as np
import pytest
import torch
from fits import QUICK, assert_same, parts
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.trainer import Options, Trainer


@pytest.mark.parametrize("step, weight", [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (5, 1.0)])
def test_the_loss_is_the_weighted_sum_of_its_terms(step, weight):
    recs = recordings(counts=True)
    model, guide = parts(recs, pm.likelihoods.Poisson)
    guide.read_in.start(recs, model.observation.kinds)
    options = Options(8, None, None, 1e-2, False, 0, 1.0, 0.5, 0, kl_warmup_steps=4)
    trainer = Trainer(model, guide, recs, options, torch.device("cpu"))
    trainer.step = step
    batch = trainer.batch()
    terms = trainer.elbo.terms(model, guide, batch)
    observed = sum(int(r.mask.sum()) for r in recs.values())
    elbo = terms.log_likelihood - weight * (terms.kl["latents"] + terms.kl["embedding"])
    updates = model.dynamics_of(terms.embedding, batch.recording).update_norm()
    expected = 0.5 * updates - elbo / observed
    assert trainer.loss(terms, batch).item() == pytest.approx(expected.item(), rel=1e-5)
    assert min(terms.kl.values()) > 1e-3 * terms.log_likelihood.abs()  # they do weigh


def test_latents_say_more_while_it_grows():
    recs = pm.simulate.limit_cycles(
        [5.0],
        num_trials=24,
        num_steps=40,
        num_neurons=(20, 20),
        noise="poisson",
        mean_count=(0.1, 0.3),
        seed=1,
    )
    options = {"num_steps": 60, "warm_start_steps": 50, "learning_rate": 2e-2, "progress": False}
    early, found = {"step": slice(20, 45)}, []
    for steps in (0, 60):
        torch.manual_seed(0)
        model = pm.models.MetaSSM(recs, latent_dim=4, embedding_dim=1, likelihood=pm.likelihoods.Poisson)
        history = pm.fit(model, pm.guides.DKF(model), recs, kl_warmup_steps=steps, **options).history
        found.append(history.isel(early).mean())
    whole, grown = found
    assert grown["kl_latents"] > 1.15 * whole["kl_latents"]
    assert grown["log_likelihood"] > whole["log_likelihood"]


def test_a_history_has_the_whole_elbo(recs):
    history = pm.fit(*parts(recs), recs, kl_warmup_steps=4, **QUICK).history
    divergence = history["kl_latents"] + history["kl_embedding"]
    np.testing.assert_allclose(history["elbo"], history["log_likelihood"] - divergence, rtol=1e-5)


def test_a_warm_up_goes_on_where_it_was(recs, tmp_path, monkeypatch):
    options = QUICK | {"kl_warmup_steps": 5}
    whole = pm.fit(*parts(recs), recs, **options)
    taken = Trainer.take_step

    def take_step(self):
        if self.step == 3:
            raise InterruptedError
        taken(self)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    with pytest.raises(InterruptedError):
        pm.fit(*parts(recs), recs, checkpoint=tmp_path, checkpoint_every=1, **options)
    monkeypatch.setattr(Trainer, "take_step", taken)
    assert_same(pm.fit(*parts(recs), recs, checkpoint=tmp_path, checkpoint_every=1, **options), whole)
