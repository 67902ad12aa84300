"""Where the simulated systems rest, and how they come and go there: closed forms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr


def fixed_points(truth: xr.Dataset) -> xr.Dataset:
    r"""The true fixed points of a simulated recording, to compare with :func:`pyro_metassm.analysis.fixed_points`.

    The limit cycles and the Hopf systems rest at 0 alone; Duffing's oscillators there and, if ``b / c < 0``, at ``z_1 =
    +- sqrt(-b / c)``, ``z_2 = 0``. How fast they leave are the eigenvalues of the flow's Jacobian.

    Args:
        truth: ``recs.truth[name]`` of a simulation (its attrs name the system).

    Returns:
        over ``fixed_point``, by rising ``z_1``: ``position (latent_dim)``, in the coordinates of the truth;
        ``growth_rate`` (1/s) and ``frequency`` (Hz) ``(eigenvalue)``, by falling growth; ``stable``: all growth rates
        are below 0 (where one is 0 the linear part does not decide).

    Raises:
        ValueError: a Dataset of no system that is simulated here.

    Example:
        >>> import pyro_metassm as pm
        >>> truth = pm.simulate.duffing([(-0.4, -0.9)], num_trials=4).truth["duffing a=-0.4 b=-0.9"]
        >>> pm.simulate.fixed_points(truth)["position"].values[:, 0].round(6) + 0.0
        array([-3.,  0.,  3.])
    """
    position, slope = _of(truth.attrs)
    values = np.linalg.eigvals(slope)
    order = np.lexsort((-values.imag, -values.real.round(12)), axis=-1)
    values = np.take_along_axis(values, order, -1)
    each = ("fixed_point", "eigenvalue")
    return xr.Dataset(
        {
            "position": (("fixed_point", "latent_dim"), position),
            "growth_rate": (each, values.real, {"units": "1/s"}),
            "frequency": (each, values.imag / (2 * np.pi), {"units": "Hz"}),
            "stable": (("fixed_point",), (values.real < 0).all(-1)),
        },
        attrs=dict(truth.attrs),
    )


def _of(attrs: Mapping[Any, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Positions ``(F, 2)``, and the flow's Jacobians there ``(F, 2, 2)``, per s."""
    match attrs:
        case {"system": "limit cycle", "velocity": w, "radius_squared": d}:
            return np.zeros((1, 2)), np.array([[[d, -w], [w, d]]], float)
        case {"system": "duffing", "a": a, "b": b, "c": c}:
            away = np.sqrt(-b / c) if b * c < 0 else None
            x = np.array([0.0] if away is None else [-away, 0.0, away])
            slope = np.array([[[0.0, 1.0], [-b - 3 * c * u**2, a]] for u in x])
            return np.stack([x, np.zeros_like(x)], -1), slope
        case {"system": "hopf", "mu": mu}:
            return np.zeros((1, 2)), np.array([[[0.0, 1.0], [-1.0, mu]]])
    raise ValueError(
        "fixed_points: needed the attrs `system` and its parameters as the simulations of this module set them, "
        f"got {dict(attrs)}; pass recs.truth[name]"
    )
