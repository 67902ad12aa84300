"""Datasets as of pm.analysis, of numbers that are known, and what is read off their pictures."""

import numpy as np
import xarray as xr

RNG = np.random.default_rng(0)
BIN = 0.05


def texts(found):
    return [text.get_text() for text in found]


def legend(ax):
    return [] if ax.get_legend() is None else texts(ax.get_legend().texts)


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
