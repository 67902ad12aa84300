"""Pictures of fits, embeddings, reconstructions and scores by what is in them: the numbers drawn, labels and limits."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.linalg
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Ellipse

import pyro_metassm as pm
from pyro_metassm import plots

CONTEXT, HORIZON = 7, 9


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
    tree = xr.DataTree.from_dict({"posterior": (e.where(e.recording == "r4", 0.001 * e)).to_dataset()})
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
