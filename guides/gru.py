"""Gated recurrent networks of both directions, three ways: one function each, the same values and gradients.

On a CPU, C that keeps a few rows in a core's cache through all time steps (``native/gru.c``); on a GPU, PyTorch's
own, which is cuDNN's; anywhere else, and where there is no C compiler, a loop in PyTorch, the plainest to read.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pyro_metassm.native import gru as compiled
from pyro_metassm.native import kernels

logger = logging.getLogger(__name__)

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.grad_input


class _Recursion(torch.autograd.Function):
    """States ``(D, T, B, H)`` of D recursions from inputs ``(D, T, B, I)``; zero first state.

    ``r, u = sigmoid(x V_ru + c_ru + h W_ru)``, ``n = tanh(x V_n + c_n + r * (h W_n + b))``, ``h' = n + u * (h - n)``.

    Everything of a step is done while it is in the cache, in small buffers that the allocator hands out again: the
    projections of all steps, or their gradients, would be tens of megabytes of fresh memory, and that is what
    bounds the time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight_in: Tensor, bias_in: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        directions, steps, rows, width = *x.shape[:3], weight.shape[-2]
        states = x.new_empty(directions, steps + 1, rows, width)
        states[:, 0] = 0.0
        gates = x.new_empty(directions, steps, rows, 2 * width)
        new, recurrent = (x.new_empty(directions, steps, rows, width) for _ in range(2))
        bias, bias_in = bias.unsqueeze(-2), bias_in.unsqueeze(-2)
        for t in range(steps):
            entering = torch.baddbmm(bias_in, x[:, t], weight_in)
            product = torch.bmm(states[:, t], weight)
            torch.add(entering[..., : 2 * width], product[..., : 2 * width], out=gates[:, t]).sigmoid_()
            torch.add(product[..., 2 * width :], bias, out=recurrent[:, t])
            torch.addcmul(
                entering[..., 2 * width :], gates[:, t, :, :width], recurrent[:, t], out=new[:, t]
            ).tanh_()
            torch.lerp(new[:, t], states[:, t], gates[:, t, :, width:], out=states[:, t + 1])
        ctx.save_for_backward(x, weight_in, weight, states, gates, new, recurrent)
        return states[:, 1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight_in, weight, states, gates, new, recurrent = ctx.saved_tensors
        width = weight.shape[-2]
        back_in, back = weight_in.mT.contiguous(), weight.mT.contiguous()
        grad_x, carried = torch.empty_like(x), torch.zeros_like(new[:, 0])
        grad_in, grad_weight = torch.zeros_like(weight_in), torch.zeros_like(weight)
        grad_bias_in, grad_bias = (w.new_zeros(w.shape[0], 1, w.shape[2]) for w in (weight_in, weight))
        ones = new.new_ones(len(new), 1, new.shape[2])
        entering = new.new_empty(len(new), new.shape[2], 3 * width)  # gradients of what entered the gates,
        product = torch.empty_like(entering)  # and of the recurrent product, which the reset gate scales
        for t in range(new.shape[1] - 1, -1, -1):
            reset, update = gates[:, t, :, :width], gates[:, t, :, width:]
            h = carried + grad[:, t]
            kept = h * update
            n = tanh_backward(h - kept, new[:, t], grad_input=entering[..., 2 * width :])
            to_update = (states[:, t] - new[:, t]).mul_(h)
            sigmoid_backward(n * recurrent[:, t], reset, grad_input=entering[..., :width])
            sigmoid_backward(to_update, update, grad_input=entering[..., width : 2 * width])
            product[..., : 2 * width] = entering[..., : 2 * width]
            torch.mul(n, reset, out=product[..., 2 * width :])
            torch.bmm(entering, back_in, out=grad_x[:, t])
            grad_in.baddbmm_(x[:, t].mT, entering)
            grad_weight.baddbmm_(states[:, t].mT, product)
            grad_bias_in.baddbmm_(ones, entering)
            grad_bias.baddbmm_(ones, product)
            carried = kept.baddbmm_(product, back)
        return grad_x, grad_in, grad_bias_in.squeeze(1), grad_weight, grad_bias.squeeze(1)[:, 2 * width :]


def by_loop(x: Tensor, lengths: Tensor, *weights: Tensor) -> Tensor:
    """Both directions advance together, ``x (B, T, in)`` to ``(B, T, out)``: a step is two batched products."""
    *recurrent, weight_out = weights
    rows, steps, _ = x.shape
    x = x.transpose(0, 1)
    both = torch.stack([x, _mirror(x, lengths)])  # (2, T, B, in): time first, as the loop reads it
    states = _Recursion.apply(both, *recurrent)
    ahead, back = torch.bmm(states.flatten(1, 2), weight_out).view(2, steps, rows, -1)
    return (ahead + _mirror(back, lengths)).transpose(0, 1)


def _mirror(x: Tensor, lengths: Tensor) -> Tensor:
    """``x (T, B, C)`` with the first ``lengths`` bins of every row in reverse; what is behind them stays."""
    if x.device.type == "cpu" and bool((lengths == len(x)).all()):  # elsewhere the question would be a wait
        return x.flip(0)
    position = torch.arange(len(x), device=x.device)[:, None]
    source = torch.where(position < lengths, lengths - 1 - position, position)
    return x.gather(0, source.unsqueeze(-1).expand_as(x))


def by_torch(x: Tensor, lengths: Tensor, *weights: Tensor) -> Tensor:
    """One call of PyTorch's GRU of two directions, without looking at the lengths on the host.

    It walks the padding too, on the way back before the trial. There, a further input channel opens the update gate
    (``sigmoid(10^4) = 1``), so that the state stays what it was, at first zero.
    """
    weight_in, bias_in, weight, bias, weight_out = weights
    width = weight.shape[-2]
    outside = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    x = torch.cat([x.masked_fill(outside.unsqueeze(-1), 0.0), outside.unsqueeze(-1).to(x.dtype)], -1)
    hold = weight_in.new_zeros(2, 1, 3 * width)
    hold[..., width : 2 * width] = 1e4
    matrices, biases = torch.cat([weight_in, hold], 1).mT, torch.cat([bias.new_zeros(2, 2 * width), bias], -1)
    pieces = [piece for d in (0, 1) for piece in (matrices[d], weight[d].mT)]
    pieces += [piece for d in (0, 1) for piece in (bias_in[d], biases[d])]
    # In one piece of memory, in cuDNN's order, which is not the argument's: it would copy, and warn, at every call.
    memory = torch.cat([piece.reshape(-1) for piece in pieces])
    parts = memory.split([piece.numel() for piece in pieces])
    ordered = [parts[k].view(pieces[k].shape) for k in (0, 1, 4, 5, 2, 3, 6, 7)]
    start = x.new_zeros(2, len(x), width)
    states, _ = torch.gru(x, start, ordered, True, 1, 0.0, torch.is_grad_enabled(), True, True)
    return states @ weight_out.flatten(0, 1)


class BidirectionalGRU(nn.Module):
    """A linear function of the forward and backward states of a trial.

    Equal to two ``torch.nn.GRU`` of one layer, one over the mirrored trial, and a linear layer over both. The backward
    recursion starts at the trial's own end, not in its padding. What comes out for the padding means nothing.

    Args:
        in_dim: channels of the input.
        hidden_dim: width of each direction.
        out_dim: channels of the output.

    Shape: ``(B, T, in_dim)`` and lengths ``(B,)`` to ``(B, T, out_dim)``.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        bound = hidden_dim**-0.5
        self.weight_in = nn.Parameter(torch.empty(2, in_dim, 3 * hidden_dim).uniform_(-bound, bound))
        self.weight_hidden = nn.Parameter(torch.empty(2, hidden_dim, 3 * hidden_dim).uniform_(-bound, bound))
        self.bias_in = nn.Parameter(torch.empty(2, 3 * hidden_dim).uniform_(-bound, bound))
        self.bias_hidden = nn.Parameter(torch.empty(2, hidden_dim).uniform_(-bound, bound))
        self.weight_out = nn.Parameter(torch.randn(2, hidden_dim, out_dim))
        self.bias_out = nn.Parameter(torch.zeros(out_dim))
        # Kept out of the weights, so that a step of the optimiser moves the output by as much at any width.
        self.scale_out = (2 * hidden_dim) ** -0.5
        self._workspace = compiled.Workspace()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        recurrent = (self.weight_in, self.bias_in, self.weight_hidden, self.bias_hidden)
        tensors = (x, lengths, *recurrent, self.weight_out * self.scale_out)
        return self._way(*tensors)(*tensors) + self.bias_out

    def _way(self, *tensors: Tensor) -> Callable[..., Tensor]:
        """The fastest of the ways that can be had here."""
        x = tensors[0]
        if x.is_cuda:
            return by_torch
        if not torch.compiler.is_compiling() and _compiled(x.dtype) and compiled.fits(*tensors):
            return self._workspace
        return by_loop


def _compiled(dtype: torch.dtype) -> bool:
    """Whether there is a library for these numbers, and it does what the loop does."""
    return compiled.library(dtype) is not None and _correct(dtype)


@functools.cache
def _correct(dtype: torch.dtype) -> bool:
    lengths = torch.tensor([4, 2, 1], device="cpu")
    shapes = [(3, 4, 3), (2, 3, 51), (2, 51), (2, 17, 51), (2, 17), (2, 17, 2)]
    workspace = compiled.Workspace()
    same = kernels.agree(
        lambda x, *weights: by_loop(x, lengths, *weights),
        lambda x, *weights: workspace(x, lengths, *weights),
        shapes,
        dtype,
    )
    if not same:
        logger.warning("the compiled recurrent network is wrong on this machine and is not used")
    return same
