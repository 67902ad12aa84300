"""Families of positive numbers: calcium signals, spectral power, durations."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn import functional

from pyro_metassm import _checks as checks
from pyro_metassm.likelihoods.base import SHARE, Likelihood, mean_of, sd_of
from pyro_metassm.likelihoods.mixtures import ZeroInflated
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.observations import saturating_log_rate
from pyro_metassm.recordings import Recording, Recordings

SMALLEST = 1e-6  # of a neuron's largest value: means need not reach below
SHAPES = (0.1, 1e4)  # between which the shape of a Gamma starts


class LogNormal(Likelihood):
    r"""``log y ~ Normal(predictor, sd_n)``, a learned ``sd_n`` of the logarithm per neuron; logarithmic link.

    ``exp(predictor)`` is the median in the units of the data, the mean is ``exp(predictor + sd_n^2 / 2)``.
    """

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        self.log_sd = nn.Parameter(torch.zeros(neurons.total))

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        sd = self.by_neuron(self.log_sd, predictor, recording).exp()
        return dist.LogNormal(predictor, sd.expand_as(predictor))

    def check(self, recording: Recording) -> None:
        _check_positive(recording, "LogNormal")

    def start(self, recordings: Recordings) -> None:
        """Half of the standard deviation of each neuron's logarithm."""
        for name, recording in recordings.items():
            log = np.log(np.where(recording.mask, recording.values, 1.0))
            self.write(self.log_sd, name, np.log(SHARE * sd_of(log, recording.mask)))

    def predictor_at(self, mean: Tensor, rows: slice) -> Tensor:
        return mean.log() - 0.5 * (2.0 * self.log_sd[rows]).exp()


class Gamma(Likelihood):
    r"""``y ~ Gamma(shape k_n, mean mu)``, so that ``sd = mu / sqrt(k_n)``; exponential link with a floor and a ceiling.

    ``log mu = f + softplus(s - f)`` with ``s = c - softplus(c - predictor)``: as the predictor in the range of the
    data, and never below half of the neuron's smallest nor above twice its largest value (``f`` and ``c`` are their
    logarithms), where the data say nothing. ``k_n`` is learned per neuron.
    """

    log_floor: Tensor
    log_ceiling: Tensor

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        self.log_shape = nn.Parameter(torch.zeros(neurons.total))
        self.register_buffer("log_floor", torch.full((neurons.total,), -10.0))
        self.register_buffer("log_ceiling", torch.full((neurons.total,), 3.0))

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        floor, ceiling, log_shape = (
            self.by_neuron(p, predictor, recording)
            for p in (self.log_floor, self.log_ceiling, self.log_shape)
        )
        log_mean = floor + functional.softplus(saturating_log_rate(predictor, ceiling) - floor)
        return dist.Gamma(log_shape.exp().expand_as(log_mean), (log_shape - log_mean).exp())

    def check(self, recording: Recording) -> None:
        _check_positive(recording, type(self).__name__)

    def start(self, recordings: Recordings) -> None:
        """Half of each neuron's standard deviation, about its mean."""
        for name, recording in recordings.items():
            y, mask = recording.values, recording.mask & (recording.values > 0)
            never = ~mask.any((0, 1))
            mean = mean_of(y, mask, otherwise=1.0)
            shape = (mean / (SHARE * sd_of(y, mask, least=1e-3 * mean))) ** 2
            self.write(self.log_shape, name, np.log(np.clip(np.where(never, 1.0, shape), *SHAPES)))
            most = np.where(never, 1.0, np.max(y, axis=(0, 1), where=mask, initial=0.0))
            least = np.where(never, 1.0, np.min(y, axis=(0, 1), where=mask, initial=np.inf))
            self.write(self.log_ceiling, name, np.log(2.0 * most))
            self.write(self.log_floor, name, np.log(0.5 * np.maximum(least, SMALLEST * most)))

    def predictor_at(self, mean: Tensor, rows: slice) -> Tensor:
        return mean.log()


class ZeroInflatedGamma(Gamma):
    r"""``y = 0`` with probability ``g``, else ``y ~ Gamma(shape k_n, mean mu)``: deconvolved calcium, often just zero.

    ``logit g = a_n - b_n predictor`` with ``gate = a_n`` and ``slope = b_n`` learned per neuron: a driven neuron may be
    active more often, more strongly, or both. ``mu`` has the link of :class:`Gamma`; the mean is ``(1 - g) mu``.

    Reference: Wei, Zhou, Grosmark et al. (2020), A zero-inflated gamma model for deconvolved calcium imaging traces,
    Neurons, Behavior, Data analysis, and Theory 3; here without their shift of the smallest value.
    """

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        self.gate = nn.Parameter(torch.zeros(neurons.total))
        self.slope = nn.Parameter(torch.zeros(neurons.total))

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        gate, slope = (self.by_neuron(p, predictor, recording) for p in (self.gate, self.slope))
        return ZeroInflated(super().forward(predictor, recording), gate - slope * predictor)

    def check(self, recording: Recording) -> None:
        checks.refuse(
            recording,
            recording.values < 0,
            "no negative values for a ZeroInflatedGamma likelihood",
            "pass deconvolved events (zero where there is none), or use a Gaussian likelihood",
        )

    def start(self, recordings: Recordings) -> None:
        """As :class:`Gamma` from the values above zero; the share of zeros, whatever the predictor."""
        super().start(recordings)
        for name, recording in recordings.items():
            zeros = (recording.mask & (recording.values == 0)).sum((0, 1)) + 0.5
            others = (recording.mask & (recording.values > 0)).sum((0, 1)) + 0.5
            self.write(self.gate, name, np.log(zeros / others))
            self.write(self.slope, name, np.zeros(recording.num_neurons))

    def predictor_at(self, mean: Tensor, rows: slice) -> Tensor:
        return mean.log() - functional.logsigmoid(-self.gate[rows])


def _check_positive(recording: Recording, family: str) -> None:
    checks.refuse(
        recording,
        recording.mask & (recording.values <= 0),
        f"values above zero for a {family} likelihood",
        "put NaN where a value is missing, or use ZeroInflatedGamma (zeros) or Gaussian (negative values)",
    )
