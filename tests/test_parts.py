"""The parts of models and guides on their own, each against its equation."""

from functools import partial

import numpy as np
import pytest
import torch
from members import DOUBLE, EMBEDDING, LATENT, SIZES, close, concrete, evaluate, make, same, values_for
from problems import recordings
from pyro import poutine
from torch.nn import functional

import pyro_metassm as pm
from pyro_metassm import blocks
from pyro_metassm.dynamics import LowRankMLP
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.guides.encoders import EmbeddingEncoder, SetEncoder, smooth
from pyro_metassm.models import LinearGaussian, MetaSSM
from pyro_metassm.neurons import NeuronTable, ReadIn, ReadOut
from pyro_metassm.products import linear_by_recording, with_first_channels
from pyro_metassm.recordings import Recording, Recordings


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


@pytest.mark.parametrize("size", [1, 60, 10**6])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
@pytest.mark.parametrize("num_neurons", [None, (4, 6, 1)])
def test_linear_by_recording_is_a_loop(num_neurons, lead, size, monkeypatch):
    """In value and gradient, in pieces of any size."""
    monkeypatch.setattr(blocks, "CACHED", size)
    torch.manual_seed(0)
    leaves = [
        torch.randn(s, dtype=DOUBLE, requires_grad=True) for s in ((*lead, 3, 5, 4, 2), (3, 2, 6), (3, 6))
    ]
    x, weight, bias = leaves
    out = linear_by_recording(x, weight, bias, num_neurons)
    expected = torch.stack([x[..., r, :, :, :] @ weight[r] + bias[r] for r in range(3)], -4)
    close(out, expected)
    probe = torch.randn_like(out)
    if num_neurons is not None:  # the rest is padding
        probe *= (torch.arange(6) < torch.tensor(num_neurons)[:, None])[:, None, None]
    for ours, theirs in zip(
        *(torch.autograd.grad((y * probe).sum(), leaves) for y in (out, expected)), strict=True
    ):
        close(ours, theirs)


def test_the_first_channels_are_those_and_so_is_their_gradient():
    x = torch.randn(3, 2, 4, 5, dtype=DOUBLE, requires_grad=True)
    whole, first = with_first_channels(x, 2)
    close(whole, x)
    close(first, x[..., :2])
    for both in ((whole, first), (x, x[..., :2])):
        (found,) = torch.autograd.grad((both[0].sin() ** 2).sum() + (both[1] ** 3).sum(), x)
        expected = (2 * x).sin() + 3 * x**2 * (torch.arange(5) < 2)
        close(found, expected.detach())


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
    assert table.counts(torch.tensor([2, 1])) == (1, 3)
    assert table.counts(torch.tensor([2, 1], device="meta")) is None  # nor would it be read on a GPU


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
    ybar, share = read_in(batch)
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
    assert np.isclose(read_in.scale[0].item(), np.sqrt(np.nanvar(y[..., [0, 2]], (0, 1)).mean()), rtol=1e-5)
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


@pytest.mark.parametrize("leave_out", [False, True])
def test_recordings_with_kernels_of_their_own_are_smoothed_as_each_alone(leave_out):
    # Double precision: what is far from all that is seen is a ratio of small numbers.
    x, weight = torch.randn(4, 3, 20, 2).double(), (torch.rand(4, 3, 20, 1) > 0.2).double()
    widths = [1.0, 3.0, 0.0, 1.0]
    found = smooth(x, weight, widths, leave_out=leave_out)
    for r, width in enumerate(widths):
        if width or not leave_out:
            alone = smooth(x[r : r + 1], weight[r : r + 1], width, leave_out=leave_out)[0]
            seen = (
                weight[r].bool().expand_as(alone) if not width else torch.ones_like(alone, dtype=torch.bool)
            )
            torch.testing.assert_close(found[r][seen], alone[seen])
    same = smooth(x, weight, [2.0] * 4, leave_out=leave_out)
    assert torch.equal(same, smooth(x, weight, 2.0, leave_out=leave_out))


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
    "bad",
    [{"rollout_probability": 1.0}, {"rollout_probability": -0.1}, {"read_in_dim": 1}]
    + [{"neuron_dropout": share} for share in (1.0, -0.1)],
)
def test_dkf_checks_its_arguments(bad):
    model = MetaSSM(recordings(), latent_dim=2, embedding_dim=1)
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: needed"):
        pm.guides.DKF(model, **bad)


def test_roll_outs_are_for_training_only():
    """Of the guide and of the model, whose dynamics they teach."""
    recs = recordings()
    model, guide = make(("MetaSSM", "DKF", "Gaussian"), recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    for modes in ((False, True), (True, False), (False, False)):
        model.train(modes[0]), guide.train(modes[1])
        assert poutine.trace(guide).get_trace(batch).nodes["latents"]["fn"].rollout is None
    model.train(), guide.train()
    rolled = poutine.trace(guide).get_trace(batch).nodes["latents"]["fn"].rollout
    assert not rolled[..., 0].any() and 0 < rolled[..., 1:].double().mean() < 0.5
    torch.manual_seed(0)
    share = torch.stack([
        poutine.trace(guide.train()).get_trace(batch).nodes["latents"]["fn"].rollout[..., 1:] for _ in range(40)
    ]).double()  # fmt: skip
    assert (share.mean() - 0.2).abs() < 5 * (0.16 / share.numel()) ** 0.5
