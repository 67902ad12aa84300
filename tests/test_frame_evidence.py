"""Evidence for frames against a dense Gaussian density, and starts of the size of known read-outs."""

from dataclasses import replace
from types import SimpleNamespace

import known_family as family
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import multivariate_normal

import pyro_metassm as pm
from pyro_metassm import starts
from pyro_metassm.frame_evidence import TRIALS, of_frames
from pyro_metassm.frames import Frames
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.read_outs import ReadOutPrior, common_shift, second_moments
from pyro_metassm.rebuilding import for_recordings
from pyro_metassm.windows import TiedFrames

TURN = torch.tensor([[0.8, -0.5], [0.4, 0.7]]).double()


class Linear(family.VanDerPol):
    def adapt_dynamics(self, e):
        return lambda z: z @ TURN.mT


class Driven(Linear):
    """Inputs, and noise that the latents share: not what ``process_noise`` and ``initial`` hold."""

    def initial_state(self, e):
        return dist.MultivariateNormal(self.initial.loc, FIRST)

    def transition(self, z, dynamics, inputs):
        return dist.MultivariateNormal(dynamics(z) + inputs, NOISE)


NOISE = torch.tensor([[0.2, 0.1], [0.1, 0.3]]).double()
FIRST = NOISE + 0.5


def problem(num_trials=3, num_bins=(6, 6), model=Linear):
    """Two recordings of 3 and 5 neurons with random canonical read-outs, a model of them, and three random frames."""
    fit = family.fit_of(model=model, dtype=torch.double)
    several = [
        family.recordings([mu], num_trials=num_trials, num_bins=bins, num_neurons=number, seed=number)
        for mu, number, bins in zip((1.0, 1.7), (3, 5), num_bins, strict=True)
    ]
    num_bins = max(num_bins)
    inputs = np.random.default_rng(1).normal(size=(num_trials, num_bins, 2)) if model is Driven else None
    recs = pm.Recordings([r._replace(inputs=inputs) for recs in several for r in recs.values()])
    model, guide = for_recordings(fit.model, fit.guide, NeuronTable.of(recs))
    batch = recs.batch(model.names, dtype=torch.double)
    mask = batch.mask.clone()
    mask[0, 1, num_bins // 3, 0] = False
    batch = replace(batch, mask=mask)
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    with torch.no_grad():
        model.read_out.weight.copy_(normal(8, 2)), model.read_out.bias.copy_(normal(8))
        model.process_noise.log_scale.copy_(torch.tensor([0.3, 0.5]).log())
        model.initial.loc.copy_(torch.tensor([0.4, -0.3]))
        model.observation.log_sd.copy_(torch.linspace(0.2, 0.6, 8).log())
    frames = Frames(
        torch.zeros(2, 5, 2).double(),
        torch.zeros(2, 2).double(),
        normal(2, num_trials, num_bins, 2),
        (0.0,) * 2,
    )
    tied = TiedFrames(normal(3, 2, 2, 2), normal(3, 2, 2))
    return model, guide, frames, tied, batch


def log_density(model, frame, offset, batch, r, trial):
    """Of what was seen in a trial, from the moments of the whole path: ``w = z F + o`` and ``y = w b + m``."""
    time, driven = batch.num_bins, isinstance(model, Driven)
    diagonals = model.process_noise().detach().square(), model.initial.scale.detach().square()
    q, s = (x.numpy() for x in ((NOISE, FIRST) if driven else (x.diag() for x in diagonals)))
    powers = [np.linalg.matrix_power(TURN.numpy(), k) for k in range(time)]
    mean = np.stack([p @ model.initial.loc.detach().numpy() for p in powers])
    for t in range(1, time if driven else 0):
        mean[t] += sum(powers[t - k] @ batch.inputs[r, trial, k].numpy() for k in range(1, t + 1))
    covariance = np.zeros((time, 2, time, 2))
    for t in range(time):
        for u in range(time):
            covariance[t, :, u] = powers[t] @ s @ powers[u].T
            for k in range(1, min(t, u) + 1):
                covariance[t, :, u] += powers[t - k] @ q @ powers[u - k].T
    rows = model.neurons.slice(batch.names[r])
    b, m = model.read_out.weight[rows].detach().numpy(), model.read_out.bias[rows].detach().numpy()
    w = mean @ frame.numpy() + offset.numpy()
    read = frame.numpy() @ b.T
    sd = model.observation.log_sd[rows].exp().detach().numpy()
    y_covariance = np.einsum("tiuj,in,jm->tnum", covariance, read, read)
    size = time * len(b)
    y_covariance = y_covariance.reshape(size, size) + np.diag(np.tile(sd**2, time))
    seen = batch.mask[r, trial, :, : len(b)].reshape(-1).numpy()
    y = batch.observations[r, trial, :, : len(b)].reshape(-1).numpy()
    density = multivariate_normal((w @ b.T + m).reshape(-1)[seen], y_covariance[np.ix_(seen, seen)])
    return density.logpdf(y[seen])


@pytest.mark.parametrize("kind", [Linear, Driven])
def test_linear_gaussian_evidence_is_the_density_of_the_data(kind):
    """Of any model whose steps are Normal: inputs and covariances of a subclass's own, too."""
    model, guide, frames, tied, batch = problem(model=kind)
    found = of_frames(model, guide, frames, tied, batch.time_mask, batch)
    expected = [
        [
            sum(
                log_density(model, tied.frame[s, r].detach(), tied.offset[s, r].detach(), batch, r, trial)
                for trial in range(batch.num_trials)
            )
            for r in range(2)
        ]
        for s in range(3)
    ]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-8)


def test_a_few_trials_judge():
    model, guide, frames, tied, batch = problem(num_trials=TRIALS + 2)
    found = of_frames(model, guide, frames, tied, batch.time_mask, batch)
    expected = sum(
        log_density(model, tied.frame[1, 0].detach(), tied.offset[1, 0].detach(), batch, 0, trial)
        for trial in range(TRIALS)
    )
    assert float(found[1, 0]) == pytest.approx(expected, rel=1e-8)


def test_frames_that_lead_nowhere_have_no_evidence_and_do_no_harm():
    model, guide, frames, tied, batch = problem()
    expected = of_frames(model, guide, frames, tied, batch.time_mask, batch)
    broken = TiedFrames(tied.frame.detach().clone(), tied.offset.detach().clone())
    with torch.no_grad():
        broken.frame[0, 1], broken.offset[2, 0] = 0.0, torch.nan
    found = of_frames(model, guide, frames, broken, batch.time_mask, batch)
    assert found[0, 1] == -torch.inf and found[2, 0] == -torch.inf
    for s, r in ((0, 0), (1, 0), (1, 1), (2, 1)):
        assert float(found[s, r]) == pytest.approx(float(expected[s, r]))


def test_a_joint_likelihood_has_none():
    model, guide, frames, tied, batch = problem()
    joint = SimpleNamespace(likelihood=lambda x, recording: model.likelihood(x, recording).to_event(1))
    assert of_frames(joint, guide, frames, tied, batch.time_mask, batch) is None


def test_a_frame_without_any_path_does_no_harm_to_other_recordings():
    """All but singular, and so large that in double precision no precision of its paths is positive definite."""
    model, guide, frames, tied, batch = problem()
    expected = of_frames(model, guide, frames, tied, batch.time_mask, batch)
    with torch.no_grad():
        tied.frame[1, 0] = torch.tensor([[0.6, -0.35], [0.6, -0.35]]) * 1e12 + 1e-3 * torch.eye(2)
    found = of_frames(model, guide, frames, tied, batch.time_mask, batch)
    assert found[1, 0] == -torch.inf
    expected[1, 0] = -torch.inf
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


def test_a_recording_beside_longer_ones_is_judged_as_if_alone():
    """Bins after its end are no part of it: of curved dynamics they would be a path to find."""
    model, guide, frames, tied, batch = problem(num_bins=(6, 40), model=family.VanDerPol)
    found = of_frames(model, guide, frames, tied, batch.time_mask, batch)
    short = batch.part(bins=slice(6))
    cut = replace(frames, coordinates=frames.coordinates[:, :, :6])
    expected = of_frames(model, guide, cut, tied, short.time_mask, short)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-10, atol=0.0)
    assert not torch.isclose(found[:, 1], expected[:, 1]).any()


class HeavyTails(Linear):
    def transition(self, z, dynamics):
        return dist.StudentT(4.0, dynamics(z), self.process_noise()).to_event(1)


class NoisyFarAway(Linear):
    def transition(self, z, dynamics):
        return dist.Normal(dynamics(z), self.process_noise() * (1 + z.square())).to_event(1)


class NoVariance(Linear):
    def initial_state(self, e):
        return dist.Cauchy(self.initial.loc, self.initial.scale).to_event(1)


class EveryTrialItsOwn(Linear):
    def trial_embedding(self, e, batch):
        return e + torch.arange(batch.num_trials).unsqueeze(-1).to(e)

    def initial_state(self, e):
        return dist.Normal(self.initial.loc + e, self.initial.scale).to_event(1)


@pytest.mark.parametrize("kind", [HeavyTails, NoisyFarAway, NoVariance, EveryTrialItsOwn])
def test_a_model_whose_paths_are_no_chain_of_normal_steps_has_none(kind):
    model, guide, frames, tied, batch = problem(model=kind)
    assert of_frames(model, guide, frames, tied, batch.time_mask, batch) is None


@pytest.mark.parametrize("num_bins", [1, 2])
def test_trials_of_a_bin_or_two(num_bins):
    model, guide, frames, tied, batch = problem(num_bins=(num_bins, num_bins))
    found = of_frames(model, guide, frames, tied, batch.time_mask, batch)
    expected = sum(
        log_density(model, tied.frame[1, 1].detach(), tied.offset[1, 1].detach(), batch, 1, trial)
        for trial in range(3)
    )
    assert float(found[1, 1]) == pytest.approx(expected, rel=1e-8)


def test_read_outs_of_the_second_kind_of_starts_are_as_large_as_the_known_ones(monkeypatch):
    """``F B F^T`` is the known covariance, and common shifts are drawn as the known ones lie."""
    monkeypatch.setattr(starts, "JITTER", 0.0)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(number, 3, generator=generator).double() for number in (9, 40)]
    root = torch.randn(2, 2, 2, generator=generator).double()
    covariance = torch.zeros(3, 3).double()
    covariance[:2, :2], covariance[2, 2] = root[0] @ root[0].mT, 1.0
    shift = torch.tensor([0.7, -0.4]).double(), root[1] @ root[1].mT + 0.1 * torch.eye(2).double()
    prior = ReadOutPrior(torch.zeros(3).double(), covariance, 10.0, *shift)
    number = 4000
    frame, offset = starts.starts_by_read_outs(rows, prior, number, generator)
    assert frame.shape == (number, 2, 2, 2) and offset.shape == (number, 2, 2)
    for r, own in enumerate(rows):
        c = own[:, :2] @ frame[:, r].mT
        d = own[:, 2] + (offset[:, r] @ own[:, :2].mT)
        torch.testing.assert_close(c.mT @ c / len(own), covariance[:2, :2].expand(number, 2, 2))
        found = common_shift(
            second_moments([torch.cat([a, b[:, None]], -1) for a, b in zip(c, d, strict=True)])
        )
        error = 4 / number**0.5
        assert ((found.mean(0) - shift[0]).abs() < error * shift[1].diagonal().sqrt() + 1e-3).all()
        torch.testing.assert_close(found.mT.cov(), shift[1], rtol=3 * error, atol=2 * error)
    assert 0.4 < (torch.linalg.det(frame) > 0).double().mean() < 0.6  # reflections, too
