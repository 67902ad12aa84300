"""Small fits, and what it means for two of them to be the same."""

import numpy as np
import torch

import pyro_metassm as pm

QUICK = {"num_steps": 6, "warm_start_steps": 4, "trials_per_step": 2, "progress": False}


def parts(recs, likelihood=pm.likelihoods.Gaussian, seed=0, **more):
    torch.manual_seed(seed)
    model = pm.models.MetaSSM(
        recs, latent_dim=2, embedding_dim=1, hidden_dim=8, likelihood=likelihood, **more
    )
    return model, pm.guides.DKF(model, hidden_dim=6)


def state(model, guide) -> dict[str, torch.Tensor]:
    both = {f"model.{k}": v for k, v in model.state_dict().items()}
    return both | {f"guide.{k}": v for k, v in guide.state_dict().items()}


def assert_same(a: pm.Fit, b: pm.Fit) -> None:
    """The same parameters, embeddings and history to the bit (but for the time it took)."""
    one, other = state(a.model, a.guide), state(b.model, b.guide)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(a.statistics, b.statistics)
    assert set(a.history) == set(b.history) and len(a.history["step"]) == len(b.history["step"])
    for name in set(a.history) - {"seconds"}:
        assert np.array_equal(a.history[name].values, b.history[name].values, equal_nan=True), name


def assert_parameters(a: pm.Fit, b: pm.Fit) -> None:
    one, other = state(a.model, a.guide), state(b.model, b.guide)
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
