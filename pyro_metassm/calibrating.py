"""Whether the posterior of a fit means what it says: simulation-based calibration, coverage, Pareto shapes."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from tqdm.auto import tqdm

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm._aligning import align as align_to_truth
from pyro_metassm.comparing import posterior_scores
from pyro_metassm.draws import global_draws, observations_of
from pyro_metassm.guides.base import AmortizedGuide
from pyro_metassm.posterior import posterior
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit, check_fit

LEVELS = (0.5, 0.9)  # of the central intervals
STEP = 20  # numbers of draws, plus one, of which both leave whole tails
QUANTITIES = ("embedding", "latents", "rates")
SIMULATED = (32, 50)  # trials and bins of simulated recordings, unless told otherwise
DRAWS = 50  # behind the posterior means that are aligned to the truth


def calibration(
    fit: Fit,
    simulate: Callable[[int], Recordings] | None = None,
    *,
    like: Recordings | None = None,
    new_recordings: bool = True,
    align: Recordings | None = None,
    num_simulations: int = 20,
    num_samples: int = 99,
    seed: int = 0,
    progress: bool = True,
) -> xr.Dataset:
    r"""Where the truth lies among the draws of the posterior, on simulated data.

    If the posterior is exact and the truth was drawn from the model, the rank of a true number among ``L`` draws is
    uniform on ``0 ... L``, and a central interval of level ``p`` holds the truth with probability ``p``. Ranks that
    pile up at both ends: the posterior is too narrow; in the middle: too wide; on one side: biased.

    What is simulated, with the parameters of the fit (global sites are drawn from its posterior of them, too):

    - by default new recordings: an embedding from its prior for each recording and simulation, paths and observations
      from the model; the embedding is inferred from the simulated trials. This is what the theorem is about;
    - with ``new_recordings=False`` new trials of the recordings trained on: embeddings are drawn from the fit's own
      posterior of them. It tells how good the posterior of latents and rates is where the fit has been trained (that of
      the embedding is right by construction, and left out);
    - with ``simulate`` the world: what a wrong model and parameters that were estimated do to the intervals, too.

    Args:
        fit: a fit.
        simulate: from a seed to recordings that the fit knows, with their ``truth``: any of ``rates (trial, time,
            neuron)``, ``latents (trial, time, latent_dim)`` and ``embedding (embedding_dim,)``; None simulates from the
            model.
        like: with the model's own simulations, the trials, bins, missing values and inputs that they are to have; None
            is 32 complete trials of 50 bins. An embedding is inferred from trials of some number and length: give the
            training data to be told of these. A model that reads inputs or conditions needs it.
        new_recordings: whether embeddings are inferred from the simulated trials; False takes those of training.
        align: with ``simulate``, trials with true latents, best those of training: by them the latents of each
            recording are mapped to the truth (least squares, affine). Without it latents are not compared, since the
            fit's are in coordinates of its own.
        num_simulations: how often to simulate; ``simulate`` gets the seeds ``seed, seed + 1, ...``.
        num_samples: draws of each posterior, 19, 39, ...: one less than a multiple of 20, so that intervals are exact.
        seed: of everything random.
        progress: show a progress bar.

    Returns:
        a Dataset over ``simulation``, ``recording``, ``trial`` and ``level`` (0.5, 0.9). For every quantity with a
        truth: ``<quantity>_rank``, for latents and rates in one random bin (and neuron) of every trial, since bins are
        not independent; ``<quantity>_covered``, the share of a trial's bins whose interval holds the truth.
        ``coverage`` and ``coverage_se (quantity, level)``: their means and Monte Carlo standard errors, over trials, or
        over recordings of a simulation where these have embeddings of their own. ``khat``: the Pareto shape of the
        importance weights of every trial; above 0.7 the guide misses too much of the posterior for weights to mend
        (infinite for fewer than 25 draws, which have no tail to tell it by).

    Raises:
        ValueError: ``num_samples + 1`` not a multiple of 20, recordings without any truth or that the fit does not
            know, a simulation none of which stays finite, arguments that only the other kind of simulation takes.

    Reference: Talts et al., Validating Bayesian inference algorithms with simulation-based calibration
    (arXiv:1804.06788); Vehtari et al., Pareto smoothed importance sampling (JMLR 2024).

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> found = pm.calibration(fit, like=recs, num_simulations=2, num_samples=19, progress=False)
        >>> dict(found["coverage"].sizes), dict(found["latents_rank"].sizes)["trial"]
        ({'quantity': 3, 'level': 2}, 8)
    """
    check_fit(fit)
    checks.integers(num_simulations=num_simulations)
    if num_samples < STEP - 1 or (num_samples + 1) % STEP:
        raise ValueError(
            f"calibration: needed num_samples = {STEP - 1}, {2 * STEP - 1}, ... (whole tails of intervals), got "
            f"{num_samples}"
        )
    if (simulate is not None and like is not None) or (simulate is None and align is not None):
        raise ValueError(
            "calibration: needed `like` without `simulate` (whose recordings are as it makes them) and `align` with it "
            "(the model's own latents are in the fit's coordinates)"
        )
    like = _blank(fit) if like is None else like
    maps = {} if align is None else {name: _map(fit, align, name) for name in align}
    used = _forgetting(fit) if new_recordings else fit
    parts, lost = [], []
    for number in tqdm(range(num_simulations), disable=not progress, desc="calibration", dynamic_ncols=True):
        if simulate is None:
            recs, gone = simulated(fit, like, seed + number, new_recordings)
            lost += [f"{name!r} (seed {seed + number})" for name in gone]
        else:
            recs = simulate(seed + number)
        of_recordings = []
        for name in recs:
            truth = _truth(recs, name, simulate is None, new_recordings, maps)
            of_recordings.append(_placed(used, recs, name, truth, maps.get(name), num_samples, seed + number))
        parts.append(xr.concat(of_recordings, xr.Variable("recording", list(recs)), join="outer"))
    if lost:
        warnings.warn(
            f"calibration: {len(lost)} of {num_simulations * len(like)} simulated recordings left the finite numbers, "
            f"at embeddings where the dynamics were not trained, and are left out: {checks.some(lost)}; see "
            "new_recordings=False",
            stacklevel=2,
        )
    result = xr.concat(parts, xr.Variable("simulation", np.arange(num_simulations)), join="outer")
    # Where simulations differ in their recordings, xarray has sorted them.
    result = result.sel(recording=[name for name in fit.names if name in result["recording"]])
    result = result.merge(_coverage(result, new_recordings))
    result.attrs = {"num_samples": num_samples, "seed": seed, "new_recordings": int(new_recordings)}
    return result


def simulated(
    fit: Fit, like: Recordings, seed: int, new_recordings: bool = True
) -> tuple[Recordings, list[str]]:
    """Recordings drawn from the model of a fit, in the shape of others.

    Args:
        fit: the fit.
        like: what has their trials, bins, missing values and inputs.
        seed: of the draw.
        new_recordings: draw embeddings from the prior; False from the fit's posterior.

    Returns:
        the recordings with ``truth``: ``embedding``, ``latents`` and ``rates``; and the names of those that left the
        finite numbers, which are not among them.

    Raises:
        ValueError: none that stays finite.
    """
    batch = like.batch(fit.names, dtype=fit.dtype, device=fit.device)
    # Not from the seed that the posterior takes for its draws: the truth would be one of them.
    known = {key: drawn[0, 0, 0] for key, drawn in global_draws(fit, 1, ~seed).items()}
    # What is not finite is told below.
    with machine.random_forked(fit.device), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        if not new_recordings:  # every latent site but the paths: what the training data have told of
            given = dataclasses.replace(batch, embedding_statistics=fit.statistics[batch.recording])
            nodes = poutine.trace(poutine.condition(fit.guide, data=known)).get_trace(given).nodes.items()
            known = {key: of["value"] for key, of in nodes if of["type"] == "sample" and key != "latents"}
            known = {key: value for key, value in known.items() if key not in ("recording", "trial")}
        sites = poutine.trace(poutine.condition(fit.model, data=known)).get_trace(batch).nodes
        with fit.model.given(known):
            drawn = observations_of(fit.model, sites["latents"]["value"], batch)
    e, z, y, mean = (x.cpu().numpy() for x in (sites["embedding"]["value"], *drawn))
    recordings, truth = [], {}
    for row, (name, recording) in enumerate(like.items()):
        trials, bins, neurons = recording.values.shape
        where = (row, slice(trials), slice(min(bins, batch.num_bins)))
        exists = np.arange(bins)[None, :, None] < recording.lengths[:, None, None]
        with np.errstate(over="ignore"):
            values, states, expected = (
                np.where(exists, _padded(x[where][..., :dim], bins), np.nan).astype(np.float32)
                for x, dim in ((y, neurons), (z, None), (mean, neurons))
            )
        if not np.isfinite(values[recording.mask]).all():
            continue
        recordings.append(_as(recording, np.where(recording.mask, values, np.nan)))
        dims = ("trial", "time")
        paths = {"latents": ((*dims, "latent_dim"), states), "rates": ((*dims, "neuron"), expected)}
        truth[name] = xr.Dataset({"embedding": (("embedding_dim",), e[row, 0]), **paths})
    if not recordings:
        raise ValueError(
            f"calibration: all of the model's own simulations (seed {seed}) left the finite numbers, at embeddings of "
            f"{np.round(e[:, 0], 2).tolist()}; see new_recordings=False"
        )
    return Recordings(recordings, truth=truth), [name for name in like if name not in truth]


# ---- parts -----------------------------------------------------------------------------------------------


def _blank(fit: Fit) -> Recordings:
    width, neurons = fit.attrs.get("bin_width", 0.02), fit.model.neurons
    return Recordings(
        Recording(name, np.zeros((*SIMULATED, number)), bin_width=width)
        for name, number in zip(neurons.names, neurons.num_neurons, strict=True)
    )


def _forgetting(fit: Fit) -> Fit:
    """The fit as if it had not seen its recordings, so that their embeddings are inferred from the trials given."""
    if not isinstance(fit.guide, AmortizedGuide):
        return fit
    return dataclasses.replace(fit, statistics=torch.full_like(fit.statistics, torch.nan))


def _as(recording: Recording, values: np.ndarray) -> Recording:
    """Other observations of the same trials."""
    return Recording(
        recording.name,
        values,
        bin_width=recording.bin_width,
        lengths=recording.lengths,
        inputs=recording.inputs,
        condition=recording.condition,
        neuron_ids=recording.neuron_ids,
        held_out_neurons=recording.held_out_neurons,
        attrs=recording.attrs,
    )


def _padded(x: np.ndarray, bins: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (0, bins - x.shape[1]), (0, 0)))


def _map(fit: Fit, recs: Recordings, name: str) -> Callable[[np.ndarray], np.ndarray]:
    return align_to_truth(posterior(fit, recs.select([name]), num_samples=DRAWS), name).to_truth


def _truth(
    recs: Recordings, name: str, own: bool, new_recordings: bool, maps: Mapping
) -> dict[str, np.ndarray]:
    """What is known of a recording, of what can be compared with the fit's."""
    known = recs.truth.get(name, xr.Dataset())
    found = {key: known[key].values for key in QUANTITIES if key in known}
    if own and not new_recordings:
        del found["embedding"]
    if not own and name not in maps:
        found.pop("latents", None)
    if not found:
        raise ValueError(
            f"calibration: needed the truth of recording {name!r} (rates, embedding; latents with `align`), got "
            f"{sorted(map(str, known))}; pass Recordings(..., truth={{name: xarray.Dataset}})"
        )
    return found


def _placed(
    fit: Fit,
    recs: Recordings,
    name: str,
    truth: Mapping[str, np.ndarray],
    to_truth: Callable[[np.ndarray], np.ndarray] | None,
    num_samples: int,
    seed: int,
) -> xr.Dataset:
    """Ranks, coverage and Pareto shapes of one recording."""
    recs = recs.select([name])
    tree = posterior(fit, recs, num_samples=num_samples, seed=seed)
    draws = {key: tree[f"{name}/posterior"][key].to_numpy()[0] for key in ("latents", "rates")}
    if "embedding" in truth:
        draws["embedding"] = tree["posterior"]["embedding"].to_numpy()[0, :, 0]
    if to_truth is not None:
        draws["latents"] = to_truth(draws["latents"])
    rng = np.random.default_rng([seed, fit.names.index(name)])
    found: dict[str, tuple] = {}
    for key, true in truth.items():
        ranks = rank(draws[key], true)
        inside = covered(ranks, num_samples)
        if key == "embedding":
            found["embedding_rank"] = (("embedding_dim",), ranks)
            found["embedding_covered"] = (("level",), inside.mean(0))
            continue
        found[f"{key}_covered"] = (("trial", "level"), _mean(inside))
        one = np.stack([_one_bin(trial, rng) for trial in ranks])
        if key == "latents":
            found["latents_rank"] = (("trial", "latent_dim"), one)
        else:
            found["rates_rank"] = (
                ("trial",),
                one[np.arange(len(one)), rng.integers(one.shape[1], size=len(one))],
            )
    found["khat"] = (("trial",), posterior_scores(fit, recs, name, num_samples, seed)["khat"])
    return xr.Dataset(found, {"level": list(LEVELS), "trial": np.arange(recs[name].num_trials)})


def rank(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """How many of the draws ``(draw, ...)`` lie below the truth ``(...)``; NaN where either is missing."""
    truth = truth.astype(draws.dtype)  # what has been rounded is compared with what has been rounded
    return np.where(np.isnan(draws).any(0) | np.isnan(truth), np.nan, (draws < truth).sum(0))


def covered(ranks: np.ndarray, num_samples: int) -> np.ndarray:
    """Whether the truth lies in the central intervals ``(..., level)``, by its ranks; NaN where these are."""
    tails = np.array([round((1.0 - level) / 2.0 * (num_samples + 1)) for level in LEVELS])
    inside = (ranks[..., None] >= tails) & (ranks[..., None] <= num_samples - tails)
    return np.where(np.isnan(ranks)[..., None], np.nan, inside)


def _mean(inside: np.ndarray) -> np.ndarray:
    """``(trial, time, number, level)`` to the share of what is there, ``(trial, level)``."""
    there = ~np.isnan(inside)
    share = np.where(there, inside, 0.0).sum((1, 2)) / np.maximum(there.sum((1, 2)), 1)
    return np.where(there.any((1, 2)), share, np.nan)


def _one_bin(ranks: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random bin of those ``(time, number)`` that a trial has."""
    there = np.flatnonzero(~np.isnan(ranks).any(1))
    return ranks[rng.choice(there)] if len(there) else np.full(ranks.shape[1], np.nan)


def _coverage(result: xr.Dataset, new_recordings: bool) -> xr.Dataset:
    """Means over what is independent, and their standard errors."""
    keys = [key for key in QUANTITIES if f"{key}_covered" in result]
    mean, error = np.empty((2, len(keys), len(LEVELS)))
    for row, key in enumerate(keys):
        units = result[f"{key}_covered"].transpose(..., "level")
        if new_recordings and "trial" in units.dims:
            units = units.mean("trial")
        values = units.values.reshape(-1, len(LEVELS))
        values = values[~np.isnan(values).any(1)]
        mean[row] = values.mean(0)
        error[row] = values.std(0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.nan
    dims = ("quantity", "level")
    return xr.Dataset({"coverage": (dims, mean), "coverage_se": (dims, error)}, {"quantity": keys})
