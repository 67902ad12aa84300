"""Restarts: each truly starts anew, and their draws are compared in coordinates that an exact map gives."""

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from fits import QUICK, assert_same, parts, state
from problems import linear_gaussian, recordings
from test_linear_gaussian import as_fit, evidences
from torch import nn

import pyro_metassm as pm
from pyro_metassm.rebuilding import afresh
from pyro_metassm.restarts import affine_map, apply, held_out_elbo, together

SPEEDS = [1.0, 2.0, 3.0, 4.0]


@pytest.fixture(scope="module")
def recs():
    return pm.simulate.limit_cycles(SPEEDS, num_trials=6, num_steps=12, num_neurons=5)


@pytest.fixture(scope="module")
def pair(recs):
    return parts(recs)


@pytest.fixture(scope="module")
def restarts(recs, pair):
    return pm.fit_restarts(*pair, recs, num_restarts=3, seed=5, **QUICK)


@pytest.fixture(scope="module")
def az():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        return arviz


def r_hat(az, tree, name, recording=None) -> np.ndarray:
    data = pm.to_arviz(tree, recording)
    return az.summary(data, var_names=[name], kind="diagnostics", round_to="none")["r_hat"].to_numpy(float)


def chains(values) -> xr.DataArray:
    return xr.DataArray(np.asarray(values, float), {"chain": np.arange(len(values))}, "chain")


# ---- the map ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_a_known_affine_map_is_recovered(dim):
    rng = np.random.default_rng(dim)
    x, matrix, offset = rng.normal(size=(50, dim)), rng.normal(size=(dim, dim)), rng.normal(size=dim)
    found = affine_map(x, x @ matrix + offset)
    np.testing.assert_allclose(found[0], matrix, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found[1], offset, rtol=1e-9, atol=1e-9)


def test_what_disagrees_is_not_shrunk():
    """Unrelated points get the mean and covariance of the target, and the nearest rotation of those that do."""
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) @ rng.normal(size=(2, 2)) + 3.0
    moved = apply(affine_map(x, target), x)
    np.testing.assert_allclose(moved.mean(0), target.mean(0), atol=1e-12)
    np.testing.assert_allclose(np.cov(moved.T), np.cov(target.T), rtol=1e-9)
    own, other = ((points - points.mean(0)) @ np.linalg.inv(_root(target)) for points in (moved, target))
    best = ((own - other) ** 2).sum()
    for angle in np.linspace(0, 2 * np.pi, 50):
        for sign in (1.0, -1.0):
            turn = np.array([[np.cos(angle), np.sin(angle)], [-sign * np.sin(angle), sign * np.cos(angle)]])
            assert ((own @ turn - other) ** 2).sum() >= best - 1e-9


def _root(x):
    values, vectors = np.linalg.eigh(np.cov(x.T))
    return (vectors * np.sqrt(values)) @ vectors.T


def test_a_direction_without_variance_is_dropped():
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(size=30), np.zeros(30)], 1)
    matrix, _ = affine_map(x, np.stack([2.0 * x[:, 0], rng.normal(size=30)], 1))
    assert np.isfinite(matrix).all() and not matrix[1].any()


# ---- fits ---------------------------------------------------------------------------------------------------


def test_a_restart_depends_on_its_seed_alone(recs, pair, restarts):
    before = {key: value.clone() for key, value in state(*pair).items()}
    random = torch.get_rng_state()
    alone = pm.fit_restarts(*pair, recs, num_restarts=1, seed=5, **QUICK)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(alone.fits[0], restarts.fits[0])
    assert float(alone.elbo[0]) == float(restarts.elbo[0])
    assert [fit.seed for fit in restarts.fits] == [5, 6, 7]
    train, held_out = recs.split(seed=5)
    made = [afresh(*pair, train, seed) for seed in (6, 6, 7)]
    assert all(torch.equal(a, state(*made[1])[key]) for key, a in state(*made[0]).items())
    assert not torch.equal(made[0][0].read_out.weight, made[2][0].read_out.weight)
    assert_same(pm.fit(*made[0], train, seed=6, validation=held_out, **QUICK), restarts.fits[1])
    assert all(torch.equal(value, before[key]) for key, value in state(*pair).items())


def test_what_a_model_has_learned_does_not_reach_a_restart(recs, pair, restarts):
    trained = restarts.fits[2]
    again = pm.fit_restarts(trained.model, trained.guide, recs, num_restarts=1, seed=5, **QUICK)
    assert_same(again.fits[0], restarts.fits[0])


class Own(pm.models.MetaSSM):
    def __init__(self, recordings, *, gain=1.0, **options):
        super().__init__(recordings, **options)
        self.config |= {"gain": gain}
        self.tilt = nn.Parameter(torch.randn(3))
        self.known = nn.Parameter(torch.full((2,), gain))


class Changed(pm.models.MetaSSM):
    pass


def test_a_subclass_is_built_again_and_what_is_frozen_stays(recs):
    torch.manual_seed(0)
    model = Own(recs, latent_dim=2, embedding_dim=1, hidden_dim=4, gain=2.0).double()
    with torch.no_grad():
        model.known.fill_(7.0).requires_grad_(False)
    made, guide = afresh(model, pm.guides.DKF(model, hidden_dim=3), recs, 1)
    assert type(made) is Own and made.config["gain"] == 2.0 and guide.model is made
    assert made.tilt.dtype == torch.float64 and not torch.equal(made.tilt, model.tilt)
    assert torch.equal(made.known, model.known) and not made.known.requires_grad
    torch.manual_seed(1)
    expected = Own(recs, latent_dim=2, embedding_dim=1, hidden_dim=4, gain=2.0)
    assert torch.equal(made.tilt.float(), expected.tilt)
    # from some of its recordings: neurons of these start from the data, as the constructor has it
    some, _ = afresh(model, pm.guides.DKF(model, hidden_dim=3), recs.select(recs.names[:2]), 1)
    rows = slice(0, 2 * 5)
    torch.testing.assert_close(some.observation.log_sd[rows], made.observation.log_sd[rows])
    assert not torch.equal(some.observation.log_sd, made.observation.log_sd)


def test_a_model_that_was_changed_by_hand_is_refused(recs):
    model = Changed(recs, latent_dim=2, embedding_dim=1, hidden_dim=4)
    model.more = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=r"Changed cannot be started afresh.*more.*constructor"):
        afresh(model, pm.guides.DKF(model), recs, 0)


def test_the_best_is_that_of_the_highest_held_out_elbo(restarts, recs):
    held_out = recs.split(seed=5)[1]
    values = [held_out_elbo(fit, held_out, 5) for fit in restarts.fits]
    np.testing.assert_array_equal(restarts.elbo, values)
    assert restarts.best is restarts.fits[int(np.argmax(values))]
    assert float(restarts.agreement["latents"].max()) == pytest.approx(1.0)
    assert f"the best {np.argmax(values)}" in repr(restarts)


def test_the_elbo_of_the_exact_posterior_is_the_evidence():
    recs = recordings(missing=False)
    model = linear_gaussian(recs)
    fit = as_fit(model, pm.guides.ExactSmoother(model))
    assert held_out_elbo(fit, recs) == pytest.approx(evidences(model, recs).sum(), rel=1e-10)


def test_states_are_kept_by_restart(recs, pair, restarts, tmp_path):
    kept = pm.fit_restarts(*pair, recs, num_restarts=2, seed=5, checkpoint=tmp_path, **QUICK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["restart_0", "restart_1"]
    again = pm.fit_restarts(*pair, recs, num_restarts=2, seed=5, checkpoint=tmp_path, **QUICK)
    for one, other, plain in zip(kept.fits, again.fits, restarts.fits[:2], strict=True):
        assert_same(one, other)
        assert_same(one, plain)


def test_what_cannot_be_restarted_is_refused(recs, pair):
    with pytest.raises(ValueError, match="num_restarts"):
        pm.fit_restarts(*pair, recs, num_restarts=0)
    some = recs.select(recs.names[:3])
    with pytest.raises(ValueError, match=r"got \['w=4'\] besides"):
        pm.fit_restarts(*pair, some, validation=recs)
    with pytest.raises(ValueError, match="learning_rate") as caught:
        pm.fit_restarts(*pair, recs, num_restarts=2, seed=3, learning_rate=-1.0, **QUICK)
    assert caught.value.__notes__ == ["in restart 0, seed 3"]


# ---- one tree -----------------------------------------------------------------------------------------------


def test_the_tree_has_a_chain_for_each_restart(restarts, recs, az):
    tree = restarts.posterior(recs, num_samples=8, predictive=True, log_likelihood=True)
    alone = pm.posterior(restarts.best, recs, num_samples=8, seed=int(restarts.elbo.argmax("chain")))
    best = int(restarts.elbo.argmax("chain"))
    for group in ("posterior", "posterior_predictive", "log_likelihood"):
        for name, values in tree[f"w=1/{group}"].data_vars.items():
            assert values.dims[:2] == ("chain", "draw") and values.sizes["chain"] == 3, name
            np.testing.assert_array_equal(values["chain"], [0, 1, 2])
    assert tree["w=1/observed_data"]["observations"].dims == ("trial", "time", "neuron")
    # the map of the best is the identity, and rates are nobody's to map
    for name in ("latents", "rates"):
        own = tree["w=2/posterior"][name].sel(chain=best, drop=True)
        np.testing.assert_allclose(own, alone["w=2/posterior"][name][0], rtol=1e-4, atol=1e-5)
    assert tree["sample_stats"]["elbo"].dims == ("chain", "step")
    np.testing.assert_array_equal(tree["sample_stats"]["elbo"][1], restarts.fits[1].history["elbo"])
    data = pm.to_arviz(tree)
    np.testing.assert_array_equal(data["posterior"]["chain"], [0, 1, 2])
    assert pm.to_arviz(tree, "w=3")["posterior"]["latents"].sizes["chain"] == 3
    assert len(az.summary(data, var_names=["embedding"])) == 4


def with_embeddings(fit: pm.Fit, change) -> pm.Fit:
    mean, variance = fit.statistics.chunk(2, -1)
    return dataclasses.replace(fit, statistics=torch.cat([change(mean), variance], -1))


@pytest.fixture(scope="module")
def narrow(restarts):
    """A fit whose embeddings are told apart."""
    mean = torch.tensor([[-1.0], [-0.2], [0.4], [1.3]])
    return dataclasses.replace(restarts.best, statistics=torch.cat([mean, torch.full_like(mean, 0.01)], -1))


def test_the_memory_is_that_of_all_fits(restarts, recs):
    number = sum(r.num_trials * r.num_bins * (2 + r.num_neurons) for r in recs.values())
    needed = 4 * 10 * number * len(restarts.fits) / 2**30  # of latents and rates, float32
    restarts.posterior(recs, num_samples=10, max_gib=1.01 * needed)
    with pytest.raises(ValueError, match="max_gib"):
        restarts.posterior(recs, num_samples=10, max_gib=0.99 * needed)


def test_r_hat_of_restarts_that_agree(narrow, recs, az):
    """Independent draws of one posterior: within 1.05 of 1, for 4 x 250 draws; a mirrored, moved axis is the same."""
    moved = with_embeddings(narrow, lambda mean: 0.3 - mean)
    same = together([narrow, narrow, moved, narrow], chains([0, 1, 2, 3]), recs)
    tree = same.posterior(recs, num_samples=250)
    values = tree["posterior"]["embedding"].values
    assert not np.array_equal(values[0], values[1])
    assert r_hat(az, tree, "embedding").max() < 1.05
    np.testing.assert_allclose(same.agreement["embedding"], 1.0, atol=0.01)


def test_r_hat_of_restarts_that_do_not(narrow, recs, az):
    """Two recordings change places: 10 sd apart, which no affine map of four points takes away."""
    other = with_embeddings(narrow, lambda mean: mean[[1, 0, 2, 3]])
    tree = together([narrow, other], chains([1, 0]), recs).posterior(recs, num_samples=100)
    assert r_hat(az, tree, "embedding").max() > 1.5
    assert r_hat(az, tree, "rates", "w=4").shape == (6 * 12 * 5,)


def test_latents_of_one_model_in_other_coordinates_agree(az):
    """z' = z A + b through every part of a linear-Gaussian model: the same posterior, met exactly after the map."""
    recs = recordings(missing=False)
    model = linear_gaussian(recs)
    a, b = (
        torch.tensor([[0.0, -2.0], [0.5, 0.0]], dtype=torch.float64),
        torch.tensor([0.3, -1.0], dtype=torch.float64),
    )
    back, other = torch.linalg.inv(a), copy.deepcopy(model)
    with torch.no_grad():
        # z_t' = ((z' - b) A^-1 W^T + c) A + b
        weight = back @ model.dynamics.weight.mT @ a
        other.dynamics.weight.copy_(weight.mT)
        other.dynamics.bias.copy_(model.dynamics.bias @ a + b - b @ weight)
        other.initial.loc.copy_(model.initial.loc @ a + b)
        for part in ("initial", "process_noise"):
            scale = getattr(model, part).log_scale.exp()
            getattr(other, part).log_scale.copy_((scale**2 @ a**2).sqrt().log())
        other.read_out.weight.copy_(model.read_out.weight @ back.mT)
        other.read_out.bias.copy_(model.read_out.bias - model.read_out.weight @ back.mT @ b)
    np.testing.assert_allclose(evidences(other, recs), evidences(model, recs), rtol=1e-10)
    fits = [as_fit(each, pm.guides.ExactSmoother(each)) for each in (model, other)]
    with pytest.warns(UserWarning, match=r"embeddings of 3 recordings in 2 dimension\(s\).*compare rates"):
        both = together(fits, chains([1, 0]), recs)
    assert float(both.agreement["latents"].min()) > 0.9  # the rest is the noise of means of 50 draws
    tree = both.posterior(recs, num_samples=400)
    for name in recs.names:
        # rank-normalised R-hat of 2 x 400 independent draws that agree: 1 + O(1 / 400) each, the largest of 40
        assert np.nanmax(r_hat(az, tree, "latents", name)) < 1.06
    unaligned = dataclasses.replace(both, maps=(both.maps[0], both.maps[0]))
    assert np.nanmax(r_hat(az, unaligned.posterior(recs, num_samples=50), "latents", "a")) > 1.5
