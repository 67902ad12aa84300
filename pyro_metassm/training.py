"""Fitting: stochastic variational inference of a model and a guide on recordings."""

from __future__ import annotations

import copy
import math
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from pyro_metassm import _checks as checks
from pyro_metassm import _interrupts as interrupts
from pyro_metassm import _machine as machine
from pyro_metassm.announcing import Announcement
from pyro_metassm.checkpoints import CheckpointError, Run
from pyro_metassm.guides.base import AmortizedGuide
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit
from pyro_metassm.specification import specification
from pyro_metassm.trainer import SETTLE, Options, Trainer


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
    kl_warmup_steps: int = 0,
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

    A step whose loss or gradient is not finite is not taken: ``attrs["skipped"]`` of the result lists such steps, with
    recordings and trials. Five in a row end the fit.

    Ctrl-C stops after the step and returns the fit so far, ``attrs["interrupted_at"]``; a second one raises at once.

    With ``checkpoint`` a fit that was ended, at whatever moment, is taken up by the same call, and has the history and
    the parameters of one that was not, to the bit, on the same machine. Every state is written beside the last two and
    then renamed; states of a fit of other options, data, model or guide are refused, not overwritten.
    Fits in several threads of a process take turns, each with the result that it has alone (as long as nothing else
    draws from PyTorch's default generator meanwhile: make the models before the threads start); in several processes
    they run at once.

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
            from half of the ``warm_start_steps`` on by the learned dynamics, as :func:`pyro_metassm.adapt` then does;
            bursts count no more than a few counts do meanwhile (:mod:`pyro_metassm.tempering`). Where trials are long
            and counts few it forecasts far better, best with ``num_steps=0``: SVI loses some of it. Short trials in
            many latents are worse for it.
        validation: recordings (other trials) whose ELBO, without roll-outs, is taken every ``validation_every`` steps.
        clip_norm: largest norm of the gradient of the ELBO per observed number.
        update_penalty: weight of the squared norm of the embedding's updates of the dynamics, per observed number.
        kl_warmup_steps: steps of SVI in which the weight of all divergences grows from 0 to 1 (Bowman et al., CoNLL
            2016); 0 for their whole weight from the first. In bins of 10 or 20 ms they shut latents down before the
            read-outs have learned to use them, and what is shut stays so: four fifths of ``num_steps`` keep these
            latents. Where trials are few for the neurons, the latents kept may say something of these trials alone.
        seed: of everything random in the fit; the same seed on one machine gives the same numbers.
        device: "cpu", "cuda", or "auto" (a GPU where there is one).
        num_threads: threads while fitting; None takes PyTorch's present number (``torch.get_num_threads()``).
        checkpoint: folder to save the state in, after the warm start and every ``checkpoint_every`` steps; a folder
            that holds states of the same fit is resumed.
        progress: show a progress bar.

    Returns:
        The :class:`Fit`: trained copies, history, embeddings.

    Raises:
        ValueError: recordings that the model does not know or its likelihood cannot have produced, a guide that is not
            amortised, a latent site without a partner, nothing to train, arguments out of range, a checkpoint that
            cannot be read, is of another fit, or is being written by one.
        NonFiniteLossError: naming step, recording and trial; ``error.fit`` is the last good state.
        CheckpointError: a full disk; ``error.fit`` is the fit so far.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> fit.history.sizes["step"]
        5
    """
    checks.integers(
        0, num_steps=num_steps, warm_start_steps=warm_start_steps, kl_warmup_steps=kl_warmup_steps
    )
    checks.integers(1, validation_every=validation_every, checkpoint_every=checkpoint_every)
    if not (0 < learning_rate < math.inf and clip_norm > 0 and update_penalty >= 0):
        raise ValueError(
            "fit: needed a positive learning_rate and clip_norm and an update_penalty of at least 0, "
            f"got {learning_rate}, {clip_norm} and {update_penalty}"
        )
    if kl_warmup_steps > num_steps:
        raise ValueError(
            f"fit: needed kl_warmup_steps of at most num_steps, {num_steps}, got {kl_warmup_steps}"
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
        kl_warmup_steps,
    )
    model, guide = copy.deepcopy((model, guide))
    model.to(chosen).train(), guide.to(chosen).train()
    guide.read_in.start(recs, model.observation.kinds)
    with (
        machine.threads(num_threads),
        machine.memory_kept(),
        machine.random_forked(chosen),
        interrupts.deferred() as stop,
    ):
        torch.manual_seed(seed)
        trainer = Trainer(model, guide, recs, options, chosen)
        trainer.check_program()
        told = specification(model, guide, recs, options, validation, validation_every)
        with (
            Run(checkpoint, told) as run,
            tqdm(total=num_steps, disable=not progress, desc="fit", dynamic_ncols=True) as bar,
        ):
            sizes = (num_steps, trials_per_step, recordings_per_step)
            say = partial(bar.write, file=sys.stderr)
            tell = Announcement(say, recs, (model, guide), *sizes) if progress else None
            try:
                if not run.resume(trainer) and warm_start:
                    trainer.warm_start(bar, stop)
                    if not stop.requested:  # a start that was cut short is no state of this fit
                        run.save(trainer)
                bar.update(trainer.step)
                while trainer.step < num_steps and not stop.requested:
                    trainer.take_step()
                    if tell is not None:
                        tell.after_step(trainer.step)
                    last = trainer.step == num_steps
                    if validation is not None and (trainer.step % validation_every == 0 or last):
                        trainer.validate(validation)
                    if trainer.step % checkpoint_every == 0 or last or (stop.requested and trainer.step > 0):
                        run.save(trainer)
                    bar.update()
                    if trainer.step % SETTLE == 0:
                        bar.set_postfix(trainer.progress(), refresh=False)
            except CheckpointError as error:
                error.fit = trainer.result()
                raise
        trainer.finish()
        if stop.requested:
            trainer.stopped(checkpoint is not None)
        return trainer.result()
