"""Scores on arrays (public in `pyro_metassm.metrics`): explained variance, bits per spike, decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from pyro_metassm._smoothing import averaged

ALPHAS = tuple(np.logspace(-4, 0, 9))  # the Neural Latents Benchmark's grid of ridge penalties
FOLDS = 5


def r2(truth: Any, prediction: Any) -> float:
    r"""Share of the variance explained, pooled over everything: ``1 - SSE / SST``.

    ``SST`` is around each neuron's own mean over all other axes, so that 0 is the best constant prediction; a
    neuron counts by its variance.

    Args:
        truth: ``(..., neuron)``, array or DataArray; NaN is ignored.
        prediction: of the same shape (a DataArray: of the same dims, in any order).

    Returns:
        the score, at most 1; NaN if the truth does not vary.

    Raises:
        ValueError: other shapes or dims, fewer than two axes, no prediction (NaN) where there is a truth.

    Example:
        >>> truth = np.array([[0.0, 5.0], [2.0, 5.0], [4.0, np.nan]])
        >>> r2(truth, truth + 1.0)  # SSE = 5 and SST = 8
        0.375
    """
    y, x = _pair("r2", "truth", truth, "prediction", prediction)
    return explained(y, x, tuple(range(y.ndim - 1)))


def bits_per_spike(rates: Any, spikes: Any, null_rates: Any = None) -> float:
    r"""Poisson log-likelihood gained over constant rates, in bits per spike (the Neural Latents Benchmark's).

    ``sum[(y log r - r) - (y log r0 - r0)] / (ln 2 sum y)``; the constant ``-log y!`` cancels.

    Args:
        rates: expected counts per bin ``(..., neuron)``.
        spikes: counts ``(..., neuron)``; NaN is ignored.
        null_rates: expected counts per bin of the null model, ``(neuron,)`` or any shape that broadcasts;
            default each neuron's mean over the spikes given, as in the benchmark.

    Returns:
        the score; NaN without spikes.

    Raises:
        ValueError: other shapes, negative or fractional counts, a negative rate, or one of 0 where there are
            spikes.

    Reference: Pei et al., Neural Latents Benchmark '21 (NeurIPS 2021).

    Example:
        >>> bits_per_spike(np.array([[2.0], [0.0]]), np.array([[2], [0]]))  # knows which of two bins fires
        1.0
    """
    y, r = _pair("bits_per_spike", "spikes", spikes, "rates", rates)
    seen = ~np.isnan(y)
    if not are_counts(y):
        raise ValueError(
            "bits_per_spike: needed counts (0, 1, 2, ...) as spikes, got other numbers; pass unsmoothed counts"
        )
    if null_rates is None:
        null = _mean(y, tuple(range(y.ndim - 1)))
    else:
        null = np.asarray(null_rates, np.float64)
    try:
        null = np.broadcast_to(null, y.shape)
    except ValueError:
        raise ValueError(
            f"bits_per_spike: needed null_rates (neuron,) = ({y.shape[-1]},), got shape {null.shape}"
        ) from None
    gain = poisson(y[seen], r[seen], "rates") - poisson(y[seen], null[seen], "null_rates")
    count = y[seen].sum()
    return float(gain / (count * np.log(2.0))) if count else float("nan")


def spike_information(rates: np.ndarray, spikes: np.ndarray) -> np.ndarray:
    """What :func:`bits_per_spike` gains over each neuron's mean rate, of every trial ``(trial,)``, in nats.

    Args:
        rates: expected counts per bin ``(trial, time, neuron)``; whatever they are where nothing was observed.
        spikes: counts, NaN where nothing was observed.
    """
    null = np.broadcast_to(_mean(spikes, (0, 1)), spikes.shape)
    gains = np.zeros(len(spikes))
    for trial, (y, r, r0) in enumerate(zip(spikes, rates, null, strict=True)):
        seen = ~np.isnan(y)
        gains[trial] = poisson(y[seen], r[seen], "rates") - poisson(y[seen], r0[seen], "null_rates")
    return gains


def gained(rates: np.ndarray, spikes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:func:`spike_information` and the number of spikes, of every trial: what :func:`ratio` takes."""
    return spike_information(rates, spikes), np.nansum(spikes, (1, 2))


def ratio(parts: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """``sum parts / sum sizes`` over trials and its standard error, by the delta method; NaN of what has no size."""
    total = sizes.sum()
    if not total > 0:
        return float("nan"), float("nan")
    value = parts.sum() / total
    spread = np.var(parts - value * sizes, ddof=1) if len(parts) > 1 else np.nan
    return float(value), float(np.sqrt(len(parts) * spread) / total)


def velocity_r2(
    train_rates: Any,
    train_velocity: Any,
    test_rates: Any,
    test_velocity: Any,
    *,
    alphas: Sequence[float] = ALPHAS,
) -> float:
    r"""Velocity of the hand decoded from rates by ridge regression (the Neural Latents Benchmark's `vel R2`).

    Bins are samples. The penalty is chosen from ``alphas`` by 5-fold cross-validation on the training samples
    (folds in their order), the decoder refitted on all of them, and scored on the test samples by R2,
    averaged over the dims of the velocity.

    Args:
        train_rates: ``(..., neuron)``; test_rates likewise.
        train_velocity: ``(..., dims)`` with the leading axes of its rates; test_velocity likewise. Bins with
            NaN in rates or velocity are left out.
        alphas: ridge penalties to choose from.

    Returns:
        the score on the test samples.

    Raises:
        ValueError: shapes that do not fit, fewer than 10 training samples, no test sample.

    Example:
        >>> rates = np.random.default_rng(0).normal(size=(20, 30, 8))
        >>> velocity = rates[..., :2] - rates[..., 2:4]
        >>> round(velocity_r2(rates[:15], velocity[:15], rates[15:], velocity[15:]), 3)
        1.0
    """
    x, _ = _samples("train", train_rates, train_velocity)
    x_test, y_test = _samples("test", test_rates, test_velocity)
    dims = np.shape(train_velocity)[-1]
    if x.shape[1] != x_test.shape[1] or dims != y_test.shape[1]:
        raise ValueError(
            "velocity_r2: needed the same neurons and dims to train and to test, got "
            f"{x.shape[1]} and {x_test.shape[1]} neurons, {dims} and {y_test.shape[1]} dims"
        )
    if len(x) < 2 * FOLDS or not len(x_test):
        raise ValueError(
            f"velocity_r2: needed {2 * FOLDS} training samples and a test sample with rates and velocity, "
            f"got {len(x)} and {len(x_test)}"
        )
    return mean_r2(y_test, velocity_decoder(train_rates, train_velocity, alphas=alphas)(x_test))


def velocity_decoder(
    rates: Any, velocity: Any, *, alphas: Sequence[float] = ALPHAS
) -> Callable[[np.ndarray], np.ndarray]:
    """The decoder of :func:`velocity_r2`: a function of rates ``(..., neuron)`` that gives ``(..., dims)``.

    Args:
        rates: ``(..., neuron)``.
        velocity: ``(..., dims)`` with the leading axes of the rates; bins with NaN in either are left out.
        alphas: ridge penalties to choose from, by 5-fold cross-validation over the samples in their order.

    Raises:
        ValueError: shapes that do not fit, fewer than 10 samples.

    Example:
        >>> rates = np.random.default_rng(0).normal(size=(20, 30, 8))
        >>> decode = velocity_decoder(rates, rates[..., :2] + 1.0)
        >>> bool(np.allclose(decode(rates[0]), rates[0, :, :2] + 1.0, atol=1e-3))
        True
    """
    x, y = _samples("train", rates, velocity)
    if len(x) < 2 * FOLDS:
        raise ValueError(f"velocity_decoder: needed {2 * FOLDS} training samples, got {len(x)}")
    scores = np.zeros(len(alphas))
    for fold in np.array_split(np.arange(len(x)), FOLDS):
        rest = np.setdiff1d(np.arange(len(x)), fold)
        scores += [mean_r2(y[fold], predict(x[fold])) for predict in ridge(x[rest], y[rest], alphas)]
    (predict,) = ridge(x, y, [alphas[int(np.argmax(scores))]])
    return predict


def psth_r2(
    rates: Any,
    spikes: Any,
    condition: Any,
    *,
    spikes_condition: Any = None,
    smoothing_sd: float = 0.0,
    jitter: Any = None,
) -> float:
    r"""Match of condition-averaged rates with peri-stimulus time histograms (the Neural Latents Benchmark's
    `psth R2`).

    Rates and (smoothed) spikes are averaged over the trials of a condition; R2 is over conditions and bins
    together, averaged over the neurons.

    Args:
        rates: ``(trial, time, neuron)``, per bin; NaN is ignored.
        spikes: ``(trial, time, neuron)``, per bin; NaN is ignored. They may be of other, or more, trials than
            the rates.
        condition: ``(trial,)``, of every trial of ``rates``.
        spikes_condition: ``(trial,)``, of every trial of ``spikes``; default ``condition``.
        smoothing_sd: sd of the Gaussian that smooths the spikes of each trial, in bins. The benchmark smooths
            with 70 ms (mc_maze), before cutting the trials.
        jitter: ``(trial,)`` integers: bins by which each trial of ``rates`` is moved later (earlier where negative)
            before the averages, where the benchmark has cut its test trials with a jitter; bins that come in are
            missing. Default: none.

    Returns:
        the score. Neurons whose histograms do not vary are left out.

    Raises:
        ValueError: shapes that do not fit, no condition in common.

    Example:
        >>> spikes = np.random.default_rng(0).poisson(3.0, (6, 10, 2))
        >>> means = np.stack([spikes[:3].mean(0), spikes[3:].mean(0)])
        >>> psth_r2(means.repeat(3, axis=0), spikes, [0, 0, 0, 1, 1, 1])
        1.0
    """
    x, y = (np.asarray(array, np.float64) for array in (rates, spikes))
    of_x = np.asarray(condition)
    of_y = of_x if spikes_condition is None else np.asarray(spikes_condition)
    if (
        x.ndim != 3
        or y.ndim != 3
        or x.shape[1:] != y.shape[1:]
        or of_x.shape != x.shape[:1]
        or of_y.shape != y.shape[:1]
    ):
        raise ValueError(
            "psth_r2: needed rates and spikes (trial, time, neuron) of the same bins and neurons and a condition "
            f"for each trial, got {x.shape} and {y.shape} with {of_x.shape} and {of_y.shape} conditions"
        )
    common = np.intersect1d(of_x, of_y)
    if not len(common):
        raise ValueError(
            f"psth_r2: needed conditions in common, got {np.unique(of_x)} of rates, {np.unique(of_y)} of spikes"
        )
    y = smooth(y, smoothing_sd)
    if jitter is not None:
        shifts = np.asarray(jitter)
        if shifts.shape != of_x.shape or shifts.dtype.kind not in "iu":
            raise ValueError(
                f"psth_r2: needed jitter as integers {of_x.shape}, got {shifts.dtype} {shifts.shape}"
            )
        x = np.stack([_shifted(trial, int(by)) for trial, by in zip(x, shifts, strict=True)])
    predicted = np.concatenate([_mean(x[of_x == c], (0,))[0] for c in common])
    true = np.concatenate([_mean(y[of_y == c], (0,))[0] for c in common])
    seen = ~np.isnan(true) & ~np.isnan(predicted)
    return mean_r2(np.where(seen, true, np.nan), np.where(seen, predicted, 0.0))


def _pair(function: str, first: str, a: Any, second: str, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 arrays of one shape ``(..., neuron)``; the second is there wherever the first is."""
    if isinstance(a, xr.DataArray) and isinstance(b, xr.DataArray):
        if set(a.dims) != set(b.dims):
            raise ValueError(
                f"{function}: needed the same dims, got {a.dims} as {first} and {b.dims} as {second}; take the "
                'mean over draws first: .mean(("chain", "draw"))'
            )
        b = b.transpose(*a.dims)
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if x.shape != y.shape or x.ndim < 2:
        raise ValueError(
            f"{function}: needed {first} and {second} of one shape (..., neuron) with two or more axes, "
            f"got {x.shape} and {y.shape}"
        )
    lacking = int((np.isnan(y) & ~np.isnan(x)).sum())
    if lacking:
        raise ValueError(
            f"{function}: needed {second} wherever there is {first}, got NaN for {lacking} of {x.size} values"
        )
    return x, y


def _mean(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Mean over the axes (kept), ignoring NaN; NaN where there is nothing else, without numpy's warning."""
    count = (~np.isnan(values)).sum(axes, keepdims=True)
    total = np.nansum(values, axes, keepdims=True)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def explained(y: np.ndarray, prediction: np.ndarray, axes: tuple[int, ...]) -> float:
    """``1 - SSE / SST``, SST around the means over ``axes``; NaN if nothing varies."""
    total = np.nansum((y - _mean(y, axes)) ** 2)
    return float(1.0 - np.nansum((y - prediction) ** 2) / total) if total > 0 else float("nan")


def mean_r2(y: np.ndarray, prediction: np.ndarray) -> float:
    """Mean over the columns that vary of their R2."""
    each = np.array([explained(y[:, [d]], prediction[:, [d]], (0,)) for d in range(y.shape[1])])
    return float(each[~np.isnan(each)].mean()) if (~np.isnan(each)).any() else float("nan")


def are_counts(y: np.ndarray) -> bool:
    """Whether all that is not NaN is a whole number of at least zero."""
    seen = y[~np.isnan(y)]
    return bool((seen >= 0).all() and (seen == np.floor(seen)).all())


def poisson(y: np.ndarray, rates: np.ndarray, what: str) -> float:
    """Poisson log-likelihood without ``log y!``."""
    bad = (rates < 0) | ((rates == 0) & (y > 0)) | ~np.isfinite(rates)
    if bad.any():
        raise ValueError(
            f"bits_per_spike: needed finite {what} of at least 0, and above 0 where there are spikes, got "
            f"{bad.sum()} others of {bad.size}; rates are expected counts per bin of a count likelihood"
        )
    return float(np.sum(y * np.log(np.where(y > 0, rates, 1.0)) - rates))


def _samples(which: str, rates: Any, velocity: Any) -> tuple[np.ndarray, np.ndarray]:
    """Bins as samples: ``(sample, neuron)`` and ``(sample, dims)`` where both are known."""
    x, y = (np.asarray(array, np.float64) for array in (rates, velocity))
    if x.ndim < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"velocity_r2: needed {which}_rates (..., neuron) and {which}_velocity (..., dims) with the same "
            f"leading axes, got {x.shape} and {y.shape}"
        )
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    known = ~(np.isnan(x).any(1) | np.isnan(y).any(1))
    return x[known], y[known]


def ridge(x: np.ndarray, y: np.ndarray, alphas: Sequence[float]) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Minimisers of ``|y - x w - b|^2 + alpha |w|^2``, one for each alpha, from one decomposition."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    values, vectors = np.linalg.eigh((x - mean_x).T @ (x - mean_x))
    projected = vectors.T @ ((x - mean_x).T @ (y - mean_y))

    def minimiser(alpha: float) -> Callable[[np.ndarray], np.ndarray]:
        weights = vectors @ (projected / (values.clip(min=0) + alpha)[:, None])
        return lambda new: (new - mean_x) @ weights + mean_y

    return [minimiser(alpha) for alpha in alphas]


def smooth(values: np.ndarray, sd: float) -> np.ndarray:
    """Gaussian smoothing along time ``(trial, time, neuron)``; NaN stays NaN and does not spread."""
    if sd <= 0:
        return values
    time = np.arange(values.shape[1])
    kernel = np.exp(-0.5 * ((time[:, None] - time) / sd) ** 2)
    seen = ~np.isnan(values)
    return np.where(seen, averaged(values, seen, kernel), np.nan)


def _shifted(trial: np.ndarray, by: int) -> np.ndarray:
    """A trial ``(time, neuron)`` some bins later, NaN in the bins that come in."""
    moved = np.full_like(trial, np.nan)
    size = max(len(trial) - abs(by), 0)
    moved[max(by, 0) : max(by, 0) + size] = trial[max(-by, 0) : max(-by, 0) + size]
    return moved
