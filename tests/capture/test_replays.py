"""Recorded functions against the functions themselves, on an emulation of CUDA graphs: values, gradients, memory."""

import pytest
import torch
from captured_functions import DOUBLE, arguments, gap, gradients, itself, ready, recursion, same
from emulated_cuda import Tape
from torch import Tensor

from pyro_metassm import capture
from pyro_metassm.capture import USES, Captures

# ---- values and gradients ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [recursion, gap, itself])
@pytest.mark.parametrize("grad", [(True, True), (True, False), (False, True), (False, False)])
def test_a_replay_is_the_function(function, grad, cuda):
    own = Captures()
    # Where no gradient reaches an argument that wants one, there is nothing to record.
    fits = function is recursion or grad != (False, True)
    for call in range(USES + 4):
        tensors = arguments(call, grad)
        before = cuda.replays
        y, expected = own(function, *tensors), function(*tensors)
        same(y, expected)
        assert y.requires_grad == expected.requires_grad
        if y.requires_grad:
            same(gradients(y, tensors), gradients(expected, tensors))
        if call >= USES:
            assert cuda.replays == before + fits * (1 + any(grad))
    assert cuda.recorded == fits * (1 + any(grad))
    assert cuda.current is cuda.default


def test_nothing_is_recorded_before_the_third_time(cuda):
    own = Captures()
    for call in range(USES):
        assert cuda.recorded == 0
        own(recursion, *arguments(call))
    assert cuda.recorded == 2


def test_a_recorded_function_is_not_called_again(cuda):
    calls = []

    def counted(x: Tensor, w: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return x @ w

    own, tensors = Captures(), arguments()
    for _ in range(USES + 5):
        gradients(own(counted, *tensors), tensors)
    # Once for the shape, once to warm up, once recorded, once for the check.
    assert calls == [True] * (USES - 1 + 4)


def test_what_a_signature_is_made_of(cuda, monkeypatch):
    monkeypatch.setattr(capture, "KEPT", 9)
    x, w = arguments()
    own = ready(recursion, x, w)
    others = [
        lambda: own(recursion, x[:3], w),
        lambda: own(recursion, x.float(), w.float()),
        lambda: own(recursion, x.detach(), w),
        lambda: own(recursion, x, w, num_steps=2),
        lambda: own(gap, x, w),
    ]
    with torch.no_grad():
        own(recursion, x, w)
    for other in others:
        other()
    assert cuda.recorded == 2 and cuda.replays == 3, "those of the check, and the third call's own"
    for other in others:
        other(), other()
    assert cuda.recorded == 2 * (1 + len(others))


def test_without_gradients_there_is_a_pass_ahead_alone(cuda):
    tensors = arguments()
    own = ready(recursion, *tensors)
    for _ in range(USES + 2):
        with torch.no_grad():
            y = own(recursion, *tensors)
        assert not y.requires_grad
        same(y, recursion(*tensors).detach())
        same(gradients(own(recursion, *tensors), tensors), gradients(recursion(*tensors), tensors))
    assert cuda.recorded == 2 + 1


def test_strides_do_not_matter(cuda):
    x, w = arguments()
    own = ready(recursion, x, w)
    wide = torch.randn(4, 10, dtype=DOUBLE).T[::2].requires_grad_()
    narrow = torch.randn(4, dtype=DOUBLE, requires_grad=True)
    square = torch.randn(1, 4, dtype=DOUBLE, requires_grad=True)
    for a, b, leaves in ((wide, w, [wide, w]), (narrow.expand(5, 4), square.expand(4, 4), [narrow, square])):
        y, expected = own(recursion, a, b), recursion(a, b)
        same(y, expected)
        same(gradients(y, leaves), gradients(expected, leaves))
    assert cuda.recorded == 2


def test_one_tensor_twice_and_one_from_another(cuda):
    _, w = arguments()
    own = ready(recursion, w, w)
    for b in (w, w.sin(), w.T):
        found, expected = own(recursion, w, b), recursion(w, b)
        same(gradients(found, [w], retain_graph=True), gradients(expected, [w]))
    assert cuda.recorded == 2


def test_a_gradient_in_one_argument_alone(cuda):
    x, w = arguments()
    own = ready(recursion, x, w)
    for leaf in (x, w):
        for create_graph in (False, True):
            found, expected = own(recursion, x, w), recursion(x, w)
            options = {"create_graph": create_graph}
            same(*(torch.autograd.grad(y.sum(), leaf, **options)[0] for y in (found, expected)))


def test_second_derivatives(cuda):
    x, w = arguments()
    own = ready(recursion, x, w)
    pairs = []
    for call in (own, lambda function, *tensors: function(*tensors)):
        (first,) = torch.autograd.grad(call(recursion, x @ w, w).square().sum(), w, create_graph=True)
        pairs.append(torch.autograd.grad(first.square().sum(), (x, w)))
    same(*pairs)
    assert cuda.recorded == 2


def test_finite_differences(cuda):
    tensors = arguments()
    own = ready(recursion, *tensors)
    call = lambda *t: own(recursion, *t)
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)
    assert cuda.recorded == 2


# ---- memory that is used again ---------------------------------------------------------------------------------------


def test_what_was_returned_stays_as_it_was(cuda):
    tensors = arguments()
    own = ready(recursion, *tensors)
    y = own(recursion, *tensors)
    grads = gradients(y, tensors)
    kept = [t.detach().clone() for t in (y, *grads)]
    other = arguments(1)
    gradients(own(recursion, *other), other)
    assert all(torch.equal(a, b) for a, b in zip((y, *grads), kept, strict=True))
    y.detach().zero_(), [g.zero_() for g in grads]  # nor does a change of it reach the next
    same(own(recursion, *other), recursion(*other))


def test_gradients_add_up_in_parameters(cuda):
    x, w = arguments()
    own = ready(recursion, x, w)
    for call in range(3):
        own(recursion, arguments(call)[0], w).sum().backward()
    total = sum(torch.autograd.grad(recursion(arguments(call)[0], w).sum(), w)[0] for call in range(3))
    same(w.grad, total)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (1, 0, 2)])
def test_several_calls_before_their_passes_back(order, cuda):
    calls = [arguments(seed) for seed in range(3)]
    own = ready(recursion, *calls[0])
    paths = [own(recursion, *tensors) for tensors in calls]
    for number in order:
        expected = gradients(recursion(*calls[number]), calls[number])
        same(gradients(paths[number], calls[number]), expected)


def test_a_call_in_a_function_of_itself(cuda):
    """As in a recurrent network: the second call's argument is the first call's value."""
    x, w = arguments()
    own = ready(recursion, x, w)
    twice = lambda call: call(recursion, call(recursion, x, w), w)
    plain = lambda function, *tensors: function(*tensors)
    same(gradients(twice(own), (x, w)), gradients(twice(plain), (x, w)))
    assert cuda.recorded == 2


def test_a_second_pass_back(cuda):
    tensors = arguments()
    own = ready(recursion, *tensors)
    y = own(recursion, *tensors)
    expected = gradients(recursion(*tensors), tensors)
    for _ in range(3):
        same(gradients(y, tensors, retain_graph=True), expected)


def test_calls_whose_pass_back_never_comes(cuda):
    tensors, other = arguments(), arguments(1)
    own = ready(recursion, *tensors)
    y = own(recursion, *tensors)
    own(recursion, *other)  # dropped
    z = own(recursion, *other)
    z.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        z.sum().backward()
    before = cuda.replays
    same(gradients(y, tensors), gradients(recursion(*tensors), tensors))
    assert cuda.replays == before + 2
    y = own(recursion, *tensors)
    before = cuda.replays
    same(gradients(y, tensors), gradients(recursion(*tensors), tensors))
    assert cuda.replays == before + 1, "nothing stays behind: its pass ahead is in memory"


def test_an_interrupted_replay_leaves_no_claim(cuda):
    tensors, other = arguments(), arguments(1)
    own = ready(recursion, *tensors)
    (graph,) = own.known.values()
    y, z = own(recursion, *tensors), own(recursion, *other)
    real = graph.back
    graph.back = [lambda: 1 / 0]
    with pytest.raises(ZeroDivisionError):
        gradients(y, tensors)  # whose pass ahead has taken the memory by now
    graph.back = real
    same(gradients(z, other), gradients(recursion(*other), other))


def test_an_argument_that_was_changed_meanwhile_is_an_error(cuda):
    x, w = arguments()
    own = ready(recursion, x, w)
    y = own(recursion, x, w)
    with torch.no_grad():
        w.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(y, (x, w))


def test_a_graph_outlives_its_place_among_the_latest(cuda):
    tensors = arguments()
    own = ready(recursion, *tensors)
    y = own(recursion, *tensors)
    own.known.clear()
    same(gradients(y, tensors), gradients(recursion(*tensors), tensors))


def test_replays_ask_for_nothing_and_launch_little(cuda):
    tensors = arguments()
    (graph,) = ready(recursion, *tensors).known.values()
    with Tape() as tape:  # refuses what waits
        y = capture._Replay.apply(graph, *tensors)
    assert [str(o[0]) for o in tape.operations] == ["aten._foreach_copy_.default", "aten.clone.default"]
    with Tape() as tape:
        torch.autograd.grad(y, tensors, y.detach())
    launched = [str(o[0]) for o in tape.operations if "empty" not in str(o[0]) and "detach" not in str(o[0])]
    assert launched == ["aten.copy_.default", "aten._foreach_copy_.default"]
