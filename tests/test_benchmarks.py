"""The benchmarks: the baselines compute what the library computes, the scripts run, the arithmetic is counted right."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pyro
import pytest
import torch
from members import close
from pyro import poutine
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pyro_metassm.dynamics import AdaptedMLP, LowRankMLP
from pyro_metassm.elbo import SequentialELBO

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))  # as when its scripts are run
import _cases
import intervals
import scaling
import svi_step
import time_to_quality
from _flop import products
from _loop import Loop
from _networks import Networks
from _pyro_sites import PyroSites

DOUBLE = torch.float64


@torch.no_grad()
def copy_weights(net: Networks, model, guide) -> None:
    """The library's weights, in the baselines' own form: its data are complete, so that every share is 1."""
    table, read_in = model.neurons, guide.read_in
    for row, name in enumerate(table.names):
        rows = table.slice(name)
        weight = read_in.weight[rows] / (read_in.scale[rows, None] * table.num_neurons[row] ** 0.5)
        net.read_in[row].weight.copy_(weight.mT)
        net.read_in[row].bias.copy_(read_in.bias[row] - read_in.center[rows] @ weight)
        net.read_out[row].weight.copy_(model.read_out.weight[rows])
        net.read_out[row].bias.copy_(model.read_out.bias[rows])
        net.log_sd[row].copy_(model.observation.log_sd[rows])
    linear, norm = guide.common[0], guide.common[1]
    net.common[0].weight.copy_(linear.weight[:, :-1])
    net.common[0].bias.copy_(linear.bias + linear.weight[:, -1])
    net.common[1].load_state_dict(norm.state_dict())
    net.set_net.load_state_dict(guide.encode_embedding.net.state_dict())
    net.set_head.load_state_dict(guide.encode_embedding.head.state_dict())
    net.step_scale.copy_(guide.encode_embedding.step_scale)
    rnn = guide.rnn
    for direction, suffix in enumerate(("", "_reverse")):
        getattr(net.rnn, f"weight_ih_l0{suffix}").copy_(rnn.weight_in[direction].mT)
        getattr(net.rnn, f"weight_hh_l0{suffix}").copy_(rnn.weight_hidden[direction].mT)
        getattr(net.rnn, f"bias_ih_l0{suffix}").copy_(rnn.bias_in[direction])
        bias = getattr(net.rnn, f"bias_hh_l0{suffix}").zero_()
        bias[-rnn.bias_hidden.shape[-1] :] = rnn.bias_hidden[direction]
    net.head.weight.copy_(torch.cat(tuple(rnn.weight_out)).mT * rnn.scale_out)
    net.head.bias.copy_(rnn.bias_out)
    mlp, dynamics = model.dynamics, net.dynamics
    layers = (dynamics.layer_in, dynamics.layer_hidden, dynamics.layer_out)
    for mine, theirs in zip(layers, mlp.layers, strict=True):
        mine.load_state_dict(theirs.state_dict())
    for part in ("trunk", "u", "v"):
        getattr(dynamics, part).load_state_dict(getattr(mlp.hypernetwork, part).state_dict())
    net.initial_loc.copy_(model.initial.loc)
    net.initial_log_scale.copy_(model.initial.log_scale)
    net.log_noise.copy_(model.process_noise.log_scale)


class Draw:
    """A draw of the library's guide on some trials, its ELBO, and the noise behind the draw."""

    def __init__(self, case: _cases.Case):
        torch.manual_seed(0)
        self.arrays = _cases.data(case)
        trainer = _cases.library(case, _cases.recordings(self.arrays))
        self.model, self.guide = trainer.model.double(), trainer.guide.double()
        with torch.no_grad():  # away from where they start: some start at zero
            for parameter in (*self.model.parameters(), *self.guide.parameters()):
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.trials = torch.tensor([[2, 0], [1, 3]])
        chosen = dict(zip(trainer.recs.names, self.trials.numpy(), strict=True))
        batch = trainer.recs.batch(self.model.names, trials=chosen, dtype=DOUBLE)
        with pyro.validation_enabled(False):
            torch.manual_seed(1)
            nodes = poutine.trace(self.guide).get_trace(batch).nodes
            torch.manual_seed(1)  # the same draw again
            self.elbo = SequentialELBO().terms(self.model, self.guide, batch).elbo
        e, q = nodes["embedding"], nodes["latents"]["fn"]
        self.e, self.z = e["value"].detach(), nodes["latents"]["value"].detach()
        self.rollout = torch.zeros(self.z.shape[:-1], dtype=torch.bool) if q.rollout is None else q.rollout
        with torch.no_grad():
            self.noise_e = (self.e - e["fn"].base_dist.loc) / e["fn"].base_dist.scale
            mean = self.model.adapt_dynamics(self.e)(self.z)[..., :-1, :]
            shock = nn.functional.pad((self.z[..., 1:, :] - mean) / self.model.process_noise(), (0, 0, 1, 0))
            self.noise_z = torch.where(self.rollout.unsqueeze(-1), shock, (self.z - q.loc) / q.scale)

    def give(self, baseline):
        """A baseline with the library's weights."""
        copy_weights(baseline.networks.double(), self.model, self.guide)
        baseline.data = [y.double() for y in baseline.data]
        return baseline


@pytest.mark.parametrize("rollout_probability", [0.0, 0.5])
@pytest.mark.parametrize("rank", [1, 2])
def test_the_loop_computes_the_librarys_elbo_and_gradient(rollout_probability, rank):
    case = replace(_cases.TINY, rollout_probability=rollout_probability, rank=rank, embedding_dim=2)
    draw = Draw(case)
    loop = draw.give(Loop(case, draw.arrays))
    batch = [y[trials] for y, trials in zip(loop.data, draw.trials, strict=True)]
    noise = list(zip(draw.noise_e[:, 0], draw.noise_z, draw.rollout, strict=True))
    elbo = loop.elbo(batch, noise)
    close(elbo, draw.elbo)
    # Weights that both have in the same form take the same gradient.
    net, model, guide = loop.networks, draw.model, draw.guide
    mine = [net.dynamics.layer_hidden.weight, net.dynamics.u[1].weight, net.log_noise, net.read_out[1].bias]
    mine += [net.set_head.weight, net.rnn.weight_hh_l0_reverse, net.common[1].weight]
    library = [model.dynamics.layers[1].weight, model.dynamics.hypernetwork.u[1].weight]
    library += [model.process_noise.log_scale, model.read_out.bias, guide.encode_embedding.head.weight]
    library += [guide.rnn.weight_hidden, guide.common[1].weight]
    theirs = list(torch.autograd.grad(draw.elbo, library))
    theirs[3], theirs[5] = theirs[3][model.neurons.slice("r1")], theirs[5][1].mT
    for one, other in zip(torch.autograd.grad(elbo, mine), theirs, strict=True):
        close(one, other, atol=1e-8)


@pytest.mark.parametrize("rollout_probability", [0.0, 0.5])
def test_a_site_for_every_time_step_computes_the_librarys_elbo(rollout_probability):
    case = replace(_cases.TINY, rollout_probability=rollout_probability)
    draw = Draw(case)
    sites = draw.give(PyroSites(case, draw.arrays))
    trace = poutine.Trace()
    for r, (e, z) in enumerate(zip(draw.e[:, 0], draw.z, strict=True)):
        values = {f"e_{r}": e} | {f"z_{r}_{t}": z[:, t] for t in range(case.num_bins)}
        for name, value in values.items():
            trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    given = poutine.replay(sites.guide, trace=trace)
    batch = list(zip(draw.trials, draw.rollout, strict=True))
    with pyro.get_param_store().scope(sites.store):
        loss = sites.svi.loss(sites.model, given, batch)
    close(torch.tensor(-loss, dtype=DOUBLE), draw.elbo.detach())


def forward_and_backward(function, *inputs: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*inputs).sum().backward()
    return counter.get_total_flops()


def test_arithmetic_is_what_pytorch_counts():
    """Part by part, on networks that PyTorch's counter sees through."""
    case = replace(_cases.TINY, num_neurons=(7, 7), rank=3, embedding_dim=2, rollout_probability=0.25)
    expected, net = products(case), Networks(case)
    y = torch.randn(case.trials_per_step, case.num_bins, 7)
    rows = torch.randn(2 * case.trials_per_step, case.num_bins, case.read_in_dim, requires_grad=True)
    z, moves = rows[..., : case.latent_dim], case.num_bins - 1
    assert expected["read_in"] == 2 * forward_and_backward(net.read_in[0], y)
    assert expected["read_out"] == forward_and_backward(net.read_out[0], z)
    assert expected["common"] == forward_and_backward(net.common, rows)
    assert expected["embedding"] == forward_and_backward(lambda x: torch.cat(net.embedding(x)), rows)
    states = torch.randn(*rows.shape[:2], 2 * case.recurrent_dim, requires_grad=True)
    assert expected["recurrent_out"] == forward_and_backward(net.head, states)
    inputs = torch.randn(*rows.shape[:2], net.rnn.input_size, requires_grad=True)
    # PyTorch does not go back into the first state, which is zero: a share of 1 / bins of one product in three.
    skipped = 2 * 2 * rows.shape[0] * case.recurrent_dim * 3 * case.recurrent_dim
    assert expected["recurrent"] - skipped == forward_and_backward(lambda x: net.rnn(x)[0], inputs)
    mlp = LowRankMLP(case.latent_dim, case.embedding_dim, rank=case.rank, hidden_dim=case.hidden_dim)
    hypernetwork = mlp.hypernetwork(torch.randn(2, 1, case.embedding_dim))
    leaves = [tuple(weight.detach().requires_grad_() for weight in update) for update in hypernetwork]
    z = torch.randn(2, case.trials_per_step, moves, case.latent_dim, requires_grad=True)
    assert expected["dynamics"] == forward_and_backward(AdaptedMLP(mlp, leaves), z)
    assert expected["roll_outs"] == 0.25 * expected["dynamics"]


def test_arithmetic_of_the_parts_is_that_of_a_whole_step():
    """The baseline builds adapted matrices where the library applies their factors; else nothing is missing."""
    case = replace(_cases.TINY, num_bins=40, rank=1, rollout_probability=0.0)
    loop = Loop(case, _cases.data(case))
    batch = [y[: case.trials_per_step] for y in loop.data]
    counted = forward_and_backward(lambda: loop.elbo(batch, [loop.draw(y) for y in batch]))
    assert sum(products(case).values()) == pytest.approx(counted, rel=0.1)


def test_svi_step_writes_what_it_promises(tmp_path, capsys):
    file = tmp_path / "bench" / "step.json"
    svi_step.main(["--case", "tiny", "--repeats", "2", "--threads", "1", "--json", str(file)])
    written = json.loads(file.read_text())["tiny"]
    for name in ("library_ms", "loop_ms", "pyro_sites_ms", "flop", "matmul_gflops"):
        assert written[name] > 0, name
    assert written["flop"] == sum(products(_cases.TINY).values())
    assert "pyro_sites" in capsys.readouterr().out
    assert not pyro.get_param_store().keys()


def test_baselines_left_out_are_null(tmp_path):
    file = tmp_path / "step.json"
    arguments = ["--case", "tiny", "--repeats", "1", "--threads", "1", "--skip", "loop", "pyro_sites"]
    svi_step.main([*arguments, "--json", str(file)])
    assert json.loads(file.read_text())["tiny"]["pyro_sites_ms"] is None


def test_time_to_quality_watches_a_fit(tmp_path, capsys):
    file = tmp_path / "quality.json"
    short = ["--num-steps", "3", "--warm-start-steps", "2", "--num-trials", "8", "--every", "2"]
    plain = ["--plain", "--plain-steps", "11", "--plain-seconds", "100", "--target", "2"]
    time_to_quality.main([*short, *plain, "--seeds", "0", "--json", str(file)])
    default, recipe = json.loads(file.read_text())
    assert [step for step, _, _ in default["scores"]] == [0, 2] and default["seconds"] is None
    assert [step for step, _, _ in recipe["scores"]] == [10]
    assert default["end_r2"] < 1 and default["end_seconds"] > default["scores"][-1][1] > 0
    assert "not reached, best r2" in capsys.readouterr().out


def test_intervals_are_measured_in_three_ways(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(intervals, "VELOCITIES", (2.5, 5.0))
    file = tmp_path / "intervals.json"
    short = ["--num-steps", "2", "--warm-start-steps", "2", "--num-trials", "6", "--num-samples", "19"]
    intervals.main([*short, "--num-simulations", "1", "--seeds", "3", "--json", str(file)])
    first, *others = json.loads(file.read_text())
    assert "embedding" in first and all("embedding" not in other for other in others)
    for result in (first, *others):
        for mean, error in (result["latents"], result["rates"]):
            assert 0 <= mean[0] <= mean[1] <= 1 and min(error) >= 0
    assert "world, held-out trials" in capsys.readouterr().out


def test_scaling_measures_steps_and_draws():
    step = scaling.measure("step", 1, _cases.TINY, 1, 0.0)
    assert step["ms"] > 0
    for what in ("posterior", "forecast"):
        drawn = scaling.measure(what, 3, _cases.TINY, 1, 0.0)
        assert drawn["draws_per_s"] > 0 and drawn["working_mb"] < drawn["budget_mb"]
        assert "draws/s" in scaling.table(what, [(3, drawn), (3, drawn)])
    titles = scaling.points(quick=True)
    cases = [case for title, rows in titles.items() if "recordings" in title for _, _, case in rows]
    assert {case.num_recordings * case.trials_per_step for case in cases} == {128}
