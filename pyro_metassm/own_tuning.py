"""How much the neurons of a new recording say of the latents: the prior of their read-outs with most evidence."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from pyro_metassm.read_outs import ReadOutPrior, kinds_of, refit_read_outs, rows_of
from pyro_metassm.recordings import Batch

ROUNDS = 10  # of expectation and maximisation


@torch.no_grad()
def with_own_tuning(prior: ReadOutPrior, model, z: Tensor, batch: Batch) -> ReadOutPrior:
    r"""The prior, with a covariance of its own for each recording of a batch, of most evidence given the states.

    The read-outs ``r_n = (c_n, d_n)`` of recording i are ``Normal(mean, B_i)``, with ``B_i`` inverse-Wishart around the
    covariance ``S`` of known recordings, worth ``nu = latent_dim + 2`` neurons. By expectation and maximisation::

        B_i = (nu S + sum_n (r_n - mean)(r_n - mean)^T + V_n) / (nu + N_i)

    with ``r_n`` and ``V_n`` the mode and the inverse curvature of a neuron's posterior. Neurons of one task may say far
    less of the latents than those of another: under the wider prior of these, few trials are learned by heart.
    Empirical Bayes (Efron and Morris, 1973; Gelman et al., Bayesian Data Analysis, 2013, chapter 5).

    Args:
        prior: of the known recordings.
        model: of single neurons; its read-outs of these recordings are left at their modes, in place.
        z: states ``(R, K, T, latent_dim)``.
        batch: what was observed then.
    """
    for _ in range(ROUNDS):
        informations = refit_read_outs(model, z, batch, num_steps=1, prior=prior)
        prior = dataclasses.replace(prior, own=_likeliest(prior, model, informations, batch))
    refit_read_outs(model, z, batch, prior=prior)
    return prior


def _likeliest(prior: ReadOutPrior, model, informations: list[Tensor], batch: Batch) -> dict[str, Tensor]:
    """The covariances of a step, by recording, from what its data say of the read-outs as they are."""
    found, worth = {}, model.latent_dim + 2
    each = zip(batch.names, rows_of(model, batch), kinds_of(model, batch), informations, strict=True)
    for name, rows, kinds, information in each:
        _, precision = prior.of_rows(kinds, name)
        error = prior.units(rows, kinds) - prior.mean
        spread = torch.linalg.inv_ex(information + precision).inverse
        spread = spread / prior.units.size[kinds][:, None, None].square()
        # Neurons that nobody saw say nothing, nor do those whose curvature overflows in bursts of thousands.
        known = (information[:, -1, -1] > 0) & spread.isfinite().all(-1).all(-1)
        error, spread = error[known], spread[known]
        total = worth * prior.covariance + error.mT @ error + spread.sum(0)
        found[name] = total / (worth + len(error))
    return found
