"""Dynamics and encoders in C against the same in PyTorch, and where each is used."""

import ctypes
import logging

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from pyro_metassm import native
from pyro_metassm.adaptations import (
    GEPSMLP,
    EmbeddingInputMLP,
    FullRankMLP,
    LinearAdapterMLP,
    SessionMLP,
    SharedMLP,
)
from pyro_metassm.dynamics import AdaptedMLP, LowRankMLP, ResidualMLP
from pyro_metassm.native import mlp

DOUBLE = torch.double

pytestmark = pytest.mark.skipif(native._compiler() is None, reason="there is no C compiler here")


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Steps of every call that C answered."""
    made, real = [], mlp.rollout

    def counted(*args, **kwargs):
        path = real(*args, **kwargs)
        if path is not None:
            made.append(kwargs.get("num_steps", 1))
        return path

    monkeypatch.setattr(mlp, "rollout", counted)
    return made


def dynamics(rank: int, residual: bool = True, activation=functional.silu, kind=LowRankMLP) -> ResidualMLP:
    torch.manual_seed(0)
    made = kind(2, 3, rank=rank, hidden_dim=7, residual=residual, activation=activation).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def gradients(value: Tensor, f: nn.Module, *others: Tensor) -> list[Tensor]:
    leaves = [p for p in f.parameters()] + [t for t in others if t.requires_grad]
    found = torch.autograd.grad((value * value).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


SHAPES = [  # of e, of z
    ((3, 1, 3), (3, 5, 4, 2)),
    ((3, 1, 3), (3, 5, 1, 2)),
    ((4, 3, 1, 3), (4, 3, 5, 1, 2)),  # draws
    ((3, 1, 3), (4, 3, 5, 1, 2)),  # draws of the states alone,
    ((4, 3, 1, 3), (3, 5, 1, 2)),  # and of the embedding alone
    ((1, 1, 3), (1, 1, 6, 2)),
    ((1, 1, 3), (5, 1, 2)),
    ((1, 3), (6, 1, 2)),
    ((3,), (1, 2)),
]


KINDS = [
    *((LowRankMLP, rank) for rank in (0, 1, 3)),
    *((kind, 2) for kind in (SharedMLP, EmbeddingInputMLP, LinearAdapterMLP, GEPSMLP, FullRankMLP)),
]


@pytest.mark.parametrize(("kind", "rank"), KINDS)
@pytest.mark.parametrize(("e", "z"), SHAPES)
def test_adapted_dynamics_in_every_shape(kind, rank, e, z, calls, monkeypatch):
    f = dynamics(rank, kind=kind)
    e, z = torch.randn(e, dtype=DOUBLE), torch.randn(z, dtype=DOUBLE, requires_grad=True)
    ways = []
    for setting in ("1", "0"):
        monkeypatch.setenv("METASSM_NATIVE", setting)
        once = f(e)(z)
        results = [once, *([f(e).rollout(z, 3, clamp=1.5)] if z.shape[-2] == 1 else [])]
        ways.append([*results, *(g for result in results for g in gradients(result, f, z))])
    assert len(calls) == 1 + (z.shape[-2] == 1), "C answered, and only where it was allowed to"
    for ours, theirs in zip(*ways, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(2, 5, 1, 2), (4, 2, 5, 1, 2), (4, 2, 5, 6, 2)])
def test_dynamics_of_sessions_in_every_shape(shape, calls, monkeypatch):
    torch.manual_seed(0)
    f, z = SessionMLP(3, 2, hidden_dim=7).double(), torch.randn(shape, dtype=DOUBLE, requires_grad=True)
    rows, ways = torch.tensor([2, 0]), []
    for setting in ("1", "0"):
        monkeypatch.setenv("METASSM_NATIVE", setting)
        once = f(rows)(z)
        results = [once, *([f(rows).rollout(z, 3, clamp=1.5)] if z.shape[-2] == 1 else [])]
        ways.append([*results, *(g for result in results for g in gradients(result, f, z))])
    assert len(calls) == 1 + (z.shape[-2] == 1)
    for ours, theirs in zip(*ways, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [(3, 4, 5), (7, 5), (5,)])
def test_affine_is_pytorchs(shape, calls):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=DOUBLE, requires_grad=True) for s in (shape, (6, 5), (6,))]
    pairs = []
    for way in (mlp.affine, functional.linear):
        y = way(*leaves)
        pairs.append((y, *torch.autograd.grad((y * y).sum(), leaves)))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert calls == [1]


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", [functional.silu, torch.tanh, nn.Tanh(), functional.relu])
def test_rollout_is_the_repeated_call(residual, activation, calls):
    f = dynamics(2, residual, activation)
    e, z = torch.randn(3, 1, 3, dtype=DOUBLE), torch.randn(3, 5, 1, 2, dtype=DOUBLE)
    path, one = f(e).rollout(z, 4), z
    for t in range(4):
        one = f(e)(one)
        torch.testing.assert_close(path[..., t : t + 1, :], one, rtol=1e-12, atol=1e-12)
    assert calls == ([] if activation is functional.relu else [4, 1, 1, 1, 1])


@pytest.mark.parametrize(("shape", "steps"), [((3, 5, 2, 2), 1), ((3, 5, 1, 2), 0), ((2,), 1)])
def test_rollout_says_what_it_needs(shape, steps):
    with pytest.raises(ValueError, match="a roll-out needs"):
        dynamics(1)(torch.zeros(3, 1, 3, dtype=DOUBLE)).rollout(torch.zeros(shape, dtype=DOUBLE), steps)


def test_arguments_that_are_not_contiguous_or_need_no_gradient(calls):
    f = dynamics(1)
    e = torch.randn(3, 1, 3, dtype=DOUBLE)
    updates = [(u.mT.contiguous().mT, v.detach()) for u, v in f.hypernetwork(e)]
    z = torch.randn(2, 5, 4, 3, dtype=DOUBLE).transpose(0, 3)[::1]
    f.layers[1].requires_grad_(False)
    once = AdaptedMLP(f, updates)(z)
    once.sum().backward(retain_graph=True)
    assert calls == [1] and f.layers[1].weight.grad is None
    ours = [p.grad.clone() for p in f.parameters() if p.grad is not None]
    f.zero_grad()
    expected = AdaptedMLP(f, updates)._next(z)
    expected.sum().backward()
    theirs = [p.grad for p in f.parameters() if p.grad is not None]
    torch.testing.assert_close([once, *ours], [expected, *theirs], rtol=1e-10, atol=1e-10)


def test_only_the_states_need_a_gradient():
    f = dynamics(1).requires_grad_(False)
    z = torch.randn(3, 5, 1, 2, dtype=DOUBLE, requires_grad=True)
    adapted = f(torch.randn(3, 1, 3, dtype=DOUBLE))
    (ours,) = torch.autograd.grad(adapted(z).sum(), z)
    (theirs,) = torch.autograd.grad(adapted._next(z).sum(), z)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_rows_and_no_gradient(calls):
    f = dynamics(1)
    adapted = f(torch.randn(3, 1, 3, dtype=DOUBLE))
    assert adapted(torch.zeros(3, 0, 4, 2, dtype=DOUBLE)).shape == (3, 0, 4, 2)
    assert adapted.rollout(torch.zeros(3, 0, 1, 2, dtype=DOUBLE), 5).shape == (3, 0, 5, 2)
    assert calls == []
    with torch.no_grad():
        assert not adapted(torch.zeros(3, 2, 4, 2, dtype=DOUBLE)).requires_grad
    with torch.inference_mode():
        adapted(torch.zeros(3, 2, 4, 2, dtype=DOUBLE))
    assert calls == [1, 1]


def test_sizes_that_c_is_slow_for_are_left_to_pytorch(calls):
    many = LowRankMLP(2, 1)(torch.randn(20, 1, 1))
    z = torch.randn(20, 3, 1, 2)
    torch.testing.assert_close(many(z), many._next(z))
    assert calls == []
    many.rollout(z, 6)
    LowRankMLP(2, 1, hidden_dim=720)(torch.randn(1, 1, 1))(z)
    assert calls == [6]


def test_shapes_that_do_not_fit_are_pytorchs_errors(calls):
    adapted = dynamics(1)(torch.randn(3, 1, 3, dtype=DOUBLE))
    for shape in ((4, 5, 1, 2), (3, 5, 1, 3)):
        with pytest.raises(RuntimeError):
            adapted(torch.zeros(shape, dtype=DOUBLE))
    assert calls == []


# PyTorch's own forward derivatives use it.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_and_forward_derivatives_use_pytorch(calls):
    adapted = dynamics(1)(torch.randn(1, 1, 3, dtype=DOUBLE).detach())
    z = torch.randn(1, 1, 1, 2, dtype=DOUBLE)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        jacobian = transform(lambda x: adapted(x).sum((0, 1, 2)))(z).reshape(2, 2)
        assert calls == []
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, torch.ones_like(z))
        tangent = torch.autograd.forward_ad.unpack_dual(adapted(dual)).tangent
    torch.testing.assert_close(tangent.flatten(), jacobian.sum(-1))
    with torch.autocast("cpu", torch.bfloat16):
        adapted(z)
    with FlopCounterMode(display=False) as counter:
        adapted(z)
    assert counter.get_total_flops() > 0
    assert calls == []
    expected = torch.autograd.functional.jacobian(lambda x: adapted(x).sum((0, 1, 2)), z).reshape(2, 2)
    torch.testing.assert_close(jacobian, expected)
    assert calls == [1]


NETS = [
    (lambda: nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 8), nn.SiLU()), True),
    (lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 1)), True),
    (lambda: nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3), nn.SiLU()), False),
    (lambda: nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 3)), False),
    (lambda: nn.Sequential(nn.Linear(4, 9, bias=False), nn.SiLU()), False),
    (lambda: nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 3)), False),
    (lambda: nn.Sequential(nn.Linear(4, 9)), False),
    (lambda: nn.Sequential(), False),
]


@pytest.mark.parametrize(("make", "ours"), NETS)
def test_plain_networks(make, ours, calls):
    torch.manual_seed(0)
    net, x = make().double(), torch.randn(3, 5, 4, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn_like(net(x))
    for shape in ((3, 5, 4), (15, 4)):
        y, expected = mlp.plain(net, x.reshape(shape)), net(x.reshape(shape))
        leaves = [x, *net.parameters()]
        found = [torch.autograd.grad((v.reshape(weight.shape) * weight).sum(), leaves) for v in (y, expected)]
        torch.testing.assert_close([y, *found[0]], [expected, *found[1]], rtol=1e-10, atol=1e-10)
    assert len(calls) == 2 * ours


def test_hooks_are_called(calls):
    net, seen = nn.Sequential(nn.Linear(4, 9), nn.SiLU()), []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    mlp.plain(net, torch.zeros(2, 4))
    assert seen == [1] and calls == []


def test_without_a_compiler_pytorch_does_the_work(monkeypatch, caplog, calls):
    adapted = dynamics(1)(torch.randn(3, 1, 3, dtype=DOUBLE))
    z = torch.randn(3, 5, 1, 2, dtype=DOUBLE)
    monkeypatch.setattr(native, "_compiler", lambda: None)
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    with caplog.at_level(logging.DEBUG, native.__name__):
        adapted(z)
    assert calls == [] and "found no C compiler" in caplog.text


def test_a_library_that_is_wrong_is_not_used(monkeypatch, caplog, calls):
    class Wrong:
        """Says that there is nothing to do."""

        def sizes(self, problem, n):
            n[:3] = [0, 0, 1]

        def work(self, *_):
            pass

        def finish(self, *_):
            pass

    adapted, z = dynamics(1)(torch.randn(3, 1, 3, dtype=DOUBLE)), torch.randn(3, 5, 1, 2, dtype=DOUBLE)
    monkeypatch.setattr(mlp, "_library", lambda dtype: Wrong())
    monkeypatch.setattr(mlp, "_correct", mlp._correct.__wrapped__)
    adapted(z)
    assert calls == [] and "is not used" in caplog.text


def test_a_changed_header_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, header = tmp_path / "answer.c", tmp_path / "answer.h"
    source.write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    for number in (41, 42):
        header.write_text(f"#define ANSWER {number}\n")
        library = native._load.__wrapped__(source, ())
        assert isinstance(library, ctypes.CDLL) and library.answer() == number
