"""Rules that follow a differential equation step by step, many states at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Flow = Callable[[np.ndarray], np.ndarray]  # states to their time derivatives, (..., latent_dim) both
Step = Callable[[Flow, np.ndarray, float], np.ndarray]


def euler(derivative: Flow, z: np.ndarray, dt: float) -> np.ndarray:
    """A step of Euler's rule: its error is of order ``dt^2``."""
    return z + dt * derivative(z)


def runge_kutta(derivative: Flow, z: np.ndarray, dt: float) -> np.ndarray:
    """A step of Runge and Kutta's classical rule: its error is of order ``dt^5``."""
    first = derivative(z)
    second = derivative(z + dt / 2 * first)
    third = derivative(z + dt / 2 * second)
    return z + dt / 6 * (first + 2 * second + 2 * third + derivative(z + dt * third))


def integrate(
    step: Step,
    derivative: Flow,
    initial: np.ndarray,
    *,
    num_steps: int,
    dt: float,
    keep_every: int,
    step_sd: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Paths of all trials at once, with noise added after every step.

    Args:
        step: the rule.
        derivative: the drift.
        initial: first states ``(trials, latent_dim)``.
        num_steps: bins of a path.
        dt: integration step, s.
        keep_every: integration steps per bin.
        step_sd: standard deviation of the noise of one step.
        rng: of the noise.

    Returns:
        ``(trials, num_steps, latent_dim)``: the first state, then every ``keep_every``-th one.
    """
    path = np.empty((len(initial), num_steps, initial.shape[1]))
    z = path[:, 0] = initial
    for t in range(1, num_steps):
        for noise in step_sd * rng.standard_normal((keep_every, *initial.shape)):
            z = step(derivative, z, dt) + noise
        path[:, t] = z
    return path
