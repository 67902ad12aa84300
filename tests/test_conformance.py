"""One suite for every model x guide x likelihood: what must hold whatever the parts are.

The parts are found by introspection: a class added to ``models``, ``guides`` or ``likelihoods`` is tested here.
"""

import copy
import dataclasses

import pyro
import pytest
import torch
from members import (
    DOUBLE,
    EMBEDDING,
    LATENT,
    PER_RECORDING,
    PER_TRIAL,
    close,
    data_for,
    evaluate,
    every,
    fixed,
    make,
    same,
    values_for,
)
from problems import garbage
from pyro import poutine
from torch.nn import functional

from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.recordings import Recording, Recordings

# ---- sites, shapes, scales --------------------------------------------------------------------------------------


@every
def test_sites_and_shapes(case):
    recs = data_for(case)
    model, guide = make(case, recs)
    batch = recs.batch(model.names, names=["c", "b"], trials={"c": [3, 0, 1]}, dtype=DOUBLE)
    latent = {"embedding": (2, 1, EMBEDDING), "latents": (2, 3, 8 + 1, LATENT)}
    events = {"embedding": (EMBEDDING,), "latents": (9, LATENT), "observations": (9, 5)}

    def sites(trace) -> dict:
        trace = pyro.poutine.util.prune_subsample_sites(trace)
        return {n: s for n, s in trace.nodes.items() if s["type"] == "sample"}

    q = poutine.trace(guide).get_trace(batch)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)
    assert set(sites(q)) == set(latent) and set(sites(p)) == set(events)
    for trace in (q, p, poutine.trace(model).get_trace(batch)):
        for name, site in sites(trace).items():
            shape = latent.get(name, (2, 3, 9, 5))
            assert tuple(site["value"].shape) == shape and tuple(site["fn"].event_shape) == events[name]
            assert tuple(site["fn"].batch_shape) == shape[:2]
            assert [f.name for f in site["cond_indep_stack"]] == ["recording", "trial"][
                : 1 if name == "embedding" else 2
            ]
            assert site["value"].dtype == DOUBLE
    with pyro.plate("draw", 4, dim=-3):
        q = poutine.trace(guide).get_trace(batch)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)
    for name, site in (*sites(q).items(), *((n, s) for n, s in sites(p).items() if n in latent)):
        assert tuple(site["value"].shape) == (4, *latent[name])
    assert tuple(p.nodes["_RETURN"]["value"].shape) == (4, 2, 3, 9, 5)
    assert len(torch.unique(q.nodes["latents"]["value"][..., 0, 0])) == 4 * 2 * 3
    SequentialELBO().terms(model, guide, batch)  # as Pyro's validation sees it, which the tests leave on


@every
def test_scale_under_sub_sampling(case):
    recs = data_for(case)
    model, guide = make(case, recs)
    batch = recs.batch(model.names, names=["a", "c"], trials={"a": [2], "c": [0, 3]}, dtype=DOUBLE)
    trial_scale = torch.tensor([[3.0], [2.0]], dtype=DOUBLE)
    q = poutine.trace(guide).get_trace(batch)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)
    for trace in (q, p):
        assert trace.nodes["embedding"]["scale"] == 3 / 2
        for name in {"latents", "observations"} & set(trace.nodes):
            close(torch.as_tensor(trace.nodes[name]["scale"]).expand(2, 1), 1.5 * trial_scale)
    e, z = values_for(batch, trials=[[2, 0], [0, 3]])
    values = evaluate(model, guide, batch, e, z)
    exists = torch.tensor([[True, False], [True, True]])
    close(values["log_likelihood"], (1.5 * trial_scale * values["p(observations)"]).sum())
    assert (values["p(observations)"][~exists] == 0).all() and (values["p(latents)"][~exists] == 0).all()


# ---- padding, order, other recordings ---------------------------------------------------------------------------


@every
def test_what_is_padded_or_missing_does_not_matter(case):
    """Other values there: nothing changes, to the bit; nor do paths after a trial's end."""
    recs = data_for(case)
    model, guide = make(case, recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    e, z = values_for(batch)
    expected = evaluate(model, guide, batch, e, z)
    for value in (3.0, 1e4):
        same(expected, evaluate(model, guide, garbage(batch, value), e, z))
    moved = torch.where(batch.time_mask.unsqueeze(-1), z, z + 50)
    keys = [k for k in expected if k != "predictor"]
    same(expected, evaluate(model, guide, batch, e, moved), keys)


@every
def test_appended_padding_does_not_matter(case):
    """More bins and trials that are not there: the same densities of those that are."""
    recs = data_for(case)
    model, guide = make(case, recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    longer = dataclasses.replace(
        batch,
        observations=functional.pad(batch.observations, (0, 0, 0, 3, 0, 2), value=4.0),
        mask=functional.pad(batch.mask, (0, 0, 0, 3, 0, 2)),
        time_mask=functional.pad(batch.time_mask, (0, 3, 0, 2)),
    )
    short = evaluate(model, guide, batch, *values_for(batch))
    padded = evaluate(model, guide, longer, *values_for(longer))
    for key in PER_TRIAL:
        close(padded[key][:, : batch.num_trials], short[key])
        assert (padded[key][:, batch.num_trials :] == 0).all()
    for key in (*PER_RECORDING, "log_likelihood", "kl_latents", "kl_embedding"):
        close(padded[key], short[key])


@every
def test_a_recording_is_the_same_alone_and_among_others(case):
    """Neurons, trials and bins are padded to the largest recording of a batch."""
    recs = data_for(case)
    model, guide = make(case, recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    together = evaluate(model, guide, batch, *values_for(batch))
    for r, name in enumerate(recs):
        alone_batch = recs.select([name]).batch(model.names, dtype=DOUBLE)
        alone = evaluate(model, guide, alone_batch, *values_for(alone_batch))
        num_trials = recs[name].num_trials
        for key in PER_TRIAL:
            close(together[key][r, :num_trials], alone[key][0])
        for key in PER_RECORDING:
            close(together[key][r], alone[key][0])


@every
def test_order_of_recordings_and_trials_goes_through(case):
    recs = data_for(case)
    model, guide = make(case, recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    expected = evaluate(model, guide, batch, *values_for(batch))
    order, trials = [2, 0, 1], {"a": [1, 2, 0], "b": [1, 0], "c": [3, 1, 0, 2]}
    names = [recs.names[r] for r in order]
    turned = recs.select(names).batch(model.names, trials=trials, dtype=DOUBLE)
    rows = torch.tensor([trials[n] + list(range(len(trials[n]), 4)) for n in names])
    values = evaluate(model, guide, turned, *values_for(turned, rows))
    for key in PER_TRIAL:
        close(values[key], torch.take_along_dim(expected[key][order], rows, 1))
    for key in PER_RECORDING:
        close(values[key], expected[key][order])


@every
def test_draws_are_computed_together_as_one_by_one(case):
    """Under a plate of draws, as pm.posterior runs the guide: each draw's q(z) is that of its embedding."""
    recs = data_for(case)
    model, guide = make(case, recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    e, z = values_for(batch)
    many_e, many_z = torch.stack([e, -e, 3 * e]), torch.stack([z, z, -z])
    with pyro.plate("draw", 3, dim=-3):
        q = poutine.trace(fixed(guide, many_e, many_z)).get_trace(batch)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)
    for s in range(3):
        alone = evaluate(model, guide, batch, many_e[s], many_z[s])
        close(q.nodes["latents"]["fn"].log_prob(many_z)[s], alone["q(latents)"])
        close(p.nodes["latents"]["fn"].log_prob(many_z)[s], alone["p(latents)"])
        close(p.nodes["_RETURN"]["value"][s], alone["predictor"])


@every
def test_held_out_neurons_are_scored_and_not_seen(case):
    plain = data_for(case, shapes={"a": (3, (6, 4)), "b": (2, (5,))})
    recs = Recordings([
        Recording(
            r.name, r.observations, bin_width=r.bin_width, lengths=r.lengths, neuron_ids=r.neuron_ids,
            held_out_neurons=[1],
        )
        for r in plain.values()
    ])  # fmt: skip
    model, guide = make(case, recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    held_out = torch.arange(3) == 1
    y = batch.observations
    bounded = case[2] in ("Bernoulli", "Binomial")  # these cannot be larger
    other = torch.where(batch.mask, y.amax((1, 2), keepdim=True) - y, y) if bounded else y + 2
    moved = dataclasses.replace(batch, observations=torch.where(held_out, other, y))
    e, z = values_for(batch)
    one, other = evaluate(model, guide, batch, e, z), evaluate(model, guide, moved, e, z)
    same(one, other, ["q(embedding)", "q(latents)", "kl_embedding", "kl_latents"])
    assert (one["p(observations)"] != other["p(observations)"])[0].all()


# ---- gradients, copies, dtypes, sizes ---------------------------------------------------------------------------


@every
def test_gradients_are_finite_under_missing_data(case):
    recs = data_for(case)
    model, guide = make(case, recs, dtype=torch.float32)
    guide.train()
    torch.manual_seed(0)
    terms = SequentialELBO().terms(model, guide, garbage(recs.batch(model.names), 1e4))
    terms.elbo.backward()
    parameters = {**dict(model.named_parameters()), **{f"guide.{n}": p for n, p in guide.named_parameters()}}
    without = {name for name, p in parameters.items() if p.grad is None or not (p.grad != 0).any()}
    assert all(p.grad.isfinite().all() for p in parameters.values() if p.grad is not None)
    trained = [
        "read_out.weight",
        "read_out.bias",
        "initial.loc",
        "initial.log_scale",
        "process_noise.log_scale",
    ]
    trained += [
        name for name in parameters if name.startswith(("observation.", "guide.")) and "trunk" not in name
    ]
    assert not without & set(trained)
    assert any(name.startswith("dynamics") for name in set(parameters) - without)


@every
def test_state_dicts_carry_everything(case):
    """Another model and guide of the same sizes, given the states: the same numbers to the bit."""
    recs = data_for(case)
    model, guide = make(case, recs, dtype=torch.float32)
    other_model, other_guide = make(case, recs, seed=5, dtype=torch.float32)
    rebuilt = type(model)(NeuronTable(model.names, model.neurons.num_neurons), **model.config)
    rebuilt_guide = type(guide)(rebuilt, **guide.config)
    batch = recs.batch(model.names)

    def draw(model, guide):
        torch.manual_seed(0)
        terms = SequentialELBO().terms(model, guide.train(), batch)
        return [terms.elbo, terms.log_likelihood, *terms.kl.values()]

    expected = draw(model, guide)
    assert not torch.equal(expected[0], draw(other_model, other_guide)[0])
    for a, b in ((other_model, other_guide), (rebuilt.eval(), rebuilt_guide)):
        assert not a.load_state_dict(model.state_dict()).missing_keys
        assert not b.load_state_dict(guide.state_dict()).missing_keys
        assert all(torch.equal(x, y) for x, y in zip(expected, draw(a, b), strict=True))
    assert set(guide.state_dict()).isdisjoint(model.state_dict())  # the guide does not own its model


@every
def test_another_model_in_the_process_changes_nothing(case):
    recs = data_for(case)
    model, guide = make(case, recs)
    batch = recs.batch(model.names, dtype=DOUBLE)

    def draw():
        torch.manual_seed(0)
        return SequentialELBO().terms(model, guide, batch).elbo

    expected = draw()
    others = make(case, recs, seed=7)
    optimizer = torch.optim.SGD([*others[0].parameters(), *others[1].parameters()], lr=0.1)
    SequentialELBO().terms(*others, batch).elbo.backward()
    optimizer.step()
    assert torch.equal(draw(), expected) and len(pyro.get_param_store()) == 0


@every
def test_copies_stay_together(case):
    recs = data_for(case)
    model, guide = make(case, recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    values = values_for(batch)
    expected = evaluate(model, guide, batch, *values)
    new_model, new_guide = copy.deepcopy((model, guide))
    assert new_guide.model is new_model and guide.model is model and new_model is not model
    with torch.no_grad():
        for parameter in (*new_model.parameters(), *new_guide.parameters()):
            parameter.add_(0.3)
    same(expected, evaluate(model, guide, batch, *values))
    assert not torch.equal(
        evaluate(new_model, new_guide, batch, *values)["by_recording"], expected["by_recording"]
    )


@every
def test_dtypes_go_through(case):
    """float64 and float32 give the same numbers to single precision, each in its own type."""
    recs = data_for(case)
    model, guide = make(case, recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    e, z = values_for(batch)
    double = evaluate(model, guide, batch, e, z)
    batch = recs.batch(model.names)
    single = evaluate(model.float(), guide.float(), batch, e.float(), z.float())
    for key, value in double.items():
        assert value.dtype == DOUBLE and single[key].dtype == torch.float32, key
        torch.testing.assert_close(single[key].double(), value, rtol=1e-3, atol=1e-3)
    torch.manual_seed(0)
    assert SequentialELBO().terms(model, guide.train(), batch).elbo.dtype == torch.float32


@every
@pytest.mark.parametrize(
    "shapes",
    [
        {"x": (1, (1,))},
        {"x": (1, (1, 1)), "y": (2, (1,))},
        {"x": (1, (6,))},
        {"x": (3, (1, 5)), "y": (1, (2,))},
    ],
    ids=str,
)
def test_one_of_everything_runs(case, shapes):
    recs = data_for(case, shapes=shapes, missing=False)
    model, guide = make(case, recs, dtype=torch.float32)
    torch.manual_seed(0)
    terms = SequentialELBO().terms(model, guide.train(), recs.batch(model.names))
    terms.elbo.backward()
    assert terms.elbo.isfinite() and terms.by_recording.shape == (len(shapes),)
    for parameter in (*model.parameters(), *guide.parameters()):
        assert parameter.grad is None or parameter.grad.isfinite().all()
