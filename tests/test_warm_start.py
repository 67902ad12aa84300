"""The start from the data: frames that do not depend on who observed, noise told from signal, a better first ELBO."""

import numpy as np
import pytest
import torch

import pyro_metassm as pm
from pyro_metassm import warm_start
from pyro_metassm.dynamics import LowRankMLP
from pyro_metassm.guides.encoders import smooth


def spiral(num_trials=40, num_steps=60, seed=0):
    """A rotation whose axes differ in speed, so that its canonical frame is unique."""
    rng = np.random.default_rng(seed)
    step = np.array([[0.95, -0.25], [0.12, 0.97]])
    z = rng.normal(size=(num_trials, 2))
    path = []
    for _ in range(num_steps):
        z = z @ step.T + 0.1 * rng.normal(size=z.shape)
        path.append(z)
    return torch.tensor(np.stack(path, 1))


def test_canonical_frame_does_not_depend_on_the_basis_of_observation():
    z = spiral()
    seen = torch.ones(z.shape[:2], dtype=torch.bool)
    mixing = torch.tensor(
        [[1.3, -0.4], [0.2, 0.9]], dtype=z.dtype
    )  # another observer, with another handedness
    mirror = torch.tensor([[-1.0, 0.0], [0.0, 1.0]], dtype=z.dtype)
    frames = []
    for observed in (z, z @ mixing + 3.0, z @ mirror @ mixing):
        matrix, offset = warm_start.canonical_frame(observed, seen)
        frames.append(observed @ matrix + offset)
    # Exact but for the ridge on the whitening; the sign of the whole frame is free.
    for other in frames[1:]:
        sign = torch.sign((frames[0] * other).sum())
        assert (frames[0] - sign * other).abs().mean() < 0.08
    assert torch.allclose(frames[0].flatten(0, 1).mean(0), torch.zeros(2, dtype=z.dtype), atol=1e-10)
    assert torch.allclose(frames[0].flatten(0, 1).var(0), torch.ones(2, dtype=z.dtype), atol=0.05)


def test_canonical_frame_gives_mirrored_cycles_the_same_handedness():
    angle = torch.linspace(0, 20, 200, dtype=torch.double)
    seen = torch.ones(1, 200, dtype=torch.bool)
    turns = []
    for sign in (1.0, -1.0):
        cycle = torch.stack([angle.cos(), sign * angle.sin()], -1).unsqueeze(0)
        matrix, offset = warm_start.canonical_frame(cycle, seen)
        w = cycle @ matrix + offset
        turns.append(float((w[:, :-1, 0] * w[:, 1:, 1] - w[:, :-1, 1] * w[:, 1:, 0]).mean()))
    assert turns[0] * turns[1] > 0


def test_lagged_subspace_ignores_noise_that_is_independent_from_bin_to_bin():
    torch.manual_seed(0)
    z = spiral(num_trials=200).float()
    read_out = torch.linalg.qr(torch.randn(20, 2))[0].mT
    noise = torch.randn(200, 60, 20) * torch.linspace(
        0.1, 3.0, 20
    )  # far louder than the signal, unequal by neuron
    features = z @ read_out + noise
    features = features - features.mean((0, 1))
    seen = torch.ones(200, 60, dtype=torch.bool)
    basis = warm_start.lagged_subspace(features, seen, 2)
    alignment = torch.linalg.svdvals(read_out @ basis)  # cosines of the principal angles
    _, pca = torch.linalg.eigh(torch.einsum("ktn,ktm->nm", features, features))
    assert alignment.min() > 0.9
    assert torch.linalg.svdvals(read_out @ pca[:, -2:]).min() < 0.5  # what the plain covariance gives


def test_fewer_neurons_than_latents_leave_zeros():
    features = torch.randn(5, 10, 1)
    basis = warm_start.lagged_subspace(features, torch.ones(5, 10, dtype=torch.bool), 3)
    assert basis.shape == (1, 3) and (basis[:, 1:] == 0).all() and basis[0, 0].abs() == 1


@pytest.mark.parametrize("sd", [0.0, 0.5])
def test_noise_share_of_a_known_mixture(sd):
    torch.manual_seed(0)
    time = torch.arange(400) * 0.1
    phase = 2 * torch.pi * torch.rand(100, 1)
    signal = torch.stack([(time + phase).sin(), (time + phase).cos()], -1)  # variance 1/2 each
    noisy = signal + sd * torch.randn_like(signal)
    share = warm_start.noise_share(noisy, torch.ones(noisy.shape[:2], dtype=torch.bool))
    # 40,000 bins: the standard error of a covariance is about 0.5 / sqrt(40000), four of them enter.
    assert abs(float(share) - sd**2 / (0.5 + sd**2)) < 0.02


def test_smoothing_is_a_weighted_mean_and_can_leave_a_bin_out():
    x = torch.randn(1, 1, 9, 1)
    weight = torch.ones_like(x)
    weight[..., 4, :] = 0.0
    lag = torch.arange(9.0) - 4.0
    kernel = torch.exp(-0.5 * (lag / 1.5) ** 2)
    expected = (kernel * weight.flatten() * x.flatten()).sum() / (kernel * weight.flatten()).sum()
    assert torch.allclose(smooth(x, weight, 1.5)[0, 0, 4, 0], expected, atol=1e-6)
    assert torch.equal(smooth(x, weight, 0.0), x)
    spike = torch.zeros_like(x)
    spike[..., 4, :] = 1.0
    assert smooth(spike, torch.ones_like(x), 1.5, leave_out=True)[0, 0, 4, 0] == 0.0


@pytest.mark.parametrize("rank", [0, 2])
def test_roll_outs_of_the_librarys_dynamics_are_those_of_any_callable(rank):
    """In value and gradient; the first states leave the bounds, or do not."""
    torch.manual_seed(0)
    mlp = LowRankMLP(2, 3, rank=rank, hidden_dim=7).double()
    e = torch.randn(2, 1, 3, dtype=torch.double, requires_grad=True)
    z = (2.0 * torch.randn(2, 5, 1, 2, dtype=torch.double)).requires_grad_()
    leaves = [p for p in (z, e, *mlp.parameters()) if p.numel()]
    own, results = mlp(e), []
    for dynamics in (own, lambda z: own(z)):
        path = warm_start.roll_out(dynamics, z, 9, 3.0)
        gradients = torch.autograd.grad(path.sin().sum(), leaves, allow_unused=True, retain_graph=True)
        results.append([path, *(g for g in gradients if g is not None)])
    assert results[0][0].shape == (2, 5, 9, 2) and (results[0][0].abs() == 3.0).any()
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_windows_lie_where_trials_have_data():
    recs = pm.simulate.limit_cycles([3.0, 5.0], num_trials=6, num_steps=40, num_neurons=8, seed=1)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=4)
    w = torch.arange(40.0).expand(2, 6, 40).unsqueeze(-1).repeat(1, 1, 1, 2)
    bins = torch.ones(2, 6, 40, dtype=torch.bool)
    bins[:, :3, 25:] = False  # short trials
    bins[:, 0] = False  # an empty one
    bins[:, 4, 5] = False  # a missing bin
    stage = warm_start.DynamicsFirst(model, pm.guides.DKF(model, hidden_dim=4), w, bins)
    rng = torch.Generator().manual_seed(0)
    for length in (1, 10, 24):
        targets, weight = stage.draw_windows(length, rng)
        assert targets.shape == (2, stage.windows, length + 1, 2) and weight.shape == targets.shape[:-1]
        assert torch.equal(targets[..., 1:, 0] - targets[..., :-1, 0], torch.ones_like(targets[..., 1:, 0]))
        # But for the missing bin all are there: one of a window's bins at most.
        assert (weight.sum(-1) >= length).all()


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
        warm_start._fit_read_outs(model, z, batch, torch.Generator().manual_seed(0), **more)
        with torch.no_grad():
            y = model.likelihood(model.read_out(z, batch.recording, batch.width), batch.recording)
            losses.append(float(-(y.log_prob(batch.observations) * batch.mask).sum() / batch.mask.sum()))
    assert losses[0] - losses[1] < 1e-3


def test_the_start_alone_forecasts_and_beats_a_random_start():
    recs = pm.simulate.limit_cycles([3.0, 5.0], num_trials=24, num_steps=60, num_neurons=20, seed=1)
    train, test = recs.split(seed=0)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=32)
    guide = pm.guides.DKF(model, hidden_dim=8)
    options = {"num_steps": 1, "learning_rate": 1e-6, "progress": False}
    started = pm.fit(model, guide, train, warm_start_steps=250, **options)
    random = pm.fit(model, guide, train, warm_start=False, **options)
    assert started.history["elbo"][0] > random.history["elbo"][0]
    scores = pm.metrics.forecast_r2(started, test, context=30, horizon=10, num_samples=10)
    assert float(scores.min()) > 0.8
