"""Fitting: stochastic variational inference of a model and a guide on recordings."""

from __future__ import annotations

import copy
import math
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyro
import torch
import xarray as xr
from torch import nn
from tqdm.auto import tqdm

from pyro_metassm import _checks as checks
from pyro_metassm import checkpoints
from pyro_metassm import warm_start as starts
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.guides.base import AmortizedGuide
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.recordings import Batch, Recordings, sample_trials
from pyro_metassm.result import Fit, embedding_statistics
from pyro_metassm.schedules import one_cycle

SLOW = 0.1  # learning rate of started dynamics, relative to the rest


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
        validation: recordings (other trials) whose ELBO, without roll-outs, is taken every ``validation_every`` steps.
        clip_norm: largest norm of the gradient of the ELBO per observed number.
        update_penalty: weight of the squared norm of the embedding's updates of the dynamics, per observed number.
        seed: of everything random in the fit; the same seed on one machine gives the same numbers.
        device: "cpu", "cuda", or "auto" (a GPU where there is one).
        num_threads: threads of PyTorch while fitting; None lets the size of the problem choose.
        checkpoint: folder to save the state in every ``checkpoint_every`` steps; a folder that holds the state of
            the same fit is resumed.
        progress: show a progress bar.

    Returns:
        The :class:`Fit`: trained copies, history, embeddings.

    Raises:
        ValueError: recordings that the model does not know or its likelihood cannot have produced, a latent site
            without a partner, arguments out of range.
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
    )
    model, guide = copy.deepcopy((model, guide))
    model.to(chosen).train(), guide.to(chosen).train()
    guide.read_in.start(recs)
    threads = num_threads or _choose_threads(model, recs, trials_per_step)
    with _threads(threads), torch.random.fork_rng([chosen] if chosen.type == "cuda" else []):
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
                if trainer.step % 10 == 0:
                    bar.set_postfix(trainer.progress(), refresh=False)
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


class Trainer:
    """The state of a fit between two steps, and how it takes one."""

    def __init__(
        self, model: MetaSSM, guide: AmortizedGuide, recs: Recordings, options: Options, device: torch.device
    ):
        self.model, self.guide, self.recs, self.options, self.device = model, guide, recs, options, device
        self.rng = np.random.default_rng(options.seed)
        self.elbo = SequentialELBO()
        self.step = 0
        self.history: dict[str, list[float]] = {}
        self.seconds = {"warm_start": 0.0, "svi": 0.0}
        dynamics = list(model.dynamics.parameters())
        slow = {id(p) for p in dynamics}
        rest = [p for p in (*model.parameters(), *guide.parameters()) if id(p) not in slow]
        # What the start has learned of the dynamics is better than what early SVI steps would make of it.
        rates = [options.learning_rate * (SLOW if options.warm_start else 1.0), options.learning_rate]
        groups = [{"params": p, "lr": r} for p, r in zip((dynamics, rest), rates, strict=True)]
        self.optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
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
            terms = self.elbo.terms(self.model, self.guide, self.batch(names=names, trials=trials))
        loss = -terms.elbo / self.scale
        if self.options.update_penalty:
            dynamics = self.model.adapt_dynamics(terms.embedding)
            if hasattr(dynamics, "update_norm"):
                loss = loss + self.options.update_penalty * dynamics.update_norm()
        if not torch.isfinite(loss):
            bad = [n for n, v in zip(names, terms.by_recording.tolist(), strict=True) if not math.isfinite(v)]
            raise self.stopped("loss", bad)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.options.clip_norm)
        if not torch.isfinite(norm):
            raise self.stopped("gradient", list(names))
        self.keep()
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        seconds = time.perf_counter() - begin
        self.seconds["svi"] += seconds
        self.record(
            elbo=terms.elbo.item(),
            log_likelihood=terms.log_likelihood.item(),
            **{f"kl_{site}": kl.item() for site, kl in terms.kl.items()},
            gradient_norm=norm.item(),
            learning_rate=self.optimizer.param_groups[-1]["lr"],
            seconds=seconds,
        )

    def keep(self) -> None:
        """Remember the parameters as the last good state."""
        for kept, parameter in zip(self.last_good, self.parameters, strict=True):
            kept.copy_(parameter.detach())

    def record(self, **values: float) -> None:
        """Append to the history of this step; a name that is new starts with NaN."""
        for name, value in values.items():
            column = self.history.setdefault(name, [])
            column.extend([math.nan] * (self.step - 1 - len(column)))
            column.append(value)

    def validate(self, validation: Recordings) -> None:
        """The ELBO of other trials, without roll-outs (so that per number it may lie above the training's)."""
        self.validated = _observed_numbers(validation)
        self.guide.eval()
        with torch.random.fork_rng(), torch.no_grad(), pyro.validation_enabled(False):
            value = -self.elbo.loss(self.model, self.guide, self.batch(validation))
        self.guide.train()
        self.record(validation_elbo=value)

    def progress(self) -> dict[str, str]:
        recent = self.history["elbo"][-10:]
        return {"elbo per bin and neuron": f"{sum(recent) / len(recent) / self.scale:.4g}"}

    def stopped(self, what: str, names: list[str]) -> NonFiniteLossError:
        with torch.no_grad():
            for kept, parameter in zip(self.last_good, self.parameters, strict=True):
                parameter.copy_(kept)
        return NonFiniteLossError(
            f"fit: the {what} was not finite at step {self.step + 1}, recording(s) {', '.join(names) or 'unknown'}; "
            "the last good state is in this error's .fit; try a smaller learning_rate, or look for extreme values "
            "in these recordings",
            self.result(),
        )

    def result(self) -> Fit:
        """The fit as it stands."""
        self.model.eval(), self.guide.eval()
        statistics = embedding_statistics(self.model, self.guide, self.recs)
        size = max((len(column) for column in self.history.values()), default=0)
        columns = {n: ("step", np.array(c + [math.nan] * (size - len(c)))) for n, c in self.history.items()}
        attrs = {f"{k}_seconds": v for k, v in self.seconds.items()} | {"num_observed": self.scale}
        attrs |= {} if self.validated is None else {"num_observed_validation": self.validated}
        history = xr.Dataset(columns, coords={"step": np.arange(1, size + 1)}, attrs=attrs)
        return Fit(self.model, self.guide, history, statistics, seed=self.options.seed)


def _observed_numbers(recs: Recordings) -> float:
    return float(sum(recording.mask.sum() for recording in recs.values()))


@contextmanager
def _threads(number: int):
    """PyTorch's number of threads, for the time of a fit."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _choose_threads(model, recs: Recordings, trials_per_step: int | None) -> int:
    """One thread for small recurrent products, which more threads slow down; all for wide data."""
    trials = min(trials_per_step or 10**9, max(r.num_trials for r in recs.values()))
    numbers = sum(r.num_neurons * r.num_bins for r in recs.values()) * trials
    return 1 if numbers < 2_000_000 else torch.get_num_threads()
