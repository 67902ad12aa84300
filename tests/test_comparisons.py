"""The comparison methods: the dynamics of each against its equation written out, and what each may depend on."""

import numpy as np
import pytest
import torch
from fits import QUICK, assert_same
from members import COMPARISONS, DOUBLE, EMBEDDING, LATENT, SIZES, close, evaluate, make, values_for
from problems import recordings
from pyro import poutine
from torch import Tensor
from torch.nn import functional

import pyro_metassm as pm
from pyro_metassm._aligning import displacement
from pyro_metassm.adaptations import (
    GEPSMLP,
    EmbeddingInputMLP,
    FullRankMLP,
    LinearAdapterMLP,
    SessionMLP,
    SharedMLP,
)
from pyro_metassm.dynamics import LowRankMLP
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.models import GEPS, MetaSSM, SharedDynamics, SingleSession

HIDDEN = 7
ADAPTING = [LowRankMLP, EmbeddingInputMLP, LinearAdapterMLP, GEPSMLP, FullRankMLP]


def randomised(module):
    """Every parameter moved from where it starts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def dynamics(kind, rank: int = 2):
    torch.manual_seed(0)
    return randomised(kind(LATENT, EMBEDDING, rank=rank, hidden_dim=HIDDEN))


def step(z: Tensor, layers) -> Tensor:
    """One step of one recording from its weights ``(out, in)`` and biases."""
    x = z
    for number, (weight, bias) in enumerate(layers):
        x = torch.einsum("oi,...i->...o", weight, x) + bias
        x = functional.silu(x) if number < 2 else x
    return z + x


# ---- each against its equation ----------------------------------------------------------------------------------


def shared(f, e: Tensor, z: Tensor) -> Tensor:
    return step(z, [(layer.weight, layer.bias) for layer in f.layers])


def embedding_input(f, e: Tensor, z: Tensor) -> Tensor:
    """An ordinary MLP on the concatenation."""
    first = torch.cat([f.layers[0].weight, f.weight.mT], 1)
    both = torch.cat([z, e.expand(*z.shape[:-1], -1)], -1)
    hidden = functional.silu(functional.linear(both, first, f.layers[0].bias))
    return z + f.layers[2](functional.silu(f.layers[1](hidden)))


def linear_adapter(f, e: Tensor, z: Tensor) -> Tensor:
    layers = []
    for layer, weights, biases in zip(f.layers, f.weights, f.biases, strict=True):
        weight, bias = layer.weight, layer.bias
        for number, of_one, of_one_bias in zip(e, weights, biases, strict=True):
            weight, bias = weight + number * of_one, bias + number * of_one_bias
        layers.append((weight, bias))
    return step(z, layers)


def geps(f, e: Tensor, z: Tensor) -> Tensor:
    """``A diag(c) B^T`` built; the first two columns of the factors belong to the first entry of the embedding."""
    context = torch.diag(torch.stack([e[0], e[0], e[1], e[1]]))
    parts = zip(f.layers, f.a, f.b, f.biases, strict=True)
    return step(
        z,
        [
            (layer.weight + torch.linalg.multi_dot([a, context, b.mT]).mT, layer.bias + d.mT @ e)
            for layer, a, b, d in parts
        ],
    )


def full_rank(f, e: Tensor, z: Tensor) -> Tensor:
    change = f.trunk(e) - f.trunk(torch.zeros_like(e))
    layers = [(layer.weight, layer.bias) for layer in f.layers]
    for number, head in enumerate(f.heads):
        update = sum(change[k] * head[k] for k in range(len(change)))
        layers[number] = (layers[number][0] + update, layers[number][1])
    return step(z, layers)


EQUATIONS = {
    SharedMLP: shared,
    EmbeddingInputMLP: embedding_input,
    LinearAdapterMLP: linear_adapter,
    GEPSMLP: geps,
    FullRankMLP: full_rank,
}


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("kind", EQUATIONS)
def test_dynamics_are_their_equation(kind, native, monkeypatch):
    """In value and gradient, one recording and draw at a time, with and without C."""
    monkeypatch.setenv("METASSM_NATIVE", native)
    f = dynamics(kind)
    e = torch.randn(4, 3, 1, EMBEDDING, dtype=DOUBLE, requires_grad=True)
    z = torch.randn(4, 3, 5, 6, LATENT, dtype=DOUBLE)
    expected = torch.stack([
        torch.stack([EQUATIONS[kind](f, e[s, r, 0], z[s, r]) for r in range(3)]) for s in range(4)
    ])  # fmt: skip
    leaves = [*f.parameters(), *([] if kind is SharedMLP else [e])]
    found = f(e)(z)
    close(found, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(y.cos().sum(), leaves) for y in (found, expected)), strict=True
    ):
        close(ours, theirs)
    start = z[..., :1, :]
    path = f(e).rollout(start, 3)
    for t in range(3):
        start = f(e)(start)
        close(path[..., t : t + 1, :], start)


@pytest.mark.parametrize("native", ["1", "0"])
def test_dynamics_of_sessions_are_as_many_mlps(native, monkeypatch):
    monkeypatch.setenv("METASSM_NATIVE", native)
    torch.manual_seed(0)
    f = randomised(SessionMLP(3, LATENT, hidden_dim=HIDDEN))
    z = torch.randn(2, 5, 6, LATENT, dtype=DOUBLE)
    found = f(torch.tensor([2, 0]))(z)
    for r, row in enumerate((2, 0)):
        close(found[r], step(z[r], [(w[row], b[row]) for w, b in zip(f.weights, f.biases, strict=True)]))
    # Each starts as an MLP of its own would.
    torch.manual_seed(0)
    f, alone = SessionMLP(2, LATENT, hidden_dim=HIDDEN), SharedMLP(LATENT, EMBEDDING, hidden_dim=HIDDEN)
    torch.manual_seed(0)
    alone = SharedMLP(LATENT, EMBEDDING, hidden_dim=HIDDEN)
    for weight, layer in zip(f.weights, alone.layers, strict=True):
        assert torch.equal(weight[0], layer.weight) and not torch.equal(weight[1], layer.weight)


@pytest.mark.parametrize("kind", ADAPTING)
def test_the_origin_of_the_embedding_is_the_shared_dynamics(kind):
    f, same = dynamics(kind), dynamics(SharedMLP)
    same.layers.load_state_dict(f.layers.state_dict())
    z = torch.randn(3, 5, 4, LATENT, dtype=DOUBLE)
    zero, e = (x.requires_grad_() for x in (torch.zeros(3, 1, EMBEDDING, dtype=DOUBLE),
                                            torch.randn(3, 1, EMBEDDING, dtype=DOUBLE)))  # fmt: skip
    close(f(zero)(z), same(zero)(z))
    assert f(zero).update_norm() == 0 and same(e).update_norm() == 0 and f(e).update_norm() > 0
    for value in (zero, e):  # no dead end
        (gradient,) = torch.autograd.grad(f(value)(z).sum(), value)
        assert (gradient != 0).all()
    moved = e + torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)[:, None, None]
    changed = (f(e)(z) != f(moved)(z)).flatten(1)
    assert changed[1].all() and not changed[[0, 2]].any()


@pytest.mark.parametrize("kind", [LowRankMLP, GEPSMLP, SharedMLP])
def test_rank_0_is_shared_dynamics(kind):
    f, same = dynamics(kind, rank=0), dynamics(SharedMLP)
    same.layers.load_state_dict(f.layers.state_dict())
    e, z = torch.randn(3, 1, EMBEDDING, dtype=DOUBLE), torch.randn(3, 5, 4, LATENT, dtype=DOUBLE)
    assert torch.equal(f(e)(z), same(e)(z)) and f(e).update_norm() == 0


def built(adapted) -> list[Tensor]:
    """Weights and biases of the layers in turn, of each recording or of all, low-rank updates in them."""
    layers = [x if isinstance(x, tuple) else (x.weight, x.bias) for x in adapted.layers]
    for number, (u, v) in enumerate(adapted.updates):
        layers[number] = (layers[number][0] + v @ u.mT, layers[number][1])
    return [tensor for layer in layers for tensor in layer]


@pytest.mark.parametrize(
    "kind, adapted",
    [(SharedMLP, "------"), (EmbeddingInputMLP, "-b----"), (LinearAdapterMLP, "wbwbwb"), (GEPSMLP, "wbwbwb"),
     (FullRankMLP, "w-w---"), (LowRankMLP, "w-w---")],
)  # fmt: skip
def test_what_is_adapted_and_how(kind, adapted):
    """At equally spaced embeddings: first differences where adapted, second ones of zero where linearly so."""
    f = dynamics(kind)
    start, change = torch.randn(2, 3, 1, EMBEDDING, dtype=DOUBLE)
    for letter, *values in zip(adapted, *(built(f(start + k * change)) for k in range(3)), strict=True):
        assert torch.equal(values[0], values[1]) == (letter == "-")
        second = (values[0] - 2 * values[1] + values[2]).abs().max()
        assert second > 1e-3 if letter != "-" and kind in (FullRankMLP, LowRankMLP) else second < 1e-14


def test_ranks_of_the_updates():
    """Of the hidden matrix: that of the update, per entry of the embedding, and no limit."""
    e = torch.randn(4, 1, EMBEDDING, dtype=DOUBLE)

    def rank_of(f) -> Tensor:
        return torch.linalg.matrix_rank(built(f(e))[2] - f.layers[1].weight)

    for rank in (1, 2, 3):
        assert (rank_of(dynamics(LowRankMLP, rank)) == rank).all()
        assert (rank_of(dynamics(GEPSMLP, rank)) == rank * EMBEDDING).all()
    assert (rank_of(dynamics(FullRankMLP)) == HIDDEN).all()


@pytest.mark.parametrize("kind", ADAPTING)
def test_update_norm_is_the_distance_from_the_shared_weights(kind):
    f, e = dynamics(kind), torch.randn(3, 1, EMBEDDING, dtype=DOUBLE)
    there, here = built(f(e)), built(f(torch.zeros_like(e)))
    close(f(e).update_norm(), sum(((a - b) ** 2).sum() for a, b in zip(there, here, strict=True)) / 3)


# ---- as models --------------------------------------------------------------------------------------------------


def case(kind) -> tuple[str, str, str]:
    return kind.__name__, "DKF", "Gaussian"


def test_shared_dynamics_are_the_main_model_at_rank_0():
    recs = recordings()
    model, guide = make(case(SharedDynamics), recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    e, z = values_for(batch)
    expected = evaluate(model, guide, batch, e, z)
    assert torch.equal(evaluate(model, guide, batch, -3 * e, z)["p(latents)"], expected["p(latents)"])
    main = MetaSSM(recs, **SIZES, rank=0).double()
    keys = main.load_state_dict(model.state_dict(), strict=False)
    assert not keys.unexpected_keys and all("hypernetwork" in key for key in keys.missing_keys)
    path = {m: m.path_prior(e, batch).log_prob(z) for m in (main, model)}
    assert torch.equal(path[main], expected["p(latents)"]) and torch.equal(path[model], path[main])
    of_rank_3 = SharedDynamics(recs, **SIZES, rank=3)
    assert of_rank_3.state_dict().keys() == model.state_dict().keys()


def session(recs, **sizes):
    torch.manual_seed(0)
    return randomised(SingleSession(recs, **(SIZES | sizes)))


def densities(model, batch, e, z) -> dict[str, Tensor]:
    """Of every trial at given values."""
    trace = poutine.trace(poutine.condition(model, data={"embedding": e, "latents": z})).get_trace(batch)
    return {n: trace.nodes[n]["fn"].log_prob(trace.nodes[n]["value"]) for n in ("latents", "observations")}


def test_single_sessions_are_separate_models():
    """Among the others, in another order, each is the shared model of its recording alone."""
    recs = recordings()
    model = session(recs)
    chosen = recs.select(["c", "a"])
    batch = chosen.batch(model.names, dtype=DOUBLE)
    e, z = values_for(batch)
    together = densities(model, batch, e, z)
    for r, name in enumerate(chosen):
        alone = SharedDynamics(recs.select([name]), **SIZES).double()
        row, neurons = model.names.index(name), model.neurons.slice(name)
        state = alone.state_dict()
        for key, value in model.state_dict().items():
            if not key.startswith("dynamics."):
                own = neurons if len(value) == model.neurons.total else slice(None)
                state[key].copy_(value[own])
        for k in range(3):
            state[f"dynamics.layers.{k}.weight"].copy_(model.dynamics.weights[k][row])
            state[f"dynamics.layers.{k}.bias"].copy_(model.dynamics.biases[k][row])
        num_trials = recs[name].num_trials
        own_batch = recs.select([name]).batch([name], dtype=DOUBLE)
        found = densities(alone, own_batch, e[r : r + 1], z[r : r + 1, :num_trials, : own_batch.num_bins])
        for site, value in found.items():
            close(together[site][r, :num_trials], value[0])


def test_single_sessions_learn_from_their_own_data():
    recs = recordings()
    model = session(recs)
    guide = pm.guides.DKF(model, hidden_dim=5).double()
    guide.read_in.start(recs)
    for names in (["b"], ["c", "a"]):
        model.zero_grad()
        SequentialELBO().terms(
            model, guide, recs.batch(model.names, names=names, dtype=DOUBLE)
        ).elbo.backward()
        rows = torch.tensor([name in names for name in model.names])
        for parameter in model.dynamics.parameters():
            assert (parameter.grad.flatten(1) != 0).any(1).equal(rows)
    # Of one recording's density alone, within a batch of all.
    batch = recs.batch(model.names, dtype=DOUBLE)
    density = densities(model, batch, *values_for(batch))["latents"][1].sum()
    for gradient in torch.autograd.grad(density, list(model.dynamics.parameters())):
        assert (gradient.flatten(1) != 0).any(1).tolist() == [False, True, False]


def test_single_sessions_follow_their_names_through_fits():
    """A fit of some recordings, in another order than the model has them, moves their rows alone."""
    recs = recordings()
    torch.manual_seed(0)
    model = SingleSession(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    for names, options in ((["c", "a"], {}), (["c", "b"], {"warm_start": False})):
        fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=6), recs.select(names), **(QUICK | options))
        rows = [name in names for name in model.names]
        for before, after in zip(model.dynamics.parameters(), fit.model.dynamics.parameters(), strict=True):
            assert (before != after).flatten(1).any(1).tolist() == rows


def test_single_sessions_follow_their_names_through_results():
    recs = recordings()
    model = session(recs)
    guide = pm.guides.DKF(model, hidden_dim=5).double()
    fit = pm.fit(model, guide, recs, warm_start=False, progress=False, num_steps=1)
    states = np.random.default_rng(0).normal(size=(9, 2))
    for row, name in enumerate(model.names):
        tables = zip(fit.model.dynamics.weights, fit.model.dynamics.biases, strict=True)
        layers = [(weight[row].detach(), bias[row].detach()) for weight, bias in tables]
        z = torch.as_tensor(states, dtype=fit.dtype)
        moved = displacement(fit, name, states)
        np.testing.assert_allclose(moved, step(z, layers) - z, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # no noise, and one row that stands still
        fit.model.process_noise.log_scale.fill_(-30.0)
        for parameter in fit.model.dynamics.parameters():
            parameter[1] = 0.0
    tree = pm.forecast(fit, recs, context=2, horizon=3, num_samples=3)
    for name in model.names:
        rates = tree[f"{name}/predictions"]["rates"]
        still = np.allclose(rates, rates.isel(time=slice(0, 1)), rtol=1e-5, atol=1e-5)
        assert still == (name == "b")


def test_single_sessions_have_no_dynamics_of_an_embedding():
    model = session(recordings())
    with pytest.raises(ValueError, match="SingleSession: needed a recording that the model was made with"):
        model.adapt_dynamics(torch.zeros(3, 1, EMBEDDING))


@pytest.mark.parametrize("kind, rank", [*((kind, 0) for kind in COMPARISONS), (GEPS, 2)])
def test_comparisons_from_fit_to_file(kind, rank, tmp_path):
    """Warm start, steps on some of the recordings, forecast, and the same again from files."""
    recs = recordings()
    torch.manual_seed(0)
    model = kind(recs, latent_dim=2, embedding_dim=1, hidden_dim=8, rank=rank)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=6), recs, recordings_per_step=2, **QUICK)
    assert np.isfinite(fit.history["elbo"]).all()
    before, after = (dict(m.dynamics.named_parameters()) for m in (model, fit.model))
    assert all((after[name] != before[name]).any() for name in before)
    fit.save(tmp_path)
    again = pm.load(tmp_path)
    assert type(again.model) is kind
    assert_same(fit, again)
    trees = [pm.forecast(x, recs, context=2, horizon=3, num_samples=3) for x in (fit, again)]
    for name in recs:
        one, other = (tree[f"{name}/predictions"]["rates"].values for tree in trees)
        assert np.isfinite(one).all() and np.array_equal(one, other)
