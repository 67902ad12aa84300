"""Files of earlier versions are read by this one, and say what they said then; tests/corpus/make.py writes them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from corpus import make, mine

import pyro_metassm as pm

VERSIONS = sorted(
    path for path in (Path(__file__).parent / "corpus").iterdir() if (path / "recordings").is_dir()
)
FITS = [path.parent for folder in VERSIONS for path in sorted(folder.glob("*/fit.json"))]
KINDS = {"gaussian", "counts", "mixed", "double", "custom", "subjects", "adapted"}


def recordings(version: Path) -> pm.Recordings:
    return pm.Recordings([pm.io.read(path) for path in sorted((version / "recordings").glob("*.npz"))])


def test_the_corpus_has_every_kind_of_this_version_and_stays_small():
    assert pm.__version__ in [folder.name for folder in VERSIONS], "run tests/corpus/make.py"
    assert {path.name for path in FITS if path.parent.name == pm.__version__} == KINDS
    files = [path for folder in VERSIONS for path in folder.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 50_000


@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_recordings_are_read(version):
    expected = make.data()
    for name, recording in recordings(version).items():
        other = expected[name]
        for field in ("values", "mask", "lengths", "condition", "behavior", "neuron_ids", "held_out_neurons"):
            assert np.array_equal(
                getattr(recording, field), getattr(other, field), equal_nan=field == "behavior"
            ), field
        assert recording.bin_width == other.bin_width
        assert recording.attrs["subject"] == other.attrs["subject"] and recording.attrs["area"] == "ä"
        assert np.array_equal(recording.attrs["trials"]["day"], other.attrs["trials"]["day"])


@pytest.mark.parametrize("folder", FITS, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_fit_says_what_it_said(folder):
    """Every part of model and guide at given values. Other versions of torch round in another order: a thousand ulp."""
    fit = pm.load(folder, custom=mine.CUSTOM)
    expected = json.loads((folder / "numbers.json").read_text())
    found = make.numbers(fit, recordings(folder.parent).select(fit.names))
    eps = torch.finfo(fit.dtype).eps
    assert list(found) == list(expected) == list(fit.names)
    for name, parts in expected.items():
        assert parts.keys() == found[name].keys()
        for part, values in parts.items():
            np.testing.assert_allclose(
                found[name][part], values, rtol=1e3 * eps, atol=1e3 * eps, err_msg=f"{name} {part}"
            )
    assert fit.history.sizes["step"] == (2 if folder.name == "adapted" else 6)
    assert fit.attrs["bin_width"] == 0.02


def test_a_class_that_is_not_given_is_named_with_its_import():
    (folder,) = [path for path in FITS if path.name == "custom" and path.parent.name == pm.__version__]
    with pytest.raises(
        ValueError, match=r"class Pulled \(from corpus.mine\).*`from corpus.mine import Pulled` and pass cust"
    ):
        pm.load(folder)


@pytest.mark.filterwarnings("ignore:checkpoint .* was written elsewhere:UserWarning")
@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_a_run_goes_on(version, tmp_path):
    """To the history of the whole of it, as far as other versions of torch draw and round as then."""
    expected = json.loads((version / "run" / "history.json").read_text())
    shutil.copytree(version / "run", tmp_path / "run")
    fit = make.run(recordings(version).drop(["c"]), tmp_path / "run")
    assert set(expected) == set(fit.history.data_vars) - {"seconds"}
    for key, column in expected.items():
        np.testing.assert_allclose(fit.history[key][:4], column[:4], rtol=1e-12, err_msg=key)
        np.testing.assert_allclose(fit.history[key], column, rtol=1e-3, err_msg=key)
