"""Posterior, forecast and prior draws: shapes and names, reproducibility, files."""

import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch
import xarray as xr
from drawn_fits import fit_for, identical
from problems import recordings

import pyro_metassm as pm
from pyro_metassm import draws
from pyro_metassm.draws import posterior_chunks
from pyro_metassm.recordings import Recording, Recordings

DIMS = {
    "latents": ("chain", "draw", "trial", "time", "latent_dim"),
    "rates": ("chain", "draw", "trial", "time", "neuron"),
    "observations": ("chain", "draw", "trial", "time", "neuron"),
}


# ---- structure --------------------------------------------------------------------------------------------------


def test_posterior_tree(recs, fit):
    tree = pm.posterior(fit, recs, num_samples=5, predictive=True, log_likelihood=True, seed=2)
    assert set(tree.children) == {"posterior", "sample_stats", *recs.names} and tree.attrs["seed"] == 2
    embedding = tree["posterior"]["embedding"]
    assert embedding.dims == ("chain", "draw", "recording", "embedding_dim") and embedding.shape == (
        1,
        5,
        3,
        2,
    )
    assert embedding["recording"].values.tolist() == list(recs.names) and np.isfinite(embedding).all()
    assert np.array_equal(tree["sample_stats"]["elbo"], fit.history["elbo"])
    for name, recording in recs.items():
        groups = {"posterior", "posterior_predictive", "log_likelihood", "observed_data", "constant_data"}
        assert set(tree[name].children) == groups
        shape = {
            "draw": 5,
            "trial": recording.num_trials,
            "time": recording.num_bins,
            "neuron": recording.num_neurons,
        }
        shape |= {"chain": 1, "latent_dim": 2}
        for group, names in (
            ("posterior", ("latents", "rates")),
            ("posterior_predictive", ("observations",)),
        ):
            assert set(tree[name][group].data_vars) == set(names)
            for variable in names:
                values = tree[name][group][variable]
                assert values.dims == DIMS[variable] and values.shape == tuple(
                    shape[d] for d in DIMS[variable]
                )
                assert values.dtype == np.float32
                np.testing.assert_allclose(values["time"], np.arange(recording.num_bins) * 0.02)
                # NaN in the bins that a trial lacks, and nowhere else.
                exists = np.arange(recording.num_bins) < recording.lengths[:, None]
                assert (np.isnan(values).all(("chain", "draw", values.dims[-1])).values == ~exists).all()
                assert np.isfinite(values.values[:, :, exists]).all()
        density = tree[name]["log_likelihood"]["observations"]
        assert density.dims == ("chain", "draw", "trial") and np.isfinite(density).all()
        observed = tree[name]["observed_data"]["observations"]
        assert observed.dims == ("trial", "time", "neuron")
        np.testing.assert_array_equal(observed, recording.observations.astype(np.float32))
        constant = tree[name]["constant_data"]
        assert np.array_equal(constant["mask"], recording.mask) and np.array_equal(
            constant["length"], recording.lengths
        )
    small = pm.posterior(fit, recs, num_samples=1)
    assert set(small["a"].children) == {"posterior", "observed_data", "constant_data"}
    assert len(small["a/posterior"]["draw"]) == 1


def test_forecast_tree(recs, fit):
    with pytest.warns(UserWarning, match="recording 'c': 1 of 4 trials end before context = 4"):
        tree = pm.forecast(fit, recs, context=4, horizon=7, num_samples=3, predictive=True)
    assert set(tree.children) == {"posterior", "sample_stats", *recs.names}
    assert (tree.attrs["context"], tree.attrs["horizon"]) == (4, 7)
    assert tree["posterior"]["embedding"].shape == (1, 3, 3, 2)
    for name, recording in recs.items():
        trials = np.flatnonzero(recording.lengths >= 4)
        group = tree[name]["predictions"]
        assert set(group.data_vars) == {"latents", "rates", "observations"}
        for variable, values in group.data_vars.items():
            size = 2 if variable == "latents" else recording.num_neurons
            assert values.dims == DIMS[variable] and values.shape == (1, 3, len(trials), 7, size)
            assert np.isfinite(values).all()  # beyond the end of the data, too
        assert group["trial"].values.tolist() == trials.tolist()
        np.testing.assert_allclose(group["time"], np.arange(4, 11) * 0.02)
        # The data beside it: of these trials and bins, NaN where there is none.
        padded = np.full((recording.num_trials, 20, recording.num_neurons), np.nan, np.float32)
        padded[:, : recording.num_bins] = recording.observations
        np.testing.assert_array_equal(tree[name]["observed_data"]["observations"], padded[trials][:, 4:11])
        assert tree[name]["constant_data"]["mask"].values.sum() == np.isfinite(padded[trials][:, 4:11]).sum()


class Explodes(pm.models.MetaSSM):
    """Its states leave the finite numbers where the embedding is positive."""

    def adapt_dynamics(self, e):
        return lambda z: torch.where(e.unsqueeze(-2) > 0, 1e20 * z - z.square(), 0.5 * z)


@pytest.mark.parametrize("family", ["Gaussian", "Poisson", "NegativeBinomial", "ZeroInflatedPoisson"])
def test_prior_draws_that_explode_are_told(family):
    recs = recordings(counts=True)
    model = Explodes(
        recs, latent_dim=2, embedding_dim=1, hidden_dim=4, likelihood=getattr(pm.likelihoods, family)
    )
    with pytest.warns(
        UserWarning, match=r"prior_predictive: of 20 draws some have left .*: 'a' \(\d+\), 'b'"
    ):
        tree = pm.prior_predictive(model, recs, num_samples=20)
    assert all("latents" in model.describe() for _ in range(5))  # of other draws each
    positive = tree["prior"]["embedding"].sel(recording="b", embedding_dim=0).values[0] > 0
    assert 0 < positive.sum() < 20
    for group, name in (("prior", "latents"), ("prior", "rates"), ("prior_predictive", "observations")):
        trial = tree[f"b/{group}"][name].isel(chain=0, trial=1)  # the one as long as the array
        np.testing.assert_array_equal(np.isfinite(trial).all(("time", trial.dims[-1])), ~positive)
        assert np.isfinite(trial.isel(time=0)).all()


def test_prior_predictive_tree(counts):
    model = pm.models.MetaSSM(
        counts, latent_dim=2, embedding_dim=2, likelihood=pm.likelihoods.NegativeBinomial
    )
    shorter = Recordings([counts["a"].take([1, 2]), counts["b"]])  # arrays longer than the longest trial
    assert shorter["a"].num_bins > shorter["a"].lengths.max()
    tree = pm.prior_predictive(model, shorter, num_samples=6)
    assert set(tree.children) == {"prior", "a", "b"} and tree["prior"]["embedding"].shape == (1, 6, 2, 2)
    for name, recording in shorter.items():
        exists = np.arange(recording.num_bins) < recording.lengths[:, None]
        for group, variable in (
            ("prior", "latents"),
            ("prior", "rates"),
            ("prior_predictive", "observations"),
        ):
            values = tree[name][group][variable]
            assert values.dims == DIMS[variable] and np.isfinite(values.values[:, :, exists]).all()
            assert np.isnan(values.values[:, :, ~exists]).all()
        y = tree[name]["prior_predictive"]["observations"].values
        assert (y[np.isfinite(y)] >= 0).all() and (y[np.isfinite(y)] % 1 == 0).all()
    assert identical(tree, pm.prior_predictive(model, shorter, num_samples=6))
    assert not identical(tree, pm.prior_predictive(model, shorter, num_samples=6, seed=1))
    assert identical(tree, pm.prior_predictive(model, shorter.select(["b"]), num_samples=6), "/b")


def test_prior_predictive_draws_from_the_prior(recs):
    """Embeddings Normal(0, I), first states Normal(mu_0, Sigma_0): moments within standard errors."""
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=2)
    with torch.no_grad():
        model.initial.loc.copy_(torch.tensor([1.0, -2.0]))
        model.initial.log_scale.copy_(torch.tensor([0.3, -0.5]))
    num = 3_000
    tree = pm.prior_predictive(model, recs.select(["b"]), num_samples=num)
    e = tree["prior"]["embedding"].values[0, :, 0]
    assert (np.abs(e.mean(0)) < 5 / num**0.5).all() and (np.abs(e.var(0) - 1) < 5 * (2 / num) ** 0.5).all()
    z = (tree["b/prior"]["latents"].values[0, :, :, 0] - [1.0, -2.0]) / np.exp([0.3, -0.5])
    num *= 2
    assert (np.abs(z.mean((0, 1))) < 5 / num**0.5).all() and (
        np.abs(z.var((0, 1)) - 1) < 5 * (2 / num) ** 0.5
    ).all()
    rates, z = tree["b/prior"]["rates"].values[0], tree["b/prior"]["latents"].values[0]
    rows = model.neurons.slice("b")
    expected = z @ model.read_out.weight[rows].detach().numpy().T + model.read_out.bias[rows].detach().numpy()
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-4)


def test_behavior_condition_and_truth_go_along(fit):
    y = np.random.default_rng(0).normal(size=(3, 9, 5)).astype(np.float32)
    behavior = np.random.default_rng(1).normal(size=(3, 9, 2)).astype(np.float32)
    recording = Recording(
        "b", y, bin_width=0.02, behavior=behavior, condition=["l", "r", "l"], neuron_ids=list("vwxyz"),
        attrs={"behavior_names": ["vx", "vy"]},
    )  # fmt: skip
    truth = xr.Dataset({"latents": (("trial", "time", "latent_dim"), y[..., :3]), "speed": ((), 2.0)})
    recs = Recordings([recording], truth={"b": truth})
    constant = pm.posterior(fit, recs, num_samples=2)["b/constant_data"]
    np.testing.assert_array_equal(constant["behavior"], behavior)
    assert constant["behavior_dim"].values.tolist() == ["vx", "vy"] and constant[
        "condition"
    ].values.tolist() == ["l", "r", "l"]
    np.testing.assert_array_equal(constant["true_latents"], y[..., :3])
    assert constant["true_speed"] == 2.0 and constant["neuron"].values.tolist() == list("vwxyz")
    ahead = pm.forecast(fit, recs, context=6, horizon=5, num_samples=2)["b/constant_data"]
    np.testing.assert_array_equal(ahead["true_latents"][:, :3], y[:, 6:, :3])
    assert np.isnan(ahead["true_latents"][:, 3:]).all() and np.isnan(ahead["behavior"][:, 3:]).all()


@pytest.mark.parametrize("kind", ["posterior", "forecast", "prior"])
def test_trees_go_through_netcdf(recs, fit, tmp_path, kind):
    recs = recs.select(["a", "b"])
    if kind == "posterior":
        tree = pm.posterior(fit, recs, num_samples=3, predictive=True, log_likelihood=True)
    elif kind == "forecast":
        tree = pm.forecast(fit, recs, context=4, horizon=4, num_samples=3)
    else:
        tree = pm.prior_predictive(fit.model, recs, num_samples=3)
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as back:
        loaded = back.load()
        assert identical(tree, loaded)
        for node in tree.subtree:
            assert node.attrs == loaded[node.path].attrs
            assert {k: v.values.tolist() for k, v in node.coords.items()} == {
                k: v.values.tolist() for k, v in loaded[node.path].coords.items()
            }


# ---- what the draws are -----------------------------------------------------------------------------------------


def test_log_likelihood_is_that_of_the_rates(recs, fit, counts, counts_fit):
    """Recomputed with scipy from the rates that the tree holds, over what was observed."""
    for data, fitted, family in ((recs, fit, "normal"), (counts, counts_fit, "poisson")):
        tree = pm.posterior(fitted, data, num_samples=4, log_likelihood=True)
        for name, recording in data.items():
            rates = tree[f"{name}/posterior"]["rates"].values[0].astype(float)
            y = recording.observations
            if family == "normal":
                sd = fitted.model.observation.log_sd[fitted.model.neurons.slice(name)].exp().detach().numpy()
                density = scipy.stats.norm(rates, sd).logpdf(y)
            else:
                density = scipy.stats.poisson(rates).logpmf(np.where(recording.mask, y, 0))
            expected = np.where(recording.mask, density, 0).sum((-1, -2))
            np.testing.assert_allclose(
                tree[f"{name}/log_likelihood"]["observations"].values[0], expected, rtol=1e-4
            )


def test_predictive_draws_are_of_the_family(counts, counts_fit):
    tree = pm.posterior(counts_fit, counts, num_samples=400, predictive=True)
    for name, recording in counts.items():
        y = tree[f"{name}/posterior_predictive"]["observations"].values[0]
        rates = tree[f"{name}/posterior"]["rates"].values[0].astype(float)
        exists = np.arange(recording.num_bins) < recording.lengths[:, None]
        y, rates = y[:, exists], rates[:, exists]
        assert (y >= 0).all() and (y % 1 == 0).all()
        assert (
            np.abs((y - rates).mean(0)) < 5.5 * np.sqrt(rates.mean(0) / len(y))
        ).all()  # var(y | rate) = rate


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_one_embedding_a_draw_for_all_trials(recs, fit, chunk_size):
    by_draw: dict[int, list[np.ndarray]] = {}
    trials = []
    for chunk in posterior_chunks(fit, recs, "c", 5, seed=0, chunk_size=chunk_size):
        trials += chunk.trials.tolist()
        for draw, e in zip(range(5)[chunk.draws], chunk.embedding[:, 0, 0].numpy(), strict=True):
            by_draw.setdefault(draw, []).append(e)
    assert trials == [0, 1, 2, 3]
    assert all(np.array_equal(e, es[0]) for es in by_draw.values() for e in es)
    assert len({tuple(es[0]) for es in by_draw.values()}) == 5
    tree = pm.posterior(fit, recs, num_samples=5, chunk_size=chunk_size)
    embedding = tree["posterior"]["embedding"].sel(recording="c").values[0]
    assert np.array_equal(embedding, np.stack([by_draw[s][0] for s in range(5)]))


def test_draws_in_chunks_are_all_there(recs, fit, monkeypatch):
    """A tiny memory makes many chunks of draws and trials: every place filled, every draw its own."""
    monkeypatch.setattr(draws, "ELEMENTS", 2 * 9 * (5 + draws.NETWORK_WIDTH))
    sizes = [len(range(9)[c.draws]) * len(c.trials) for c in posterior_chunks(fit, recs, "b", 9, seed=0)]
    assert len(sizes) == 10 and sum(sizes) == 9 * 2
    tree = pm.posterior(fit, recs, num_samples=9, predictive=True, log_likelihood=True)
    for name in recs:
        first = tree[f"{name}/posterior"]["latents"].values[0, :, :, 0]
        assert np.isfinite(first).all() and len(np.unique(first)) == first.size
        assert np.isfinite(tree[f"{name}/log_likelihood"]["observations"]).all()
    assert len(np.unique(tree["posterior"]["embedding"])) == 9 * 3 * 2
    with pytest.warns(UserWarning):
        ahead = pm.forecast(fit, recs, context=4, horizon=2, num_samples=9)
    for name in recs:
        z = ahead[f"{name}/predictions"]["latents"].values
        assert len(np.unique(z)) == z.size


def test_embeddings_are_those_of_the_training_trials(recs, fit):
    """The trials given do not move them; their moments are the statistics of the fit."""
    num = 800  # in one chunk
    whole = pm.posterior(fit, recs, num_samples=num)["posterior"]["embedding"]
    some = pm.posterior(fit, Recordings([r.take([1]) for r in recs.values()]), num_samples=num)["posterior"][
        "embedding"
    ]
    assert np.array_equal(whole, some)
    mean, variance = (x.numpy() for x in fit.statistics.chunk(2, -1))
    assert (np.abs(whole.mean("draw")[0] - mean) < 5 * np.sqrt(variance / num)).all()
    assert (np.abs(whole.var("draw")[0] / variance - 1) < 5 * np.sqrt(2 / num)).all()


def test_seeds_and_other_recordings(recs, fit):
    options = {"num_samples": 4, "predictive": True, "log_likelihood": True}
    tree = pm.posterior(fit, recs, seed=1, **options)
    torch.rand(3)
    assert identical(tree, pm.posterior(fit, recs, seed=1, **options))
    assert not identical(tree, pm.posterior(fit, recs, seed=2, **options), "/a/posterior")
    for names in (["b"], ["c", "b"], ["b", "a"]):
        assert identical(tree, pm.posterior(fit, recs.select(names), seed=1, **options), "/b")
    options = {"num_samples": 4, "predictive": True, "context": 2, "horizon": 3}
    ahead = pm.forecast(fit, recs, **options)
    assert identical(ahead, pm.forecast(fit, recs.select(["c", "b"]), **options), "/b")
    # Recordings of one shape have draws of their own.
    twins = Recordings(
        [Recording(n, recs["b"].observations, bin_width=0.02, lengths=recs["b"].lengths) for n in ("b", "d")]
    )
    twin_fit = fit_for(twins)
    twin_fit = dataclasses.replace(twin_fit, statistics=twin_fit.statistics[:1].expand(2, -1))
    z = pm.posterior(twin_fit, twins, num_samples=4)
    assert not np.array_equal(
        z["posterior"]["embedding"].sel(recording="b"), z["posterior"]["embedding"].sel(recording="d")
    )


def test_random_states_are_left_alone(recs, fit):
    torch.manual_seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    pm.posterior(fit, recs, num_samples=2, predictive=True)
    pm.forecast(fit, recs, context=2, horizon=2, num_samples=2, predictive=True)
    pm.prior_predictive(fit.model, recs, num_samples=2)
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(
        np.random.get_state()[1], numpy_before
    )
    # Left half-way, too.
    chunks = posterior_chunks(fit, recs, "c", 3, seed=0, chunk_size=1)
    next(chunks)
    chunks.close()
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "call",
    [
        lambda fit, recs: pm.posterior(fit, recs),
        lambda fit, recs: pm.forecast(fit, recs, context=2, horizon=2),
        lambda fit, recs: pm.prior_predictive(fit.model, recs),
    ],
)
def test_unknown_recordings_are_pointed_to_adapt(fit, call):
    other = Recordings([Recording("new", np.zeros((2, 4, 3)), bin_width=0.02)])
    with pytest.raises(ValueError, match=r"recording 'new'.*make the model with it"):
        call(fit, other)
    renamed = Recordings([Recording("a", np.zeros((2, 4, 4)), bin_width=0.02)])
    with pytest.raises(ValueError, match="recording 'a': needed its 3 neurons"):
        call(fit, renamed)


@pytest.mark.parametrize(
    "bad", [{"context": 0}, {"horizon": 0}, {"num_samples": 0}, {"context": 2.0}, {"horizon": -1}]
)
def test_sizes_are_checked(recs, fit, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: needed an integer of at least 1"):
        pm.forecast(fit, recs, **({"context": 2, "horizon": 2, "num_samples": 2} | bad))
    if "num_samples" in bad:
        with pytest.raises(ValueError, match="num_samples"):
            pm.posterior(fit, recs, **bad)
        with pytest.raises(ValueError, match="num_samples"):
            pm.prior_predictive(fit.model, recs, **bad)
