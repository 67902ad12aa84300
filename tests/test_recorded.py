"""The experiments of real recordings: their data made ready, their errors, and tiny ones from end to end."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import pyro_metassm as pm
from pyro_metassm import cli
from pyro_metassm.experiments import (
    decisions,
    pooling,
    pooling_report,
    pooling_scores,
    pooling_settings,
    reaching,
    recorded,
)

TINY = pooling_settings.Setting(
    latent_dim=2, num_steps=3, warm_start_steps=3, trials_per_step=4, tune_steps=2, scratch_steps=2, adapt_steps=2,
    num_starts=4, search_steps=3, shots=(4, 16), context=2, horizon=3, num_samples=3,
)  # fmt: skip


def counts(rng, trials=30, bins=12, neurons=8, mean=1.0):
    return rng.poisson(mean * np.exp(0.5 * rng.normal(size=(trials, 1, neurons))), (trials, bins, neurons))


def write(path, rng, bin_width, trials=30, bins=12, **more):
    spikes = counts(rng, trials, bins)
    mask = np.arange(bins) < rng.integers(bins - 4, bins + 1, trials)[:, None]
    np.savez(
        path, spikes=(spikes * mask[..., None]).astype(np.uint8), mask=mask, bin_width_s=bin_width, **more
    )


# ---- data ---------------------------------------------------------------------------------------------------


def test_summed_bins_hold_every_count_once():
    rng = np.random.default_rng(0)
    values = counts(rng, 5, 11, 3).astype(float)
    values[0, 7:], values[1, 3], values[2, 1:] = np.nan, np.nan, np.nan
    behavior = rng.normal(size=(5, 11, 2))
    made = pm.Recording(
        "a",
        values,
        bin_width=0.01,
        behavior=behavior,
        condition=np.arange(5),
        attrs={"trials": {"k": np.arange(5)}},
    )
    two = recorded.summed(made, 2)
    # Trial 2 has one bin, so none of two; 11 bins make 5, trial 0 keeps 3; the pair with the missing bin is missing.
    assert two.condition.tolist() == [0, 1, 3, 4] == two.attrs["trials"]["k"].tolist()
    assert two.bin_width == pytest.approx(0.02) and two.lengths.tolist() == [3, 5, 5, 5]
    np.testing.assert_array_equal(two.observations[2], values[3, :10].reshape(5, 2, 3).sum(1))
    assert np.isnan(two.observations[1, 1]).all() and np.isfinite(two.observations[1, [0, 2, 3, 4]]).all()
    np.testing.assert_allclose(two.behavior[3], behavior[4, :10].reshape(5, 2, 2).mean(1), rtol=1e-6)
    assert recorded.summed(made, 1) is made


def test_neurons_are_left_out_with_what_belongs_to_them(tmp_path):
    """Below the least rate, and the second of two that correlate: ids, areas and masks go along."""
    rng = np.random.default_rng(0)
    spikes = counts(rng, 20, 12, 6)
    spikes[..., 1] = rng.random((20, 12)) < 0.01
    spikes[..., 4] = spikes[..., 2] + (rng.random((20, 12)) < 0.05)
    area = np.array(list("abcdef"))
    mask = np.ones((20, 12), bool)
    np.savez(
        tmp_path / "x.npz", spikes=spikes.astype(np.uint8), mask=mask, bin_width_s=0.045, brain_area=area
    )
    left = recorded.read(tmp_path / "x.npz", factor=2, least_hz=0.5, copies=0.8, bin_width=0.1)
    assert left.attrs["brain_area"].tolist() == ["a", "c", "d", "f"] and left.num_neurons == 4
    assert left.attrs["neurons_in_file"] == 6 and left.bin_width == 0.1
    assert left.attrs["true_bin_width"] == pytest.approx(0.09)
    assert left.neuron_ids.tolist() == [0, 2, 3, 4] or len(set(left.neuron_ids)) == 4
    held = recorded.hold_out_neurons(left, 0.25)
    assert held.held_out_neurons.sum() == 1
    assert (held.held_out_neurons == recorded.hold_out_neurons(left, 0.25).held_out_neurons).all()
    few = recorded.fewer(left, trials=7, neurons=2)
    assert few.num_trials == 7
    rates = left.values[:7].sum((0, 1))
    assert sorted(few.values.sum((0, 1))) == sorted(rates)[-2:]


@pytest.mark.parametrize("name", ["reaching", "decisions"])
def test_without_data_the_experiments_say_where_there_is_some(name, tmp_path, capsys):
    assert cli.main(["experiment", name, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "--data" in told and "dandiarchive.org" in told
    assert cli.main(["experiment", name, "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "which has none of" in capsys.readouterr().err


# ---- scores -------------------------------------------------------------------------------------------------


def test_bits_and_their_standard_error_are_those_of_resampled_trials():
    rng = np.random.default_rng(0)
    spikes = rng.poisson(20, 400).astype(float)
    gains = 0.1 * spikes + rng.normal(size=400)
    value, error = pooling_scores.bits([gains.tolist(), spikes.tolist()])
    assert value == pytest.approx(gains.sum() / spikes.sum() / math.log(2))
    drawn = rng.integers(400, size=(3000, 400))
    spread = (gains[drawn].sum(1) / spikes[drawn].sum(1) / math.log(2)).std()
    assert error == pytest.approx(spread, rel=5 / math.sqrt(2 * 3000) + 0.03)
    other = [(gains - 0.5).tolist(), spikes.tolist()]
    difference, paired = pooling_scores.bits([gains.tolist(), spikes.tolist()], minus=other)
    assert difference == pytest.approx(0.5 * 400 / spikes.sum() / math.log(2)) and paired < 0.2 * error


def test_scores_are_those_of_metrics():
    rng = np.random.default_rng(0)
    more = {"bin_width": 0.1, "held_out_neurons": [1, 5]}
    made = [
        pm.Recording("a", counts(rng, 20), behavior=rng.normal(size=(20, 12, 3)), **more) for _ in range(2)
    ]
    rates = [rng.gamma(2.0, size=r.values.shape) for r in made]
    ahead = rng.gamma(2.0, size=(20, 3, 8))
    found = pooling_scores.score(*rates, ahead, *made, TINY)
    y = made[1].observations
    assert pooling_scores.bits(found["co"])[0] == pytest.approx(
        pm.metrics.bits_per_spike(rates[1][..., [1, 5]], y[..., [1, 5]])
    )
    assert pooling_scores.bits(found["fp"])[0] == pytest.approx(pm.metrics.bits_per_spike(ahead, y[:, 2:5]))
    again = pm.metrics.velocity_r2(rates[0], made[0].behavior[..., :2], rates[1], made[1].behavior[..., :2])
    assert found["velocity"][0] == pytest.approx(again) and found["velocity"][1] > 0
    assert set(pooling_scores.score(None, None, ahead, *made, TINY)) == {"fp"}


def test_differences_pair_trials_and_verdicts_say_where_it_does_not_help():
    spikes = [10.0, 10.0, 10.0]

    def row(recording, method, gains, seed=0):
        return {
            "plan": "p",
            "seed": seed,
            "recording": recording,
            "method": method,
            "co": [gains, spikes],
            "fp": [gains, spikes],
        }

    rows = [
        row("a", "pooled", [2.0, 3.0, 4.0]), row("a", "single recording", [1.0, 2.0, 3.0]),
        row("b", "pooled", [1.0, 1.0, 1.0]), row("b", "single recording", [2.0, 1.0, 1.5]),
        row("c", "pooled", [1.0, 1.0, 1.0]),
    ]  # fmt: skip
    a, b = pooling_report.differences(rows, "pooled", "single recording")
    assert a["difference"] == pytest.approx(3 / 30 / math.log(2)) and a["se"] == pytest.approx(0, abs=1e-12)
    assert b["difference"] == pytest.approx(-1.5 / 30 / math.log(2)) and b["se"] > 0
    lines = pooling_report.verdicts([a, b], [{**a, "trials": 16}, {**b, "trials": 16}, {**b, "trials": 8}])
    assert "mean over 2 recordings: +0.0361" in lines[0]
    assert lines[1].startswith("b: pooling does not help (-0.0721") and "better in 1 of 2" in lines[2]
    two = pooling_report.differences(
        [*rows[:2], row("a", "pooled", [4.0, 3.0, 2.0], 1), row("a", "single recording", [3.0, 2.0, 1.0], 1)],
        "pooled", "single recording",
    )  # fmt: skip
    assert two[0]["difference"] == pytest.approx(a["difference"]) and two[0]["seeds_sd"] == pytest.approx(0.0)


# ---- end to end ---------------------------------------------------------------------------------------------


@pytest.fixture
def monkeys(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, width, bins in (("chewie_1", 0.1, 8), ("chewie_2", 0.1, 8), ("hennig_3", 0.045, 16)):
        more = {"behavior": rng.normal(size=(30, bins, 3)).astype(np.float32), "subject": name.split("_")[0]}
        write(folder / f"{name}.npz", rng, width, bins=bins, condition=np.arange(30) % 4, **more)
    return folder


@pytest.mark.slow
def test_reaching_from_end_to_end_and_goes_on(monkeys, tmp_path):
    out, told = tmp_path / "out", []
    numbers = reaching.run(out, data=monkeys, small=True, setting=TINY, say=told.append)
    assert {path.name for path in out.iterdir()} >= {
        "index.html", "metrics.json", "scores.csv", "pooling.csv", "pooling_tuned.csv", "few.csv", "adaptation.csv",
        "tuning.csv", "scores.png", "few.png", "adaptation.png", "embedding.png", "latents.png",
        "interpolation-without-1.png", "pieces", "settings.json",
    }  # fmt: skip
    assert len(numbers["pooling"]) == 2 and {row["trials"] for row in numbers["adaptation"]} == {4, 16}
    assert numbers["data"][2]["bin (ms)"] == pytest.approx(90)
    pieces = [line for line in told if " s  " in line]
    assert len(pieces) == 1 + 6 + 2 + 2 * 2  # baselines, the plan's, alone, few trials alone and together
    (out / "pieces" / "alone-seed0" / "scratch-16.json").unlink()
    again: list = []
    assert reaching.run(out, data=monkeys, small=True, setting=TINY, say=again.append) == numbers
    assert [line.split(" s  ")[1] for line in again if " s  " in line] == ["alone-seed0/scratch-16"]
    with pytest.raises(ValueError, match="a study of other settings"):
        reaching.run(out, data=monkeys, small=True, setting=replace(TINY, latent_dim=3))
    (monkeys / "hennig_3.npz").unlink()
    with pytest.raises(ValueError, match="needed three recordings"):
        reaching.run(out, data=monkeys, small=True)


def test_decisions_from_end_to_end(tmp_path):
    rng = np.random.default_rng(0)
    for name, subject in (("s01", "A"), ("s08", "B"), ("s18", "C")):
        write(
            tmp_path / f"steinmetz_{name}_10ms.npz",
            rng,
            0.01,
            subject=f"mouse {subject}",
            condition=np.arange(30) % 3,
        )
    settings = {2: replace(TINY, shots=(4,))}
    numbers = decisions.run(
        tmp_path / "out", data=tmp_path, small=True, setting=settings, say=lambda text: None
    )
    assert next(iter(numbers)) == "20ms" and len(numbers["20ms"]["pooling"]) == 2
    adapted, tuned = (numbers["20ms"][key][0] for key in ("adaptation", "tuning"))
    assert tuned["from scratch"] == adapted["from scratch"] and tuned["fine-tuned"] != adapted["adapted"]
    for before, after in zip(numbers["20ms"]["pooling"], numbers["20ms"]["pooling_tuned"], strict=True):
        assert before["pooled"] != after["pooled, then alone"]
        assert before["single recording"] != after["single, longer"]
    assert (tmp_path / "out" / "20ms" / "embedding.png").is_file() and (
        tmp_path / "out" / "index.html"
    ).is_file()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["20ms"]["settings"]["factor"] == 2
    assert decisions.plan_of(["a", "b", "steinmetz_s09_10ms"]).held_out == ("steinmetz_s09_10ms",)


def test_the_single_recording_has_shared_dynamics(monkeys):
    """Of one recording there is nothing to adapt or to deviate from: rank 0, everything else as in the pool."""
    recs = reaching.load(monkeys, small=True)
    plan = pooling_settings.Plan("p", recs.names[:2], recs.names[2:])
    train, _ = recs.split(TINY.test_fraction, seed=0)
    fit = pooling.fit_of(train.select(plan.pooled), TINY, 0)
    assert fit.names == plan.pooled and fit.model.config["rank"] == TINY.rank
    assert fit.model.deviations and fit.guide.deviations
    alone = pooling.fit_of(train.select(plan.pooled[:1]), TINY, 0)
    assert alone.model.config["rank"] == 0 and not alone.model.deviations and not alone.guide.deviations
    assert alone.model.config.keys() == fit.model.config.keys() and alone.guide.config == fit.guide.config
