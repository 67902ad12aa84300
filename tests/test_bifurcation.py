"""Branches of fixed points and cycles beside normal forms."""

import numpy as np
import pytest
import torch
from known_maps import WIDTH, Duffing, Known, NormalForm, fit_of

import pyro_metassm as pm
from pyro_metassm.analysis._matching import assigned
from pyro_metassm.analysis.bifurcation import _joined, _linked


def test_a_hopf_bifurcation_is_where_it_is():
    """``mu`` from -0.35 to 0.65: at s = 0.35, with ``w / 2 pi`` Hz; radius ``sqrt(mu)`` above it."""
    fit = fit_of(NormalForm, {"a": (-0.35, 3.0), "b": (0.65, 3.0)}, sd=0.02)
    found = pm.analysis.bifurcation(fit, ["a", "b"], num_points=7, num_draws=4)
    assert found.sizes["branch"] == 1 and np.abs(found["position"]).max() < 1e-6
    # The rate is mu: linear in s, so that the crossing of a draw is at its own -mu_a / (mu_b - mu_a).
    e = found["embedding"].values
    own = -e[:, 0, 0] / (e[:, -1, 0] - e[:, 0, 0])
    assert found["crossing"].values[:, 0, 0] == pytest.approx(own, abs=1e-6)
    w = np.abs(e[:, 2:4, 1]).mean(1) / (2 * np.pi)
    assert found["crossing_frequency"].values[:, 0, 0] == pytest.approx(w, rel=1e-2)
    assert found["growth_rate"].values[..., 0, 0] == pytest.approx(e[..., 0], abs=1e-5)
    assert (found["count"] == 1).all()
    mu = e[..., 0]
    has = np.isfinite(found["radius"]).any("cycle").values
    assert not has[mu < 0].any() and has[mu > 0.1].all()
    radius = found["radius"].max("cycle").values
    assert radius[has] == pytest.approx(np.sqrt(mu[has]), rel=1e-3)
    rate = found["cycle_growth_rate"].max("cycle").values
    assert (
        rate[has] == pytest.approx(-2 * mu[has], rel=0.02)
        and found["cycle_stable"].any("cycle").values[has].all()
    )
    assert found["s"].values == pytest.approx(np.linspace(0, 1, 7))
    # The extrema of a circle at 64 phases, within 1 - cos(pi / 64) of its radius.
    for side in (-1, 1):
        ends = found["low" if side < 0 else "high"].values
        ends = ends[np.isfinite(found["radius"].values)]
        assert ends == pytest.approx(np.tile(side * np.sqrt(mu[has])[:, None], 2), rel=3e-3)


def test_a_real_eigenvalue_that_crosses_alone_is_no_hopf_bifurcation():
    """Duffing from b = -0.3 to 0.3 (a = -0.3): what is a saddle at b = -0.1 is a focus already at b = 0.1."""
    fit = fit_of(Duffing, {"x": (-0.3, 0.0)}, initial_sd=2.5)
    path = [np.array([-0.3, -0.3]), np.array([-0.3, 0.3])]
    found = pm.analysis.bifurcation(fit, path, num_points=4, with_cycles=False).isel(draw=0)
    middle = int(np.abs(np.nanmean(found["position"].values[..., 0], 0)).argmin())
    assert (found["frequency"].values[2, middle] != 0).all()
    assert np.nanmax(found["crossing_frequency"].values[middle]) == 0


def test_a_pitchfork_has_three_branches():
    """Duffing from b = -0.5 to 0.5 (a = -1): wells at ``sqrt(-b / c)`` up to s = 0.5, a saddle that becomes stable."""
    fit = fit_of(Duffing, {"x": (-1.0, 0.0)}, initial_sd=2.5)
    path = [np.array([-1.0, -0.5]), np.array([-1.0, 0.5])]
    found = pm.analysis.bifurcation(fit, path, num_points=20, with_cycles=False).isel(draw=0)
    s = found["s"].values
    assert found["count"].values.tolist() == [3] * 10 + [1] * 10 and found.sizes["branch"] == 3
    x = found["position"].values[..., 0]
    middle = int(np.abs(np.nanmean(x, 0)).argmin())
    assert np.abs(x[:, middle]).max() < 1e-6
    wells = np.sort(np.delete(x, middle, 1)[:10], 1)
    assert wells == pytest.approx(np.sqrt((0.5 - s[:10]) / 0.1)[:, None] * [-1, 1], abs=1e-6)
    # The rate of the middle is -1/2 + sqrt(1/4 - b), 0 at b = 0: bent over a step of 1/19 by less than 1/19^2.
    crossing = found["crossing"].values[middle]
    assert crossing[np.isfinite(crossing)] == pytest.approx([0.5], abs=1 / 19**2)
    assert found["crossing_frequency"].values[middle, 0] == 0
    assert "period" not in found


@pytest.mark.parametrize("path, same", [(lambda t: t, 0), (lambda t: np.sqrt(t), 0), (np.round, -1)])
def test_a_branch_that_moves_far_in_a_step_is_followed_through_smaller_ones(path, same):
    """From 0 to 1 with 0.3 as the farthest: but for one that jumps."""
    ends = torch.zeros(1), torch.ones(1)
    place = lambda t: np.array([[path(float(t)), 0.0]])
    looked = []

    def between(first, last, near):
        looked.append(float(first + last) / 2)
        return place(looked[-1])

    assert assigned(place(0.0), place(1.0), 0.3).tolist() == [-1]
    assert _linked(place(0.0), place(1.0), 0.3, *ends, between).tolist() == [same]
    assert len(looked) == len(set(looked)) and max(looked) < 1


def test_a_draw_is_joined_to_the_branches_that_are_there_first():
    known, there = np.array([[0.0, 0.0], [0.1, 0.0], [1.0, 0.0]]), np.array([True, False, True])
    # 0.1 is nearer to the branch that is elsewhere on the path; a second point near it is left for that.
    assert _joined(known, there, np.array([[0.1, 0.0]]), 0.3).tolist() == [0]
    assert _joined(known, there, np.array([[0.11, 0.0], [-0.05, 0.0], [3.0, 0.0]]), 0.3).tolist() == [
        1,
        0,
        -1,
    ]
    assert _joined(known[:0], there[:0], np.zeros((2, 2)), 0.3).tolist() == [-1, -1]


class Hysteresis(Known):
    """``x' = mu + x - x^3``: three fixed points for ``|mu| < 2 / sqrt(27)``, one beyond; folds at both ends."""

    @staticmethod
    def step(z, e):
        x = z[..., 0]
        return torch.stack([x + 0.2 * (e[0] + x - x**3), 0.5 * z[..., 1]], -1)


def test_folds_are_where_branches_meet():
    fit = fit_of(Hysteresis, {"a": (-0.8,), "b": (0.8,)}, sd=0.02)
    found = pm.analysis.bifurcation(fit, ["a", "b"], num_points=21, num_draws=6, with_cycles=False)
    at = 2 / np.sqrt(27)
    assert found.sizes["fold"] == 2 and found.sizes["branch"] == 3
    # mu along each draw's own path; the fold is known to half a step, and lies at x = -+ 1 / sqrt(3).
    for draw in range(6):
        mu = found["embedding"].values[draw, :, 0]
        expected = np.interp([-at, at], mu, found["s"].values)
        assert found["fold"].values[draw] == pytest.approx(expected, abs=0.025 + 1e-9)
    assert found["fold_position"].values[..., 0].mean(0) == pytest.approx([3**-0.5, -(3**-0.5)], abs=0.1)
    assert set(np.unique(found["count"].values)) == {1, 3}
    hopf = fit_of(NormalForm, {"a": (-0.35, 3.0), "b": (0.65, 3.0)}, sd=0.02)
    assert not pm.analysis.bifurcation(hopf, ["a", "b"], num_points=4, num_draws=2).sizes["fold"]


def test_a_path_through_zero_along_a_principal_axis():
    names = {f"r{k}": (0.3 * k, 2.0 + 0.05 * (k % 2)) for k in range(-2, 3)}
    fit = fit_of(NormalForm, names)
    found = pm.analysis.bifurcation(fit, 0, num_points=5, with_cycles=False, num_draws=3)
    e = found["embedding"].values
    assert found.sizes["draw"] == 1 and e[0, 2] == pytest.approx([0, 0], abs=1e-12)
    axis = np.linalg.svd(np.array(list(names.values())) - np.mean(list(names.values()), 0))[2][0]
    assert abs(e[0, -1] @ axis) == pytest.approx(
        np.abs(np.array(list(names.values())) @ axis).max(), rel=1e-5
    )
    corner = pm.analysis.bifurcation(
        fit, ["r-1", np.array([0.0, 2.0]), "r1"], num_points=5, with_cycles=False
    )
    assert corner["embedding"].values[:, 2] == pytest.approx(np.tile([0.0, 2.0], (50, 1)), abs=0.2)


def test_paths_that_are_none():
    fit = fit_of(NormalForm, {"a": (-0.3, 3.0), "b": (0.7, 3.0)})
    for along in (["a"], "a", 2, -1, True, None):
        with pytest.raises(ValueError, match="bifurcation: needed"):
            pm.analysis.bifurcation(fit, along)
    with pytest.raises(ValueError, match="waypoints that differ"):
        pm.analysis.bifurcation(fit, ["a", "a"])
    with pytest.raises(ValueError, match="got 'c'"):
        pm.analysis.bifurcation(fit, ["a", "c"])
    with pytest.raises(ValueError, match="one recording or embedding at every waypoint, got several"):
        pm.analysis.bifurcation(fit, ["a", np.zeros((3, 2, 2))])
    assert WIDTH == 0.05
