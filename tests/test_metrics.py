"""Scores of arrays and draws against values worked out by hand, closed forms and other implementations."""

import doctest
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
import xarray as xr
from known_scores import crps_of_poisson, mean_r2

from pyro_metassm import _draw_scores, _forecast_scores, _scores, metrics

SIGMAS = 5


# ---- on arrays ----------------------------------------------------------------------------------------------


def test_r2_by_hand():
    truth = np.array([[1.0, 10.0], [3.0, 10.0], [5.0, 40.0]])  # SST = 8 + 600
    prediction = truth + np.array([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])  # SSE = 1 + 4
    assert metrics.r2(truth, prediction) == pytest.approx(1 - 5 / 608)
    assert metrics.r2(truth, truth) == 1.0
    assert metrics.r2(truth, np.broadcast_to(truth.mean(0), truth.shape)) == pytest.approx(0.0, abs=1e-15)
    assert metrics.r2(truth.reshape(3, 1, 2), prediction.reshape(3, 1, 2)) == metrics.r2(truth, prediction)


def test_r2_does_not_mind_units_nor_offsets_of_neurons():
    rng = np.random.default_rng(0)
    truth, offset = rng.normal(size=(4, 6, 3)), rng.normal(size=3)
    prediction = truth + 0.3 * rng.normal(size=truth.shape)
    moved = metrics.r2(7 * truth + offset, 7 * prediction + offset)
    assert moved == pytest.approx(metrics.r2(truth, prediction), abs=1e-12)


def test_r2_ignores_what_is_missing():
    rng = np.random.default_rng(0)
    truth, prediction = rng.normal(size=(2, 20, 3))
    holes = truth.copy()
    holes[5:] = np.nan
    anything = np.where(np.isnan(holes), np.nan, prediction)
    assert metrics.r2(holes, anything) == pytest.approx(metrics.r2(truth[:5], prediction[:5]), abs=1e-12)
    assert math.isnan(metrics.r2(np.ones((4, 2)), np.ones((4, 2))))
    assert math.isnan(metrics.r2(np.full((4, 2), np.nan), np.ones((4, 2))))


def test_r2_goes_by_the_names_of_dims():
    truth = xr.DataArray(np.random.default_rng(0).normal(size=(4, 5, 3)), dims=("trial", "time", "neuron"))
    assert metrics.r2(truth, truth.transpose("neuron", "time", "trial")) == 1.0
    with pytest.raises(ValueError, match="mean over draws"):
        metrics.r2(truth, truth.expand_dims(draw=2))


@pytest.mark.parametrize(
    ("truth", "prediction", "message"),
    [
        (np.ones((4, 3)), np.ones((4, 2)), "one shape"),
        (np.ones(4), np.ones(4), "two or more axes"),
        (np.ones((4, 3)), np.full((4, 3), np.nan), "NaN for 12 of 12"),
    ],
)
def test_r2_refuses(truth, prediction, message):
    with pytest.raises(ValueError, match=message):
        metrics.r2(truth, prediction)


def test_bits_per_spike_by_hand_and_by_torch():
    assert metrics.bits_per_spike(np.array([[4.0], [0.0]]), np.array([[4], [0]])) == 1.0
    rng = np.random.default_rng(0)
    rates = rng.gamma(2.0, size=(5, 7, 3))
    spikes = rng.poisson(rates)
    null = np.broadcast_to(spikes.mean((0, 1)), spikes.shape)

    def log_prob(r):
        return torch.distributions.Poisson(torch.tensor(r)).log_prob(torch.tensor(spikes)).sum().item()

    by_torch = (log_prob(rates) - log_prob(null.copy())) / (spikes.sum() * math.log(2))
    assert metrics.bits_per_spike(rates, spikes) == pytest.approx(by_torch, rel=1e-12)
    assert metrics.bits_per_spike(null, spikes) == pytest.approx(0.0, abs=1e-13)
    assert metrics.bits_per_spike(rates, spikes, spikes.mean((0, 1))) == metrics.bits_per_spike(rates, spikes)


def test_bits_per_spike_of_the_true_rates_is_the_divergence_of_poissons():
    """E[gain] = sum r ln(r / r0) - (r - r0) nats; the score is a ratio of two sums of independent counts."""
    rng = np.random.default_rng(0)
    rates = 2.0 * np.exp(np.sin(np.linspace(0, 20, 4000)))[:, None] * [0.5, 1.0, 2.0]
    null = rates.mean(0)
    expected = (rates * np.log(rates / null)).sum() / (rates.sum() * math.log(2))
    sd = math.sqrt((rates * (np.log2(rates / null) - expected) ** 2).sum()) / rates.sum()  # delta method
    assert expected > 10 * SIGMAS * sd  # the test has power
    score = metrics.bits_per_spike(rates, rng.poisson(rates), null)
    assert score == pytest.approx(expected, abs=SIGMAS * sd)


def test_bits_per_spike_ignores_what_is_missing():
    rng = np.random.default_rng(0)
    rates = rng.gamma(2.0, size=(9, 3))
    spikes = rng.poisson(rates).astype(float)
    holes = spikes.copy()
    holes[4:] = np.nan
    some = np.where(np.isnan(holes), np.nan, rates)
    assert metrics.bits_per_spike(some, holes) == pytest.approx(metrics.bits_per_spike(rates[:4], spikes[:4]))
    assert math.isnan(metrics.bits_per_spike(np.ones((3, 2)), np.zeros((3, 2))))


@pytest.mark.parametrize(
    ("rates", "spikes", "null", "message"),
    [
        (
            np.zeros((2, 1)),
            np.array([[1], [0]]),
            None,
            "rates of at least 0, and above 0 where there are spikes",
        ),
        (-np.ones((2, 1)), np.array([[1], [0]]), None, "2 others of 2"),
        (np.full((2, 1), np.inf), np.array([[1], [0]]), None, "finite rates"),
        (np.ones((2, 1)), np.array([[1], [0]]), [0.0], "null_rates"),
        (np.ones((2, 1)), np.array([[1], [0]]), [1.0, 2.0], r"\(neuron,\) = \(1,\)"),
        (np.ones((2, 1)), np.array([[0.5], [0]]), None, "counts"),
        (np.ones((2, 1)), np.array([[-1], [0]]), None, "counts"),
        (np.ones((2, 2)), np.ones((2, 1)), None, "one shape"),
    ],
)
def test_bits_per_spike_refuses(rates, spikes, null, message):
    with pytest.raises(ValueError, match=message):
        metrics.bits_per_spike(rates, spikes, null)


def ridge(x, y, alpha):
    """Ridge regression as ordinary least squares on augmented data."""
    mean_x, mean_y = x.mean(0), y.mean(0)
    left = np.vstack([x - mean_x, math.sqrt(alpha) * np.eye(x.shape[1])])
    right = np.vstack([y - mean_y, np.zeros((x.shape[1], y.shape[1]))])
    weights = np.linalg.lstsq(left, right, rcond=None)[0]
    return lambda new: (new - mean_x) @ weights + mean_y


def test_velocity_r2_is_the_benchmarks():
    """Five folds in order, refitted, R2 averaged over dims: as scikit-learn's GridSearchCV(Ridge())."""
    rng = np.random.default_rng(0)
    alphas = np.logspace(-4, 4, 9)  # wide enough for the choice to matter
    rates = rng.normal(size=(12, 11, 20))
    velocity = rates[..., :2] + 3.0 * rng.normal(size=(12, 11, 2))
    x, y = rates[:8].reshape(-1, 20), velocity[:8].reshape(-1, 2)
    x_test, y_test = rates[8:].reshape(-1, 20), velocity[8:].reshape(-1, 2)
    sizes = np.full(5, len(x) // 5) + (np.arange(5) < len(x) % 5)  # as KFold: the first folds are longer
    stops = np.cumsum(sizes)
    by_alpha = []
    for alpha in alphas:
        folds = [np.arange(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
        rest = [np.setdiff1d(np.arange(len(x)), fold) for fold in folds]
        by_alpha.append(
            np.mean([mean_r2(y[f], ridge(x[r], y[r], alpha)(x[f])) for f, r in zip(folds, rest, strict=True)])
        )
    best = alphas[int(np.argmax(by_alpha))]
    assert alphas[0] < best < alphas[-1]
    expected = mean_r2(y_test, ridge(x, y, best)(x_test))
    score = metrics.velocity_r2(rates[:8], velocity[:8], rates[8:], velocity[8:], alphas=alphas)
    assert score == pytest.approx(expected, abs=1e-10)


def test_velocity_r2_leaves_out_bins_without_velocity_or_rates():
    rng = np.random.default_rng(0)
    rates = rng.normal(size=(10, 9, 4))
    velocity = rates[..., :2] + rng.normal(size=(10, 9, 2))
    gaps, holes = velocity.copy(), rates.copy()
    gaps[:, 7:], holes[:, :2] = np.nan, np.nan
    part = metrics.velocity_r2(*(a[s, 2:7] for s in (slice(6), slice(6, None)) for a in (rates, velocity)))
    assert metrics.velocity_r2(holes[:6], gaps[:6], holes[6:], gaps[6:]) == pytest.approx(part, abs=1e-12)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((3, 9, 4), (3, 8, 2), (3, 9, 4), (3, 9, 2)), "train_rates"),
        (((3, 9, 4), (3, 9, 2), (3, 9, 5), (3, 9, 2)), "4 and 5 neurons"),
        (((3, 3, 4), (3, 3, 2), (3, 9, 4), (3, 9, 2)), "10 training samples .* got 9 and 27"),
        (((3, 9, 4), (3, 9, 2), (0, 9, 4), (0, 9, 2)), "a test sample"),
    ],
)
def test_velocity_r2_refuses(shapes, message):
    with pytest.raises(ValueError, match=message):
        metrics.velocity_r2(*(np.ones(shape) for shape in shapes))


def test_psth_r2_by_hand():
    condition = ["a", "b", "a", "b"]
    # Means by condition: neuron 0 is (1, 3) for a and (5, 7) for b, neuron 1 never varies.
    spikes = np.array([[[0, 2], [2, 2]], [[5, 2], [6, 2]], [[2, 2], [4, 2]], [[5, 2], [8, 2]]], float)
    means = np.array([[[1, 2], [3, 2]], [[5, 2], [7, 2]]], float)
    rates = means[[0, 1, 0, 1]]
    assert metrics.psth_r2(rates, spikes, condition) == 1.0
    wrong = rates + np.array([1.0, 50.0])  # neuron 0: SSE = 4, SST = 20; neuron 1 has no variance to explain
    assert metrics.psth_r2(wrong, spikes, condition) == pytest.approx(1 - 4 / 20)
    only_b = metrics.psth_r2(means[[1]] + 1.0, spikes, ["b"], spikes_condition=condition)
    assert only_b == pytest.approx(1 - 2 / 2)  # SSE = 2, SST of (5, 7) = 2


def test_psth_r2_averages_over_neurons_and_ignores_what_is_missing():
    rng = np.random.default_rng(0)
    condition = np.repeat([0, 1, 2], 4)
    spikes = rng.poisson(3.0, (12, 6, 2)).astype(float)
    rates = spikes + rng.normal(size=spikes.shape) * [0.1, 3.0]
    true, predicted = (
        np.concatenate([values[condition == c].mean(0) for c in range(3)]) for values in (spikes, rates)
    )
    assert metrics.psth_r2(rates, spikes, condition) == pytest.approx(mean_r2(true, predicted), abs=1e-12)
    more = np.concatenate([spikes, np.full((1, 6, 2), np.nan)])
    again = metrics.psth_r2(rates, more, condition, spikes_condition=[*condition, 0])
    assert again == pytest.approx(metrics.psth_r2(rates, spikes, condition), abs=1e-12)


def test_smoothing_keeps_constants_and_spreads_a_spike_as_a_gaussian():
    impulse = np.zeros((1, 101, 1))
    impulse[0, 50] = 1.0
    smooth = _scores.smooth(impulse, 3.0)[0, :, 0]
    gaussian = np.exp(-0.5 * ((np.arange(101) - 50) / 3.0) ** 2) / (3.0 * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(smooth[35:66], gaussian[35:66], rtol=1e-6)  # where the edges are far away
    gap = np.ones((2, 30, 1))
    gap[0, 10:15] = np.nan
    np.testing.assert_allclose(_scores.smooth(gap, 2.0), gap, rtol=1e-12)


@pytest.mark.parametrize(
    ("rates", "condition", "message"),
    [(np.ones((3, 4, 2)), [0, 0], "a condition for each trial"), (np.ones((2, 4, 2)), [5, 6], "in common")],
)
def test_psth_r2_refuses(rates, condition, message):
    with pytest.raises(ValueError, match=message):
        metrics.psth_r2(rates, np.ones((2, 4, 2)), condition, spikes_condition=[0, 1])


def test_psth_r2_moves_jittered_trials_back():
    """Test trials cut 1 bin early and 2 bins late score as the aligned ones, where all have the bins."""
    rng = np.random.default_rng(0)
    condition, long = np.repeat([0, 1], 3), rng.normal(size=(6, 14, 2))
    jitter = np.array([1, -2, 0, 0, 1, -2])
    cut = np.stack([trial[2 + by : 12 + by] for trial, by in zip(long, jitter, strict=True)])
    spikes = rng.normal(size=(6, 10, 2))
    spikes[:, [0, 8, 9]] = np.nan  # some trial does not have them once it is moved
    aligned = metrics.psth_r2(long[:, 2:12], spikes, condition)
    assert metrics.psth_r2(cut, spikes, condition, jitter=jitter) == pytest.approx(aligned, abs=1e-12)
    assert metrics.psth_r2(cut, spikes, condition) != pytest.approx(aligned, abs=1e-3)
    with pytest.raises(ValueError, match="jitter as integers"):
        metrics.psth_r2(cut, spikes, condition, jitter=[0.5] * 6)


def test_the_benchmarks_co_bps_is_that_of_scipy():
    """(nll_null - nll_model) / spikes / ln 2, null = mean over the bins evaluated, by scipy's Poisson."""
    rng = np.random.default_rng(1)
    rates = rng.gamma(2.0, size=(6, 9, 4))
    spikes = rng.poisson(rates).astype(float)
    spikes[2, 5:] = np.nan
    null = np.broadcast_to(np.nanmean(spikes, (0, 1)), spikes.shape)
    nll = [-np.nansum(scipy.stats.poisson.logpmf(spikes, of)) for of in (null, rates)]
    expected = (nll[0] - nll[1]) / np.nansum(spikes) / math.log(2)
    assert metrics.bits_per_spike(rates, spikes) == pytest.approx(expected, rel=1e-12)


def test_velocity_decoder_is_what_velocity_r2_scores():
    rng = np.random.default_rng(0)
    rates = rng.normal(size=(12, 11, 6))
    velocity = rates[..., :2] + rng.normal(size=(12, 11, 2))
    decoded = metrics.velocity_decoder(rates[:8], velocity[:8])(rates[8:])
    assert decoded.shape == (4, 11, 2)
    again = mean_r2(velocity[8:].reshape(-1, 2), decoded.reshape(-1, 2))
    assert metrics.velocity_r2(rates[:8], velocity[:8], rates[8:], velocity[8:]) == pytest.approx(again)
    with pytest.raises(ValueError, match="10 training samples, got 9"):
        metrics.velocity_decoder(np.ones((9, 2)), np.ones((9, 2)))


# ---- of draws -----------------------------------------------------------------------------------------------


def test_crps_by_hand_and_is_fair_for_few_draws():
    assert metrics.crps(np.array([0.0, 1.0, 5.0]), 2.0) == pytest.approx(2 - (1 + 5 + 4) / 6)
    pairs = np.random.default_rng(0).normal(size=(7, 4))
    direct = np.abs(pairs - 0.3).mean(0) - np.abs(pairs[:, None] - pairs).sum((0, 1)) / (2 * 7 * 6)
    np.testing.assert_allclose(metrics.crps(pairs, np.full(4, 0.3)), direct, rtol=1e-12)
    assert np.isnan(metrics.crps(pairs, np.array([0.0, np.nan, 0.0, 0.0]))).tolist() == [0, 1, 0, 0]
    with pytest.raises(ValueError, match="two or more draws"):
        metrics.crps(np.ones((1, 3)), np.ones(3))


@pytest.mark.parametrize(("rate", "y"), [(0.3, 0), (0.3, 2), (4.0, 3)])
def test_crps_of_poisson_draws_is_the_closed_form_whatever_their_number(rate, y):
    draws = np.random.default_rng(0).poisson(rate, (3, 40_000))
    scores = metrics.crps(draws, np.full(40_000, y))  # 40000 scores of 3 draws each: unbiased
    error = SIGMAS * scores.std() / 200
    assert scores.mean() == pytest.approx(crps_of_poisson(rate, y), abs=error)
    sure = -scipy.integrate.quad(
        lambda x: -((scipy.stats.poisson(rate).cdf(x) - (x >= y)) ** 2), 0, 30, limit=300
    )[0]
    assert crps_of_poisson(rate, y) == pytest.approx(sure, abs=1e-3)  # the formula itself


def test_crps_of_normal_draws_is_the_closed_form():
    scores = metrics.crps(np.random.default_rng(0).normal(size=(5, 30_000)), np.full(30_000, 0.7))
    n = scipy.stats.norm
    expected = 0.7 * (2 * n.cdf(0.7) - 1) + 2 * n.pdf(0.7) - 1 / math.sqrt(math.pi)
    assert scores.mean() == pytest.approx(expected, abs=SIGMAS * scores.std() / math.sqrt(30_000))


def test_rank_levels_are_uniform_for_counts_too():
    """Of 19 draws and a truth of one Poisson, mostly zeros: every level is as likely, so p intervals cover p."""
    rng = np.random.default_rng(0)
    levels = metrics.rank_levels(rng.poisson(0.2, (19, 20_000)), rng.poisson(0.2, 20_000), rng)
    assert levels.min() > 0 and levels.max() < 1
    for p in (0.5, 0.9):
        error = SIGMAS * math.sqrt(p * (1 - p) / 20_000)
        assert (np.abs(levels - 0.5) <= p / 2).mean() == pytest.approx(p, abs=error)
    assert scipy.stats.kstest(levels, "uniform").pvalue > 1e-4
    assert np.isnan(metrics.rank_levels(np.ones((3, 1)), np.array([np.nan]), rng)).all()


@pytest.mark.parametrize("module", [metrics, _scores, _draw_scores, _forecast_scores])
def test_examples(module):
    result = doctest.testmod(module, extraglobs={"np": np})
    assert result.failed == 0 and result.attempted > 0
