"""Linear systems of noisy recordings: what they add to kernels and principal components, on data of known truth."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import pyro_metassm as pm
from pyro_metassm.adaptation import PARTS
from pyro_metassm.frames import canonical_frames
from pyro_metassm.linear_systems import _linear, frames_of_simulations, regressed, through_linear_systems
from pyro_metassm.read_outs import fit_read_outs
from pyro_metassm.result import embedding_statistics
from pyro_metassm.teaching import teach
from pyro_metassm.warm_start import smoothed_by, write_likeliest_noise


@pytest.fixture(scope="module")
def counts():
    """Few spikes: 40 neurons, 0.2 a bin."""
    torch.manual_seed(0)
    recs = pm.simulate.limit_cycles(
        [2.5, 5.0],
        num_trials=8,
        num_steps=80,
        num_neurons=(40, 40),
        noise="poisson",
        mean_count=(0.2, 0.2),
        gain=1.0,
    )
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=pm.likelihoods.Poisson)
    guide = pm.guides.DKF(model, hidden_dim=16)
    guide.read_in.start(recs, model.observation.kinds)
    batch = recs.batch(model.names)
    features, bins = guide.read_in.features(batch), batch.mask.any(-1)
    frames = canonical_frames(features, bins, 2)
    fit_read_outs(model, frames.coordinates, batch, torch.Generator().manual_seed(0))
    before = error(recs, model, frames.coordinates, batch)
    found = through_linear_systems(model, features, frames, bins, batch)
    return recs, model, guide, batch, features, bins, frames, before, found


@torch.no_grad()
def error(recs, model, z, batch):
    """Mean squared error of log rates, in their variance."""
    y = model.likelihood(model.read_out(z, batch.recording, batch.width), batch.recording)
    truth = np.log(np.stack([recs.truth[name]["rates"].values for name in batch.names]))
    return float(np.square(y.mean.log().numpy() - truth).mean() / truth.var((1, 2)).mean())


def test_log_rates_are_nearer_to_the_truth(counts):
    recs, model, _, batch, *_, before, found = counts
    assert error(recs, model, found.paths, batch) < 0.6 * before
    # Draws are the paths and their posterior's spread.
    assert error(recs, model, found.draws, batch) > error(recs, model, found.paths, batch)


def test_coordinates_are_canonical_and_frames_are_their_regression(counts):
    *_, features, bins, frames, _, found = counts
    flat = found.paths.flatten(1, 2)
    torch.testing.assert_close(flat.mean(1), torch.zeros(2, 2), rtol=0, atol=1e-3)
    # White up to the ridge of canonical frames.
    assert (flat.var(1) < 1.01).all() and (flat.var(1) > 0.7).all()
    assert found.frames.smoothing == frames.smoothing and min(frames.smoothing) > 0
    again = found.frames.of(features, bins).coordinates
    torch.testing.assert_close(again, found.frames.coordinates)
    # Least squares leaves what is orthogonal to the smoothed features, the constant among them.
    left = (found.paths - found.frames.coordinates).flatten(1, 2).mean(1)
    assert left.abs().max() < 0.02


@pytest.mark.parametrize("seed", [1, 3])
def test_bursts_leave_no_path_out_of_bounds(seed):
    """One trial twenty times as far out as the others, up to 22,000 counts: Newton's steps of it overshoot."""
    rng = np.random.default_rng(seed)
    turn = 0.98 * np.array([[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]])
    z = np.zeros((6, 60, 2))
    z[:, 0] = rng.normal(size=(6, 2))
    for t in range(1, 60):
        z[:, t] = z[:, t - 1] @ turn.T + 0.05 * rng.normal(size=(6, 2))
    z[0] *= 20
    log_rates = 0.5 * z @ rng.normal(size=(20, 2)).T - 1.0
    recs = pm.Recordings([pm.Recording("a", rng.poisson(np.exp(log_rates.clip(max=10))), bin_width=0.02)])
    torch.manual_seed(0)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=pm.likelihoods.Poisson)
    guide = pm.guides.DKF(model, hidden_dim=4)
    model.observation.start(recs), guide.read_in.start(recs, model.observation.kinds)
    batch = recs.batch(model.names)
    features, bins = guide.read_in.features(batch), batch.mask.any(-1)
    found = through_linear_systems(model, features, canonical_frames(features, bins, 2), bins, batch)
    assert model.read_out.weight.isfinite().all()
    for path in (found.paths, found.draws):  # canonical: of about unit variance
        assert path.isfinite().all() and path.abs().max() < 10


def test_likeliest_linear_system_is_that_of_least_squares():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(1, 3, 40, 2)).cumsum(2) * 0.1
    chain = _linear(torch.tensor(z), torch.ones(1, 3, 40, dtype=torch.bool))
    x, y = z[0, :, :-1].reshape(-1, 2), z[0, :, 1:].reshape(-1, 2)
    map_ = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
    state = rng.normal(size=(1, 1, 5, 2))
    np.testing.assert_allclose(
        chain.dynamics(torch.tensor(state))[0, 0], state[0, 0] @ map_[:2] + map_[2], atol=1e-3
    )
    error = y - np.c_[x, np.ones(len(x))] @ map_
    np.testing.assert_allclose(
        torch.linalg.inv(chain.precision[0]), error.T @ error / len(x) + 1e-4 * np.eye(2), atol=1e-5
    )


@pytest.fixture(scope="module")
def drawn(counts):
    """A model whose own data these are: process noise 0.05, 12 trials."""
    _, model, guide, batch, *_ = counts
    model, guide = copy.deepcopy((model, guide))
    e = torch.zeros(2, 1, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        model.process_noise.log_scale.fill_(math.log(0.05))
        model.read_out.weight.normal_(), model.read_out.bias.fill_(-0.5)

    def draw(num_trials):
        part = batch.part(trials=slice(1))
        with torch.no_grad():
            z = model.path_prior(e, part).sample((num_trials,))[:, :, 0].movedim(0, 1)
            y = model.likelihood(model.read_out(z, batch.recording, batch.width), batch.recording).sample()
        ones = torch.ones_like(z[..., 0], dtype=torch.bool)
        mask = ones.unsqueeze(-1).expand_as(y)
        return z, ones, dataclasses.replace(batch, observations=y, mask=mask, time_mask=ones)

    return model, guide, e, draw


def test_process_noise_of_most_evidence_is_that_of_the_data(drawn):
    model, _, e, draw = drawn
    model = copy.deepcopy(model)
    z, _, batch = draw(8)
    rough = z + 0.2 * torch.randn_like(z)  # what draws of paths leave is their own spread, of about 0.28
    write_likeliest_noise(model, e, z, rough, batch)
    found = model.process_noise().detach()
    assert (found > 0.025).all() and (found < 0.1).all(), found
    paths, again = smoothed_by(model, e, rough, batch)
    left, own = (paths - z).square().mean(), (again - paths).square().mean()
    # Of a posterior, what draws differ by from its mean is what the truth does.
    assert left < 0.4 * (rough - z).square().mean() and 0.4 < own / left < 2.5, (left, own)


def test_a_recording_whose_draws_went_astray_does_not_decide_the_noise(drawn):
    """Shares of what draws leave are tried from the largest on: from that of the mean, a hundred times too much."""
    model, _, e, draw = drawn
    model = copy.deepcopy(model)
    z, _, batch = draw(8)
    rough = z + 0.2 * torch.randn_like(z)
    rough[0] += 20 * torch.randn_like(z[0])
    write_likeliest_noise(model, e, z, rough, batch)
    found = model.process_noise().detach()
    assert (found > 0.025).all() and (found < 0.1).all(), found


def test_a_trial_whose_path_goes_astray_is_held_and_changes_no_other(drawn):
    """A burst of 20,000 counts, read as a state far out: Newton's steps from there send the path to the thousands."""
    model, _, e, draw = drawn
    z, _, batch = draw(4)
    plain, _ = smoothed_by(model, e, z, batch)
    counts, rough = batch.observations.clone(), z.clone()
    counts[0, 1, 30, 0], rough[0, 1, 30] = 2e4, 60.0
    paths, again = smoothed_by(model, e, rough, dataclasses.replace(batch, observations=counts))
    assert paths.abs().max() <= 10 and again.abs().max() <= 10
    others = [0, 2, 3]
    torch.testing.assert_close(paths[:, others], plain[:, others], rtol=1e-4, atol=1e-4)


def test_frames_of_simulations_read_other_trials_better_than_those_of_one_trial(drawn):
    model, guide, e, draw = drawn
    one, bins, batch = draw(1)
    other, others, more = draw(12)
    features = guide.read_in.features(more)
    of_one = regressed(guide.read_in.features(batch), one, bins, tuple(guide.smoothing.tolist()))
    simulated = frames_of_simulations(model, guide, e, batch)
    few, many = (
        float((frames.of(features, others).coordinates - other).square().mean())
        for frames in (of_one, simulated)
    )
    assert many < 0.7 * few, (many, few)


def test_a_taught_guide_is_near_what_it_was_taught_and_nothing_else_moves(counts):
    _, model, guide, batch, *_, found = counts
    e = torch.zeros(2, 1, 1)
    fixed = [p for part in (model, guide.read_in, guide.encode_embedding) for p in part.parameters()]
    kept = [p.clone() for p in fixed]
    trained = guide.training

    def log_prob(stop):
        part = batch.part(bins=slice(stop))
        with torch.no_grad():
            q = guide.eval().latents_posterior(*guide.common_space(part), e, model.path_prior(e, part), part)
            guide.train(trained)
            return float(q.log_prob(found.paths[:, :, :stop]).mean()) / stop

    before = [log_prob(stop) for stop in (20, 80)]
    teach(model, guide, found.draws, e, batch, torch.Generator().manual_seed(0), num_steps=40)
    after = [log_prob(stop) for stop in (20, 80)]
    assert all(new > old + 0.5 for new, old in zip(after, before, strict=True)), (before, after)
    assert all(torch.equal(a, b) for a, b in zip(fixed, kept, strict=True))
    assert guide.training == trained and all(p.grad is None for p in guide.read_in.parameters())


def test_a_fit_that_smooths_counts_is_asked_for_and_remembered():
    recs = pm.simulate.limit_cycles(
        [2.5, 5.0, 4.0],
        num_trials=4,
        num_steps=25,
        num_neurons=(15, 15),
        noise="poisson",
        mean_count=(0.4, 0.4),
        gain=1.0,
    )
    old, new = recs.drop(["w=4"]), recs.select(["w=4"])
    torch.manual_seed(0)
    model = pm.models.MetaSSM(old, latent_dim=2, embedding_dim=1, likelihood=pm.likelihoods.NegativeBinomial)
    guide, few = (
        pm.guides.DKF(model, hidden_dim=8),
        {"num_steps": 0, "warm_start_steps": 2, "progress": False},
    )
    plain, fit = pm.fit(model, guide, old, **few), pm.fit(model, guide, old, smooth_counts=True, **few)
    assert "smooth_counts" not in plain.attrs and fit.attrs["smooth_counts"]
    assert not torch.equal(plain.model.read_out.weight, fit.model.read_out.weight)
    search = {"num_starts": 4, "search_steps": 3, "progress": False}
    adapted = pm.adapt(fit, new, num_steps=0, **search)
    assert all(p.isfinite().all() for part in (adapted.model, adapted.guide) for p in part.parameters())
    # Its embedding is that of the paths found, which SVI of the read-in leaves; it may be freed.
    steps = {train: pm.adapt(fit, new, num_steps=2, train=train, **search) for train in (PARTS[:2], PARTS)}
    assert torch.equal(steps[PARTS[:2]].statistics, adapted.statistics)
    assert not torch.equal(steps[PARTS].statistics, adapted.statistics)
    assert not torch.equal(embedding_statistics(adapted.model, adapted.guide, new)[2], adapted.statistics[2])
    assert embedding_statistics(plain.model, plain.guide, old).equal(plain.statistics)
    # Data that are no counts start as ever.
    values = [pm.Recording(r.name, r.observations + 0.5, bin_width=r.bin_width) for r in old.values()]
    model = pm.models.MetaSSM(pm.Recordings(values), latent_dim=2, embedding_dim=1)
    guide = pm.guides.DKF(model, hidden_dim=8)
    fits = [pm.fit(model, guide, pm.Recordings(values), smooth_counts=s, **few) for s in (False, True)]
    assert torch.equal(fits[0].model.read_out.weight, fits[1].model.read_out.weight)
