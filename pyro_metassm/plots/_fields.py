"""Stream lines on a plane: where they are drawn, and the colours of their speed."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_metassm.plots._style import shades

GRID = 25  # points along each side
Limits = tuple[tuple[float, float], tuple[float, float]]


def limits(lim: float | Limits | None, visited: np.ndarray) -> Limits:
    if lim is None:
        points = visited.reshape(-1, 2)
        low, high = np.nanquantile(points, [0.005, 0.995], axis=0)
        margin = 0.1 * (high - low) + 1e-6
        (x0, y0), (x1, y1) = (low - margin).tolist(), (high + margin).tolist()
        return (x0, x1), (y0, y1)
    return ((-lim, lim), (-lim, lim)) if isinstance(lim, int | float) else lim


def grid(lim: Limits, visited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points ``(GRID, GRID, 2)``, rows along y, and which of them lie within two cells of a visited state."""
    x, y = (np.linspace(*side, GRID) for side in lim)
    points = np.stack(np.meshgrid(x, y), -1)
    states = visited.reshape(-1, 2)
    states = states[np.isfinite(states).all(1)]
    cell = np.array([x[1] - x[0], y[1] - y[0]])
    near = np.zeros(points.shape[:2], bool)
    for part in np.array_split(states, max(len(states) // 1000, 1)):
        distance = np.abs((points[:, :, None] - part) / cell)
        near |= ((distance**2).sum(-1) < 2.0**2).any(-1)
    return points, near


def draw(ax, derivative, visited, lim, per: float, per_bin: bool, speed_max, with_colorbar: bool) -> None:
    """Stream lines of a function of the plane near visited states; ``per`` turns displacements into speeds."""
    sides = limits(lim, visited)
    points, near = grid(sides, visited)
    x, y = points[0, :, 0], points[:, 0, 1]
    change = derivative(points) / per
    top = streams(ax, x, y, change, near, np.linalg.norm(change, axis=-1), speed_max=speed_max)
    if near.any() and with_colorbar:
        colorbar(ax, top, "bin" if per_bin else "s", "neither" if speed_max is None else "max")
    ax.set_xlim(*sides[0])
    ax.set_ylim(*sides[1])


def streams(
    ax: Any,
    x: np.ndarray,
    y: np.ndarray,
    change: np.ndarray,
    near: np.ndarray,
    speed: np.ndarray,
    *,
    width: float | np.ndarray = 1.2,
    speed_max: float | None = None,
) -> float:
    """Stream lines of ``change (y, x, 2)`` where ``near (y, x)``, grey elsewhere, coloured by ``speed (y, x)``.

    Returns:
        the speed at the upper end of the colours.
    """
    ax.pcolormesh(
        x, y, np.where(near, np.nan, 1.0), cmap="Greys", vmin=0.0, vmax=6.0, rasterized=True, zorder=0
    )
    ax.set_aspect("equal")
    known = near & np.isfinite(change).all(-1)
    top = float(speed[known].max(initial=0.0)) if speed_max is None else speed_max
    if known.any():
        cmap, norm = scale(top)
        u, v = (np.ma.array(change[..., k], mask=~known) for k in (0, 1))
        color = np.ma.array(speed, mask=~known)
        look: dict[str, Any] = {"density": 1.2, "linewidth": width, "arrowsize": 0.8, "zorder": 2}
        ax.streamplot(x, y, u, v, color=color, cmap=cmap, norm=norm, **look)
    return top


def scale(top: float) -> tuple[Any, Any]:
    """Colours of speeds from 0 to ``top``, none of them too light for white paper."""
    from matplotlib.colors import Normalize

    return shades(), Normalize(0.0, top or 1.0)


def colorbar(ax: Any, top: float, unit: str, extend: str) -> None:
    """The colours of speeds beside one axes, as high as these, or beside a list of them."""
    from matplotlib.cm import ScalarMappable

    cmap, norm = scale(top)
    several = isinstance(ax, list)
    figure = (ax[0] if several else ax).figure
    # A box of equal aspect is smaller than its place, so that a colour bar in a place of its own would be too high.
    place = (
        {"ax": ax, "aspect": 30, "pad": 0.02} if several else {"cax": ax.inset_axes((1.03, 0.0, 0.04, 1.0))}
    )
    figure.colorbar(ScalarMappable(norm, cmap), label=f"speed (per {unit})", extend=extend, **place)
