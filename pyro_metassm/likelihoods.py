"""Families of observations: from the predictor of every neuron, ``z C_i + d_i``, to a distribution.

A family is a small module made from the table of neurons. ``forward(predictor, recording)`` returns the distribution
of every neuron and bin (no event dimension: the model adds masks, plates and events). Parameters of neurons (noise,
dispersion) are rows of the table. Another likelihood is a subclass here, or an override of ``MetaSSM.likelihood``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_metassm.neurons import NeuronTable
from pyro_metassm.observations import NeuronNormal, SaturatingPoisson, saturating_log_rate
from pyro_metassm.recordings import Recording, Recordings


class Likelihood(nn.Module, ABC):
    """A family of observations.

    Args:
        neurons: the table of all neurons, which sizes the parameters of neurons.
    """

    def __init__(self, neurons: NeuronTable):
        super().__init__()
        self.neurons = neurons

    @abstractmethod
    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        """``predictor (..., R, K, T, neuron)`` and its recordings' rows ``(R,)`` to a distribution of that shape."""

    def check(self, recording: Recording) -> None:
        """Raise ``ValueError`` if this family cannot have produced the recording."""

    def start(self, recordings: Recordings) -> None:
        """Start the parameters of neurons from the data."""

    def by_neuron(self, parameter: Tensor, predictor: Tensor, recording: Tensor) -> Tensor:
        """Rows of a parameter of neurons ``(total,)`` for this batch, ``(R, 1, 1, neuron)``."""
        return self.neurons.gather(parameter, recording, predictor.shape[-1])[:, None, None, :]


class Gaussian(Likelihood):
    r"""``y ~ Normal(predictor, sd_n)``, a learned standard deviation per neuron; identity link."""

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        self.log_sd = nn.Parameter(torch.zeros(neurons.total))

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        sd = self.by_neuron(self.log_sd, predictor, recording).exp()
        return NeuronNormal(predictor, sd, num_neurons=self.neurons.counts(recording))

    @torch.no_grad()
    def start(self, recordings: Recordings) -> None:
        """Half of each neuron's standard deviation: the dynamics are to explain the rest."""
        for name, recording in recordings.items():
            never = ~recording.mask.any((0, 1))  # neurons without an observation keep their sd
            sd = np.std(recording.values, axis=(0, 1), where=recording.mask | never)
            start = np.log(0.5 * np.where(never, 2.0, np.maximum(sd, 1e-3)))
            self.log_sd[self.neurons.slice(name)] = torch.as_tensor(start).to(self.log_sd)


class _Counts(Likelihood):
    r"""Counts with an exponential link that saturates softly at a ceiling per neuron.

    ``log rate = c - softplus(c - predictor)``, with ``exp(c)`` twice the neuron's largest count (at least 2): as
    ``exp(predictor)`` in the range of the data, and bounded where an unbounded exponential would misfit large rates.
    """

    log_ceiling: Tensor

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        self.register_buffer("log_ceiling", torch.full((neurons.total,), 3.0))

    def log_rate(self, predictor: Tensor, recording: Tensor) -> Tensor:
        ceiling = self.by_neuron(self.log_ceiling, predictor, recording)
        return saturating_log_rate(predictor, ceiling)

    def check(self, recording: Recording) -> None:
        recording.check_counts()

    def start(self, recordings: Recordings) -> None:
        for name, recording in recordings.items():
            peak = np.maximum(recording.values.max(axis=(0, 1)), 1.0)
            self.log_ceiling[self.neurons.slice(name)] = torch.as_tensor(np.log(2.0 * peak)).to(
                self.log_ceiling
            )


class Poisson(_Counts):
    r"""``y ~ Poisson(rate)``, with the saturating exponential link."""

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        ceiling = self.by_neuron(self.log_ceiling, predictor, recording)
        return SaturatingPoisson(predictor, ceiling, num_neurons=self.neurons.counts(recording))


class NegativeBinomial(_Counts):
    r"""Overdispersed counts with mean ``rate`` and variance ``rate + rate^2 / r_n``, ``r_n`` learned per neuron."""

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        self.log_dispersion = nn.Parameter(torch.full((neurons.total,), 2.0))

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        log_r = self.by_neuron(self.log_dispersion, predictor, recording)
        logits = self.log_rate(predictor, recording) - log_r
        return dist.NegativeBinomial(log_r.exp().expand_as(logits), logits=logits)
