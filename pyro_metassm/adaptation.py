"""Few-shot adaptation: a fitted family of dynamics meets new recordings (paper, section 4)."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm import few_shot
from pyro_metassm.adapter import Adapter, requires_grad, trained
from pyro_metassm.frames import canonical_frames
from pyro_metassm.guides.base import AmortizedGuide
from pyro_metassm.likelihoods import Likelihood, Mixed
from pyro_metassm.likelihoods.mixed import Families
from pyro_metassm.linear_systems import frames_of_simulations, noisy_counts, through_linear_systems
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.observations import of_single_neurons
from pyro_metassm.own_tuning import with_own_tuning
from pyro_metassm.read_outs import (
    ReadOutPrior,
    fit_read_outs,
    kinds_of,
    refit_read_outs,
    rows_of,
    second_moments,
    write_read_outs,
)
from pyro_metassm.rebuilding import for_recordings, tables
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit, check_fit
from pyro_metassm.tempering import tempered
from pyro_metassm.trainer import Options
from pyro_metassm.warm_start import SETTLING, natural_frames, smoothed_by, write_read_in
from pyro_metassm.windows import TiedFrames

PARTS = ("read_in", "read_out", "embedding")


class Course(NamedTuple):
    """Of SVI."""

    num_steps: int
    learning_rate: float


USUAL, OF_COUNTS = Course(50, 3e-3), Course(500, 2e-2)


def adapt(
    fit: Fit,
    new: Recordings,
    *,
    num_steps: int | None = None,
    train: Collection[str] = ("read_in", "read_out"),
    num_starts: int = 1024,
    search_steps: int = 150,
    trials_per_step: int | None = 32,
    learning_rate: float | None = None,
    likelihood: type[Likelihood] | Mapping[str, type[Likelihood]] | None = None,
    seed: int = 0,
    num_threads: int | None = None,
    progress: bool = True,
) -> Fit:
    r"""Let a fit know new recordings from a few of their trials; everything that recordings share stays as it is.

    Only the read-in and the read-out of the new recordings are trained, and their embeddings are inferred by the frozen
    encoder (paper, section 4). (1) The start: a canonical frame from the data; the affine map from it to the fit's
    latents is searched for from many starts, what the model itself draws and frames of the size of the known read-outs,
    by roll-outs of the frozen dynamics, with these read-outs as a prior; the data's evidence chooses among the last,
    where observations are of single neurons and steps are Normal (:mod:`pyro_metassm.few_shot`). (2) The read-outs: a
    regression with that prior, which for counts is as wide as the recording's own neurons have it
    (:mod:`pyro_metassm.own_tuning`; not after a fit with ``smooth_counts``). (3) ``num_steps`` of SVI, with the guide's
    ``neuron_dropout``; of counts with the read-ins of the known recordings as a prior, too, and, not after a fit with
    ``smooth_counts``, with trials that the model draws beside those seen, from which the read-in alone learns, and with
    read-outs at a tenth of the rate, which half way are regressed anew; read-ins of real numbers, which the search has
    found, at a tenth of the rate. After a fit with ``smooth_counts`` the encoder infers embeddings from the paths
    found, which are clearer than what a read-in gives. Deviations from what is shared, of
    :class:`~pyro_metassm.models.PartiallyPooled`, are learned from zero at a tenth of the rate.

    One trial suffices to start; whether it says enough is in ``attrs["adaptation"]`` of the result: for every recording
    ``rollout_error`` (mean squared error of roll-outs of up to 25 bins, in variances of the recording's latents: near
    the known recordings', ``fit.attrs["rollout_error"]``, where the family fits, and larger where it does not; what
    inputs do, which the roll-outs are not given, counts as error in both) and
    ``embedding_spread`` (sd of the embeddings of the last frames, weighted by the data's evidence, by dimension: near 0
    where the trials decide). What the family has wrong about a recording, :func:`pyro_metassm.revise` corrects by its
    trials: ``pm.revise(adapted, new)``, of one new recording.

    Args:
        fit: of :func:`pyro_metassm.fit`.
        new: recordings that the fit does not know: the trials to adapt from.
        num_steps: steps of SVI; None: 50, and 500 of counts whose read-outs a regression of (2) has found, as their
            read-ins have farther to go.
        train: parts of the new recordings to train, of "read_in" (what the guide keeps of a recording or its neurons),
            "read_out" (what the model keeps of them, noise included) and "embedding". Without the first two these stay
            as the data alone suggest; with "embedding" the posterior of the embedding is free instead of inferred by
            the encoder.
        num_starts: frames of each of the two kinds to search from.
        search_steps: gradient steps of the search.
        trials_per_step: trials of each recording and step of SVI; None for all.
        learning_rate: peak of the cycle of SVI; None: 0.003, and 0.02 of those.
        likelihood: of a fit with a ``Mixed`` one, the family of the new recordings, or the mapping from their neurons
            to families; None: what their names say.
        seed: of everything random.
        num_threads: threads to use; None takes PyTorch's present number.
        progress: show a progress bar.

    Returns:
        a fit that knows the old and the new recordings; the old ones' part is bit-equal to ``fit``'s, and ``history``
        is that of the adaptation.

    Raises:
        ValueError: recordings that the fit knows already, whose bin width is another one or that its likelihood cannot
            have produced; a family that it does not have; parts that are not there; a model without shared dynamics, or
            whose global sites have rows for recordings or neurons; a guide that is not amortised.
        NonFiniteLossError: naming step and recording; ``error.fit`` is the last good state.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0, 4.0], num_trials=8, num_steps=20)
        >>> old = recs.drop(["w=4"])
        >>> model = pm.models.MetaSSM(old, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), old, num_steps=5, warm_start_steps=5, progress=False)
        >>> new = recs.select(["w=4"]).take_trials(2)
        >>> adapted = pm.adapt(fit, new, num_steps=5, num_starts=8, search_steps=6, progress=False)
        >>> adapted.names
        ('w=2.5', 'w=5', 'w=4')
    """
    check_fit(fit)
    checks.integers(0, search_steps=search_steps, **({} if num_steps is None else {"num_steps": num_steps}))
    checks.integers(1, num_starts=num_starts)
    if likelihood is not None:
        fit = _with_families(fit, dict.fromkeys(new, likelihood))
    parts = _check(fit, new, train, learning_rate)
    began = time.perf_counter()
    model, guide = for_recordings(fit.model, fit.guide, NeuronTable.of(new))
    with (
        machine.threads(num_threads),
        machine.memory_kept(),
        machine.random_forked(fit.device),
        tqdm(
            total=search_steps + (num_steps or 0), disable=not progress, desc="adapt", dynamic_ncols=True
        ) as bar,
    ):
        torch.manual_seed(seed)
        with torch.no_grad():
            model.observation.start(new)
            guide.read_in.started.fill_(False)
            guide.read_in.start(new, model.observation.kinds)
        model.eval().requires_grad_(False), guide.eval().requires_grad_(False)
        prior = ReadOutPrior.of(
            fit.model, [name for name, row in zip(fit.names, trained(fit), strict=True) if row]
        )
        with model.given(guide.global_sites.medians()):
            report, inferred, prior = _start(
                fit, model, guide, new, prior, parts, num_starts, search_steps, seed, bar
            )
        tuned = bool(prior.own)
        usual = OF_COUNTS if tuned else USUAL
        num_steps = usual.num_steps if num_steps is None else num_steps
        rate = usual.learning_rate if learning_rate is None else learning_rate
        bar.total = search_steps + num_steps
        options = Options(num_steps, trials_per_step, None, rate, False, 0, 1.0, 0.0, seed)
        trainer = Adapter(fit, model, guide, new, prior, options, parts, report, inferred, tuned)
        trainer.seconds["search"] = time.perf_counter() - began
        while trainer.step < num_steps:
            trainer.take_step()
            bar.update()
        trainer.finish()
        return trainer.result()


def _with_families(fit: Fit, families: Families) -> Fit:
    """The fit, its mixed likelihood with these families of more recordings."""
    known = fit.model.observation
    if not isinstance(known, Mixed):
        raise ValueError(
            f"likelihood: needed none for a fit of one family, {type(known).__name__}, which the new recordings have"
        )
    more = Mixed.of({**known.families, **families})
    if set(more(fit.model.neurons).parts) != set(known.parts):
        raise ValueError(
            f"likelihood: needed a family that the fit has, {type(known).__name__}, got {more.__name__}"
        )
    model = copy.copy(fit.model)
    model.config = fit.model.config | {"likelihood": more}
    model, guide = for_recordings(model, fit.guide, fit.model.neurons)
    return dataclasses.replace(fit, model=model, guide=guide)


def _check(fit: Fit, new: Recordings, train: Collection[str], learning_rate: float | None) -> tuple[str, ...]:
    parts = (train,) if isinstance(train, str) else tuple(train)
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"train: needed some of {', '.join(PARTS)}, got {parts}")
    if learning_rate is not None and not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate: needed a positive number, got {learning_rate!r}")
    if not isinstance(new, Recordings):
        raise ValueError(f"new: needed pm.Recordings([...]), got {type(new).__name__}")
    if not isinstance(fit.guide, AmortizedGuide):
        raise ValueError(
            f"fit.guide: needed an AmortizedGuide such as guides.DKF, got {type(fit.guide).__name__}, which has no "
            "read-in to start and no encoder to infer embeddings"
        )
    try:
        owned = [key for key in tables(fit.model, fit.guide)[1] if key.startswith("global_sites.loc.")]
    except ValueError as error:
        raise ValueError(
            f"adapt: needed a model that can be made for other recordings, got one where {error}"
        ) from error
    if owned:
        raise ValueError(
            "adapt: needed global sites that new recordings leave as they are, got "
            f"{', '.join(key.removeprefix('global_sites.loc.').replace('-', '.') for key in owned)} with rows for "
            "recordings or neurons, whose posterior a few trials of others do not give; fit all recordings together"
        )
    with (
        torch.no_grad(),
        fit.model.given(fit.guide.global_sites.medians()),
    ):  # a model that shares nothing says so
        fit.model.adapt_dynamics(fit.statistics.new_zeros(1, 1, fit.model.embedding_dim))
    for recording in new.values():
        if recording.name in fit.names:
            raise checks.fail(
                recording.name, "a recording that the fit does not know", "one that it knows", "rename it"
            )
        fit.model.observation.check(recording)
    known = fit.attrs.get("bin_width")
    if known is not None and abs(new.bin_width - known) > 1e-6 * known:
        raise ValueError(
            f"adapt: needed recordings in the fit's bins of {known} s, got bins of {new.bin_width} s; bin them anew"
        )
    return parts


def _start(
    fit, model, guide, new, prior, parts, num_starts, search_steps, seed, bar
) -> tuple[dict, Tensor | None, ReadOutPrior]:
    """Read-ins and read-outs of the new recordings from the data.

    Returns:
        what is known of how well they fit; the statistics of the embeddings that smoothed the paths of noisy counts,
        which tell more than those that a read-in of so few counts gives; the prior of read-outs from here on.
    """
    rng = torch.Generator().manual_seed(seed)
    batch = new.batch(model.names, dtype=fit.dtype, device=fit.device)
    bins = (batch.mask & batch.held_in[:, None, None, :]).any(-1)
    features = guide.read_in.features(batch)
    widths = fit.guide.smoothing[trained(fit)]
    about = float(widths.clamp(min=1e-3).log().mean().exp()) if widths.any() else 0.0
    frames = canonical_frames(features, bins, model.latent_dim, smoothing=about)
    with torch.no_grad():
        guide.smoothing.copy_(torch.tensor(frames.smoothing))
    requires_grad(model, tables(model, guide)[0])
    smooth = bool(fit.attrs.get("smooth_counts")) and noisy_counts(model, guide, frames, batch)
    if smooth:
        linear = through_linear_systems(model, features, frames, bins, batch)
        frames = dataclasses.replace(linear.frames, coordinates=linear.paths)
    else:
        fit_read_outs(model, frames.coordinates, batch, rng)
    rows = [
        prior.units(r.detach(), k) for r, k in zip(rows_of(model, batch), kinds_of(model, batch), strict=True)
    ]
    report: dict = {}
    if {"read_in", "read_out"} & set(parts):
        known = fit.statistics[trained(fit)][:, : model.embedding_dim]
        found = few_shot.search(
            model,
            guide,
            frames,
            bins,
            rows,
            batch,
            prior=prior,
            embeddings=known,
            num_starts=num_starts,
            num_steps=search_steps,
            rng=rng,
            on_step=lambda error: bar.update(),
        )
        frame, offset = found.frame, found.offset
        for r, name in enumerate(batch.names):
            error, spread = float(found.error[r]), found.embedding_spread[r].tolist()
            report[name] = {"rollout_error": error, "embedding_spread": spread}
    else:
        frame, _ = natural_frames(second_moments([r[:, :-1] for r in rows]))
        offset = frame.new_zeros(frame.shape[:-1])
    write_read_in(guide, frames, frame, offset, batch)
    write_read_outs(model, frame, offset, batch)
    with torch.no_grad():
        _, z, share = guide.common_space(batch)
        z = TiedFrames(frame, offset).states(frames.coordinates) if smooth else z
    statistics = None
    if smooth:
        with torch.no_grad():
            statistics = guide.embedding_statistics(z, share, batch)
            e = guide.embedding_posterior(statistics).mean
        for _ in range(SETTLING):
            z, draws = smoothed_by(model, e, z, batch)
            refit_read_outs(tempered(model), draws, batch, prior=prior)
        write_read_in(
            guide, frames_of_simulations(model, guide, e, batch), *_as_they_are(frame, offset), batch
        )
        z = draws
    elif bool(guide.read_in.counts.all()) and of_single_neurons(model, batch):
        prior = with_own_tuning(prior, model, z, batch)
    if not smooth or list(model.observation.parameters()):
        fit_read_outs(model, z, batch, rng, num_steps=40, prior=prior, afresh=False)
    model.requires_grad_(False)
    return report, statistics, prior


def _as_they_are(frame: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """The frame and the offset of coordinates that are the latents."""
    return torch.eye(frame.shape[-1]).to(frame).expand_as(frame), torch.zeros_like(offset)
