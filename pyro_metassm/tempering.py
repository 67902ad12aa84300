"""Counts while states are known roughly: they vary more than a Poisson likelihood at those states has it."""

from __future__ import annotations

import math
from types import SimpleNamespace

from torch import Tensor
from torch.nn import functional

from pyro_metassm.observations import SaturatingPoisson, saturating_log_rate

WORTH = 5.0  # counts that a bin of a neuron says as much as, at most


class Overdispersed:
    r"""Counts of a log rate that is known up to a factor with variance ``1 / r``: negative binomial.

    ``log p(y) = y x - (y + r) log(r + e^x)`` up to what does not depend on the log rate ``x``. Its slope and its
    information are those of a Poisson count in ``r / (r + e^x)``: those of ``r`` counts where there are thousands.

    Args:
        y: Poisson counts of known rates.
        r: ``r``.
    """

    def __init__(self, y: SaturatingPoisson, r: float):
        self.y, self.r = y, r

    def in_support(self, value: Tensor, mask: Tensor) -> Tensor:
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        log_rate = saturating_log_rate(self.y.predictor, self.y.log_ceiling)
        return value * log_rate - (value + self.r) * functional.softplus(log_rate - math.log(self.r))


def tempered(model, r: float = WORTH) -> SimpleNamespace:
    """A model as smoothers and regressions are to see it: its read-outs, its chain of states, a wider likelihood.

    Bursts of thousands of counts, taken at their word, bend states and read-outs to what is wrong with either.
    """

    def likelihood(predictor: Tensor, recording: Tensor):
        y = model.likelihood(predictor, recording)
        return Overdispersed(y, r) if isinstance(y, SaturatingPoisson) else y

    same = ("read_out", "observation", "initial", "process_noise")  # an edit may lack the last
    known = {name: getattr(model, name) for name in same if hasattr(model, name)}
    return SimpleNamespace(likelihood=likelihood, **known)
