"""Saved fits come back to the bit; files that are no fit are refused by name, before they cost memory or run code."""

import dataclasses
import doctest
import json
import math
import os
import resource
import struct
import sys
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_metassm as pm
from pyro_metassm import saving
from pyro_metassm.guides.encoders import RecurrentEncoder, SetEncoder
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.neurons import NeuronTable

QUICK = {"num_steps": 3, "warm_start": False, "progress": False}


class Rotated(MetaSSM):
    """A user's model: an argument and a parameter of its own, another argument fixed, a hook overridden."""

    def __init__(
        self, recordings, *, latent_dim, embedding_dim, angle=0.5, likelihood=pm.likelihoods.Gaussian
    ):
        super().__init__(
            recordings, latent_dim=latent_dim, embedding_dim=embedding_dim, rank=0, likelihood=likelihood
        )
        self.config |= {"angle": angle}
        self.angle = angle
        self.gain = nn.Parameter(torch.tensor(1.0))

    def transition(self, z, dynamics):
        return dist.Normal(self.gain * dynamics(z) + self.angle, self.process_noise()).to_event(1)


class Laplace(pm.likelihoods.Gaussian):
    """A user's likelihood."""

    def forward(self, predictor, recording):
        return dist.Laplace(predictor, self.by_neuron(self.log_sd, predictor, recording).exp())


class Encoder(SetEncoder):
    """A user's encoder."""


@pytest.fixture(scope="module")
def recs():
    return pm.simulate.limit_cycles([2.5, 5.0, -5.0], num_trials=6, num_steps=12, num_neurons=(3, 7))


@pytest.fixture(scope="module")
def fit(recs):
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    guide = pm.guides.DKF(model, hidden_dim=6, common_dim=5, embedding_encoder=RecurrentEncoder)
    made = pm.fit(model, guide, recs, **QUICK, seed=4, validation=recs, validation_every=2)
    attrs = {"note": "ä", "sizes": (1, 2.5, None), "nan": math.nan, "nested": {"on": [True, -math.inf]}}
    return dataclasses.replace(made, attrs=attrs)


@pytest.fixture
def folder(fit, tmp_path) -> Path:
    saving.save(fit, tmp_path / "fit")
    return tmp_path / "fit"


def same_modules(a, b) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(
        one[key].dtype == two[key].dtype and torch.equal(one[key], two[key]) for key in one
    )


def test_round_trip(fit, recs, folder):
    before = torch.get_rng_state()
    again = pm.load(folder)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(again.model) is MetaSSM and type(again.guide) is pm.guides.DKF
    assert not again.model.training and not again.guide.training and again.guide.model is again.model
    assert same_modules(again.model, fit.model) and same_modules(again.guide, fit.guide)
    assert again.model.config == fit.model.config and again.guide.config == fit.guide.config
    assert torch.equal(again.statistics, fit.statistics) and again.statistics.dtype == fit.statistics.dtype
    assert again.history.identical(fit.history) and again.history["validation_elbo"].isnull().any()
    assert again.names == fit.names and again.seed == 4
    assert math.isnan(again.attrs.pop("nan"))
    assert again.attrs == {k: v for k, v in fit.attrs.items() if k != "nan"}
    assert isinstance(again.attrs["sizes"], tuple)
    options = {"num_samples": 3, "predictive": True, "log_likelihood": True, "seed": 1}
    assert pm.posterior(again, recs, **options).identical(pm.posterior(fit, recs, **options))


def test_the_method_of_a_fit_writes_the_same_bytes(fit, folder, tmp_path):
    fit.save(str(tmp_path / "again"))
    for name in ("fit.json", "fit.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_double_precision_comes_back(recs, tmp_path):
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1).double()
    fit = pm.fit(model, pm.guides.DKF(model).double(), recs, **QUICK)
    assert fit.dtype == torch.float64
    saving.save(fit, tmp_path)
    again = pm.load(tmp_path)
    assert again.dtype == torch.float64 and same_modules(again.model, fit.model)
    assert same_modules(again.guide, fit.guide)
    assert pm.posterior(again, recs, num_samples=2).identical(pm.posterior(fit, recs, num_samples=2))


def test_a_fit_without_steps_and_the_exact_guide(recs, tmp_path):
    model = pm.models.LinearGaussian(recs, latent_dim=2)
    statistics = torch.zeros(len(recs), 2)
    history = pm.fit(*_pair(recs), recs, **QUICK | {"num_steps": 0}).history
    fit = pm.Fit(model, pm.guides.ExactSmoother(model), history, statistics)
    saving.save(fit, tmp_path)
    again = pm.load(tmp_path)
    assert same_modules(again.model, model) and isinstance(again.guide, pm.guides.ExactSmoother)
    assert again.history.identical(history)


def _pair(recs, cls=MetaSSM, **more):
    model = cls(recs, latent_dim=2, embedding_dim=1, **more)
    return model, pm.guides.DKF(model, hidden_dim=6)


def test_custom_classes_are_passed_by_the_user(recs, tmp_path):
    model = Rotated(recs, latent_dim=2, embedding_dim=1, angle=0.25, likelihood=Laplace)
    guide = pm.guides.DKF(model, hidden_dim=6, embedding_encoder=Encoder)
    fit = pm.fit(model, guide, recs, **QUICK)
    saving.save(fit, tmp_path)
    again = pm.load(tmp_path, custom=[Rotated, Laplace, Encoder])
    assert type(again.model) is Rotated and again.model.angle == 0.25
    assert type(again.model.observation) is Laplace and type(again.guide.encode_embedding) is Encoder
    assert torch.equal(again.model.gain, fit.model.gain) and again.model.gain != 1.0
    assert pm.posterior(again, recs, num_samples=2).identical(pm.posterior(fit, recs, num_samples=2))
    for lacking in (Rotated, Laplace, Encoder):
        rest = {Rotated, Laplace, Encoder} - {lacking}
        with pytest.raises(
            ValueError, match=rf"{tmp_path}: .*class {lacking.__name__} .*custom=\[{lacking.__name__}\]"
        ):
            pm.load(tmp_path, custom=rest)
    with pytest.raises(ValueError, match="different names"):
        pm.load(tmp_path, custom=[Rotated, Rotated])
    with pytest.raises(ValueError, match="different names"):
        pm.load(tmp_path, custom=["Rotated"])


def test_an_edited_class_of_the_same_name_takes_over(recs, tmp_path):
    fit = pm.fit(*_pair(recs, Rotated, angle=0.0), recs, **QUICK)
    saving.save(fit, tmp_path)
    edited = type(
        "Rotated", (Rotated,), {"initial_state": lambda self, e: dist.Normal(e.expand(1, 1, 2), 1.0)}
    )
    again = pm.load(tmp_path, custom=edited)
    assert type(again.model) is edited and same_modules(again.model, fit.model)


class Forgetful(MetaSSM):
    """Does not record its argument."""

    def __init__(self, recordings, *, latent_dim, embedding_dim, width=8):
        super().__init__(recordings, latent_dim=latent_dim, embedding_dim=embedding_dim)
        self.extra = nn.Parameter(torch.zeros(width))


class Clash(MetaSSM):
    """Fixes an argument that its configuration hands over again."""

    def __init__(self, recordings, **more):
        super().__init__(recordings, rank=0, **more)


def test_a_model_that_cannot_be_built_again_is_refused_when_saved(recs, fit, folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    forgetful = pm.fit(*_pair(recs, Forgetful, width=3), recs, **QUICK)
    with pytest.raises(
        ValueError, match=r"model.config: needed every argument .* got no width; .*fit.model.config"
    ):
        saving.save(forgetful, folder)
    forgetful.model.config["width"] = 4  # not what it was made with
    with pytest.raises(ValueError, match=r"1 of \d+ differ; model.extra: needed \(\(4,\)"):
        saving.save(forgetful, folder)
    with pytest.raises(ValueError, match=r"Clash cannot be built from its configuration .*multiple values"):
        saving.save(pm.fit(*_pair(recs, Clash), recs, **QUICK), folder)
    with pytest.raises(ValueError, match=r"attrs\['f'\]\[1\]: needed None, booleans"):
        saving.save(dataclasses.replace(fit, attrs={"f": [1, object()]}), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    forgetful.model.config["width"] = 3
    saving.save(forgetful, folder)
    assert type(pm.load(folder, custom=[Forgetful]).model) is Forgetful


def test_saving_replaces_a_fit_and_leaves_other_files(fit, folder):
    (folder / "mine.txt").write_text("keep")
    other = dataclasses.replace(fit, seed=9)
    saving.save(other, folder)
    assert pm.load(folder).seed == 9
    assert sorted(path.name for path in folder.iterdir()) == ["fit.json", "fit.safetensors", "mine.txt"]


@pytest.mark.parametrize("at", [0, 1])
def test_a_crash_while_renaming_never_yields_a_mixture(fit, folder, monkeypatch, at):
    other = dataclasses.replace(fit, statistics=fit.statistics + 1)
    replaced = []

    def crash(source, target):
        if len(replaced) == at:
            raise OSError("power cut")
        replaced.append(target)
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="power cut"):
            saving.save(other, folder)
    if at == 0:
        assert not list(folder.glob("*.part"))
        assert torch.equal(pm.load(folder).statistics, fit.statistics)
    else:  # the new header is there, under the name of a part
        assert Path(replaced[0]).name == "fit.safetensors"
        assert torch.equal(pm.load(folder).statistics, other.statistics)
        (folder / "fit.json").unlink()  # as if there had been no fit before
        assert torch.equal(pm.load(folder).statistics, other.statistics)
        saving.save(fit, folder)
        assert torch.equal(pm.load(folder).statistics, fit.statistics)
        assert not list(folder.glob("*.part"))


def test_a_full_disk_leaves_the_fit_that_was_there(fit, folder, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=rf"{folder}: the fit could not be saved: .*a fit that was there still is"
        ):
            saving.save(dataclasses.replace(fit, seed=9), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert pm.load(folder).seed == 4
    assert sorted(path.name for path in folder.iterdir()) == ["fit.json", "fit.safetensors"]


# ---- files that are no fit ----------------------------------------------------------------------------------


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
    with saving._Budget(saving.SPARE + 8 * parameters):
        assert NeuronTable(names, sizes).total == sum(sizes)
        pm.models.MetaSSM(NeuronTable(names, sizes), latent_dim=2, embedding_dim=1)
    with pytest.raises(ValueError, match="far beyond"), saving._Budget(10**6):
        torch.eye(1001)
    with pytest.raises(ValueError, match="far beyond"), saving._Budget(10**6):
        torch.arange(10**7)
    with pytest.raises(ValueError, match="far beyond"), saving._Budget(10**6):
        torch.zeros(3).new_zeros(1001, 1001)
    with pytest.raises(ValueError, match="far beyond"), saving._Budget(10**6):
        [torch.zeros(10**5) for _ in range(11)]


def test_numpy_numbers_in_attributes_are_numbers():
    value = {"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)}
    assert saving._decode(saving._encode(value, "attrs"), {}) == {"a": 0.5, "b": 3, "c": True}


def test_examples():
    result = doctest.testmod(saving)
    assert result.failed == 0 and result.attempted > 0
