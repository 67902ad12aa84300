"""Scores of fits against those of the draws that they come from."""

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import torch
from known_scores import crps_of_poisson, mean_r2

import pyro_metassm as pm
from pyro_metassm import _forecast_scores, _scored_neurons, _scores, metrics

SIGMAS = 5


FLOAT32 = 1e-5  # trees hold float32 (6e-8 each), scores add squares of numbers of order 1 in float64


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
