"""CUDA graphs on the CPU, in place of ``torch.cuda``, and as unkind as the real ones.

A replay repeats the operations on the memory that they were recorded with, a recording computes nothing, and graphs
that share their memory write over each other's.
"""

import inspect
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")


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
