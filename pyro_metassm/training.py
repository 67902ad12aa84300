"""Fitting: stochastic variational inference of a model and a guide on recordings."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm import checkpoints, sites
from pyro_metassm import warm_start as starts
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.guides.base import AmortizedGuide
from pyro_metassm.history import History
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.optimizers import adam, one_cycle
from pyro_metassm.recordings import Batch, Recordings, sample_trials
from pyro_metassm.result import Fit, embedding_statistics
from pyro_metassm.rollouts import rollout_errors

SLOW = 0.1  # learning rate of started dynamics, relative to the rest
SETTLE = 10  # steps after which a GPU is asked for their numbers; a CPU is asked after each


class NonFiniteLossError(RuntimeError):
    """The loss left the finite numbers; ``.fit`` is the last good state, usable as any fit."""

    def __init__(self, message: str, fit: Fit):
        super().__init__(message)
        self.fit = fit


def fit(
    model: MetaSSM,
    guide: AmortizedGuide,
    recs: Recordings,
    *,
    num_steps: int = 2000,
    trials_per_step: int | None = 32,
    recordings_per_step: int | None = None,
    learning_rate: float = 1e-2,
    warm_start: bool = True,
    warm_start_steps: int = 1000,
    smooth_counts: bool = False,
    validation: Recordings | None = None,
    validation_every: int = 100,
    clip_norm: float = 1.0,
    update_penalty: float = 1e-4,
    seed: int = 0,
    device: str | torch.device = "auto",
    num_threads: int | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 200,
    progress: bool = True,
) -> Fit:
    r"""Fit a model and its guide by maximising the ELBO (eq. 17).

    With ``warm_start`` the frames, read-outs, dynamics and embeddings are first started from the data (noise-free
    roll-outs of the dynamics in tied frames), then the full model is trained by SVI: Adam, one cycle of the learning
    rate, gradient clipping, sub-sampled trials. The arguments are left as they were: the result holds trained copies.

    Args:
        model: a :class:`~pyro_metassm.models.MetaSSM` or an edit of it.
        guide: its guide.
        recs: training recordings, all known to the model.
        num_steps: steps of SVI.
        trials_per_step: trials of each recording and step (all of a recording that has fewer); None for all.
        recordings_per_step: recordings of each step; None for all.
        learning_rate: peak of the cycle; after a warm start the dynamics take a tenth of it.
        warm_start: start from the data; False for a random start.
        warm_start_steps: steps of the dynamics-first stage.
        smooth_counts: start noisy counts from paths smoothed by linear systems (:mod:`pyro_metassm.linear_systems`),
            as :func:`pyro_metassm.adapt` then does. Where trials are long and counts few it forecasts far better, best
            with ``num_steps=0``: SVI loses some of it. Short trials in many latents are worse for it.
        validation: recordings (other trials) whose ELBO, without roll-outs, is taken every ``validation_every`` steps.
        clip_norm: largest norm of the gradient of the ELBO per observed number.
        update_penalty: weight of the squared norm of the embedding's updates of the dynamics, per observed number.
        seed: of everything random in the fit; the same seed on one machine gives the same numbers.
        device: "cpu", "cuda", or "auto" (a GPU where there is one).
        num_threads: threads while fitting; None takes PyTorch's present number (``torch.get_num_threads()``).
        checkpoint: folder to save the state in every ``checkpoint_every`` steps; a folder that holds the state of
            the same fit is resumed.
        progress: show a progress bar.

    Returns:
        The :class:`Fit`: trained copies, history, embeddings.

    Raises:
        ValueError: recordings that the model does not know or its likelihood cannot have produced, a guide that is not
            amortised, a latent site without a partner, nothing to train, arguments out of range.
        NonFiniteLossError: naming step and recording; ``error.fit`` is the last good state.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> fit.history.sizes["step"]
        5
    """
    checks.integers(0, num_steps=num_steps, warm_start_steps=warm_start_steps)
    checks.integers(1, validation_every=validation_every, checkpoint_every=checkpoint_every)
    if not (0 < learning_rate < math.inf and clip_norm > 0 and update_penalty >= 0):
        raise ValueError(
            "fit: needed a positive learning_rate and clip_norm and an update_penalty of at least 0, "
            f"got {learning_rate}, {clip_norm} and {update_penalty}"
        )
    if not isinstance(guide, AmortizedGuide):
        raise ValueError(f"fit: needed an AmortizedGuide such as guides.DKF, got {type(guide).__name__}")
    for recording in (*recs.values(), *(validation.values() if validation is not None else ())):
        model.neurons.check([recording.name], [recording.num_neurons])
        model.observation.check(recording)
    chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    options = Options(
        num_steps,
        trials_per_step,
        recordings_per_step,
        learning_rate,
        warm_start,
        warm_start_steps,
        clip_norm,
        update_penalty,
        seed,
        smooth_counts,
    )
    model, guide = copy.deepcopy((model, guide))
    model.to(chosen).train(), guide.to(chosen).train()
    guide.read_in.start(recs, model.observation.kinds)
    threads = machine.threads(num_threads or torch.get_num_threads())
    with threads, machine.memory_kept(), machine.random_forked(chosen):
        torch.manual_seed(seed)
        trainer = Trainer(model, guide, recs, options, chosen)
        trainer.check_program()
        with tqdm(total=num_steps, disable=not progress, desc="fit", dynamic_ncols=True) as bar:
            if not (checkpoint is not None and checkpoints.resume(checkpoint, trainer)) and warm_start:
                trainer.warm_start(bar)
            bar.update(trainer.step)
            while trainer.step < num_steps:
                trainer.take_step()
                if validation is not None and (
                    trainer.step % validation_every == 0 or trainer.step == num_steps
                ):
                    trainer.validate(validation)
                if checkpoint is not None and (
                    trainer.step % checkpoint_every == 0 or trainer.step == num_steps
                ):
                    checkpoints.save(checkpoint, trainer)
                bar.update()
                if trainer.step % SETTLE == 0:
                    bar.set_postfix(trainer.progress(), refresh=False)
        trainer.settle()
        return trainer.result()


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
        slow = {id(p) for p in model.dynamics.parameters()}
        dynamics = [p for p in every if id(p) in slow]
        rest = [p for p in every if id(p) not in slow]
        # What the start has learned of the dynamics is better than what early SVI steps would make of it.
        rates = [options.learning_rate * (SLOW if options.warm_start else 1.0), options.learning_rate]
        groups = [{"params": p, "lr": r} for p, r in zip((dynamics, rest), rates, strict=True) if p]
        self.optimizer = adam(groups, betas=(0.9, 0.99))
        self.schedule = one_cycle(self.optimizer, options.num_steps)
        self.parameters = [*dynamics, *rest]
        self.last_good = [p.detach().clone() for p in self.parameters]
        self.scale = _observed_numbers(recs)  # the loss is per number observed
        self.validated: float | None = None

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
        with torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(True):
            if found := sites.compare(self.model, self.guide, batch):
                raise ValueError("\n".join(found))
            self.elbo.terms(self.model, self.guide, batch)

    def warm_start(self, bar: tqdm) -> None:
        """The start from the data (:mod:`pyro_metassm.warm_start`)."""
        begin = time.perf_counter()
        num_steps, total, done = self.options.warm_start_steps, bar.total, 0
        bar.reset(num_steps)
        bar.set_description("start")

        def on_step(loss: float) -> None:
            nonlocal done
            done += 1
            bar.update()
            if done % 10 == 0:
                bar.set_postfix({"roll-out error": f"{loss:.3g}"}, refresh=False)

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
        loss = self.penalty(terms, batch) - terms.elbo / self.scale
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        values = {"elbo": terms.elbo, "log_likelihood": terms.log_likelihood}
        values |= {f"kl_{site}": kl for site, kl in terms.kl.items()} | {"gradient_norm": norm}
        self.history.add(self.step + 1, values, terms.by_recording, names)
        if len(self.history.waiting) >= self.settle_every:
            self.settle()
            self.keep()
        rate = self.optimizer.param_groups[-1]["lr"]
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        seconds = time.perf_counter() - begin
        self.seconds["svi"] += seconds
        self.history.record(self.step, learning_rate=rate, seconds=seconds)

    def penalty(self, terms, batch: Batch) -> Tensor | float:
        """What is minimised besides the negative ELBO per observed number."""
        if self.options.update_penalty:
            with self.model.given(terms.values):
                dynamics = self.model.dynamics_of(terms.embedding, batch.recording)
            if hasattr(dynamics, "update_norm"):
                return self.options.update_penalty * dynamics.update_norm()
        return 0.0

    def settle(self) -> None:
        """Fetch the numbers of the last steps, and stop at the last good state if one is not finite."""
        trouble = self.history.settle()
        if trouble is None:
            return
        with torch.no_grad():
            for kept, parameter in zip(self.last_good, self.parameters, strict=True):
                parameter.copy_(kept)
        raise NonFiniteLossError(
            f"fit: the {trouble.what} was not finite at step {trouble.step}, recording(s) "
            f"{', '.join(trouble.names) or 'unknown'}; the last good state is in this error's .fit; try a smaller "
            "learning_rate, or look for extreme values in these recordings",
            self.result(),
        )

    def keep(self) -> None:
        """Remember the parameters as the last good state."""
        for kept, parameter in zip(self.last_good, self.parameters, strict=True):
            kept.copy_(parameter.detach())

    def validate(self, validation: Recordings) -> None:
        """The ELBO of other trials, without roll-outs (so that per number it may lie above the training's)."""
        self.validated = _observed_numbers(validation)
        self.guide.eval()
        with torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(False):
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
            | ({"smooth_counts": True} if self.options.smooth_counts else {}),
        )


def _observed_numbers(recs: Recordings) -> float:
    return float(sum(recording.mask.sum() for recording in recs.values()))
