"""Adapted MLPs in C against the same in PyTorch: values, gradients, and where each is used."""

import ctypes
import logging
from itertools import pairwise

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


def tensors(
    recordings: int, rows: int, widths: tuple[int, ...], ranks: tuple[int, ...], own: str = ""
) -> list[Tensor]:
    """z, weights and biases in turn, u and v in turn; ``own``: a bit of each weight and bias, 1 where each has one."""
    torch.manual_seed(0)
    sizes = list(pairwise(widths))
    shapes, scales = [(recordings, rows, widths[0])], [0.6]
    for number, (inp, out) in enumerate(sizes):
        bits = own[2 * number : 2 * number + 2] or "00"
        lead, lead_of_bias = (((), (recordings,))[bit == "1"] for bit in bits)
        shapes += [(*lead, out, inp), (*lead_of_bias, out)]
        scales += [inp**-0.5, 0.6]
    for (inp, out), rank in zip(sizes, ranks, strict=False):
        shapes += [(recordings, inp, rank), (recordings, out, rank)]
        scales += [0.6, 0.6]
    return [torch.randn(s, dtype=DOUBLE) * scale for s, scale in zip(shapes, scales, strict=True)]


def values_and_gradients(way, form: mlp.Form, numbers: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.to(dtype).requires_grad_() for t in numbers]
    path = way(form, *leaves)
    weight = torch.linspace(-1, 2, path.numel(), dtype=dtype).view_as(path).cos()
    return [path.detach(), *torch.autograd.grad((path * weight).sum(), leaves)]


CASES = [  # recordings, rows, widths, ranks, then steps, tanh, activation after the last layer, residual, clamp
    ((4, 50, (2, 64, 64, 2), (1, 1)), (1, 0, False, True, None)),
    ((4, 32, (2, 64, 64, 2), (1, 1)), (7, 0, False, True, 1.0)),
    ((3, 17, (3, 20, 33, 3), (2, 3)), (7, 1, False, True, None)),
    ((1, 1, (1, 3, 1), ()), (3, 1, False, False, 0.2)),
    ((2, 5, (5, 17, 33, 9, 5), (2, 3, 1, 2)), (4, 1, True, True, 0.8)),
    ((1, 700, (4, 64, 64), ()), (1, 0, True, False, None)),
    ((40, 3, (24, 50, 24), (1, 6)), (2, 0, True, False, None)),
    ((5, 401, (2, 9, 2), (0,)), (2, 0, False, True, None)),
    ((3, 3, (3, 5, 3), (60,)), (2, 0, False, True, None)),
    ((31, 32, (2, 64, 64, 2), (), "111111"), (3, 0, False, True, 1.0)),
    ((3, 17, (3, 20, 33, 3), (2, 3), "0110"), (7, 1, False, True, None)),
    ((5, 401, (2, 9, 17, 2), (0, 1, 2), "100111"), (2, 0, True, True, 0.8)),
    ((1, 700, (4, 33, 20), (), "1101"), (1, 0, True, False, None)),
    ((40, 3, (24, 50, 24), (), "0110"), (2, 0, False, True, None)),
]


@pytest.mark.parametrize(("sizes", "form"), CASES)
def test_values_and_gradients_are_those_of_pytorch(sizes, form):
    numbers, form = tensors(*sizes), mlp.Form(len(sizes[2]) - 1, *form)
    expected = values_and_gradients(mlp.by_torch, form, numbers, DOUBLE)
    for dtype, tolerance in ((DOUBLE, 1e-10), (torch.float32, 1e-5)):
        found = values_and_gradients(mlp._Kernel.apply, form, numbers, dtype)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == dtype
            assert (ours - theirs).norm() <= tolerance * theirs.norm(), tuple(theirs.shape)


def test_clamped_states_have_the_gradient_of_a_clamp():
    numbers = tensors(2, 40, (2, 6, 2), (1,))
    form = mlp.Form(2, 3, 0, False, True, 0.5)
    path = mlp.by_torch(form, *numbers)
    assert 0.1 < (path.abs() == 0.5).double().mean() < 0.9, "the case has both"
    for way in (mlp.by_torch, mlp._Kernel.apply):
        z = numbers[0].clone().requires_grad_()
        way(form, z, *numbers[1:])[..., 0, :].sum().backward()
        if way is mlp.by_torch:
            expected = z.grad
        else:
            torch.testing.assert_close(z.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [0, 1])
@pytest.mark.parametrize(
    ("ranks", "own", "steps", "clamp"),
    [
        ((), "", 1, None),
        ((1, 2), "", 2, None),
        ((1,), "", 2, 0.7),
        ((), "1111", 2, 0.7),
        ((1,), "0110", 2, None),
    ],
)
def test_gradients_against_finite_differences(activation, ranks, own, steps, clamp):
    leaves = [t.requires_grad_() for t in tensors(2, 3, (2, 3, 2), ranks, own)]
    form = mlp.Form(2, steps, activation, False, True, clamp)
    call = lambda *x: mlp._Kernel.apply(form, *x)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_second_derivatives_where_arguments_depend_on_each_other():
    z, weight, bias = (t.requires_grad_() for t in tensors(1, 4, (2, 2), ()))

    def second(way) -> tuple[Tensor, ...]:
        path = way(mlp.Form(1, 2, 0, True, True, None), z @ weight, weight, bias)
        (first,) = torch.autograd.grad((path**2).sum(), weight, create_graph=True)
        return torch.autograd.grad((first**2).sum(), (z, weight, bias))

    for ours, theirs in zip(second(mlp._Kernel.apply), second(mlp.by_torch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("own", ["", "110111"])
def test_the_number_of_threads_changes_no_bit(own):
    numbers, form = tensors(3, 900, (2, 64, 64, 2), (1, 1), own), mlp.Form(3, 2, 0, False, True, None)
    runs, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(values_and_gradients(mlp._Kernel.apply, form, numbers, torch.float32))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


def test_a_rows_numbers_do_not_depend_on_the_other_rows():
    z, *weights = (t.float() for t in tensors(1, 101, (3, 20, 3), ()))
    form = mlp.Form(2, 3, 0, False, True, None)
    together = mlp._Kernel.apply(form, z, *weights)
    for first, count in ((0, 1), (1, 48), (60, 41)):
        assert torch.equal(
            mlp._Kernel.apply(form, z[:, first : first + count], *weights)[0], together[0, first:][:count]
        )


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("own", ["", "1111"])
def test_nan_stays_in_its_row(dtype, own):
    z, *rest = (t.to(dtype) for t in tensors(2, 60, (2, 20, 2), (1,), own))
    form = mlp.Form(2, 3, 0, False, True, 1.0)
    clean = mlp._Kernel.apply(form, z, *rest)
    z[1, 33, 0] = torch.nan
    z[0, 5, 1] = torch.inf
    z.requires_grad_()
    path = mlp._Kernel.apply(form, z, *rest)
    assert path[1, 33].isnan().all()
    z_grad = torch.autograd.grad(path[..., 0].sum(), z)[0]
    others = torch.ones(2, 60, dtype=torch.bool)
    others[1, 33] = others[0, 5] = False
    assert torch.equal(path[others], clean[others]) and z_grad[others].isfinite().all()


def test_elementary_functions_are_accurate_over_their_range():
    """One layer of one weight: ``s(z)`` itself, and its derivative, to a few roundings."""
    z = torch.cat([torch.linspace(-120, 120, 4001, dtype=DOUBLE), torch.logspace(-12, 0, 500, dtype=DOUBLE)])
    one, zero = torch.ones(1, 1, dtype=DOUBLE), torch.zeros(1, dtype=DOUBLE)
    for kind in (0, 1):
        form = mlp.Form(1, 1, kind, True, False, None)
        for dtype in (DOUBLE, torch.float32):
            x = z.to(dtype)[None, :, None]
            expected = values_and_gradients(mlp.by_torch, form, [x.double(), one, zero], DOUBLE)
            found = values_and_gradients(mlp._Kernel.apply, form, [x, one, zero], dtype)
            eps = torch.finfo(dtype).eps
            # The slope has a factor 1 - sigmoid(z), right to eps / 2, times z: up to 37 before it vanishes.
            for ours, theirs, error in zip(found[:2], expected[:2], (2 * eps, 40 * eps), strict=True):
                torch.testing.assert_close(ours.double(), theirs, rtol=8 * eps, atol=error)


# ---- as the dynamics and the encoders use it ---------------------------------------------------------------


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


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated"
)  # PyTorch's own forward derivatives use it
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
