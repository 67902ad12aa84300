"""`metassm fit` with every family of observations, and the scores that go with it."""

import functools
import json

import numpy as np
import pytest
from members import LIKELIHOODS
from problems import KINDS, kind_of

import pyro_metassm as pm
from pyro_metassm import cli
from pyro_metassm.experiments import files
from pyro_metassm.observations import counted

pytestmark = pytest.mark.filterwarnings("ignore:.*only 8 trials:UserWarning")
OPTIONS = ["--latent-dim", "1", "--embedding-dim", "1", "--rank", "1", "--steps", "2", "--num-samples", "2"]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files, "fit", functools.partial(pm.fit, warm_start_steps=2))
    monkeypatch.setattr(files, "_pictures", lambda *args: None)


def written(folder, kind, names="ab"):
    rng = np.random.default_rng(0)
    for name in names:
        y = KINDS[kind](rng, (8, 8, 3))
        pm.io.write_npz(pm.Recording(name, y, bin_width=0.02), folder / f"{name}.npz")
    return [str(folder / f"{name}.npz") for name in names]


def test_families_are_named_by_their_classes():
    classes = {name: c for name, c in LIKELIHOODS.items() if name != "Mixed"}
    assert set(files.FAMILIES.values()) == set(classes.values())
    assert {name.replace("-", "") for name in files.FAMILIES} == {name.lower() for name in classes}
    for name in ("gaussian", "student-t", "low-rank-gaussian", "softplus-poisson", "zero-inflated-gamma"):
        assert name in files.FAMILIES


@pytest.mark.parametrize("name", ["bernoulli", "zero-inflated-gamma", "student-t", "zero-inflated-poisson"])
def test_scores_are_those_of_the_family(name, tmp_path, capsys):
    family = files.FAMILIES[name]
    recordings, out = written(tmp_path, kind_of(family)), tmp_path / "out"
    assert cli.main(["fit", *recordings, "--out", str(out), "--likelihood", name, *OPTIONS]) == 0
    numbers = json.loads((out / "metrics.json").read_text())
    assert numbers["likelihood"] == family.__name__ and set(numbers["reconstruction_r2"]) == {"a", "b"}
    discrete = bool(counted(pm.load(out / "fit").model, "a").all())
    assert discrete == (kind_of(family) in ("counts", "binary"))
    printed = capsys.readouterr().out
    for score in ("bits_per_spike", "forecast_bits_per_spike"):
        assert (score in numbers) == discrete == (f"\n{score} " in printed)
    assert "reconstruction_r2" in printed and "forecast_r2" in printed


def test_options_of_the_fit_reach_it(tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def fit(*args, **options):
        raise Seen(options)

    monkeypatch.setattr(files, "fit", fit)
    given = {"steps": 7, "trials-per-step": 3, "learning-rate": 0.02, "kl-warmup-steps": 5, "seed": 2}
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    with pytest.raises(Seen) as seen:
        cli.main(["fit", *written(tmp_path, "counts"), "--out", str(tmp_path / "out"), *arguments])
    (options,) = seen.value.args
    expected = {"num_steps": 7, "trials_per_step": 3, "learning_rate": 0.02, "kl_warmup_steps": 5, "seed": 2}
    assert {name: options[name] for name in expected} == expected


def test_families_that_are_not_there_or_did_not_make_the_data(tmp_path, capsys):
    recordings, out = written(tmp_path, "real"), str(tmp_path / "out")
    assert cli.main(["fit", *recordings, "--out", out, "--likelihood", "poison"]) == 2
    assert "needed one of bernoulli, binomial, gamma, gaussian, log-normal" in capsys.readouterr().err
    assert cli.main(["fit", *recordings, "--out", out, "--likelihood", "gamma", *OPTIONS]) == 2
    assert "recording 'a': needed values above zero for a Gamma likelihood" in capsys.readouterr().err


def test_of_mixed_families_each_has_its_scores():
    rng = np.random.default_rng(0)
    makers = {"spikes": "counts", "calcium": "positive"}
    recs = pm.Recordings([
        pm.Recording(name, KINDS[kind](rng, (8, 8, 3)), bin_width=0.02, held_out_neurons=[1])
        for name, kind in makers.items()
    ])  # fmt: skip
    family = pm.likelihoods.Mixed.of({"spikes": pm.likelihoods.Poisson, "calcium": pm.likelihoods.Gamma})
    model = pm.models.MetaSSM(recs, latent_dim=1, embedding_dim=1, likelihood=family)
    fit = files.fit(model, pm.guides.DKF(model), recs, num_steps=2, progress=False)
    numbers = files.scores(fit, recs, recs, context=4, horizon=4, num_samples=2, seed=0)
    for score in ("bits_per_spike", "forecast_bits_per_spike", "co_bps"):
        assert list(numbers[score]) == ["spikes"]
    assert set(numbers["reconstruction_r2"]) == set(numbers["forecast_r2"]["4"]) == set(makers)
