"""The start from the data: frames in their natural scale, read-ins and read-outs written from them, a better ELBO."""

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

import pyro_metassm as pm
from pyro_metassm import warm_start
from pyro_metassm.frames import RIDGE, canonical_frames
from pyro_metassm.read_outs import write_read_outs
from pyro_metassm.windows import TiedFrames


def moments(*shape, seed=0):
    """Second moments ``(..., d, d)`` of the read-outs of nine neurons."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(*shape[:-1], 9, shape[-1], generator=rng).double()
    return rows.mT @ rows / 9


def test_natural_frames_give_all_read_outs_one_spread_and_latents_unit_variance():
    tuning = moments(5, 3) * torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0]).double()[:, None, None]
    frame, scaled = warm_start.natural_frames(tuning)
    torch.testing.assert_close(frame, frame.mT)
    spread = frame @ tuning @ frame.mT  # of c = F b
    square = spread[0, 0, 0]
    torch.testing.assert_close(spread, square * torch.eye(3).double().expand(5, 3, 3))
    torch.testing.assert_close(scaled, tuning / square)
    latents = torch.linalg.inv(frame)  # z = w F^-1 of white w: their second moment is F^-T F^-1
    torch.testing.assert_close(latents.square().sum((-1, -2)).mean() / 3, torch.tensor(1.0).double())


def test_natural_frames_of_fewer_neurons_than_latents_are_finite():
    """One neuron and two latents: what it does not read gets a little of what it reads."""
    row = torch.tensor([[0.6, 0.8]]).double()
    tuning = torch.stack([row.mT @ row, moments(2)])
    frame, scaled = warm_start.natural_frames(tuning)
    assert frame.isfinite().all() and scaled.isfinite().all()
    unseen = torch.tensor([0.8, -0.6]).double()
    ratio = (unseen @ scaled[0] @ unseen) / (row @ scaled[0] @ row.mT)
    torch.testing.assert_close(ratio.squeeze(), torch.tensor(RIDGE).double())
    silent, _ = warm_start.natural_frames(torch.zeros(1, 2, 2))
    torch.testing.assert_close(silent, torch.eye(2).expand(1, 2, 2))


# ---- a model, a guide, and data with trials of unequal lengths, missing bins and held-out neurons ----------


def data(noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    time = np.arange(50)
    result = []
    for name, number, held_out in (("a", 7, [1, 2]), ("b", 4, None)):
        phase, speed = rng.uniform(0, 6.28, (8, 1)), 0.2 + 0.1 * rng.random((8, 1))
        z = np.stack([np.cos(speed * time + phase), np.sin(0.9 * speed * time + phase)], -1)
        y = z @ rng.normal(size=(2, number)) + rng.normal(size=number)
        y = y + noise * rng.normal(size=y.shape)
        y[2, 30:] = np.nan
        y[4, 10:13] = np.nan
        result.append(pm.Recording(name, y, bin_width=0.02, held_out_neurons=held_out))
    return pm.Recordings(result)


def parts(recs):
    torch.manual_seed(0)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=4).double()
    guide = pm.guides.DKF(model, hidden_dim=4).double()
    guide.read_in.start(recs)
    batch = recs.batch(model.names, dtype=torch.double)
    return model, guide, batch, (batch.mask & batch.held_in[:, None, None, :]).any(-1)


def test_tuning_divergence_is_that_of_normals():
    recs = data()
    model, guide, batch, bins = parts(recs)
    tuning = moments(2, 2)
    stage = warm_start.DynamicsFirst(
        model, guide, torch.randn(*bins.shape, 2).double(), bins, batch.recording, tuning
    )
    assert abs(stage.tuning_divergence()) < 1e-12  # where it starts
    with torch.no_grad():
        stage.frame.add_(0.3 * torch.randn(2, 2, 2))
    _, scaled = warm_start.natural_frames(tuning)
    spread = stage.frame @ scaled @ stage.frame.mT
    zero = torch.zeros(2).double()
    expected = kl_divergence(
        MultivariateNormal(zero, spread), MultivariateNormal(zero, torch.eye(2).double())
    )
    torch.testing.assert_close(stage.tuning_divergence(), expected.mean())


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_the_read_in_reproduces_the_states_of_the_stage(noise):
    """Whatever the frames, with and without smoothing, to rounding."""
    _, guide, batch, bins = parts(data(noise))
    frames = canonical_frames(guide.read_in.features(batch), bins, 2)
    assert all((width > 0) == (noise > 0) for width in frames.smoothing)
    tied = TiedFrames(torch.randn(2, 2, 2).double(), torch.randn(2, 2).double())
    guide.smoothing.copy_(torch.tensor(frames.smoothing))
    warm_start.write_read_in(guide, frames, tied.frame, tied.offset, batch)
    with torch.no_grad():
        ybar, z, _ = guide.common_space(batch)
        torch.testing.assert_close(z[bins], tied.states(frames.coordinates)[bins], rtol=1e-10, atol=1e-10)
    assert (ybar[..., 2:] == 0).all()


def test_read_outs_of_latents_predict_as_those_of_canonical_coordinates_do():
    model, _, batch, bins = parts(data())
    tied = TiedFrames(torch.randn(2, 2, 2).double(), torch.randn(2, 2).double())
    w = torch.randn(*bins.shape, 2).double()
    with torch.no_grad():
        expected = model.read_out(w, batch.recording, batch.width)
        write_read_outs(model, tied.frame, tied.offset, batch)
        found = model.read_out(tied.states(w), batch.recording, batch.width)
    for r, width in enumerate(batch.num_neurons):
        torch.testing.assert_close(found[r, ..., :width], expected[r, ..., :width])


@pytest.mark.parametrize("sd", [0.0, 0.05])
def test_the_process_noise_is_told_from_the_noise_of_the_frame(sd):
    """A linear system seen with noise ``n`` of its own.

    A residual is ``r_t = q_t + n_{t+1} - A n_t``; its variance plus twice its covariance with the next is
    ``Q + s^2 (1 + |A_i|^2 - 2 A_ii)`` for the axis ``i``. For a moving average of order one with the autocovariances
    ``v, c`` that estimate has the variance ``(6 v^2 + 16 c^2 + 16 v c) / n`` (Bartlett).
    """
    torch.manual_seed(0)
    a, trials, bins = torch.tensor([[0.95, -0.2], [0.25, 0.9]]).double(), 60, 200
    q = torch.tensor([0.04, 0.08]).double()
    z = [torch.randn(2, trials, 2).double()]
    for _ in range(bins - 1):
        z.append(z[-1] @ a.mT + q * torch.randn(2, trials, 2).double())
    path = torch.stack(z, 2)
    seen = path + sd * torch.randn_like(path)
    recs = pm.Recordings(
        [
            pm.Recording(n, np.random.default_rng(0).normal(size=(trials, bins, 1)), bin_width=0.02)
            for n in "ab"
        ]
    )
    model = pm.models.LinearGaussian(recs, latent_dim=2).double()
    guide = pm.guides.DKF(model, hidden_dim=4).double()
    with torch.no_grad():
        model.dynamics.weight.copy_(a)
    mask = torch.ones(2, trials, bins, dtype=torch.bool)
    mask[0, 3, 50:] = False  # rubbish there counts nothing
    rubbish = torch.where(mask.unsqueeze(-1), seen, 100.0)
    with torch.no_grad():
        warm_start._write_noise(model, guide, rubbish, mask, recs.batch(model.names, dtype=torch.double))
    own = a.diagonal()
    expected = q**2 + sd**2 * (1 + a.square().sum(-1) - 2 * own)
    v, c = q**2 + sd**2 * (1 + a.square().sum(-1)), -(sd**2) * own
    error = ((6 * v**2 + 16 * c**2 + 16 * v * c) / (2 * trials * bins)).sqrt()
    assert ((model.process_noise().detach() ** 2 - expected).abs() < 5 * error).all()
    if sd:  # taken at face value the residuals would say something else
        assert (v - expected > 10 * error).all()
    # Less the covariance of neighbours, ``A_ii s^2``, is what the guide's posterior starts from.
    variance = (2 * guide.rnn.bias_out[2:].detach()).exp()
    noise = torch.maximum(sd**2 * own, 0.05 * v)
    assert ((variance - noise).abs() < 5 * ((v**2 + 2 * c**2) / (2 * trials * bins)).sqrt()).all()
    first = rubbish[:, :, 0].flatten(0, 1)
    torch.testing.assert_close(model.initial.loc.detach(), first.mean(0))
    torch.testing.assert_close(model.initial.scale.detach(), first.std(0))


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_the_posterior_starts_as_the_frame(noise):
    """With its noise where that is known, as it is without smoothing."""
    recs = data(noise)
    model, guide, *_ = parts(recs)
    before = guide.rnn.bias_out.detach().clone()
    options = {"num_steps": 1, "learning_rate": 1e-12, "warm_start_steps": 20, "progress": False}
    fit = pm.fit(model, guide, recs, **options)
    batch = recs.batch(fit.model.names, dtype=torch.double)
    with torch.no_grad():
        ybar, frame, share = fit.guide.common_space(batch)
        e = fit.statistics[:, None, :1].double()
        q = fit.guide.latents_posterior(ybar, frame, share, e, fit.model.path_prior(e, batch), batch)
    if noise:
        torch.testing.assert_close(fit.guide.rnn.bias_out.detach(), before)
        assert (q.scale - 0.1).abs().max() < 0.05 and not torch.equal(q.loc, frame)
    else:
        torch.testing.assert_close(q.loc, frame, rtol=0, atol=1e-9)
        assert q.scale.std(0).max() < 1e-9 and q.scale.max() < 0.1


@pytest.mark.parametrize(("shape", "names"), [((1, 1), "ab"), ((1, 2), "a"), ((3, 1), "a")])
def test_the_smallest_recordings_start(shape, names):
    """One trial, one or two bins: nothing to learn, and nothing that is not a number."""
    rng = np.random.default_rng(0)
    recs = pm.Recordings([pm.Recording(n, rng.normal(size=(*shape, 3)), bin_width=0.02) for n in names])
    model, guide, *_ = parts(recs)
    fit = pm.fit(model, guide, recs, num_steps=2, warm_start_steps=2, progress=False)
    for module in (fit.model, fit.guide):
        assert all(value.isfinite().all() for value in module.state_dict().values())


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
