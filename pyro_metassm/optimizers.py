"""The optimiser, and the learning rate over the steps of a fit."""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

WARM_UP = 0.1  # share of the steps
FIRST, LAST = 0.1, 0.02  # of the peak


def one_cycle(optimizer: Optimizer, num_steps: int) -> LambdaLR:
    """One cycle: linear from a tenth of the peak over the first tenth of the steps, then a cosine to 2 % of it.

    Args:
        optimizer: its groups' learning rates are the peaks.
        num_steps: steps in all; any number of them.
    """
    rise = max(1.0, WARM_UP * num_steps)

    def factor(step: int) -> float:
        if step < rise:
            return FIRST + (1 - FIRST) * step / rise
        done = min(1.0, (step - rise) / max(1.0, num_steps - rise))
        return LAST + (1 - LAST) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def adam(parameters: list, **options) -> Adam:
    """Adam in one pass over all parameters where the device has it: many small ones otherwise cost a step's time."""
    first = parameters[0]["params"][0] if isinstance(parameters[0], dict) else parameters[0]
    return Adam(parameters, fused=first.device.type in ("cpu", "cuda"), **options)


def skip_where(optimizer: Adam, bad: Tensor) -> None:
    """Let the next step of :func:`adam` leave everything as it is where ``bad`` is true, without a look at it.

    It is the way in which a scaler of gradients skips steps; a device whose Adam is not in one pass takes the step.

    Args:
        optimizer: of :func:`adam`.
        bad: a bool on the device of the parameters.
    """
    if optimizer.defaults["fused"]:
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
