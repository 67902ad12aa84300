"""One suite for every model x guide x likelihood: what must hold whatever the parts are.

The parts are found by introspection: a class added to ``models``, ``guides`` or ``likelihoods`` is tested here.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from problems import garbage, recordings
from pyro import poutine
from torch.nn import functional

import pyro_metassm as pm
from pyro_metassm.dynamics import LowRankMLP
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.guides.encoders import EmbeddingEncoder, RecurrentEncoder, SetEncoder
from pyro_metassm.likelihoods import Gaussian, Likelihood
from pyro_metassm.models import LinearGaussian, MetaSSM
from pyro_metassm.neurons import NeuronTable, ReadIn, ReadOut, linear_by_recording
from pyro_metassm.recordings import Batch, Recording, Recordings

DOUBLE = torch.float64
LATENT, EMBEDDING = 2, 2


def concrete(module, base: type) -> list[type]:
    """Public classes of a module that can be made."""
    found = [c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base) and n[0] != "_"]
    return [c for c in found if not inspect.isabstract(c)]


def accepted(kind: type) -> set[str]:
    """Names of the arguments of a class, through ``**kwargs`` to its bases."""
    names: set[str] = set()
    for cls in kind.__mro__:
        if "__init__" in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters.values()
            names |= {p.name for p in parameters}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def maker(kind: type, *args, **chosen) -> Callable:
    return lambda *more, **extra: kind(
        *args, *more, **{k: v for k, v in (chosen | extra).items() if k in accepted(kind)}
    )


def smoothed(guide):
    """As a warm start on noisy data leaves it."""
    guide.smoothing.fill_(1.5)
    return guide


SIZES = {"latent_dim": LATENT, "embedding_dim": EMBEDDING, "hidden_dim": 6}
LIKELIHOODS = {c.__name__: c for c in concrete(pm.likelihoods, Likelihood)}
MODELS = {c.__name__: (maker(c, **SIZES), c) for c in concrete(pm.models, MetaSSM)}
MODELS["MetaSSM of rank 0"] = (maker(MetaSSM, **SIZES, rank=0), MetaSSM)
MODELS["MetaSSM of rank 3"] = (maker(MetaSSM, **SIZES, rank=3), MetaSSM)
GUIDES = {c.__name__: maker(c, hidden_dim=5) for c in concrete(pm.guides, pm.guides.AmortizedGuide)}
GUIDES["DKF, recurrent encoder"] = maker(pm.guides.DKF, hidden_dim=5, embedding_encoder=RecurrentEncoder)
GUIDES["DKF, smoothed frame"] = lambda model: smoothed(pm.guides.DKF(model, hidden_dim=5))
GUIDES["DKF, common layer"] = maker(pm.guides.DKF, hidden_dim=5, common_dim=4, detach_embedding=False)
ALL_GUIDES = GUIDES | {"ExactSmoother": pm.guides.ExactSmoother}


def cases():
    """All guides and likelihoods for the main model; for the others, each guide and each likelihood once."""
    for model, (_, kind) in MODELS.items():
        families = LIKELIHOODS if "likelihood" in accepted(kind) else {"Gaussian": Gaussian}
        guides = ALL_GUIDES if issubclass(kind, LinearGaussian) else GUIDES
        for guide in guides:
            for family in families:
                if model == "MetaSSM" or guide == "DKF" or family == "Gaussian":
                    yield pytest.param(
                        (model, guide, family), id=f"{model}-{guide}-{family}".replace(" ", "_")
                    )


every = pytest.mark.parametrize("case", list(cases()))


def data_for(case, **more) -> Recordings:
    return recordings(counts=case[2] != "Gaussian", **more)


def make(case, recs: Recordings, seed: int = 0, dtype=DOUBLE):
    """Model and guide of a case, every parameter moved from where it starts, without roll-outs."""
    model_name, guide_name, family = case
    torch.manual_seed(seed)
    model = MODELS[model_name][0](recs, likelihood=LIKELIHOODS[family])
    guide = ALL_GUIDES[guide_name](model)
    if hasattr(guide, "read_in"):
        guide.read_in.start(recs)
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval(), guide.to(dtype).eval()


def values_for(batch: Batch, trials=None) -> tuple[torch.Tensor, torch.Tensor]:
    """An embedding of each recording and a path of each trial, the same whatever else is in the batch."""
    rng = torch.Generator().manual_seed(0)
    e = torch.randn(8, 1, EMBEDDING, generator=rng, dtype=DOUBLE)[batch.recording]
    z = torch.randn(8, 6, 14, LATENT, generator=rng, dtype=DOUBLE)[batch.recording]
    rows = torch.arange(batch.num_trials).expand(len(e), -1) if trials is None else torch.as_tensor(trials)
    z = torch.take_along_dim(z, rows[..., None, None], 1)
    return e, z[:, :, : batch.num_bins]


def fixed(guide, e, z) -> Callable:
    """The guide, its draws replaced by given values."""
    trace = poutine.Trace()
    for name, value in (("embedding", e), ("latents", z)):
        trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return poutine.replay(guide, trace=trace)


def evaluate(model, guide, batch: Batch, e, z) -> dict[str, torch.Tensor]:
    """Everything that the ELBO is made of at given values: densities by site and trial, and the terms."""
    at = fixed(guide, e, z)
    with torch.no_grad():
        terms = SequentialELBO().terms(model, at, batch)
        q = poutine.trace(at).get_trace(batch)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)
    result = {"by_recording": terms.by_recording, "log_likelihood": terms.log_likelihood}
    result |= {f"kl_{name}": kl for name, kl in terms.kl.items()}
    for name, trace in (("q", q), ("p", p)):
        for site in ("embedding", "latents"):
            result[f"{name}({site})"] = trace.nodes[site]["fn"].log_prob(trace.nodes[site]["value"])
    y = p.nodes["observations"]
    result["p(observations)"] = y["fn"].log_prob(y["value"])
    result["predictor"] = p.nodes["_RETURN"]["value"]
    return result


def same(a: dict, b: dict, keys=None) -> None:
    for key in keys or a:
        assert torch.equal(a[key], b[key]), key


def close(a, b, **tolerance) -> None:
    torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


PER_TRIAL = ("q(latents)", "p(latents)", "p(observations)")
PER_RECORDING = ("q(embedding)", "p(embedding)", "by_recording")


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
        Recording(r.name, r.observations, bin_width=r.bin_width, lengths=r.lengths, held_out_neurons=[1])
        for r in plain.values()
    ])  # fmt: skip
    model, guide = make(case, recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    held_out = torch.arange(3) == 1
    moved = dataclasses.replace(
        batch, observations=torch.where(held_out, batch.observations + 2, batch.observations)
    )
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


# ---- the parts on their own -------------------------------------------------------------------------------------


def test_rank_0_is_shared_dynamics():
    recs = recordings()
    model, guide = make(("MetaSSM of rank 0", "DKF", "Gaussian"), recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    e, z = values_for(batch)
    one, other = evaluate(model, guide, batch, e, z), evaluate(model, guide, batch, 10 * e, z)
    same(one, other, ["p(latents)", "p(observations)"])
    w = [(layer.weight, layer.bias) for layer in model.dynamics.layers]
    hidden = functional.silu(functional.silu(z @ w[0][0].mT + w[0][1]) @ w[1][0].mT + w[1][1])
    close(model.adapt_dynamics(e)(z), z + hidden @ w[2][0].mT + w[2][1])
    # With a rank the embedding does act.
    model, guide = make(("MetaSSM", "DKF", "Gaussian"), recs)
    assert (
        evaluate(model, guide, batch, e, z)["p(latents)"]
        != evaluate(model, guide, batch, 2 * e, z)["p(latents)"]
    ).any()


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("lead", [(), (4,)])
def test_factored_updates_are_the_built_matrices(rank, lead):
    """``x W + (x u) v^T = x (W + u v^T)``, for the shapes of the loop, of the density and of the draws."""
    torch.manual_seed(0)
    dynamics = LowRankMLP(LATENT, EMBEDDING, rank=rank, hidden_dim=7).double()
    e = torch.randn(*lead, 3, 1, EMBEDDING, dtype=DOUBLE)
    adapted = dynamics(e)
    assert len(adapted.updates) == 2 and [u.shape[-1] for u, _ in adapted.updates] == [rank, rank]
    for trials, bins in ((5, 1), (5, 8), (1, 1)):
        z = torch.randn(*lead, 3, trials, bins, LATENT, dtype=DOUBLE)
        x = z
        for layer, (u, v) in zip(dynamics.layers, adapted.updates, strict=False):
            built = layer.weight.mT + u @ v.mT  # (..., R, 1, in, out)
            x = functional.silu(x @ built + layer.bias)
        close(adapted(z), z + dynamics.layers[-1](x))
    norms = sum(((u @ v.mT) ** 2).sum((-1, -2)).mean() for u, v in adapted.updates)
    close(adapted.update_norm(), norms)


def test_updates_vanish_at_the_origin_of_the_embedding():
    torch.manual_seed(0)
    dynamics = LowRankMLP(LATENT, EMBEDDING, rank=2, hidden_dim=7).double()
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter.add_(torch.randn_like(parameter))
    zero, e = torch.zeros(3, 1, EMBEDDING, dtype=DOUBLE), torch.randn(3, 1, EMBEDDING, dtype=DOUBLE)
    z = torch.randn(3, 5, 4, LATENT, dtype=DOUBLE)
    shared = LowRankMLP(LATENT, EMBEDDING, rank=0, hidden_dim=7).double()
    shared.layers.load_state_dict(dynamics.layers.state_dict())
    assert torch.equal(dynamics(zero)(z), shared(zero)(z)) and dynamics(zero).update_norm() == 0
    assert (dynamics(e)(z) != shared(e)(z)).all() and shared(e).update_norm() == 0
    # The origin is no dead end: the embedding has a gradient there.
    zero.requires_grad_()
    dynamics(zero)(z).sum().backward()
    assert (zero.grad != 0).all()


def test_one_recordings_embedding_changes_its_dynamics_alone():
    torch.manual_seed(0)
    dynamics = LowRankMLP(LATENT, EMBEDDING, hidden_dim=7).double()
    e, z = torch.randn(3, 1, EMBEDDING, dtype=DOUBLE), torch.randn(3, 5, 4, LATENT, dtype=DOUBLE)
    moved = e + torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)[:, None, None]
    changed = (dynamics(e)(z) != dynamics(moved)(z)).flatten(1)
    assert changed[1].all() and not changed[[0, 2]].any()


@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_linear_by_recording_is_a_loop(lead):
    torch.manual_seed(0)
    x = torch.randn(*lead, 3, 5, 4, 2, dtype=DOUBLE)
    weight, bias = torch.randn(3, 2, 6, dtype=DOUBLE), torch.randn(3, 6, dtype=DOUBLE)
    for b in (bias, None):
        out = linear_by_recording(x, weight, b)
        assert out.shape == (*lead, 3, 5, 4, 6)
        for r in range(3):
            close(out[..., r, :, :, :], x[..., r, :, :, :] @ weight[r] + (0 if b is None else b[r]))


def test_read_out_takes_the_rows_of_each_recording():
    table = NeuronTable(["a", "b", "c"], [2, 3, 1])
    read_out = ReadOut(table, LATENT).double()
    z = torch.randn(2, 4, 5, LATENT, dtype=DOUBLE)
    predictor = read_out(z, torch.tensor([2, 1]))
    assert predictor.shape == (2, 4, 5, 3)
    for r, name, number in ((0, "c", 1), (1, "b", 3)):
        rows = table.slice(name)
        close(predictor[r, ..., :number], z[r] @ read_out.weight[rows].mT + read_out.bias[rows])
    assert table.slice("b") == slice(2, 5) and table.total == 6


@pytest.mark.parametrize("counts", [False, True])
def test_read_in_is_its_equation(counts):
    """Bin by bin, in numpy: centred, scaled, weighted, averaged over the neurons seen, times the root of all."""
    recs = recordings(counts=counts)
    torch.manual_seed(0)
    read_in = ReadIn(NeuronTable.of(recs), 4).double()
    read_in.start(recs)
    with torch.no_grad():
        read_in.bias.normal_()
    batch = recs.select(["c", "a"]).batch(recs.names, dtype=DOUBLE)
    ybar, share = read_in(
        batch.observations, batch.mask & batch.held_in[:, None, None], batch.recording, batch.held_in
    )
    for r, name in enumerate(batch.names):
        recording, rows = recs[name], read_in.neurons.slice(name)
        y = np.sqrt(recording.observations) if counts else recording.observations
        centred = (y - np.nanmean(y, (0, 1))) / np.sqrt(np.nanvar(y, (0, 1)).mean())
        weight, bias = (
            read_in.weight[rows].detach().numpy(),
            read_in.bias[batch.recording[r]].detach().numpy(),
        )
        for k in range(recording.num_trials):
            for t in range(recording.num_bins):
                seen = ~np.isnan(y[k, t])
                expected = np.zeros(4)
                if seen.any():
                    mean = centred[k, t, seen] @ weight[seen] / seen.sum()
                    expected = mean * len(seen) ** 0.5 + bias
                np.testing.assert_allclose(ybar[r, k, t].detach(), expected, rtol=1e-6, atol=1e-6)
                assert np.isclose(share[r, k, t].item(), seen.mean())


def test_read_in_starts_once_and_with_neurons_never_seen():
    y = np.random.default_rng(0).normal(size=(3, 6, 3))
    y[..., 1] = np.nan
    recs = Recordings([Recording("a", y, bin_width=0.02)])
    read_in = ReadIn(NeuronTable.of(recs), 4)
    read_in.start(recs)
    state = {k: v.clone() for k, v in read_in.state_dict().items()}
    assert all(v.isfinite().all() for v in state.values())
    assert np.isclose(read_in.scale.item(), np.sqrt(np.nanvar(y[..., [0, 2]], (0, 1)).mean()), rtol=1e-5)
    read_in.start(Recordings([Recording("a", 3 * y, bin_width=0.02)]))
    assert all(torch.equal(v, state[k]) for k, v in read_in.state_dict().items())


@pytest.mark.parametrize(
    "name, neurons, words",
    [("q", 3, "make the model with it"), ("a", 4, "needed its 3 neurons"), ("a", 2, "got 2")],
)
def test_recordings_that_the_model_does_not_know_are_refused(name, neurons, words):
    recs = recordings()
    model, guide = make(("MetaSSM", "DKF", "Gaussian"), recs)
    other = Recordings(
        [Recording(name, np.random.default_rng(0).normal(size=(2, 4, neurons)), bin_width=0.02)]
    )
    calls = (
        lambda: guide.read_in.start(other),
        lambda: guide(other.batch(model.names, dtype=DOUBLE)),
        lambda: model(other.batch(model.names, dtype=DOUBLE)),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"recording '{name}'.*{words}"):
            call()


@pytest.mark.parametrize("kind", concrete(pm.guides.encoders, EmbeddingEncoder))
def test_encoders_do_not_see_padding(kind):
    """Trials of one bin, of several, with a gap: alone, and among longer ones in any padding."""
    torch.manual_seed(0)
    encoder = kind(LATENT, EMBEDDING, 6).double()
    rng = torch.Generator().manual_seed(1)
    frame = torch.randn(1, 5, 7, LATENT, generator=rng, dtype=DOUBLE)
    seen = torch.arange(7) < torch.tensor([1, 2, 7, 5, 3])[:, None]
    seen[3, 2] = seen[4, 1] = False  # a gap; bins without a neighbour
    seen = seen[None, ..., None]
    frame = torch.where(seen, frame, 0.0)
    mean, variance = encoder(frame, seen)
    for k, length in enumerate((1, 2, 7, 5, 3)):
        alone = encoder(frame[:, k : k + 1, :length], seen[:, k : k + 1, :length])
        close(mean[:, k], alone[0][:, 0])
        close(variance[:, k], alone[1][:, 0])
    padded = encoder(functional.pad(frame, (0, 0, 0, 4)), functional.pad(seen, (0, 0, 0, 4)))
    close(padded[0], mean)
    # Every trial's own states matter, those of a single bin too.
    for k in range(5):
        moved = torch.where(seen & (torch.arange(5) == k).view(1, 5, 1, 1), frame + 1, frame)
        assert ((encoder(moved, seen)[0] != mean).any(-1)[0] == (torch.arange(5) == k)).all()


def test_set_encoder_is_its_equation():
    torch.manual_seed(0)
    encoder = SetEncoder(LATENT, EMBEDDING, 6).double()
    frame, seen = torch.randn(1, 1, 5, LATENT, dtype=DOUBLE), torch.ones(1, 1, 5, 1, dtype=torch.bool)
    seen[..., 2, :] = False
    features = [
        torch.cat([frame[0, 0, t], (frame[0, 0, t + 1] - frame[0, 0, t]) / encoder.step_scale])
        for t in (0, 3)
    ]
    hidden = torch.stack([encoder.net(x) for x in features]).mean(0)
    mean, log_variance = encoder.head(hidden).chunk(2)
    close(encoder(frame, seen)[0][0, 0], mean)
    close(encoder(frame, seen)[1][0, 0], log_variance.exp())


def test_embedding_posterior_averages_over_trials_with_data():
    recs = recordings()
    model, guide = make(("MetaSSM", "DKF", "Gaussian"), recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    _, frame, share = guide.common_space(batch)
    statistics = guide.embedding_statistics(frame, share, batch)
    for r, name in enumerate(recs):
        trials = [
            guide.encode_embedding(frame[r : r + 1, k : k + 1], share[r : r + 1, k : k + 1] > 0)
            for k in range(recs[name].num_trials)
        ]
        expected = torch.cat([torch.stack(parts).mean(0)[0, 0] for parts in zip(*trials, strict=True)])
        close(statistics[r], expected)
    q = guide.embedding_posterior(statistics)
    close(q.mean[:, 0], statistics[:, :EMBEDDING])
    close(q.variance[:, 0], statistics[:, EMBEDDING:])


def test_without_data_for_the_guide_the_embedding_has_its_prior():
    """A mini-batch may hold trials of which only held-out neurons were observed."""
    y = np.random.default_rng(0).normal(size=(2, 5, 2))
    y[0, :, 1] = np.nan
    recs = Recordings([Recording("a", y, bin_width=0.02, held_out_neurons=[0]), recordings()["b"]])
    model, guide = make(("MetaSSM", "DKF", "Gaussian"), recs)
    batch = recs.batch(model.names, trials={"a": [0]}, dtype=DOUBLE)
    terms = SequentialELBO().terms(model, guide, batch)
    terms.elbo.backward()
    assert terms.elbo.isfinite() and all(
        p.grad is None or p.grad.isfinite().all() for p in guide.parameters()
    )
    q = poutine.trace(guide).get_trace(batch).nodes["embedding"]["fn"]
    assert (q.mean[0] == 0).all() and (q.variance[0] == 1).all() and (q.mean[1] != 0).all()


def test_detached_embedding_is_learned_from_the_dynamics_alone():
    """With detach_embedding the gradient of log p(y | z) does not reach q(e); without it, it does."""
    recs = recordings()
    for detach in (True, False):
        torch.manual_seed(0)
        model = MetaSSM(recs, **SIZES)
        guide = pm.guides.DKF(model, hidden_dim=5, detach_embedding=detach).eval()
        SequentialELBO().terms(model, guide, recs.batch(model.names)).log_likelihood.backward()
        gradient = guide.encode_embedding.head.weight.grad
        assert (gradient is None or not gradient.any()) == detach


@pytest.mark.parametrize("kind", [MetaSSM, LinearGaussian])
@pytest.mark.parametrize(
    "bad", [{"latent_dim": 0}, {"embedding_dim": 0}, {"latent_dim": 1.5}, {"embedding_dim": -1}]
)
def test_sizes_are_checked(kind, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: needed an integer >= 1"):
        kind(recordings(), **({"latent_dim": 2, "embedding_dim": 1} | bad))


@pytest.mark.parametrize(
    "make_it, words",
    [
        (partial(MetaSSM, latent_dim=2, embedding_dim=1, rank=-1), "rank: needed an integer >= 0"),
        (partial(MetaSSM, latent_dim=2, embedding_dim=1, hidden_dim=0), "hidden_dim"),
    ],
)
def test_sizes_of_meta_ssm_are_checked(make_it, words):
    with pytest.raises(ValueError, match=words):
        make_it(recordings())


@pytest.mark.parametrize(
    "bad", [{"rollout_probability": 1.0}, {"rollout_probability": -0.1}, {"read_in_dim": 1}]
)
def test_dkf_checks_its_arguments(bad):
    model = MetaSSM(recordings(), latent_dim=2, embedding_dim=1)
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: needed"):
        pm.guides.DKF(model, **bad)


def test_roll_outs_are_for_training_only():
    recs = recordings()
    model, guide = make(("MetaSSM", "DKF", "Gaussian"), recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    q = {
        mode: poutine.trace(guide.train(mode)).get_trace(batch).nodes["latents"]["fn"]
        for mode in (True, False)
    }
    assert q[False].rollout is None
    rolled = q[True].rollout
    assert not rolled[..., 0].any() and 0 < rolled[..., 1:].double().mean() < 0.5
    torch.manual_seed(0)
    share = torch.stack([
        poutine.trace(guide.train()).get_trace(batch).nodes["latents"]["fn"].rollout[..., 1:] for _ in range(40)
    ]).double()  # fmt: skip
    assert (share.mean() - 0.2).abs() < 5 * (0.16 / share.numel()) ** 0.5
