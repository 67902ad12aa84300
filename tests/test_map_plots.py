"""Pictures of the map of dynamics, by what is drawn: positions, markers, styles, labels."""

import importlib
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from known_maps import NormalForm, fit_of
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.patches import Ellipse

import pyro_metassm as pm
from pyro_metassm import plots
from pyro_metassm.analysis.fixed_points import kinds

# Modules that the functions of their names hide.
FLOW, POINTS_MODULE = (
    importlib.import_module(f"pyro_metassm.plots.{name}") for name in ("flow", "fixed_points")
)
THIN, THICK, KINDS = FLOW.THIN, FLOW.THICK, POINTS_MODULE.KINDS
RNG = np.random.default_rng(0)
BIN = 0.05


def texts(found):
    return [text.get_text() for text in found]


def legend(ax):
    return [] if ax.get_legend() is None else texts(ax.get_legend().texts)


# ---- flow ---------------------------------------------------------------------------------------------------


def field(num_draws=5, spread=0.1, axes=None, places=None, principal=0) -> xr.Dataset:
    """A Dataset as of analysis.flow_field: a turn and its draws, visited right of x = 0."""
    x, y = np.linspace(-1, 1, 6), np.linspace(-2, 2, 9)
    points = np.stack(np.meshgrid(x, y), -1)
    moved = points @ np.array([[0.0, 1.0], [-1.0, 0.0]]) + spread * RNG.normal(size=(num_draws, 1, 1, 2))
    axes = np.eye(2) if axes is None else axes
    speed = np.linalg.norm(moved, axis=-1) / BIN
    found = xr.Dataset(
        {
            "displacement": (("draw", "y", "x", "axis"), moved),
            "speed": (("draw", "y", "x"), speed),
            "speed_mean": (("y", "x"), speed.mean(0)),
            "visited": (("y", "x"), points[..., 0] > 0),
            "x_value": (("x",), x),
            "y_value": (("y",), y),
            "center": (("latent_dim",), np.zeros(axes.shape[1])),
            "axes": (("axis", "latent_dim"), axes),
        },
        attrs={"plane": [0, 1], "principal": principal, "bin_width": BIN},
    )
    if places is None:
        return found
    twice = found.assign(displacement=2 * found["displacement"])
    return xr.concat(
        [found, twice], xr.IndexVariable("recording", places), combine_attrs="override", data_vars="all"
    )


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

POINTS = np.array([[0.0, 0.5, -1.0], [2.0, -1.0, 0.0], [1.0, 1.0, 1.0]])


def points(num_draws=40) -> xr.Dataset:
    """A stable node of all draws, a saddle of 3 in 4 (1 in 30 of them calls it a node), an open focus of 1 in 20."""
    position = POINTS + 0.1 * RNG.normal(size=(num_draws, 3, 3))
    kind = np.array([["stable node", "saddle", "unstable focus"]] * num_draws)
    kind[0, 1] = "unstable node"
    lacking = np.zeros((num_draws, 3), bool)
    lacking[30:, 1], lacking[2:, 2] = True, True
    position[lacking], kind[lacking] = np.nan, ""
    return xr.Dataset(
        {
            "position": (("draw", "fixed_point", "latent_dim"), position),
            "type": (("draw", "fixed_point"), kind),
            "probability": (("fixed_point",), 1 - lacking.mean(0)),
        }
    )


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


# ---- bifurcations -------------------------------------------------------------------------------------------


def diagram(num_draws=11) -> xr.Dataset:
    """Two branches over s = 0, 0.25, ..., 1: one that changes its stability at 0.6, one that ends after 0.25."""
    s = np.linspace(0, 1, 5)
    moved = np.linspace(-0.1, 0.1, num_draws)
    position = np.full((num_draws, 5, 2, 2), np.nan)
    position[:, :, 0, 0] = 2 * s + moved[:, None]
    position[:, :2, 1, 0] = -1.0
    position[..., 1] = 10 * position[..., 0]
    stable = np.zeros((num_draws, 5, 2), bool)
    stable[:, :3, 0] = True
    crossing = np.full((num_draws, 2, 1), np.nan)
    crossing[:, 0, 0] = 0.6 + moved / 2
    each = ("draw", "point", "branch")
    low = np.full((num_draws, 5, 1, 2), np.nan)
    low[:, 3:, 0, 0], low[:, 3:, 0, 1] = -3.0, -4.0
    return xr.Dataset(
        {
            "position": ((*each, "latent_dim"), position),
            "stable": (each, stable),
            "crossing": (("draw", "branch", "crossing"), crossing),
            "crossing_frequency": (("draw", "branch", "crossing"), np.where(np.isnan(crossing), np.nan, 2.0)),
            "low": (("draw", "point", "cycle", "latent_dim"), low),
            "high": (("draw", "point", "cycle", "latent_dim"), -low),
            "cycle_stable": (("draw", "point", "cycle"), np.isfinite(low[..., 0])),
        },
        coords={"s": ("point", s)},
    )


def finite(line):
    xy = np.asarray(line.get_xydata(), float)
    return xy[np.isfinite(xy).all(1)]


def by_style(ax, color, style):
    return [line for line in ax.lines if line.get_color() == color and line.get_linestyle() == style]


def test_branches_are_solid_where_stable_and_dashed_where_not():
    found = diagram()
    ax = plots.bifurcation(found)
    (solid,) = by_style(ax, "#000000", "-")
    first, ended = by_style(ax, "#000000", "--")
    # They meet halfway between 0.5, the last stable point, and 0.75.
    np.testing.assert_allclose(finite(solid), [[0, 0], [0.25, 0.5], [0.5, 1], [0.625, 1.25]], atol=1e-12)
    np.testing.assert_allclose(finite(first), [[0.625, 1.25], [0.75, 1.5], [1, 2]])
    np.testing.assert_allclose(finite(ended), [[0, -1], [0.25, -1]])
    band = ax.collections[0].get_paths()[0].vertices
    low, high = np.quantile(found["position"].values[:, 4, 0, 0], [0.05, 0.95])
    at_end = band[np.isclose(band[:, 0], 1.0), 1]
    assert at_end.min() == pytest.approx(low) and at_end.max() == pytest.approx(high)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("share of the path through the embeddings", "latent 1")
    assert legend(ax) == [
        "stable fixed point",
        "unstable fixed point",
        "extrema of a cycle",
        "Hopf bifurcation",
    ]


def test_a_change_of_stability_is_marked_with_its_interval():
    found = diagram()
    ax = plots.bifurcation(found)
    (bar,) = ax.containers
    np.testing.assert_allclose(bar.lines[0].get_xydata()[0], [0.6, 1.2])
    ends = np.sort(bar.lines[2][0].get_segments()[0][:, 0])
    np.testing.assert_allclose(ends, np.quantile(found["crossing"].values[:, 0, 0], [0.05, 0.95]))
    assert bar.lines[0].get_marker() == "o"
    alone = found.assign(crossing_frequency=found["crossing_frequency"] * 0)
    (bar,) = plots.bifurcation(alone).containers
    assert bar.lines[0].get_marker() == "d"
    assert not plots.bifurcation(found.assign(crossing=found["crossing"].where(found.draw < 4))).containers


def test_cycles_are_drawn_by_their_extrema_and_any_latent_can_be_looked_at():
    ax = plots.bifurcation(diagram(), latent=1)
    below, above = (line for line in ax.lines if line.get_marker() == "^")
    np.testing.assert_allclose(finite(below), [[0.75, -4], [1, -4]])
    np.testing.assert_allclose(finite(above), [[0.75, 4], [1, 4]])
    (solid,) = by_style(ax, "#000000", "-")
    assert finite(solid)[-1, 1] == pytest.approx(12.5) and ax.get_ylabel() == "latent 2"
    without = diagram().drop_vars(["low", "high", "cycle_stable"])
    assert "extrema of a cycle" not in legend(plots.bifurcation(without))


def test_a_diagram_against_a_parameter():
    mu = 3 - 2 * np.linspace(0, 1, 5)  # falling
    ax = plots.bifurcation(diagram(), against=mu, label="mu")
    (bar,) = ax.containers
    assert bar.lines[0].get_xdata()[0] == pytest.approx(3 - 2 * 0.6)
    (solid,) = by_style(ax, "#000000", "-")
    assert finite(solid)[0, 0] == 3 and ax.get_xlabel() == "mu" and ax.get_xlim() == (1, 3)
    for wrong in ([1, 2], [0, 1, 2, 1, 0], [0, 0, 1, 2, 3]):
        with pytest.raises(ValueError, match="needed against as 5 numbers"):
            plots.bifurcation(diagram(), against=wrong)
    with pytest.raises(ValueError, match="one of the 2 latents"):
        plots.bifurcation(diagram(), latent=2)


def test_what_the_analysis_finds_is_what_is_drawn():
    """A Hopf bifurcation at mu = 0: solid below, dashed above, cycles of radius sqrt(mu)."""
    fit = fit_of(NormalForm, {"a": (-0.35, 3.0), "b": (0.65, 3.0)}, sd=0.02)
    found = pm.analysis.bifurcation(fit, ["a", "b"], num_points=4, num_draws=2)
    mu = np.linspace(-0.35, 0.65, 4)
    ax = plots.bifurcation(found, against=mu, label="mu")
    (bar,) = ax.containers
    assert bar.lines[0].get_xdata()[0] == pytest.approx(0, abs=0.06) and bar.lines[0].get_marker() == "o"
    top = np.concatenate([finite(line) for line in ax.lines if line.get_marker() == "^"])
    top = top[top[:, 1] > 0]
    assert len(top) >= 2 and np.allclose(top[:, 1], np.sqrt(top[:, 0]), rtol=0.1)
    base = pm.analysis.flow_field(fit, "b", grid=8, num_draws=2)
    on = plots.flow(base)
    plots.fixed_points(pm.analysis.fixed_points(fit, "b", num_draws=2, num_starts=8), on, on=base)
    assert legend(on) == ["unstable focus"]
    on.figure.canvas.draw()


# ---- grids of embeddings ------------------------------------------------------------------------------------


def grid(num_draws=4, rows=3) -> xr.Dataset:
    time = np.arange(6) * BIN
    e = np.zeros((num_draws, rows, 3, 2)) + 0.01 * RNG.normal(size=(num_draws, 1, 1, 2))
    e[..., 0] += [-0.5, 0.0, 0.5]
    e[..., 1] += 0.25 * (np.arange(rows) - rows // 2)[:, None]
    latents = np.stack([time / BIN * (1 + e[..., :1]), time / BIN + 10 * e[..., 1:]], -1)
    rates = np.stack([latents[..., 0] * k for k in (0.0, 3.0, 1.0, 2.0)], -1)
    lead = ("draw", "row", "column")
    return xr.Dataset(
        {
            "embedding": ((*lead, "embedding_dim"), e),
            "latents": ((*lead, "time", "latent_dim"), latents),
            "rates": ((*lead, "time", "neuron"), rates),
        },
        coords={"time": ("time", time)},
        attrs={"plane": [0, 1] if rows > 1 else [0], "radius": 1.0, "recording": "a"},
    )


def test_a_grid_of_trajectories_lies_as_the_embeddings_do():
    found = grid()
    panels = plots.interpolation_grid(found)
    assert panels.shape == (3, 3)
    for row, column in np.ndindex(3, 3):
        drawn = panels[2 - row, column].lines  # upwards on paper
        of = found["latents"].isel(row=row, column=column).values
        assert len(drawn) == 4 + 2
        np.testing.assert_allclose(drawn[4].get_xydata(), of.mean(0))
        np.testing.assert_allclose(drawn[1].get_xydata(), of[1])
        np.testing.assert_allclose(drawn[5].get_xydata()[0], of.mean(0)[0])
    assert [ax.get_title() for ax in panels[0]] == ["$e_1$ -0.50", "$e_1$ +0.00", "$e_1$ +0.50"]
    assert [texts(ax.texts)[0] for ax in panels[:, 2]] == ["$e_2$ +0.25", "$e_2$ +0.00", "$e_2$ -0.25"]
    widths = np.array([[ax.spines["left"].get_linewidth() for ax in row] for row in panels])
    assert widths[1, 1] > 2 * np.delete(widths.ravel(), 4).max()
    assert len({(ax.get_xlim(), ax.get_ylim()) for ax in panels.ravel()}) == 1
    assert [ax.get_xlabel() for ax in panels[2]] == ["latent 1"] * 3 and not panels[0, 0].get_xlabel()
    assert plots.interpolation_grid(grid(rows=1)).shape == (1, 3)


def test_a_panel_that_explodes_leaves_the_others_readable():
    found = grid()
    found["latents"][:, 2, 2] = found["latents"][:, 2, 2] * 1e5
    panels = plots.interpolation_grid(found)
    assert panels[0, 0].get_xlim()[1] < 20
    usual = found["latents"].mean("draw").values[:2]
    assert (
        panels[0, 0].get_xlim()[0] <= usual[..., 0].min()
        and panels[0, 0].get_xlim()[1] >= usual[..., 0].max()
    )


def test_a_grid_of_rates_over_time():
    found = grid()
    panels = plots.interpolation_grid(found, of="rates")
    corner = panels[0, 2]  # the third column and row of the grid
    assert [line.get_label() for line in corner.lines] == [
        "neuron 1",
        "neuron 2",
        "neuron 3",
    ]  # 0 is constant
    assert len({line.get_linestyle() for line in corner.lines}) == 3
    of = found["rates"].isel(row=2, column=2).values
    np.testing.assert_allclose(corner.lines[1].get_ydata(), of[..., 2].mean(0))
    np.testing.assert_allclose(corner.lines[1].get_xdata(), found["time"])
    band = corner.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(np.quantile(of[:, -1, 1], 0.95))
    assert panels[2, 0].get_xlabel() == "time (s)" and panels[2, 0].get_ylabel() == "rate (per bin)"
    assert sum(ax.get_legend() is not None for ax in panels.ravel()) == 1
    chosen = plots.interpolation_grid(found, of="rates", which=[3])
    assert [line.get_label() for line in chosen[0, 0].lines] == ["neuron 3"]


def test_grids_draw_into_the_axes_given_and_refuse_what_is_none():
    found = grid()
    mine = plt.subplots(3, 3)[1]
    number = len(plt.get_fignums())
    assert (plots.interpolation_grid(found, mine) == mine).all() and len(plt.get_fignums()) == number
    with pytest.raises(ValueError, match="needed 3 x 3 axes, got 2"):
        plots.interpolation_grid(found, plt.subplots(1, 2)[1])
    with pytest.raises(ValueError, match="with decoded, got one of embedding, latents, rates"):
        plots.interpolation_grid(found, of="decoded")
    with pytest.raises(ValueError, match="positions below 4, got 4"):
        plots.interpolation_grid(found, of="rates", which=[0, 4])
    with pytest.raises(ValueError, match="needed of="):
        plots.interpolation_grid(found, of="speed")
    with pytest.raises(ValueError, match="plane of two of the 2 latents"):
        plots.interpolation_grid(found, plane=(0, 2))


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
