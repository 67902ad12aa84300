"""Edits of the model: hooks overridden in a few lines, and trained."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from fits import QUICK
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.recordings import Recordings


@pytest.fixture(scope="module")
def recs() -> Recordings:
    return recordings()


class StudentPrior(pm.models.MetaSSM):
    def embedding_prior(self):
        return dist.StudentT(4.0, torch.zeros(self.embedding_dim), 1.0).to_event(1)


class MixturePrior(pm.models.MetaSSM):
    def embedding_prior(self):
        component = dist.Normal(torch.tensor([[-1.0], [1.0]]), 0.5).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2) / 2), component)


class Overdispersed(pm.models.MetaSSM):
    def likelihood(self, predictor, recording):
        return dist.NegativeBinomial(torch.full_like(predictor, 5.0), logits=predictor)


class HeavyTails(pm.models.MetaSSM):
    def transition(self, z, dynamics):
        return dist.StudentT(4.0, dynamics(z), self.process_noise()).to_event(1)


class EmbeddedStart(pm.models.MetaSSM):
    def initial_state(self, e):
        return dist.Normal(self.initial.loc + e.mean(-1, keepdim=True), self.initial.scale).to_event(1)


EDITS = [StudentPrior, MixturePrior, Overdispersed, HeavyTails, EmbeddedStart]


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.parametrize("warm_start", [True, False])
def test_edits_of_the_model_train(kind, warm_start):
    recs = recordings(counts=kind is Overdispersed)
    torch.manual_seed(0)
    model = kind(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    guide = pm.guides.DKF(model, hidden_dim=6)
    fit = pm.fit(model, guide, recs, warm_start=warm_start, **(QUICK | {"num_steps": 20}))
    assert np.isfinite(fit.history["elbo"]).all() and len(fit.history["step"]) == 20
    tree = pm.forecast(fit, recs, context=2, horizon=3, num_samples=3)
    assert np.isfinite(tree["b/predictions"]["rates"]).all()


class AnyCallable(pm.models.MetaSSM):
    """Its dynamics are a plain function."""

    def adapt_dynamics(self, e):
        turn = torch.tensor([[0.95, -0.2], [0.2, 0.95]])
        return lambda z: z @ turn.to(z) + 0.1 * e.unsqueeze(-2).tanh()


class NoiseOfItsOwn(pm.models.MetaSSM):
    """Without the attribute that holds a model's noise as a rule."""

    def __init__(self, recordings, **options):
        super().__init__(recordings, **options)
        del self.process_noise
        self.log_scale = torch.nn.Parameter(torch.tensor(-2.0))

    def embedding_prior(self):
        return dist.Normal(torch.zeros(self.embedding_dim), 1.0).to_event(1)

    def transition(self, z, dynamics):
        return dist.Normal(dynamics(z), self.log_scale.exp()).to_event(1)


@pytest.mark.parametrize("kind", [*EDITS, AnyCallable, NoiseOfItsOwn])
def test_edits_of_the_model_adapt(kind):
    recs = recordings(counts=kind is Overdispersed)
    torch.manual_seed(0)
    model = kind(recs.drop(["b"]), latent_dim=2, embedding_dim=1, hidden_dim=8)
    guide = pm.guides.DKF(model, hidden_dim=6)
    fit = pm.fit(model, guide, recs.drop(["b"]), warm_start=False, **QUICK)
    options = {"num_steps": 3, "num_starts": 5, "search_steps": 4, "progress": False}
    adapted = pm.adapt(fit, recs.select(["b"]), train=("read_in", "read_out", "embedding"), **options)
    assert np.isfinite(adapted.history["elbo"]).all() and adapted.statistics.isfinite().all()
    tree = pm.forecast(adapted, recs, context=2, horizon=3, num_samples=3)
    assert np.isfinite(tree["b/predictions"]["rates"]).all()
