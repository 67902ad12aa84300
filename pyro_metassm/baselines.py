"""What a score is worth: simple predictions from training trials, beside those of a fit.

Each of the first four takes one recording's training and test trials and gives expected counts (or values) per bin,
``(trial, time, neuron)``; :func:`table` scores them beside a fit, :func:`single_recording` fits each recording alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from pyro_metassm import _checks as checks
from pyro_metassm import _machine as machine
from pyro_metassm._by_recording import named
from pyro_metassm._mean_rates import mean_forecasts, mean_rates
from pyro_metassm._scored_neurons import constant_rates, spiking_neurons
from pyro_metassm._scores import are_counts, bits_per_spike, mean_r2, psth_r2, ridge, velocity_decoder
from pyro_metassm._smoothing import averaged
from pyro_metassm.draws import forecast_trials
from pyro_metassm.rebuilding import construct
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.result import Fit, check_fit
from pyro_metassm.trainer import NonFiniteLossError
from pyro_metassm.training import fit as train_fit

SDS = (0.5, 1.0, 2.0, 4.0, 8.0)  # bins
PENALTIES = tuple(np.logspace(0, 5, 6))
SHARES = tuple(np.linspace(0.0, 1.0, 11))
LEAST = 0.1  # of its mean rate: no neuron is predicted to be silent
FOLDS = 3
COLUMNS = ("model", "mean rate", "psth", "smoothing", "persistence")


def mean_rate(train: Recording, test: Recording) -> np.ndarray:
    """Every neuron's mean over the training trials (of counts at least half a spike in all).

    Example:
        >>> from pyro_metassm import Recording
        >>> train = Recording("a", np.array([[[1.0], [3.0]]]), bin_width=0.02)
        >>> mean_rate(train, train).ravel()
        array([2., 2.])
    """
    return np.broadcast_to(_mean(train), test.values.shape).copy()


def psth(train: Recording, test: Recording) -> np.ndarray:
    """Mean over the training trials of the same condition, bin by bin: the peri-stimulus time histogram.

    One more trial at the neuron's mean rate is counted with those of the condition, so that few trials are not taken at
    their word. Without conditions all trials are of one; one that training lacks is predicted from all of them.

    Example:
        >>> from pyro_metassm import Recording
        >>> train = Recording("a", np.array([[[1.0], [3.0]]]), bin_width=0.02)
        >>> psth(train, train).ravel()  # (1 + 2) / 2 and (3 + 2) / 2
        array([1.5, 2.5])
    """
    total = _mean(train)
    result = np.empty(test.values.shape)
    conditions = np.zeros(test.num_trials) if test.condition is None else test.condition
    known = train.condition
    if known is None or test.condition is None:
        known = np.zeros(train.num_trials)
    for condition in np.unique(conditions):
        rows = known == condition if (known == condition).any() else np.ones(len(known), bool)
        count = _cut(train.mask[rows].sum(0), test.num_bins)
        counts = _cut(train.values[rows].sum(0, dtype=np.float64), test.num_bins)
        result[conditions == condition] = (counts + total) / (count + 1)
    return result


def smoothing(train: Recording, test: Recording) -> np.ndarray:
    """Observations smoothed by a Gaussian along time; held-out neurons by ridge regression on the smoothed others.

    The width is the one by which a bin is predicted best from the others of its trial (each neuron from itself); with
    held-out neurons, width and penalty are those that predict them best in 3-fold cross-validation over the
    training trials. No neuron is predicted below a tenth of its mean rate. A bin's own count enters its smoothed rate:
    bits per spike of neurons that are not held out mean nothing here.

    Example:
        >>> from pyro_metassm import Recording
        >>> train = Recording("a", np.full((4, 6, 2), 3.0), bin_width=0.02)
        >>> smoothing(train, train)[0, 0]
        array([3., 3.])
    """
    held_out = train.held_out_neurons
    if not held_out.any():
        width = max(SDS, key=lambda sd: _fit_of(_without_itself(train, sd), train.observations, _mean(train)))
        return _floor(_smoothed(test, width), train)
    trials = np.arange(train.num_trials)
    gains: dict[tuple[float, float], float] = {}
    for sd in SDS:
        smoothed = _smoothed(train, sd)
        for fold in np.array_split(trials, min(FOLDS, len(trials))):
            rest = np.setdiff1d(trials, fold) if len(fold) < len(trials) else trials
            predicted = _regressed(train, rest, smoothed, smoothed[fold])
            y, mean = train.observations[fold][..., held_out], _mean(train)[held_out]
            for penalty, rates in zip(PENALTIES, predicted, strict=True):
                gains[sd, penalty] = gains.get((sd, penalty), 0.0) + _fit_of(rates, y, mean)
    width, penalty = max(gains, key=gains.__getitem__)
    result = _smoothed(test, width)
    result[..., held_out] = _regressed(train, trials, _smoothed(train, width), result, [penalty])[0]
    return _floor(result, train)


def persistence(train: Recording, test: Recording, *, context: int, horizon: int) -> np.ndarray:
    """The level at the end of the context lasts: ``mean + share (smoothed - mean)``, ``(trial, horizon, neuron)``.

    The Gaussian looks back only; its width and the share are those that forecast the training trials best, whose
    future they do not see.

    Example:
        >>> from pyro_metassm import Recording
        >>> train = Recording("a", np.full((4, 6, 2), 3.0), bin_width=0.02)
        >>> persistence(train, train, context=4, horizon=2)[0]
        array([[3., 3.],
               [3., 3.]])
    """
    rows = np.flatnonzero(train.lengths > context)
    mean, best = _mean(train), (-np.inf, SDS[0], 0.0)
    y = train.observations[rows, context : context + horizon]
    for sd in SDS if len(rows) else ():
        last = _last(train, context, sd)[rows][:, None]
        for share in SHARES:
            ahead = np.broadcast_to(np.maximum(mean + share * (last - mean), LEAST * np.abs(mean)), y.shape)
            best = max(best, (_fit_of(ahead, y, mean), sd, share))
    _, sd, share = best
    ahead = mean + share * (_last(test, context, sd)[:, None] - mean)
    return np.repeat(_floor(ahead, train), horizon, axis=1)


def single_recording(
    fit: Fit,
    recs: Recordings,
    *,
    num_steps: int = 300,
    warm_start_steps: int = 500,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> dict[str, Fit]:
    """The same model for every recording alone: of the classes and sizes of ``fit``, shared dynamics (rank 0).

    Args:
        fit: whose sizes and device are taken.
        recs: trials to fit, each recording by itself.
        num_steps, warm_start_steps, seed, progress, options: of :func:`pyro_metassm.fit`.

    Returns:
        a fit for each recording, by name; the last good one where as little data does not suffice for more.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> alone = pm.baselines.single_recording(fit, recs, num_steps=5, warm_start_steps=5)
        >>> alone["w=5"].names
        ('w=5',)
    """
    check_fit(fit)
    config = fit.model.config
    found = {}
    for name in recs:
        one = recs.select([name])
        with machine.random_forked():
            torch.manual_seed(seed)
            model = construct(type(fit.model), config | ({"rank": 0} if "rank" in config else {}), one)
            guide = construct(type(fit.guide), fit.guide.config, model)
        steps = {"num_steps": num_steps, "warm_start_steps": warm_start_steps, **options}
        try:
            found[name] = train_fit(
                model, guide, one, seed=seed, device=fit.device, progress=progress, **steps
            )
        except NonFiniteLossError as error:  # as little data as a few trials may do it
            found[name] = error.fit
        if "interrupted_at" in found[name].attrs:
            raise KeyboardInterrupt
    return found


def table(
    fit: Fit,
    train: Recordings,
    test: Recordings,
    *,
    context: int,
    horizon: int,
    others: Mapping[str, Fit | Mapping[str, Fit]] | None = None,
    behavior_dims: Sequence[int] = (0, 1),
    num_samples: int = 50,
    seed: int = 0,
) -> pd.DataFrame:
    r"""The scores of a fit on test trials, and beside each what simple predictions and other fits reach.

    Args:
        fit: a fit that knows the recordings.
        train: the trials that it was fitted to; the simple predictions and the decoders are made from them.
        test: other trials.
        context: bins given to forecasts; test trials that end before are left out, with a warning.
        horizon: bins forecast.
        others: more fits by name, each a fit of all recordings or one for each (:func:`single_recording`).
        behavior_dims: dims of the behaviour that are decoded, where there is any: the velocity by the format of files.
        num_samples: draws behind the means of fits.
        seed: of the draws.

    Returns:
        a row for each ``(score, recording)``, a column for each of ``model``, the ``others``, ``mean rate``, ``psth``,
        ``smoothing`` (not of forecasts) and ``persistence`` (of forecasts). Scores, higher is better: ``co_bps`` of
        held-out neurons, ``fp_bps`` of the bins after ``context`` (both over each neuron's mean in the bins scored, as
        the Neural Latents Benchmark has them), ``velocity_r2`` and ``forecast_velocity_r2`` (decoders learned from the
        same method's rates of the training trials), ``psth_r2`` of recordings with conditions. NaN: not defined (bits
        of what is no count).

    Raises:
        ValueError: an unknown recording, no trial as long as ``context``, others by the name of a
            column or without a fit of a recording, a dim that the behaviour does not have.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20, noise="poisson")
        >>> train, test = recs.split()
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=pm.likelihoods.Poisson)
        >>> fit = pm.fit(model, pm.guides.DKF(model), train, num_steps=5, warm_start_steps=5, progress=False)
        >>> found = pm.baselines.table(fit, train, test, context=10, horizon=5, num_samples=4)
        >>> list(found.columns)
        ['model', 'mean rate', 'psth', 'smoothing', 'persistence']
    """
    checks.integers(context=context, horizon=horizon, num_samples=num_samples)
    columns: dict[str, dict[tuple[str, str], float]] = {}
    _refuse(others or {}, test, behavior_dims)
    fits: dict[str, Fit | Mapping[str, Fit]] = {"model": fit, **(others or {})}
    for name in test:
        trials = forecast_trials(test, name, context)
        spiking = spiking_neurons(fit, test)[name]
        one, seen, window = train[name], test[name], slice(context, context + horizon)
        late = seen.take(trials)
        made: dict[str, _Rates] = {}
        for label, which in fits.items():
            its = which if isinstance(which, Fit) else which[name]
            made[label] = (
                mean_rates(its, train, name, num_samples, seed),
                mean_rates(its, test, name, num_samples, seed),
                mean_forecasts(its, test, name, trials, context, horizon, num_samples, seed),
            )
        for label, predict in (("mean rate", mean_rate), ("psth", psth)):
            made[label] = (predict(one, one), predict(one, seen), predict(one, late)[:, window])
        made["smoothing"] = (smoothing(one, one), smoothing(one, seen), None)
        made["persistence"] = (None, None, persistence(one, late, context=context, horizon=horizon))
        for label, rates in made.items():
            scores = named(name, _scores_of, rates, one, seen, late, window, spiking, behavior_dims)
            columns.setdefault(label, {}).update({(score, name): value for score, value in scores.items()})
    result = pd.DataFrame(columns)
    result.index = pd.MultiIndex.from_tuples(result.index, names=("score", "recording"))
    return result.dropna(how="all").sort_index(level="score", sort_remaining=False)


# Of training trials, test trials, forecasts.
_Rates = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]


def _refuse(others: Mapping[str, Fit | Mapping[str, Fit]], test: Recordings, dims: Sequence[int]) -> None:
    """Raise for what would be found out only after the first scores."""
    if taken := [name for name in others if name in COLUMNS]:
        raise ValueError(f"table: needed other names of fits than {', '.join(COLUMNS)}, got {taken[0]!r}")
    for label, which in others.items():
        if not isinstance(which, Fit) and (missing := [name for name in test if name not in which]):
            raise ValueError(
                f"table: needed a fit of every recording, got none of {missing[0]!r} in {label!r}"
            )
    for name, recording in test.items():
        size = 0 if recording.behavior is None else recording.behavior.shape[-1]
        if size and not all(-size <= dim < size for dim in dims):
            raise ValueError(f"recording {name!r}: needed behavior_dims below {size}, got {list(dims)}")


def _scores_of(
    rates: _Rates,
    train: Recording,
    test: Recording,
    late: Recording,
    window: slice,
    spiking: np.ndarray,
    dims: Sequence[int],
) -> dict[str, float]:
    """All scores of one method and recording; NaN where it has none."""
    learned, predicted, ahead = rates
    keys = ("co_bps", "fp_bps", "velocity_r2", "forecast_velocity_r2", "psth_r2")
    found = dict.fromkeys(keys, float("nan"))
    held_out = test.held_out_neurons & spiking
    future = late.observations[:, window]
    counts = are_counts(test.observations[..., spiking])
    if counts and predicted is not None and held_out.any():
        found["co_bps"] = bits_per_spike(predicted[..., held_out], test.observations[..., held_out])
    if counts and ahead is not None and spiking.any() and future.size:
        found["fp_bps"] = bits_per_spike(ahead[:, : future.shape[1]][..., spiking], future[..., spiking])
    if test.condition is not None and predicted is not None:
        found["psth_r2"] = psth_r2(predicted, test.observations, test.condition)
    if train.behavior is None or test.behavior is None or late.behavior is None:
        return found
    if learned is None or predicted is None:
        return found
    decode = velocity_decoder(learned, train.behavior[..., dims])
    y = test.behavior[..., dims]
    found["velocity_r2"] = _decoded(decode(predicted), y)
    if ahead is not None and future.size:
        found["forecast_velocity_r2"] = _decoded(
            decode(ahead[:, : future.shape[1]]), late.behavior[:, window][..., dims]
        )
    return found


def _decoded(velocity: np.ndarray, truth: np.ndarray) -> float:
    known = ~(np.isnan(velocity).any(-1) | np.isnan(truth).any(-1))
    return mean_r2(truth[known], velocity[known])


def _mean(train: Recording) -> np.ndarray:
    if train.has_counts:
        return constant_rates(train)
    return train.values.sum((0, 1), dtype=np.float64) / np.maximum(train.mask.sum((0, 1)), 1)


def _cut(values: np.ndarray, bins: int) -> np.ndarray:
    """``(time, neuron)`` with so many bins, zeros where there were none."""
    result = np.zeros((bins, values.shape[1]))
    result[: len(values)] = values[:bins]
    return result


def _floor(rates: np.ndarray, train: Recording) -> np.ndarray:
    return np.maximum(rates, LEAST * _mean(train)) if train.has_counts else rates


def _smoothed(recording: Recording, sd: float) -> np.ndarray:
    """Smoothed observations, a missing one that of the bins around it; NaN past a trial's end."""
    return _filtered(recording, lambda lag: np.exp(-0.5 * (lag / sd) ** 2))


def _without_itself(recording: Recording, sd: float) -> np.ndarray:
    smoothed = _filtered(recording, lambda lag: np.where(lag == 0, 0.0, np.exp(-0.5 * (lag / sd) ** 2)))
    return _floor(smoothed, recording)


def _last(recording: Recording, context: int, sd: float) -> np.ndarray:
    """What a Gaussian that looks back sees at the last bin of the context, ``(trial, neuron)``."""
    back = np.exp(-0.5 * ((np.arange(context) - (context - 1)) / sd) ** 2)
    weight = np.einsum("t,ktn->kn", back, recording.mask[:, :context].astype(np.float64))
    total = np.einsum("t,ktn->kn", back, recording.values[:, :context].astype(np.float64))
    return np.where(weight > 0, total / np.where(weight > 0, weight, 1.0), _mean(recording))


def _filtered(recording: Recording, kernel: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    time = np.arange(recording.num_bins)
    weights = kernel(time[:, None] - time)
    result = averaged(recording.values, recording.mask, weights)
    result = np.where(np.isnan(result), _mean(recording), result)
    result[time >= recording.lengths[:, None]] = np.nan
    return result


def _regressed(
    train: Recording,
    rows: np.ndarray,
    smoothed: np.ndarray,
    new: np.ndarray,
    penalties: Sequence[float] = PENALTIES,
) -> list[np.ndarray]:
    """Held-out neurons of ``new`` from its smoothed others, by a regression on trials ``rows``; for each penalty."""
    held_out = train.held_out_neurons
    x, y = smoothed[rows][..., ~held_out], train.observations[rows][..., held_out]
    known = ~(np.isnan(x).any(-1) | np.isnan(y).any(-1))
    least = LEAST * _mean(train)[held_out]
    counts = train.has_counts
    return [
        np.maximum(rates, least) if counts else rates
        for predict in ridge(x[known], y[known], penalties)
        for rates in [predict(new[..., ~held_out])]
    ]


def _fit_of(rates: np.ndarray, y: np.ndarray, mean: np.ndarray) -> float:
    """How well rates predict: the Poisson log-likelihood of counts over that of the mean, else minus squared error."""
    seen = ~np.isnan(y) & ~np.isnan(rates)
    mean = np.broadcast_to(mean, y.shape)[seen]
    y, rates = y[seen], rates[seen]
    if len(y) and (mean > 0).all() and (rates > 0).all() and (y >= 0).all():
        return float(np.sum(y * np.log(rates / mean) - rates + mean))
    return -float(np.sum((y - rates) ** 2))
