"""Pictures of trials and of scores, by what is drawn."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import xarray as xr
from matplotlib.collections import QuadMesh
from matplotlib.text import Text

import pyro_metassm as pm
from pyro_metassm import plots

RNG = np.random.default_rng(0)
BIN, TRIALS, BINS, NEURONS, DRAWS, CONTEXT = 0.1, 6, 10, 4, 12, 6


@pytest.fixture(scope="module")
def tree() -> xr.DataTree:
    """As of pm.posterior, of counts; trial 2 ends early and neuron 3 is silent."""
    counts = RNG.poisson(2.0, (TRIALS, BINS, NEURONS)).astype(np.float32)
    counts[..., 3], counts[2, 7:] = 0.0, np.nan
    rates = RNG.gamma(2.0, size=(1, DRAWS, TRIALS, BINS, NEURONS)) * np.array([1.0, 3.0, 2.0, 0.0])
    rates[:, :, 2, 7:] = np.nan
    coords = {
        "trial": np.arange(TRIALS),
        "time": np.arange(BINS) * BIN,
        "neuron": [f"n{k}" for k in range(NEURONS)],
    }
    coords["condition"] = ("trial", ["b", "a", "c", "a", "b", "a"])
    draws = ("chain", "draw", "trial", "time")
    latents = RNG.normal(size=(1, DRAWS, TRIALS, BINS, 2)) * [1.0, 5.0]
    posterior = xr.Dataset(
        {"rates": ((*draws, "neuron"), rates), "latents": ((*draws, "latent_dim"), latents)}, coords
    )
    seen = xr.Dataset({"observations": (("trial", "time", "neuron"), counts)}, coords)
    return xr.DataTree.from_dict({"a/posterior": posterior, "a/observed_data": seen})


@pytest.fixture(scope="module")
def ahead(tree) -> xr.DataTree:
    """As of pm.forecast of all trials but the third: bins 6 to 12."""
    dims = ("chain", "draw", "trial", "time", "neuron")
    coords = {"trial": [0, 1, 3, 4, 5], "time": np.arange(CONTEXT, 13) * BIN}
    rates = RNG.gamma(2.0, size=(1, DRAWS, 5, 7, NEURONS))
    seen = xr.Dataset({"observations": (("trial", "time", "neuron"), np.ones((5, 7, NEURONS)))}, coords)
    predictions = xr.Dataset({"rates": (dims, rates)}, coords)
    return xr.DataTree.from_dict({"a/predictions": predictions, "a/observed_data": seen})


def texts(found):
    return [text.get_text() for text in found]


# ---- trajectories -------------------------------------------------------------------------------------------


def test_a_trial_without_a_forecast(tree):
    axes = plots.trajectories(tree, "a", 1, which=[1, 0])
    assert [ax.get_ylabel() for ax in axes] == ["neuron n1\n(per bin)", "neuron n0\n(per bin)"]
    for ax, neuron in zip(axes, [1, 0], strict=True):
        dots, line = ax.lines
        np.testing.assert_array_equal(dots.get_ydata(), tree["a/observed_data/observations"][1, :, neuron])
        rates = tree["a/posterior/rates"].values[0, :, 1, :, neuron]
        np.testing.assert_allclose(line.get_ydata(), rates.mean(0))
        band = ax.collections[0].get_paths()[0].vertices[:, 1]
        assert band.max() == pytest.approx(np.quantile(rates, 0.95, axis=0).max())
        assert ax.get_xlim() == pytest.approx((-BIN / 2, (BINS - 0.5) * BIN))
    assert texts(axes[0].get_legend().texts) == ["observed", "reconstructed"]
    assert (
        axes[-1].get_xlabel() == "time (s)" and "bands hold 90 % of the rate's draws" in axes[0].get_title()
    )


def test_latents_have_no_observations_and_are_chosen_by_how_much_they_vary(tree):
    axes = plots.trajectories(tree, "a", 0, of="latents", which=1)
    assert [ax.get_ylabel() for ax in axes] == ["latent 2"]
    (line,) = axes[0].lines
    np.testing.assert_allclose(line.get_ydata(), tree["a/posterior/latents"].values[0, :, 0, :, 1].mean(0))
    assert "90 % of the latent" in axes[0].get_title()
    assert len(plots.trajectories(tree, "a", of="latents", which=9)) == 2


def test_a_forecast_begins_where_it_was_made(tree, ahead):
    (ax,) = plots.trajectories(tree, "a", 3, which=[0], forecast=ahead)
    _, past, future, start = ax.lines
    assert past.get_xdata()[-1] == pytest.approx((CONTEXT - 1) * BIN)
    assert future.get_xdata()[0] == pytest.approx(CONTEXT * BIN)
    assert start.get_xdata()[0] == pytest.approx((CONTEXT - 0.5) * BIN)
    assert future.get_linestyle() == "--" and ax.get_xlim()[1] == pytest.approx(12.5 * BIN)
    joined = tree.copy()
    joined["a/predictions"] = ahead["a/predictions"]
    (same,) = plots.trajectories(joined, "a", 3, which=[0])
    np.testing.assert_array_equal(same.lines[2].get_xydata(), future.get_xydata())
    (without,) = plots.trajectories(joined, "a", 2, which=[0])  # it ends before the context
    assert texts(without.get_legend().texts) == ["observed", "reconstructed"]


def test_trajectories_refuse_what_there_is_not(tree, ahead):
    for given, message in (
        ({"recording": "b"}, "needed trial 0 of recording 'b' in the tree, got none"),
        ({"trial": 9}, "needed trial 9 of recording 'a' in the tree, got 0, 1, 2"),
        ({"trial": 2, "forecast": ahead}, "in the forecast, got 0, 1, 3"),
        ({"of": "speed"}, "needed of= 'rates' or 'latents', got 'speed'"),
        ({"which": [0, 4]}, "positions below 4, got 4"),
        ({"which": []}, "got none"),
        ({"which": 0}, "which: needed an integer of at least 1"),
        ({"ax": plt.subplots()[1]}, "needed 3 axes, one for each neuron, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.trajectories(tree, **{"recording": "a", "trial": 0} | given)
    with pytest.raises(ValueError, match=r"with posterior of recording 'a'"):
        plots.trajectories(ahead, "a", 0)
    with pytest.raises(ValueError, match="trial 0 of recording 'b' in the forecast_tree"):
        plots.trace_panels(ahead, tree, ["b"])


# ---- raster and rates ---------------------------------------------------------------------------------------


def image(ax) -> np.ndarray:
    (found,) = ax.images
    return np.ma.filled(found.get_array().astype(float), np.nan)


def test_all_neurons_of_a_trial_are_ordered_by_time(tree):
    above, below = plots.raster_and_rates(tree, "a", trial=1)
    rates = tree["a/posterior/rates"].values.mean((0, 1))[1].T
    weight = rates - rates.min(1, keepdims=True)
    center = [np.average(np.arange(BINS), weights=row) if row.any() else 0.0 for row in weight]
    order = np.argsort(center)
    np.testing.assert_array_equal(image(above), tree["a/observed_data/observations"].values[1].T[order])
    np.testing.assert_allclose(image(below), rates[order] / BIN)
    assert texts(above.get_yticklabels()) == [f"n{k}" for k in order]
    assert above.images[0].get_extent() == pytest.approx([-BIN / 2, (BINS - 0.5) * BIN, 3.5, -0.5])
    assert below.get_xlabel() == "time (s)" and above.get_ylabel() == "4 neurons, by time"
    assert [image.colorbar.ax.get_ylabel() for ax in (above, below) for image in ax.images] == [
        "spikes per bin", "rate (Hz)",
    ]  # fmt: skip
    first, _ = plots.raster_and_rates(tree, "a")
    assert first.get_title() == "a, trial 0"


def test_what_is_missing_is_left_out_of_both(tree):
    above, below = plots.raster_and_rates(tree, "a", trial=2)
    for ax in (above, below):
        assert (
            np.isnan(image(ax)[:, 7:]).all() and np.isfinite(image(ax)[:, :7]).all() and ax.patch.get_hatch()
        )


def test_all_trials_of_a_neuron_are_ordered_by_condition(tree):
    above, below = plots.raster_and_rates(tree, "a", neuron=1)
    order = [1, 3, 5, 0, 4, 2]
    np.testing.assert_array_equal(image(above), tree["a/observed_data/observations"].values[order, :, 1])
    np.testing.assert_allclose(image(below), tree["a/posterior/rates"].values.mean((0, 1))[order, :, 1] / BIN)
    assert above.get_title() == "a, neuron n1" and above.get_ylabel() == "condition (6 trials)"
    assert dict(zip(above.get_yticks(), texts(above.get_yticklabels()), strict=True)) == {
        1.0: "a",
        3.5: "b",
        5.0: "c",
    }
    bare = tree.copy()
    for group in ("posterior", "observed_data"):
        bare[f"a/{group}"] = xr.DataTree(tree[f"a/{group}"].to_dataset().drop_vars("condition"))
    plain, _ = plots.raster_and_rates(bare, "a", neuron=1)
    np.testing.assert_array_equal(image(plain), tree["a/observed_data/observations"].values[:, :, 1])
    assert plain.get_ylabel() == "6 trials"


def test_a_silent_neuron_is_a_white_picture(tree):
    above, below = plots.raster_and_rates(tree, "a", neuron=3)
    assert np.nanmax(image(above)) == 0 == np.nanmax(image(below))
    above.figure.canvas.draw()


def test_rasters_refuse_what_there_is_not(tree, ahead):
    for given, message in (
        ({"trial": 9}, "needed a trial of recording 'a', 0, 1, 2, 3, 4, 5, got 9"),
        ({"neuron": 4}, "by its position, below 4, got 4"),
        ({"neuron": "n1"}, "by its position"),
        ({"trial": 0, "neuron": 0}, "got both"),
        ({"ax": plt.subplots()[1]}, "needed 2 axes, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.raster_and_rates(tree, "a", **given)
    with pytest.raises(ValueError, match="recording 'b', got one of a"):
        plots.raster_and_rates(tree, "b")
    halves = tree.copy()
    halves["a/observed_data"] = xr.DataTree(tree["a/observed_data"].to_dataset() / 2)
    with pytest.raises(ValueError, match="needed counts"):
        plots.raster_and_rates(halves, "a", neuron=1)
    mine = plt.subplots(2)[1]
    assert list(plots.raster_and_rates(tree, "a", ax=mine)) == list(mine)
    assert not any(isinstance(c, QuadMesh) for c in mine[0].collections)


# ---- scores -------------------------------------------------------------------------------------------------


def curve(values, name="forecast_r2") -> xr.DataArray:
    values = np.asarray(values, float)
    coords = {
        "recording": [f"r{k}" for k in range(len(values))],
        "horizon_step": np.arange(1, values.shape[1] + 1),
    }
    return xr.DataArray(values, coords, ("recording", "horizon_step"), name)


def test_baselines_beside_forecasts():
    scores = curve([[0.9, 0.8, 0.7], [0.7, 0.6, 0.5]])
    others = {"persistence": scores - 0.5, "linear": (scores - 0.2).isel(recording=0, drop=True)}
    ax = plots.forecast_curve(scores, baselines=others)
    assert texts(ax.get_legend().texts) == ["r0", "r1", "mean of 2", "persistence", "linear"]
    persistence, linear = (line for line in ax.lines if line.get_marker() not in ("", "None"))
    np.testing.assert_allclose(persistence.get_ydata(), [0.3, 0.2, 0.1])
    np.testing.assert_allclose(linear.get_ydata(), [0.7, 0.6, 0.5])
    assert persistence.get_marker() != linear.get_marker()
    assert ax.get_ylim()[0] < 0.1
    for wrong in (scores.isel(horizon_step=slice(2)), scores.mean("horizon_step"), [0.1, 0.2, 0.3]):
        with pytest.raises(ValueError, match=r"the baseline 'x' over horizon_step \(1, 2, 3\)"):
            plots.forecast_curve(scores, baselines={"x": wrong})
    with pytest.raises(ValueError, match="got Dataset"):
        plots.forecast_curve(scores.to_dataset())


def test_forecast_scores_of_other_kinds_have_their_own_range():
    bits = plots.forecast_curve(curve([[3.0, 2.0]], "bits_per_spike"))
    assert (
        bits.get_ylabel() == "forecast (bits per spike)"
        and 1.9 < bits.get_ylim()[0] < 2 < 3 < bits.get_ylim()[1] < 3.1
    )
    assert plots.forecast_curve(curve([[3.0, 2.0]], "bits_per_spike"), label="bits").get_ylabel() == "bits"


def shots(numbers, values, **dims) -> xr.DataArray:
    return xr.DataArray(values, {"num_trials": numbers, **dims}, ("num_trials", *dims))


def test_adaptation_is_a_mean_with_its_standard_error_over_recordings():
    names, draws = ["a", "b", "c"], [0, 1]
    values = RNG.uniform(0.5, 0.9, (4, 3, 2))
    adapted = shots([1, 2, 8, 16], values, recording=names, draw=draws)
    scratch = shots([2, 8], RNG.uniform(0.2, 0.5, (2, 3)), recording=names)
    ax = plots.adaptation_curve({"adapted": adapted, "from scratch": scratch}, ceiling=0.95)
    first, second = ax.containers
    by_recording = values.mean(2)  # draws of the trials first: they are not independent
    np.testing.assert_allclose(first.lines[0].get_ydata(), by_recording.mean(1))
    np.testing.assert_allclose(first.lines[0].get_xdata(), np.arange(4), atol=0.05)
    np.testing.assert_allclose(second.lines[0].get_xdata(), [1, 2], atol=0.05)
    half = [np.ptp(segment[:, 1]) / 2 for segment in first.lines[2][0].get_segments()]
    np.testing.assert_allclose(half, scipy.stats.sem(by_recording, axis=1))
    assert texts(ax.get_xticklabels()) == ["1", "2", "8", "16"] and ax.get_xlabel() == "trials to adapt from"
    assert ax.get_ylabel() == "forecast $R^2$"
    assert sorted(texts(ax.get_legend().texts)) == ["adapted", "ceiling", "from scratch"]
    looks = [(bar.lines[0].get_marker(), bar.lines[0].get_linestyle()) for bar in (first, second)]
    assert len(set(looks)) == 2 and len({marker for marker, _ in looks}) == 2  # in grey, too
    across = plots.adaptation_curve(adapted, over="draw")
    half = [np.ptp(segment[:, 1]) / 2 for segment in across.containers[0].lines[2][0].get_segments()]
    np.testing.assert_allclose(half, scipy.stats.sem(values.mean(1), axis=1))


def test_adaptation_of_one_recording_has_no_bars_and_no_legend():
    ax = plots.adaptation_curve(shots([1, 4], [0.5, 0.7]))
    assert ax.get_legend() is None and not ax.containers[0].has_yerr
    one = plots.adaptation_curve(shots([1, 4], [[0.5], [0.7]], recording=["a"]))
    assert not one.containers[0].has_yerr
    np.testing.assert_allclose(one.containers[0].lines[0].get_ydata(), [0.5, 0.7])


def test_scores_below_the_axis_are_triangles_on_its_edge():
    ax = plots.adaptation_curve(
        {"adapted": shots([1, 4], [0.5, 0.7]), "from scratch": shots([1, 4], [-20.0, 0.2])}
    )
    low = ax.get_ylim()[0]
    assert low == -1.0
    (triangle,) = (line for line in ax.lines if line.get_marker() == "v" and len(line.get_xdata()))
    assert triangle.get_ydata() == [low] and triangle.get_xdata() == pytest.approx([0], abs=0.05)
    assert any(np.allclose(line.get_ydata(), 0.0) for line in ax.lines if len(line.get_xdata()) == 2)


NO_NUMBERS = (
    {},
    {"a": xr.DataArray([1.0], dims="n")},
    {"a": xr.DataArray([1.0], dims="num_trials")},
    {"a": [0.1]},
)


@pytest.mark.parametrize("wrong", NO_NUMBERS)
def test_adaptation_needs_numbers_of_trials(wrong):
    with pytest.raises(ValueError, match="adaptation_curve: needed"):
        plots.adaptation_curve(wrong)


# ---- embeddings of other kinds ------------------------------------------------------------------------------


def test_embeddings_of_a_map_and_by_a_coordinate():
    e = RNG.normal(size=(30, 3, 2))
    coords = {
        "recording": ["r0", "r1", "r2"],
        "speed": ("recording", [1.0, 2.0, 4.0]),
        "subject": ("recording", list("xxy")),
    }
    found = xr.Dataset({"embedding": (("draw", "recording", "embedding_dim"), e)}, coords)
    ax = plots.embedding(found, color="subject")
    assert texts(ax.get_legend().texts) == ["x", "y"]
    np.testing.assert_allclose([patch.center for patch in ax.patches], e.mean(0))
    first, _ = plots.embedding(found, against="speed")
    assert first.get_xlabel() == "speed"
    assert [bar.lines[0].get_xdata()[0] for bar in first.containers] == [1.0, 2.0, 4.0]
    data = found["embedding"].expand_dims("chain")
    assert plots.embedding(
        xr.DataTree.from_dict({"posterior": data.to_dataset()}), color="subject"
    ).get_legend()
    with pytest.raises(
        ValueError, match=r"color as one of the coordinates speed, subject of the embeddings.*'age'"
    ):
        plots.embedding(found, color="age")
    with pytest.raises(ValueError, match=r"needed the Dataset of pm\.analysis\.embedding_map"):
        plots.embedding(xr.Dataset({"elbo": ("step", [1.0])}))
    with pytest.raises(ValueError, match="needed a tree with posterior/embedding"):
        plots.embedding(xr.DataTree())
    assert pm.plots is plots


def test_names_of_neighbours_do_not_cover_each_other():
    places = np.array([[0.0, 0.0], [1.0, 1.0], [0.45, 0.5], [0.5, 0.44], [0.55, 0.51]])
    e = places + 1e-4 * RNG.normal(size=(30, 5, 2))
    names = [f"a recording of a long name {k}" for k in range(5)]
    found = xr.Dataset({"embedding": (("draw", "recording", "embedding_dim"), e)}, {"recording": names})
    for inches in (9, 5):
        figure, ax = plt.subplots(figsize=(inches, inches))
        plots.embedding(found, ax)
        figure.canvas.draw()
        boxes = [Text.get_window_extent(text) for text in ax.texts]  # without the line to its point
        assert len(boxes) == 5
        assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
        assert ax.texts[0].arrow_patch is None is ax.texts[1].arrow_patch  # nobody is near them
    assert any(text.arrow_patch is not None for text in ax.texts)
    assert not ax.get_title(loc="right")


@pytest.mark.parametrize("color", [None, "kind", "speed"])
def test_of_many_recordings_names_are_written_where_there_is_room(color):
    rng = np.random.default_rng(0)
    places = 0.3 * rng.normal(size=(40, 2))
    e = places + 1e-4 * rng.normal(size=(30, 40, 2))
    coords = {
        "recording": [f"recording {k}" for k in range(40)],
        "kind": ("recording", ["slow", "fast"] * 20),
        "speed": ("recording", np.arange(40.0)),
    }
    found = xr.Dataset({"embedding": (("draw", "recording", "embedding_dim"), e)}, coords)
    ax = plots.embedding(found, color=color)
    ax.figure.canvas.draw()
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    boxes += [ax.get_legend().get_window_extent()] if color == "kind" else []
    assert 5 < len(ax.texts) < 40
    written = sum(text.get_text().count("recording") for text in ax.texts)  # neighbours may share a label
    assert ax.get_title(loc="right") == f"{40 - written} of 40 names left out"
    assert not any(a.overlaps(b) for k, a in enumerate(boxes) for b in boxes[:k])
    frame = ax.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)
    dots = ax.transData.transform(e.mean(0))
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
