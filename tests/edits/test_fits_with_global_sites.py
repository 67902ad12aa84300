"""Fits with sites of all recordings: the same draws everywhere, saved, compared, adapted."""

import copy
import dataclasses

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from edits_page import DOUBLE, MORE, SIZES, WITH_SITES, edits
from fits import QUICK
from problems import recordings
from pyro.nn import PyroSample

import pyro_metassm as pm
from pyro_metassm.distributions import MarkovPath, RolloutPath
from pyro_metassm.observations import counted


@pytest.fixture(scope="module")
def fits(recs, driven) -> dict[str, pm.Fit]:
    """By name of the edit; two of them start from the data."""
    found = {}
    for name in [*WITH_SITES, "Driven"]:
        data = driven if name == "Driven" else recs
        torch.manual_seed(0)
        model = getattr(edits, name)(data, **SIZES, **MORE.get(name, {}))
        options = QUICK | {"warm_start": name in ("BySubject", "Driven"), "recordings_per_step": 2}
        found[name] = pm.fit(model, pm.guides.DKF(model, hidden_dim=4), data, **options)
    return found


@pytest.mark.parametrize("name", WITH_SITES)
def test_the_tree_has_the_global_sites(fits, recs, name):
    fit = fits[name]
    tree = pm.posterior(fit, recs, num_samples=5, chunk_size=1)
    ahead = pm.forecast(fit, recs.select(["b"]), context=3, horizon=2, num_samples=5)
    prior = pm.prior_predictive(fit.model, recs, num_samples=5)
    sites = set(fit.guide.global_sites.transforms)
    for group in (tree["posterior"], prior["prior"]):
        assert set(group.data_vars) == {"embedding"} | sites
        assert all(np.isfinite(group[site]).all() for site in sites)
    for site in sites:  # the same draws, whatever recordings are looked at
        dims = tree["posterior"][site].dims
        assert dims[2:] == fit.model.dims.get(site, (f"{site}_dim_0",))
        there = tree["posterior"][site]
        there = there.sel(recording=["b"]) if "recording" in dims else there
        assert np.array_equal(ahead["posterior"][site], there)
        q = fit.guide.global_sites.distribution(site)
        value = torch.tensor(tree["posterior"][site].values[0])
        assert q.log_prob(value).isfinite().all() and value.std(0).min() > 0  # draws differ
    if name == "BySubject":
        assert list(tree["posterior"]["center"].coords["subject"]) == ["ada", "bob"]
        theirs = tree["posterior"].coords["recording_subject"]
        assert theirs.dims == ("recording",) and theirs.values.tolist() == ["bob", "ada", "bob"]


def test_arviz_reads_the_hyper_parameters(fits, recs, tmp_path):
    import arviz

    tree = pm.posterior(fits["BySubject"], recs, num_samples=4)
    rows = arviz.summary(pm.to_arviz(tree), var_names=["center"], kind="stats").index
    assert [str(row) for row in rows] == [
        "center[ada, 0]",
        "center[ada, 1]",
        "center[bob, 0]",
        "center[bob, 1]",
    ]
    tree = pm.posterior(fits["BayesianReadOut"], recs, num_samples=2)
    tree.to_netcdf(tmp_path / "tree.nc")
    with xr.open_datatree(tmp_path / "tree.nc") as read:
        assert np.array_equal(read["posterior"]["read_out.weight"], tree["posterior"]["read_out.weight"])


def test_rates_are_those_of_the_same_draw(fits, recs):
    """Rates are latents times the read-out of the same draw: in a posterior in chunks, and in a forecast."""
    fit = fits["BayesianReadOut"]
    weight = pm.posterior(fit, recs, num_samples=4)["posterior"]["read_out.weight"].values[0]
    for tree, group in (
        (pm.posterior(fit, recs, num_samples=4, chunk_size=2), "posterior"),
        (pm.forecast(fit, recs, context=2, horizon=2, num_samples=4), "predictions"),
    ):
        for name in fit.names:
            rows, part = fit.model.neurons.slice(name), tree[name][group]
            bias = fit.model.read_out.bias[rows].detach().numpy()
            expected = np.einsum("sktd,snd->sktn", part["latents"].values[0], weight[:, rows]) + bias
            assert np.allclose(part["rates"].values[0], expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_forecasts_read_the_inputs_of_their_bins(fits, driven):
    fit = fits["Driven"]
    model = copy.deepcopy(fit.model)
    model.dynamics_of = lambda e, recording: lambda z: 0.5 * z  # a linear system: what an input adds is known
    with torch.no_grad():
        model.drive.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
    fit = dataclasses.replace(fit, model=model, guide=copy.deepcopy(fit.guide))
    fit.guide._model = (model,)
    r, change = driven["c"], np.array([0.7, -0.2])
    inputs = r.inputs.copy()
    inputs[1, 2] += change  # trial 1, the first bin to be forecast
    inputs[2, 4] += change
    more = pm.Recordings(
        [pm.Recording("c", r.observations, bin_width=r.bin_width, lengths=r.lengths, inputs=inputs)]
    )
    options = {"context": 2, "horizon": 7, "num_samples": 3}
    with pytest.warns(UserWarning, match="recording 'c': the inputs of 4 of 4 trials end before bin 9"):
        one, other = (
            pm.forecast(fit, data, **options)["c/predictions"]["latents"]
            for data in (driven.select(["c"]), more)
        )
    difference = (other - one).values[0]
    step = np.array([[1.0, 0.0], [2.0, -1.0]]) @ change
    for row, first in ((0, 9), (1, 0), (2, 2), (3, 9)):
        for ahead in range(7):
            expected = 0.5 ** (ahead - first) * step if ahead >= first else np.zeros(2)
            assert np.allclose(difference[:, row, ahead], expected, atol=1e-5), (row, ahead)


def test_roll_outs_of_the_guide_read_the_inputs_of_their_bins():
    torch.manual_seed(0)
    u, loc = torch.randn(2, 3, 9, 1, dtype=DOUBLE), torch.randn(2, 3, 9, 2, dtype=DOUBLE)
    initial = dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1)

    def transition(z, inputs):
        return dist.Normal(0.9 * z + inputs * torch.tensor([1.0, -2.0]), 1e-9).to_event(1)

    prior = MarkovPath(initial.expand([2, 3]), transition, 9, None, u)
    for share in (0.3, 0.8, 1.0):
        rollout = torch.rand(2, 3, 9) < share
        z = RolloutPath(loc, torch.full_like(loc, 1e-9), prior, rollout).rsample()
        rollout[..., 0] = False
        previous = torch.cat([loc[..., :1, :], z[..., :-1, :]], -2)
        expected = torch.where(rollout.unsqueeze(-1), 0.9 * previous + u * torch.tensor([1.0, -2.0]), loc)
        assert torch.allclose(z, expected, atol=1e-6)
    drawn = prior.sample()
    expected = 0.9 * drawn[..., :-1, :] + u[..., 1:, :] * torch.tensor([1.0, -2.0])
    assert torch.allclose(drawn[..., 1:, :], expected, atol=1e-6)


# ---- what is done with a fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WITH_SITES, "Driven"])
def test_fits_are_saved_with_their_global_sites(fits, recs, driven, name, tmp_path):
    fit, data = fits[name], driven if name == "Driven" else recs
    fit.save(tmp_path)
    again = pm.load(tmp_path, custom=[type(fit.model)])
    one, other = (pm.posterior(f, data, num_samples=2) for f in (fit, again))
    assert one["posterior"].to_dataset().equals(other["posterior"].to_dataset())
    assert one["b/posterior"].to_dataset().equals(other["b/posterior"].to_dataset())


ADAPT = {"num_steps": 2, "num_starts": 4, "search_steps": 4, "progress": False}


@pytest.mark.parametrize("name", ["Horseshoe", "HeavyTails"])
def test_new_recordings_leave_shared_sites_as_they_are(recs, name):
    old = recs.drop(["b"])
    model = getattr(edits, name)(old, **SIZES)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=4), old, warm_start=False, **QUICK)
    adapted = pm.adapt(fit, recs.select(["b"]), **ADAPT)
    one, other = (f.guide.global_sites.state_dict() for f in (fit, adapted))
    assert all(torch.equal(one[key], other[key]) for key in one | other)
    tree = pm.forecast(adapted, recs, context=2, horizon=2, num_samples=2)
    assert np.isfinite(tree["b/predictions"]["rates"]).all()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ByCondition", "got offset with rows for recordings or neurons"),
        ("BayesianReadOut", "got read_out.weight with rows for recordings or neurons"),
        ("BySubject", "needed a model that can be made for other recordings"),
    ],
)
def test_what_new_recordings_cannot_be_given_is_said(fits, recs, name, said):
    r = recs["b"]
    new = pm.Recordings([pm.Recording("new", r.observations, bin_width=r.bin_width, lengths=r.lengths)])
    with pytest.raises(ValueError, match=f"adapt: .*{said}"):
        pm.adapt(fits[name], new, **ADAPT)


def test_fits_with_global_sites_are_compared(fits, recs):
    table = pm.compare(
        {name: fits[name] for name in ("Horseshoe", "HeavyTails")}, recs, context=2, horizon=2, num_samples=4
    )
    assert np.isfinite(table[("elbo", "mean")]).all()


class DrawnDispersion(pm.models.MetaSSM):
    def __init__(self, recordings, **options):
        super().__init__(recordings, **options)
        self.count = PyroSample(dist.LogNormal(1.0, 0.5).expand([1]).to_event(1))

    def likelihood(self, predictor, recording):
        return dist.NegativeBinomial(self.count.unsqueeze(-2), logits=predictor)


def test_what_a_model_counts_leaves_the_random_state_alone():
    """Its likelihood is called outside of the program, where it draws the site that it reads."""
    recs = recordings(counts=True)
    torch.manual_seed(0)
    model = DrawnDispersion(recs, **SIZES)
    random = torch.get_rng_state()
    assert all(counted(model, name).all() for name in recs)
    assert torch.equal(torch.get_rng_state(), random)


def test_names_of_dims_must_fit(fits, recs):
    fit = dataclasses.replace(fits["Horseshoe"], model=copy.deepcopy(fits["Horseshoe"].model))
    for dims, said in [
        (("embedding_dim", "more"), "a name for each dimension"),
        (("recording",), r"got recording \(3\)"),
    ]:
        fit.model.dims["local"] = dims
        with pytest.raises(ValueError, match=said):
            pm.posterior(fit, recs, num_samples=2)
