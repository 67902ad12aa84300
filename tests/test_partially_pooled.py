"""Recordings that deviate from what they share: against models and guides of one recording with the sum as weights."""

import copy

import pyro.distributions as dist
import pytest
import torch
from fits import QUICK, assert_parameters, state
from members import DOUBLE, EMBEDDING, LATENT, SIZES, close, evaluate, values_for
from problems import recordings
from pyro import poutine
from test_comparisons import randomised

import pyro_metassm as pm
from pyro_metassm.adaptations import DeviatingMLP
from pyro_metassm.dynamics import LowRankMLP
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.guides import DKF, PartiallyPooledDKF
from pyro_metassm.models import MetaSSM, PartiallyPooled
from pyro_metassm.rebuilding import deviations, tables
from pyro_metassm.trainer import SLOW, Options, Trainer

HIDDEN = 7


def family(number: int = 3) -> DeviatingMLP:
    torch.manual_seed(0)
    return randomised(DeviatingMLP(number, LATENT, EMBEDDING, rank=2, hidden_dim=HIDDEN))


def of_row(f: DeviatingMLP, row: int | None) -> LowRankMLP:
    """Dynamics whose shared weights are one recording's, or the family's."""
    same = LowRankMLP(LATENT, EMBEDDING, rank=2, hidden_dim=HIDDEN).double()
    same.load_state_dict({k: v for k, v in f.state_dict().items() if k not in ("weight", "bias")})
    with torch.no_grad():
        if row is not None:
            same.layers[-1].weight += f.weight[row]
            same.layers[-1].bias += f.bias[row]
    return same


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("draws", [(), (4,)])
def test_dynamics_of_a_recording_are_those_with_the_sum_as_weights(draws, native, monkeypatch):
    monkeypatch.setenv("METASSM_NATIVE", native)
    f = family()
    e = torch.randn(*draws, 2, 1, EMBEDDING, dtype=DOUBLE)
    z = torch.randn(*draws, 2, 5, 6, LATENT, dtype=DOUBLE)
    found, start = f(e, torch.tensor([2, 0])), z[..., :1, :]
    for r, row in enumerate((2, 0)):
        one = of_row(f, row)(e[..., r : r + 1, :, :])
        close(found(z)[..., r, :, :, :], one(z[..., r : r + 1, :, :, :])[..., 0, :, :, :])
        path = one.rollout(start[..., r : r + 1, :, :, :], 3)
        close(found.rollout(start, 3)[..., r, :, :, :], path[..., 0, :, :, :])
    close(f(e)(z), of_row(f, None)(e)(z))


def test_deviations_cost_what_the_updates_of_the_embedding_do():
    """At an embedding, the sum of both; of the family, of the updates alone."""
    f, e = family(), torch.randn(2, 1, EMBEDDING, dtype=DOUBLE)
    own = sum(table[[2, 0]].square().sum() for table in (f.weight, f.bias)) / 2
    assert f(e).update_norm() > 0
    close(f(e, torch.tensor([2, 0])).update_norm(), f(e).update_norm() + own)


def test_the_start_is_of_what_recordings_share():
    recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=4, num_steps=16)
    torch.manual_seed(0)
    model = PartiallyPooled(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    before = copy.deepcopy(model.dynamics.layers[0].weight)
    fit = pm.fit(model, PartiallyPooledDKF(model, hidden_dim=6), recs, **QUICK | {"num_steps": 0})
    assert not torch.equal(fit.model.dynamics.layers[0].weight, before)
    assert all((table == 0).all() for table in (*deviations(fit.model), *deviations(fit.guide)))


def pair(recs):
    """A model and its guide, everything moved from where it starts."""
    torch.manual_seed(0)
    model = randomised(PartiallyPooled(recs, **SIZES))
    guide = PartiallyPooledDKF(model, hidden_dim=5).double()
    guide.read_in.start(recs)
    return model.eval(), randomised(guide).eval()


def test_without_deviations_they_are_the_usual_model_and_guide():
    recs = recordings()
    model, guide = pair(recs)
    with torch.no_grad():
        for module in (model, guide):
            for key, table in module.named_parameters():
                if key.startswith(module.deviations):
                    table.zero_()
    usual = MetaSSM(recs, **SIZES).double()
    usual_guide = DKF(usual, hidden_dim=5).double().eval()
    for module, source in ((usual, model), (usual_guide, guide)):
        keys = module.load_state_dict(source.state_dict(), strict=False)
        assert not keys.missing_keys and all(
            key.startswith(source.deviations) for key in keys.unexpected_keys
        )
    batch = recs.batch(model.names, dtype=DOUBLE)
    found, expected = (
        evaluate(*both, batch, *values_for(batch)) for both in ((model, guide), (usual, usual_guide))
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        close(found[key], value)


def test_every_recording_has_the_usual_model_and_guide_of_its_own_weights():
    """Densities of the paths and the guide's own, among others and in another order."""
    recs = recordings()
    model, guide = pair(recs)
    batch = recs.select(["c", "a"]).batch(model.names, dtype=DOUBLE)
    e, z = values_for(batch)
    found = evaluate(model, guide, batch, e, z)
    for r, name in enumerate(batch.names):
        row = model.names.index(name)
        usual, usual_guide = MetaSSM(recs, **SIZES).double(), None
        usual.load_state_dict(model.state_dict(), strict=False)
        with torch.no_grad():
            usual.dynamics.layers[-1].weight += model.dynamics.weight[row]
            usual.dynamics.layers[-1].bias += model.dynamics.bias[row]
            usual.process_noise.log_scale += model.log_noise[row]
            usual_guide = DKF(usual, hidden_dim=5).double().eval()
            usual_guide.load_state_dict(guide.state_dict(), strict=False)
            for key, weight in usual_guide.rnn.named_parameters():
                weight += guide.deviation[key][row]
        expected = evaluate(usual, usual_guide, batch, e, z)
        for key in ("p(latents)", "q(latents)"):
            close(found[key][r], expected[key][r])
            assert not torch.allclose(found[key][1 - r], expected[key][1 - r])


def test_noise_of_a_recording():
    recs = recordings()
    model, _ = pair(recs)
    z, row = torch.randn(2, 3, 4, LATENT, dtype=DOUBLE), torch.tensor([1, 2])
    e = torch.randn(2, 1, EMBEDDING, dtype=DOUBLE)
    step = model.transition(z, model.dynamics_of(e, row))
    assert isinstance(step.base_dist, dist.Normal)
    scale = (model.process_noise.log_scale + model.log_noise[row]).exp()
    close(step.base_dist.scale, scale[:, None, None].expand_as(z))
    of_family = model.transition(z, model.adapt_dynamics(e)).base_dist.scale
    close(of_family, model.process_noise().expand_as(z))


def test_deviations_learn_from_their_own_recording_alone():
    recs = recordings()
    model, guide = pair(recs)
    batch = recs.batch(model.names, names=["c", "a"], dtype=DOUBLE)
    SequentialELBO().terms(model, guide, batch).elbo.backward()
    seen = torch.tensor([name in ("a", "c") for name in model.names])
    for module in (model, guide):
        tables = [p for key, p in module.named_parameters() if key.startswith(module.deviations)]
        assert tables
        for table in tables:
            assert (table.grad.flatten(1) != 0).any(1).equal(seen)


@pytest.fixture(scope="module")
def pooled():
    recs = pm.simulate.limit_cycles([2.5, 5.0, 4.0, 3.0], num_trials=4, num_steps=16)
    old = recs.select(recs.names[:3])
    torch.manual_seed(0)
    model = PartiallyPooled(old, latent_dim=2, embedding_dim=1, hidden_dim=8)
    guide = PartiallyPooledDKF(model, hidden_dim=6)
    return recs, pm.fit(model, guide, old, **QUICK)


def test_fits_are_saved_forecast_and_adapted(pooled, tmp_path):
    recs, fit = pooled
    fit.save(tmp_path / "fit")
    loaded = pm.load(tmp_path / "fit")
    assert_parameters(fit, loaded)
    new = recs.drop(list(fit.names))
    before = copy.deepcopy(state(fit.model, fit.guide))
    adapted = pm.adapt(loaded, new, num_steps=4, num_starts=8, search_steps=4, progress=False)
    assert all(torch.equal(before[key], value) for key, value in state(fit.model, fit.guide).items())
    tree = pm.forecast(adapted, recs, context=4, horizon=3, num_samples=3)
    assert set(tree.children) >= set(recs.names)
    for old_module, module in ((fit.model, adapted.model), (fit.guide, adapted.guide)):
        own = tables(adapted.model, adapted.guide)[module is adapted.guide]
        for key, value in module.state_dict().items():
            before = old_module.state_dict()[key]
            assert torch.equal(value[: len(before)] if key in own else value, before), key
        for table in deviations(module):
            assert (table[:3] != 0).any() and (table[3] != 0).any()


def test_new_recordings_deviate_at_a_tenth_of_the_rate(pooled):
    """Of Adam's first step, which is as long as the rate whatever the gradient; not at all without the part."""
    recs, fit = pooled
    new = recs.drop(list(fit.names))
    for train in (("read_in", "read_out"), ("read_in",), ("read_out",)):
        adapted = pm.adapt(
            fit,
            new,
            train=train,
            num_steps=1,
            num_starts=8,
            search_steps=4,
            learning_rate=0.5,
            progress=False,
        )
        for part, module in (("read_out", adapted.model), ("read_in", adapted.guide)):
            # The first step of a cycle has a tenth of the rate.
            step = 0.1 * 0.1 * 0.5 if part in train else 0.0
            for table in deviations(module):
                assert table[3].abs().max().item() == pytest.approx(step, rel=1e-3)


def test_a_guide_of_its_own_parts_goes_with_any_model(pooled):
    """And the model with any guide."""
    recs, _ = pooled
    for model_class, guide_class in ((MetaSSM, PartiallyPooledDKF), (PartiallyPooled, DKF)):
        model = model_class(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
        fit = pm.fit(model, guide_class(model, hidden_dim=6), recs, **QUICK)
        trace = poutine.trace(fit.model).get_trace(recs.batch(fit.names))
        assert trace.nodes["latents"]["value"].isfinite().all()


def test_deviations_of_the_dynamics_move_slower_than_what_the_start_has_found(pooled):
    recs, fit = pooled
    options = Options(1, 2, None, 1e-2, True, 1, 1.0, 0.0, 0)
    trainer = Trainer(fit.model, fit.guide, recs.select(fit.names), options, torch.device("cpu"))
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    usual = rates[id(fit.model.read_out.weight)]
    for key, p in fit.model.named_parameters():
        own, found = key.startswith(fit.model.deviations), key.startswith("dynamics.")
        expected = usual * (0.3 if own else 1.0) * (SLOW if found else 1.0)
        assert rates[id(p)] == pytest.approx(expected), key


def test_a_recordings_own_network_moves_as_one_alone_does():
    """With a single recording, what is shared and what is its own have the same gradients: their sum is one network."""
    recs = pm.simulate.limit_cycles([2.5], num_trials=6, num_steps=16)
    networks = []
    for guide_class in (DKF, PartiallyPooledDKF):
        torch.manual_seed(0)
        model = MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
        guide = guide_class(model, hidden_dim=6)
        fit = pm.fit(model, guide, recs, **QUICK | {"num_steps": 20}, clip_norm=1e9)
        own = dict(fit.guide.named_parameters())
        networks.append(
            {
                k: w + own[f"deviation.{k}"][0] if "deviation.weight_in" in own else w
                for k, w in fit.guide.rnn.named_parameters()
            }
        )
    alone, sums = networks
    for key, weight in alone.items():
        torch.testing.assert_close(sums[key], weight, rtol=1e-3, atol=1e-4)
    torch.manual_seed(0)
    model = MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    moved = alone["weight_hidden"] - DKF(model, hidden_dim=6).rnn.weight_hidden
    assert moved.abs().max() > 0.01  # what the fits have in common is not that nothing was learned


def test_learning_rates_of_models_and_guides(pooled):
    recs, fit = pooled
    old, options = recs.select(fit.names), Options(1, 2, None, 1e-2, True, 1, 1.0, 0.0, 0)
    found = copy.deepcopy(fit)
    found.model.learning_rates = {"read_out.weight": 0.5, "dynamics": 2.0}
    trainer = Trainer(found.model, found.guide, old, options, torch.device("cpu"))
    rate_of = {
        id(p): group["initial_lr"] for group in trainer.optimizer.param_groups for p in group["params"]
    }
    rate_of = {key: rate_of[id(p)] / 1e-2 for key, p in found.model.named_parameters()}
    for key, rate in rate_of.items():
        expected = 0.5 if key == "read_out.weight" else 2.0 * SLOW if key.startswith("dynamics") else 1.0
        assert rate == pytest.approx(expected), key
    for bad in ({"nothing": 0.5}, {"read_out": 0.0}, {"read_out": float("nan")}):
        found.model.learning_rates = bad
        with pytest.raises(ValueError, match="learning_rates: needed names of parameters"):
            Trainer(found.model, found.guide, old, options, torch.device("cpu"))
