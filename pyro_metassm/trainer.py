"""The state of a fit between two steps, and how it takes one."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_metassm import _interrupts as interrupts
from pyro_metassm import _machine as machine
from pyro_metassm import sites
from pyro_metassm import warm_start as starts
from pyro_metassm.elbo import SequentialELBO, Terms
from pyro_metassm.guides.base import AmortizedGuide
from pyro_metassm.history import History, narrowed
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.optimizers import adam, one_cycle, skip_where
from pyro_metassm.recordings import Batch, Recordings, sample_trials
from pyro_metassm.result import Fit, embedding_statistics
from pyro_metassm.rollouts import rollout_errors

SLOW = 0.1  # learning rate of what the start has found, relative to the rest
SETTLE = 10  # steps after which a GPU is asked for their numbers; a CPU is asked after each
TRACED = 20  # skipped steps whose recordings and trials are looked at one by one
PATIENCE = 5  # steps in a row without a finite loss and gradient, at which a fit gives up


class NonFiniteLossError(RuntimeError):
    """The loss left the finite numbers for good; ``.fit`` is the last good state, usable as any fit."""

    def __init__(self, message: str, fit: Fit):
        super().__init__(message)
        self.fit = fit


@dataclass(frozen=True)
class Options:
    """What decides the course of a fit, besides model, guide and data; as the arguments of :func:`fit`."""

    num_steps: int
    trials_per_step: int | None
    recordings_per_step: int | None
    learning_rate: float
    warm_start: bool
    warm_start_steps: int
    clip_norm: float
    update_penalty: float
    seed: int
    smooth_counts: bool = False
    kl_warmup_steps: int = 0


class Trainer:
    """The state of a fit between two steps, and how it takes one."""

    def __init__(
        self,
        model: MetaSSM,
        guide: AmortizedGuide,
        recs: Recordings,
        options: Options,
        device: torch.device,
        others: Sequence[nn.Parameter] = (),
    ):
        self.model, self.guide, self.recs, self.options, self.device = model, guide, recs, options, device
        self.rng = np.random.default_rng(options.seed)
        self.elbo = SequentialELBO()
        self.step = 0
        self.history = History()
        self.settle_every = 1 if device.type == "cpu" else SETTLE
        self.seconds = {"warm_start": 0.0, "svi": 0.0}
        every = [p for p in (*model.parameters(), *guide.parameters(), *others) if p.requires_grad]
        if not every:
            raise ValueError(
                "fit: needed parameters to train, got a model and a guide of which none requires a gradient"
            )
        rates = self.rates()
        by_rate: dict[float, list[nn.Parameter]] = {}
        for p in every:
            by_rate.setdefault(rates.get(id(p), 1.0), []).append(p)
        order = sorted(by_rate)
        groups = [{"params": by_rate[r], "lr": r * options.learning_rate} for r in order]
        self.optimizer = adam(groups, betas=(0.9, 0.99))
        self.schedule = one_cycle(self.optimizer, options.num_steps)
        self.parameters = [p for r in order for p in by_rate[r]]
        self.last_good = [p.detach().clone() for p in self.parameters]
        self.scale = _observed_numbers(recs)  # the loss is per number observed
        self.validated: float | None = None
        self.notes: dict[str, Any] = {}  # for the result's attrs

    def rates(self) -> dict[int, float]:
        """Learning rates relative to the fit's, by the identity of parameters; others have all of it.

        As model and guide have them, and :data:`SLOW` of it for dynamics that a start has found better than early steps
        of SVI would.

        Raises:
            ValueError: for a name of no parameter, or a rate that is not above 0.
        """
        rates: dict[int, float] = {}
        for part in (self.model, self.guide):
            for name, rate in part.learning_rates.items():
                named = [p for key, p in part.named_parameters() if key.startswith(name)]
                if not named or not 0 < rate < math.inf:
                    raise ValueError(
                        f"{type(part).__name__}.learning_rates: needed names of parameters and rates above 0, got "
                        f"{name!r}: {rate!r}"
                    )
                rates |= {id(p): rate for p in named}
        for p in self.model.dynamics.parameters() if self.options.warm_start else ():
            rates[id(p)] = SLOW * rates.get(id(p), 1.0)
        return rates

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    def batch(self, recs: Recordings | None = None, **choice) -> Batch:
        """Trials as the model takes them, on its device."""
        recs = self.recs if recs is None else recs
        return recs.batch(self.model.names, dtype=self.dtype, device=self.device, **choice)

    def check_program(self) -> None:
        """Run model and guide once, with Pyro's checks on, before anything is trained."""
        names = self.recs.names
        batch = self.batch(trials={name: [0] for name in names})
        with machine.random_forked(self.device), torch.no_grad(), pyro.validation_enabled(True):
            if found := sites.compare(self.model, self.guide, batch):
                raise ValueError("\n".join(found))
            self.elbo.terms(self.model, self.guide, batch)

    def warm_start(self, bar: tqdm, stop: interrupts.Stop) -> None:
        """The start from the data (:mod:`pyro_metassm.warm_start`), cut short where a stop is asked for."""
        begin = time.perf_counter()
        num_steps, total, done = self.options.warm_start_steps, bar.total, 0
        bar.reset(num_steps)
        bar.set_description("start")

        def on_step(loss: float) -> bool:
            nonlocal done
            done += 1
            bar.update()
            if done % 10 == 0:
                bar.set_postfix({"roll-out error": f"{loss:.3g}"}, refresh=False)
            return stop.requested

        starts.initialise(
            self.model,
            self.guide,
            self.recs,
            num_steps=num_steps,
            seed=self.options.seed,
            device=self.device,
            on_step=on_step,
            smooth_counts=self.options.smooth_counts,
        )
        bar.reset(total)
        bar.set_description("fit")
        self.keep()
        self.seconds["warm_start"] = time.perf_counter() - begin

    def take_step(self) -> None:
        """One step of SVI on a random batch."""
        begin = time.perf_counter()
        names, trials = sample_trials(
            self.recs, self.options.trials_per_step, self.rng, self.options.recordings_per_step
        )
        with pyro.validation_enabled(False):
            batch = self.batch(names=names, trials=trials)
            terms = self.elbo.terms(self.model, self.guide, batch)
        loss = self.loss(terms, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        values = {"elbo": terms.elbo, "log_likelihood": terms.log_likelihood}
        values |= {f"kl_{site}": kl for site, kl in terms.kl.items()} | {"gradient_norm": norm}
        self.history.add(self.step + 1, values, terms.finite, {name: trials[name] for name in names})
        if len(self.history.waiting) >= self.settle_every:
            self.settle()
            if not self.history.skipped_last:
                self.keep()
        rate = self.optimizer.param_groups[-1]["lr"]
        skip_where(self.optimizer, ~(terms.elbo.detach().isfinite() & norm.isfinite()))
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        seconds = time.perf_counter() - begin
        self.seconds["svi"] += seconds
        self.history.record(self.step, learning_rate=rate, seconds=seconds)

    def loss(self, terms: Terms, batch: Batch) -> Tensor:
        """What is minimised: the negative ELBO per observed number, with less of its divergences in early steps."""
        elbo, steps = terms.elbo, self.options.kl_warmup_steps
        if self.step < steps:
            elbo = elbo + (1 - self.step / steps) * sum(terms.kl.values())
        return self.penalty(terms, batch) - elbo / self.scale

    def penalty(self, terms: Terms, batch: Batch) -> Tensor | float:
        """What is minimised besides the negative ELBO per observed number."""
        if self.options.update_penalty:
            with self.model.given(terms.values):
                dynamics = self.model.dynamics_of(terms.embedding, batch.recording)
            if hasattr(dynamics, "update_norm"):
                return self.options.update_penalty * dynamics.update_norm()
        return 0.0

    def settle(self) -> None:
        """Fetch the numbers of the last steps; give up at the last good state if too many in a row are not finite."""
        known = len(self.history.skipped)
        self.history.settle()
        for number in range(known, min(len(self.history.skipped), TRACED)):
            self.history.skipped[number] = narrowed(self.history.skipped[number], self.is_finite)
        skipped = self.history.skipped_last
        if len(skipped) < PATIENCE:
            return
        self.go_back()
        self.history.cut(skipped[0].step)
        raise NonFiniteLossError(
            f"fit: {skipped[0]}, nor at the {len(skipped) - 1} steps after it; the last good state is in this error's "
            ".fit; try a smaller learning_rate, or look for extreme values in these recordings",
            self.result(),
        )

    def is_finite(self, name: str, trials: list[int], what: str) -> bool:
        """Whether the loss ("loss") of some trials of a recording, or its gradient, is finite as the fit stands."""
        with machine.random_forked(self.device), pyro.validation_enabled(False):
            batch = self.batch(names=[name], trials={name: trials})
            with torch.set_grad_enabled(what == "gradient"):
                terms = self.elbo.terms(self.model, self.guide, batch)
                loss = self.loss(terms, batch)
            found = [loss]
            if what == "gradient":
                found += [
                    g for g in torch.autograd.grad(loss, self.parameters, allow_unused=True) if g is not None
                ]
            return all(bool(value.isfinite().all()) for value in found)

    def finish(self) -> None:
        """Fetch what is left of the numbers, and tell of steps that were skipped."""
        self.settle()
        if self.history.skipped_last:
            self.go_back()  # nobody knows whether the parameters since then are any good
        if skipped := self.history.skipped:
            self.notes["skipped"] = self.history.skipped_as_plain()
            warnings.warn(
                f"fit: {len(skipped)} of {self.step} steps skipped; first, {skipped[0]}; attrs['skipped'] lists them",
                stacklevel=3,
            )

    def stopped(self, saved: bool) -> None:
        """Tell that this is not all of the fit."""
        self.notes["interrupted_at"] = self.step
        goes_on = ("; the same call again goes on from here" if self.step else "") if saved else ""
        warnings.warn(
            f"fit: interrupted at step {self.step} of {self.options.num_steps}, this is the fit so far{goes_on}",
            stacklevel=3,
        )

    def go_back(self) -> None:
        """To the last good state."""
        with torch.no_grad():
            for kept, parameter in zip(self.last_good, self.parameters, strict=True):
                parameter.copy_(kept)

    def keep(self) -> None:
        """Remember the parameters as the last good state."""
        for kept, parameter in zip(self.last_good, self.parameters, strict=True):
            kept.copy_(parameter.detach())

    def validate(self, validation: Recordings) -> None:
        """The ELBO of other trials, without roll-outs (so that per number it may lie above the training's)."""
        self.validated = _observed_numbers(validation)
        self.guide.eval()
        with machine.random_forked(self.device), torch.no_grad(), pyro.validation_enabled(False):
            value = -self.elbo.loss(self.model, self.guide, self.batch(validation))
        self.guide.train()
        self.history.record(self.step, validation_elbo=value)

    def progress(self) -> dict[str, str]:
        return {"elbo per bin and neuron": f"{self.history.recent('elbo', 10) / self.scale:.4g}"}

    def result(self) -> Fit:
        """The fit as it stands."""
        self.model.eval(), self.guide.eval()
        statistics = embedding_statistics(self.model, self.guide, self.recs)
        attrs = {f"{k}_seconds": v for k, v in self.seconds.items()} | {"num_observed": self.scale}
        attrs |= {} if self.validated is None else {"num_observed_validation": self.validated}
        errors = rollout_errors(self.model, self.guide, self.recs, statistics)
        return Fit(
            self.model,
            self.guide,
            self.history.dataset(**attrs),
            statistics,
            seed=self.options.seed,
            attrs={"bin_width": self.recs.bin_width, "rollout_error": errors}
            | ({"smooth_counts": True} if self.options.smooth_counts else {})
            | self.notes,
        )


def _observed_numbers(recs: Recordings) -> float:
    return float(sum(recording.mask.sum() for recording in recs.values()))
