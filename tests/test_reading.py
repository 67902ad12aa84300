"""What the commands read: NWB files with their bins, Zarr pools in whole, and the others."""

import functools
import json

import numpy as np
import pytest

pytest.importorskip("pynwb")
pytest.importorskip("zarr")

import nwb_layouts as layouts

import pyro_metassm as pm
from pyro_metassm import cli
from pyro_metassm.experiments import files, reading

BINS = ["--bin-width", "0.05", "--align-to", "move_onset_time", "--window", "-0.2", "0.6"]


@pytest.fixture
def mixed(tmp_path):
    layouts.centre_out(tmp_path / "one.nwb")
    rec = pm.Recording("two", np.random.default_rng(0).poisson(1.0, (12, 16, 3)), bin_width=0.05)
    pm.io.write_zarr([rec, pm.Recording("three", rec.observations, bin_width=0.05)], tmp_path / "pool.zarr")
    pm.io.write_npz(rec, tmp_path / "four.npz")
    return tmp_path


def test_files_of_several_formats(mixed):
    bins = {"bin_width": 0.05, "align_to": "move_onset_time", "window": (-0.2, 0.6), "where": None}
    recs = reading.recordings([mixed / "one.nwb", str(mixed / "pool.zarr"), mixed / "four.npz"], bins)
    assert recs.names == ("one", "two", "three", "four") and recs["one"].num_bins == 16
    with pytest.raises(ValueError, match=r"one\.nwb: needed a bin width for an NWB file, .* --bin-width"):
        reading.recordings([mixed / "one.nwb"])
    with pytest.raises(ValueError, match=r"needed an \.nwb file for bin_width, got none"):
        reading.recordings([mixed / "four.npz"], {"bin_width": 0.02})


def test_fit_from_the_shell(mixed, monkeypatch, capsys):
    monkeypatch.setattr(files, "fit", functools.partial(pm.fit, warm_start_steps=2))
    monkeypatch.setattr(files, "_pictures", lambda *args: None)
    more = [
        "--behavior",
        "Velocity/cursor_vel",
        "--where",
        "result=R,F",
        "target_id=0,1,2",
        "--units",
        "quality=good",
    ]
    sizes = ["--latent-dim", "1", "--embedding-dim", "1", "--rank", "1", "--steps", "2", "--num-samples", "2"]
    out, one = str(mixed / "out"), str(mixed / "one.nwb")
    with pytest.warns(UserWarning, match="only 9 trials"):
        status = cli.main(
            ["fit", one, "--out", out, *BINS, *more, "--condition", "target_id", "--lag", "0.1", *sizes]
        )
    assert status == 0, capsys.readouterr().err
    numbers = json.loads((mixed / "out" / "metrics.json").read_text())
    assert set(numbers["velocity_r2"]) == {"one"} and numbers["likelihood"] == "Poisson"
    ahead = ["--context", "8", "--horizon", "8", "--num-samples", "2"]
    assert (
        cli.main(["forecast", out, one, "--out", f"{out}.nc", *BINS, "--units", "quality=good", *ahead]) == 0
    )
    capsys.readouterr()
    assert cli.main(["fit", one, "--out", out, *BINS, "--where", "result"]) == 2
    assert "result: needed COLUMN=VALUE" in capsys.readouterr().err
    assert cli.main(["fit", one, "--out", out, *BINS, "--where", "outcome=R"]) == 2
    assert "needed a column 'outcome' of the trials, got only go_cue_time" in capsys.readouterr().err
    assert cli.main(["fit", one, "--out", out]) == 2
    assert "needed a bin width" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "column", "matches"),
    [
        ("a=1", "a", [1, 1.0, "1"]),
        ("a=True", "a", [True, "True"]),
        ("a=x,2", "a", ["x", 2]),
        ("a=b=c", "a", ["b=c"]),
    ],
)
def test_choices_on_the_command_line(text, column, matches):
    got, values = cli._choice(text)
    assert got == column and all(value in values for value in matches)
