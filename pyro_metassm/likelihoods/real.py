"""Families of real numbers; the predictor is the mean (identity link)."""

from __future__ import annotations

import math

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_metassm.blocks import everywhere
from pyro_metassm.likelihoods.base import SHARE, Likelihood, sd_of
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.observations import NeuronNormal
from pyro_metassm.recordings import Recordings


class Gaussian(Likelihood):
    r"""``y ~ Normal(predictor, sd_n)``, a learned standard deviation per neuron; identity link."""

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        self.log_sd = nn.Parameter(torch.zeros(neurons.total))

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        sd = self.by_neuron(self.log_sd, predictor, recording).exp()
        return NeuronNormal(predictor, sd, num_neurons=self.neurons.counts(recording))

    def start(self, recordings: Recordings) -> None:
        """Half of each neuron's standard deviation: the dynamics are to explain the rest."""
        for name, recording in recordings.items():
            self.write(self.log_sd, name, np.log(SHARE * sd_of(recording.values, recording.mask)))


class StudentT(Likelihood):
    r"""``y ~ predictor + scale_n t(df_n)``: heavy tails, so that outliers (artefacts, say) weigh little; identity link.

    ``df_n = 2 + exp(log_df_n)`` is learned and above two, so that the variance ``scale_n^2 df_n / (df_n - 2)`` is
    finite; it starts at 4. ``scale_n``, in the units of the data, is no standard deviation.

    Reference: Lange, Little and Taylor (1989), Robust statistical modeling using the t distribution, JASA 84.
    """

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        self.log_scale = nn.Parameter(torch.zeros(neurons.total))
        self.log_df = nn.Parameter(torch.full((neurons.total,), math.log(2.0)))

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        scale = self.by_neuron(self.log_scale, predictor, recording).exp()
        df = 2.0 + self.by_neuron(self.log_df, predictor, recording).exp()
        return dist.StudentT(df.expand_as(predictor), predictor, scale.expand_as(predictor))

    def start(self, recordings: Recordings) -> None:
        """Noise of half of each neuron's standard deviation at four degrees of freedom."""
        for name, recording in recordings.items():
            sd = SHARE * sd_of(recording.values, recording.mask)
            self.write(self.log_scale, name, np.log(sd / math.sqrt(2.0)))


class LowRankGaussian(Likelihood):
    r"""``y ~ Normal(predictor, L_i L_i^T + diag(sd_n^2))`` jointly over the neurons of a bin; identity link.

    Noise that neurons share within a bin (movement, a common input without memory) is neither forced into the latents
    nor taken for private noise: a factor analysis of the residuals. ``L_i (N_i, rank)`` and ``sd_n`` are in the units
    of the data. Where neurons are missing the density is that of those seen (their marginal).

    The class attribute ``rank`` is set by subclassing.

    Example:
        >>> import pyro_metassm as pm
        >>> class Rank3(pm.likelihoods.LowRankGaussian):
        ...     rank = 3
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=Rank3)
        >>> tuple(model.observation.loading.shape) == (sum(r.num_neurons for r in recs.values()), 3)
        True
    """

    rank: int = 1

    def __init__(self, neurons: NeuronTable):
        super().__init__(neurons)
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(
                f"{type(self).__name__}.rank: needed an integer of at least 1, got {self.rank!r}"
            )
        self.log_sd = nn.Parameter(torch.zeros(neurons.total))
        # Not zero, where the gradient is.
        self.loading = nn.Parameter(0.1 * torch.randn(neurons.total, self.rank))

    def forward(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        sd = self.by_neuron(self.log_sd, predictor, recording).exp()
        return LowRankNormal(predictor, self.by_neuron(self.loading, predictor, recording), sd.square())

    def start(self, recordings: Recordings) -> None:
        """Half of each neuron's standard deviation, a tenth of it shared."""
        for name, recording in recordings.items():
            sd = SHARE * sd_of(recording.values, recording.mask)
            self.write(self.log_sd, name, np.log(sd))
            loading = 0.1 * torch.randn(recording.num_neurons, self.rank).numpy()
            self.write(self.loading, name, loading * sd[:, None])


class LowRankNormal(dist.LowRankMultivariateNormal):
    """``Normal(loc, L L^T + diag(v))`` of ``loc (..., R, K, T, N)``, ``L (R, 1, 1, N, r)`` and ``v (R, 1, 1, N)``."""

    def log_prob_of_seen(self, value: Tensor, mask: Tensor) -> Tensor:
        """Log density ``(..., R, K, T)`` of the neurons of a bin that were observed: the marginal, by Woodbury."""
        factor, variance = self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag
        seen = everywhere(mask).to(variance.dtype)  # (R, 1 or K, 1 or T, N)
        precision = seen / variance
        pairs = (factor.unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)  # (R, 1, 1, N, r r)
        inner = (precision.unsqueeze(-2) @ pairs).squeeze(-2).unflatten(-1, 2 * factor.shape[-1:])
        root = torch.linalg.cholesky(inner + torch.eye(factor.shape[-1]).to(inner))
        error = torch.where(mask, value - self.loc, 0.0)
        scaled = (error * precision).unsqueeze(-2) @ factor  # (..., R, K, T, 1, r)
        explained = torch.linalg.solve_triangular(root, scaled.mT, upper=False).square().sum((-1, -2))
        log_det = 2.0 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1) + (seen * variance.log()).sum(-1)
        squares = (error.square() * precision).sum(-1) - explained
        return -0.5 * (squares + log_det + seen.sum(-1) * math.log(2 * math.pi))

    def expand(self, batch_shape, _instance=None):
        loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        return LowRankNormal(
            loc, self._unbroadcasted_cov_factor, self._unbroadcasted_cov_diag, validate_args=False
        )
