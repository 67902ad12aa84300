"""Many small operations on a GPU as one launch: a pure function is recorded as a CUDA graph and replayed.

A roll-out is hundreds of operations of a few microseconds each, and to launch one takes the host longer than that.
``METASSM_CUDA_GRAPHS=0`` in the environment switches this off.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

DEVICE = "cuda"  # "cpu" in the tests, which emulate what is used of torch.cuda
USES = 3  # of a signature, the last of which records it: shapes that are met once or twice cost nothing
KEPT = 4  # signatures of an owner: a graph keeps the memory of all that it computes


def captures(owner: object) -> Captures:
    """Those of an object, kept in it."""
    return vars(owner).setdefault("_captures", Captures())


class Captures:
    """Pure functions, replayed from the third call with tensors of the same shapes and kinds.

    ``captures(function, *tensors, **static)`` is ``function(*tensors, **static)``, a tensor. It is differentiable in
    the tensors, which are all that the function may compute with, beside hashable ``static`` arguments; nothing in it
    is random, waits for the device, or is done for its effect.

    A graph has memory of its own, into which arguments are copied and out of which values and gradients are copied.
    Its first replay is compared with the function; where that or the recording fails, a warning says so, and the
    function itself is used from then on. So it is off a GPU, under autocast, in inference mode, in transforms of
    ``torch.func``, and for the gradient of a gradient. What is copied or saved with the owner is empty.
    """

    def __init__(self) -> None:
        self.known: OrderedDict[tuple, int | _Graph] = OrderedDict()  # how often seen, or the graph
        self.refused: set[Callable] = set()

    def __reduce__(self):
        return Captures, ()

    def __call__(self, function: Callable[..., Tensor], *tensors: Tensor, **static) -> Tensor:
        plain = functools.partial(function, **static)
        if function in self.refused or not _recordable(tensors):
            return plain(*tensors)
        grad = torch.is_grad_enabled()
        kinds = tuple((t.shape, t.dtype, t.device, grad and t.requires_grad) for t in tensors)
        # A thread may be interrupted by another at any point: each has its own.
        key = function, tuple(static.items()), kinds, grad, threading.get_ident()
        found = self._found(key, plain, tensors)
        return plain(*tensors) if isinstance(found, int) else _Replay.apply(found, *tensors)

    def _found(self, key: tuple, plain: Callable[..., Tensor], tensors: Sequence[Tensor]) -> int | _Graph:
        found = self.known.pop(key, 0)
        if isinstance(found, int):
            found += 1
        if found == USES:
            try:
                found = _Graph(plain, tensors)
                found.check(tensors)
            except Exception as error:  # slow is better than not at all
                logger.warning("%s is not recorded, which is slower: %s", key[0].__name__, error)
                self.refused.add(key[0])  # in all shapes: what fails on the device may leave traces there
                return 0
        self.known[key] = found  # the latest is the last
        if len(self.known) > KEPT:
            self.known.popitem(last=False)
        return found


def _recordable(tensors: Sequence[Tensor]) -> bool:
    """Whether these are numbers on a GPU, nobody records there, or looks at what is done but autograd."""
    device = tensors[0].device
    return (
        device.type == DEVICE
        and all(type(t) in (Tensor, nn.Parameter) and t.device == device and t.numel() > 0 for t in tensors)
        and os.environ.get("METASSM_CUDA_GRAPHS") != "0"
        and not torch.is_inference_mode_enabled()
        and not torch.is_autocast_enabled(device.type)
        and not torch.is_anomaly_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()  # a counter of operations, say
        and torch.autograd.forward_ad._current_level < 0
        # Nobody can record on the default stream, and what is replayed on one stream does not overlap.
        and torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    )


@functools.cache  # libraries keep memory for every stream that they see
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _record(device: torch.device, passes: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
    """Calls that repeat these on the memory they have now. A pass may read what the one before it left."""
    here, stream, pool = torch.cuda.current_stream(device), _stream(device), torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph() for _ in passes]
    stream.wait_stream(here)
    with torch.cuda.stream(here):  # the current one again, even if a recording that fails leaves it
        with torch.cuda.stream(stream):
            for work in passes:  # libraries set themselves up at first use, which cannot be recorded
                work()
        for graph, work in zip(graphs, passes, strict=True):
            # Other threads go on meanwhile, with what may not be done where one records.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
    here.wait_stream(stream)
    return [graph.replay for graph in graphs]


class _Graph:
    """The two passes of a function, recorded, and the memory that they read and write."""

    def __init__(self, plain: Callable[..., Tensor], tensors: Sequence[Tensor]):
        self.plain = plain
        self.holder: object = None  # the call whose pass ahead is in memory
        # Zeros, so that the check would see a number that was recorded in place of how it is computed.
        self.inputs = [torch.zeros_like(t) for t in tensors]
        self.output = plain(*self.inputs)
        if self.output.requires_grad:
            raise RuntimeError("it has gradients for tensors that are not among its arguments")
        self.grad = torch.zeros_like(self.output)
        self.wanted = [torch.is_grad_enabled() and t.requires_grad for t in tensors]
        leaves = self.pick([x.requires_grad_(want) for x, want in zip(self.inputs, self.wanted, strict=True)])

        self.grads: list[Tensor] = []

        def ahead() -> None:
            self.output = plain(*self.inputs)

        def back() -> None:
            self.grads = _gradients(self.output, leaves, self.grad)

        self.ahead, *self.back = _record(self.grad.device, [ahead, back] if leaves else [ahead])

    def pick(self, of_all: Sequence[Tensor]) -> list[Tensor]:
        """What belongs to the arguments whose gradient is wanted."""
        return [x for x, want in zip(of_all, self.wanted, strict=True) if want]

    def value(self, tensors: tuple[Tensor, ...]) -> Tensor:
        torch._foreach_copy_(self.inputs, tensors)
        self.ahead()
        return self.output.clone()

    def gradients(self, grad: Tensor) -> list[Tensor]:
        """Of the call whose pass ahead is in memory, once: the pass back writes over what it reads."""
        self.grad.copy_(grad)
        self.back[0]()
        copies = [torch.empty_like(g) for g in self.grads]
        torch._foreach_copy_(copies, self.grads)
        return copies

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raises a RuntimeError where a replay differs from the function, in value or gradient."""
        leaves = [t.detach().requires_grad_(want) for t, want in zip(tensors, self.wanted, strict=True)]
        one, other = self.plain(*leaves), _Replay.apply(self, *leaves)
        pairs = [(one, other)]
        if wanted := self.pick(leaves):
            pairs += zip(*(_gradients(y, wanted, one.detach()) for y in (one, other)), strict=True)
        for x, y in pairs:
            if not (x - y).norm() <= torch.finfo(x.dtype).eps ** 0.5 * x.norm():
                raise RuntimeError("a replay gives other numbers")


def _gradients(y: Tensor, leaves: Sequence[Tensor], grad: Tensor, **options) -> list[Tensor]:
    return list(torch.autograd.grad(y, leaves, grad, allow_unused=True, materialize_grads=True, **options))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graph: _Graph, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.graph, ctx.call = graph, object()
        graph.holder = ctx.call
        return graph.value(tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        graph, tensors = ctx.graph, ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            # Views, since one argument may have been computed from another: these are the partial derivatives.
            views = [t.view_as(t) for t in tensors]
            found = iter(_gradients(graph.plain(*views), graph.pick(views), grad, create_graph=True))
        else:
            held, graph.holder = graph.holder is ctx.call, None
            if not held:  # another call came between, or this is the second pass back
                graph.value(tensors)
            found = iter(graph.gradients(grad))
        return None, *(next(found) if want else None for want in graph.wanted)
