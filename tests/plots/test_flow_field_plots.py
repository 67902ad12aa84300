"""Pictures of flow fields against closed forms."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.linalg
import torch
import xarray as xr
from matplotlib.axes import Axes

import pyro_metassm as pm
from pyro_metassm import plots
from pyro_metassm._aligning import displacement
from pyro_metassm.plots import _fields

QUICK = {"num_steps": 6, "warm_start": False, "progress": False}


def fit_for(recs, latent_dim=2, embedding_dim=1, **more):
    model = pm.models.MetaSSM(recs, latent_dim=latent_dim, embedding_dim=embedding_dim, hidden_dim=8)
    return pm.fit(model, pm.guides.DKF(model, hidden_dim=6), recs, **QUICK, **more)


@pytest.fixture
def fields(monkeypatch):
    """What is handed to streamplot: points ``(y, x, 2)`` and masked vectors ``(y, x, 2)``."""
    seen, draw = [], Axes.streamplot

    def streamplot(self, x, y, u, v, **more):
        seen.append((np.stack(np.meshgrid(x, y), -1), np.ma.stack([u, v], -1), more))
        return draw(self, x, y, u, v, **more)

    monkeypatch.setattr(Axes, "streamplot", streamplot)
    return seen


MATRIX, SHIFT = np.array([[0.9, 0.3], [-0.2, 0.8]]), np.array([0.1, -0.4])


@pytest.fixture(scope="module")
def linear(recs):
    """A fit whose dynamics are ``z MATRIX^T + SHIFT``."""
    model = pm.models.LinearGaussian(recs, latent_dim=2)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=6), recs, **QUICK | {"num_steps": 0})
    with torch.no_grad():
        fit.model.dynamics.weight.copy_(torch.tensor(MATRIX))
        fit.model.dynamics.bias.copy_(torch.tensor(SHIFT))
    return fit


def test_a_learned_field_is_the_displacement_of_the_dynamics(linear, recs, fields):
    tree = pm.posterior(linear, recs, num_samples=3)
    before = torch.get_rng_state()
    ax = plots.flow_field(linear, "w=2.5", lim=2.0)
    assert torch.equal(torch.get_rng_state(), before)
    plots.flow_field(linear, "w=2.5", plt.subplots()[1], ((-1, 1), (-2, 2)), tree=tree)
    (points, per_bin, _), (others, per_second, _) = fields
    expected = points @ MATRIX.T + SHIFT - points
    assert per_bin.count() > 100
    np.testing.assert_allclose(per_bin, np.ma.array(expected, mask=per_bin.mask), atol=1e-5)
    expected = (others @ MATRIX.T + SHIFT - others) / recs.bin_width
    np.testing.assert_allclose(per_second, np.ma.array(expected, mask=per_second.mask), atol=1e-4)
    assert ax.get_xlim() == (-2, 2) and (ax.get_xlabel(), ax.get_ylabel()) == ("latent 1", "latent 2")
    assert ax.child_axes[0].get_ylabel() == "speed (per bin)"


def test_displacements_are_those_of_the_recordings_own_embedding(fit):
    moved = pm.Fit(fit.model, fit.guide, fit.history, fit.statistics + torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    states = np.random.default_rng(0).normal(size=(4, 5, 2))
    first, second = (displacement(moved, name, states) for name in moved.names)
    assert first.shape == states.shape and np.abs(first - second).max() > 1e-4
    np.testing.assert_array_equal(first, displacement(fit, "w=2.5", states))
    e = moved.statistics[1, :1].view(1, 1, 1)
    with torch.no_grad():
        z = torch.tensor(states, dtype=torch.float32).view(1, 1, -1, 2)
        expected = moved.model.transition(z, moved.model.adapt_dynamics(e)).mean - z
    np.testing.assert_allclose(second, expected.view(4, 5, 2), atol=1e-6)


def mapped(z: np.ndarray, truth: np.ndarray) -> xr.DataTree:
    """A posterior tree of latents that are known exactly, with their truth."""
    time = {"time": np.arange(z.shape[1]) * 0.03}
    latents = xr.Dataset({"latents": (("chain", "draw", "trial", "time", "latent_dim"), z[None, None])}, time)
    constant = xr.Dataset({"true_latents": (("trial", "time", "truth_dim"), truth)}, time)
    return xr.DataTree.from_dict({"w=2.5/posterior": latents, "w=2.5/constant_data": constant})


def test_align_finds_an_affine_map():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4, 30, 2))
    truth = z @ MATRIX + SHIFT
    z[0, 20:] = np.nan  # a trial that ends
    found = plots.align(mapped(z, truth), "w=2.5")
    np.testing.assert_allclose(found.matrix, MATRIX, atol=1e-12)
    np.testing.assert_allclose(found.offset, SHIFT, atol=1e-12)
    np.testing.assert_allclose(found.to_latents(found.to_truth(z[1])), z[1], atol=1e-12)
    assert found.r2 == pytest.approx(1.0)
    noisy = plots.align(mapped(z, truth + rng.normal(size=truth.shape)), "w=2.5")
    signal = truth[1:].var((0, 1)).sum()
    assert noisy.r2 == pytest.approx(signal / (signal + 2), abs=0.15)  # noise of variance 1 in both dims


def test_align_more_latents_than_true_ones():
    truth = np.random.default_rng(0).normal(size=(4, 30, 2))
    z = np.concatenate([truth @ MATRIX, truth[..., :1] + 1.0], -1)  # three latents on a plane
    found = plots.align(mapped(z, truth), "w=2.5")
    np.testing.assert_allclose(found.to_truth(z), truth, atol=1e-10)
    np.testing.assert_allclose(found.to_latents(truth), z, atol=1e-10)


def test_align_needs_the_truth(tree, recs, fit):
    bare = pm.posterior(fit, pm.Recordings(recs.values()), num_samples=2)
    with pytest.raises(ValueError, match="true latents of recording 'w=-5'"):
        plots.align(bare, "w=-5")
    with pytest.raises(ValueError, match="recording 'w=9'"):
        plots.align(bare, "w=9")


def test_an_aligned_field_is_in_the_true_coordinates(linear, fields):
    """With truth = z M + s, the true displacement is that of the latents times M, wherever it is drawn."""
    change = np.array([[2.0, 0.5], [0.0, -1.0]])
    z = np.random.default_rng(0).normal(size=(5, 40, 2))
    tree = mapped(z, z @ change + 3.0)
    ax = plots.flow_field(linear, "w=2.5", tree=tree, align=True, num_trials=2)
    ((points, field, _),) = fields
    latents = (points - 3.0) @ np.linalg.inv(change)
    expected = (latents @ MATRIX.T + SHIFT - latents) @ change / 0.03
    np.testing.assert_allclose(field, np.ma.array(expected, mask=field.mask), rtol=1e-3, atol=1e-3)
    assert ax.get_xlabel() == "true latent 1" and "$R^2$ = 1.000" in ax.get_title()
    paths = [line.get_xydata() for line in ax.lines if len(line.get_xdata()) == 40]
    assert len(paths) == 2
    np.testing.assert_allclose(paths[1], (z @ change + 3.0)[1], atol=1e-10)


def test_fields_are_drawn_only_where_there_are_data(fields):
    truth = pm.simulate.limit_cycles([5.0], num_trials=4).truth["w=5"]
    half = truth.isel(trial=[0]).copy()
    half["latents"] = half["latents"].clip(min=0.5)
    plots.true_flow_field(half, lim=2.0)
    ((points, field, _),) = fields
    mask = np.ma.getmaskarray(field)[..., 0]
    distance = np.linalg.norm(points[:, :, None] - half["latents"].values.reshape(-1, 2), axis=-1).min(-1)
    cell = 4.0 / (_fields.GRID - 1)
    assert (mask == (distance >= 2 * cell)).all() and mask[points[..., 0] < 0].all() and not mask.all()
    with pytest.raises(ValueError, match="system"):
        plots.true_flow_field(xr.Dataset({"latents": truth["latents"]}))
    far = plots.true_flow_field(truth, lim=((50.0, 60.0), (50.0, 60.0)))  # nothing there: an empty picture
    assert not far.lines and len(fields) == 1


def test_a_true_field_at_an_instant_and_over_a_bin(fields):
    truth = pm.simulate.duffing([(-0.5, 1.0)], c=0.0, num_trials=4).truth["duffing a=-0.5 b=1"]
    plots.true_flow_field(truth, lim=1.0)
    plots.true_flow_field(truth, lim=1.0, bin_width=0.4)
    (points, instant, _), (_, over_a_bin, _) = fields
    generator = np.array([[0.0, 1.0], [-1.0, -0.5]])
    expected = points @ generator.T
    np.testing.assert_allclose(instant, np.ma.array(expected, mask=instant.mask), atol=1e-12)
    expected = (points @ scipy.linalg.expm(0.4 * generator).T - points) / 0.4
    np.testing.assert_allclose(over_a_bin, np.ma.array(expected, mask=over_a_bin.mask), atol=1e-7)


def test_flow_comparison_shares_limits_and_colours(fit, tree, recs, fields):
    learned, true = plots.flow_comparison(fit, tree, "w=-5", recs.truth["w=-5"])
    assert learned.get_xlim() == true.get_xlim() and learned.get_ylim() == true.get_ylim()
    norms = [more["norm"] for _, _, more in fields]
    assert norms[0].vmax == norms[1].vmax > 0 and norms[0].vmin == norms[1].vmin == 0
    assert len(learned.figure.axes) == 3 and learned.figure.axes[2].get_ylabel() == "speed (per s)"
    column = plt.subplots(2)[1]
    assert list(plots.flow_comparison(fit, tree, "w=2.5", recs.truth["w=2.5"], axes=column)) == list(column)


def test_a_plane_of_more_latents(recs, fields):
    fit = fit_for(recs, latent_dim=3)
    tree = pm.posterior(fit, recs, num_samples=2)
    ax = plots.flow_field(fit, "w=2.5", tree=tree, plane=(2, 0))
    ((points, field, _),) = fields
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 3", "latent 1")
    middle = tree["w=2.5"]["posterior"]["latents"].mean(("chain", "draw", "trial", "time")).values[1]
    states = np.stack([points[..., 1], np.full(points.shape[:2], middle), points[..., 0]], -1)
    expected = displacement(fit, "w=2.5", states)[..., [2, 0]] / recs.bin_width
    np.testing.assert_allclose(field, np.ma.array(expected, mask=field.mask), rtol=1e-3, atol=1e-3)
    one = fit_for(recs, latent_dim=1)
    for wrong, message in (
        ((one, "w=2.5"), "two or more latents"),
        ((fit, "w=9"), "needed one of the recordings"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.flow_field(*wrong)
    with pytest.raises(ValueError, match="needed a tree"):
        plots.flow_field(fit, "w=2.5", align=True)
