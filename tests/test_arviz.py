"""The installed ArviZ, 0.23 or 1.x, reads, summarises, plots and scores what the library gives it: a gallery."""

import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.special
import xarray as xr
from problems import linear_gaussian, recordings
from test_linear_gaussian import as_fit, evidences

import pyro_metassm as pm

# What the two lines themselves are warned of: a change of Matplotlib and one of pandas (0.23), and the draws of a fit
# of three steps, too few and too wide to leave trials out with.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping"),
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.sort_values"),
    pytest.mark.filterwarnings(r"ignore:Estimated shape parameter of Pareto distribution"),
]


@pytest.fixture(scope="module")
def az():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.23 announces its successor once a day
        import arviz

        return arviz


@pytest.fixture
def old(az) -> bool:
    return az.__version__.startswith("0.")


@pytest.fixture(autouse=True)
def no_figures_left():
    yield
    plt.close("all")


def made(noise: str, family) -> tuple[pm.Recordings, pm.Fit]:
    """Trials of unequal lengths, a neuron missing now and then, conditions: what plots stumble over."""
    simulated = pm.simulate.limit_cycles([2, 3, 4], num_trials=6, num_steps=15, num_neurons=6, noise=noise)
    ragged = []
    for name, recording in simulated.items():
        y = recording.observations.copy()
        y[1, 11:], y[0, 3, 2] = np.nan, np.nan
        attrs = {"subject": "M" + name[-1]}
        labels = ["left", "right"] * 3
        ragged.append(pm.Recording(name, y, bin_width=recording.bin_width, condition=labels, attrs=attrs))
    recs = pm.Recordings(ragged)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=2, hidden_dim=8, likelihood=family)
    options = {"num_steps": 3, "warm_start_steps": 3, "progress": False}
    return recs, pm.fit(model, pm.guides.DKF(model, hidden_dim=4), recs, **options)


@pytest.fixture(scope="module", params=["gaussian", "poisson"])
def tree(request):
    family = pm.likelihoods.Gaussian if request.param == "gaussian" else pm.likelihoods.Poisson
    recs, fit = made(request.param, family)
    return pm.join(
        pm.posterior(fit, recs, num_samples=40, predictive=True, log_likelihood=True),
        pm.prior_predictive(fit.model, recs, num_samples=30),
        pm.forecast(fit, recs, context=8, horizon=4, num_samples=20, predictive=True),
    )


def groups(data) -> set[str]:
    return {name.strip("/") for name in (data.groups() if callable(data.groups) else data.groups)}


def test_summary_forest_and_pair_of_the_embedding(az, tree):
    data = pm.to_arviz(tree)
    table = az.summary(data, var_names=["embedding"], kind="stats", round_to="none")
    expected = tree["posterior"]["embedding"].mean(("chain", "draw")).values.ravel()
    np.testing.assert_allclose(table["mean"].astype(float), expected, rtol=1e-5)
    az.plot_forest(data, var_names=["embedding"], combined=True)
    az.plot_pair(data, var_names=["embedding"], coords={"embedding_dim": 0})
    assert len(plt.get_fignums()) >= 1


def test_summary_of_subjects_and_of_what_has_none(az, tree):
    """Variables of 1.x are stacked: a global site has no recordings that its subjects could be told of."""
    posterior = tree["posterior"].to_dataset()
    assert "subject" in posterior.coords
    tau = posterior["embedding"].isel(recording=0, embedding_dim=0, drop=True)
    both = xr.DataTree.from_dict({"posterior": posterior.assign(tau=tau)})
    assert len(az.summary(pm.to_arviz(both))) == 7
    assert "subject" in pm.to_arviz(tree)["posterior"].coords


def test_a_recording_has_its_groups(az, old, tree):
    data = pm.to_arviz(tree, "w=3")
    assert {
        "posterior", "posterior_predictive", "prior", "prior_predictive", "log_likelihood", "observed_data",
        "constant_data", "predictions", "predictions_constant_data",
    } <= groups(data)  # fmt: skip
    np.testing.assert_array_equal(data["posterior"]["latents"], tree["w=3/posterior/latents"])
    table = az.summary(data, var_names=["latents"], coords={"trial": 0, "time": [0.0]}, kind="stats")
    assert len(table) == 2
    az.plot_forest(data, var_names=["latents"], coords={"trial": 0, "latent_dim": 0}, combined=True)
    with pytest.raises(KeyError, match=r"no recording '.*'; there are '"):
        pm.to_arviz(tree, "nobody")


def test_data_and_draws_of_them_are_of_what_was_seen(tree):
    data, node = pm.to_arviz(tree, "w=3"), tree["w=3"]
    y = node["observed_data/observations"].values
    seen, counts = np.isfinite(y), bool((y[np.isfinite(y)] % 1 == 0).all())
    observed = data["observed_data"]["observations"]
    assert observed.dims == ("observation",) and observed.dtype == (np.int32 if counts else np.float32)
    np.testing.assert_array_equal(observed, y[seen])
    where = np.stack([observed[d].values for d in ("trial", "neuron")], 1)
    np.testing.assert_array_equal(where, np.argwhere(seen)[:, [0, 2]])
    for group in ("posterior_predictive", "prior_predictive"):
        drawn = data[group]["observations"]
        assert drawn.dims == ("chain", "draw", "observation") and drawn.dtype == observed.dtype
        np.testing.assert_array_equal(drawn[0], node[group]["observations"].values[0][:, seen])


def test_counts_stay_integers_beside_a_prior_that_has_exploded(tree):
    exploded = tree.copy(deep=True)
    exploded["w=3/prior_predictive/observations"][0, 0] = np.nan
    data, plain = pm.to_arviz(exploded, "w=3"), pm.to_arviz(tree, "w=3")
    assert data["prior_predictive"]["observations"].dtype == np.float32
    for group in ("posterior_predictive", "observed_data"):
        assert data[group]["observations"].dtype == plain[group]["observations"].dtype


def test_complete_data_are_plotted_too(az, old):
    """They have one dimension as well: plots of counts on 1.x take no more."""
    recs = pm.simulate.limit_cycles([2.0], num_trials=4, num_steps=6, num_neurons=3, noise="poisson")
    sizes = {"latent_dim": 2, "embedding_dim": 1, "hidden_dim": 8}
    model = pm.models.MetaSSM(recs, **sizes, likelihood=pm.likelihoods.Poisson)
    fit = pm.fit(
        model, pm.guides.DKF(model, hidden_dim=4), recs, num_steps=2, warm_start=False, progress=False
    )
    data = pm.to_arviz(pm.posterior(fit, recs, num_samples=20, predictive=True), "w=2")
    assert data["posterior_predictive"]["observations"].shape == (1, 20, 4 * 6 * 3)
    if old:
        az.plot_bpv(data, kind="u_value")
    else:
        az.plot_ppc_pit(data)
        az.plot_ppc_rootogram(data)
    assert len(plt.get_fignums()) == 2 - old


def test_posterior_and_prior_predictive_checks(az, old, tree):
    data = pm.to_arviz(tree, "w=3")
    for group in ("posterior", "prior"):
        if old:
            state = np.random.get_state()
            az.plot_ppc(data, group=group, num_pp_samples=10)
            np.random.set_state(state)  # 0.23 draws the draws that it shows from NumPy's global state
            az.plot_bpv(data, group=group, kind="t_stat", t_stat="mean")
        else:
            is_count = data["observed_data"]["observations"].dtype.kind == "i"
            if is_count:
                az.plot_ppc_rootogram(data, group=f"{group}_predictive")
            else:
                az.plot_ppc_dist(data, group=f"{group}_predictive", num_samples=10)
            az.plot_ppc_tstat(data, group=f"{group}_predictive", t_stat="mean")
    assert len(plt.get_fignums()) == 4


def test_pit(az, old, tree):
    data = pm.to_arviz(tree, "w=3")
    if old:
        az.plot_bpv(data, kind="u_value")
    else:
        az.plot_ppc_pit(data)
    assert len(plt.get_fignums()) == 1


def test_loo_is_of_trials(az, old, tree):
    for recording, trials in ((None, 18), ("w=3", 6)):
        result = az.loo(pm.to_arviz(tree, recording), pointwise=True)
        pointwise = result.loo_i if old else result.elpd_i
        assert pointwise.dims == ("trial",) and pointwise.sizes["trial"] == trials
        assert result.pareto_k.shape == (trials,)
        az.plot_khat(result)
    labels = [f"{name} {trial}" for name in ("w=2", "w=3", "w=4") for trial in range(6)]
    assert pm.to_arviz(tree)["log_likelihood"]["trial"].values.tolist() == labels


def test_loo_is_close_to_what_its_definition_says(az, old):
    """Where no weight needs smoothing, leaving out is a harmonic mean: 1 / mean_s 1 / p(y_k | theta_s)."""
    recs, fit = made("gaussian", pm.likelihoods.Gaussian)
    data = pm.to_arviz(pm.posterior(fit, recs, num_samples=400, log_likelihood=True))
    values = data["log_likelihood"]["trials"]
    small = 1e-3 * (values - values.mean("draw"))  # weights within a few per mille
    data["log_likelihood"]["trials"] = small
    result = az.loo(data, pointwise=True)
    expected = np.log(400) - scipy.special.logsumexp(-small.values[0], axis=0)
    np.testing.assert_allclose(result.loo_i if old else result.elpd_i, expected, atol=1e-3)


def test_with_the_exact_guide_trials_have_their_evidence(az, old):
    """Every draw has the same log likelihood, the evidence: nothing to leave out, and LOO is their sum."""
    recs = recordings(missing=False)
    model = linear_gaussian(recs)
    tree = pm.posterior(
        as_fit(model, pm.guides.ExactSmoother(model)), recs, num_samples=100, log_likelihood=True
    )
    values = pm.to_arviz(tree)["log_likelihood"]["trials"].values[0]
    np.testing.assert_allclose(values.sum(1), evidences(model, recs).sum(), rtol=1e-6)


def test_compare_ranks_by_loo(az, old):
    fits = {}
    for family in (pm.likelihoods.Gaussian, pm.likelihoods.StudentT):
        recs, fit = made("gaussian", family)
        fits[family.__name__] = pm.to_arviz(pm.posterior(fit, recs, num_samples=60, log_likelihood=True))
    scores = {name: az.loo(data) for name, data in fits.items()}
    elpd = {name: float(s.elpd_loo if old else s.elpd) for name, s in scores.items()}
    table = az.compare(fits)
    assert table.index[0] == max(elpd, key=elpd.__getitem__)


def test_forecasts_are_read(az, old, tree):
    data = pm.to_arviz(tree, "w=3")
    np.testing.assert_array_equal(data["predictions"]["rates"], tree["w=3/predictions/rates"])
    root = pm.to_arviz(tree)
    assert {"posterior", "prior", "predictions", "log_likelihood"} <= groups(root)
    assert ("sample_stats" in groups(root)) != old  # 0.x wants a chain and a draw of every step


def test_statistics_are_no_draws(old):
    recs, fit = made("gaussian", pm.likelihoods.Gaussian)
    tree = pm.posterior(fit, recs, num_samples=10, log_likelihood=True, keep=("mean",))
    data = pm.to_arviz(tree, "w=3")
    assert "posterior" not in groups(data) and ("posterior_statistics" in groups(data)) != old
