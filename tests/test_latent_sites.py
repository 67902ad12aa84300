"""Latent sites that the model or the guide has alone: named, and what answers them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.elbo import SequentialELBO


class Wide(pm.models.MetaSSM):
    """A hyperparameter with its own site, outside of all plates."""

    def forward(self, batch):
        self.width = pyro.sample("width", dist.LogNormal(torch.zeros(()), 1.0))
        return super().forward(batch)

    def embedding_prior(self):
        return dist.Normal(torch.zeros(self.embedding_dim), self.width).to_event(1)


class WideByRecording(pm.models.MetaSSM):
    """The same inside the recording plate, where the hook is called: one width a recording."""

    def embedding_prior(self):
        width = pyro.sample("width", dist.LogNormal(torch.zeros(()), 1.0))
        return dist.Normal(torch.zeros(self.embedding_dim), width.unsqueeze(-1)).to_event(1)


class Answered(pm.guides.DKF):
    """What the error's message says."""

    def forward(self, batch):
        pyro.sample("width", dist.LogNormal(torch.zeros(()), 0.1))
        super().forward(batch)


class AnsweredByRecording(pm.guides.DKF):
    def embedding_posterior(self, statistics):
        pyro.sample("width", dist.LogNormal(torch.zeros(()), 0.1))
        return super().embedding_posterior(statistics)


@pytest.mark.parametrize("kind", [Wide, WideByRecording])
def test_a_latent_site_without_partner_is_named(kind):
    recs = recordings()
    model = kind(recs, latent_dim=2, embedding_dim=1)
    guide = pm.guides.DKF(model)
    with pytest.raises(
        ValueError, match=r"guide lacks the model's latent site\(s\) \['width'\].*subclass the guide"
    ):
        SequentialELBO().terms(model, guide, recs.batch(model.names))
    with pytest.raises(ValueError, match=r"\['width'\]"):
        pm.fit(model, guide, recs, num_steps=1, warm_start_steps=1, progress=False)


@pytest.mark.parametrize(
    "kind, answer, times", [(Wide, Answered, 1), (WideByRecording, AnsweredByRecording, 3)]
)
def test_a_latent_site_with_its_partner_counts(kind, answer, times):
    recs = recordings()
    model = kind(recs, latent_dim=2, embedding_dim=1)
    terms = SequentialELBO().terms(model, answer(model), recs.batch(model.names))
    assert set(terms.kl) == {"width", "embedding", "latents"} and terms.elbo.isfinite()
    # LogNormal against LogNormal is analytic: the KL of the Normals behind them.
    assert np.isclose(terms.kl["width"].item(), times * 0.5 * (0.01 - 1 - np.log(0.01)), rtol=1e-5)


def test_a_latent_site_in_other_plates_is_named():
    recs = recordings()
    model = WideByRecording(recs, latent_dim=2, embedding_dim=1)
    with pytest.raises(
        ValueError, match=r"'width': needed one batch shape .* got \(3, 1\) and \(\); sample it inside"
    ):
        SequentialELBO().terms(model, Answered(model), recs.batch(model.names))


def test_a_site_of_the_guide_alone_is_named_unless_auxiliary():
    recs = recordings()
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
    with pytest.raises(ValueError, match=r"\['width'\], which the model does not have"):
        SequentialELBO().terms(model, Answered(model), recs.batch(model.names))

    class Chatty(pm.guides.DKF):
        def forward(self, batch):
            pyro.sample("extra", dist.Delta(torch.zeros(())), infer={"is_auxiliary": True})
            super().forward(batch)

    assert set(SequentialELBO().terms(model, Chatty(model), recs.batch(model.names)).kl) == {
        "embedding",
        "latents",
    }
