"""What the tests of recorded functions record, and what they compare."""

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_metassm.capture import USES, Captures

DOUBLE = torch.double


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
