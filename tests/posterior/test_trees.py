"""The tree in full: joined, named, written and read, and within a memory that was stated before."""

import dataclasses
import tracemalloc

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from drawn_fits import fit_for, identical
from problems import linear_gaussian, recordings
from test_linear_gaussian import as_fit, evidences

import pyro_metassm as pm
from pyro_metassm import draws, keeping
from pyro_metassm.dims import dims
from pyro_metassm.recordings import Recording, Recordings

STATISTICS = ("mean", "sd", "quantiles")
LEVELS = [0.05, 0.25, 0.5, 0.75, 0.95]


def labelled(recording: Recording, **more) -> Recording:
    trials = np.array(["left", "right", "none"])[np.arange(recording.num_trials) % 3]
    ids = [f"{recording.name}{n}" for n in range(recording.num_neurons)]
    return Recording(
        recording.name, recording.observations, bin_width=0.02, lengths=recording.lengths, condition=trials,
        neuron_ids=ids, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def recs() -> Recordings:
    plain = recordings(shapes={"a": (3, (7, 5, 6)), "b": (5, (5, 9))})
    return Recordings([labelled(plain["a"], attrs={"subject": "M1"}), labelled(plain["b"])])


@pytest.fixture(scope="module")
def fit(recs) -> pm.Fit:
    return fit_for(recs)


def parts(fit, recs) -> list[xr.DataTree]:
    return [
        pm.posterior(fit, recs, num_samples=4, predictive=True, log_likelihood=True, seed=1),
        pm.prior_predictive(fit.model, recs, num_samples=5, seed=2),
        pm.forecast(fit, recs, context=4, horizon=3, num_samples=3, predictive=True, seed=3),
    ]


# ---- names ------------------------------------------------------------------------------------------------------


def test_dimensions_are_those_that_the_model_says(recs, fit):
    assert dims(fit.model) == {
        "embedding": ("recording", "embedding_dim"),
        "latents": ("recording", "trial", "time", "latent_dim"),
        "observations": ("recording", "trial", "time", "neuron"),
    }

    class Own(pm.models.MetaSSM):
        def forward(self, batch):
            with pyro.plate("session", 2, dim=-1):
                pyro.sample("shift", pyro.distributions.Normal(torch.zeros(2, 3), 1.0).to_event(2))
            return super().forward(batch)

    own = dims(Own(recs, latent_dim=2, embedding_dim=1))
    assert own["shift"] == ("session", "shift_dim_0", "shift_dim_1") and own["latents"][-1] == "latent_dim"


def test_dimensions_of_a_model_that_needs_its_inputs():
    class Driven(pm.models.MetaSSM):
        def path_prior(self, e, batch):
            assert batch.inputs.shape[-1] == 2
            return super().path_prior(e, batch)

    recs = Recordings([Recording("a", np.ones((2, 4, 3)), bin_width=0.02, inputs=np.ones((2, 4, 2)))])
    with pytest.warns(UserWarning, match="has inputs"):
        model = Driven(recs, latent_dim=2, embedding_dim=1, hidden_dim=4)
    tree = pm.prior_predictive(model, recs, num_samples=2)
    assert tree["a/prior/latents"].dims == ("chain", "draw", "trial", "time", "latent_dim")


def test_coordinates_are_named(recs, fit):
    posterior, prior, ahead = parts(fit, recs)
    for tree, group in ((posterior, "posterior"), (prior, "prior"), (ahead, "posterior")):
        embedding = tree[group]["embedding"]
        assert embedding["subject"].dims == ("recording",)
        assert embedding["subject"].values.tolist() == ["M1", ""]
    for tree in (posterior, prior, ahead):
        for name, recording in recs.items():
            for group, node in tree[name].children.items():
                of = node.to_dataset()
                assert of["condition"].values.tolist() == recording.condition[of["trial"].values].tolist()
                assert ("condition" in of.data_vars) == (group == "constant_data")
                if "time" in of.dims:
                    start = 4 if tree is ahead else 0
                    np.testing.assert_allclose(of["time"], 0.02 * (start + np.arange(of.sizes["time"])))
                if "neuron" in of.dims:
                    assert of["neuron"].values.tolist() == recording.neuron_ids.tolist()
    bare = pm.posterior(fit_for(recordings()), recordings(), num_samples=2)
    assert "subject" not in bare["posterior"].coords and "condition" not in bare["a/posterior"].coords


# ---- joined -----------------------------------------------------------------------------------------------------


def test_trees_of_a_fit_are_joined(recs, fit):
    posterior, prior, ahead = parts(fit, recs)
    for order in ((posterior, prior, ahead), (ahead, posterior, prior)):
        tree = pm.join(*order)
        assert set(tree.children) == {"posterior", "prior", "predictions", "sample_stats", "a", "b"}
        assert tree["posterior"].to_dataset().equals(posterior["posterior"].to_dataset())
        assert tree["prior"].to_dataset().equals(prior["prior"].to_dataset())
        assert tree["predictions"].to_dataset().equals(ahead["posterior"].to_dataset())
        assert tree["predictions"].attrs == {"seed": 3, "context": 4, "horizon": 3}
        assert (tree["posterior"].attrs, tree["prior"].attrs) == ({"seed": 1}, {"seed": 2})
        for name in recs:
            assert set(tree[name].children) == {
                "posterior", "prior", "posterior_predictive", "prior_predictive", "predictions", "log_likelihood",
                "observed_data", "constant_data", "predictions_constant_data",
            }  # fmt: skip
            for part, groups in (
                (posterior, ("posterior", "posterior_predictive", "log_likelihood", "observed_data")),
                (prior, ("prior", "prior_predictive")),
                (ahead, ("predictions",)),
            ):
                for group in groups:
                    assert tree[name][group].to_dataset().identical(part[name][group].to_dataset())
            known = tree[name]["predictions_constant_data"]
            np.testing.assert_array_equal(known["observations"], ahead[name]["observed_data"]["observations"])
            np.testing.assert_array_equal(known["mask"], ahead[name]["constant_data"]["mask"])


def test_what_does_not_belong_together_is_not_joined(recs, fit):
    posterior = parts(fit, recs)[0]
    with pytest.raises(ValueError, match="got none"):
        pm.join()
    with pytest.raises(ValueError, match="got 'posterior' in two"):
        pm.join(posterior, posterior)
    other_fit = dataclasses.replace(fit, history=fit.history + 1)
    with pytest.raises(ValueError, match="trees of one fit"):
        pm.join(posterior, pm.forecast(other_fit, recs, context=4, horizon=3, num_samples=2))
    with pytest.raises(ValueError, match="the same recordings"):
        pm.join(posterior, pm.prior_predictive(fit.model, recs.select(["a"]), num_samples=2))
    # The same names, other data: refused whichever two they are.
    other = Recordings([labelled(Recording("a", recs["a"].observations + 1, bin_width=0.02)), recs["b"]])
    for tree in (
        pm.prior_predictive(fit.model, other, num_samples=2),
        pm.forecast(fit, other, context=4, horizon=3, num_samples=2),
    ):
        with pytest.raises(ValueError, match="trees of one data, got different"):
            pm.join(posterior, tree)


# ---- written and read -------------------------------------------------------------------------------------------


def same(one: xr.DataTree, other: xr.DataTree) -> None:
    """The same to the bit: variables, coordinates, attributes."""
    assert identical(one, other)
    for node in one.subtree:
        read = other[node.path]
        assert node.to_dataset().identical(read.to_dataset()), node.path
        assert {k: v.dtype for k, v in node.data_vars.items()} == {
            k: v.dtype for k, v in read.data_vars.items()
        }


def test_the_tree_goes_through_netcdf(recs, fit, tmp_path):
    tree = pm.join(*parts(fit, recs.select(["a"])))
    tree.to_netcdf(tmp_path / "tree.nc")
    with xr.open_datatree(tmp_path / "tree.nc") as back:
        same(tree, back.load())


# Zarr's, of its own format.
@pytest.mark.filterwarnings("ignore:.*(Zarr format 3|Zarr V3|Consolidated metadata)")
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_the_tree_goes_through_zarr(recs, fit, tmp_path, zarr_format):
    tree = pm.join(*parts(fit, recs.select(["a"])))
    tree.to_zarr(tmp_path / "tree.zarr", zarr_format=zarr_format)
    with xr.open_datatree(tmp_path / "tree.zarr", engine="zarr") as back:
        same(tree, back.load())


# ---- log likelihood of trials -----------------------------------------------------------------------------------


def test_log_likelihood_of_a_trial_is_its_evidence():
    """Of the linear Gaussian model with the exact guide, every draw has the Kalman filter's log evidence."""
    recs = recordings(missing=False)
    model = linear_gaussian(recs)
    tree = pm.posterior(
        as_fit(model, pm.guides.ExactSmoother(model)), recs, num_samples=3, log_likelihood=True
    )
    found = [tree[f"{name}/log_likelihood"]["trials"].values[0] for name in recs]
    np.testing.assert_allclose(np.concatenate(found, 1).sum(1), evidences(model, recs).sum(), rtol=1e-6)


# ---- statistics in place of draws -------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
# All draws at a time, three of one trial.
@pytest.mark.parametrize("elements", [8_000_000, 3 * 9 * (5 + 1024)])
def test_statistics_are_those_of_the_draws(recs, fit, monkeypatch, chunk_size, elements):
    monkeypatch.setattr(draws, "ELEMENTS", elements)
    options = {"num_samples": 8, "predictive": True, "chunk_size": chunk_size, "seed": 4}
    of = {
        "posterior": lambda **keep: pm.posterior(fit, recs, log_likelihood=True, **options, **keep),
        "forecast": lambda **keep: pm.forecast(fit, recs, context=4, horizon=5, **options, **keep),
    }
    for kind, make in of.items():
        drawn, kept = make(), make(keep=STATISTICS)
        assert kept["posterior"].to_dataset().identical(drawn["posterior"].to_dataset())
        for name in recs:
            names = {"predictions"} if kind == "forecast" else {"posterior", "posterior_predictive"}
            assert set(kept[name].children) ^ set(drawn[name].children) == names | {
                f"{n}_statistics" for n in names
            }
            for group in names:
                for variable, values in drawn[name][group].data_vars.items():
                    found = kept[name][f"{group}_statistics"]
                    d = ("chain", "draw")
                    q = found[f"{variable}_quantiles"]
                    assert q["quantile"].values.tolist() == LEVELS
                    expected = {
                        "mean": values.mean(d, skipna=False),
                        "sd": values.std(d, ddof=1, skipna=False),
                        "quantiles": values.astype(float).quantile(LEVELS, d, skipna=False),
                    }
                    for what, value in expected.items():
                        got = found[f"{variable}_{what}"]
                        assert got.dtype == np.float32 and got.dims == value.dims
                        np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)
        if kind == "posterior":
            for name in recs:
                group = kept[name]["log_likelihood"].to_dataset()
                assert group.identical(drawn[name]["log_likelihood"].to_dataset())


@pytest.mark.parametrize("bad", ["mean", (), ("median",), ("mean", "draws")])
def test_statistics_are_named(recs, fit, bad):
    with pytest.raises(ValueError, match=r"keep: needed some of \('mean', 'sd', 'quantiles'\)"):
        pm.posterior(fit, recs, keep=bad)
    with pytest.raises(ValueError, match="at least 2 for 'sd', got 1"):
        pm.forecast(fit, recs, context=2, horizon=2, keep=("sd",), num_samples=1)


def peak(call) -> int:
    """Bytes that NumPy, where draws are kept, had allocated at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def wide():
    y = np.random.default_rng(0).normal(size=(30, 10, 50))
    recs = Recordings([Recording("a", y, bin_width=0.02)])
    return recs, fit_for(recs)


@pytest.mark.parametrize("at_once", [40, 100])  # draws
def test_memory_is_what_was_stated(at_once):
    num, trials, bins, sizes = 100, 60, 20, {"rates": 30, "latents": 2}
    rng = np.random.default_rng(0)
    one = 4 * num * bins * sum(sizes.values())  # bytes: all draws of a trial

    def fill(store: keeping.Store) -> None:
        for trial in range(trials):
            for first in range(0, num, at_once):
                shape = (min(at_once, num - first), 1, bins)
                values = {k: rng.normal(size=(*shape, n)).astype(np.float32) for k, n in sizes.items()}
                place = slice(first, first + shape[0])
                store.put(place, np.array([trial]), values, np.ones((1, bins), dtype=bool))

    store = keeping.AllDraws(num, (trials, bins), sizes)
    assert store.needed == trials * one
    assert store.needed < peak(lambda: fill(store)) < store.needed + 5 * one
    kept = keeping.Statistics(num, (trials, bins), sizes, keep=STATISTICS)
    assert kept.needed == one + 4 * 7 * trials * bins * sum(sizes.values())
    # While they are reduced, the draws of a trial are there in float64 too.
    assert peak(lambda: fill(kept)) < kept.needed + 6 * one < store.needed / 3


def test_statistics_take_no_memory_for_the_draws(wide, monkeypatch):
    recs, fit = wide
    num = 100
    # The draws of one trial at a time.
    monkeypatch.setattr(draws, "ELEMENTS", num * 10 * (50 + draws.NETWORK_WIDTH))
    one = 4 * num * 10 * (50 + 2)
    kept = one + 4 * 7 * 30 * 10 * (50 + 2)
    found = peak(
        lambda: pm.posterior(fit, recs, num_samples=num, keep=STATISTICS, max_gib=1.01 * kept / 2**30)
    )
    # The data and the tree itself are small; draws were 30.
    assert found < kept + 6 * one + 400_000 < 30 * one / 1.5


def test_what_would_not_fit_is_refused_before_it_is_allocated(wide):
    recs, fit = wide
    num, numbers = 1_000_000, 30 * 10 * (50 + 2)
    calls = {
        "posterior": (numbers, lambda: pm.posterior(fit, recs, num_samples=num)),
        "forecast": (numbers / 2, lambda: pm.forecast(fit, recs, num_samples=num, context=4, horizon=5)),
        "prior": (numbers + 30 * 10 * 50, lambda: pm.prior_predictive(fit.model, recs, num_samples=num)),
    }
    for kind, (kept, call) in calls.items():
        messages = []

        def refused(call=call, messages=messages):
            with pytest.raises(ValueError, match=r"recs\.select") as caught:
                call()
            messages.append(str(caught.value))

        assert peak(refused) < 200_000
        (message,) = messages
        assert f"max_gib=4 GiB for what is kept of the draws, got {4 * num * kept / 2**30:.3g} GiB" in message
        assert ("keep=('mean', 'sd', 'quantiles')" in message) == (kind != "prior")
    # The number of draws that it says to ask for is the largest that fits.
    limit = 4 * 20.5 * numbers / 2**30
    with pytest.raises(ValueError, match="num_samples=20, "):
        pm.posterior(fit, recs, num_samples=60, max_gib=limit)
    pm.posterior(fit, recs, num_samples=20, max_gib=limit)
    with pytest.raises(ValueError, match="ask for fewer draws"):
        pm.posterior(fit, recs, num_samples=60, max_gib=limit / 1000, keep=("mean",))


# ---- leave-future-out -------------------------------------------------------------------------------------------


def test_leave_future_out_is_the_score_of_the_forecasts(recs, fit):
    """From the draws of `pm.forecast` themselves, with the Gaussian's density."""
    with pytest.warns(UserWarning, match="and are not forecast"):
        scores = pm.leave_future_out(fit, recs, origins=(2, 6), horizon=3, num_samples=7, seed=5)
    assert scores.dims == ("recording", "trial", "origin") and scores.shape == (2, 3, 2)
    for name, recording in recs.items():
        sd = fit.model.observation.log_sd[fit.model.neurons.slice(name)].exp().detach().numpy()
        for origin in (2, 6):
            one = recs.select([name])
            rows = np.flatnonzero(recording.lengths >= origin)
            one = Recordings([recording.take(rows)])
            rates = pm.forecast(fit, one, context=origin, horizon=3, num_samples=7, seed=5)
            rates = rates[f"{name}/predictions"]["rates"].values[0].astype(float)
            for row, trial in enumerate(rows):
                y = recording.observations[trial, origin : origin + 3]
                density = np.exp(-0.5 * ((y - rates[:, row, : len(y)]) / sd) ** 2) / (sd * np.sqrt(2 * np.pi))
                expected = np.nanmean(np.log(density.mean(0))) if np.isfinite(y).any() else np.nan
                got = scores.sel(recording=name, trial=trial, origin=origin)
                np.testing.assert_allclose(got, expected, rtol=1e-4)
            others = set(range(3)) - set(rows.tolist())
            assert np.isnan(scores.sel(recording=name, trial=sorted(others), origin=origin)).all()


def test_leave_future_out_checks_its_sizes(recs, fit):
    for bad, message in (
        ({"origins": ()}, "at least one bin"),
        ({"origins": (0,)}, "origins: needed an integer of at least 1"),
        ({"horizon": 0}, "horizon: needed"),
    ):
        with pytest.raises(ValueError, match=message):
            pm.leave_future_out(fit, recs, **({"origins": (2,), "horizon": 2} | bad))
