"""Adapted MLPs, evaluated once or rolled out over many steps, in C (``mlp.c``), with their gradient.

A hidden layer is a hundred times as large as the state. PyTorch writes each to memory, reads it again for every
operation on it, and keeps it for the gradient; the C takes a few rows through all layers and steps in a core's cache,
keeps the states alone, and makes the hidden layers again on the way back.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_metassm import native
from pyro_metassm.native import kernels

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("mlp.c")
MAX_LAYERS = 8  # LAYERS of the C file
FEW_RECORDINGS, ENOUGH_ROWS, MOST_WEIGHTS = 16, 16, 500_000  # where it pays: measured
WORTH_A_THREAD = 2_000_000  # multiplications: some 50 us, what it costs to wake one

ACTIVATIONS = (functional.silu, torch.tanh)  # numbered as in the C file
OTHER_NAMES: dict[object, int] = {
    **{f: k for k, f in enumerate(ACTIVATIONS)},
    nn.SiLU: 0,
    nn.Tanh: 1,
    functional.tanh: 1,
    Tensor.tanh: 1,
}

Layer = tuple[Tensor, Tensor]
"""``weight (out, in)`` and ``bias (out,)`` as ``nn.Linear`` has them, or ``(R, out, in)``, ``(R, out)``: one each."""
Update = tuple[Tensor, Tensor]
"""``u (R, in, rank)`` and ``v (R, out, rank)``."""


class Form(NamedTuple):
    """What of a roll-out is no tensor."""

    num_layers: int
    num_steps: int
    activation: int
    activate_last: bool
    residual: bool
    clamp: float | None


def rollout(
    z: Tensor,
    layers: Sequence[Layer],
    updates: Sequence[Update] = (),
    *,
    num_steps: int = 1,
    activation: object = functional.silu,
    activate_last: bool = False,
    residual: bool = False,
    clamp: float | None = None,
) -> Tensor | None:
    r"""The states after 1, ..., ``num_steps`` applications of an MLP that differs between recordings.

    ``a_l = h_{l-1} (W_l + u_l v_l^T) + b_l``, ``h_l = s(a_l)``, ``h_0 = z``, ``z' = [z +] a_n``, of which ``clamp``
    cuts off what is beyond it on either side.

    Args:
        z: ``(R, M, d)``, M rows for each of R recordings.
        layers: weights and biases, of all recordings or of each.
        updates: of the first layers, as many as there are.
        num_steps: 1 is a plain evaluation, and the last layer may then have any width.
        activation: ``silu`` or ``tanh``, as a function or a module.
        activate_last: also after the last layer.
        residual: add ``z``.
        clamp: limit of the absolute values of every state.

    Returns:
        ``(R, M, num_steps, d)``, differentiable any number of times in every tensor; None where this way is not to
        be had: another device, dtype or activation, no compiler, transforms of ``torch.func``, autocast, no rows.
    """
    kind, tensors = _kind(activation), [t for pair in (*layers, *updates) for t in pair]
    if kind is None or not _fit(z, layers, updates, num_steps > 1 or residual) or not _plain([z, *tensors]):
        return None
    if not _pays(z, layers, num_steps) or not _compiled(z.dtype):
        return None
    form = Form(len(layers), num_steps, kind, activate_last, residual, clamp)
    return _Kernel.apply(form, z, *tensors)


def by_torch(form: Form, z: Tensor, *tensors: Tensor) -> Tensor:
    """The same in PyTorch: the reference, and what is differentiated for second derivatives."""
    activation = ACTIVATIONS[form.activation]
    pairs = list(zip(tensors[::2], tensors[1::2], strict=True))
    layers, updates = pairs[: form.num_layers], pairs[form.num_layers :]
    states = []
    for _ in range(form.num_steps):
        x = z
        for number, (weight, bias) in enumerate(layers):
            out = x @ weight.mT + bias.unsqueeze(-2)
            if number < len(updates):
                u, v = updates[number]
                out = out + (x @ u) @ v.mT
            x = activation(out) if number + 1 < len(layers) or form.activate_last else out
        z = z + x if form.residual else x
        z = z if form.clamp is None else z.clamp(-form.clamp, form.clamp)
        states.append(z)
    return torch.stack(states, -2)


def plain(net: nn.Sequential, x: Tensor) -> Tensor:
    """``net(x)`` of linear layers with one kind of activation between them, ``x (..., in)`` to ``(..., out)``."""
    modules = list(net)
    layers, kinds = linear(modules[::2]), {_kind(m) for m in modules[1::2]}
    if layers and len(kinds) == 1 and not _hooked(net, *modules):
        y = _of_rows(x, layers, activation=modules[1], activate_last=len(modules) % 2 == 0)
        if y is not None:
            return y
    return net(x)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x W^T + b`` of many rows, ``x (..., in)`` to ``(..., out)``."""
    y = _of_rows(x, [(weight, bias)])
    return functional.linear(x, weight, bias) if y is None else y


def _of_rows(x: Tensor, layers: Sequence[Layer], **options) -> Tensor | None:
    """An MLP that is the same for all rows, evaluated once; None as :func:`rollout`."""
    y = rollout(x.reshape(1, -1, x.shape[-1]), layers, **options) if x.dim() else None
    return None if y is None else y.reshape(*x.shape[:-1], -1)


def linear(modules: Iterable[nn.Module | Layer]) -> list[Layer] | None:
    """The weights and biases of linear layers that are nothing but that."""
    layers: list[Layer] = []
    for module in modules:
        if isinstance(module, tuple):
            layers.append(module)
            continue
        if type(module) is not nn.Linear or _hooked(module):
            return None
        layer = module.weight, module.bias
        if layer[1] is None:
            return None
        layers.append(layer)
    return layers


# ---- where it applies ------------------------------------------------------------------------------------------------


def _hooked(*modules: nn.Module) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def _kind(activation: object) -> int | None:
    if isinstance(activation, nn.Module):
        return None if _hooked(activation) else OTHER_NAMES.get(type(activation))
    return next((kind for known, kind in OTHER_NAMES.items() if activation is known), None)


def _fit(z: Tensor, layers: Sequence[Layer], updates: Sequence[Update], closed: bool) -> bool:
    """Whether the sizes are those that C takes for granted. Where they are not, PyTorch says what is wrong."""
    if z.dim() != 3 or not z.numel() or not len(updates) <= len(layers) <= MAX_LAYERS or not layers:
        return False
    recordings, _, first = z.shape
    width = first
    for number, (weight, bias) in enumerate(layers):
        out = bias.shape[-1] if bias.dim() else 0
        each = (recordings, out, width), (recordings, out)
        if not out or weight.shape not in (each[0], each[0][1:]) or bias.shape not in (each[1], each[1][1:]):
            return False
        if number < len(updates):
            u, v = updates[number]
            rank = u.shape[-1] if u.dim() else -1
            if u.shape != (recordings, width, rank) or v.shape != (recordings, out, rank):
                return False
        width = out
    return width == first or not closed


def _pays(z: Tensor, layers: Sequence[Layer], num_steps: int) -> bool:
    """Whether C is the faster way, by the sizes: weights that fit a core's cache, and enough rows that use them."""
    enough = z.shape[0] <= FEW_RECORDINGS or z.shape[1] * num_steps >= ENOUGH_ROWS
    return enough and sum(_size(weight) for weight, _ in layers) <= MOST_WEIGHTS


def _size(weight: Tensor) -> int:
    """Numbers of a matrix, of one recording's where each has its own."""
    return weight.shape[-2] * weight.shape[-1]


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether these are numbers in memory, and nobody looks at what is done with them but autograd."""
    dtype = tensors[0].dtype
    if dtype not in kernels.BITS:
        return False
    for t in tensors:
        if type(t) not in (Tensor, nn.Parameter) or t.dtype != dtype or not t.is_cpu:
            return False
    return not (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()  # a counter of operations, say
        or torch.autograd.forward_ad._current_level >= 0
    )


def _compiled(dtype: torch.dtype) -> bool:
    """Whether there is a library for these numbers, and it does what PyTorch does."""
    return _library(dtype) is not None and _correct(dtype)


def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    return kernels.library(SOURCE, dtype)


@functools.cache
def _correct(dtype: torch.dtype) -> bool:
    shapes = [(2, 5, 2), (7, 2), (7,), (2, 2, 7), (2, 2), (2, 2, 1), (2, 7, 1)]
    form = Form(2, num_steps=2, activation=0, activate_last=False, residual=True, clamp=1.0)
    ways = (functools.partial(by_torch, form), functools.partial(_Kernel.apply, form))
    same = kernels.agree(*ways, shapes, dtype)
    if not same:
        logger.warning("the compiled MLP is wrong on this machine and is not used")
    return same


# ---- the C file ------------------------------------------------------------------------------------------------------


class _Layer(ctypes.Structure):
    """``struct layer`` of the C file, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("in_", "out", "rank", "own_weight", "own_bias")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "weight", "bias", "u", "v",
                "grad_weight", "grad_bias", "grad_u", "grad_v",
            )
        ),
    ]  # fmt: skip


class _Problem(ctypes.Structure):
    """``struct problem`` of the C file, field by field. Whoever makes it keeps the tensors alive."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "recordings", "rows", "steps", "layers", "activation", "activate_last", "residual", "clamped",
                "need_states", "need_weights",
            )
        ),
        ("limit", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in ("z", "path", "grad_path", "grad_z", "scratch", "partial")
        ),
        ("next", ctypes.c_int64),
        ("layer", _Layer * MAX_LAYERS),
    ]  # fmt: skip

    def __init__(self, form: Form, tensors: Sequence[Tensor], path: Tensor):
        z = tensors[0]
        super().__init__(*z.shape[:2], form.num_steps, form.num_layers, form.activation, form.activate_last)
        self.residual, self.clamped, self.limit = form.residual, form.clamp is not None, form.clamp or 0.0
        self.z, self.path = z.data_ptr(), path.data_ptr()
        self.set_layers(tensors, ("weight", "bias"), ("u", "v"))
        self.work = z.shape[0] * z.shape[1] * form.num_steps * sum(map(_size, self.weights(tensors)))
        found = _library(z.dtype)
        assert found is not None, "asked for before"
        self.library = found

    def weights(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[1 : 1 + 2 * self.layers : 2]

    def set_layers(
        self, tensors: Sequence[Tensor], layers: tuple[str, str], updates: tuple[str, str]
    ) -> None:
        """Where the tensors of all layers lie, or their gradients."""
        for number, weight in enumerate(self.weights(tensors)):
            layer, bias = self.layer[number], tensors[2 + 2 * number]
            layer.out, layer.in_ = weight.shape[-2:]
            layer.own_weight, layer.own_bias = weight.dim() == 3, bias.dim() == 2
            for names, at in ((layers, 1 + 2 * number), (updates, 1 + 2 * (self.layers + number))):
                for name, t in zip(names, tensors[at : at + 2], strict=False):
                    setattr(layer, name, t.data_ptr())
                    if names is updates:
                        layer.rank = t.shape[-1]

    def run(self, like: Tensor, backward: bool) -> None:
        """All jobs of a pass."""
        sizes = (ctypes.c_int64 * 3)()
        self.library.sizes(ctypes.byref(self), sizes)
        scratch, partial, jobs = sizes
        workers = kernels.workers(min(jobs, 1 + self.work // WORTH_A_THREAD))
        memory = [like.new_empty(workers * scratch), like.new_empty(partial if self.need_weights else 0)]
        self.scratch, self.partial = (t.data_ptr() for t in memory)
        itself, which = ctypes.byref(self), ctypes.c_int64(backward)
        native.on_threads(lambda worker: self.library.work(itself, which, ctypes.c_int64(worker)), workers)
        if self.need_weights:
            self.library.finish(itself)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form: Form, *tensors: Tensor) -> Tensor:
        dense = [t.contiguous() for t in tensors]
        z, last = dense[0], dense[2 * form.num_layers]
        path = z.new_empty(*z.shape[:2], form.num_steps, last.shape[-1])
        _Problem(form, dense, path).run(z, backward=False)
        ctx.form = form
        ctx.save_for_backward(*tensors, path)
        return path

    @staticmethod
    def backward(ctx, grad: Tensor):
        *tensors, path = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        way = _differentiable_grads if torch.is_grad_enabled() else _grads
        return None, *way(ctx.form, tensors, path, grad, needed)


def _grads(form: Form, tensors: Sequence[Tensor], path: Tensor, grad: Tensor, needed: Sequence[bool]):
    dense, grad = [t.contiguous() for t in tensors], grad.contiguous()
    problem = _Problem(form, dense, path)
    problem.need_states, problem.need_weights = needed[0], any(needed[1:])
    grads = [torch.empty_like(t) for t in dense]
    problem.grad_path, problem.grad_z = grad.data_ptr(), grads[0].data_ptr()
    problem.set_layers(grads, ("grad_weight", "grad_bias"), ("grad_u", "grad_v"))
    problem.run(path, backward=True)
    return [g if wanted else None for g, wanted in zip(grads, needed, strict=True)]


def _differentiable_grads(form: Form, tensors: Sequence[Tensor], _, grad: Tensor, needed: Sequence[bool]):
    """Backward under ``create_graph=True``: the gradient as a function, in PyTorch."""
    # As views, since one of them may have been computed from another: these are the arguments' partial derivatives.
    arguments = [t.view_as(t) for t in tensors]
    wanted = [t for t, need in zip(arguments, needed, strict=True) if need]
    found = iter(torch.autograd.grad(by_torch(form, *arguments), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needed]
