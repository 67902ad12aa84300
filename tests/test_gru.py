"""The recurrent encoder against PyTorch's own and finite differences, in each of the ways in which it is computed."""

import copy
import pickle
import platform
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pyro_metassm import native
from pyro_metassm.guides import gru
from pyro_metassm.guides.gru import BidirectionalGRU
from pyro_metassm.native import gru as compiled_gru

Way = Callable[..., Tensor]
needs_compiler = pytest.mark.skipif(compiled_gru.library(torch.float32) is None, reason="no C compiler")
WAYS = {"loop": gru.by_loop, "torch": gru.by_torch, "compiled": compiled_gru.Workspace()}


@pytest.fixture(params=[pytest.param(n, marks=needs_compiler) if n == "compiled" else n for n in WAYS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """One of the ways; the module takes no other."""
    chosen = WAYS[request.param]
    monkeypatch.setattr(BidirectionalGRU, "_way", lambda self, *tensors: chosen)
    return chosen


def problem(
    rows, steps, in_dim, hidden, out, dtype=torch.double, seed=0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Leaves ``[x, V, c, W, b, O]`` with gradients, unequal lengths, and weights of the output, zero in padding."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (rows, steps, in_dim),
        (2, in_dim, 3 * hidden),
        (2, 3 * hidden),
        (2, hidden, 3 * hidden),
        (2, hidden),
    ]
    leaves = [torch.randn(s, generator=generator, dtype=torch.double) for s in (*shapes, (2, hidden, out))]
    leaves[3] *= hidden**-0.5
    lengths = torch.randint(1, steps + 1, (rows,), generator=generator)
    inside = (torch.arange(steps) < lengths[:, None]).unsqueeze(-1)
    weight = torch.randn(rows, steps, out, generator=generator, dtype=torch.double) * inside
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], lengths, weight.to(dtype)


def value_and_gradients(way: Way, leaves: list[Tensor], lengths: Tensor, weight: Tensor) -> list[Tensor]:
    y = way(leaves[0], lengths, *leaves[1:])
    return [
        y * (weight != 0),
        *torch.autograd.grad((y * weight).sum(), [t for t in leaves if t.requires_grad]),
    ]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Up to rounding, relative to the largest of each."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=0, atol=tolerance * max(1.0, b.abs().max().item())
        )


def reference(ours: BidirectionalGRU) -> list[nn.GRU]:
    """Two PyTorch GRUs with the same weights."""
    hidden = ours.weight_hidden.shape[1]
    twins = []
    for d in range(2):
        twin = nn.GRU(ours.weight_in.shape[1], hidden, batch_first=True, dtype=ours.weight_in.dtype)
        with torch.no_grad():
            twin.weight_ih_l0.copy_(ours.weight_in[d].mT)
            twin.weight_hh_l0.copy_(ours.weight_hidden[d].mT)
            twin.bias_ih_l0.copy_(ours.bias_in[d])
            twin.bias_hh_l0.zero_()
            twin.bias_hh_l0[2 * hidden :].copy_(ours.bias_hidden[d])
        twins.append(twin)
    return twins


@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 4, 1]])
def test_equals_two_gru_of_pytorch_in_value_and_gradient(way, lengths):
    torch.manual_seed(0)
    ours = BidirectionalGRU(3, 5, 4).double()
    x = torch.randn(3, 7, 3, dtype=torch.double, requires_grad=True)
    weight = torch.randn(3, 7, 4, dtype=torch.double)
    inside = torch.arange(7) < torch.tensor(lengths)[:, None]
    out = ours(x, torch.tensor(lengths))
    grads = torch.autograd.grad((out * weight * inside[..., None]).sum(), [x, *ours.parameters()])

    ahead, back = reference(ours)
    w_leaf = ours.weight_out.detach().clone().requires_grad_()
    w_out = w_leaf * 10**-0.5
    rows = []
    for row, length in enumerate(lengths):
        trial = x[row : row + 1, :length]
        rows.append((ahead(trial)[0] @ w_out[0] + back(trial.flip(1))[0].flip(1) @ w_out[1])[0])
    total = sum((r * weight[i, : lengths[i]]).sum() for i, r in enumerate(rows))
    leaves = [x, *(p for g in (ahead, back) for p in g.parameters()), w_leaf]
    expected = torch.autograd.grad(total, leaves)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out[row, :length], rows[row], rtol=0, atol=1e-12)
    torch.testing.assert_close(grads[0], expected[0], rtol=0, atol=1e-10)
    stacked = [torch.stack([a, b]) for a, b in zip(expected[1:5], expected[5:9], strict=True)]
    torch.testing.assert_close(grads[1], stacked[0].mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(grads[2], stacked[1].mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(grads[3], stacked[2], rtol=0, atol=1e-10)
    torch.testing.assert_close(grads[4], stacked[3][:, 10:], rtol=0, atol=1e-10)
    torch.testing.assert_close(grads[5], expected[9], rtol=0, atol=1e-10)


def test_backward_against_finite_differences(way):
    leaves, lengths, weight = problem(3, 4, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda x, *w: way(x, lengths, *w) * weight, leaves)


# Rows and widths beside and beyond the tiles and the vectors of every processor, and one of each.
SIZES = [
    (1, 1, 1, 1, 1),
    (1, 9, 3, 5, 2),
    (9, 1, 2, 17, 3),
    (41, 6, 19, 16, 4),
    (70, 5, 33, 40, 19),
    (8, 3, 1, 65, 33),
]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.double, 1e-10), (torch.float, 1e-5)])
def test_ways_agree_at_any_size(way, sizes, dtype, tolerance):
    leaves, lengths, weight = problem(*sizes, dtype=dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = value_and_gradients(gru.by_loop, exact, lengths, weight.double())
    assert_same(value_and_gradients(way, leaves, lengths, weight), expected, tolerance)


@needs_compiler
def test_padding_is_walked_as_the_loop_walks_it():
    leaves, lengths, _ = problem(5, 6, 3, 4, 2)
    weight = torch.ones(5, 6, 2, dtype=torch.double)
    expected = value_and_gradients(gru.by_loop, leaves, lengths, weight)
    assert_same(value_and_gradients(WAYS["compiled"], leaves, lengths, weight), expected, 1e-12)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are names of x86 processors")
@pytest.mark.parametrize("processor", ["x86-64", "haswell"])
def test_processors_with_shorter_vectors(monkeypatch, processor):
    if processor == "haswell" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(native, "MACHINE", (f"-march={processor}",))
    compiled = native._load.__wrapped__(compiled_gru.SOURCE, ("BITS=64",))
    monkeypatch.setattr(compiled_gru, "library", lambda dtype: compiled)
    for sizes in SIZES:
        args = problem(*sizes)
        assert_same(
            value_and_gradients(WAYS["compiled"], *args), value_and_gradients(gru.by_loop, *args), 1e-10
        )


def test_elementary_functions_are_right_from_end_to_end(way):
    """One unit whose gates saturate: no input is too large, and small ones keep their digits."""
    size = torch.tensor([0.0, 1e-12, 1e-6, 1e-3, 0.3, 1.0, 9.0, 40.0, 90.0, 800.0, 1e5], dtype=torch.float)
    x = torch.cat([-size, size])[:, None, None]
    for gate in range(3):
        weight_in, bias_in = torch.zeros(2, 1, 3), torch.zeros(2, 3)
        weight_in[:, :, gate] = 1.0
        bias_in[:, 2] += gate != 2  # something for the gates to scale
        rest = (weight_in, bias_in, torch.zeros(2, 1, 3), torch.ones(2, 1), torch.ones(2, 1, 1))
        lengths = torch.ones(len(x), dtype=torch.int64)
        exact = gru.by_loop(x.double(), lengths, *(w.double() for w in rest))
        torch.testing.assert_close(way(x, lengths, *rest).double(), exact, rtol=1e-6, atol=1e-7)


def test_layout_of_memory_does_not_matter(way):
    leaves, lengths, weight = problem(5, 6, 3, 4, 2)
    expected = value_and_gradients(way, leaves, lengths, weight)
    turned = [leaf.detach().mT.contiguous().mT.requires_grad_() for leaf in leaves]
    assert not turned[0].is_contiguous()
    assert_same(value_and_gradients(way, turned, lengths, weight.mT.contiguous().mT), expected, 1e-12)
    y = way(leaves[0], lengths, *leaves[1:])
    found = torch.autograd.grad(y.sum(), leaves)  # the gradient of a sum is one number, expanded
    assert_same([*found], value_and_gradients(way, leaves, lengths, torch.ones_like(weight))[1:], 1e-12)


@pytest.mark.parametrize("wanted", [[0], [1, 2, 3, 4, 5], [3], [5], []])
def test_gradients_that_nobody_wants(way, wanted):
    leaves, lengths, weight = problem(5, 6, 3, 4, 2)
    y, *grads = value_and_gradients(way, leaves, lengths, weight)
    some = [leaf.detach().requires_grad_(k in wanted) for k, leaf in enumerate(leaves)]
    if wanted:
        assert_same(value_and_gradients(way, some, lengths, weight), [y, *(grads[k] for k in wanted)], 1e-12)
    else:
        assert not way(some[0], lengths, *some[1:]).requires_grad
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert_same([way(leaves[0], lengths, *leaves[1:]) * (weight != 0)], [y], 1e-12)


def test_nan_stays_in_its_row(way):
    leaves, _, weight = problem(11, 5, 3, 4, 2)
    lengths, rows = torch.full((11,), 5), torch.arange(11) != 4
    clean = value_and_gradients(way, leaves, lengths, weight)
    with torch.no_grad():
        leaves[0][4, 2, 1] = torch.nan
    found = value_and_gradients(way, leaves, lengths, weight)
    for a, b in zip(found[:2], clean[:2], strict=True):
        torch.testing.assert_close(a[rows], b[rows], rtol=0, atol=0)
        assert a[4].isnan().any()
    assert all(g.isnan().any() for g in found[2:]), "a gradient of weights that saw NaN says so"


def test_graphs_may_live_side_by_side_and_be_used_again(way):
    one, two = problem(5, 6, 3, 4, 2), problem(7, 4, 3, 5, 2, seed=1)
    expected = [value_and_gradients(way, *each)[1:] for each in (one, two)]
    losses = [(way(leaves[0], lengths, *leaves[1:]) * w).sum() for leaves, lengths, w in (one, two)]
    first = torch.autograd.grad(losses[0], one[0], retain_graph=True)  # the older first, and then once more
    second = torch.autograd.grad(losses[1], two[0])
    value_and_gradients(way, *problem(9, 9, 3, 4, 2))  # takes the memory that has come free
    again = torch.autograd.grad(losses[0], one[0])
    for found, e in ((first, expected[0]), (second, expected[1]), (again, expected[0])):
        assert_same([*found], e, 1e-14)


def test_weights_changed_before_backward_are_noticed(way):
    leaves, lengths, weight = problem(5, 6, 3, 4, 2)
    loss = (way(leaves[0], lengths, *leaves[1:]) * weight).sum()
    with torch.no_grad():
        leaves[5].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_compiler
def test_results_do_not_depend_on_the_number_of_threads(monkeypatch):
    results = []
    for number in (1, 2, 5):
        monkeypatch.setattr(torch, "get_num_threads", lambda number=number: number)
        results.append(value_and_gradients(WAYS["compiled"], *problem(130, 7, 5, 9, 3)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_compiler
def test_one_network_in_several_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    workspace, each = compiled_gru.Workspace(), [problem(40, 9, 3, 8, 2, seed=k) for k in range(4)]
    expected = [value_and_gradients(gru.by_loop, *p) for p in each]
    errors: list[BaseException] = []

    def check(k: int) -> None:
        try:
            for _ in range(10):
                assert_same(value_and_gradients(workspace, *each[k]), expected[k], 1e-10)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=check, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@needs_compiler
def test_memory_is_used_again_and_not_copied():
    network = BidirectionalGRU(3, 4, 2)
    x, lengths = torch.randn(5, 6, 3), torch.full((5,), 6)
    places = set()
    for _ in range(3):
        network(x, lengths).sum().backward()
        (memory,) = network._workspace._free
        places.add(memory.data_ptr())
    assert len(places) == 1
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert not other._workspace._free
        assert torch.equal(other(x, lengths), network(x, lengths))
    assert list(network.state_dict()) == [name for name, _ in network.named_parameters()]
