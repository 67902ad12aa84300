"""Saved fits come back to the bit, with the classes of their users."""

import dataclasses
import doctest
import math
import os
import resource
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_metassm as pm
from pyro_metassm import saving
from pyro_metassm.guides.encoders import SetEncoder
from pyro_metassm.models.meta_ssm import MetaSSM

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


def test_numpy_numbers_in_attributes_are_numbers():
    value = {"a": np.float32(0.5), "b": np.int64(3), "c": np.bool_(True)}
    assert saving._decode(saving._encode(value, "attrs"), {}) == {"a": 0.5, "b": 3, "c": True}


def test_examples():
    result = doctest.testmod(saving)
    assert result.failed == 0 and result.attempted > 0
