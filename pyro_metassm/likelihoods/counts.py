"""Families of counts and of events that happen or do not."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn import functional

from pyro_metassm import _checks as checks
from pyro_metassm.likelihoods.base import Likelihood
from pyro_metassm.likelihoods.mixtures import ZeroInflated
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.observations import SaturatingPoisson, saturating_log_rate
from pyro_metassm.recordings import Recording, Recordings


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
            self.write(self.log_ceiling, name, np.log(2.0 * np.maximum(peak_of(recording), 1.0)))


class Poisson(_Counts):
    r"""``y ~ Poisson(rate)``, with the exponential link, bounded softly.

    ``1 / rate = exp(-predictor) + 1 / ceiling`` in counts per bin, with a ceiling of twice the neuron's largest count:
    latents multiply rates, and a forecast that strays cannot explode. :class:`SoftplusPoisson` has the softplus link.
    """

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


class ZeroInflatedPoisson(_Counts):
    r"""``y = 0`` with probability ``g_n``, else ``y ~ Poisson(rate)``; the saturating exponential link.

    ``g_n``, learned per neuron (its logit ``gate``), is the share of bins in which the neuron is silent whatever the
    latents say; the mean is ``(1 - g_n) rate``.

    Reference: Lambert (1992), Zero-inflated Poisson regression, Technometrics 34.
    """

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        # One bin in twenty: the rates come first.
        self.gate = nn.Parameter(torch.full((neurons.total,), -3.0))

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        ceiling = self.by_neuron(self.log_ceiling, predictor, recording)
        gate = self.by_neuron(self.gate, predictor, recording)
        return ZeroInflated(SaturatingPoisson(predictor, ceiling), gate.expand_as(predictor))


class SoftplusPoisson(Likelihood):
    r"""``y ~ Poisson(rate)`` with ``rate = log(1 + exp(predictor))`` in counts per bin: the softplus link.

    Linear in the latents where rates are above one per bin, exponential far below: for neurons whose rates add up
    rather than multiply. No parameters of neurons.
    """

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        # log softplus(x) is x to single precision where x < -20, and -inf where softplus(x) is 0.
        log_rate = torch.where(
            predictor < -20.0, predictor, functional.softplus(predictor.clamp(min=-20.0)).log()
        )
        return LogRatePoisson(log_rate)

    def check(self, recording: Recording) -> None:
        recording.check_counts()

    def predictor_at(self, mean: Tensor, rows: slice) -> Tensor:
        mean = mean.clamp(min=1e-3)
        return mean + (-torch.expm1(-mean)).log()


class Bernoulli(Likelihood):
    r"""``y ~ Bernoulli(p)`` with ``p = 1 / (1 + exp(-predictor))``: a spike in the bin or none; logit link.

    For bins so short that counts are 0 or 1. No parameters of neurons.
    """

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        return dist.Bernoulli(logits=predictor)

    def check(self, recording: Recording) -> None:
        y = recording.values
        checks.refuse(
            recording,
            (y != 0) & (y != 1),
            "only 0 and 1 for a Bernoulli likelihood",
            "pass shorter bins or y > 0, or use a count likelihood",
        )

    def predictor_at(self, mean: Tensor, rows: slice) -> Tensor:
        return mean.clamp(0.02, 0.98).logit()


class Binomial(Likelihood):
    r"""``y ~ Binomial(n_n, p)`` with ``p = 1 / (1 + exp(-predictor))``, the mean ``n_n p``; logit link.

    Counts with an upper bound and less variance than a Poisson's: spikes with refractoriness, or so many of ``n``
    sub-bins. ``n_n`` is the neuron's largest count in the data that the model is made with (at least 1), or
    ``num_trials`` for all neurons where a subclass sets it. No learned parameters of neurons.

    Example:
        >>> import pyro_metassm as pm
        >>> class OutOfTen(pm.likelihoods.Binomial):
        ...     num_trials = 10
    """

    num_trials: int | None = None
    total_count: Tensor

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        n = self.num_trials
        if n is not None and (not isinstance(n, int) or n < 1):
            raise ValueError(f"{type(self).__name__}.num_trials: needed an integer of at least 1, got {n!r}")
        self.register_buffer("total_count", torch.full((neurons.total,), float(n or 0)))  # 0: not known yet

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        n = self.by_neuron(self.total_count, predictor, recording).clamp(min=1.0)
        return dist.Binomial(n.expand_as(predictor), logits=predictor)

    def check(self, recording: Recording) -> None:
        recording.check_counts()
        most = np.full(recording.num_neurons, np.inf if self.num_trials is None else self.num_trials)
        if self.num_trials is None and recording.name in self.neurons.names:
            known = self.total_count[self.neurons.slice(recording.name)].cpu().numpy()
            if len(known) == len(most):  # else whoever compares the neurons says so
                most = np.where(known > 0, known, np.inf)
        checks.refuse(
            recording,
            recording.values > most,
            "counts of no more than each neuron's number of trials for a Binomial likelihood",
            "make the model with all of the data, or subclass Binomial with num_trials = the largest count possible",
        )

    def start(self, recordings: Recordings) -> None:
        if self.num_trials is None:
            for name, recording in recordings.items():
                self.write(self.total_count, name, np.maximum(peak_of(recording), 1.0))

    def predictor_at(self, mean: Tensor, rows: slice) -> Tensor:
        return (mean / self.total_count[rows].clamp(min=1.0)).clamp(0.02, 0.98).logit()


class LogRatePoisson(dist.Poisson):
    """``Poisson(exp(log_rate))``, scored by the log rate."""

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None):
        self.log_rate = log_rate
        super().__init__(log_rate.exp(), validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return LogRatePoisson(self.log_rate.expand(batch_shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return value * self.log_rate - self.rate - torch.lgamma(value + 1)


def peak_of(recording: Recording) -> np.ndarray:
    """Each neuron's largest count ``(N,)``; 0 without observation."""
    return recording.values.max(axis=(0, 1))
