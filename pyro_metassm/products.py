"""Linear maps between neurons and a common space: one matrix a recording, block by block and on several threads."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyro_metassm.blocks import each_block, everywhere


def linear_by_recording(
    x: Float[Tensor, "... R K T inp"], weight: Float[Tensor, "R inp out"], bias: Float[Tensor, "R out"]
) -> Float[Tensor, "... R K T out"]:
    """``x_r W_r + b_r`` for every recording; leading dimensions (posterior draws) are as further trials."""
    lead, (num, trials, bins, _) = x.shape[:-4], x.shape[-4:]
    rows = x.movedim(-4, 0).reshape(num, -1, bins, x.shape[-1])
    out = _Affine.apply(rows, weight, bias)
    return out.view(num, *lead, trials, bins, -1).movedim(0, -4)


class _Affine(torch.autograd.Function):
    """``x (R, K, T, I)``, ``weight (R, I, N)``, ``bias (R, N)`` to ``(R, K, T, N)``."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        out = x.new_empty(*x.shape[:3], weight.shape[-1])

        def work(rows: slice, trials: slice) -> None:
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

        def work(rows: slice, trials: slice) -> None:
            g = grad[rows, trials].flatten(1, 2)
            torch.bmm(g, weight[rows].mT, out=grad_x[rows, trials].flatten(1, 2))
            grad_weight[rows].baddbmm_(x[rows, trials].flatten(1, 2).mT, g)
            grad_bias[rows] += g.sum(1)

        each_block(grad, work)
        return grad_x, grad_weight, grad_bias


def centred_product(
    y: Tensor, mask: Tensor, center: Tensor, weight: Tensor, num_neurons: tuple[int, ...]
) -> Tensor:
    """``(mask (y - center)) @ weight`` of every recording, differentiable in the weight alone.

    Args:
        y, mask: ``(R, K, T, N)``.
        center: ``(R, N)``.
        weight: ``(R, N, C)``, zero in the padding.
        num_neurons: the real number of neurons of every recording.

    Returns:
        ``(R, K, T, C)``.
    """
    return _CentredProduct.apply(y, mask, center, weight, num_neurons)


class _CentredProduct(torch.autograd.Function):
    """From pieces of ``mask (y - center)`` that are made again for the backward pass, not kept."""

    @staticmethod
    def forward(ctx, y: Tensor, mask: Tensor, center: Tensor, weight: Tensor, num_neurons: tuple[int, ...]):
        ctx.save_for_backward(y, mask, center)
        ctx.num_neurons = num_neurons
        out = y.new_empty(*y.shape[:3], weight.shape[-1])

        def work(rows: slice, trials: slice) -> None:
            x = _piece(y, mask, center, rows, trials, num_neurons)
            out[rows, trials] = torch.bmm(x, weight[rows, : x.shape[-1]]).view(out[rows, trials].shape)

        each_block(y, work)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        y, mask, center = ctx.saved_tensors
        grad_weight = grad.new_zeros(*center.shape, grad.shape[-1])

        def work(rows: slice, trials: slice) -> None:
            x = _piece(y, mask, center, rows, trials, ctx.num_neurons)
            grad_weight[rows, : x.shape[-1]].baddbmm_(x.mT, grad[rows, trials].flatten(1, 2))

        each_block(y, work)
        return None, None, None, grad_weight, None


def _piece(y: Tensor, mask: Tensor, center: Tensor, rows: slice, trials: slice, num_neurons) -> Tensor:
    """Rows of ``mask (y - center)`` of some recordings and trials, without common padding ``(R', K' T, N')``."""
    neurons = slice(max(num_neurons[rows]))
    x = torch.sub(y[rows, trials, :, neurons], center[rows, None, None, neurons])
    if everywhere(mask) is mask:
        x.mul_(mask[rows, trials, :, neurons].to(x.dtype))
    return x.flatten(1, 2)
