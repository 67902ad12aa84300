"""Simple predictions against values worked out by hand, and the table against the scores it is made of."""

import doctest
import math

import numpy as np
import pytest

import pyro_metassm as pm
from pyro_metassm import baselines, metrics
from pyro_metassm.experiments import adapting


def recording(values, **more):
    return pm.Recording("a", np.asarray(values, float), bin_width=0.02, **more)


def test_mean_rate_and_psth_by_hand():
    train = recording([[[1], [3]], [[3], [5]], [[0], [0]]], condition=[0, 0, 1])
    test = recording([[[7], [7]], [[7], [7]], [[7], [7]]], condition=[1, 0, 2])
    np.testing.assert_allclose(baselines.mean_rate(train, test), 2.0)
    # One more trial at the mean, 2: condition 1 is (0 + 2) / 2, condition 0 (4 + 2) / 3 and (8 + 2) / 3;
    # condition 2 is unknown, so all trials: (4 + 2) / 4 and (8 + 2) / 4.
    expected = [[1, 1], [2, 10 / 3], [1.5, 2.5]]
    np.testing.assert_allclose(baselines.psth(train, test)[..., 0], expected)
    longer = recording(np.ones((1, 3, 1)), condition=[0])
    np.testing.assert_allclose(baselines.psth(train, longer)[0, :, 0], [2, 10 / 3, 2])  # never seen: the mean
    none = recording(np.ones((1, 2, 1)))  # no conditions: all three trials
    np.testing.assert_allclose(baselines.psth(train, none)[0, :, 0], [1.5, 2.5])


def test_smoothing_finds_the_width_of_slow_and_of_fast_rates():
    """Of rates that swing slowly a wide kernel is chosen and predicts; of constant ones the widest."""
    rng = np.random.default_rng(0)
    time = np.arange(60)
    slow = np.exp(1.5 * np.sin(2 * np.pi * (time / 30 + rng.random((40, 1)))))[..., None]
    train, test = (recording(rng.poisson(slow[rows])) for rows in (slice(30), slice(30, 40)))
    widths = {sd: _loss(baselines._smoothed(test, sd), slow[30:]) for sd in baselines.SDS}
    chosen = _loss(baselines.smoothing(train, test), slow[30:])
    assert chosen == pytest.approx(min(widths.values()), rel=0.2) and chosen < 0.5 * _loss(1.0, slow[30:])
    flat = [recording(rng.poisson(np.ones((30, 60, 1)))) for _ in range(2)]
    np.testing.assert_allclose(baselines.smoothing(*flat), baselines._smoothed(flat[1], 8.0))


def _loss(rates, truth):
    return float(((rates - truth) ** 2).mean())


def test_smoothing_predicts_held_out_neurons_from_the_others():
    """Six neurons of one rate, one held out: its own counts are not looked at, and the others tell it."""
    rng = np.random.default_rng(0)
    rate = np.repeat(np.exp(np.sin(np.linspace(0, 9, 50) + 6 * rng.random((40, 1))))[..., None], 6, -1)
    counts = rng.poisson(rate).astype(float)
    train, test = (recording(counts[rows], held_out_neurons=[5]) for rows in (slice(30), slice(30, 40)))
    rates = baselines.smoothing(train, test)
    assert metrics.bits_per_spike(rates[..., 5:], counts[30:, :, 5:]) > 0.05
    changed = counts[30:].copy()
    changed[..., 5] = 9.0
    again = baselines.smoothing(train, recording(changed, held_out_neurons=[5]))
    np.testing.assert_array_equal(again, rates)


def test_persistence_lasts_as_the_training_trials_do():
    """Levels of a trial that last are taken over; where trials have none the mean is kept."""
    rng = np.random.default_rng(0)
    level = np.where(rng.random((60, 1, 1)) < 0.5, 1.0, 6.0)
    lasting = rng.poisson(np.broadcast_to(level, (60, 20, 3))).astype(float)
    train, test = recording(lasting[:40]), recording(lasting[40:])
    ahead = baselines.persistence(train, test, context=10, horizon=6)
    assert ahead.shape == (20, 6, 3) and (ahead == ahead[:, :1]).all()
    assert _loss(ahead, level[40:]) < 0.1 * _loss(lasting.mean(), level[40:])
    noise = recording(rng.poisson(2.0, (300, 20, 3)))
    flat = baselines.persistence(noise, noise, context=10, horizon=6)
    np.testing.assert_allclose(flat, np.broadcast_to(noise.values.mean((0, 1)), flat.shape), rtol=0.15)
    future = lasting[40:].copy()
    future[:, 10:] = 50.0
    np.testing.assert_array_equal(
        baselines.persistence(train, recording(future), context=10, horizon=6), ahead
    )


def test_missing_bins_and_ends_of_trials():
    rng = np.random.default_rng(0)
    values = rng.poisson(2.0, (10, 12, 3)).astype(float)
    values[0, 8:], values[1, 4] = np.nan, np.nan
    one = recording(values)
    rates = baselines.smoothing(one, one)
    assert np.isnan(rates[0, 8:]).all() and np.isfinite(rates[1]).all()
    assert np.isfinite(baselines.persistence(one, one, context=5, horizon=3)).all()
    signed = recording(rng.normal(size=(10, 12, 3)) - 5.0)
    assert baselines.smoothing(signed, signed).max() < -3.0  # no floor where there are no counts


@pytest.fixture(scope="module")
def problem():
    recs = pm.simulate.limit_cycles(
        [2.0, 5.0], num_trials=16, num_steps=20, num_neurons=(5, 8), noise="poisson", mean_count=(0.5, 2.0)
    )
    made = [
        pm.Recording(
            name, r.observations, bin_width=0.02, held_out_neurons=[0, 3], condition=np.arange(16) % 2,
            behavior=recs.truth[name]["latents"].values if name == "w=2" else None,
        )
        for name, r in recs.items()
    ]  # fmt: skip
    train, test = pm.Recordings(made).split()
    model = pm.models.MetaSSM(train, latent_dim=2, embedding_dim=1, likelihood=pm.likelihoods.Poisson)
    guide = pm.guides.DKF(model, hidden_dim=8)
    fit = pm.fit(model, guide, train, num_steps=4, warm_start_steps=4, progress=False)
    return train, test, fit


def test_the_table_is_the_scores(problem):
    train, test, fit = problem
    alone = baselines.single_recording(fit, train, num_steps=2, warm_start_steps=2)
    options = {"context": 8, "horizon": 6, "num_samples": 5}
    table = baselines.table(fit, train, test, others={"single": alone}, **options)
    assert list(table.columns) == ["model", "single", "mean rate", "psth", "smoothing", "persistence"]
    co = metrics.co_bps(fit, test, num_samples=5)
    fp = metrics.fp_bps(fit, test, context=8, horizon=6, num_samples=5)
    one = metrics.co_bps(alone["w=5"], test.select(["w=5"]), num_samples=5)
    for name in test:
        assert table.loc[("co_bps", name), "model"] == pytest.approx(float(co.sel(recording=name)), rel=1e-6)
        assert table.loc[("fp_bps", name), "model"] == pytest.approx(float(fp.sel(recording=name)), rel=1e-6)
        assert math.isnan(table.loc[("fp_bps", name), "smoothing"])
        assert math.isnan(table.loc[("co_bps", name), "persistence"])
        assert table.loc[("co_bps", name), "mean rate"] <= 0  # the benchmark's null is of the bins scored
        held = test[name].held_out_neurons
        rates = baselines.psth(train[name], test[name])[..., held]
        again = metrics.bits_per_spike(rates, test[name].observations[..., held])
        assert table.loc[("co_bps", name), "psth"] == pytest.approx(again)
    assert table.loc[("co_bps", "w=5"), "single"] == pytest.approx(float(one[0]), rel=1e-6)
    velocity = metrics.decoding_r2(
        fit, train.select(["w=2"]), test.select(["w=2"]), dims=(0, 1), num_samples=5
    )
    assert table.loc[("velocity_r2", "w=2"), "model"] == pytest.approx(float(velocity[0]), abs=1e-6)
    assert ("velocity_r2", "w=5") not in table.index  # has no behaviour
    ahead = metrics.forecast_decoding_r2(
        fit, train.select(["w=2"]), test.select(["w=2"]), dims=(0, 1), **options
    )
    got = table.loc[("forecast_velocity_r2", "w=2"), "model"]
    assert got == pytest.approx(float(ahead["forecast"][0]), abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"others": {"psth": {}}}, "other names of fits than .* got 'psth'"),
        ({"others": {"single": {}}}, "none of 'w=2' in 'single'"),
        ({"behavior_dims": (0, 9)}, r"recording 'w=2': needed behavior_dims below 2, got \[0, 9\]"),
    ],
)
def test_tables_that_cannot_be_made(problem, wrong, message):
    train, test, fit = problem
    with pytest.raises(ValueError, match=message):
        baselines.table(fit, train, test, context=8, horizon=6, num_samples=2, **wrong)


def test_a_single_recording_is_what_scratch_was(problem, monkeypatch):
    """`metassm adapt` and the baseline make the same model from scratch."""
    train, _, fit = problem
    monkeypatch.setattr(adapting, "START", 3)
    a = baselines.single_recording(fit, train, num_steps=1, warm_start_steps=3, seed=3)["w=5"]
    b = adapting.from_scratch(fit, train.select(["w=5"]), num_steps=1, seed=3, progress=False)
    one, other = a.model.state_dict(), b.model.state_dict()
    assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    assert a.model.config["rank"] == 0


def test_examples():
    result = doctest.testmod(baselines, extraglobs={"np": np})
    assert result.failed == 0 and result.attempted > 0
