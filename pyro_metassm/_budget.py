"""A bound on what constructors may make that take their arguments from a file."""

from __future__ import annotations

import math

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Budget(TorchDispatchMode):
    """Stops constructors that would make more numbers, or more tensors, than go with what a file holds."""

    def __init__(self, numbers: float, calls: float = math.inf):
        super().__init__()
        self.left, self.calls = numbers, calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        numbers, is_factory = _numbers(func, args)
        if numbers > self.left:
            raise ValueError(f"it claims sizes far beyond what the file holds ({numbers:.3g} numbers)")
        self.left -= numbers if is_factory else 0
        self.calls -= is_factory
        if self.calls < 0:
            raise ValueError("it claims parts far beyond what the file holds")
        return func(*args, **(kwargs or {}))


def _numbers(func, args) -> tuple[float, bool]:
    """How many numbers an operation names by its shape, and whether it makes them from nothing."""
    is_factory = not any(isinstance(a, Tensor) for a in args)
    for a in args:
        if isinstance(a, list | tuple) and a and all(type(n) is int for n in a):
            return math.prod(abs(n) for n in a), is_factory
    sizes = [a for a in args if type(a) in (int, float)]
    if not is_factory or not sizes:
        return 0, is_factory
    if "arange" in func.name():
        return abs(sizes[1] - sizes[0]) if len(sizes) > 1 else abs(sizes[0]), True
    return math.prod(abs(n) for n in sizes) ** (2 if "eye" in func.name() and len(sizes) == 1 else 1), True
