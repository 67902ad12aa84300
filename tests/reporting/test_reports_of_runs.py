"""The pages of what the command line wrote into a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from html_pages import Page, row_of
from reported import recordings

import pyro_metassm as pm
from pyro_metassm import cli
from pyro_metassm.experiments import adapting, files, runs
from pyro_metassm.reporting.asked import Told


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of `metassm fit`, and the files that it read."""
    folder = tmp_path_factory.mktemp("run")
    recs = recordings(("a", "b"))
    for name, recording in recs.items():
        pm.io.write_npz(recording, folder / f"{name}.npz")
    paths = [str(folder / f"{name}.npz") for name in recs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "fit", lambda *a, **k: pm.fit(*a, **k | {"warm_start_steps": 2}))
        patch.setattr(files, "_pictures", lambda *given: None)
        sizes = {"latent_dim": 1, "embedding_dim": 1, "rank": 1, "num_steps": 2, "num_samples": 3}
        files.run(paths, folder / "run", test_fraction=0.5, context=6, progress=False, **sizes)
    return folder / "run", paths


def command(*arguments, out: Path) -> Page:
    few = ["--num-draws", "2", "--num-samples", "3"]
    assert cli.main(["report", *map(str, arguments), "--out", str(out), *few]) == 0
    return Page(out.read_text(encoding="utf-8"))


def test_the_trials_of_a_run_are_those_that_it_held_out(run):
    folder, paths = run
    recs = pm.Recordings([pm.io.read(path) for path in paths])
    train, test = recs.split(test_fraction=0.5, seed=0)
    found, notes = runs.trials(folder, pm.load(folder / "fit"))
    numbers, _ = runs.metrics(folder)
    again = runs.split(recs, numbers, pm.load(folder / "fit"))
    assert notes == [] and found.names == ("a", "b")
    for name in found:
        ours, theirs = found[name], test[name]
        np.testing.assert_array_equal(ours.observations, theirs.observations)
        np.testing.assert_array_equal(ours.lengths, theirs.lengths)
        np.testing.assert_array_equal(ours.condition, theirs.condition)
        assert ours.bin_width == pytest.approx(theirs.bin_width)
        np.testing.assert_array_equal(again[0][name].observations, train[name].observations)
        np.testing.assert_array_equal(again[1][name].observations, theirs.observations)


def test_a_run_has_a_full_page_without_its_data(run, tmp_path, capsys):
    folder, _ = run
    page = command(folder, out=tmp_path / "r.html")
    numbers = json.loads((folder / "metrics.json").read_text())
    values = list(numbers["reconstruction_r2"].values())
    at = page.cells.index("Reconstruction, R²")
    assert page.cells[at + 2] == f"{np.mean(values):.3f} ± {np.std(values, ddof=1) / np.sqrt(2):.3f}"
    at = page.cells.index("Forecast, R², 5 bins ahead")
    means = [
        np.mean([row[m] for row in numbers["simple_forecasts"]["forecast_r2, 5 bins ahead"].values()])
        for m in ("mean rate", "psth")
    ]
    assert [float(cell.split(" ")[0]) for cell in page.cells[at + 3 : at + 5]] == pytest.approx(
        means, abs=6e-4
    )
    assert f"torch {numbers['versions']['torch']}" in page.text
    assert [alt for alt in page.of("alt") if alt.startswith("Activity of a as it was observed")]
    assert page.faults == [] and page.foreign() == []
    assert "for any browser" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_with_its_data(run, tmp_path):
    folder, paths = run
    page = command(folder, "--data", *paths, out=tmp_path / "r.html")
    assert "Scores of the trials shown here" in page.texts and "Scores as the run wrote them" in page.texts
    assert "trials fitted" in page.texts and page.faults == []


def test_a_fit_without_its_run(run, tmp_path):
    page = command(run[0] / "fit", out=tmp_path / "r.html")
    assert "No scores: no data were given, and none were written with the fit." in page.texts
    assert [alt for alt in page.of("alt") if alt.startswith("The embeddings")]


def test_damaged_files_beside_a_fit(run, tmp_path):
    folder, fit = tmp_path / "run", pm.load(run[0] / "fit")
    fit.save(folder / "fit")
    (folder / "metrics.json").write_text("{<script>")
    (folder / "posterior.nc").write_bytes(b"nothing")
    assert "metrics.json could not be read" in runs.metrics(folder)[1][0]
    found, (note,) = runs.trials(folder, fit)
    assert found is None and note.startswith("The trials of the run are not shown")
    hostile = {
        "forecast_r2": {"<b>5": {"<i>a": 0.25, "b": "1"}},
        "scores": [],
        "seconds": 3,
        "versions": {"x": ["y"]},
    }
    hostile |= {
        "reconstruction_r2": [1],
        "context": "6",
        "seed": -1,
        "test_fraction": "x",
        "trials": {"a": 1},
    }
    (folder / "metrics.json").write_text(json.dumps(hostile))
    page = command(folder, out=tmp_path / "r.html")
    assert row_of(page, "Forecast, R², <b>5 bins ahead", 3)[2] == "0.250" and not {"b", "i"} & set(page.tags)
    assert note in page.texts


def test_the_trials_of_an_adaptation_are_those_that_it_was_scored_on(fit):
    recs = recordings(("a", "b"))
    numbers = {
        "scores": {},
        "trials": {"a": {"adapt": 4}, "b": {"adapt": 4}},
        "seed": 3,
        "test_fraction": None,
    }
    for ours, theirs in zip(runs.split(recs, numbers, fit), adapting.split(recs, 4, None, 3), strict=True):
        assert ours.names == theirs.names and ours["a"].num_trials in (4, 8)
        np.testing.assert_array_equal(ours["b"].observations, theirs["b"].observations)


def test_scores_of_an_adaptation():
    of = lambda value: {"forecast_r2": {"9": {"new": value}}, "reconstruction_r2": {"new": value / 2}}
    numbers = {"scores": {"adapted": {"1": of(0.1), "8": of(0.8)}, "scratch": {"8": of(0.4)}, "constant": {}}}
    found = runs.scores(numbers)
    assert found["forecast_r2, 9 bins ahead"] == {"new": {"fit": 0.8, "from scratch": 0.4}}
    assert found["reconstruction_r2"] == {"new": {"fit": 0.4, "from scratch": 0.2}}
    assert Told(found).scores == found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}"], "needed a folder that fit.save wrote"),
        (["{tmp}/nothing"], "no such file"),
        (["{run}", "--out", "{tmp}"], "got a folder"),
        (["{run}", "--data", "{tmp}/none.npz"], "no such file"),
        (["{run}", "--num-samples", "1"], "num_samples"),
    ],
)
def test_errors_of_the_command_line_are_one_line(arguments, said, run, tmp_path, capsys):
    given = [text.format(tmp=tmp_path, run=run[0]) for text in arguments]
    given += [] if "--out" in given else ["--out", str(tmp_path / "r.html")]
    assert cli.main(["report", *given]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("metassm: ") and said in lines[0]
