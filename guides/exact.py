"""The exact posterior of the linear-Gaussian model: a Kalman smoother, written as one Gaussian over whole paths."""

from __future__ import annotations

import math

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints
from torch.linalg import cholesky, solve_triangular
from torch.nn.functional import pad

from pyro_metassm.models.linear_gaussian import LinearGaussian
from pyro_metassm.recordings import Batch


class GaussianPath(TorchDistribution):
    r"""A Gaussian over a path whose precision is block-tridiagonal; event shape ``(time, latent_dim)``.

    ``precision = L L^T`` with ``L`` block-bidiagonal, found in one pass over time (the information form of the
    Kalman filter); draws and the mean come from one pass back (the smoother).

    Args:
        diagonal: ``(..., time, latent_dim, latent_dim)``, the blocks of the precision on its diagonal.
        below: ``(..., time - 1, latent_dim, latent_dim)``, the blocks below it: row t + 1, column t.
        information: ``(..., time, latent_dim)``, precision times mean.
        mask: ``(..., time)`` bool, False where a trial has ended: those bins have no density, and must be independent
            of the others.

    Raises:
        torch.linalg.LinAlgError: for a precision that is not positive definite.
    """

    arg_constraints: dict = {}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self, diagonal: Tensor, below: Tensor, information: Tensor, mask: Tensor, validate_args=None
    ):
        self.lower, self.cross = (
            [cholesky(diagonal[..., 0, :, :])],
            [],
        )  # blocks of L: its diagonal, and below it
        white = [_solve(self.lower[0], information[..., 0, :])]
        for t in range(1, diagonal.shape[-3]):
            cross = solve_triangular(self.lower[-1], below[..., t - 1, :, :].mT, upper=False).mT
            self.cross.append(cross)
            self.lower.append(cholesky(diagonal[..., t, :, :] - cross @ cross.mT))
            white.append(_solve(self.lower[-1], information[..., t, :] - _times(cross, white[-1])))
        self.mask_of_bins = mask
        self.loc = self._back(torch.stack(white, -2))
        super().__init__(self.loc.shape[:-2], self.loc.shape[-2:], validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """The smoothed states, as a Kalman smoother gives them."""
        return self.loc.expand(*self.batch_shape, *self.event_shape)

    def expand(self, batch_shape, _instance=None) -> GaussianPath:
        new = self._get_checked_instance(GaussianPath, _instance)
        new.lower, new.cross, new.loc, new.mask_of_bins = self.lower, self.cross, self.loc, self.mask_of_bins
        super(GaussianPath, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        return self.loc + self._back(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density over the bins that exist, shape of the batch."""
        error = value - self.loc
        factors = []
        for t, lower in enumerate(self.lower):
            white = _times(lower.mT, error[..., t, :])  # row t of L^T error
            if t < len(self.cross):
                white = white + _times(self.cross[t].mT, error[..., t + 1, :])
            scale = lower.diagonal(dim1=-2, dim2=-1).log() - 0.5 * math.log(2 * math.pi)
            factors.append((scale - 0.5 * white**2).sum(-1))
        return torch.stack(factors, -1).masked_fill(~self.mask_of_bins, 0.0).sum(-1)

    def _back(self, white: Tensor) -> Tensor:
        """``x`` of ``L^T x = white``: from the last bin to the first."""
        x = [_solve(self.lower[-1].mT, white[..., -1, :], upper=True)]
        for t in range(len(self.cross) - 1, -1, -1):
            right = white[..., t, :] - _times(self.cross[t].mT, x[-1])
            x.append(_solve(self.lower[t].mT, right, upper=True))
        return torch.stack(x[::-1], -2)


class ExactSmoother(nn.Module):
    r"""``q(e_i) = p(e_i)`` and ``q(z_k | y_k) = p(z_k | y_k)``: whole paths at once, without parameters.

    The posterior's precision is the chain's plus ``C_i^T R_i^-1 C_i`` of the neurons seen in each bin. With it every
    one-sample ELBO equals the log evidence, and draws are of the true posterior. Held-out neurons are not seen. It has
    no read-in to start and nothing to train: it is no guide for ``pm.fit``.

    Args:
        model: a :class:`~pyro_metassm.models.LinearGaussian`.

    Raises:
        ValueError: for another model.

    Example:
        >>> import pyro_metassm as pm
        >>> from pyro_metassm.elbo import SequentialELBO
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.LinearGaussian(recs, latent_dim=2)
        >>> terms = SequentialELBO().terms(model, pm.guides.ExactSmoother(model), recs.batch(model.names))
        >>> bool(terms.kl["embedding"] == 0)
        True
    """

    def __init__(self, model: LinearGaussian):
        super().__init__()
        if not isinstance(model, LinearGaussian):
            raise ValueError(
                f"ExactSmoother: needed a LinearGaussian, got {type(model).__name__}; use guides.DKF"
            )
        self._model = (model,)  # in a tuple: the guide does not own the model's parameters
        self.config: dict = {}

    @property
    def model(self) -> LinearGaussian:
        return self._model[0]

    def forward(self, batch: Batch) -> None:
        model = self.model
        with model.recording_plate(batch):
            pyro.sample("embedding", model.embedding_prior())
            with model.trial_plate(batch), pyro.poutine.scale(scale=batch.trial_scale):
                pyro.sample("latents", self.latents_posterior(batch))

    def latents_posterior(self, batch: Batch) -> GaussianPath:
        """``p(z_k | y_k)`` of every trial, batch ``(R, K)``, event ``(time, latent_dim)``."""
        model = self.model
        a, b = model.dynamics.weight, model.dynamics.bias
        q, first = model.process_noise() ** -2, model.initial.scale**-2  # precisions, (d,)
        exists = batch.time_mask.unsqueeze(-1)  # (R, K, T, 1)
        linked = exists[..., 1:, :]  # with a bin before it
        leads = pad(linked, (0, 0, 0, 1))  # with a bin after it

        c = model.neurons.gather(model.read_out.weight, batch.recording, batch.width)  # (R, N, d)
        at_zero = model.read_out(torch.zeros_like(c[:, None, :1]), batch.recording, batch.width)
        y = model.likelihood(at_zero, batch.recording)  # Normal(d_i, R_i), (R, 1, 1, N)
        seen = (batch.mask & batch.held_in[:, None, None, :]) / y.stddev**2  # (R, K, T, N)

        own = torch.cat([torch.where(exists[..., :1, :], first, 1.0), torch.where(linked, q, 1.0)], -2)
        start = torch.cat(
            [(first * model.initial.loc).expand_as(own[..., :1, :]), (q * b).expand_as(own[..., 1:, :])], -2
        )
        diagonal = torch.einsum("rktn,rnd,rne->rktde", seen, c, c) + own.diag_embed()
        diagonal = diagonal + leads.unsqueeze(-1) * ((a.mT * q) @ a)
        below = linked.unsqueeze(-1) * (-q.unsqueeze(-1) * a)
        information = torch.einsum("rktn,rnd->rktd", seen * (batch.observations - y.mean), c)
        information = information + exists * start - leads * (a.mT @ (q * b))
        return GaussianPath(diagonal, below, information, batch.time_mask)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _solve(triangle: Tensor, vector: Tensor, upper: bool = False) -> Tensor:
    return solve_triangular(triangle, vector.unsqueeze(-1), upper=upper).squeeze(-1)
