"""The recurrent encoder against PyTorch's own, and its backward pass against autograd and finite differences."""

import pytest
import torch
from torch import nn

from pyro_metassm.guides.gru import BidirectionalGRU, _Recursion


def reference(ours: BidirectionalGRU) -> list[nn.GRU]:
    """Two PyTorch GRUs with the same weights."""
    hidden = ours.weight_hidden.shape[1]
    twins = []
    for d in range(2):
        gru = nn.GRU(ours.weight_in.shape[1], hidden, batch_first=True, dtype=ours.weight_in.dtype)
        with torch.no_grad():
            gru.weight_ih_l0.copy_(ours.weight_in[d].mT)
            gru.weight_hh_l0.copy_(ours.weight_hidden[d].mT)
            gru.bias_ih_l0.copy_(ours.bias_in[d])
            gru.bias_hh_l0.zero_()
            gru.bias_hh_l0[2 * hidden :].copy_(ours.bias_hidden[d])
        twins.append(gru)
    return twins


@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 4, 1]])
def test_equals_two_gru_of_pytorch_in_value_and_gradient(lengths):
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


def test_backward_against_finite_differences():
    torch.manual_seed(1)
    shapes = [(2, 4, 3, 5), (2, 5, 6), (2, 6), (2, 2, 6), (2, 2)]  # x, V, c, W, b
    leaves = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(_Recursion.apply, leaves)
