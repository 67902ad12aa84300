"""Both directions of a gated recurrent network in C (``gru.c``), with their gradient."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_metassm import native
from pyro_metassm.native import kernels

SOURCE = Path(__file__).with_name("gru.c")


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled C file for numbers of this kind; None where there is none."""
    return kernels.library(SOURCE, dtype)


def fits(x: Tensor, lengths: Tensor, *weights: Tensor) -> bool:
    """Whether C can be given these tensors: it looks neither at shapes nor at types."""
    rows, steps, channels = x.shape
    width, out = weights[-1].shape[-2:]
    shapes = ((2, channels, 3 * width), (2, 3 * width), (2, width, 3 * width), (2, width), (2, width, out))
    return (
        all(t.device.type == "cpu" for t in (x, lengths, *weights))
        and all(t.dtype == x.dtype for t in weights)
        and tuple(w.shape for w in weights) == shapes
        and (lengths.dtype, lengths.shape) == (torch.int64, (rows,))
        and x.numel() > 0
        and bool((lengths <= steps).all())
    )


class Workspace:
    """Memory for the states that the gradient needs, used again as soon as a graph has let go of it.

    It is tens of megabytes a step, and fresh memory costs a tenth of the step: the system clears each page. It belongs
    to a network, ends with it, and is not copied with it.
    """

    def __init__(self) -> None:
        self._free: list[
            Tensor
        ] = []  # taken from and added to by whole operations only: networks may be in threads

    def __reduce__(self):
        return Workspace, ()

    def borrow(self, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor of ``count`` elements, to be saved for backward: its memory returns when nothing refers to it."""
        memory = torch.empty(0, dtype=torch.uint8, device="cpu")
        with contextlib.suppress(IndexError):
            while len(memory) < count * dtype.itemsize:
                memory = self._free.pop()
        if len(memory) < count * dtype.itemsize:
            memory = torch.empty(count * dtype.itemsize, dtype=torch.uint8, device="cpu")
        lent = memory.numpy()  # an object of its own, which the tensor made from it keeps alive
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return torch.frombuffer(lent, dtype=dtype, count=count)

    def _take_back(self, memory: Tensor) -> None:
        if len(self._free) < 2:
            self._free.append(memory)

    def __call__(self, x: Tensor, lengths: Tensor, *weights: Tensor) -> Tensor:
        """``x (B, T, in)``, ``lengths (B,)`` and the weights of ``BidirectionalGRU`` to ``(B, T, out)``."""
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights))
        return _Kernel.apply(self if keep else None, x, lengths, *weights)


class _Problem(ctypes.Structure):
    """``struct problem`` of the C file, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "steps", "in_", "width", "out", "keep")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "x", "lengths", "weight_in", "bias_in", "weight", "bias", "weight_out",
                "y", "packed", "saved", "scratch", "partial",
                "grad_y", "grad_x", "grad_in", "grad_bias_in", "grad_weight", "grad_bias", "grad_out",
            )
        ),
        ("next", ctypes.c_int64),
    ]  # fmt: skip

    def __init__(self, tensors: tuple[Tensor, ...], keep: bool):
        x, _, _, _, weight, _, weight_out = tensors
        super().__init__(
            *x.shape, weight.shape[-2], weight_out.shape[-1], keep, *(t.data_ptr() for t in tensors)
        )
        found = library(x.dtype)
        assert found is not None, "asked for before"
        self.library = found
        sizes = (ctypes.c_int64 * 5)()
        self.library.sizes(ctypes.byref(self), sizes)
        self.size_packed, self.size_saved, self.size_scratch, self.size_partial, self.num_jobs = sizes

    def run(self, like: Tensor, backward: bool) -> None:
        """All jobs of a pass."""
        workers = kernels.workers(self.num_jobs)
        packed, scratch = like.new_empty(self.size_packed), like.new_empty(workers * self.size_scratch)
        self.packed, self.scratch, self.next = packed.data_ptr(), scratch.data_ptr(), 0
        itself, which = ctypes.byref(self), ctypes.c_int64(backward)
        self.library.pack(itself, which)
        native.on_threads(lambda worker: self.library.work(itself, which, ctypes.c_int64(worker)), workers)
        self.library.finish(itself, which)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, workspace: Workspace | None, *tensors: Tensor) -> Tensor:
        tensors = tuple(t.contiguous() for t in tensors)
        x, weight_out = tensors[0], tensors[-1]
        problem = _Problem(tensors, keep=workspace is not None)
        size = problem.size_saved
        saved = x.new_empty(size) if workspace is None else workspace.borrow(size, x.dtype)
        y = x.new_empty(2, *x.shape[:2], weight_out.shape[-1])
        problem.saved, problem.y = saved.data_ptr(), y.data_ptr()
        problem.run(x, backward=False)
        if workspace is not None:
            ctx.save_for_backward(*tensors, saved)
        return y[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        *tensors, saved = ctx.saved_tensors
        x, _, *weights = tensors
        problem = _Problem(tuple(tensors), keep=True)
        grad, partial = grad.contiguous(), x.new_empty(problem.size_partial)
        problem.saved, problem.grad_y, problem.partial = saved.data_ptr(), grad.data_ptr(), partial.data_ptr()
        grad_x = x.new_empty(2, *x.shape) if ctx.needs_input_grad[1] else None
        if grad_x is not None:
            problem.grad_x = grad_x.data_ptr()
        grads = [torch.empty_like(w) for w in weights]
        names = ("grad_in", "grad_bias_in", "grad_weight", "grad_bias", "grad_out")
        for name, g in zip(names, grads, strict=True):
            setattr(problem, name, g.data_ptr())
        problem.run(x, backward=True)
        return None, None if grad_x is None else grad_x[0], None, *grads
