"""The methods of the studies, each a line of a table, and how they are trained and adapted to few trials."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pyro_metassm import _machine as machine
from pyro_metassm import models
from pyro_metassm.adaptation import adapt as library_adapt
from pyro_metassm.experiments.files import likelihood_of
from pyro_metassm.guides import DKF
from pyro_metassm.models import MetaSSM
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.rebuilding import for_recordings
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit
from pyro_metassm.revising import revise
from pyro_metassm.trainer import NonFiniteLossError, Options, Trainer
from pyro_metassm.training import fit as library_fit


@dataclass(frozen=True)
class Steps:
    """How long everything is trained: the same for all methods, but for what the plain recipe lacks.

    Attributes:
        warm_start_steps, num_steps: of :func:`pyro_metassm.fit`.
        trials_per_step: trials of each recording and step of SVI, in fits and adaptations.
        learning_rate: of SVI in fits.
        rollout_probability: of the guide, but for the plain recipe, which has the guide's own default. High, since
            forecasts are what is scored: one-step terms at noisy states teach dynamics that decay too fast near rest.
        num_starts, search_steps, adapt_steps: of :func:`pyro_metassm.adapt`.
        plain_steps, plain_learning_rate: SVI of the plain recipe, from a random start.
        plain_adapt_steps, plain_adapt_learning_rate: its adaptation, SVI of read-ins and likelihoods alone.
    """

    warm_start_steps: int = 2000
    num_steps: int = 100
    trials_per_step: int = 8
    learning_rate: float = 1e-2
    rollout_probability: float = 0.8
    num_starts: int = 1024
    search_steps: int = 150
    adapt_steps: int = 50
    plain_steps: int = 600
    plain_learning_rate: float = 1e-3
    plain_adapt_steps: int = 200
    plain_adapt_learning_rate: float = 1e-2


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model: ``latent_dim``, ``embedding_dim``, ``rank``; its likelihood is that of the data."""

    latent_dim: int = 2
    embedding_dim: int = 2
    rank: int = 1


@dataclass(frozen=True)
class Method:
    """What is compared.

    Attributes:
        label: for people.
        model: the class of the model.
        plain: the paper's plain recipe: SVI from a random start, for the fit and for the adaptation.
        fit, adapt: arguments of :func:`pyro_metassm.fit` and :func:`pyro_metassm.adapt` in place of the study's.
        trained_as: another method of the study whose fit this one takes; None for a fit of its own.
        adapts_plainly: adapt by the plain recipe; None: as ``plain``.
        revised: correct what is adapted by :func:`pyro_metassm.revise`, every new recording by its own trials.
    """

    label: str
    model: type[MetaSSM] = MetaSSM
    plain: bool = False
    fit: Mapping[str, Any] = field(default_factory=dict)
    adapt: Mapping[str, Any] = field(default_factory=dict)
    trained_as: str | None = None
    adapts_plainly: bool | None = None
    revised: bool = False

    @property
    def shares(self) -> bool:
        """Whether recordings share dynamics: else each is fitted from its own few trials."""
        return self.model is not models.SingleSession

    @property
    def embeds(self) -> bool:
        """Whether its embedding means something."""
        return self.shares and self.model is not models.SharedDynamics


def _table() -> dict[str, Method]:
    warm = {
        "meta": Method("Meta-dynamical SSM", MetaSSM),
        "linear-adapter": Method("Linear-Adapter (CoDA)", models.LinearAdapter),
        "geps": Method("GEPS", models.GEPS),
        "full-rank": Method("Full-rank hypernetwork", models.FullRank),
        "embedding-input": Method("Embedding-Input", models.EmbeddingInput),
        "single": Method("Single Session", models.SingleSession),
        "shared": Method("Shared Dynamics", models.SharedDynamics),
    }
    plain = {
        f"{name}-plain": replace(method, label=f"{method.label}, plain recipe", plain=True)
        for name, method in warm.items()
    }
    beside = {}
    for name, method in warm.items():
        beside[name] = method
        if method.embeds:
            label = f"{method.label}, revised"
            beside[f"{name}-revised"] = replace(method, label=label, trained_as=name, revised=True)
    return beside | plain


METHODS = _table()
PAPER = ("meta", "linear-adapter", "embedding-input", "single", "shared")
"""Those of the paper's table 1."""
DEFAULT = tuple(
    name
    for name, method in METHODS.items()
    if name == "meta-revised" or name.removesuffix("-plain") in PAPER or not (method.plain or method.revised)
)


def chosen(names, known: Mapping[str, Method] = METHODS) -> dict[str, Method]:
    """The methods of these names.

    Raises:
        ValueError: for an unknown one, with those that there are.
    """
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"methods: needed some of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    return {name: known[name] for name in dict.fromkeys(names)}


def train(
    method: Method, recs: Recordings, sizes: Sizes, steps: Steps, seed: int, num_threads: int | None = None
) -> Fit:
    """Fit a method to recordings; a fit that leaves the finite numbers is its last good state."""
    with machine.random_forked():
        torch.manual_seed(seed)
        model = method.model(
            recs,
            latent_dim=sizes.latent_dim,
            embedding_dim=sizes.embedding_dim,
            rank=sizes.rank,
            likelihood=likelihood_of(recs),
        )
        guide = DKF(model) if method.plain else DKF(model, rollout_probability=steps.rollout_probability)
    options: dict[str, Any] = {
        "num_steps": steps.plain_steps if method.plain else steps.num_steps,
        "learning_rate": steps.plain_learning_rate if method.plain else steps.learning_rate,
        "warm_start": not method.plain,
        "warm_start_steps": steps.warm_start_steps,
        "trials_per_step": steps.trials_per_step,
    }
    options |= method.fit
    try:
        fit = library_fit(model, guide, recs, seed=seed, num_threads=num_threads, progress=False, **options)
    except NonFiniteLossError as error:
        return error.fit
    if "interrupted_at" in fit.attrs:  # a study of half a fit is none
        raise KeyboardInterrupt
    return fit


def adapt(
    method: Method,
    fit: Fit | None,
    new: Recordings,
    sizes: Sizes,
    steps: Steps,
    seed: int,
    num_threads: int | None = None,
) -> Fit:
    """A fit that knows new recordings, from the trials given.

    Methods with shared dynamics adapt by :func:`pyro_metassm.adapt`, or by the plain recipe; Single Session is fitted
    from scratch, all recordings in one batch.
    """
    if not method.shares:
        return train(method, new, sizes, steps, seed, num_threads)
    assert fit is not None
    try:
        if method.plain if method.adapts_plainly is None else method.adapts_plainly:
            return adapt_plainly(fit, new, steps, seed, num_threads)
        options: dict[str, Any] = {
            "num_steps": steps.adapt_steps,
            "num_starts": steps.num_starts,
            "search_steps": steps.search_steps,
            "trials_per_step": steps.trials_per_step,
        }
        options |= method.adapt
        return library_adapt(fit, new, seed=seed, num_threads=num_threads, progress=False, **options)
    except NonFiniteLossError as error:
        return error.fit


def corrected(
    method: Method, fit: Fit, new: Recordings, names: Sequence[str]
) -> Iterator[tuple[Fit, list[str]]]:
    """The fits to score recordings by, and which: of a revised method one for each, else one for all."""
    if not method.revised:
        yield fit, list(names)
        return
    for name in names:
        yield revise(fit, new.select([name]), num_trials=new[name].num_trials), [name]


def adapt_plainly(fit: Fit, new: Recordings, steps: Steps, seed: int, num_threads: int | None = None) -> Fit:
    """The paper's adaptation: SVI of new read-ins, read-outs and noise from a random start, all else frozen.

    Returns:
        a fit that knows the new recordings alone.
    """
    with (
        machine.threads(num_threads or torch.get_num_threads()),
        machine.memory_kept(),
        machine.random_forked(fit.device),
    ):
        torch.manual_seed(seed)
        model, guide = for_recordings(fit.model, fit.guide, NeuronTable.of(new))
        model.observation.start(new)
        guide.read_in.started.fill_(False)
        guide.read_in.start(new, model.observation.kinds)
        for module in (model, guide):
            module.train().requires_grad_(False)
        for own in (guide.read_in, model.read_out, model.observation):
            own.requires_grad_(True)
        options = Options(
            num_steps=steps.plain_adapt_steps,
            trials_per_step=steps.trials_per_step,
            recordings_per_step=None,
            learning_rate=steps.plain_adapt_learning_rate,
            warm_start=False,
            warm_start_steps=0,
            clip_norm=1.0,
            update_penalty=0.0,
            seed=seed,
        )
        trainer = Trainer(model, guide, new, options, fit.device)
        while trainer.step < options.num_steps:
            trainer.take_step()
        trainer.finish()
        return trainer.result()
