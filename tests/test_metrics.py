"""Scores against values worked out by hand, closed forms, other implementations, and the draws they come from."""

import doctest
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
import xarray as xr

import pyro_metassm as pm
from pyro_metassm import _draw_scores, _forecast_scores, _scored_neurons, _scores, metrics

SIGMAS = 5
FLOAT32 = 1e-5  # trees hold float32 (6e-8 each), scores add squares of numbers of order 1 in float64


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


def mean_r2(y, prediction):
    return float((1 - ((y - prediction) ** 2).sum(0) / ((y - y.mean(0)) ** 2).sum(0)).mean())


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


def crps_of_poisson(rate, y):
    """Closed form (Wei and Held, 2014): (y - m)(2 F(y) - 1) + 2 m f(y) - m exp(-2m) (I0(2m) + I1(2m))."""
    p = scipy.stats.poisson(rate)
    bessel = scipy.special.ive(0, 2 * rate) + scipy.special.ive(1, 2 * rate)
    return (y - rate) * (2 * p.cdf(y) - 1) + 2 * rate * p.pmf(y) - rate * bessel


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


# ---- of fits ------------------------------------------------------------------------------------------------

CONTEXT, HORIZON, SAMPLES = 8, 14, 7


def counts() -> pm.Recordings:
    """Counts with trials of unequal length, a missing bin, held-out neurons in one recording, and behaviour."""
    recs = pm.simulate.limit_cycles(
        [2.0, 5.0], num_trials=16, num_steps=20, num_neurons=(5, 8), noise="poisson", mean_count=(0.5, 2.0)
    )
    made = []
    for name, recording in recs.items():
        y = recording.observations.copy()
        y[0, 5:], y[1, 18:], y[2, 4] = np.nan, np.nan, np.nan
        made.append(
            pm.Recording(
                name, y, bin_width=0.02, held_out_neurons=[0, 3] if name == "w=5" else None,
                behavior=recs.truth[name]["latents"].values, attrs={"behavior_names": ["vx", "vy"]},
            )
        )  # fmt: skip
    return pm.Recordings(made)


@pytest.fixture(scope="module")
def recs():
    return counts()


@pytest.fixture(scope="module")
def fit(recs):
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=pm.likelihoods.Poisson)
    guide = pm.guides.DKF(model, hidden_dim=16)
    return pm.fit(model, guide, recs, num_steps=10, warm_start_steps=20, progress=False)


def test_forecast_r2_is_that_of_the_mean_of_the_forecast_draws(fit, recs):
    with pytest.warns(UserWarning, match="1 of 16 trials end before context = 8"):
        score = metrics.forecast_r2(fit, recs, context=CONTEXT, horizon=HORIZON, num_samples=SAMPLES, seed=3)
    with pytest.warns(UserWarning, match="1 of 16"):
        tree = pm.forecast(fit, recs, context=CONTEXT, horizon=HORIZON, num_samples=SAMPLES, seed=3)
    assert score.dims == ("recording", "horizon_step") and score["recording"].values.tolist() == list(recs)
    assert score["horizon_step"].values.tolist() == list(range(1, HORIZON + 1))
    np.testing.assert_allclose(score["lead_time"], 0.02 * score["horizon_step"])
    for name in recs:
        mean = tree[name]["predictions"]["rates"].astype(np.float64).mean(("chain", "draw"))
        truth = tree[name]["observed_data"]["observations"]
        for step in range(1, HORIZON + 1):
            here = float(score.sel(recording=name, horizon_step=step))
            if step > 12:  # all trials have ended after bin 20
                assert math.isnan(here)
            else:
                again = metrics.r2(truth[:, step - 1], mean[:, step - 1])
                assert here == pytest.approx(again, abs=FLOAT32)


def test_reconstruction_r2_is_that_of_the_posterior_mean(fit, recs):
    score = metrics.reconstruction_r2(fit, recs, num_samples=SAMPLES, seed=3)
    tree = pm.posterior(fit, recs, num_samples=SAMPLES, seed=3)
    for name, recording in recs.items():
        mean = tree[name]["posterior"]["rates"].astype(np.float64).mean(("chain", "draw"))
        again = metrics.r2(recording.observations, mean.values)
        assert float(score.sel(recording=name)) == pytest.approx(again, abs=FLOAT32)
        rates = metrics.mean_rates(fit, recs, name, SAMPLES, seed=3)
        assert (np.isnan(rates) == np.isnan(mean.values)).all() and np.isnan(rates[0, 5:]).all()


def test_bits_per_spike_of_a_fit(fit, recs):
    train, test = recs.split(0.5)
    rates = {name: metrics.mean_rates(fit, test, name, SAMPLES) for name in test}
    plain = metrics.rate_bps(fit, test, num_samples=SAMPLES)
    against = metrics.rate_bps(fit, test, null=train, num_samples=SAMPLES)
    co = metrics.co_bps(fit, test, num_samples=SAMPLES)
    co_against = metrics.co_bps(fit, test, null=train, num_samples=SAMPLES)
    for name, recording in test.items():
        y, null = recording.observations, np.nanmean(train[name].observations, (0, 1))
        assert float(plain.sel(recording=name)) == metrics.bits_per_spike(rates[name], y)
        again = metrics.bits_per_spike(rates[name], y, null)
        assert float(against.sel(recording=name)) == pytest.approx(again, rel=1e-6)
        if name == "w=5":
            part = [0, 3]
            assert float(co.sel(recording=name)) == metrics.bits_per_spike(
                rates[name][..., part], y[..., part]
            )
            again = metrics.bits_per_spike(rates[name][..., part], y[..., part], null[part])
            assert float(co_against.sel(recording=name)) == pytest.approx(again, rel=1e-6)
        else:
            assert math.isnan(co.sel(recording=name))
    with pytest.raises(ValueError, match="held_out_neurons="):
        metrics.co_bps(fit, test.select(["w=2"]))


def test_a_neuron_silent_in_training_counts_as_half_a_spike():
    silent = pm.Recording("a", np.stack([np.zeros((4, 10)), np.ones((4, 10))], -1), bin_width=0.02)
    np.testing.assert_allclose(_scored_neurons.constant_rates(silent), [0.5 / 40, 1.0])


@pytest.mark.filterwarnings("ignore:recording .* trials end before context")
def test_fp_bps_is_that_of_the_mean_of_the_forecast_draws(fit, recs):
    score = metrics.fp_bps(fit, recs, context=CONTEXT, num_samples=SAMPLES)
    short = metrics.fp_bps(fit, recs, context=CONTEXT, horizon=3, num_samples=SAMPLES)
    tree = pm.forecast(fit, recs, context=CONTEXT, horizon=12, num_samples=SAMPLES)
    for name in recs:
        mean = tree[name]["predictions"]["rates"].astype(np.float64).mean(("chain", "draw")).values
        y = tree[name]["observed_data"]["observations"].values
        again = metrics.bits_per_spike(np.where(np.isnan(y), np.nan, mean), y)
        assert float(score.sel(recording=name)) == pytest.approx(again, abs=FLOAT32)
        assert math.isfinite(short.sel(recording=name)) and short.sel(recording=name) != score.sel(
            recording=name
        )
    with pytest.raises(ValueError, match="recording 'w=2': needed bins after context = 20"):
        metrics.fp_bps(fit, recs, context=20)
    with pytest.raises(ValueError, match="recording 'w=2': needed trials of at least context = 21"):
        metrics.fp_bps(fit, recs, context=21)


@pytest.mark.filterwarnings("ignore:recording .* trials end before context")
def test_forecast_scores_are_those_of_the_draws(fit, recs):
    """Every number again from the tree of forecasts; bits per spike of all steps make fp_bps."""
    options = {"context": CONTEXT, "horizon": HORIZON, "num_samples": SAMPLES, "seed": 3}
    scores = metrics.forecast_scores(fit, recs, smoothing_sd=0.0, **options)
    assert scores["crps"].dims == ("recording", "horizon_step")
    assert scores["horizon_step"].values.tolist() == list(range(1, HORIZON + 1))
    tree = pm.forecast(fit, recs, **options)
    whole = metrics.fp_bps(fit, recs, context=CONTEXT, num_samples=SAMPLES, seed=3)
    plain = metrics.forecast_r2(fit, recs, **options)
    np.testing.assert_allclose(scores["r2"], plain, atol=FLOAT32)  # unsmoothed
    for name in recs:
        y = tree[name]["observed_data"]["observations"].values
        here = scores.sel(recording=name)
        spikes = np.nansum(y, (0, 2))
        each = np.where(spikes > 0, here["bits_per_spike"][: len(spikes)], 0.0)
        assert (each * spikes).sum() / spikes.sum() == pytest.approx(
            float(whole.sel(recording=name)), abs=FLOAT32
        )
        assert np.isnan(here["crps"][12:]).all() and np.isnan(here["coverage"][12:]).all()
        assert (here["crps"][:12] > 0).all() and here["coverage"][:12].min() >= 0


def test_forecasts_from_the_truth_are_scored_as_their_distribution(monkeypatch, fit, recs):
    """Draws from the distribution of the data: CRPS and coverage of a Poisson, bits by the closed form."""
    rate, options = 0.7, {"context": CONTEXT, "horizon": 12, "num_samples": 20}
    rng = np.random.default_rng(0)
    full = pm.Recordings(
        [pm.Recording("w=2", rng.poisson(rate, (300, 20, recs["w=2"].num_neurons)), bin_width=0.02)]
    )

    def draws(fit, recs, name, trials, context, horizon, num_samples, seed):
        shape = (len(trials), horizon, recs[name].num_neurons)
        yield list(range(len(trials))), np.full(shape, rate), rng.poisson(rate, (num_samples, *shape))

    monkeypatch.setattr(_forecast_scores, "_forecasts", draws)
    scores = metrics.forecast_scores(fit, full, **options)
    size = 300 * 12 * full["w=2"].num_neurons
    expected = sum(scipy.stats.poisson(rate).pmf(y) * crps_of_poisson(rate, y) for y in range(20))
    assert float(scores["crps"].mean()) == pytest.approx(expected, abs=SIGMAS * 0.6 / math.sqrt(size))
    for level, covered in zip(
        (0.5, 0.9), scores["coverage"].mean(("recording", "horizon_step")).values, strict=True
    ):
        assert covered == pytest.approx(level, abs=SIGMAS * math.sqrt(level * (1 - level) / size))
    assert abs(scores["r2"]).max() < 0.05 and abs(scores["bits_per_spike"]).max() < 0.01  # nothing to know
    told = metrics.forecast_scores(fit, full, null=full, **options)
    np.testing.assert_allclose(told["bits_per_spike"], scores["bits_per_spike"], atol=0.01)


def test_smoothing_of_forecast_scores_stays_within_the_forecast(fit, recs):
    """What was observed before the context enters no score but through the forecast itself."""
    options = {"context": CONTEXT, "horizon": 5, "num_samples": SAMPLES}
    long = pm.Recordings([r.take(np.flatnonzero(r.lengths == 20)) for r in recs.values()])
    score = metrics.forecast_scores(fit, long, smoothing_sd=0.04, **options)
    tree = pm.forecast(fit, long, **options)
    for name in long:
        rates = tree[name]["predictions"]["rates"].astype(np.float64).mean(("chain", "draw")).values
        y = long[name].observations[:, CONTEXT : CONTEXT + 5].astype(np.float64)
        smoothed = [_scores.smooth(values, 2.0)[:, 2] for values in (y, np.where(np.isnan(y), np.nan, rates))]
        again = metrics.r2(*smoothed)
        assert float(score["r2"].sel(recording=name, horizon_step=3)) == pytest.approx(again, abs=FLOAT32)


@pytest.mark.parametrize(
    "wrong",
    [
        {"smoothing_sd": -1.0},
        {"smoothing_sd": math.nan},
        {"smoothing_sd": math.inf},
        {"levels": ()},
        {"levels": 0.5},
        {"levels": (90,)},
        {"num_samples": 1},
    ],
)
def test_forecast_scores_refuses(fit, recs, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        metrics.forecast_scores(fit, recs, context=CONTEXT, horizon=2, **wrong)


def test_forecast_decoding_reads_forecasts_with_the_decoder_of_reconstructions(fit, recs):
    """The same R2 from the parts: decoder of the training reconstructions, on both, by step and together."""
    long = pm.Recordings([r.take(np.flatnonzero(r.lengths == 20)) for r in recs.values()])
    options = {"context": CONTEXT, "horizon": 6, "num_samples": SAMPLES}
    scores = metrics.forecast_decoding_r2(fit, recs, long, lag=0.02, **options)
    assert scores["forecast"].dims == ("recording",) and scores["forecast_by_step"].shape == (2, 6)
    tree = pm.forecast(fit, long, **options)
    for name in long:
        learned = metrics.mean_rates(fit, recs, name, SAMPLES)
        decode = metrics.velocity_decoder(learned[:, :-1], recs[name].behavior[:, 1:])
        ahead = tree[name]["predictions"]["rates"].astype(np.float64).mean(("chain", "draw")).values
        y = long[name].behavior[:, CONTEXT + 1 : CONTEXT + 7]
        reconstructed = metrics.mean_rates(fit, long, name, SAMPLES)[:, CONTEXT : CONTEXT + 6]
        for way, rates in (("forecast", ahead), ("reconstruction", reconstructed)):
            decoded = decode(rates)
            again = mean_r2(y.reshape(-1, 2), decoded.reshape(-1, 2))
            assert float(scores[way].sel(recording=name)) == pytest.approx(again, abs=1e-4)
            step = float(scores[f"{way}_by_step"].sel(recording=name, horizon_step=4))
            assert step == pytest.approx(mean_r2(y[:, 3], decoded[:, 3]), abs=1e-4)
    with pytest.raises(ValueError, match="recording 'w=2': needed dims of the behaviour"):
        metrics.forecast_decoding_r2(fit, recs, long, dims=["speed"], **options)


def test_decoding_r2_finds_behaviour_that_follows_the_rates(fit, recs):
    """Behaviour made from the posterior mean rates, 3 bins late: decoded without error at that lag alone."""
    made = []
    for name, recording in recs.items():
        rates = metrics.mean_rates(fit, recs, name, SAMPLES)
        behavior = np.random.default_rng(0).normal(size=(*rates.shape[:2], 2))
        behavior[:, 3:, 1] = rates[:, :-3, 0] - rates[:, :-3, 1]
        behavior[np.isnan(recording.observations).all(-1)] = np.nan
        attrs = {"behavior_names": ["noise", "late"]}
        made.append(
            pm.Recording(name, recording.observations, bin_width=0.02, behavior=behavior, attrs=attrs)
        )
    moving = pm.Recordings(made)
    same = {"num_samples": SAMPLES}  # trials, seed and batch as above: the very same rates
    late = metrics.decoding_r2(fit, moving, moving, dims=["late"], lag=0.06, **same)
    assert (late > 1 - 1e-3).all() and late.dims == ("recording",)
    assert (metrics.decoding_r2(fit, moving, moving, dims=[1], lag=0.0, **same) < late - 0.05).all()
    assert (metrics.decoding_r2(fit, moving, moving, lag=0.06, **same) < late - 0.2).all()  # with the noise
    with pytest.raises(ValueError, match="recording 'w=2': needed dims of the behaviour"):
        metrics.decoding_r2(fit, moving, moving, dims=["speed"])
    bare = pm.Recordings([pm.Recording(n, r.observations, bin_width=0.02) for n, r in recs.items()])
    with pytest.raises(ValueError, match="recording 'w=2': needed behaviour"):
        metrics.decoding_r2(fit, bare, bare)


@pytest.mark.parametrize("name", ["forecast_r2", "reconstruction_r2", "rate_bps", "co_bps", "fp_bps"])
def test_scores_of_recordings_that_the_fit_does_not_know(fit, recs, name):
    steps = {"forecast_r2": {"context": 8, "horizon": 2}, "fp_bps": {"context": 8}}.get(name, {})
    stranger = pm.Recordings(
        [pm.Recording("stranger", np.ones((4, 20, 5)), bin_width=0.02, held_out_neurons=[1])]
    )
    with pytest.raises(ValueError, match="recording 'stranger'"):
        getattr(metrics, name)(fit, stranger, **steps)
    with pytest.raises(ValueError, match="num_samples"):
        getattr(metrics, name)(fit, recs, num_samples=0, **steps)


def test_real_numbers_have_no_bits_however_positive():
    """Rates and values around 50: a Poisson likelihood of them could be computed, and would mean nothing."""
    values = 50.0 + np.random.default_rng(0).normal(size=(8, 10, 4))
    recs = pm.Recordings([pm.Recording("a", values, bin_width=0.03)])
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
    with torch.no_grad():
        model.read_out.bias += 50.0
    fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=0, warm_start=False, progress=False)
    levels = np.array([0.5, 0.9])
    scores = metrics.forecast_scores(fit, recs, context=5, horizon=3, num_samples=3, levels=levels)
    assert scores["bits_per_spike"].isnull().all() and scores["crps"].notnull().all()
    table = pm.baselines.table(fit, recs, recs, context=5, horizon=3, num_samples=3)
    assert len(table) == 0  # no behaviour, no conditions: nothing else either


def test_rates_of_a_gaussian_fit_have_no_bits():
    recs = pm.simulate.limit_cycles([2.0], num_trials=8, num_steps=10, num_neurons=4)
    whole = pm.Recordings([pm.Recording("w=2", np.round(np.abs(recs["w=2"].values)), bin_width=0.03)])
    model = pm.models.MetaSSM(whole, latent_dim=2, embedding_dim=1)
    with torch.no_grad():
        model.read_out.bias -= 100.0
    fit = pm.fit(model, pm.guides.DKF(model), whole, num_steps=0, warm_start=False, progress=False)
    with pytest.raises(ValueError, match=r"recording 'w=2': .*rates of at least 0"):
        metrics.rate_bps(fit, whole, num_samples=2)


@pytest.mark.parametrize("module", [metrics, _scores, _draw_scores, _forecast_scores])
def test_examples(module):
    result = doctest.testmod(module, extraglobs={"np": np})
    assert result.failed == 0 and result.attempted > 0
