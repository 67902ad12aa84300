"""Files that are no fit are refused by name, before they cost memory or run code."""

import json
import struct
import sys
from pathlib import Path

import pytest
import torch

import pyro_metassm as pm
from pyro_metassm import saving
from pyro_metassm._budget import Budget
from pyro_metassm.neurons import NeuronTable


def edit(folder: Path, change) -> None:
    header = json.loads((folder / "fit.json").read_text())
    change(header)
    (folder / "fit.json").write_text(json.dumps(header))


def put(*keys, value):
    def change(header):
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


def config(**values):
    return lambda header: header["model"]["config"]["dict"].update(values)


HUGE = 2**40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", value=2), r"format 1 or older, got 2, written by \{.*torch.*update pyro-metassm"),
        (put("format", value="1"), "number `format`"),
        (put("names", value=["a", "a", "b"]), "different names"),
        (put("names", value=["a", "b/c", "d"]), 'without "/"'),
        (put("names", value=["a"]), "unequal|needs at least|does not fit|differ|cannot"),
        (put("names", value={"a": 1}), "'names' as list"),
        (put("num_neurons", value=[3, 4]), "neuron table"),
        (put("num_neurons", value=[3, True, 4]), "numbers of neurons above 0"),
        (put("num_neurons", value=[3, 0, 4]), "numbers of neurons above 0"),
        (put("num_neurons", value=[1, 1, 1]), "do not fit the configuration"),
        (put("num_neurons", value=[1, 1, HUGE]), "far beyond what the file holds"),
        (put("num_neurons", value=[1, 1, 10**30]), "zeros|too large|far beyond|verflow"),
        (config(latent_dim=3), "do not fit the configuration"),
        (config(latent_dim=HUGE), "far beyond what the file holds"),
        (config(latent_dim=10**30), "cannot be built"),
        (config(latent_dim=-1), "cannot be built .*latent_dim: needed an integer >= 1"),
        (config(hidden_dim=10**6), "far beyond what the file holds"),
        (config(rank=10**8), "far beyond what the file holds"),
        (config(embedding_dim="1"), "cannot be built"),
        (config(likelihood="Gaussian"), "cannot be built"),
        (config(likelihood={"class": "Linear", "module": "torch.nn"}), r"class Linear \(from torch.nn\)"),
        (config(likelihood={"class": "Gauss", "module": "pyro_metassm.likelihoods"}), "class Gauss"),
        (config(likelihood={"eval": "1"}), "an object with eval"),
        (put("guide", "config", "dict", "hidden_dim", value=HUGE), "far beyond what the file holds"),
        (put("guide", "class", value="MetaSSM"), "cannot be built"),
        (put("model", "class", value="Recording"), "class Recording"),
        (put("model", "class", value=None), "got an object with class, module"),
        (put("model", value=[]), "'model' as dict"),
        (put("dtype", value="float16"), "float32 or float64"),
        (put("dtype", value="float64"), r"needed statistics \(3, ...\) of torch.float64"),
        (put("seed", value=1.5), "'seed' as int"),
        (put("attrs", value=[]), "'attrs' as dict"),
        (
            put("history", "attrs", value={"class": "MetaSSM", "module": "pyro_metassm.models"}),
            "'attrs' as an encoded",
        ),
        (put("history", "variables", "elbo", "dims", value=["step", "time"]), "elbo"),
        (put("history", "variables", "elbo", "dims", value="step"), "'dims' as list"),
        (put("history", "variables", "loss", value={"dims": [], "attrs": {"dict": {}}}), "loss"),
        (put("sha256", value="0"), "damaged, or of another save"),
    ],
)
def test_headers_that_are_refused(folder, change, message):
    edit(folder, change)
    with pytest.raises(ValueError, match=rf"(?s){folder}: no fit that can be loaded: .*({message})"):
        pm.load(folder)


@pytest.mark.parametrize(
    "key", ["format", "sha256", "names", "num_neurons", "model", "guide", "dtype", "seed", "attrs", "history"]
)
def test_headers_that_lack_something(folder, key):
    edit(folder, lambda header: header.pop(key))
    with pytest.raises(ValueError, match=rf"{folder}: .*{key}"):
        pm.load(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", "\xff"]
)
def test_headers_that_are_no_json_object(folder, text):
    (folder / "fit.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{folder}: no fit that can be loaded"):
        pm.load(folder)


def test_a_header_of_any_length_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(saving, "LARGEST_HEADER", 100)
    with pytest.raises(ValueError, match="at most 100 bytes"):
        pm.load(folder)


def sign(folder: Path) -> None:
    """As whoever forges a file would."""
    edit(folder, put("sha256", value=saving._digest(folder / "fit.safetensors")))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_truncated_tensors(folder, keep, signed):
    path = folder / "fit.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    if signed:
        sign(folder)
    with pytest.raises(ValueError, match=f"{folder}: no fit that can be loaded"):
        pm.load(folder)


def test_tensors_that_claim_to_be_huge(folder):
    path = folder / "fit.safetensors"
    claim = {"statistics": {"dtype": "F32", "shape": [HUGE, 2], "data_offsets": [0, 8 * HUGE]}}
    text = json.dumps(claim).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64)
    sign(folder)
    with pytest.raises(ValueError, match=f"{folder}: no fit that can be loaded"):
        pm.load(folder)


@pytest.mark.parametrize(
    "missing", ["model.read_out.weight", "guide.read_in.bias", "statistics", "history.elbo"]
)
def test_tensors_that_are_missing(folder, missing):
    from safetensors.torch import load_file, save_file

    path = folder / "fit.safetensors"
    tensors = load_file(path)
    del tensors[missing]
    save_file(tensors, path)
    sign(folder)
    with pytest.raises(ValueError, match=rf"{folder}: .*{missing}"):
        pm.load(folder)


def test_nothing_that_a_file_names_is_imported(folder, tmp_path, monkeypatch):
    name = "a_module_that_a_file_names"
    (tmp_path / f"{name}.py").write_text("raise SystemExit('ran code from a file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    edit(folder, config(likelihood={"class": "Gaussian", "module": name}))
    with pytest.raises(ValueError, match=rf"class Gaussian \(from {name}\)"):
        pm.load(folder)
    assert name not in sys.modules


def test_no_such_fit(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pm.load(tmp_path / "nowhere")
    (folder / "fit.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"fit\.safetensors"):
        pm.load(folder)
    with pytest.raises(FileNotFoundError, match=r"fit\.json"):
        pm.load(folder / "fit.json")


def test_large_legitimate_tables_fit_into_the_budget():
    """Very unequal recordings: the index of the table is far larger than the parameters, and is not saved."""
    names, sizes = [str(i) for i in range(300)], [2000] + [3] * 299
    parameters = 3 * sum(sizes)
    with Budget(saving.SPARE + 8 * parameters):
        assert NeuronTable(names, sizes).total == sum(sizes)
        pm.models.MetaSSM(NeuronTable(names, sizes), latent_dim=2, embedding_dim=1)
    with pytest.raises(ValueError, match="far beyond"), Budget(10**6):
        torch.eye(1001)
    with pytest.raises(ValueError, match="far beyond"), Budget(10**6):
        torch.arange(10**7)
    with pytest.raises(ValueError, match="far beyond"), Budget(10**6):
        torch.zeros(3).new_zeros(1001, 1001)
    with pytest.raises(ValueError, match="far beyond"), Budget(10**6):
        [torch.zeros(10**5) for _ in range(11)]
