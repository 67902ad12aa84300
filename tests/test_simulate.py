"""Simulations against other mathematics: closed forms, conserved energy, another solver, counting statistics."""

import doctest
import math

import numpy as np
import pytest
import xarray as xr
from scipy.integrate import solve_ivp
from scipy.optimize import root

from pyro_metassm import simulate

SIGMAS = 5  # of a statistic's standard deviation, everywhere below


def complex_path(truth: xr.Dataset) -> np.ndarray:
    latents = truth["latents"].values
    return latents[..., 0] + 1j * latents[..., 1]


@pytest.mark.parametrize("w", [-5.0, -0.5, 0.0, 2.5, 5.0])
def test_euler_limit_cycle_without_noise_has_its_closed_form(w):
    """On Euler's cycle |1 + dt (d - r^2) + i w dt| = 1, and a step turns it by arcsin(w dt)."""
    d, dt, keep = 2.0, 0.01, 3
    recs = simulate.limit_cycles([w], num_trials=20, num_steps=1000, num_neurons=2, process_noise=0.0)
    path = complex_path(recs.truth[f"w={w:g}"])[:, -50:]
    radius_squared = d + (1 - math.sqrt(1 - (w * dt) ** 2)) / dt
    np.testing.assert_allclose(np.abs(path) ** 2, radius_squared, rtol=1e-9)
    turned = np.angle(path[:, 1:] / path[:, :-1])
    np.testing.assert_allclose(turned, keep * math.asin(w * dt), atol=1e-9)
    # r^2 = d + w^2 dt / 2 to first order, as the docstring says
    assert radius_squared == pytest.approx(d + w**2 * dt / 2, abs=w**4 * dt**3)


def test_each_recording_turns_at_its_velocity_on_the_cycle():
    velocities, d, dt, keep = [-5.0, -2.5, 2.5, 5.0], 2.0, 0.01, 3
    recs = simulate.limit_cycles(velocities, num_steps=200)
    assert recs.names == ("w=-5", "w=-2.5", "w=2.5", "w=5") and recs.bin_width == pytest.approx(keep * dt)
    for name, w in zip(recs.names, velocities, strict=True):
        path = complex_path(recs.truth[name])[:, 100:]  # 1 / r^2 - 1 / d falls as exp(-2 d t): to 6e-6 in 3 s
        # Radii scatter with variance s^2 / (2 * 2 d dt) around the cycle (s = 0.5 dt, the pull is 2 d), forget it
        # in 1 / (2 d) seconds, and curvature moves their mean by about that variance.
        variance = (0.5 * dt) ** 2 / (4 * d * dt)
        independent = path.shape[0] * path.shape[1] * keep * dt * d
        tolerance = SIGMAS * math.sqrt(variance / independent) + 2 * variance
        cycle = math.sqrt(d + w**2 * dt / 2)
        assert np.abs(path).mean() == pytest.approx(cycle, abs=tolerance)
        turned = np.angle(path[:, 1:] / path[:, :-1]).sum(axis=1)
        time = (path.shape[1] - 1) * keep * dt
        # A step of noise turns by a normal angle of sd 0.5 dt / r: over all steps and trials,
        sd = 0.5 * dt / math.sqrt(d) * math.sqrt((path.shape[1] - 1) * keep) / time / math.sqrt(len(path))
        # and Euler's arcsin(w dt) / dt is w (1 + (w dt)^2 / 6); what is left of the way to the cycle adds the same.
        assert turned.mean() / time == pytest.approx(w, abs=SIGMAS * sd + abs(w) ** 3 * dt**2)
        truth = recs.truth[name].attrs
        assert truth["velocity"] == w and truth["speed"] == abs(w) and truth["system"] == "limit cycle"
        assert recs[name].attrs == truth


def test_a_step_is_the_equation_in_complex_numbers_plus_its_noise():
    w, d, dt, noise = 2.5, 1.5, 0.02, 0.8
    recs = simulate.limit_cycles(
        [w], num_steps=50, num_neurons=2, dt=dt, keep_every=1, process_noise=noise, radius_squared=d
    )
    z = complex_path(recs.truth["w=2.5"])
    drift = z * (d - np.abs(z) ** 2) + 1j * w * z
    residual = z[:, 1:] - z[:, :-1] - dt * drift[:, :-1]
    parts = np.concatenate([residual.real.ravel(), residual.imag.ravel()])
    assert parts.std() == pytest.approx(noise * dt, rel=SIGMAS / math.sqrt(2 * parts.size))
    assert abs(parts.mean()) < SIGMAS * noise * dt / math.sqrt(parts.size)
    first = np.concatenate([z[:, 0].real, z[:, 0].imag])
    assert abs(first.mean()) < SIGMAS / math.sqrt(first.size)
    assert first.std() == pytest.approx(1, rel=SIGMAS / math.sqrt(2 * first.size))
    flow = simulate.flow(recs.truth["w=2.5"])(recs.truth["w=2.5"]["latents"].values)
    np.testing.assert_allclose(flow[..., 0] + 1j * flow[..., 1], drift, rtol=1e-12, atol=1e-12)


def test_every_third_state_is_kept():
    fine = simulate.limit_cycles([5], num_steps=28, num_neurons=2, keep_every=1, process_noise=0.0)
    coarse = simulate.limit_cycles([5], num_steps=10, num_neurons=2, keep_every=3, process_noise=0.0)
    np.testing.assert_allclose(
        fine.truth["w=5"]["latents"][:, ::3], coarse.truth["w=5"]["latents"], rtol=1e-12
    )


def solved(system, start: np.ndarray, times: np.ndarray) -> np.ndarray:
    return solve_ivp(system, (0, times[-1]), start, t_eval=times, rtol=1e-10, atol=1e-10).y.T


# A fifth of the default step: errors of a fourth-order rule of 3e-4 become 5e-7.
FINE = {"num_trials": 5, "num_neurons": 2, "process_noise": 0.0, "dt": 0.005, "keep_every": 10}


@pytest.mark.parametrize(
    ("simulated", "system"),
    [
        (
            lambda: simulate.duffing([(-0.5, -1.0)], **FINE),
            lambda t, z: [z[1], -0.5 * z[1] - z[0] * (-1 + 0.1 * z[0] ** 2)],
        ),
        (
            lambda: simulate.duffing([(0.0, 1.0)], c=0.3, **FINE),
            lambda t, z: [z[1], -z[0] * (1 + 0.3 * z[0] ** 2)],
        ),
        (
            lambda: simulate.hopf([1.5], **FINE),
            lambda t, z: [z[1], -z[0] + (1.5 - z[0] ** 2) * z[1]],
        ),
    ],
    ids=["duffing, two wells", "duffing, undamped", "hopf"],
)
def test_paths_are_those_of_another_solver(simulated, system):
    recs = simulated()
    (name,) = recs.names
    latents = recs.truth[name]["latents"].values
    times = np.arange(latents.shape[1]) * recs.bin_width
    for path in latents:
        np.testing.assert_allclose(path, solved(system, path[0], times), atol=5e-6)
    points = np.random.default_rng(0).normal(size=(4, 3, 2))
    flow = simulate.flow(recs.truth[name])(points)
    expected = np.array([system(0.0, point) for point in points.reshape(-1, 2)]).reshape(points.shape)
    np.testing.assert_allclose(flow, expected, rtol=1e-12)


def test_an_undamped_oscillator_keeps_its_energy_and_the_integrator_is_of_fourth_order():
    drifts = []
    for dt, keep in ((0.1, 1), (0.05, 2)):
        settings = {
            "num_trials": 20,
            "num_neurons": 2,
            "process_noise": 0.0,
            "num_steps": 100,
            "initial_sd": 1.0,
        }
        recs = simulate.duffing([(0.0, 1.0)], dt=dt, keep_every=keep, **settings)
        x, v = np.moveaxis(recs.truth[recs.names[0]]["latents"].values, -1, 0)
        energy = v**2 / 2 + x**2 / 2 + 0.1 * x**4 / 4
        drifts.append(np.abs(energy[:, -1] / energy[:, 0] - 1).mean())
    assert drifts[1] < 1e-5
    # Energy of a fourth-order rule drifts with dt^5 on an oscillator: halving the step divides it by about 32.
    assert 4.5 < math.log2(drifts[0] / drifts[1]) < 5.5


def test_hopf_has_a_fixed_point_below_and_van_der_pols_cycle_above():
    recs = simulate.hopf([-1.0, 1.0], num_trials=10, num_neurons=2, num_steps=1200, process_noise=0.0)
    assert np.abs(recs.truth["hopf mu=-1"]["latents"].values[:, -1]).max() < 1e-6
    x = recs.truth["hopf mu=1"]["latents"].values[:, 400:, 0]
    # mu = 1 is van der Pol's equation itself: amplitude 2.0086, period 6.6633.
    np.testing.assert_allclose(x.max(axis=1), 2.0086, atol=2e-3)
    for path in x:
        up = np.flatnonzero((path[:-1] < 0) & (path[1:] >= 0))
        crossings = (up - path[up] / (path[up + 1] - path[up])) * recs.bin_width
        np.testing.assert_allclose(np.diff(crossings), 6.6633, atol=1e-3)


def test_duffing_spans_one_and_two_wells():
    recs = simulate.duffing([(-0.5, 1.0), (-0.5, -1.0)], num_trials=64, num_neurons=2)
    assert recs.names == ("duffing a=-0.5 b=1", "duffing a=-0.5 b=-1")
    one, two = (truth["latents"].values[:, -1, 0] for truth in recs.truth.values())
    assert np.abs(one).max() < 1
    wells = math.sqrt(1 / 0.1)
    assert (np.abs(np.abs(two) - wells) < 1).all() and (two > 0).any() and (two < 0).any()
    assert recs.truth["duffing a=-0.5 b=1"].attrs == {"system": "duffing", "a": -0.5, "b": 1.0, "c": 0.1}


def test_gaussian_observations():
    recs = simulate.limit_cycles([1.0], num_neurons=400, num_trials=40, noise_sd=0.1)
    truth, recording = recs.truth["w=1"], recs["w=1"]
    expected = truth["latents"].values @ truth["read_out"].values
    np.testing.assert_allclose(truth["rates"].values, expected, atol=1e-5)
    assert not truth["offset"].values.any()
    residual = recording.values - truth["rates"].values
    assert residual.std() == pytest.approx(0.1, rel=SIGMAS / math.sqrt(2 * residual.size))
    assert abs(residual.mean()) < SIGMAS * 0.1 / math.sqrt(residual.size)
    entries = truth["read_out"].values
    assert entries.std() == pytest.approx(1 / math.sqrt(2), rel=SIGMAS / math.sqrt(2 * entries.size))
    assert recording.values.dtype == truth["rates"].dtype == np.float32


def test_poisson_observations():
    recs = simulate.limit_cycles([3.0], num_neurons=300, noise="poisson", mean_count=(0.05, 0.5), gain=0.7)
    truth, recording = recs.truth["w=3"], recs["w=3"]
    recording.check_counts()
    rates = truth["rates"].values.astype(np.float64)
    log_rates = truth["latents"].values @ truth["read_out"].values + truth["offset"].values
    np.testing.assert_allclose(np.log(rates), log_rates, atol=1e-4)
    entries = truth["read_out"].values / 0.7
    assert entries.std() == pytest.approx(1 / math.sqrt(2), rel=SIGMAS / math.sqrt(2 * entries.size))
    # Mean rates are the targets: log-uniform between the ends.
    targets = rates.mean(axis=(0, 1))
    assert targets.min() >= 0.05 * (1 - 1e-5) and targets.max() <= 0.5 * (1 + 1e-5)
    place = np.log(targets / 0.05) / math.log(10)
    assert place.mean() == pytest.approx(0.5, abs=SIGMAS / math.sqrt(12 * place.size))
    # A neuron's total is Poisson: its z-scores have mean 0, variance 1.
    total = rates.sum(axis=(0, 1))
    z = (recording.values.sum(axis=(0, 1), dtype=np.float64) - total) / np.sqrt(total)
    assert abs(z.mean()) < SIGMAS / math.sqrt(z.size)
    assert z.var() == pytest.approx(1, abs=SIGMAS * math.sqrt(2 / z.size))
    # and within a bin the counts scatter as Poisson counts do.
    scaled = (recording.values - rates) / np.sqrt(rates)
    assert scaled.var() == pytest.approx(1, abs=0.01)


def test_numbers_of_neurons():
    recs = simulate.limit_cycles(np.linspace(1, 5, 60), num_trials=1, num_steps=2, num_neurons=(3, 5))
    assert {recording.num_neurons for recording in recs.values()} == {3, 4, 5}  # inclusive
    for number in (7, np.int64(7)):
        recs = simulate.limit_cycles([1, 2], num_trials=1, num_steps=2, num_neurons=number)
        assert {recording.num_neurons for recording in recs.values()} == {7}


def test_recordings_do_not_depend_on_each_other_and_purposes_not_on_each_other():
    settings = {"num_trials": 4, "num_steps": 6, "num_neurons": (2, 9)}
    many = simulate.limit_cycles([-5, 2, 5, 5], **settings)
    alone = simulate.limit_cycles([5], **settings)
    assert many.names == ("w=-5", "w=2", "w=5", "w=5_2")
    np.testing.assert_array_equal(many["w=5"].values, alone["w=5"].values)
    assert not np.array_equal(many.truth["w=5"]["latents"], many.truth["w=5_2"]["latents"])
    other = simulate.limit_cycles([5], seed=1, **settings)
    assert not np.array_equal(other.truth["w=5"]["latents"], alone.truth["w=5"]["latents"])
    counts = simulate.limit_cycles([5], noise="poisson", gain=1.0, **settings)
    np.testing.assert_array_equal(counts.truth["w=5"]["latents"], alone.truth["w=5"]["latents"])
    np.testing.assert_array_equal(counts.truth["w=5"]["read_out"], alone.truth["w=5"]["read_out"])
    longer = simulate.limit_cycles([5], **(settings | {"num_trials": 9}))
    np.testing.assert_array_equal(longer.truth["w=5"]["read_out"], alone.truth["w=5"]["read_out"])


def test_truth_goes_with_a_split_and_names_its_dims():
    train, test = simulate.hopf([0.5], num_trials=8, num_steps=20).split(0.25)
    truth = train.truth["hopf mu=0.5"]
    assert dict(truth.sizes)["trial"] == 6 and test.truth["hopf mu=0.5"].sizes["trial"] == 2
    assert truth["rates"].dims == ("trial", "time", "neuron") and truth["read_out"].dims == (
        "latent_dim",
        "neuron",
    )
    rates = truth["rates"].values
    assert np.abs(train["hopf mu=0.5"].values - rates).max() < 0.1 * 7
    assert simulate.flow(truth)(np.zeros(2)).tolist() == [0, 0]


@pytest.mark.parametrize(
    "attrs",
    [
        {"system": "limit cycle", "velocity": 2.5, "radius_squared": 2.0},
        {"system": "duffing", "a": -0.4, "b": -0.9, "c": 0.1},
        {"system": "duffing", "a": 0.2, "b": 0.9, "c": -0.1},
        {"system": "duffing", "a": -0.4, "b": 0.5, "c": 0.1},
        {"system": "duffing", "a": -1.0, "b": 0.0, "c": 0.1},
        {"system": "hopf", "mu": -0.7},
        {"system": "hopf", "mu": 0.5},
    ],
)
def test_fixed_points_are_where_the_flow_is_zero(attrs):
    """As a root finder has them from many starts, with a Jacobian of central differences."""
    truth = xr.Dataset(attrs=attrs)
    found, flow = simulate.fixed_points(truth), simulate.flow(truth)
    starts = np.stack(np.meshgrid(np.linspace(-4, 4, 9), np.linspace(-3, 3, 7)), -1).reshape(-1, 2)
    ends = [root(flow, start, tol=1e-12) for start in starts]
    # The root of b = 0 is threefold: |z|^3 is below the tolerance from some 1e-3 on.
    apart = 1e-2 if attrs.get("b") == 0 else 1e-6
    roots = np.array([end.x for end in ends if end.success])
    distance = np.abs(roots[:, None] - found["position"].values).max(-1)
    assert distance.min(1).max() < apart and (distance.min(0) < apart).all()
    for position, rates, turns, stable in zip(
        *(found[key].values for key in ("position", "growth_rate", "frequency", "stable")), strict=True
    ):
        steps = 1e-5 * np.eye(2)
        jacobian = (flow(position + steps) - flow(position - steps)).T / 2e-5
        values = np.sort_complex(np.linalg.eigvals(jacobian))
        assert np.sort_complex(rates + 2j * np.pi * turns) == pytest.approx(values, abs=1e-8)
        assert stable == (rates.max() < 0) and rates[0] >= rates[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simulate.fixed_points(xr.Dataset()), r"fixed_points: needed the attrs `system`"),
        (lambda: simulate.limit_cycles([]), "at least one system"),
        (lambda: simulate.limit_cycles([np.nan]), "finite parameters"),
        (
            lambda: simulate.limit_cycles([1], num_trials=0),
            "num_trials, num_steps and keep_every of at least 1",
        ),
        (
            lambda: simulate.limit_cycles([1], keep_every=0),
            "num_trials, num_steps and keep_every of at least 1",
        ),
        (lambda: simulate.limit_cycles([1], num_neurons=0), "num_neurons"),
        (lambda: simulate.limit_cycles([1], num_neurons=(5, 3)), "num_neurons"),
        (lambda: simulate.limit_cycles([1], noise="uniform"), 'noise="gaussian" or noise="poisson"'),
        (lambda: simulate.limit_cycles([1], mean_count=(0, 1)), "mean_count"),
        (lambda: simulate.limit_cycles([1], noise_sd=-1), "noise_sd"),
        (lambda: simulate.limit_cycles([1], dt=0), "dt above 0"),
        (lambda: simulate.limit_cycles([1], dt=3.0), "smaller dt|pass seconds"),
        (lambda: simulate.duffing([(60.0, 1.0)]), "duffing a=60 b=1: needed trajectories that stay finite"),
        (lambda: simulate.duffing([(0.0, 1.0)], c=np.inf), "finite parameters"),
        (lambda: simulate.flow(xr.Dataset()), r"needed the attrs `system`.*pass recs.truth\[name\]"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples():
    assert doctest.testmod(simulate).failed == 0
