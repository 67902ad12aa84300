"""What a hook or a prior of a global site must return, and what is said when it does not."""

import re

import pyro.distributions as dist
import pytest
import torch
from edits_page import SIZES, edits
from fits import QUICK
from pyro.nn import PyroSample

import pyro_metassm as pm


def model_with(**hooks):
    return type("Edited", (pm.models.MetaSSM,), hooks)


def with_site(prior, **hooks):
    def __init__(self, recordings, **options):
        pm.models.MetaSSM.__init__(self, recordings, **options)
        self.site = PyroSample(prior)

    return model_with(__init__=__init__, **hooks)


@pytest.mark.parametrize(
    ("hooks", "needed", "came"),
    [
        ({"embedding_prior": lambda self: dist.Normal(torch.zeros(2), 1.0)},
         "Edited.embedding_prior: needed a Distribution with event shape (2,)", "batch shape (2,); use .to_event(1)"),
        ({"embedding_prior": lambda self: torch.zeros(2)}, "Edited.embedding_prior", "got Tensor"),
        ({"initial_state": lambda self, e: dist.Normal(e.sum(), 1.0)},
         "Edited.initial_state: needed a Distribution with event shape (2,)", "got event shape ()"),
        ({"transition": lambda self, z, dynamics: dist.Normal(dynamics(z), 1.0)},
         "Edited.transition: needed a Distribution with event shape (2,) and batch shape (3, 1,", "use .to_event(1)"),
        ({"transition": lambda self, z, dynamics: dist.Normal(dynamics(z)[..., :1], 1.0).to_event(1)},
         "Edited.transition: needed", "got event shape (1,)"),
        ({"transition": lambda self, z, dynamics: dist.Normal(dynamics(z).mean(-2), 1.0).to_event(1)},
         "Edited.transition: needed", "and batch shape (3, 1)"),
        ({"likelihood": lambda self, predictor, recording: dist.Normal(predictor, 1.0).to_event(2)},
         "Edited.likelihood: needed a Distribution with event shape (5,)", "got event shape (7, 5)"),
        ({"likelihood": lambda self, predictor, recording: dist.Normal(predictor[..., :2], 1.0)},
         "Edited.likelihood: needed", "batch shape (3, 1, 7, 2)"),
        ({"initial_state": lambda self, e: e.nothing()}, "Edited.initial_state stops with an error", "AttributeError"),
    ],
)  # fmt: skip
def test_a_hook_of_another_shape_is_named(recs, hooks, needed, came):
    model = model_with(**hooks)(recs, **SIZES)
    guide = pm.guides.DKF(model, hidden_dim=4)
    (found,) = pm.guides.check(model, guide, recs)
    assert needed in found and came in found
    with pytest.raises(ValueError, match=re.escape(needed)):
        pm.fit(model, guide, recs, **QUICK)


@pytest.mark.parametrize("hook", ["transition", "embedding_prior_of"])
def test_a_hook_that_takes_one_draw_alone_is_told(recs, hook):
    """Scales of states without ``unsqueeze``, rows of a table without ``rows``: right in training, not in draws."""

    def transition(self, z, dynamics):
        return dist.Normal(dynamics(z), self.site.exp()).to_event(1)

    def embedding_prior_of(self, recording):
        return dist.Normal(self.site[recording].unsqueeze(-2), 1.0).to_event(1)

    size = [2] if hook == "transition" else [3, 2]
    prior = dist.Normal(0.0, 1.0).expand(size).to_event(len(size))
    model = with_site(prior, **{hook: transition if hook == "transition" else embedding_prior_of})(
        recs, **SIZES
    )
    (found,) = pm.guides.check(model, pm.guides.DKF(model, hidden_dim=4), recs)
    assert "draws of the global sites at once" in found and "self.rows(table, index)" in found
    assert f"Edited.{hook.removesuffix('_of')}" in found


def test_sites_that_have_no_automatic_posterior(recs):
    for prior, said in [
        (
            dist.Normal(torch.zeros(3), 1.0),
            r"'site': needed a prior without a batch shape.*use \.to_event\(1\)",
        ),
        (dist.Poisson(3.0), "'site': needed a prior over numbers that a Normal can be mapped onto"),
    ]:
        with pytest.raises(ValueError, match=said):
            pm.guides.DKF(with_site(prior)(recs, **SIZES))
    model = pm.models.MetaSSM(recs, **SIZES)
    guide = pm.guides.DKF(model, hidden_dim=4)
    model.site = PyroSample(dist.Normal(0.0, 1.0))  # after the guide was made
    (found,) = pm.guides.check(model, guide, recs)
    assert "lacks the model's latent site(s) ['site']" in found and "before the guide is made" in found


def test_conditions_and_inputs_that_are_not_there(recs, driven):
    model = edits.ByCondition(recs, conditions=["go"], **SIZES)
    (found,) = pm.guides.check(model, pm.guides.DKF(model, hidden_dim=4), recs)
    assert "recording 'a': needed trials of the conditions go, got stop" in found
    with pytest.raises(ValueError, match="recording 'a': needed trials of the conditions go, got none"):
        model.trial_embedding(torch.zeros(3, 1, 2), driven.batch(model.names))
    model = edits.Driven(recs, input_dim=2, **SIZES)
    (found,) = pm.guides.check(model, pm.guides.DKF(model, hidden_dim=4), recs)
    assert "Driven.transition: needed recordings with inputs, got a, b, c without" in found
