"""Simulated recordings with known latents: the systems of the paper's sections 5.1 and 5.2, and their truth."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import xarray as xr

from pyro_metassm._resting import fixed_points as fixed_points
from pyro_metassm._selecting import generator_of
from pyro_metassm.integrating import Flow, Step, euler, integrate, runge_kutta
from pyro_metassm.recordings import Recording, Recordings

Noise = Literal["gaussian", "poisson"]


def limit_cycles(
    velocities: Iterable[float],
    *,
    num_trials: int = 128,
    num_steps: int = 100,
    num_neurons: int | tuple[int, int] = (20, 60),
    noise: Noise = "gaussian",
    seed: int = 0,
    noise_sd: float = 0.1,
    mean_count: tuple[float, float] = (0.05, 0.5),
    gain: float = 0.7,
    radius_squared: float = 2.0,
    dt: float = 0.01,
    keep_every: int = 3,
    process_noise: float = 0.5,
    initial_sd: float = 1.0,
) -> Recordings:
    r"""Limit cycles of one radius and different angular velocities (paper, section 5.1).

    $$ \dot r = r (d - r^2), \qquad \dot\varphi = w, $$

    integrated in Cartesian coordinates by the Euler-Maruyama method, as in the paper (its step makes the cycle a
    little wider than `sqrt(d)`: `r^2 = d + w^2 dt / 2` to first order), from `z_0 ~ N(0, initial_sd^2 I)`. The
    first state is the first bin, then every `keep_every`-th one. Observations of neuron n are

    $$ y_n \sim N(c_n^T z, \mathtt{noise\_sd}^2) \quad\text{or}\quad
       y_n \sim \mathrm{Poisson}(\exp(\mathtt{gain}\; c_n^T z + d_n)), \qquad c_n \sim N(0, I) / \sqrt{2}, $$

    where `d_n` gives the neuron a mean count per bin that is drawn log-uniformly from `mean_count`.

    Args:
        velocities: Angular velocity w of each recording, rad / s; negative ones turn the other way.
        num_trials: Trials of each recording.
        num_steps: Bins of each trial.
        num_neurons: Neurons of each recording, or the (lowest, highest) number to draw it from.
        noise: "gaussian" or "poisson" observations.
        seed: Of everything random. A recording depends on it and on its own name and arguments, not on the others.
        noise_sd: Standard deviation of Gaussian observations around the rate.
        mean_count: Lowest and highest mean count per bin of a Poisson neuron.
        gain: Factor of the read-out in a Poisson neuron's log rate.
        radius_squared: d.
        dt: Integration step in seconds.
        keep_every: Integration steps per bin: `bin_width = keep_every * dt`.
        process_noise: The standard deviation of the noise of one step is `process_noise * dt`.
        initial_sd: Standard deviation of the first state.

    Returns:
        Recordings named `"w=-5"` and so on, with `truth[name]`: `latents (trial, time, latent_dim)`,
        `rates (trial, time, neuron)` (expected observation per bin), `read_out (latent_dim, neuron)`, `offset
        (neuron)`; the attrs (of the recording, too) hold `system`, `velocity`, `speed` and `radius_squared`.

    Raises:
        ValueError: Arguments that make no simulation.

    Example:
        >>> recs = limit_cycles([-5, 5], num_trials=4, num_neurons=20)
        >>> recs["w=5"]
        Recording('w=5': 4 trials x 100 bins x 20 neurons, 30 ms bins, 0% missing)
        >>> dict(recs.truth["w=5"]["latents"].sizes)
        {'trial': 4, 'time': 100, 'latent_dim': 2}
    """
    systems = [
        {"system": "limit cycle", "velocity": w, "speed": abs(w), "radius_squared": float(radius_squared)}
        for w in map(float, velocities)
    ]
    return _simulate(
        [f"w={system['velocity']:g}" for system in systems],
        systems,
        euler,
        num_trials=num_trials,
        num_steps=num_steps,
        num_neurons=num_neurons,
        noise=noise,
        seed=seed,
        noise_sd=noise_sd,
        mean_count=mean_count,
        gain=gain,
        dt=dt,
        keep_every=keep_every,
        process_noise=process_noise,
        initial_sd=initial_sd,
    )


def duffing(
    parameters: Iterable[tuple[float, float]],
    *,
    c: float = 0.1,
    num_trials: int = 128,
    num_steps: int = 300,
    num_neurons: int | tuple[int, int] = (30, 100),
    noise: Noise = "gaussian",
    seed: int = 0,
    noise_sd: float = 0.1,
    mean_count: tuple[float, float] = (0.05, 0.5),
    gain: float = 0.7,
    dt: float = 0.025,
    keep_every: int = 2,
    process_noise: float = 0.2,
    initial_sd: float = 2.0,
) -> Recordings:
    r"""Duffing oscillators: one well (b > 0) or two (b < 0), damped (a < 0) or not (a = 0) (paper, section 5.2).

    $$ \dot z_1 = z_2, \qquad \dot z_2 = a z_2 - z_1 (b + c z_1^2) $$

    The paper leaves the grid of (a, b), the step, the initial states and the scale of the process noise open; the
    defaults here are our choice: 15 s in bins of 50 ms (some two periods of an oscillation at b = 1), first states
    wide enough for both wells of b = -1, and little noise. The drift is integrated with Runge-Kutta's fourth-order
    rule, since Euler's would feed energy to an undamped oscillator.

    Args:
        parameters: (a, b) of each recording, in 1 / s and 1 / s^2.
        c: Cubic stiffness of all recordings.
        num_trials, num_steps, num_neurons, noise, seed, noise_sd, mean_count, gain, dt, keep_every, process_noise,
            initial_sd: As in `limit_cycles`.

    Returns:
        Recordings named `"duffing a=-0.5 b=1"`, with `truth` as in `limit_cycles`, attrs `a`, `b`, `c`.

    Raises:
        ValueError: Arguments that make no simulation, or trajectories that leave to infinity (a > 0).

    Example:
        >>> duffing([(-0.5, 1), (0, -1)], num_trials=4).names
        ('duffing a=-0.5 b=1', 'duffing a=0 b=-1')
    """
    systems = [{"system": "duffing", "a": float(a), "b": float(b), "c": float(c)} for a, b in parameters]
    return _simulate(
        [f"duffing a={system['a']:g} b={system['b']:g}" for system in systems],
        systems,
        runge_kutta,
        num_trials=num_trials,
        num_steps=num_steps,
        num_neurons=num_neurons,
        noise=noise,
        seed=seed,
        noise_sd=noise_sd,
        mean_count=mean_count,
        gain=gain,
        dt=dt,
        keep_every=keep_every,
        process_noise=process_noise,
        initial_sd=initial_sd,
    )


def hopf(
    mu: Iterable[float],
    *,
    num_trials: int = 128,
    num_steps: int = 300,
    num_neurons: int | tuple[int, int] = (30, 100),
    noise: Noise = "gaussian",
    seed: int = 0,
    noise_sd: float = 0.1,
    mean_count: tuple[float, float] = (0.05, 0.5),
    gain: float = 0.7,
    dt: float = 0.025,
    keep_every: int = 2,
    process_noise: float = 0.2,
    initial_sd: float = 1.0,
) -> Recordings:
    r"""Van der Pol oscillators across a Hopf bifurcation: a fixed point (mu < 0) or a cycle (mu > 0) (section 5.2).

    $$ \dot z_1 = z_2, \qquad \dot z_2 = -z_1 + (\mu - z_1^2) z_2 $$

    The choices that the paper leaves open, and the integration, are those of `duffing`.

    Args:
        mu: The bifurcation parameter of each recording, in 1 / s.
        num_trials, num_steps, num_neurons, noise, seed, noise_sd, mean_count, gain, dt, keep_every, process_noise,
            initial_sd: As in `limit_cycles`.

    Returns:
        Recordings named `"hopf mu=0.5"`, with `truth` as in `limit_cycles`, attr `mu`.

    Raises:
        ValueError: Arguments that make no simulation.

    Example:
        >>> hopf([-1, 0.5], num_trials=4).names
        ('hopf mu=-1', 'hopf mu=0.5')
    """
    systems = [{"system": "hopf", "mu": float(value)} for value in mu]
    return _simulate(
        [f"hopf mu={system['mu']:g}" for system in systems],
        systems,
        runge_kutta,
        num_trials=num_trials,
        num_steps=num_steps,
        num_neurons=num_neurons,
        noise=noise,
        seed=seed,
        noise_sd=noise_sd,
        mean_count=mean_count,
        gain=gain,
        dt=dt,
        keep_every=keep_every,
        process_noise=process_noise,
        initial_sd=initial_sd,
    )


def flow(truth: xr.Dataset) -> Flow:
    """The true dynamics of a simulated recording, for pictures of the flow and errors of a learned one.

    Args:
        truth: `recs.truth[name]` of a simulation (its attrs name the system).

    Returns:
        A function `(..., 2) -> (..., 2)`: state to its time derivative, per second, without the noise.

    Raises:
        ValueError: A Dataset of no system that is simulated here.

    Example:
        >>> truth = limit_cycles([5], num_trials=4).truth["w=5"]
        >>> flow(truth)(np.array([2.0**0.5, 0.0])).round(3) + 0.0
        array([0.   , 7.071])
    """
    return _flow_of(truth.attrs)


def _flow_of(attrs: Mapping[Any, Any]) -> Flow:
    match attrs:
        case {"system": "limit cycle", "velocity": w, "radius_squared": d}:

            def derivative(z: np.ndarray) -> np.ndarray:
                x, y = z[..., 0], z[..., 1]
                pull = d - x**2 - y**2
                return np.stack([x * pull - w * y, y * pull + w * x], axis=-1)

        case {"system": "duffing", "a": a, "b": b, "c": c}:

            def derivative(z: np.ndarray) -> np.ndarray:
                return np.stack([z[..., 1], a * z[..., 1] - z[..., 0] * (b + c * z[..., 0] ** 2)], axis=-1)

        case {"system": "hopf", "mu": mu}:

            def derivative(z: np.ndarray) -> np.ndarray:
                return np.stack([z[..., 1], -z[..., 0] + (mu - z[..., 0] ** 2) * z[..., 1]], axis=-1)

        case _:
            raise ValueError(
                "flow: needed the attrs `system` and its parameters as the simulations of this module set them, "
                f"got {dict(attrs)}; pass recs.truth[name]"
            )
    return derivative


def _observe(
    latents: np.ndarray,
    read_out: np.ndarray,
    *,
    noise: Noise,
    noise_sd: float,
    mean_count: tuple[float, float],
    gain: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Observations, rates, and the read-out and offset that took the latents to them (to their log if Poisson)."""
    num_neurons = read_out.shape[1]
    if noise == "gaussian":
        rates = latents @ read_out
        observations = rates + noise_sd * rng.standard_normal(rates.shape)
        return observations, rates, read_out, np.zeros(num_neurons)
    read_out = gain * read_out
    target = np.exp(rng.uniform(math.log(mean_count[0]), math.log(mean_count[1]), num_neurons))
    modulation = np.exp(latents @ read_out)
    offset = np.log(target) - np.log(modulation.mean(axis=(0, 1)))
    rates = modulation * np.exp(offset)
    return rng.poisson(rates), rates, read_out, offset


def _simulate(
    names: list[str],
    systems: Sequence[dict[str, Any]],
    step: Step,
    *,
    num_trials: int,
    num_steps: int,
    num_neurons: int | tuple[int, int],
    noise: Noise,
    seed: int,
    noise_sd: float,
    mean_count: tuple[float, float],
    gain: float,
    dt: float,
    keep_every: int,
    process_noise: float,
    initial_sd: float,
) -> Recordings:
    low, high = (num_neurons,) * 2 if isinstance(num_neurons, (int, np.integer)) else num_neurons
    least, most = mean_count
    for needed, holds in (
        ("at least one system", len(systems) > 0),
        (
            "finite parameters",
            all(np.isfinite(v) for s in systems for v in s.values() if isinstance(v, float)),
        ),
        ("num_trials, num_steps and keep_every of at least 1", min(num_trials, num_steps, keep_every) >= 1),
        ("num_neurons as a number or (lowest, highest), at least 1", 1 <= low <= high),
        ('noise="gaussian" or noise="poisson"', noise in ("gaussian", "poisson")),
        ("mean_count as (lowest, highest), above 0", 0 < least <= most),
        ("dt above 0", dt > 0),
        (
            "noise_sd, process_noise and initial_sd of at least 0",
            min(noise_sd, process_noise, initial_sd) >= 0,
        ),
    ):
        if not holds:
            raise ValueError(f"simulation of {', '.join(names) or 'nothing'}: needed {needed}")

    recordings, truth = [], {}
    seen: Counter[str] = Counter()
    for name, attrs in zip(names, systems, strict=True):
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name}_{seen[name]}"
        # A stream for each purpose: the read-outs do not depend on the number of trials, nor paths on the neurons.
        of_neurons, of_path, of_noise = generator_of("simulate", name, seed).spawn(3)
        read_out = of_neurons.standard_normal((2, int(of_neurons.integers(low, high + 1)))) / math.sqrt(2)
        with np.errstate(over="ignore", invalid="ignore"):  # reported below
            latents = integrate(
                step,
                _flow_of(attrs),
                initial_sd * of_path.standard_normal((num_trials, 2)),
                num_steps=num_steps,
                dt=dt,
                keep_every=keep_every,
                step_sd=process_noise * dt,
                rng=of_path,
            )
        if not np.isfinite(latents).all():
            raise ValueError(
                f"simulation of {name}: needed trajectories that stay finite, got some that leave to infinity; use a "
                "smaller dt, or parameters with damping"
            )
        observations, rates, read_out, offset = _observe(
            latents, read_out, noise=noise, noise_sd=noise_sd, mean_count=mean_count, gain=gain, rng=of_noise
        )
        recordings.append(
            Recording(name, observations.astype(np.float32), bin_width=keep_every * dt, attrs=attrs)
        )
        truth[name] = xr.Dataset(
            {
                "latents": (("trial", "time", "latent_dim"), latents),
                "rates": (("trial", "time", "neuron"), rates.astype(np.float32)),
                "read_out": (("latent_dim", "neuron"), read_out),
                "offset": (("neuron",), offset),
            },
            attrs=attrs,
        )
    return Recordings(recordings, truth=truth)
