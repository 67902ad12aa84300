"""Pictures of the map of dynamics, by what is drawn: positions, markers, styles, labels."""

import importlib
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from drawn_maps import BIN, RNG, diagram, field, legend, points, texts
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Ellipse

from pyro_metassm import plots
from pyro_metassm.analysis.fixed_points import kinds

# Modules that the functions of their names hide.
FLOW, POINTS_MODULE = (
    importlib.import_module(f"pyro_metassm.plots.{name}") for name in ("flow", "fixed_points")
)
THIN, THICK, KINDS = FLOW.THIN, FLOW.THICK, POINTS_MODULE.KINDS


# ---- flow ---------------------------------------------------------------------------------------------------


@pytest.fixture
def streams(monkeypatch):
    seen, draw = [], Axes.streamplot

    def streamplot(self, x, y, u, v, **more):
        seen.append((np.ma.stack([u, v], -1), more))
        return draw(self, x, y, u, v, **more)

    monkeypatch.setattr(Axes, "streamplot", streamplot)
    return seen


def test_a_flow_is_the_mean_displacement_where_data_have_been(streams):
    found = field()
    ax = plots.flow(found)
    ((vectors, look),) = streams
    visited = found["visited"].values
    assert (np.ma.getmaskarray(vectors)[..., 0] == ~visited).all() and not visited.all()
    mean = found["displacement"].mean("draw").values / BIN
    np.testing.assert_allclose(vectors[visited], mean[visited])
    np.testing.assert_allclose(look["color"][visited], found["speed_mean"].values[visited])
    assert look["norm"].vmax == pytest.approx(found["speed_mean"].values[visited].max())
    assert ax.get_xlim() == (-1, 1) and ax.get_ylim() == (-2, 2) and ax.get_aspect() == 1
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 1", "latent 2")
    (bar,) = ax.child_axes
    assert bar.get_ylabel() == "speed (per s)"
    assert not plots.flow(found, colorbar=False).child_axes
    plots.flow(found, speed_max=7.0)
    assert streams[-1][1]["norm"].vmax == 7.0


def test_lines_are_thin_where_draws_disagree(streams):
    found = field(num_draws=4000, spread=0.5)
    ax = plots.flow(found)
    sd = np.sqrt(found["displacement"].var("draw").sum("axis").values)
    length = np.linalg.norm(found["displacement"].mean("draw").values, axis=-1)
    share = (streams[0][1]["linewidth"] - THIN) / (THICK - THIN)
    # length / sd = share / (1 - share): half where they are equal
    np.testing.assert_allclose(share / (1 - share), length / sd, rtol=1e-6)
    assert texts(ax.texts) == ["thin: draws disagree"]
    assert not plots.flow(field(spread=0.0)).texts
    plots.flow(field(num_draws=1))
    assert streams[-1][1]["linewidth"] == 1.2


def test_paths_lie_in_the_plane_of_the_flow():
    turn = np.array([[0.0, 0.6, 0.8], [1.0, 0.0, 0.0]])
    z = RNG.normal(size=(1, 7, 4, 5, 3))
    z[..., 0, 0, :] = np.nan  # the first trial begins a bin later
    paths = xr.DataArray(z, dims=("chain", "draw", "trial", "time", "latent_dim"))
    ax = plots.flow(field(axes=turn, principal=1), paths=paths, num_paths=2)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("principal axis 1", "principal axis 2")
    mean = z.mean((0, 1))
    long = [line for line in ax.lines if len(line.get_xdata()) == 5]
    dots = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(long) == 2 == len(dots)
    for k, (line, dot) in enumerate(zip(long, dots, strict=True)):
        np.testing.assert_allclose(line.get_xydata(), mean[k] @ turn.T)
        np.testing.assert_allclose(dot.get_xydata()[0], (mean[k] @ turn.T)[1 - k])
    with pytest.raises(ValueError, match=r"flow: needed paths .* of 3 latents"):
        plots.flow(field(axes=turn), paths=paths.isel(latent_dim=[0, 1]))
    with pytest.raises(ValueError, match="num_paths"):
        plots.flow(field(axes=turn), paths=paths, num_paths=-1)


def test_one_of_several_places(streams):
    found = field(places=["a", "b"])
    assert plots.flow(found, at="b").get_title() == "b"
    mean = found["displacement"].sel(recording="b").mean("draw").values / BIN
    np.testing.assert_allclose(streams[0][0].compressed(), mean[found["visited"].values[0]].ravel())
    for at in (None, "c"):
        with pytest.raises(ValueError, match=r"flow: needed at= one of the recordings a, b, got"):
            plots.flow(found, at=at)
    with pytest.raises(ValueError, match="found at one place"):
        plots.flow(field(), at="a")
    assert plots.flow(found.isel(recording=[0])).get_title() == "a"


# ---- fixed points -------------------------------------------------------------------------------------------


def test_fixed_points_by_place_type_and_stability():
    found = points()
    ax = plots.fixed_points(found, plane=(2, 0))
    position = found["position"].values[..., [2, 0]]
    node, saddle = (line for line in ax.lines if len(line.get_xdata()))
    np.testing.assert_allclose(node.get_xydata()[0], position[:, 0].mean(0))
    np.testing.assert_allclose(saddle.get_xydata()[0], np.nanmean(position[:, 1], 0))
    assert (node.get_marker(), saddle.get_marker()) == ("o", "X")
    assert to_rgba(node.get_markerfacecolor()) != to_rgba("white")
    ellipses = [patch for patch in ax.patches if isinstance(patch, Ellipse)]
    assert len(ellipses) == 2
    np.testing.assert_allclose(ellipses[1].center, np.nanmean(position[:, 1], 0))
    assert ellipses[0].get_facecolor()[:3] != ellipses[1].get_facecolor()[:3]
    # 90 % of a plane Normal: sqrt(-2 ln 0.1) standard deviations, area pi s^2 sqrt(det)
    area = np.pi * -2 * np.log(0.1) * np.sqrt(np.linalg.det(np.cov(position[:, 0].T)))
    assert np.pi * ellipses[0].width * ellipses[0].height / 4 == pytest.approx(area)
    assert texts(ax.texts) == ["75 %, 97 % saddle"]  # 29 of 30
    for limits, ha in (((-9, 3), "right"), ((-3, 9), "left")):
        ax = plt.subplots()[1]
        ax.set_xlim(*limits)
        assert plots.fixed_points(found, ax, plane=(2, 0)).texts[0].get_ha() == ha  # towards the middle
    assert legend(ax) == ["stable node", "saddle"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("latent 3", "latent 1")
    every = plots.fixed_points(found, least=0.0)
    last = [line for line in every.lines if len(line.get_xdata())][-1]
    assert last.get_marker() == "D" and to_rgba(last.get_markerfacecolor()) == to_rgba("white")
    assert plots.fixed_points(found, legend=False).get_legend() is None


def test_every_type_that_there_is_has_a_look_of_its_own():
    values = [0.5, 1.5, 0.5 * np.exp(0.3j), 1.5 * np.exp(0.3j)]
    pairs = [[a, b] for a, b in itertools.product(values, values)]
    rows = np.array([sorted(pair, key=abs, reverse=True) for pair in pairs])
    assert set(kinds(rows).tolist()) == set(KINDS)
    assert len({(look["marker"], look["markerfacecolor"] == "white") for look in KINDS.values()}) == len(
        KINDS
    )


def test_fixed_points_on_a_flow_are_in_its_plane():
    turn = np.array([[0.0, 0.6, 0.8], [1.0, 0.0, 0.0]])
    base = field(axes=turn, principal=1)
    found = points()
    ax = plots.fixed_points(found, plots.flow(base), on=base)
    (node, *_) = (line for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata()))
    np.testing.assert_allclose(node.get_xydata()[0], found["position"].values[:, 0].mean(0) @ turn.T)
    assert ax.get_xlabel() == "principal axis 1"
    with pytest.raises(ValueError, match="needed a flow of 3 latents"):
        plots.fixed_points(found, on=field())
    both = field(places=["a", "b"], axes=turn)
    of_both = xr.concat([found, found], xr.IndexVariable("recording", ["a", "b"]))
    assert plots.fixed_points(of_both, at="b", on=both).lines


def test_places_without_fixed_points_are_empty_pictures():
    none = points().isel(fixed_point=slice(0))
    ax = plots.fixed_points(none)
    assert not ax.lines and not ax.patches and ax.get_legend() is None and ax.get_xlabel() == "latent 1"


@pytest.mark.parametrize("plane", [(0, 3), (1, 1), (0,), 0, (0, 1, 2), ("x", "y")])
def test_planes_that_are_none(plane):
    with pytest.raises(ValueError, match="needed a plane of two of the 3 latents"):
        plots.fixed_points(points(), plane=plane)


def test_limit_cycles_are_closed_and_say_their_period():
    angle = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    circle = np.stack([np.cos(angle), np.sin(angle)], -1)
    path = np.stack([circle, 2 * circle])[None] * np.array([1.0, 1.1, np.nan])[:, None, None, None]
    path[2, 0] = 0.9 * circle
    found = xr.Dataset(
        {
            "path": (("draw", "cycle", "phase", "latent_dim"), path),
            "period": (("draw", "cycle"), [[0.5, 2.0], [0.6, 2.0], [0.7, np.nan]]),
            "stable": (("draw", "cycle"), [[True, False], [True, False], [True, False]]),
            "probability": (("cycle",), [1.0, 2 / 3]),
        }
    )
    ax = plots.limit_cycles(found)
    drawn = [line for line in ax.lines if len(line.get_xdata())]
    assert len(drawn) == 5 and all(len(line.get_xdata()) == 17 for line in drawn)
    np.testing.assert_allclose(drawn[1].get_xydata(), 1.1 * np.concatenate([circle, circle[:1]]))
    assert [line.get_linestyle() for line in drawn] == ["-", "-", "-", "--", "--"]
    assert legend(ax) == ["cycle of 0.6 s", "cycle of 2 s, unstable (67 % of draws)"]
    assert len(legend(plots.limit_cycles(found, least=0.9))) == 1
    both = plots.limit_cycles(found, plots.fixed_points(points().isel(latent_dim=[0, 1])), least=0.9)
    assert legend(both) == ["stable node", "saddle", "cycle of 0.6 s"]


# ---- everywhere ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["flow", "fixed_points", "limit_cycles", "bifurcation", "interpolation_grid"]
)
def test_the_wrong_dataset_is_named(name):
    draw = getattr(plots, name)
    with pytest.raises(ValueError, match=f"{name}: needed the Dataset of pm.analysis.*got one of elbo"):
        draw(xr.Dataset({"elbo": ("step", [1.0])}))
    with pytest.raises(ValueError, match=f"{name}: needed the Dataset of pm.analysis.*got ndarray"):
        draw(np.ones(3))


def test_every_picture_of_the_map_draws_into_the_axes_given():
    for draw in (
        lambda ax: plots.flow(field(), ax),
        lambda ax: plots.fixed_points(points(), ax),
        lambda ax: plots.bifurcation(diagram(), ax),
    ):
        ax, number = plt.subplots()[1], len(plt.get_fignums())
        assert draw(ax) is ax and ax.has_data() and len(plt.get_fignums()) == number
        ax.figure.canvas.draw()
