"""Recorded functions against the functions themselves, on an emulation of CUDA graphs.

The emulation stands in for ``torch.cuda``, on the CPU, and is as unkind as the real one: a replay repeats the
operations on the memory that they were recorded with, a recording computes nothing, and graphs that share their memory
write over each other's.
"""

import copy
import inspect
import logging
import pickle
import threading
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import pyro_metassm as pm
from pyro_metassm import adaptations, capture
from pyro_metassm.capture import KEPT, USES, Captures, captures
from pyro_metassm.dynamics import AdaptedMLP, LowRankMLP, Network, ResidualMLP

DOUBLE = torch.double
CPU = torch.device("cpu")


# ---- CUDA graphs on the CPU ------------------------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """The operations under it, with the very tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple] = []
        self.made: list[Tensor] = []  # memory that the operations took

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given, out = (tensors_of(x) for x in ((args, kwargs), result))
        known = {t.untyped_storage().data_ptr() for t in given}
        self.made += [t for t in out if t.untyped_storage().data_ptr() not in known]
        operation = (function, args, kwargs, result)
        self.operations.append(tree_map(lambda x: x.data if isinstance(x, Tensor) else x, operation))
        return result

    def play(self) -> None:
        for function, args, kwargs, result in self.operations:
            for old, new in zip(tensors_of(result), tensors_of(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or in place
                    old.copy_(new)


def tensors_of(tree) -> list[Tensor]:
    """Their memory: without a count of its changes, which a GPU does not know of."""
    return [x.data for x in tree_leaves(tree) if isinstance(x, Tensor)]


class Stream:
    def __init__(self, device: torch.device):
        self.device, self.waits_for = device, []

    def wait_stream(self, other: "Stream") -> None:
        self.waits_for.append(other)


class Cuda:
    """What is used of ``torch.cuda``, and a count of it."""

    def __init__(self) -> None:
        self.default = self.current = Stream(CPU)
        self.pools: list[list[Graph]] = []
        self.recorded = self.replays = 0
        self.fails = ""  # what a recording says

    def current_stream(self, device):
        return self.current

    def default_stream(self, device):
        return self.default

    def Stream(self, device):
        return Stream(device)

    def graph_pool_handle(self):
        self.pools.append([])
        return self.pools[-1]

    def CUDAGraph(self):
        return Graph(self)

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        inspect.signature(torch.cuda.graphs.graph.__init__).bind(
            None, graph, pool=pool, stream=stream, capture_error_mode=capture_error_mode
        )
        assert self.current is self.default and stream is not self.default, "one at a time"
        assert stream.waits_for[-1] is self.default, "what it reads has been computed"
        self.current = stream  # and stays so if the recording fails, as with the real one
        with graph.tape:
            yield
        if self.fails:
            raise RuntimeError(self.fails)
        self.current = self.default
        self.recorded += 1
        pool.append(graph)
        graph.pool, graph.stream = pool, stream
        spoil(graph.tape.made)  # nothing was computed


class Graph:
    def __init__(self, cuda: Cuda):
        self.cuda, self.tape = cuda, Tape()

    def replay(self) -> None:
        assert self.cuda.current is self.cuda.default
        assert self.stream in self.cuda.default.waits_for, "its memory is there"
        here = self.pool.index(self)
        with torch.no_grad(), _disable_current_modes():
            for later in self.pool[here + 1 :]:
                spoil(later.tape.made)
            self.tape.play()
            for earlier in self.pool[:here]:
                spoil(earlier.tape.made)
        self.cuda.replays += 1


def spoil(memory: list[Tensor]) -> None:
    with torch.no_grad():
        for t in memory:
            t.fill_(torch.nan if t.is_floating_point() else 0)


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    fake = Cuda()
    names = [
        "current_stream",
        "default_stream",
        "Stream",
        "graph_pool_handle",
        "CUDAGraph",
        "stream",
        "graph",
    ]
    for name in names:
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(capture, "DEVICE", "cpu")
    monkeypatch.setattr(capture, "_stream", capture._stream.__wrapped__)
    monkeypatch.setenv("METASSM_NATIVE", "0")  # C would answer first
    monkeypatch.delenv("METASSM_CUDA_GRAPHS", raising=False)
    return fake


# ---- functions -------------------------------------------------------------------------------------------------------


def recursion(x: Tensor, w: Tensor, *, num_steps: int = 3) -> Tensor:
    """Its gradient needs every state, so that nothing of the pass ahead may be lost."""
    for _ in range(num_steps):
        x = torch.tanh(x @ w) + 0.1 * x**2
    return x


def gap(x: Tensor, unused: Tensor, *, num_steps: int = 1) -> Tensor:
    return (x.T * num_steps).exp().T


def itself(x: Tensor, w: Tensor) -> Tensor:
    return x


def arguments(seed: int = 0, grad: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = (5, 4), (4, 4)
    return [(0.5 * torch.randn(s, dtype=DOUBLE)).requires_grad_(g) for s, g in zip(shapes, grad, strict=True)]


def ready(function: Callable, *tensors: Tensor, **static) -> Captures:
    """With this function recorded, and the check made."""
    own = Captures()
    for _ in range(USES):
        own(function, *tensors, **static)
    return own


def gradients(y: Tensor, tensors, seed: int = 5, **options) -> list[Tensor]:
    torch.manual_seed(seed)
    leaves = [t for t in tensors if t.requires_grad]
    return list(torch.autograd.grad(y, leaves, torch.randn_like(y), materialize_grads=True, **options))


def same(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)


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


# ---- what cannot be recorded ---------------------------------------------------------------------------------------


class Doubtful:
    """Functions that are not pure, or that a device cannot record."""

    calls = 0
    own = nn.Parameter(torch.ones(4, dtype=DOUBLE))

    @staticmethod
    def random(x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rand_like(x) @ w

    @staticmethod
    def counts(x: Tensor, w: Tensor) -> Tensor:
        Doubtful.calls += 1
        return x @ w * Doubtful.calls

    @staticmethod
    def looks(x: Tensor, w: Tensor) -> Tensor:
        return x @ w if float(x.detach().sum()) > 0 else x @ w + 1

    @staticmethod
    def takes_a_number(x: Tensor, w: Tensor) -> Tensor:
        return x @ w + x.detach().numpy().sum()  # which a recording would repeat

    @staticmethod
    def has_a_parameter(x: Tensor, w: Tensor) -> Tensor:
        return x @ w * Doubtful.own

    @staticmethod
    def makes_a_list(x: Tensor, w: Tensor):
        return [x @ w]

    @staticmethod
    def fails(x: Tensor, w: Tensor) -> Tensor:
        if not x.any():
            raise ValueError("zeros")
        return x @ w


NAMES = [name for name, value in vars(Doubtful).items() if isinstance(value, staticmethod)]


@pytest.mark.parametrize("grad", [(True, True), (False, False)])
@pytest.mark.parametrize("name", NAMES)
def test_a_function_that_cannot_be_recorded_is_used_as_it_is(name, grad, cuda, caplog):
    function, own = getattr(Doubtful, name), Captures()
    for call in range(USES + 3):
        tensors = arguments(call, grad)
        torch.manual_seed(call)
        Doubtful.calls = call
        y = own(function, *tensors)
        if call == USES - 1 and name in ("random", "counts"):
            continue  # the check has drawn and counted too
        torch.manual_seed(call)
        Doubtful.calls = call
        same(y, function(*tensors))
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING and f"{name} is not recorded" in warning.message
    assert cuda.current is cuda.default
    other = [torch.randn(2, 4, dtype=DOUBLE), torch.randn(4, 4, dtype=DOUBLE)]
    for _ in range(USES):
        own(function, *other)
    assert len(caplog.records) == 1, "in no other shape either"


def test_a_parameter_that_is_no_argument_gets_its_gradient(cuda):
    own, tensors = Captures(), arguments(grad=(False, False))
    for _ in range(USES + 1):
        with torch.no_grad():  # there is no gradient to lose here
            own(Doubtful.has_a_parameter, *tensors)
    assert cuda.recorded == 1
    for _ in range(USES + 2):
        (found,) = torch.autograd.grad(own(Doubtful.has_a_parameter, *tensors).sum(), Doubtful.own)
        same(found, (tensors[0] @ tensors[1]).sum(0))


@pytest.mark.parametrize("what", ["recording", "forward", "backward"])
def test_a_device_that_does_wrong_is_not_used(what, cuda, caplog, monkeypatch):
    if what == "recording":
        cuda.fails = "CUDA error: out of memory"
    else:
        play, wrong = Graph.replay, what == "backward"

        def replay(graph: Graph) -> None:
            play(graph)
            if graph.pool.index(graph) == wrong:
                graph.tape.made[-1].mul_(1.001)

        monkeypatch.setattr(Graph, "replay", replay)
    own = Captures()
    for call in range(USES + 2):
        tensors = arguments(call)
        y = own(recursion, *tensors)
        same(y, recursion(*tensors))
        same(gradients(y, tensors), gradients(recursion(*tensors), tensors))
    (warning,) = caplog.records
    assert ("out of memory" if what == "recording" else "other numbers") in warning.message
    assert cuda.current is cuda.default, "not that of the recording which failed"


def changed(name: str, value):
    @contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            yield

    return context


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize(
    "context",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        Tape,
        lambda: torch.autograd.detect_anomaly(check_nan=False),
        torch.autograd.forward_ad.dual_level,
        changed("METASSM_CUDA_GRAPHS", "0"),
        lambda: torch.cuda.stream(Stream(CPU)),
    ],
    ids=["autocast", "inference", "dispatch", "anomaly", "forward", "switch", "stream"],
)
def test_where_the_function_is_used(context, cuda):
    tensors = arguments()
    own = Captures()
    for _ in range(USES + 1):
        with context():
            own(recursion, *tensors)
    assert cuda.recorded == 0 and not own.known
    own = ready(recursion, *tensors)
    before = cuda.replays
    with context():
        y, expected = own(recursion, *tensors), recursion(*tensors)
    assert cuda.replays == before and torch.equal(y, expected)
    own(recursion, *tensors)
    assert cuda.replays == before + 1


def test_tensors_that_are_not_recorded(cuda, monkeypatch):
    x, w = arguments(grad=(False, False))
    own = Captures()

    class Own(Tensor):
        pass

    def of_the_shape(x: Tensor, y: Tensor) -> Tensor:
        return x + len(y)

    for _ in range(USES + 1):
        own(recursion, x.as_subclass(Own), w)
        own(recursion, x[:0], w)
        own(recursion, x.to("meta"), w.to("meta"))
        own(of_the_shape, x, w.to("meta"))
        torch.func.vmap(lambda x: own(recursion, x, w))(x.unsqueeze(0))
        torch.func.grad(lambda x: own(recursion, x, w).sum())(x)
    with monkeypatch.context() as patch:
        patch.setattr(capture, "DEVICE", "cuda")
        for _ in range(USES + 1):
            own(recursion, x, w)
    assert cuda.recorded == 0 and not own.known


def test_a_recording_in_a_recording(cuda, caplog):
    own, inner = Captures(), Captures()

    def outer(x: Tensor, w: Tensor) -> Tensor:
        return (
            inner(recursion, x, w) + inner(recursion, x, w) + inner(recursion, x, w) + inner(recursion, x, w)
        )

    with cuda.stream(Stream(CPU)):  # where someone else may be recording
        for _ in range(USES + 1):
            own(outer, *arguments())
    assert cuda.recorded == 0
    for call in range(USES + 2):
        tensors = arguments(call)
        y, expected = own(outer, *tensors), 4 * recursion(*tensors)
        same(y, expected)
        same(gradients(y, tensors), gradients(expected, tensors))
    # The outer's two passes, and the inner's three: its own, and one without gradient from the outer's first look.
    assert cuda.recorded == 5 and not caplog.records


# ---- what is kept, and where -----------------------------------------------------------------------------------------


def test_shapes_that_never_come_back_record_nothing(cuda):
    own = Captures()
    for rows in range(1, 50):
        for _ in range(USES - 1):
            own(recursion, torch.zeros(rows, 4), torch.zeros(4, 4))
    for _ in range(5):
        for rows in range(1, KEPT + 2):  # one more than are kept, in turn
            own(recursion, torch.zeros(rows, 4), torch.zeros(4, 4))
    assert cuda.recorded == 0 and len(own.known) == KEPT


def test_the_latest_signatures_are_kept(cuda):
    own = Captures()
    call = lambda rows: own(recursion, torch.zeros(rows, 4), torch.zeros(4, 4))
    for rows in range(1, KEPT + 1):
        for _ in range(USES):
            call(rows)
    assert cuda.recorded == KEPT
    call(1)  # used again: not the one to go
    for _ in range(USES):
        call(KEPT + 1)
    assert len(own.known) == KEPT and cuda.recorded == KEPT + 1
    for rows, kept in ((1, True), (2, False), (1, True)):
        before = cuda.replays
        call(rows)
        assert cuda.replays == before + kept
    assert len(own.known) == KEPT and cuda.recorded == KEPT + 1


def test_threads_have_graphs_of_their_own(cuda):
    tensors = arguments()
    own = ready(recursion, *tensors)
    thread = threading.Thread(target=lambda: [own(recursion, *tensors) for _ in range(USES)])
    thread.start(), thread.join()
    assert cuda.recorded == 4 and len(own.known) == 2


@pytest.mark.parametrize("way", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_the_owner_start_with_none(way, cuda):
    owner = nn.Linear(2, 2)
    tensors = arguments()
    for _ in range(USES):
        captures(owner)(recursion, *tensors)
    captures(owner)(Doubtful.random, *tensors)
    other = way(owner)
    assert captures(owner).known and not captures(other).known and not captures(other).refused
    assert captures(owner) is captures(owner) is not captures(other)
    assert set(other.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(other.weight, owner.weight)


# ---- roll-outs -------------------------------------------------------------------------------------------------------


KINDS = [
    LowRankMLP,
    *(c for c in vars(adaptations).values() if isinstance(c, type) and issubclass(c, ResidualMLP)),
]
KINDS.remove(ResidualMLP)


def rolled(adapted: AdaptedMLP, z: Tensor, steps: int, clamp: float | None) -> Tensor:
    path = []
    for _ in range(steps):
        z = adapted._next(z) if clamp is None else adapted._next(z).clamp(-clamp, clamp)
        path.append(z)
    return torch.cat(path, -2)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", KINDS, ids=lambda c: c.__name__)
def test_roll_outs_of_adapted_dynamics(kind, rank, residual, cuda):
    torch.manual_seed(0)
    f = kind(2, 3, rank=rank, hidden_dim=7, residual=residual, activation=torch.tanh).double()
    with torch.no_grad():
        for p in f.parameters():
            p.add_(0.5 * torch.randn_like(p))
    for call in range(USES + 2):
        torch.manual_seed(call)
        e = torch.randn(3, 1, 3, dtype=DOUBLE, requires_grad=True)
        z = torch.randn(3, 5, 1, 2, dtype=DOUBLE, requires_grad=True)
        leaves = [z, e, *f.parameters()]
        for steps, clamp in ((4, 0.3), (1, None)):
            y, expected = f(e).rollout(z, steps, clamp), rolled(f(e), z, steps, clamp)
            assert y.shape == (3, 5, steps, 2)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            assert clamp is None or 0 < (y.abs() == clamp).double().mean() < 1
            pair = (gradients(x, leaves, allow_unused=True) for x in (y, expected))
            torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)
        with torch.no_grad():  # the parameters' memory is another, as after a load
            for p in f.parameters():
                p.data = p + 0.01
    assert cuda.recorded == 4 and captures(f).known


def test_roll_outs_that_are_taken_step_by_step(cuda):
    class Edited(AdaptedMLP):
        def _next(self, z: Tensor) -> Tensor:
            return 2.0 * super()._next(z)

    torch.manual_seed(0)
    f = LowRankMLP(2, 3, hidden_dim=7).double()
    module = LowRankMLP(2, 3, hidden_dim=7, activation=nn.SiLU()).double()
    hooked = LowRankMLP(2, 3, hidden_dim=7).double()
    hooked.layers[1].register_forward_hook(lambda *_: None)
    e, z = torch.randn(3, 1, 3, dtype=DOUBLE), torch.randn(3, 5, 1, 2, dtype=DOUBLE)
    shared = LowRankMLP(2, 3, rank=0, hidden_dim=7).double()
    free = AdaptedMLP(Network(f.layers, f.activation, True), f(e).updates)  # nobody to keep a graph
    cases = [
        (Edited(f, f(e).updates), z),
        (module(e), z),
        (hooked(e), z),
        (free, z),
        (f(e), torch.randn(4, 3, 5, 1, 2, dtype=DOUBLE)),
        (f(e[:1]), z),
        (f(e[0, 0]), z[0]),
        (shared(e), torch.randn(4, 3, 5, 1, 2, dtype=DOUBLE)),
    ]
    for adapted, start in cases:
        for _ in range(USES + 1):
            torch.testing.assert_close(
                adapted.rollout(start, 3, 2.0), rolled(adapted, start, 3, 2.0), rtol=1e-12, atol=1e-12
            )
    assert cuda.recorded == 0


def test_a_fit_is_the_same_with_graphs_and_without(cuda, monkeypatch):
    recs = pm.simulate.limit_cycles([3.0, 5.0], num_trials=6, num_steps=12, num_neurons=5, seed=1)
    fits = []
    for switch in ("0", "1"):
        monkeypatch.setenv("METASSM_CUDA_GRAPHS", switch)
        torch.manual_seed(0)
        model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=2, hidden_dim=8).double()
        guide = pm.guides.DKF(model, hidden_dim=4).double()
        fits.append(
            pm.fit(model, guide, recs, num_steps=2, warm_start_steps=50, device="cpu", progress=False)
        )
        assert not captures(model.dynamics).known, "a fit trains a copy"
    one, other = (dict(fit.model.named_parameters()) for fit in fits)
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)
    assert cuda.recorded >= 2 and cuda.replays > 60, "most of 2 x 50 passes"
    assert (
        captures(fits[1].model.dynamics).known and not captures(copy.deepcopy(fits[1]).model.dynamics).known
    )
