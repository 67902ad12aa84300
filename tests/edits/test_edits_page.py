"""The edits of docs/edits.md: their densities by hand."""

import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from edits_page import DOUBLE, SIZES, batch_of, edits, made, nodes, numbers
from scipy import stats

import pyro_metassm as pm


def test_horseshoe(recs):
    model, guide = made("Horseshoe", recs)
    sites = nodes(model, guide, batch_of(model, recs))
    tau, log_tau = numbers(sites["tau"])
    local, log_local = numbers(sites["local"])
    e, log_e = numbers(sites["embedding"])
    assert np.allclose(log_tau, stats.halfcauchy.logpdf(tau, scale=0.5).sum())
    assert np.allclose(log_local, stats.halfcauchy.logpdf(local).sum())
    assert np.allclose(log_e, stats.norm.logpdf(e, scale=tau * local).sum(-1)) and log_e.shape == (3, 1)


def test_recordings_of_one_subject_share_a_centre(recs):
    model, guide = made("BySubject", recs)
    choice = {"names": ["c", "b"]}  # another order than the model's rows, and not all
    sites = nodes(model, guide, batch_of(model, recs, **choice))
    center, log_center = numbers(sites["center"])
    spread, log_spread = numbers(sites["spread"])
    e, log_e = numbers(sites["embedding"])
    assert np.allclose(log_center, stats.norm.logpdf(center).sum())
    assert np.allclose(log_spread, stats.halfnorm.logpdf(spread, scale=0.5).sum())
    bob, ada = 1, 0  # c and b; subjects in alphabetical order
    expected = [stats.norm.logpdf(e[row, 0], center[s], spread).sum() for row, s in enumerate((bob, ada))]
    assert np.allclose(log_e[:, 0], expected)


def test_trials_of_a_condition_share_an_embedding(recs):
    model, guide = made("ByCondition", recs)
    plain = pm.models.MetaSSM(recs, **SIZES).double()
    plain.load_state_dict(model.state_dict())
    batch = batch_of(model, recs, names=["b", "a"], trials={"a": [2, 0]})
    sites = nodes(model, guide, batch)
    e, z, offset = (sites[name]["value"] for name in ("embedding", "latents", "offset"))
    density = sites["latents"]["fn"].log_prob(z)
    for row, name in enumerate(("b", "a")):
        for k, trial in enumerate((0, 1) if name == "b" else (2, 0)):
            code = ("go", "stop").index(recs[name].condition[trial])
            own = (e + offset[model.names.index(name), code]).clone()
            expected = plain.path_prior(own, batch).log_prob(z)[row, k]
            assert torch.allclose(density[row, k], expected, rtol=1e-10)
    log_offset = numbers(sites["offset"])[1]
    assert np.allclose(log_offset, stats.norm.logpdf(offset.numpy(), scale=0.3).sum())


def scales(name: str, model, sites) -> torch.Tensor:
    """Standard deviations, or Student's scales, of every step ``(R, K, T - 1, d)``, as the equations have them."""
    noise = model.process_noise.log_scale.exp()
    z, e = sites["latents"]["value"][..., :-1, :], sites["embedding"]["value"]
    if name == "NoiseOfRecording":
        rows = [noise * model.log_factor[row].exp() for row in range(len(z))]
        return torch.stack(rows)[:, None, None].expand(z.shape)
    if name == "NoiseOfEmbedding":
        return (noise * torch.tanh(e @ model.log_factor.weight.mT).exp()).unsqueeze(-2).expand(z.shape)
    if name == "NoiseOfState":
        return noise * torch.tanh(z @ model.log_factor.weight.mT).exp()
    return noise.expand(z.shape)


@pytest.mark.parametrize("name", ["NoiseOfRecording", "NoiseOfEmbedding", "NoiseOfState", "HeavyTails"])
@torch.no_grad()
def test_noise_of_the_transition(recs, name):
    model, guide = made(name, recs)
    batch = batch_of(model, recs)
    sites = nodes(model, guide, batch)
    z, e = sites["latents"]["value"], sites["embedding"]["value"]
    mean, scale = (x.numpy() for x in (model.dynamics(e)(z[..., :-1, :]), scales(name, model, sites)))
    after = z[..., 1:, :].numpy()
    if name == "HeavyTails":
        steps = stats.t.logpdf(after, 2.0 + sites["tails"]["value"].numpy(), mean, scale)
    else:
        steps = stats.norm.logpdf(after, mean, scale)
    first = stats.norm.logpdf(z[..., 0, :].numpy(), model.initial.loc.numpy(), model.initial.scale.numpy())
    exists = batch.time_mask.numpy()
    expected = first.sum(-1) * exists[..., 0] + (steps.sum(-1) * exists[..., 1:]).sum(-1)
    assert np.allclose(numbers(sites["latents"])[1], expected, rtol=1e-10)


@torch.no_grad()
def test_the_first_state_of_an_embedding(recs):
    model, _ = made("EmbeddedStart", recs)
    e = torch.randn(3, 1, 2, dtype=DOUBLE)
    p = model.initial_state(e)
    assert torch.allclose(p.mean, model.initial.loc + e @ model.shift.weight.mT, rtol=1e-12)


@torch.no_grad()
def test_inputs_drive_the_bin_that_they_are_in(driven):
    model, guide = made("Driven", driven)
    batch = batch_of(model, driven)
    sites = nodes(model, guide, batch)
    z, e = sites["latents"]["value"], sites["embedding"]["value"]
    f, noise = model.dynamics(e), model.process_noise.log_scale.exp()
    density = sites["latents"]["fn"].log_prob(z)
    first = dist.Normal(model.initial.loc, model.initial.scale)
    for r, name in enumerate(model.names):
        for k, length in enumerate(driven[name].lengths):
            u = torch.tensor(driven[name].inputs[k])
            total = first.log_prob(z[r, k, 0]).sum()
            for t in range(1, length):
                mean = f(z[:, :, t - 1 : t])[r, k, 0] + model.drive.weight @ u[t]
                total = total + dist.Normal(mean, noise).log_prob(z[r, k, t]).sum()
            assert torch.allclose(density[r, k], total, rtol=1e-9)


@torch.no_grad()
def test_bayesian_read_outs(recs):
    model, guide = made("BayesianReadOut", recs)
    batch = batch_of(model, recs)
    sites = nodes(model, guide, batch)
    weight, log_weight = numbers(sites["read_out.weight"])
    assert np.allclose(log_weight, stats.norm.logpdf(weight).sum())
    for r, name in enumerate(model.names):
        rows = model.neurons.slice(name)
        expected = sites["latents"]["value"][r].numpy() @ weight[rows].T + model.read_out.bias[rows].numpy()
        predictor = sites["_RETURN"]["value"][r, ..., : recs[name].num_neurons].numpy()
        assert np.allclose(predictor, expected, rtol=1e-9)


@torch.no_grad()
def test_linear_and_gated_dynamics(recs):
    e, z = torch.randn(3, 1, 2, dtype=DOUBLE), torch.randn(3, 4, 5, 2, dtype=DOUBLE)
    linear = made("Linear", recs)[0].dynamics
    ((u, v),) = linear.hypernetwork(e)
    matrix = torch.eye(2) + linear.layer.weight + v[:, 0] @ u[:, 0].mT
    expected = torch.einsum("rij,rktj->rkti", matrix, z) + linear.layer.bias
    assert torch.allclose(linear(e)(z), expected, rtol=1e-10)
    powers = [expected[:, :, :1]]
    for _ in range(2):
        powers.append(torch.einsum("rij,rktj->rkti", matrix, powers[-1]) + linear.layer.bias)
    assert torch.allclose(linear(e).rollout(z[:, :, :1], 3), torch.cat(powers, -2), rtol=1e-10)
    assert torch.allclose(linear(e).update_norm(), ((v @ u.mT) ** 2).sum((-1, -2)).mean())

    gated = made("Gated", recs)[0].dynamics
    weights = [u @ v.mT for u, v in gated.hypernetwork(e)]
    s = torch.nn.functional.silu

    def layer(x, linear, update=0.0):
        return torch.matmul(x, linear.weight.mT + update) + linear.bias

    hidden = s(layer(s(layer(z, gated.candidate[0], weights[0])), gated.candidate[1], weights[1]))
    h = z + layer(hidden, gated.candidate[2])
    g = torch.sigmoid(layer(s(layer(z, gated.gate[0], weights[2])), gated.gate[1]))
    assert torch.allclose(gated(e)(z), (1 - g) * z + g * h, rtol=1e-10)
    norms = sum((w**2).sum((-1, -2)).mean() for w in weights)
    assert torch.allclose(gated(e).update_norm(), norms)


@pytest.mark.slow
def test_inputs_that_drive_the_latents_improve_forecasts():
    """Damped rotations kicked by pulses: who knows the pulses of the forecast bins forecasts better."""
    rng, found = np.random.default_rng(0), []
    for turn in (0.25, 0.4, 0.55):
        step = 0.97 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        u = (rng.random((24, 40, 1)) < 0.15) * rng.choice([-1.0, 1.0], (24, 40, 1))
        z = rng.normal(size=(24, 40, 2))
        for t in range(1, 40):
            z[:, t] = z[:, t - 1] @ step.T + u[:, t] * [1.0, 0.0] + 0.03 * rng.normal(size=(24, 2))
        y = z @ rng.normal(size=(2, 15)) + 0.1 * rng.normal(size=(24, 40, 15))
        found.append(pm.Recording(f"{turn}", y, bin_width=0.02, inputs=u))
    train, test = pm.Recordings(found).split()
    scores = {}
    for kind, more in ((edits.Linear, {}), (edits.Driven, {"input_dim": 1})):
        torch.manual_seed(0)
        with warnings.catch_warnings():  # the linear one does not read the inputs, and says so
            warnings.simplefilter("ignore", UserWarning)
            model = kind(train, latent_dim=2, embedding_dim=1, hidden_dim=32, **more)
        guide = pm.guides.DKF(model, hidden_dim=32)
        fit = pm.fit(model, guide, train, num_steps=300, warm_start_steps=300, progress=False)
        scores[kind] = pm.metrics.forecast_r2(fit, test, context=20, horizon=10, num_samples=20)[:, -1].mean()
    assert scores[edits.Driven] > scores[edits.Linear] + 0.1
