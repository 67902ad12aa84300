"""The steps of an adaptation: SVI of what belongs to new recordings."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

import pyro
import torch
from torch import Tensor, nn

from pyro_metassm import _machine as machine
from pyro_metassm import simulated_trials
from pyro_metassm.elbo import Terms
from pyro_metassm.own_tuning import with_own_tuning
from pyro_metassm.read_outs import ReadOutPrior
from pyro_metassm.rebuilding import deviations, joined, tables
from pyro_metassm.recordings import Batch, Recordings
from pyro_metassm.result import Fit, embedding_statistics
from pyro_metassm.trainer import SLOW, Options, Trainer

SIMULATED = 0.3  # simulated trials that a read-in of counts learns from, for each that was seen
OF_ONE_FIT = ("skipped", "interrupted_at")  # attributes that tell of the steps of a fit, not of what it found


class Adapter(Trainer):
    """SVI of what belongs to new recordings, under the prior of read-outs; what is shared is frozen.

    Args:
        fit: of what is shared.
        model, guide: of the new recordings, started.
        recs: these.
        prior: of read-outs.
        options: of the steps.
        parts: what is trained, as of :func:`~pyro_metassm.adapt`.
        report: of the start.
        inferred: statistics of the embeddings, where they are not inferred in every step.
        tuned: whether read-outs come of a regression under the prior of most evidence
            (:mod:`pyro_metassm.own_tuning`). The few counts of these trials would be learned by heart: read-outs then
            learn slowly and are regressed anew half way, and read-ins learn from simulated trials too.
    """

    def __init__(
        self,
        fit: Fit,
        model,
        guide,
        recs: Recordings,
        prior: ReadOutPrior,
        options: Options,
        parts: Sequence[str],
        report: dict,
        inferred: Tensor | None = None,
        tuned: bool = False,
    ):
        free = "embedding" in parts
        self.embedding: list[nn.Parameter] = []  # where it is not inferred anew in every step
        if free or inferred is not None:
            given = embedding_statistics(model, guide, recs) if inferred is None else inferred
            loc, variance = given.chunk(2, -1)
            self.embedding = [nn.Parameter(x, requires_grad=free) for x in (loc.clone(), variance.log())]
        for module, part, own in zip(
            (model, guide), ("read_out", "read_in"), tables(model, guide), strict=True
        ):
            requires_grad(module, own if part in parts else ())
        self.read_in_precision = read_in_precision(fit) if "read_in" in parts else None
        self.tuned, self.parts = tuned, parts
        guide.train()  # hides neurons; the model stays as it is, and guides roll nothing out
        super().__init__(model, guide, recs, options, fit.device, self.embedding if free else [])
        self.fit, self.prior, self.report = fit, prior, report

    def rates(self) -> dict[int, float]:
        """Slow is what few trials say little of: deviations; read-ins that no prior holds, which move off the frame.

        And what is known already: read-outs of a regression under the prior of most evidence.
        """
        read_ins = self.guide.read_in.parameters() if self.read_in_precision is None else ()
        read_outs = self.model.read_out.parameters() if self.tuned else ()
        return {
            id(p): SLOW for p in (*deviations(self.model), *deviations(self.guide), *read_ins, *read_outs)
        }

    def take_step(self) -> None:
        super().take_step()
        if self.tuned and "read_out" in self.parts and self.step == self.options.num_steps // 2:
            self.regress()

    @torch.no_grad()
    def regress(self) -> None:
        """The read-outs, and the prior of most evidence, anew given paths that the guide draws by now."""
        batch = self.batch()
        self.guide.eval()
        with machine.random_forked(self.device), pyro.validation_enabled(False):
            values = self.elbo.terms(self.model, self.guide, batch).values
        self.guide.train()
        if values["latents"].isfinite().all():
            with self.model.given(values):
                self.prior = with_own_tuning(self.prior, self.model, values["latents"], batch)

    def batch(self, recs: Recordings | None = None, **choice) -> Batch:
        batch = super().batch(recs, **choice)
        if not self.embedding:
            return batch
        loc, log_variance = self.embedding
        statistics = torch.cat([loc, log_variance.exp()], -1)[batch.recording]
        return dataclasses.replace(batch, embedding_statistics=statistics)

    def loss(self, terms: Terms, batch: Batch) -> Tensor:
        loss = super().loss(terms, batch)
        if self.tuned and "read_in" in self.parts:
            drawn = simulated_trials.like(batch, self.model, terms)
            elbo = simulated_trials.guide_elbo(self.elbo, self.model, self.guide, drawn)
            loss = loss - SIMULATED * elbo / self.scale
        return loss

    def penalty(self, terms: Terms, batch: Batch) -> Tensor | float:
        log_prior = self.prior.of_batch(self.model, batch)
        if self.read_in_precision is not None:
            weight = self.guide.read_in.weight[self.guide.read_in.counts]
            log_prior = log_prior - 0.5 * (self.read_in_precision * weight.square()).sum()
        return -log_prior / self.scale

    def result(self) -> Fit:
        """The fit of all recordings as it stands."""
        self.guide.eval()
        if self.embedding:
            loc, log_variance = self.embedding
            statistics = torch.cat([loc, log_variance.exp()], -1).detach()
        else:
            statistics = embedding_statistics(self.model, self.guide, self.recs)
        model, guide = joined((self.fit.model, self.fit.guide), (self.model, self.guide))
        seconds = {f"{part}_seconds": self.seconds[part] for part in ("search", "svi")}
        report = self.fit.attrs.get("adaptation", {}) | self.report
        kept = {key: value for key, value in self.fit.attrs.items() if key not in OF_ONE_FIT}
        return Fit(
            model.eval(),
            guide.eval(),
            self.history.dataset(**seconds, num_observed=self.scale),
            torch.cat([self.fit.statistics, statistics]),
            self.options.seed,
            kept | {"adaptation": report} | self.notes,
        )


@torch.no_grad()
def read_in_precision(fit: Fit) -> Tensor | None:
    """Of a Normal prior, around zero, of a neuron's read-in by channel, ``(read_in_dim,)``: as the known ones vary.

    For counts: they are so noisy that without it a read-in learns few trials by heart. None without known ones.
    """
    read_in, table = fit.guide.read_in, fit.model.neurons
    known = torch.zeros_like(read_in.counts)
    for name, row in zip(fit.names, trained(fit), strict=True):
        known[table.slice(name)] = row
    weight = read_in.weight[known & read_in.counts & read_in.weight.any(-1)]  # held-out neurons have none
    return None if len(weight) < 2 else 1 / weight.square().mean(0).clamp(min=1e-4)


def requires_grad(module: nn.Module, names: Collection[str]) -> None:
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)


def trained(fit: Fit) -> Tensor:
    """Which recordings were trained on, ``(recording,)`` bool."""
    return fit.statistics.isfinite().all(-1)
