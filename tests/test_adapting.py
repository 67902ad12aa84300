"""`metassm adapt`: what it writes is what the library's own calls say, and what it cannot use it refuses."""

import csv
import functools
import json
import re

import numpy as np
import pytest
import xarray as xr
from fits import QUICK, parts

import pyro_metassm as pm
from pyro_metassm import cli
from pyro_metassm.experiments import adapting, adapting_report, files

NAMES = ("new_1", "new_2")
QUICKLY = {"num_starts": 8, "search_steps": 6}
OPTIONS = {"num_steps": 3, "num_samples": 3, "save_trials": 2, "progress": False, "device": "cpu"}


def recordings(names, bin_width=0.03, **more):
    recs = pm.simulate.limit_cycles([2.5, 4.0], num_trials=12, num_steps=16, num_neurons=6, **more)
    return [
        pm.Recording(name, r.observations, bin_width=bin_width)
        for name, r in zip(names, recs.values(), strict=True)
    ]


def written(folder, recs):
    for recording in recs:
        pm.io.write_npz(recording, folder / f"{recording.name}.npz")
    return [str(folder / f"{recording.name}.npz") for recording in recs]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fits of simulated recordings in `gaussian/fit` and `counts`, and two new recordings in files."""
    path = tmp_path_factory.mktemp("adapting")
    for name, noise, family in (
        ("gaussian/fit", "gaussian", pm.likelihoods.Gaussian),
        ("counts", "poisson", pm.likelihoods.Poisson),
    ):
        recs = pm.Recordings(recordings(("old_1", "old_2"), noise=noise, seed=1))
        pm.fit(*parts(recs, family), recs, **QUICK).save(path / name)
    written(path, recordings(NAMES, seed=2))
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(adapting, "adapt", functools.partial(pm.adapt, **QUICKLY))
    monkeypatch.setattr(adapting, "START", 4)


@pytest.fixture(scope="module")
def done(folder):
    """The command, once, on two recordings with up to two trials; what it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapting, "adapt", functools.partial(pm.adapt, **QUICKLY))
        patch.setattr(adapting, "START", 4)
        out = folder / "out"
        new = [folder / f"{name}.npz" for name in NAMES]
        numbers = adapting.run(folder / "gaussian", new, out, num_trials=2, scratch_steps=2, **OPTIONS)
    return out, numbers


def rows(out):
    with open(out / "adaptation.csv", newline="") as file:
        return list(csv.DictReader(file))


def value(table, **where):
    found = [row["value"] for row in table if all(row[key] == v for key, v in where.items())]
    assert len(found) == 1
    return float(found[0])


def test_numbers_of_trials_double():
    assert adapting.numbers_of_trials(1) == [1]
    assert adapting.numbers_of_trials(8) == [1, 2, 4, 8]
    assert adapting.numbers_of_trials(11) == [1, 2, 4, 8, 11]


def test_scores_and_embeddings_are_those_of_direct_calls(done, folder):
    out, numbers = done
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(numbers))
    known = pm.load(folder / "gaussian" / "fit")
    recs = pm.Recordings([pm.io.read(folder / f"{name}.npz") for name in NAMES])
    pool, test = recs.split(test_fraction=10 / 12, seed=0)
    table = rows(out)
    for number in (1, 2):
        few = pool.take_trials(number, seed=0)
        adapted = pm.adapt(known, few, num_steps=3, seed=0, progress=False, **QUICKLY)
        score = pm.metrics.forecast_r2(adapted, test, context=8, horizon=8, num_samples=3, seed=0)
        again = pm.metrics.reconstruction_r2(adapted, test, num_samples=3, seed=0)
        for name in NAMES:
            where = {"recording": name, "method": "adapted", "num_trials": str(number)}
            for k in (1, 2, 5, 8):
                assert value(table, **where, quantity="forecast_r2", index=str(k)) == pytest.approx(
                    float(score.sel(recording=name, horizon_step=k))
                )
            assert adapting_report.headline(numbers, "adapted", name, str(number)) == pytest.approx(
                float(score.sel(recording=name, horizon_step=8))
            )
            assert value(table, **where, quantity="reconstruction_r2") == pytest.approx(
                float(again.sel(recording=name))
            )
            mean, variance = adapted.statistics[adapted.names.index(name)].tolist()
            assert value(table, **where, quantity="embedding_mean", index="1") == pytest.approx(mean)
            assert value(table, **where, quantity="embedding_sd", index="1") == pytest.approx(variance**0.5)
            found = adapted.attrs["adaptation"][name]
            assert value(table, **where, quantity="rollout_error") == pytest.approx(found["rollout_error"])
            assert value(table, **where, quantity="embedding_spread", index="1") == pytest.approx(
                found["embedding_spread"][0]
            )


def test_the_constant_is_the_mean_of_the_trials_to_adapt_from(done, folder):
    _, numbers = done
    pool, test = pm.Recordings([pm.io.read(folder / "new_1.npz")]).split(test_fraction=10 / 12, seed=0)
    y, few = (recs["new_1"].observations.astype(float) for recs in (test, pool))
    expected = 1 - ((y[:, -1] - few.mean((0, 1))) ** 2).sum() / ((y[:, -1] - y[:, -1].mean(0)) ** 2).sum()
    assert adapting_report.headline(numbers, "constant", "new_1", "2") == pytest.approx(expected)


def test_the_model_from_scratch_knows_one_recording_and_no_embedding(done, folder):
    _, numbers = done
    known = pm.load(folder / "gaussian" / "fit")
    recs = pm.Recordings([pm.io.read(folder / "new_2.npz")])
    pool, test = recs.split(test_fraction=10 / 12, seed=0)
    single = adapting.from_scratch(known, pool.take_trials(2), num_steps=2, seed=0, progress=False)
    assert single.names == ("new_2",)
    assert (
        single.model.config == known.model.config | {"rank": 0} and single.guide.config == known.guide.config
    )
    score = pm.metrics.forecast_r2(single, test, context=8, horizon=8, num_samples=3, seed=0)
    found = adapting_report.headline(numbers, "scratch", "new_2", "2")
    assert found == pytest.approx(float(score.sel(recording="new_2", horizon_step=8)))


def test_what_is_written(done):
    out, numbers = done
    adapted = pm.load(out / "fit")
    assert adapted.names == ("old_1", "old_2", *NAMES)
    assert (
        adapted.attrs["adaptation"]["new_1"]["rollout_error"]
        == numbers["embedding"]["new_1"]["2"]["rollout_error"]
    )
    assert numbers["trials"] == {name: {"adapt": 2, "test": 10} for name in NAMES}
    assert set(numbers["embedding_known"]) == {"old_1", "old_2"}
    for file, group, bins in (("posterior", "posterior", 16), ("forecast", "predictions", 8)):
        with xr.open_datatree(out / f"{file}.nc", engine="h5netcdf") as tree:
            rates = tree["new_2"][group]["rates"]
            assert dict(rates.sizes) == {"chain": 1, "draw": 3, "trial": 2, "time": bins, "neuron": 6}
    assert {path.suffix for path in out.iterdir()} == {"", ".csv", ".json", ".nc", ".png"}
    assert sorted(path.name for path in out.glob("*.png")) == ["adaptation.png", "traces.png"]


def test_trials_are_nested_and_never_tested_on(folder):
    recs = pm.Recordings([pm.io.read(folder / f"{name}.npz") for name in NAMES])

    def trials(some):
        return {y.tobytes() for y in some["new_1"].observations}

    for fraction, number in ((None, 8), (0.5, 6)):
        pool, test = adapting.split(recs, 4, fraction, seed=3)
        assert len(trials(pool)) == 4 and len(trials(test)) == number
        assert not trials(pool) & trials(test)
        subsets = [trials(pool.take_trials(n, seed=3)) for n in adapting.numbers_of_trials(4)]
        assert subsets[0] < subsets[1] < subsets[2] == trials(pool)
    held_out = recs.split(test_fraction=0.5, seed=3)[1]
    assert trials(held_out) == trials(test)  # those of `metassm fit`


def test_counts_are_scored_in_bits(folder, tmp_path, capsys):
    held_out = np.arange(6) == 5
    recs = [
        pm.Recording(r.name, r.observations, bin_width=0.03, held_out_neurons=held_out)
        for r in recordings(("a", "b"), noise="poisson", seed=4)
    ]
    new, out = written(tmp_path, recs[:1]), tmp_path / "out"
    arguments = ["adapt", str(folder / "counts"), *new, "--out", str(out), "--trials", "2", "--steps", "2"]
    arguments += ["--num-samples", "3", "--scratch-steps", "0", "--context", "6", "--horizon", "4"]
    assert cli.main([*arguments, "--train", "read_in", "read_out", "embedding", "--device", "cpu"]) == 0
    numbers = json.loads((out / "metrics.json").read_text())
    assert (numbers["score"], numbers["context"], numbers["horizon"]) == ("forecast_bits_per_spike", 6, 4)
    adapted = pm.load(out / "fit")
    pool, test = pm.Recordings(recs[:1]).split(test_fraction=10 / 12, seed=0)
    draws = {"num_samples": 3, "seed": 0}
    expected = {
        "forecast_bits_per_spike": pm.metrics.fp_bps(adapted, test, context=6, horizon=4, **draws),
        "bits_per_spike": pm.metrics.rate_bps(adapted, test, null=pool, **draws),
        "co_bps": pm.metrics.co_bps(adapted, test, null=pool, **draws),
    }
    for score, of in expected.items():
        assert numbers["scores"]["adapted"]["2"][score]["a"] == pytest.approx(float(of.sel(recording="a")))
    rates = np.maximum(pool["a"].values.sum((0, 1)), 0.5) / (2 * 16)
    spikes = test["a"].observations[:, 6:10]
    constant = pm.metrics.bits_per_spike(np.broadcast_to(rates, spikes.shape), spikes)
    assert adapting_report.headline(numbers, "constant", "a", "2") == pytest.approx(constant)
    assert "scratch" not in numbers["scores"]
    printed = capsys.readouterr().out
    assert "forecast_bits_per_spike of the 4 bins" in printed and f"results and pictures in {out}" in printed


def result(errors, adapted, scratch, known=()):
    """Numbers as `run` makes them, of one recording and 1, 2 trials."""
    scores = {"adapted": adapted, "scratch": scratch, "constant": [-0.5, -0.1]}
    return {
        "score": "forecast_r2",
        "horizon": 5,
        "rollout_error_known": dict(enumerate(known)),
        "embedding": {
            "a": {
                str(2**n): {"mean": [0.0], "sd": [1.0]} | ({} if error is None else {"rollout_error": error})
                for n, error in enumerate(errors)
            }
        },
        "scores": {
            method: {str(2**n): {"forecast_r2": {"5": {"a": value}}} for n, value in enumerate(values)}
            for method, values in scores.items()
            if values
        },
    }


@pytest.mark.parametrize(
    ("numbers", "answer", "words"),
    [
        (result([2.0, 0.01], [0.5, 0.9], [0.1, 0.905]), True, "the family fits: .* 1 %.* better with 1 trials$"),
        (result([0.1, 0.9], [0.5, -0.4], [-3, 0.8]), False, "does not fit: .* 90 %.* and worse with 2 trials$"),
        (result([0.9, 0.9], [-1, -0.4], [-3, -0.2]), None, "cannot be told"),  # as of noise
        (result([0.9, 0.9], [0.1, 0.2], [0.1, 0.2]), None, "cannot be told.* alike$"),
        (result([0.9, 0.9], [-1, -0.4], []), None, "latents$"),
        (result([0.2, 0.019], [0.5, 0.9], [0.1, 0.1], [0.002, 0.01]), True, "fits: .* 2 % .*[(]of known .*, 1 % at"),
        (result([0.2, 0.021], [0.5, 0.9], [0.1, 0.1], [0.002, 0.01]), False, "does not fit: .* better with 1, 2 tr"),
        (result([0.9, 0.9], [-1, -0.4], [-3, -0.2], [0.5, np.nan]), True, "fits: .* 90 % .* 50 % at most"),
        (result([0.9, 0.9], [-1, -0.4], [-3, -0.2], [0.3]), None, "cannot be told"),
        (result([None, None], [0.5, 0.9], [0.1, 0.9]), None, "was not asked"),
    ],
)  # fmt: skip
def test_whether_the_family_fits_is_said_by_a_rule(numbers, answer, words):
    assert adapting_report.fits(numbers, "a") is answer
    *table, last = adapting_report.lines(numbers)
    assert re.search(words, last)
    assert table[2].split()[:3] == [
        "a",
        "1",
        f"{numbers['scores']['adapted']['1']['forecast_r2']['5']['a']:.4f}",
    ]


@pytest.mark.parametrize("size", [1, 3])
def test_the_picture_marks_what_lies_below_it(size):
    import matplotlib.pyplot as plt

    numbers = result([0.1, 0.1], [-7.0, 0.9], [-9.0, 0.2])
    for e in numbers["embedding"]["a"].values():
        e |= {"mean": [0.5] * size, "sd": [0.1] * size}
    numbers["embedding_known"] = {"b": {"mean": [0.0] * size, "sd": [0.1] * size}}
    numbers["embedding_prior"] = {"mean": [0.0] * size, "sd": [1.0] * size}
    _, (left, right) = plt.subplots(1, 2)
    adapting_report._scores(left, numbers)
    (adapting_report._line if size == 1 else adapting_report._map)(right, numbers)
    arrows = [line for line in left.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert [float(line.get_xdata()[0]) for line in arrows] == pytest.approx([-0.025, 0.025])
    assert left.get_ylim()[0] > -1.2 and right.get_title().endswith("(prior: mean 0, sd 1)")


@pytest.mark.parametrize(
    ("make", "more", "words"),
    [
        (lambda: recordings(("old_1", "b"))[0], [], "'old_1': needed a recording that the fit does not know"),
        (lambda: recordings("ab", bin_width=0.05)[0], [], "bins of 0.03 s, got bins of 0.05 s"),
        (lambda: recordings("ab")[0], ["--trials", "12"], "'a': needed more than the 12 trials"),
        (lambda: recordings("ab")[0], ["--trials", "0"], "num_trials"),
        (lambda: recordings("ab")[0], ["--test-fraction", "0.5"], "8 trials to adapt from beside 6 to score on, got 6"),
        (lambda: recordings("ab")[0], ["--context", "9", "--horizon", "8"], "context [+] horizon = 9 [+] 8 bins, got"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused_in_one_line(make, more, words, folder, tmp_path, capsys):
    (path,) = written(tmp_path, [make()])
    arguments = ["adapt", str(folder / "gaussian"), path, "--out", str(tmp_path / "out"), *more]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("metassm: ") and re.search(words, error)


def test_negative_counts_are_found_in_any_trial(folder, tmp_path, capsys):
    (recording, _) = recordings("ab", noise="poisson")
    y = recording.observations.copy()
    y[-1, 0, 0] = -1
    (path,) = written(tmp_path, [pm.Recording("a", y, bin_width=0.03)])
    assert cli.main(["adapt", str(folder / "counts"), path, "--out", str(tmp_path / "out")]) == 2
    assert "recording 'a'" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["nothing", ""])
def test_a_folder_without_a_fit_and_a_file_that_is_not_there(run, folder, tmp_path, capsys):
    where = folder / run if run else folder / "gaussian"
    new = [str(folder / "new_1.npz")] if run else ["no.npz"]
    assert cli.main(["adapt", str(where), *new, "--out", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_fit_is_found_in_its_folder_and_beside_what_was_written_with_it(folder):
    assert files.load_fit(folder / "gaussian").names == files.load_fit(folder / "gaussian" / "fit").names
