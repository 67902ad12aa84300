"""Fixed points and limit cycles, beside maps of which they are known."""

import itertools

import numpy as np
import pytest
from known_maps import WIDTH, Duffing, Henon, Known, NormalForm, VanDerPol, fit_of
from scipy.integrate import solve_ivp

import pyro_metassm as pm
from pyro_metassm.analysis._matching import assigned, tracks


def polynomial(x):
    """What a step of Runge-Kutta's rule multiplies an eigenvector by: its Jacobian at a fixed point is ``p(A dt)``."""
    return 1 + x + x**2 / 2 + x**3 / 6 + x**4 / 24


# ---- fixed points ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "b"), [(-0.5, -1.0), (-0.5, 0.6), (0.3, -0.4), (-2.5, 1.0)])
def test_fixed_points_of_duffing_are_all_there_with_their_eigenvalues(a, b):
    fit = fit_of(Duffing, {"x": (a, b)}, initial_sd=2.5)
    found = pm.analysis.fixed_points(fit, np.array([a, b])).isel(draw=0)
    wells = [-np.sqrt(-b / 0.1), np.sqrt(-b / 0.1)] if b < 0 else []
    where = np.sort(np.array([0.0, *wells]))
    order = np.argsort(found["position"].values[:, 0])
    assert np.abs(found["position"].values[order] - np.stack([where, 0 * where], 1)).max() < 1e-7
    for x, k in zip(where, order, strict=True):
        slope = np.array([[0.0, 1.0], [-b - 0.3 * x**2, a]])
        true = polynomial(np.linalg.eigvals(slope) * WIDTH)
        here = found.isel(fixed_point=k)
        values = here["eigenvalue_real"].values + 1j * here["eigenvalue_imag"].values
        assert np.abs(np.sort_complex(values) - np.sort_complex(true)).max() < 1e-6
        assert np.sort(here["growth_rate"]) == pytest.approx(np.sort(np.log(np.abs(true)) / WIDTH), abs=1e-5)
        assert np.abs(here["frequency"].values).max() == pytest.approx(
            np.abs(np.linalg.eigvals(slope).imag).max() / (2 * np.pi), abs=1e-4
        )
        rates = np.linalg.eigvals(slope)
        kind = "focus" if np.abs(rates.imag).max() > 0 else "node"
        up = int((rates.real > 0).sum())
        assert here["type"] == ("stable " + kind, "saddle", "unstable " + kind)[up]
        assert here["num_unstable"] == up and bool(here["stable"]) == (up == 0)


def test_draws_of_a_fixed_point_are_one_point_and_have_its_spread():
    """Wells at ``sqrt(-b / c)`` with ``b ~ Normal(-1, 0.1^2)``: quantiles of a monotonic map are mapped quantiles."""
    fit = fit_of(Duffing, {"x": (-0.5, -1.0), "y": (-0.5, 1.0)}, sd=0.1, initial_sd=2.5)
    found = pm.analysis.fixed_points(fit, ["x", "y"], num_draws=60, num_starts=24)
    assert found["recording"].values.tolist() == ["x", "y"]
    x, y = found.sel(recording="x"), found.sel(recording="y")
    assert (x["count"] == 3).all() and x["probability"].values.tolist() == [1, 1, 1]
    assert (y["count"] == 1).all() and y["probability"].values.tolist() == [1, 0, 0]
    assert (y["type"].isel(fixed_point=1) == "").all() and not y["stable"].isel(fixed_point=1).any()
    first = x["position"].isel(latent_dim=0)
    well = first.isel(fixed_point=first.mean("draw").values.argmax())
    again = pm.analysis.fixed_points(fit, "x", num_draws=60, num_starts=24)
    assert np.array_equal(again["position"], x["position"])  # a recording does not depend on its company
    # Of 60 draws a quantile of the middle half is known to some 0.3 sd: here 0.05 of 3.16.
    sd = 0.1 / 2 * np.sqrt(10)
    assert np.quantile(well, [0.25, 0.75]) == pytest.approx(
        np.sqrt([10 - 0.6745, 10 + 0.6745]), abs=4 * 1.36 * sd / np.sqrt(60)
    )


def test_a_point_that_some_draws_lack_has_a_probability():
    """``b ~ Normal(0, 1)``: with wells in about half of the draws."""
    e = np.stack([np.full(31, -0.8), np.linspace(-1.0, 1.0, 31)], 1)
    found = pm.analysis.fixed_points(fit_of(Duffing, {"x": (-0.8, 0.0)}, initial_sd=2.5), e)
    assert found["count"].values.tolist() == [3] * 15 + [1] * 16  # at b = 0 the wells are one with the middle
    assert found["probability"].max() == 1
    middle = found.isel(fixed_point=0)  # at b = 0 known to (1e-9 scale / c dt)^(1/3) = 0.006
    assert (
        np.abs(middle["position"]).max() < 0.01
        and not middle["stable"][:15].any()
        and middle["stable"][16:].all()
    )
    assert found["position"].isel(draw=30, fixed_point=1).isnull().all()


def test_fixed_points_of_henon():
    a, b = 1.4, 0.3
    found = pm.analysis.fixed_points(
        fit_of(Henon, {"x": (a, b)}, initial_sd=0.1, noise=1e-4), np.array([a, b])
    )
    x = np.sort(np.roots([a, 1 - b, -1]))
    near = found.isel(draw=0).sortby(found["position"][0, :, 0])["position"].values
    assert near == pytest.approx(np.stack([x, b * x], 1), abs=1e-8)


def test_what_lies_outside_the_visited_states_is_left_out():
    fit = fit_of(Duffing, {"x": (-0.8, -1.0)}, initial_sd=0.1)
    recs = pm.Recordings(
        [pm.Recording("x", np.random.default_rng(0).normal(size=(2, 12, 6)), bin_width=WIDTH)]
    )
    path = lambda *_: [np.random.default_rng(0).normal([3.0, 0.0], 0.3, (200, 2))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyro_metassm.analysis._region.trial_latents", path)
        found = pm.analysis.fixed_points(fit, "x", recs=recs, num_draws=0)
    assert found["position"].values[0] == pytest.approx(np.array([[np.sqrt(10), 0.0]]), abs=1e-7)
    assert 0 < found["nearest"] < 0.2


def test_no_fixed_point_at_all():
    class Drift(Known):
        @staticmethod
        def step(z, e):
            return z + 0.01 + 0.0 * e[0].unsqueeze(-1)

    found = pm.analysis.fixed_points(fit_of(Drift, {"x": (0.0,)}), ["x"], num_draws=3)
    assert found["count"].values.tolist() == [[0, 0, 0]] and found.sizes["fixed_point"] == 0


# ---- limit cycles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mu", "w"), [(0.3, 2.0), (1.0, -5.0), (0.05, 7.0)])
def test_the_cycle_of_the_normal_form_has_its_closed_form(mu, w):
    fit = fit_of(NormalForm, {"x": (mu, w)})
    found = pm.analysis.limit_cycles(fit, np.array([mu, w])).isel(draw=0)
    period = 2 * np.pi / abs(w)
    assert found.sizes["cycle"] == 1 and bool(found["stable"].all())
    # Through six states of a circle, h apart: |error| <= h^6 max|prod (t - j)| / 6! = 0.005 h^6, over a turn.
    # What a turn leaves, the next ones add to: by 1 / (1 - multiplier).
    h = abs(w) * WIDTH
    assert found["period"].item() == pytest.approx(period, rel=0.005 * h**6 + 1e-7)
    most = 0.005 * h**6 / (1 - np.exp(-2 * mu * period))
    assert found["radius"].item() == pytest.approx(np.sqrt(mu), rel=most + 1e-6)
    assert found["multiplier_real"].item() == pytest.approx(np.exp(-2 * mu * period), abs=0.01 * h**6 + 1e-5)
    assert found["growth_rate"].item() == pytest.approx(-2 * mu, rel=2e-2)
    path = found["path"].values[0]
    angle = np.unwrap(np.arctan2(path[:, 1], path[:, 0]))
    assert np.diff(angle) == pytest.approx(np.sign(w) * 2 * np.pi / 64, abs=0.01 * h**6 + 1e-5)


@pytest.mark.parametrize("mu", [0.4, 1.5])
def test_the_cycle_of_van_der_pol_is_that_of_an_integrator(mu):
    derivative = lambda t, z: [z[1], -z[0] + (mu - z[0] ** 2) * z[1]]
    section = lambda t, z: z[0]
    section.direction = 1
    found = solve_ivp(derivative, (0, 120), [1.0, 0.0], events=section, rtol=1e-10, atol=1e-10)
    period, start = found.t_events[0][-1] - found.t_events[0][-2], found.y_events[0][-1]
    # Liouville: the determinant of the monodromy is exp of the integral of the divergence, and 1 is an eigenvalue.
    both = lambda t, z: [*derivative(t, z[:2]), mu - z[0] ** 2]
    multiplier = np.exp(solve_ivp(both, (0, period), [*start, 0.0], rtol=1e-10, atol=1e-10).y[2, -1])
    fit = fit_of(VanDerPol, {"x": (mu,)})
    ours = pm.analysis.limit_cycles(fit, np.array([mu])).isel(draw=0)
    assert ours["period"].values == pytest.approx([period], rel=1e-5)
    assert ours["multiplier_real"].item() == pytest.approx(multiplier, abs=1e-4)


def test_draws_of_a_cycle_below_and_above_the_bifurcation():
    mu = np.linspace(-0.4, 0.4, 5)
    e = np.stack([mu, np.full(5, 3.0)], 1)
    fit = fit_of(NormalForm, {"x": (0.0, 3.0)})
    found = pm.analysis.limit_cycles(fit, e, num_bins=200)
    assert found["count"].values.tolist() == [0] * 3 + [1] * 2
    assert found["probability"].sum().item() == pytest.approx(2 / 5)
    assert found["radius"].max("cycle")[3:].values == pytest.approx(np.sqrt(mu[3:]), rel=1e-4)
    points = pm.analysis.limit_cycles(fit, e[3:, None], num_bins=200)
    assert points["point"].values.tolist() == [0, 1]
    assert points["period"].values[:, 0, 0] == pytest.approx([2 * np.pi / 3] * 2, rel=1e-6)


def test_no_cycle_where_all_comes_to_rest():
    found = pm.analysis.limit_cycles(fit_of(Duffing, {"x": (-0.5, -1.0)}), ["x"], num_draws=3)
    assert found["count"].values.tolist() == [[0, 0, 0]] and found["period"].size == 0


# ---- what belongs together -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(60))
def test_points_are_assigned_as_enumeration_does(seed):
    rng = np.random.default_rng(seed)
    known, found, gate = (
        rng.normal(size=(rng.integers(1, 5), 2)),
        rng.normal(size=(rng.integers(1, 5), 2)),
        1.0,
    )
    cost = np.square(found[:, None] - known).sum(-1)

    def total(pair):
        kept = [(i, j) for i, j in enumerate(pair) if j >= 0]
        alone = len(found) + len(known) - 2 * len(kept)
        return sum(cost[i, j] for i, j in kept) + alone * gate**2 / 2

    options = [
        pair
        for pair in itertools.product(range(-1, len(known)), repeat=len(found))
        if len({j for j in pair if j >= 0}) == sum(j >= 0 for j in pair)
    ]
    best = min(map(total, options))
    ours = assigned(known, found, gate)
    assert tuple(ours) in options and total(ours) == pytest.approx(best, abs=1e-12)


def test_a_track_begins_where_a_point_turns_up():
    draws = [np.array([[0.0]]), np.array([[5.0], [0.1]]), np.array([[5.1]])]
    assert [t.tolist() for t in tracks(np.zeros((1, 1)), draws, 1.0)] == [[0], [1, 0], [1]]
