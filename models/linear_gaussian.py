"""The linear-Gaussian member of the family: the one whose posterior and evidence are known exactly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_metassm.likelihoods import Gaussian
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.recordings import Recordings


class LinearGaussian(MetaSSM):
    r"""A linear dynamical system shared by all recordings, each with its own read-out (the Kalman filter's model).

    For recording i, trial k and bin t::

        z_{k,1}            ~ Normal(mu_0, Sigma_0)
        z_{k,t}|z_{k,t-1}  ~ Normal(z_{k,t-1} A^T + b, Q)       A ``dynamics.weight``, b ``dynamics.bias``
        y_{k,t}|z_{k,t}    ~ Normal(C_i z_{k,t} + d_i, R_i)     Sigma_0, Q and R_i diagonal

    The embedding is drawn and does not act. With :class:`~pyro_metassm.guides.ExactSmoother` one sample of the ELBO
    *is* the log evidence, which makes this model a check of everything else.

    Args:
        recordings: the recordings that the model is for.
        latent_dim: number of latents.
        embedding_dim: size of the embedding, which has no effect.

    Raises:
        ValueError: for sizes below 1.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.LinearGaussian(recs, latent_dim=2)
        >>> guide = pm.guides.ExactSmoother(model)
    """

    def __init__(self, recordings: Recordings | NeuronTable, *, latent_dim: int, embedding_dim: int = 1):
        super().__init__(
            recordings,
            latent_dim=latent_dim,
            embedding_dim=embedding_dim,
            rank=0,
            hidden_dim=1,
            likelihood=Gaussian,
        )
        self.config = {"latent_dim": latent_dim, "embedding_dim": embedding_dim}
        self.dynamics: nn.Module = nn.Linear(latent_dim, latent_dim)
        with torch.no_grad():  # start as a slow decay
            self.dynamics.weight.copy_(0.95 * torch.eye(latent_dim))
            self.dynamics.bias.zero_()

    def adapt_dynamics(self, e: Tensor):
        return self.dynamics
