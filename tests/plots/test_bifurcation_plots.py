"""Diagrams of bifurcations, by what is drawn."""

import numpy as np
import pytest
from drawn_maps import by_style, diagram, finite, legend
from known_maps import NormalForm, fit_of

import pyro_metassm as pm
from pyro_metassm import plots


def test_branches_are_solid_where_stable_and_dashed_where_not():
    found = diagram()
    ax = plots.bifurcation(found, latent=0)
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
    ax = plots.bifurcation(found, latent=0)
    (bar,) = ax.containers
    np.testing.assert_allclose(bar.lines[0].get_xydata()[0], [0.6, 1.2])
    ends = np.sort(bar.lines[2][0].get_segments()[0][:, 0])
    np.testing.assert_allclose(ends, np.quantile(found["crossing"].values[:, 0, 0], [0.05, 0.95]))
    assert bar.lines[0].get_marker() == "o"
    alone = found.assign(crossing_frequency=found["crossing_frequency"] * 0)
    (bar,) = plots.bifurcation(alone, latent=0).containers
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


def test_the_latent_that_varies_most_is_drawn():
    found = diagram()
    assert plots.bifurcation(found).get_ylabel() == "latent 2"  # ten times the first one, along the branches
    apart = found.assign(low=found["low"] * [100.0, 1.0], high=found["high"] * [100.0, 1.0])
    assert plots.bifurcation(apart).get_ylabel() == "latent 1"  # along the cycles
    assert plots.bifurcation(found.isel(branch=[], cycle=[])).get_ylabel() == "latent 1"


def test_a_fold_is_marked_where_half_of_the_draws_have_it():
    found = diagram()
    s = np.where(np.arange(11) < 8, 0.3, np.nan)[:, None] + [0.0, 0.4]
    s[5:, 1] = np.nan
    found["fold"] = (("draw", "fold"), s)
    found["fold_position"] = (
        ("draw", "fold", "latent_dim"),
        np.where(np.isnan(s), np.nan, 1.5)[..., None] * [1, 2],
    )
    ax = plots.bifurcation(found, latent=1, against=10 * np.linspace(0, 1, 5))
    (fold,) = (bar for bar in ax.containers if bar.lines[0].get_marker() == "s")
    np.testing.assert_allclose(fold.lines[0].get_xydata()[0], [3.0, 3.0])
    assert legend(ax)[-1] == "fold" and "fold" not in legend(plots.bifurcation(diagram()))


def test_a_diagram_against_a_parameter():
    mu = 3 - 2 * np.linspace(0, 1, 5)  # falling
    ax = plots.bifurcation(diagram(), latent=0, against=mu, label="mu")
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
