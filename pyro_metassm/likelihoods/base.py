"""What every family of observations shares."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_metassm.neurons import NeuronTable
from pyro_metassm.recordings import Recording, Recordings

SHARE = 0.5  # of a neuron's standard deviation that starts as noise: the dynamics are to explain the rest


def is_family(thing: object) -> bool:
    """Whether it is a class of likelihoods that can be made."""
    return inspect.isclass(thing) and issubclass(thing, Likelihood) and not inspect.isabstract(thing)


class Likelihood(nn.Module, ABC):
    """A family of observations.

    Args:
        neurons: the table of all neurons, which sizes the parameters of neurons.
    """

    def __init__(self, neurons: NeuronTable):
        super().__init__()
        self.neurons = neurons

    @staticmethod
    def checked(family: type[Likelihood]) -> type[Likelihood]:
        """The family, if it is a class that can be made; else ``ValueError``."""
        if not is_family(family):
            raise ValueError(
                "likelihood: needed a class of pyro_metassm.likelihoods, such as likelihoods.Poisson or "
                f"likelihoods.Mixed.of({{...}}), got {family!r}"
            )
        return family

    @abstractmethod
    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        """``predictor (..., R, K, T, neuron)`` and its recordings' rows ``(R,)`` to a distribution of that shape."""

    def check(self, recording: Recording) -> None:
        """Raise ``ValueError`` if this family cannot have produced the recording."""

    def start(self, recordings: Recordings) -> None:
        """Start the parameters of neurons from the data."""

    def predictor_at(self, mean: Tensor, rows: slice) -> Tensor | None:
        """About the predictors at which the neurons ``rows`` of the table have this mean, ``(N,)``.

        Read-outs of a family whose mean is not its predictor start there. None, the default, or NaN for a neuron is
        the logarithm for counts, and least squares of the observations themselves for others.
        """
        return None

    @property
    def kinds(self) -> Tensor:
        """Which kind of observations each neuron of the table has, ``(total,)``: numbers below ``num_kinds``."""
        return torch.zeros(self.neurons.total, dtype=torch.long, device=self.neurons.index.device)

    @property
    def num_kinds(self) -> int:
        """How many kinds there are; one, but for mixed families."""
        return 1

    def by_neuron(self, parameter: Tensor, predictor: Tensor, recording: Tensor) -> Tensor:
        """Rows of a parameter of neurons ``(total,)`` for this batch, ``(R, 1, 1, neuron)``."""
        return self.neurons.gather(parameter, recording, predictor.shape[-1])[:, None, None, :]

    @torch.no_grad()
    def write(self, parameter: Tensor, name: str, values: np.ndarray) -> None:
        """Set a recording's rows ``(N_i, ...)`` of a parameter of neurons."""
        parameter[self.neurons.slice(name)] = torch.as_tensor(values).to(parameter)


def sd_of(values: np.ndarray, mask: np.ndarray, least: float | np.ndarray = 1e-3) -> np.ndarray:
    """Each neuron's standard deviation ``(N,)`` over what was observed; at least ``least``, 2 without observation."""
    never = ~mask.any((0, 1))
    sd = np.std(values, axis=(0, 1), where=mask | never)
    return np.where(never, 2.0, np.maximum(sd, least))


def mean_of(values: np.ndarray, mask: np.ndarray, otherwise: float) -> np.ndarray:
    """Each neuron's mean ``(N,)`` over what was observed; ``otherwise`` without observation."""
    never = ~mask.any((0, 1))
    return np.where(never, otherwise, np.mean(values, axis=(0, 1), where=mask | never))
