"""The evidence lower bound of a sequential model, term by term."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import ELBO
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_metassm.distributions import conditional_kl
from pyro_metassm.sites import mismatches


@dataclass(frozen=True)
class Terms:
    """The parts of one estimate of the full-data ELBO (nats): ``elbo = log_likelihood - sum(kl.values())``.

    Attributes:
        elbo: their sum, with its gradient.
        log_likelihood: of all observed sites.
        kl: divergence by latent site.
        by_recording: the ELBO of each recording of the batch, scaled as in the sum, ``(R,)``.
        finite: which trials' terms are all finite numbers, ``(R, K)`` bool; the rest of the sum is not told apart.
        embedding: the value drawn for the embedding.
        values: those drawn for all latent sites.
    """

    elbo: Tensor
    log_likelihood: Tensor
    kl: dict[str, Tensor]
    by_recording: Tensor
    finite: Tensor
    embedding: Tensor
    values: dict[str, Tensor]


class SequentialELBO(ELBO):
    r"""One-sample ELBO in which the KL of a site is analytic wherever its two distributions allow it.

    ``ELBO = sum_obs E[log p(y | z)] - sum_latent KL(q || p)`` (eq. 17). The KL of a path is taken bin by bin given the
    sampled previous state, so it is exact only given the rest of the sample; it stays unbiased. Sites whose
    distributions have no closed form fall back to ``log q - log p`` at the sample. Plates carry the scale of
    sub-samples: trial terms count for all trials, the KL of the embedding once a recording.

    Raises:
        ValueError: a latent site of the model that the guide lacks, or the reverse, or in other plates than there.
    """

    def terms(self, model, guide, *args, **kwargs) -> Terms:
        """The ELBO and its parts for one draw of the guide."""
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
        if found := mismatches(model_trace, guide_trace):
            raise ValueError(found[0])
        log_likelihood: Tensor = torch.zeros(())
        by_recording: Tensor = torch.zeros(())
        finite: Tensor = torch.ones((), dtype=torch.bool)
        kl = {}
        for name, site in model_trace.nodes.items():
            if site["type"] != "sample":
                continue
            if site["is_observed"]:
                term = scale_and_mask(site["fn"].log_prob(site["value"]), site["scale"], site["mask"])
                log_likelihood = log_likelihood + term.sum()
            else:
                divergence = conditional_kl(guide_trace.nodes[name]["fn"], site["fn"], site["value"])
                term = -scale_and_mask(divergence, site["scale"], site["mask"])
                kl[name] = -term.sum()
            if term.dim() >= 2:  # inside the recording plate
                by_recording = by_recording + term.sum(
                    tuple(d for d in range(term.dim()) if d != term.dim() - 2)
                )
                good = term.detach().isfinite()
                finite = finite & (good if good.dim() == 2 else good.flatten(0, -3).all(0))
        elbo = log_likelihood - sum(kl.values())
        values = {name: guide_trace.nodes[name]["value"] for name in kl}
        return Terms(elbo, log_likelihood, kl, by_recording.detach(), finite, values["embedding"], values)

    def loss(self, model, guide, *args, **kwargs) -> float:
        """Minus the ELBO as a number."""
        with torch.no_grad():
            return float(self.differentiable_loss(model, guide, *args, **kwargs))

    def differentiable_loss(self, model, guide, *args, **kwargs) -> Tensor:
        """Minus the ELBO, averaged over ``num_particles`` draws."""
        draws = [self.terms(model, guide, *args, **kwargs).elbo for _ in range(self.num_particles)]
        return -torch.stack(draws).mean()

    def loss_and_grads(self, model, guide, *args, **kwargs) -> float:
        """Minus the ELBO, with gradients accumulated into the modules' parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return float(loss.detach())

    def _get_trace(self, model, guide, args, kwargs):
        raise NotImplementedError("SequentialELBO makes its traces in `terms`")
