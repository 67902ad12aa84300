"""The exact posterior of the linear-Gaussian model: a Kalman smoother, written as one Gaussian over a path."""

from __future__ import annotations

import math

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.linalg import cholesky, solve_triangular

from pyro_metassm.models.linear_gaussian import LinearGaussian
from pyro_metassm.recordings import Batch


class ExactSmoother(nn.Module):
    r"""``q(e_i) = p(e_i)`` and ``q(z_k | y_k) = p(z_k | y_k)``, whole paths at once and without parameters.

    The posterior's precision is that of the chain plus ``C_i^T R_i^-1 C_i`` of the neurons seen in each bin, a
    block-tridiagonal matrix. With it every one-sample ELBO equals the log evidence of the batch, and pm.posterior
    draws from the true posterior. Held-out neurons are not seen. It has no read-in to train: it is no guide for pm.fit.

    Args:
        model: a :class:`~pyro_metassm.models.LinearGaussian`.

    Raises:
        ValueError: for another model.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.LinearGaussian(recs, latent_dim=2).double()
        >>> terms = pm.elbo.SequentialELBO().terms(model, pm.guides.ExactSmoother(model), batch)  # doctest: +SKIP
    """

    def __init__(self, model: LinearGaussian):
        super().__init__()
        if not isinstance(model, LinearGaussian):
            raise ValueError(f"ExactSmoother: needed a LinearGaussian model, got {type(model).__name__}; use guides.DKF")
        self._model = (model,)  # in a tuple: the guide does not own the model's parameters
        self.config: dict = {}

    @property
    def model(self) -> LinearGaussian:
        return self._model[0]

    def forward(self, batch: Batch) -> None:
        with self.model.recording_plate(batch):
            pyro.sample("embedding", self.model.embedding_prior())
            with self.model.trial_plate(batch), pyro.poutine.scale(scale=batch.trial_scale):
                pyro.sample("latents", self.latents_posterior(batch))

    def latents_posterior(self, batch: Batch) -> GaussianPath:
        """``p(z_k | y_k)`` of every trial, batch ``(R, K)``, event ``(time, latent_dim)``."""
        model, time = self.model, batch.time_mask.unsqueeze(-1)  # (R, K, T, 1)
        zero = model.process_noise.log_scale.new_zeros(len(batch.names), 1, 1, model.latent_dim)
        y = model.likelihood(model.read_out(zero, batch.recording, batch.width), batch.recording)  # at z = 0
        c = model.neurons.gather(model.read_out.weight, batch.recording, batch.width)  # (R, N, d)
        seen = (batch.mask & batch.held_in[:, None, None, :]).to(zero.dtype) / y.scale**2  # (R, K, T, N)
        a, b = model.dynamics.weight, model.dynamics.bias
        q, first = model.process_noise() ** -2, model.initial.scale**-2  # precisions (d,)
        link = time[..., 1:, :]  # bin t has a predecessor

        # Blocks of precision @ z = information: the observations', the first state's, those of every step.
        diagonal = torch.einsum("rktn,rnd,rne->rktde", seen, c, c)
        information = torch.einsum("rktn,rnd->rktd", seen * (batch.observations - y.mean), c)
        prior = torch.cat([first.expand_as(link[..., :1, :] * q) if False else first.expand(*time.shape[:2], 1, -1), link * q], -2)
        return GaussianPath(diagonal, prior, information, batch.time_mask)
