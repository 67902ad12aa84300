"""What is recorded and what is not, and how long it is kept, on an emulation of CUDA graphs."""

import copy
import logging
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from captured_functions import DOUBLE, arguments, gradients, ready, recursion, same
from emulated_cuda import CPU, Graph, Stream, Tape
from torch import Tensor, nn

from pyro_metassm import capture
from pyro_metassm.capture import KEPT, USES, Captures, captures

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
