"""Linear maps between neurons and a common space: one matrix a recording, block by block and on several threads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_metassm.blocks import each_block, everywhere, share


def linear_by_recording(
    x: Float[Tensor, "... R K T inp"],
    weight: Float[Tensor, "R inp out"],
    bias: Float[Tensor, "R out"],
    num_neurons: Sequence[int] | None = None,
) -> Float[Tensor, "... R K T out"]:
    """``x_r W_r + b_r`` for every recording; leading dimensions (posterior draws) are as further trials.

    Outputs beyond a recording's number of neurons, if that is given, are padding, which has no gradient.
    """
    lead, (num, trials, bins, _) = x.shape[:-4], x.shape[-4:]
    rows = x.movedim(-4, 0).reshape(num, -1, bins, x.shape[-1])
    out = _Affine.apply(rows, weight, bias, num_neurons)
    return out.view(num, *lead, trials, bins, -1).movedim(0, -4)


class _Affine(torch.autograd.Function):
    """``x (R, K, T, I)``, ``weight (R, I, N)``, ``bias (R, N)`` to ``(R, K, T, N)``."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, num_neurons: Sequence[int] | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.num_neurons = num_neurons
        out = x.new_empty(*x.shape[:3], weight.shape[-1])

        def work(rows: slice, trials: slice, _: slice) -> None:
            piece = out[rows, trials]
            torch.baddbmm(
                bias[rows, None], x[rows, trials].flatten(1, 2), weight[rows], out=piece.flatten(1, 2)
            )

        each_block(out, work)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        grad_bias = weight.new_zeros(weight.shape[0], weight.shape[2])

        def work(rows: slice, trials: slice, neurons: slice) -> None:
            g = grad[rows, trials, :, neurons].flatten(1, 2)
            torch.bmm(g, weight[rows, :, neurons].mT, out=grad_x[rows, trials].flatten(1, 2))
            grad_weight[rows, :, neurons].baddbmm_(x[rows, trials].flatten(1, 2).mT, g)
            grad_bias[rows, neurons] += g.sum(1)

        each_block(grad, work, ctx.num_neurons)
        return grad_x, grad_weight, grad_bias, None


def centred_product(
    y: Tensor, mask: Tensor, center: Tensor, weight: Tensor, bias: Tensor, num_neurons: Sequence[int]
) -> Tensor:
    """``(mask (y - center)) @ weight + bias`` of every recording, differentiable in weight and bias alone.

    Args:
        y, mask: ``(R, K, T, N)``.
        center: ``(R, N)``.
        weight: ``(R, N, C)``, zero in the padding.
        bias: ``(R, C)``.
        num_neurons: the real number of neurons of every recording.

    Returns:
        ``(R, K, T, C)``.
    """
    return _CentredProduct.apply(y, mask, center, weight, bias, num_neurons)


class _CentredProduct(torch.autograd.Function):
    """From pieces of ``mask (y - center)`` that are made again for the backward pass, not kept."""

    @staticmethod
    def forward(
        ctx,
        y: Tensor,
        mask: Tensor,
        center: Tensor,
        weight: Tensor,
        bias: Tensor,
        num_neurons: Sequence[int],
    ):
        ctx.save_for_backward(y, mask, center)
        ctx.num_neurons = num_neurons
        out = y.new_empty(*y.shape[:3], weight.shape[-1])

        def work(rows: slice, trials: slice, neurons: slice) -> None:
            x = _piece(y, mask, center, rows, trials, neurons)
            torch.baddbmm(bias[rows, None], x, weight[rows, neurons], out=out[rows, trials].flatten(1, 2))

        each_block(y, work, num_neurons)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        y, mask, center = ctx.saved_tensors
        grad_weight = grad.new_zeros(*center.shape, grad.shape[-1])
        grad_bias = grad.new_zeros(len(center), grad.shape[-1])

        def work(rows: slice, trials: slice, neurons: slice) -> None:
            g = grad[rows, trials].flatten(1, 2)
            grad_weight[rows, neurons].baddbmm_(_piece(y, mask, center, rows, trials, neurons).mT, g)
            grad_bias[rows] += g.sum(1)

        each_block(y, work, ctx.num_neurons)
        return None, None, None, grad_weight, grad_bias, None


def with_first_channels(x: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """``x (R, ..., C)`` and its first channels ``(R, ..., number)``, whose gradients are summed in one pass."""
    return _FirstChannels.apply(x, number)


class _FirstChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, number: int):
        ctx.number = number
        return x.view_as(x), x[..., :number].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, of_first: Tensor):
        out = torch.empty_like(grad)

        def work(row: int) -> None:
            out[row].copy_(grad[row])
            out[row][..., : ctx.number].add_(of_first[row])

        share(work, len(grad), grad)
        return out, None


def _piece(y: Tensor, mask: Tensor, center: Tensor, rows: slice, trials: slice, neurons: slice) -> Tensor:
    """Rows of ``mask (y - center)`` of a block, ``(R', K' T, N')``."""
    x = torch.sub(y[rows, trials, :, neurons], center[rows, None, None, neurons])
    if everywhere(mask) is mask:
        x.mul_(mask[rows, trials, :, neurons].to(x.dtype))
    return x.flatten(1, 2)
