"""Studies: tiny ones from end to end, and their methods."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_study import NAMES, NUMBERS, ODD, TIMED, TINY, Texts, quiet

import pyro_metassm as pm
from pyro_metassm import cli
from pyro_metassm.experiments import (
    bifurcations,
    harder,
    limit_cycles,
    methods,
    oracle,
    scores,
    study,
    systems,
    tables,
)
from pyro_metassm.experiments.methods import METHODS, Method, Sizes
from pyro_metassm.experiments.scores import Scoring
from pyro_metassm.experiments.systems import LimitCycles, few_trials, tag


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a bifurcation study."""
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "odd", Method(ODD, pm.models.GEPS))
        bifurcations.run(out, names=NAMES, settings=TINY, say=quiet)
    return out


# ---- methods ---------------------------------------------------------------------------------------------


def test_a_revised_method_revises_every_recording_by_its_own_trials_alone(done):
    """Draws of trials of one recording, adapted side by side, must say nothing of each other."""
    pool, test = TINY.family.held_out()
    name = test.names[0]
    new = few_trials(pool, 1, 2, seed=0)
    fit = methods.adapt(METHODS["meta"], study.trained(done, "meta", 0), new, Sizes(), TINY.steps, seed=0)
    drawn = [name + tag(draw) for draw in range(2)]
    found = dict(
        (names[0], one) for one, names in methods.corrected(METHODS["meta-revised"], fit, new, drawn)
    )
    assert list(found) == drawn
    for one in drawn:
        alone = pm.revise(fit, new.select([one]), num_trials=1)
        assert found[one].attrs["revision"] == alone.attrs["revision"]
    assert [(one is fit, names) for one, names in methods.corrected(METHODS["meta"], fit, new, drawn)] == [
        (True, drawn)
    ]


def test_the_plain_adaptation_leaves_what_is_shared():
    recs, _ = TINY.family.training(seed=0)
    pool, _ = TINY.family.held_out()
    fit = methods.train(methods.METHODS["meta-plain"], recs, Sizes(), TINY.steps, seed=0)
    new = systems.few_trials(pool, 2, 1, seed=0)
    adapted = methods.adapt_plainly(fit, new, TINY.steps, seed=0)
    assert adapted.names == new.names and adapted.history.sizes["step"] == TINY.steps.plain_adapt_steps
    tables_of = {"read_out.weight", "read_out.bias", "observation.log_sd"}
    state = fit.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in adapted.model.state_dict().items() if k not in tables_of)
    encoder = fit.guide.rnn.state_dict()
    assert all(torch.equal(v, encoder[k]) for k, v in adapted.guide.rnn.state_dict().items())
    untrained = methods.adapt_plainly(fit, new, replace(TINY.steps, plain_adapt_steps=0), seed=0)
    assert not torch.equal(untrained.model.read_out.weight, adapted.model.read_out.weight)


def test_a_method_may_take_the_fit_of_another(tmp_path):
    chosen = {"a": Method("a"), "b": Method("b", trained_as="a", adapt={"num_steps": 0})}
    results = study.run(replace(TINY, shots=(1,), draws=(1,)), chosen, [0], tmp_path, say=quiet)
    assert "fit" in results["a", 0] and "fit" not in results["b", 0]
    with pytest.raises(ValueError, match="takes the fit of a"):
        study.run(TINY, {"b": chosen["b"]}, [0], tmp_path, say=quiet)


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="number of draws"):
        replace(TINY, draws=(1,))
    with pytest.raises(ValueError, match="at most 3 trials"):
        replace(TINY, shots=(1, 4))
    with pytest.raises(ValueError, match="context and horizon"):
        replace(TINY, scoring=Scoring())


# ---- from end to end -------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_forecasts(done):
    table = {(row["method"], row["n_s"]): row for row in tables.read(done / "table1.csv")}
    assert set(table) == {(name, n) for name in NAMES for n in (1, 2)}
    forecasts = tables.read(done / "forecast.csv")
    unseen = {row["recording"] for row in forecasts}
    assert len(unseen) == 3 and len(forecasts) == len(NAMES) * 3 * (2 + 1) * TINY.scoring.horizon
    for (name, n), row in table.items():
        r2, tops = [], []
        for recording in unseen:
            found = [
                r for r in forecasts
                if (r["method"], r["n_s"], r["recording"], r["k"]) == (name, n, recording, 4)
            ]  # fmt: skip
            assert len(found) == dict(zip(TINY.shots, TINY.draws, strict=True))[n]
            r2.append(np.mean([max(r["r2"], -1.0) for r in found]))
            tops.append(np.mean([r["ceiling"] for r in found]))
        assert row["mean"] == pytest.approx(np.mean(r2)) and row["ceiling"] == pytest.approx(np.mean(tops))
        assert row["sem"] == pytest.approx(np.std(r2, ddof=1) / np.sqrt(3))
    adaptations = tables.read(done / "adaptation.csv")
    assert all(
        (row["rollout_error"] is None) == (row["method"] in ("single", "shared-plain")) for row in adaptations
    )
    assert all(row["flow_r2"] <= 1 and row["alignment_r2"] <= 1 for row in adaptations)


def test_flow_errors_are_of_every_fit_and_adaptation(done):
    rows = tables.read(done / "flow_error.csv")
    trained = [row for row in rows if row["n_s"] is None]
    assert {row["method"] for row in trained} == {"meta", "shared-plain", "odd"} and len(trained) == 3 * 6
    adapted = {(r["method"], r["n_s"], r["draw"], r["recording"]): r for r in rows if r["n_s"] is not None}
    given = tables.read(done / "adaptation.csv")
    assert len(adapted) == len(given) == len(NAMES) * 3 * (2 + 1)
    for row in given:
        error = adapted[row["method"], row["n_s"], row["draw"], row["recording"]]["flow_error"]
        assert error == pytest.approx(1 - row["flow_r2"])
    # The saved fit gives what was written when it was made.
    _, test = TINY.family.training(seed=0)
    one = test.select(["hopf mu=0.5"]).crop(0, 14)
    flow_r2, _ = scores.flow_scores(study.trained(done, "meta", 0), one, seed=0)
    (row,) = (r for r in trained if (r["method"], r["recording"]) == ("meta", "hopf mu=0.5"))
    assert row["flow_error"] == pytest.approx(1 - flow_r2, rel=1e-4)
    text = (done / "index.html").read_text(encoding="utf-8")
    for row in json.loads((done / "metrics.json").read_text())["flow_error"]:
        assert row["mean"] <= 2.0 and f"<td>{tables.plus_minus(row)}</td>" in text


@pytest.mark.parametrize("broken", ["dynamics", "guide"])
def test_what_explodes_scores_minus_infinity(done, broken):
    """A plain recipe may end in dynamics that leave the finite numbers: a score, not the end of the study."""
    _, test = TINY.family.training(seed=0)
    fit = study.trained(done, "meta", 0)
    with torch.no_grad():
        if broken == "dynamics":
            fit.model.dynamics.layers[-1].weight *= 1e30
        else:
            fit.guide.read_in.bias.fill_(torch.nan)
    for row in scores.rows(fit, test, TINY.scoring, counts=False, embeds=True, seed=0):
        assert set(row["r2"]) == {-np.inf} and row["flow_r2"] < -1e30
        assert np.isfinite(row["ceiling"]).all()


def test_the_page_says_what_the_tables_say(done):
    parser = Texts()
    text = (done / "index.html").read_text(encoding="utf-8")
    parser.feed(text)
    assert ODD in parser.texts and "b" not in parser.tags
    for row in tables.read(done / "table1.csv"):
        assert f"{row['mean']:.3f} ± {row['sem']:.3f}" in parser.texts
    for source in parser.sources:
        assert (done / source).is_file() and (done / source).stat().st_size
    assert "http" not in text
    pictures = {"flow.png", "forecast.png", "table1.png", "embedding.png", "trials.png"}
    assert pictures <= set(parser.sources)
    numbers = json.loads((done / "metrics.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert numbers["verdicts"] and all(line in parser.texts for line in numbers["verdicts"])
    assert numbers["settings"] == TINY.as_json() and set(numbers["seconds"]) == set(NAMES)


def test_embeddings_of_known_and_new_recordings(done):
    rows = tables.read(done / "embedding.csv")
    assert {row["method"] for row in rows} == {"meta", "meta-revised", "odd"}
    of_meta = [row for row in rows if row["method"] == "meta"]
    assert sum(row["n_s"] is None for row in of_meta) == 6 and len(of_meta) == 6 + 3 * 3
    mapped = tables.read(done / "map.csv")
    assert {(row["family"], row["of"]) for row in mapped} == {
        ("duffing", "embedding"), ("duffing", "a"), ("duffing", "b"), ("hopf", "embedding"), ("hopf", "mu"),
    }  # fmt: skip


def test_what_is_there_is_not_done_again_and_the_rest_is_the_same(done, tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "odd", Method(ODD, pm.models.GEPS))
    kept = {p: p.stat().st_mtime_ns for p in (done / "pieces").rglob("*.json")}
    before = {p.name: p.read_bytes() for p in done.iterdir() if p.suffix == ".csv"}
    lost = [
        done / "pieces" / "meta-seed0" / "adapted-1.json",
        done / "pieces" / "single-seed0" / "adapted-2.json",
    ]
    for path in lost:
        path.unlink()
    said = []
    bifurcations.run(done, names=NAMES, settings=TINY, say=said.append)
    assert [line.split("  ")[-1] for line in said[:2]] == [
        "meta, seed 0: adapted with 1", "single, seed 0: adapted with 2",
    ]  # fmt: skip
    after = {p.name: p.read_bytes() for p in done.iterdir() if p.suffix == ".csv"}
    assert {n: b for n, b in after.items() if n not in TIMED} == {
        n: b for n, b in before.items() if n not in TIMED
    }
    folders = {path.with_suffix("") for path in lost}
    for path, time in kept.items():
        again = path in lost or path.parent in folders
        assert (path.stat().st_mtime_ns == time) != again, path
    with pytest.raises(ValueError, match=r"study of other settings \(family\)"):
        bifurcations.run(done, names=["meta"], settings=TINY, held_out_seed=5, say=quiet)


@pytest.mark.slow
def test_processes_give_what_one_gives(done, tmp_path):
    names = ["single", "shared-plain"]
    bifurcations.run(tmp_path, names=names, settings=TINY, workers=2, say=quiet)
    ours, theirs = (tables.read(folder / "forecast.csv") for folder in (tmp_path, done))
    assert ours == [row for row in theirs if row["method"] in names]


def test_limit_cycles(tmp_path):
    settings = [
        replace(
            TINY, family=LimitCycles(velocities=velocities, **NUMBERS), sizes=Sizes(2, 1), shots=(), draws=()
        )
        for velocities in ((2.0, 5.0), (1.0, 3.0, 5.0))
    ]
    numbers = limit_cycles.run(tmp_path, settings=settings, say=quiet)
    assert {(row["num_recordings"], row["method"]) for row in numbers["table"]} == {
        (m, name) for m in (2, 3) for name in ("meta", "shared")
    }
    assert all(0 <= row["spearman"] <= 1 for row in numbers["rank_correlation"])
    _, test = settings[1].family.training(seed=0)
    tops = oracle.ceilings(test.crop(0, 14), context=8, horizon=6)
    for row in tables.read(tmp_path / "forecast.csv"):
        assert row["num_recordings"] == 2 or row["ceiling"] == tops[row["recording"]][row["k"] - 1]
    parser = Texts()
    parser.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert {"flow_M2.png", "flow_M3.png", "embedding_M3.png", "forecast.png"} <= set(parser.sources)
    assert all((tmp_path / source).is_file() for source in parser.sources)


@pytest.mark.parametrize(
    "parts",
    [
        ["noise-10", "noise-100", "lorenz"],
        pytest.param([name for name in harder.NAMES if name != "ablation"], marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_harder_variants(parts, tmp_path):
    base = replace(TINY, shots=(1,), draws=(1,), shown=0)
    numbers = harder.run(tmp_path, parts=parts, settings=base, say=quiet)
    rows = {(row["variant"], row["n_s"]): row for row in numbers["table"]}
    assert set(rows) == {(variant, n) for variant in parts for n in (0, 1)}
    assert {row["method"] for row in numbers["table"] if row["n_s"]} == {"meta", "meta-revised"}
    assert all(np.isfinite(row["mean"]) and row["ceiling"] <= 1 for row in rows.values())
    tops = [rows[variant, 1]["ceiling"] for variant in ("noise-10", "noise-100")]
    assert tops[0] > tops[1]
    made = json.loads((tmp_path / "lorenz" / "pieces" / "meta-seed0" / "adapted-1.json").read_text())
    unseen = replace(harder.variants(base)["lorenz"].settings.family).unseen(1)
    for row in made["rows"]:
        time = unseen.truth[row["recording"]].attrs["lyapunov_time"]
        assert row["k"] == min(round(time / unseen.bin_width), base.scoring.horizon)


@pytest.mark.slow
def test_the_way_to_our_recipe(tmp_path):
    base = replace(TINY, shots=(1,), draws=(1,), shown=0)
    numbers = harder.run(tmp_path, parts=["ablation"], settings=base, say=quiet)
    assert {row["method"] for row in numbers["table"] if row["n_s"] == 1} == set(harder.ABLATION)
    parser = Texts()
    parser.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert all(method.label in parser.texts for method in harder.ABLATION.values())
    for row in numbers["table"]:
        assert f"{tables.plus_minus(row)} ({row['ceiling']:.3f})" in parser.texts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bifurcations", "--methods", "meta", "nothing"], "got nothing"),
        (["bifurcations", "--seeds", "-3"], "needed an integer of at least 0, got -3"),
        (["limit_cycles", "--methods", "nothing"], "got nothing"),
        (["harder", "--parts", "nothing"], "got nothing"),
    ],
)
def test_errors_of_the_command_line_are_one_line(arguments, said, tmp_path, capsys):
    assert cli.main(["experiment", *arguments, "--out", str(tmp_path / "out"), "--small"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("metassm: ") and said in lines[0]


def test_the_command_line_goes_on_with_a_study(done, monkeypatch, capsys):
    monkeypatch.setattr(bifurcations, "SMALL", TINY)
    arguments = ["experiment", "bifurcations", "--small", "--out", str(done), "--methods", "meta", "single"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Meta-dynamical SSM" in printed and "ceiling" in printed and str(done) in printed
