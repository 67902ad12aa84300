"""The data of the studies: families, draws, controls, and how well they could be forecast at best."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from tiny_study import TINY

import pyro_metassm as pm
from pyro_metassm.experiments import (
    chaos,
    controls,
    oracle,
    systems,
)
from pyro_metassm.experiments.systems import Bifurcations

# ---- data ------------------------------------------------------------------------------------------------


def test_families_are_what_the_issue_says():
    family = Bifurcations(num_train=2, num_test=1, num_adapt=2)
    recs = family.known(1, seed=0)
    kinds = [recs.truth[name].attrs["system"] for name in recs.names]
    assert (kinds.count("duffing"), kinds.count("hopf")) == (20, 11)
    assert all(30 <= r.num_neurons <= 100 and r.num_bins == 300 for r in recs.values())
    adapt, test = family.held_out()
    assert adapt.names == test.names and not set(adapt.names) & set(recs.names)
    assert [adapt.truth[n].attrs["system"] for n in adapt.names].count("duffing") == 4 and len(adapt) == 6
    assert (adapt[adapt.names[0]].num_trials, test[test.names[0]].num_trials) == (2, 1)
    others = replace(family, held_out_seed=7).unseen(1)
    assert not set(others.names) & set(adapt.names)


def test_draws_of_trials_are_nested_and_know_their_truth():
    pool, _ = TINY.family.held_out()
    few, more = (systems.few_trials(pool, n, 2, seed=3) for n in (1, 3))
    assert few.names == tuple(f"{name} #{draw}" for draw in (0, 1) for name in pool.names)
    for name in few.names:
        trials = more[name].observations
        assert any(np.array_equal(few[name].observations[0], trial) for trial in trials)
        assert few.truth[name].sizes["trial"] == 1


def test_controls_are_no_members_of_the_family():
    pool, _ = TINY.family.held_out()
    recs = controls.unrelated(pool, seed=0)
    backwards, process = recs.names
    origin = backwards.removesuffix(" reversed")
    assert pool.truth[origin].attrs["a"] == min(pool.truth[n].attrs.get("a", 9.0) for n in pool.names)
    assert np.array_equal(recs[backwards].observations[:, ::-1], pool[origin].observations)
    assert np.array_equal(recs.truth[backwards]["latents"][:, ::-1], pool.truth[origin]["latents"])
    assert recs[process].observations.shape == pool[origin].observations.shape


def test_lyapunov_exponents():
    rates = np.array([0.5, -1.0, -2.0])
    # The other directions have shrunk by exp(1.5 * 6) before growth is measured, for 54 s.
    found = chaos.lyapunov_exponent(lambda z: rates * z, np.zeros((4, 3)), num_steps=6000)
    assert found == pytest.approx(0.5, abs=1e-5)
    # As published; here a mean over 64 paths of 27 s.
    assert 1 / chaos.attractor(28.0)[2] == pytest.approx(0.906, abs=0.03)


def test_lorenz_latents_are_standardised():
    recs = chaos.Lorenz(rho=(28.0, 40.0), num_bins=100).known(64, seed=0)
    for name in recs.names:
        z = recs.truth[name]["latents"].values
        # Paths change their lobe every 0.7 s or so: means over 64 paths of 3 s have a standard error of about 0.08.
        assert np.abs(z.mean((0, 1))).max() < 0.35 and np.abs(z.std((0, 1)) - 1).max() < 0.2


# ---- ceilings --------------------------------------------------------------------------------------------


def r2_by_step(target: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    error = np.square(target - predicted).sum((0, 2))
    return 1 - error / np.square(target - target.mean(0, keepdims=True)).sum((0, 2))


def by_solve_ivp(derivative, recs, name: str, context: int, horizon: int) -> np.ndarray:
    """The forecast from the true state, by SciPy's integrator."""
    truth, width = recs.truth[name], recs.bin_width
    times = width * np.arange(1, horizon + 1)
    paths = [
        solve_ivp(lambda t, z: derivative(*z), (0, times[-1]), z, t_eval=times, rtol=1e-10, atol=1e-12).y.T
        for z in truth["latents"].values[:, context - 1]
    ]
    return np.stack(paths) @ truth["read_out"].values


@pytest.mark.parametrize(
    ("recs", "derivative"),
    [
        (
            pm.simulate.duffing([(-0.3, -0.8)], num_trials=6, num_steps=20, num_neurons=7),
            lambda x, v: (v, -0.3 * v - x * (-0.8 + 0.1 * x**2)),
        ),
        (
            pm.simulate.hopf([0.7], num_trials=6, num_steps=20, num_neurons=7),
            lambda x, v: (v, -x + (0.7 - x**2) * v),
        ),
    ],
    ids=["duffing", "hopf"],
)
def test_ceilings_against_another_integrator(recs, derivative):
    (name,) = recs.names
    found = oracle.ceilings(recs, context=8, horizon=10)[name]
    target = recs[name].observations[:, 8:18].astype(np.float64)
    expected = r2_by_step(target, by_solve_ivp(derivative, recs, name, 8, 10))
    assert np.allclose(found, expected, atol=1e-5)  # Runge-Kutta's error at steps of 25 ms
    assert expected.min() < 0.999


def test_the_ceiling_of_a_lorenz_system_against_another_integrator():
    recs = chaos.lorenz([30.0], num_trials=6, num_bins=14, num_neurons=(6, 6))
    (name,) = recs.names
    mean, sd = (np.array(recs.truth[name].attrs[key]) for key in ("mean", "sd"))

    def derivative(*w):
        x, y, z = mean + sd * np.array(w)
        return np.array([10 * (y - x), x * (30 - z) - y, x * y - 8 / 3 * z]) / sd

    expected = r2_by_step(
        recs[name].observations[:, 6:14].astype(np.float64), by_solve_ivp(derivative, recs, name, 6, 8)
    )
    assert np.allclose(oracle.ceilings(recs, context=6, horizon=8)[name], expected, atol=1e-4)


def test_the_ceiling_of_a_limit_cycle_follows_eulers_rule():
    recs = pm.simulate.limit_cycles([4.0], num_trials=6, num_steps=20, num_neurons=7)
    truth = recs.truth["w=4"]
    x, y = truth["latents"].values[:, 9].T
    predicted = []
    for _ in range(5):
        for _ in range(3):
            pull = 2.0 - x**2 - y**2
            x, y = x + 0.01 * (x * pull - 4.0 * y), y + 0.01 * (y * pull + 4.0 * x)
        predicted.append(np.stack([x, y], -1) @ truth["read_out"].values)
    target = recs["w=4"].observations[:, 10:15].astype(np.float64)
    expected = r2_by_step(target, np.stack(predicted, 1))
    assert np.allclose(oracle.ceilings(recs, context=10, horizon=5)["w=4"], expected, atol=1e-9)


def test_ceilings_of_controls():
    """Without process noise the reversed system leads back along its path; the process decays as it is known to."""
    given = {"num_trials": 6, "num_steps": 20, "num_neurons": 7, "process_noise": 0.0}
    recs = pm.simulate.duffing([(-0.4, -1.0)], **given)
    backwards = controls.reversed_in_time(recs, recs.names[0])
    (name,) = backwards.names
    target = backwards[name].observations[:, 8:14].astype(np.float64)
    expected = r2_by_step(target, backwards.truth[name]["rates"].values[:, 8:14])
    assert np.allclose(oracle.ceilings(backwards, context=8, horizon=6)[name], expected, atol=1e-5)
    process = controls.ornstein_uhlenbeck(recs[recs.names[0]], seed=0)
    (name,) = process.names
    z = process.truth[name]["latents"].values[:, 7, None]
    decay = np.exp(-0.05 * np.arange(1, 7) / controls.RELAXATION)[:, None]
    expected = r2_by_step(
        process[name].observations[:, 8:14].astype(np.float64),
        z * decay @ process.truth[name]["read_out"].values,
    )
    assert np.allclose(oracle.ceilings(process, context=8, horizon=6)[name], expected, atol=1e-5)


def test_the_ceiling_of_counts_is_of_log_rates():
    given = {"num_trials": 6, "num_steps": 20, "num_neurons": 7, "process_noise": 0.0}
    recs = pm.simulate.hopf([0.5], noise="poisson", **given)
    found = oracle.ceilings(recs, context=8, horizon=10, counts=True)["hopf mu=0.5"]
    assert np.allclose(found, 1.0, atol=1e-6)  # without process noise the true rates are known
