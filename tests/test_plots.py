"""Pictures by what is in them: the numbers drawn, labels and limits; fields against closed forms."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.linalg
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Ellipse

import pyro_metassm as pm
from pyro_metassm import plots
from pyro_metassm._aligning import displacement
from pyro_metassm.plots import _fields

QUICK = {"num_steps": 6, "warm_start": False, "progress": False}
CONTEXT, HORIZON = 7, 9


@pytest.fixture(scope="module")
def recs():
    recs = pm.simulate.limit_cycles([2.5, -5.0], num_trials=6, num_steps=14, num_neurons=(3, 5))
    shorter = recs["w=-5"].observations.copy()
    shorter[0, 4:], shorter[1, 10:], shorter[2, 3] = np.nan, np.nan, np.nan
    made = [recs["w=2.5"], pm.Recording("w=-5", shorter, bin_width=recs.bin_width)]
    return pm.Recordings(made, truth=recs.truth)


def fit_for(recs, latent_dim=2, embedding_dim=1, **more):
    model = pm.models.MetaSSM(recs, latent_dim=latent_dim, embedding_dim=embedding_dim, hidden_dim=8)
    return pm.fit(model, pm.guides.DKF(model, hidden_dim=6), recs, **QUICK, **more)


@pytest.fixture(scope="module")
def fit(recs):
    return fit_for(recs, validation=recs, validation_every=3)


@pytest.fixture(scope="module")
def tree(fit, recs):
    return pm.posterior(fit, recs, num_samples=9)


@pytest.fixture(scope="module")
def ahead(fit, recs):
    with pytest.warns(UserWarning, match="1 of 6 trials end"):
        return pm.forecast(fit, recs, context=CONTEXT, horizon=HORIZON, num_samples=9)


def embeddings(num_recordings: int, size: int, draws: int = 400) -> xr.DataTree:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, draws, num_recordings, size)) * 0.1 + rng.normal(size=(num_recordings, size))
    coords = {"recording": [f"r{i}" for i in range(num_recordings)]}
    data = xr.DataArray(values, coords, ("chain", "draw", "recording", "embedding_dim"), "embedding")
    return xr.DataTree.from_dict({"posterior": data.to_dataset()})


# ---- history ------------------------------------------------------------------------------------------------


def with_history(fit, elbo, **attrs):
    columns = {"elbo": ("step", np.asarray(elbo, float))}
    history = xr.Dataset(columns, {"step": np.arange(1, len(elbo) + 1)}, attrs)
    return pm.Fit(fit.model, fit.guide, history, fit.statistics)


def test_history_leaves_out_how_low_the_first_steps_were(fit):
    elbo = np.concatenate([np.linspace(-1e9, -1e6, 15), np.linspace(50.0, 100.0, 185)])
    ax = plots.history(with_history(fit, elbo))
    low, high = ax.get_ylim()
    assert 40 < low < 60 and 100 < high < 105
    raw, mean = ax.lines
    np.testing.assert_array_equal(raw.get_ydata(), elbo)
    assert mean.get_xdata()[-1] == 200 and mean.get_ydata()[-1] == pytest.approx(elbo[-8:].mean())
    assert ax.get_xlabel() == "step" and ax.get_ylabel() == "ELBO (nats, all data)"
    assert ax.get_legend() is None and len(ax.figure.axes) == 1


def test_history_per_observed_number(fit, recs):
    number = sum(int(r.mask.sum()) for r in recs.values())
    by_attribute = plots.history(with_history(fit, np.arange(50.0), num_observed=number))
    by_data = plots.history(with_history(fit, np.arange(50.0)), recs=recs)
    for ax in (by_attribute, by_data):
        np.testing.assert_allclose(ax.lines[0].get_ydata(), np.arange(50.0) / number)
        assert ax.get_ylabel() == "ELBO (nats per observed number)"


def test_history_shares_an_axis_with_validation_where_both_are_per_number(fit, recs):
    values = fit.history["validation_elbo"].values
    number = sum(int(r.mask.sum()) for r in recs.values())
    ax = plots.history(fit, plt.subplots()[1], recs=recs, validation=recs)
    (dots,) = [line for line in ax.lines if line.get_label() == "validation"]
    assert dots.get_xdata().tolist() == [3, 6]
    np.testing.assert_allclose(dots.get_ydata(), values[[2, 5]] / number)
    assert [text.get_text() for text in ax.get_legend().texts] == ["training", "validation"]
    assert len(ax.figure.axes) == 1
    unknown = pm.Fit(
        fit.model, fit.guide, fit.history.assign_attrs(num_observed_validation=None), fit.statistics
    )
    apart = plots.history(unknown, plt.subplots()[1])
    assert len(apart.figure.axes) == 2 and "validation" in apart.figure.axes[1].get_ylabel()
    np.testing.assert_allclose(apart.figure.axes[1].lines[0].get_ydata(), values[[2, 5]])


@pytest.mark.parametrize("elbo", [[3.0], [3.0, 3.0]])
def test_history_of_a_step_or_two(fit, elbo):
    low, high = plots.history(with_history(fit, elbo)).get_ylim()
    assert low < 3.0 < high


def test_history_needs_steps(fit):
    with pytest.raises(ValueError, match="at least one step"):
        plots.history(with_history(fit, []))
    with pytest.raises(ValueError, match="at least one step"):
        plots.history(pm.Fit(fit.model, fit.guide, xr.Dataset(), fit.statistics))


# ---- embedding ----------------------------------------------------------------------------------------------


def intervals(ax: Axes) -> list[tuple[np.ndarray, np.ndarray]]:
    """Centre and ends of every error bar."""
    return [(np.ravel(bar.lines[0].get_xydata()), bar.lines[2][0].get_segments()[0]) for bar in ax.containers]


def test_embedding_rows_are_means_and_intervals_of_ninety_percent():
    tree = embeddings(3, 1)
    ax = plots.embedding(tree)
    draws = (
        tree["posterior"]["embedding"]
        .stack(s=("chain", "draw"))
        .transpose("recording", ..., "s")
        .values[:, 0]
    )
    assert [text.get_text() for text in ax.get_yticklabels()] == ["r0", "r1", "r2"]
    assert ax.yaxis_inverted() and ax.get_xlabel() == "embedding"
    for row, (center, ends) in enumerate(intervals(ax)):
        np.testing.assert_allclose(center, [draws[row].mean(), row])
        np.testing.assert_allclose(ends[:, 0], np.quantile(draws[row], [0.05, 0.95]))
    assert not any(t.get_text() for t in plots.embedding(tree, labels=False).get_yticklabels())


@pytest.mark.parametrize("values", [{"r1": 5.0, "r0": 2.0, "r2": 7.0}, [2.0, 5.0, 7.0], "array"])
def test_embedding_against_a_value_of_the_recordings(values):
    tree, given = embeddings(3, 1), values
    if given == "array":
        given = xr.DataArray(
            [7.0, 5.0, 2.0], {"recording": ["r2", "r1", "r0"]}, ("recording",), "speed (rad/s)"
        )
    ax = plots.embedding(tree, plt.subplots()[1], given)
    assert [center[0] for center, _ in intervals(ax)] == [2.0, 5.0, 7.0]
    assert ax.get_xlabel() == ("speed (rad/s)" if isinstance(values, str) else "value of the recording")
    assert plots.embedding(tree, against=given, label="age (d)").get_xlabel() == "age (d)"
    assert sorted(text.get_text() for text in ax.texts) == ["r0", "r1", "r2"]


def test_embedding_against_a_value_has_a_panel_for_each_dim():
    tree = embeddings(4, 3)
    axes = plots.embedding(tree, against=[1, 2, 3, 4])
    assert len(axes) == 3 and [ax.get_ylabel() for ax in axes] == [f"embedding dim {d}" for d in (1, 2, 3)]
    mine = plt.subplots(1, 3)[1]
    assert list(plots.embedding(tree, mine, against=[1, 2, 3, 4])) == list(mine)
    with pytest.raises(ValueError, match="needed 3 axes"):
        plots.embedding(tree, plt.subplots()[1], against=[1, 2, 3, 4])


def test_embedding_ellipses_hold_ninety_percent():
    tree = embeddings(4, 2, draws=5000)
    ax = plots.embedding(tree)
    ellipses = [patch for patch in ax.patches if isinstance(patch, Ellipse)]
    draws = tree["posterior"]["embedding"].values.reshape(-1, 4, 2)
    assert len(ellipses) == 4
    for row, ellipse in enumerate(ellipses):
        turned = (draws[:, row] - ellipse.center) @ scipy.linalg.expm(
            np.radians(ellipse.angle) * np.array([[0, -1], [1, 0]])
        )
        inside = ((turned / [ellipse.width / 2, ellipse.height / 2]) ** 2).sum(1) < 1
        assert inside.mean() == pytest.approx(0.9, abs=5 * np.sqrt(0.09 / len(draws)))
    (low, high), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    means = draws.mean(0)
    assert (means > [low, bottom]).all() and (means < [high, top]).all()


def test_embedding_colors():
    tree = embeddings(3, 2)
    numbers = plots.embedding(tree, color={"r0": 1.0, "r1": 2.0, "r2": 3.0}, label="speed")
    assert len({patch.get_facecolor() for patch in numbers.patches}) == 3
    assert len(numbers.figure.axes) == 2 and numbers.figure.axes[1].get_ylabel() == "speed"
    kinds = plots.embedding(tree, color=["cat", "dog", "cat"])
    first, second, third = (patch.get_facecolor() for patch in kinds.patches)
    assert first == third != second
    assert [text.get_text() for text in kinds.get_legend().texts] == ["cat", "dog"]
    markers = {line.get_marker() for line in kinds.lines if len(line.get_xdata())}
    assert len(markers) == 2  # told apart in grey, too
    single = plots.embedding(tree, color=[2, 2, 2])
    assert len({patch.get_facecolor() for patch in single.patches}) == 1


def test_recordings_in_one_place_share_a_label():
    tree = embeddings(5, 2)
    e = tree["posterior"]["embedding"]
    tree = xr.DataTree.from_dict({"posterior": (e.where(e.recording == "r4", 0.01 * e)).to_dataset()})
    texts = {text.get_text() for text in plots.embedding(tree).texts}
    assert texts == {"r0, r1, r2 and 1 more", "r4"}
    assert not plots.embedding(tree, labels=False).texts


@pytest.mark.parametrize("values", [{"r0": 1.0}, [1.0, 2.0]])
def test_embedding_needs_a_value_of_every_recording(values):
    for keyword in ("against", "color"):
        with pytest.raises(ValueError, match=keyword):
            plots.embedding(embeddings(3, 1), **{keyword: values})


# ---- traces -------------------------------------------------------------------------------------------------


def test_traces_show_data_reconstruction_and_forecast(tree, ahead, recs):
    axes = plots.traces(ahead, tree, "w=-5", trial=2, neurons=[2, 0])
    width = recs.bin_width
    assert len(axes) == 2 and axes[-1].get_xlabel() == "time (s)" and "w=-5, trial 2" in axes[0].get_title()
    for ax, neuron in zip(axes, [2, 0], strict=True):
        dots, past, future, start = ax.lines
        np.testing.assert_allclose(
            dots.get_ydata(), recs["w=-5"].observations[2, :, neuron].astype(np.float32)
        )
        np.testing.assert_allclose(dots.get_xdata(), np.arange(14) * width)
        for line, source, group, bins in (
            (past, tree, "posterior", slice(CONTEXT)),
            (future, ahead, "predictions", slice(None)),
        ):
            rates = source["w=-5"][group]["rates"].sel(trial=2).isel(neuron=neuron, time=bins)
            np.testing.assert_allclose(line.get_ydata(), rates.mean(("chain", "draw")), rtol=1e-6)
        assert past.get_xdata()[-1] == pytest.approx((CONTEXT - 1) * width)
        assert future.get_xdata()[0] == pytest.approx(CONTEXT * width) and len(future.get_xdata()) == HORIZON
        assert start.get_xdata()[0] == pytest.approx((CONTEXT - 0.5) * width)
        assert past.get_linestyle() != future.get_linestyle() and past.get_color() != future.get_color()
        assert ax.get_xlim()[1] >= (CONTEXT + HORIZON - 1) * width
        band = ax.collections[1].get_paths()[0].vertices
        low, high = np.quantile(rates, [0.05, 0.95], axis=(0, 1))
        assert band[:, 1].min() == pytest.approx(low.min()) and band[:, 1].max() == pytest.approx(high.max())
    assert [text.get_text() for text in axes[0].get_legend().texts] == [
        "observed",
        "reconstructed",
        "forecast",
    ]


def test_traces_choose_the_neurons_that_vary_most(tree, ahead):
    rates = tree["w=2.5"]["posterior"]["rates"].sel(trial=0).mean(("chain", "draw"))
    best = sorted(np.argsort(-rates.std("time").values)[:2].tolist())
    axes = plots.traces(ahead, tree, "w=2.5", neurons=2)
    assert [ax.get_ylabel().split("\n")[0] for ax in axes] == [f"neuron {n}" for n in best]
    mine = plt.subplots(4)[1]
    assert list(plots.traces(ahead, tree, "w=2.5", neurons=2, axes=mine)) == list(mine[:2])


def test_traces_refuse_what_the_trees_lack(tree, ahead):
    for recording, trial in (("w=-5", 0), ("w=-5", 17), ("w=9", 0)):  # trial 0 ends before the context
        with pytest.raises(
            ValueError, match=f"trial {trial} of recording '{recording}' in the forecast_tree"
        ):
            plots.traces(ahead, tree, recording, trial)
    with pytest.raises(ValueError, match="needed 3 axes"):
        plots.traces(ahead, tree, "w=2.5", axes=plt.subplots(2)[1])


def test_trace_panels_have_a_column_for_each_recording(tree, ahead):
    figure = plots.trace_panels(ahead, tree, ["w=2.5", "w=-5"], neurons=5)
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert titles == ["w=2.5, trial 0", "w=-5, trial 1"]  # the first trials that were forecast
    assert len(figure.legends) == 1 and not any(ax.get_legend() for ax in figure.axes)
    drawn = [ax for ax in figure.axes if ax.lines]
    num_neurons = sum(tree[name]["posterior"].sizes["neuron"] for name in ("w=2.5", "w=-5"))
    assert len(drawn) == min(num_neurons, 10) and all(ax.axison == bool(ax.lines) for ax in figure.axes)


# ---- flow fields --------------------------------------------------------------------------------------------


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


# ---- forecast curve -----------------------------------------------------------------------------------------


def scores(values) -> xr.DataArray:
    values = np.asarray(values, float)
    steps = np.arange(1, values.shape[1] + 1)
    coords = {"recording": [f"r{i}" for i in range(len(values))], "horizon_step": steps}
    coords["lead_time"] = ("horizon_step", 0.03 * steps)
    return xr.DataArray(values, coords, ("recording", "horizon_step"))


def test_forecast_curve_has_a_line_for_each_recording_and_a_bold_mean():
    values = np.array([[0.9, 0.8, 0.7], [0.7, 0.5, np.nan]])
    ax = plots.forecast_curve(scores(values).transpose())
    *each, mean = ax.lines
    np.testing.assert_array_equal([line.get_ydata() for line in each], values)
    np.testing.assert_allclose(mean.get_ydata(), [0.8, 0.65, 0.7])
    assert mean.get_linewidth() > 2 * each[0].get_linewidth() and mean.get_xdata().tolist() == [1, 2, 3]
    assert ax.get_xlabel() == "bins of 30 ms ahead" and ax.get_ylabel() == "forecast $R^2$"
    assert [text.get_text() for text in ax.get_legend().texts] == ["r0", "r1", "mean of 2"]
    low, high = ax.get_ylim()
    assert 0.4 < low < 0.5 and 1.0 < high < 1.1


def test_forecast_curves_are_told_apart_in_grey():
    ax = plots.forecast_curve(scores(np.random.default_rng(0).uniform(0.5, 1.0, (7, 4))))
    luminance = lambda line: round(float(np.dot(to_rgb(line.get_color()), [0.2126, 0.7152, 0.0722])), 1)
    looks = {(line.get_linestyle(), luminance(line), line.get_linewidth()) for line in ax.lines}
    assert len(looks) == 8


def test_forecast_curve_of_many_recordings_and_of_bad_ones():
    ax = plots.forecast_curve(scores(np.linspace([-30.0, -40.0], [0.9, 0.8], 12)))
    assert ax.get_ylim()[0] == -1.0
    assert [text.get_text() for text in ax.get_legend().texts] == ["each recording", "mean of 12"]
    assert any(np.allclose(line.get_ydata(), 0.0) for line in ax.lines)  # the average trial
    single = plots.forecast_curve(scores([[np.nan, np.nan]]))
    assert len(single.get_legend().texts) == 1
    with pytest.raises(ValueError, match="needed the dims"):
        plots.forecast_curve(xr.DataArray(np.ones(3), dims="recording"))


# ---- everywhere ---------------------------------------------------------------------------------------------


def test_every_function_draws_into_the_axes_given(fit, tree, recs):
    truth, scored = recs.truth["w=2.5"], scores([[0.5, 0.4]])
    for draw in (
        lambda ax: plots.history(fit, ax),
        lambda ax: plots.embedding(tree, ax),
        lambda ax: plots.flow_field(fit, "w=2.5", ax),
        lambda ax: plots.true_flow_field(truth, ax),
        lambda ax: plots.forecast_curve(scored, ax),
    ):
        ax, number = plt.subplots()[1], len(plt.get_fignums())
        assert draw(ax) is ax and ax.has_data() and len(plt.get_fignums()) == number
        ax.figure.canvas.draw()  # warnings, which are errors here, may come as late as this
