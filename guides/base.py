"""What every guide shares: the read-in, the posterior of the embedding, the plates."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_metassm.distributions import MarkovPath
from pyro_metassm.global_sites import GlobalPosterior
from pyro_metassm.guides.encoders import EmbeddingEncoder, SetEncoder, smooth
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.neurons import ReadIn
from pyro_metassm.products import with_first_channels
from pyro_metassm.recordings import Batch


class AmortizedGuide(nn.Module, ABC):
    r"""An amortised sequential guide, ``q(e_i | y) prod_k q(z_k | y_k, e_i)`` (eq. 14-17).

    Global sites of the model, its ``PyroSample``s, have a mean-field posterior
    (:class:`~pyro_metassm.global_sites.GlobalPosterior`).

    A read-in per recording maps its neurons into a common space, ``ybar = Omega_i(y)``; everything after it is shared
    by all recordings. The first ``latent_dim`` channels of ``ybar``, smoothed over time where the data are noisy, are
    the *frame*: a rough estimate of the latents from which the encoders start.

    Args:
        model: the model that this guide is for.
        read_in_dim: channels of the common space, at least ``latent_dim``; default ``max(16, 2 latent_dim)``.
        embedding_encoder: class of the encoder of a trial for the embedding.
        detach_embedding: cut the gradient of ``e`` where it enters the encoder of the states, so that the embedding is
            learned from the dynamics.
        neuron_dropout: while training, the largest share of its neurons that is hidden from the guide in a trial: the
            share is uniform from 0 to it, the neurons are drawn anew in every trial and step. The model is scored on
            all of them (any posterior gives a valid bound), so that what the guide says of the latents has to predict
            neurons that it does not see.

    Raises:
        ValueError: for a share outside [0, 1), or ``read_in_dim < latent_dim``.
    """

    deviations: tuple[str, ...] = ()
    learning_rates: Mapping[str, float] = {}
    """Both as of :class:`~pyro_metassm.models.MetaSSM`."""

    def __init__(
        self,
        model: MetaSSM,
        *,
        read_in_dim: int | None = None,
        embedding_encoder: type[EmbeddingEncoder] = SetEncoder,
        detach_embedding: bool = True,
        neuron_dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 <= neuron_dropout < 1:
            raise ValueError(f"neuron_dropout: needed a share in [0, 1), got {neuron_dropout!r}")
        read_in_dim = max(16, 2 * model.latent_dim) if read_in_dim is None else read_in_dim
        if read_in_dim < model.latent_dim:
            raise ValueError(
                f"read_in_dim: needed at least latent_dim = {model.latent_dim}, got {read_in_dim}"
            )
        self._model = (model,)  # in a tuple: the guide does not own the model's parameters
        self.config = {
            "read_in_dim": read_in_dim,
            "embedding_encoder": embedding_encoder,
            "detach_embedding": detach_embedding,
            "neuron_dropout": neuron_dropout,
        }
        self.read_in = ReadIn(model.neurons, read_in_dim)
        self.encode_embedding = embedding_encoder(model.latent_dim, model.embedding_dim)
        self.global_sites = GlobalPosterior(model)
        self.detach_embedding = detach_embedding
        self.neuron_dropout = neuron_dropout
        self.smoothing: Tensor
        # Sd of the Gaussian kernel of every recording's frame, in bins; 0 is none.
        self.register_buffer("smoothing", torch.zeros(len(model.neurons.names)))
        self._read: tuple[Tensor | None, int, dict[str, float]] = (None, 0, {})

    @property
    def model(self) -> MetaSSM:
        return self._model[0]

    @abstractmethod
    def latents_posterior(
        self, ybar: Tensor, frame: Tensor, share: Tensor, e: Tensor, prior: MarkovPath, batch: Batch
    ) -> TorchDistribution:
        """``q(z_k | y_k, e_i)``, event ``(time, latent_dim)``; the first three as of :meth:`common_space`."""

    def start_posterior(self, noise: Tensor) -> None:
        """Start the posterior of the latents near the frame; a guide that starts otherwise leaves it.

        Args:
            noise: sd of the frame's own noise, ``(latent_dim,)``.
        """

    def embedding_posterior(self, statistics: Tensor) -> TorchDistribution:
        """``q(e_i | y)`` from the mean over trials of the encoder's means and variances ``(R, 2 embedding_dim)``."""
        loc, variance = statistics.unsqueeze(-2).chunk(2, -1)
        return dist.Normal(loc, variance.sqrt()).to_event(1)

    def forward(self, batch: Batch) -> None:
        model = self.model
        ybar, frame, share = self.common_space(self._with_hidden_neurons(batch))
        statistics = batch.embedding_statistics
        if statistics is None:
            statistics = self.embedding_statistics(frame, share, batch)
        with model.given(self.global_sites()), model.recording_plate(batch):
            e = pyro.sample("embedding", self.embedding_posterior(statistics))
            with model.trial_plate(batch), pyro.poutine.scale(scale=batch.trial_scale):
                prior = model.path_prior(e, batch)
                e = e.detach() if self.detach_embedding else e
                pyro.sample("latents", self.latents_posterior(ybar, frame, share, e, prior, batch))

    def common_space(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """``ybar (R, K, T, read_in_dim)``, the frame ``(R, K, T, latent_dim)`` and the share of neurons seen."""
        self.read_in.neurons.check(batch.names, batch.num_neurons)
        ybar, share = self.read_in(batch)
        ybar, frame = with_first_channels(ybar, self.model.latent_dim)
        return ybar, smooth(frame, share, self._widths(batch)), share

    def _with_hidden_neurons(self, batch: Batch) -> Batch:
        """While training, the batch with some of the neurons of every trial missing in all of its bins."""
        if not self.training or self.neuron_dropout == 0:
            return batch
        chance = torch.rand(*batch.mask.shape[:2], 1, batch.width, device=batch.mask.device)
        share = torch.rand(*batch.mask.shape[:2], 1, 1, device=batch.mask.device)
        return dataclasses.replace(batch, mask=batch.mask & (chance >= self.neuron_dropout * share))

    def _widths(self, batch: Batch) -> list[float]:
        """``smoothing`` as numbers, read again only after it has changed: reading it makes the host wait for a GPU."""
        if self._read[0] is not self.smoothing or self._read[1] != self.smoothing._version:
            widths = dict(zip(self.read_in.neurons.names, self.smoothing.tolist(), strict=True))
            self._read = (self.smoothing, self.smoothing._version, widths)
        return [self._read[2][name] for name in batch.names]

    def embedding_statistics(self, frame: Tensor, share: Tensor, batch: Batch) -> Tensor:
        """Mean over the trials that have data of the encoder's mean and variance, ``(R, 2 embedding_dim)`` (eq. 15).

        Where no trial has data they are those of a standard Normal.
        """
        mean, variance = self.encode_embedding(frame, share > 0)
        has_data = (share > 0).any(-2).to(mean.dtype)  # (R, K, 1)
        number = has_data.sum(-2)
        mean, variance = ((x * has_data).sum(-2) / number.clamp(min=1) for x in (mean, variance))
        return torch.cat([mean, variance + (number == 0)], -1)
