"""Roll-out errors of recordings that a fit knows."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from fits import QUICK
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.rollouts import rollout_errors

TURN = torch.tensor([[0.9, -0.3], [0.3, 0.9]], dtype=torch.float64)


def parts(z: torch.Tensor):
    """A model that turns, and a guide that sees the states as they are."""
    model = SimpleNamespace(
        names=("a",),
        dynamics_of=lambda e, recording: lambda states: states @ TURN,
        given=lambda values: nullcontext(),
    )
    guide = SimpleNamespace(
        global_sites=SimpleNamespace(medians=dict),
        common_space=lambda batch: (z, z, torch.ones(*z.shape[:-1], 1)),
        embedding_posterior=lambda statistics: dist.Normal(statistics[:, None], 1.0).to_event(1),
    )
    recs = pm.Recordings([pm.Recording("a", np.zeros((*z.shape[1:3], 3)), bin_width=0.02)])
    return model, guide, recs, torch.zeros(1, 1, dtype=torch.float64)


def test_the_error_is_its_equation():
    """One trial of six bins is one stretch; the covariance is that of its states."""
    z = [torch.tensor([1.0, 0.5], dtype=torch.float64)]
    for step in range(5):
        z.append(z[-1] @ TURN + 0.1 * torch.tensor([(-1.0) ** step, 0.5], dtype=torch.float64))
    z = torch.stack(z)
    (error,) = rollout_errors(*parts(z[None, None])).values()
    states = z.numpy()
    rolled = [states[0]]
    for _ in range(5):
        rolled.append(rolled[-1] @ TURN.numpy())
    missed = (np.array(rolled) - states)[1:]
    precision = np.linalg.inv(np.cov(states.T, bias=True))
    errors = np.einsum("ti,ij,tj->t", missed, precision, missed) / 2
    assert errors.max() < 4  # where they are clamped
    assert error == pytest.approx(errors.mean(), rel=1e-9)


def test_nothing_is_missed_of_what_turns_and_much_of_noise():
    z = [torch.randn(4, 1, 2, dtype=torch.float64)]
    for _ in range(30):
        z.append(z[-1] @ TURN)
    path = torch.cat(z, -2)[None]
    assert rollout_errors(*parts(path))["a"] < 1e-20
    assert rollout_errors(*parts(torch.randn_like(path)))["a"] > 0.5


def test_one_bin_tells_nothing():
    assert np.isnan(rollout_errors(*parts(torch.ones(1, 3, 1, 2, dtype=torch.float64)))["a"])


def test_a_fit_has_those_of_its_recordings_and_keeps_them(tmp_path):
    recs = recordings()
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=6), recs, **QUICK)
    found = fit.attrs["rollout_error"]
    assert tuple(found) == recs.names and all(0 <= error <= 4 / 0.1 for error in found.values())
    fit.save(tmp_path / "fit")
    assert pm.load(tmp_path / "fit").attrs["rollout_error"] == found
