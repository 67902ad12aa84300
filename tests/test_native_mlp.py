"""Adapted MLPs in C against the same in PyTorch: values and gradients."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pyro_metassm import native
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
