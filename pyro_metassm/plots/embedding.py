"""The picture of the recordings' embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.plots import _given as given
from pyro_metassm.plots._style import BLUE, INTERVAL, MARKERS, PALETTE, ellipse, new_axes
from pyro_metassm.trees import part

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ONE = 4.0  # points, less than the width of a marker: recordings as near as this share a label
FEW = 16  # names that are all written, in the ordinary size
AWAY = (5.0, 14.0, 26.0, 40.0)  # points: how far from its recording a name may stand
Box = tuple[float, float, float, float]  # left, bottom, right, top


def embedding(
    tree: xr.DataTree | xr.Dataset,
    ax: Axes | Sequence[Axes] | None = None,
    against: Mapping[str, float] | Any = None,
    color: Mapping[str, Any] | Any = None,
    labels: bool = True,
    *,
    label: str | None = None,
) -> Axes | np.ndarray:
    """The posterior of every recording's embedding: means and 90 % intervals.

    With ``against`` a panel for each embedding dim, over a value of the recordings. Without: a row for each
    recording (one embedding dim), or the first two dims with ellipses that hold 90 %.

    Args:
        tree: of :func:`pyro_metassm.posterior` or :func:`pyro_metassm.forecast`; or a Dataset of
            :func:`pyro_metassm.analysis.embedding_map`.
        ax: where to draw; with ``against`` and several embedding dims, as many axes.
        against: a value of every recording: a mapping by name, a DataArray over `recording`, in the tree's
            order, or the name of a coordinate that the embeddings have, such as ``"subject"``.
        color: likewise, numbers (a colour bar) or categories (a legend).
        labels: write the recordings' names beside the points; of more than 16 those for which there is room.
        label: of the axis of ``against``, or of the colour bar without it; default a DataArray's name.

    Returns:
        the axes, or an array of them.

    Raises:
        ValueError: values that lack a recording, a coordinate that there is not, too few axes.

    Example:
        >>> draws = np.random.default_rng(0).normal([[-1.0], [1.0]], 0.1, (1, 50, 2, 1))
        >>> dims = ("chain", "draw", "recording", "embedding_dim")
        >>> data = xr.DataArray(draws, {"recording": ["slow", "fast"]}, dims, "embedding")
        >>> tree = xr.DataTree.from_dict({"posterior": data.to_dataset()})
        >>> embedding(tree, against={"slow": 2.5, "fast": 5.0}, label="speed (rad/s)").get_xlabel()
        'speed (rad/s)'
    """
    e = _draws(tree)
    against, color = _coordinate(e, against, "against"), _coordinate(e, color, "color")
    names, draws = [str(name) for name in e["recording"].values], e.values
    size, means = draws.shape[1], draws.mean(2)
    styles, legend = _colors(color, names, label if against is None else None)
    if against is not None:
        x = np.array(_of_recordings(against, names, "against"), float)
        axes = _axes(ax, size)
        for d in range(size):
            for row, style in enumerate(styles):
                _interval(axes[d], x[row], draws[row, d], style, vertical=True)
            axes[d].set_xlabel(label or str(getattr(against, "name", None) or "value of the recording"))
            axes[d].set_ylabel(_dim_label(d, size))
            axes[d].margins(0.1)
        legend(axes[0])
        for d in range(size) if labels else ():
            bars = np.quantile(draws[:, d], INTERVAL, axis=-1).T
            _write_names(axes[d], names, np.stack([x, means[:, d]], 1), bars)
        return axes[0] if size == 1 else axes[:size]
    ax = new_axes(ax)
    ax.set_xlabel(_dim_label(0, size))
    if size == 1:
        for row, style in enumerate(styles):
            _interval(ax, row, draws[row, 0], style, vertical=False)
        ax.set_yticks(range(len(names)), names if labels else [""] * len(names))
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(axis="y", color="0.9")
        ax.set_axisbelow(True)
    else:
        for row, style in enumerate(styles):
            ellipse(ax, draws[row, :2], style["color"])
            ax.plot(*means[row, :2, None], linestyle="", markersize=5, **style)
        ax.set_ylabel(_dim_label(1, size))
        ax.margins(0.1)
    legend(ax)
    if size > 1 and labels:
        _write_names(ax, names, means[:, :2])
    return ax


# ---- parts -----------------------------------------------------------------------------------------------


def _draws(tree: Any) -> xr.DataArray:
    """Draws of the embeddings, ``(recording, embedding_dim, sample)``."""
    if isinstance(tree, xr.Dataset):
        given.dataset("embedding", tree, ("embedding",), "pm.analysis.embedding_map")
        e = tree["embedding"].rename(draw="sample")
    elif "posterior" in getattr(tree, "children", {}) and "embedding" in tree["posterior"].data_vars:
        e = part(tree, "posterior")["embedding"].stack(sample=("chain", "draw"))
    else:
        raise ValueError(
            "embedding: needed a tree with posterior/embedding, such as of pm.posterior, got none"
        )
    return e.transpose("recording", "embedding_dim", "sample")


def _coordinate(e: xr.DataArray, values: Any, what: str) -> Any:
    """The coordinate of a name, as values of the recordings; anything else as it is."""
    if not isinstance(values, str):
        return values
    known = [str(name) for name, of in e.coords.items() if of.dims == ("recording",) and name != "recording"]
    if values not in known:
        raise ValueError(
            f"embedding: needed {what} as one of the coordinates {checks.some(known) or '(there is none)'} of the "
            f"embeddings, or as values, got {values!r}"
        )
    return e[values].reset_coords(drop=True)


def _of_recordings(values: Any, names: Sequence[str], what: str) -> list:
    """A value of every recording, in the order of the names."""
    if isinstance(values, xr.DataArray) and "recording" in values.coords:
        values = dict(zip(values["recording"].values.tolist(), values.values.tolist(), strict=True))
    if isinstance(values, Mapping):
        lacking = [name for name in names if name not in values]
        if lacking:
            raise ValueError(f"embedding: needed a value of every recording in {what}, got none of {lacking}")
        return [values[name] for name in names]
    found = list(np.asarray(values).tolist())
    if len(found) != len(names):
        raise ValueError(
            f"embedding: needed {len(names)} values in {what}, one for each recording, got {len(found)}"
        )
    return found


def _colors(color: Any, names: Sequence[str], label: str | None):
    """A style for every recording, and a function that adds what explains it to an axes."""
    if color is None:
        return [{"color": BLUE, "marker": "o"}] * len(names), lambda ax: None
    values = _of_recordings(color, names, "color")
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import ListedColormap, Normalize

        cmap = ListedColormap(colormaps["cividis"](np.linspace(0.0, 0.85, 256)))  # the rest is too light
        scale = ScalarMappable(Normalize(min(values), max(values)), cmap)
        text = label or str(getattr(color, "name", None) or "")
        styles = [{"color": scale.to_rgba(v), "marker": "o"} for v in values]
        return styles, lambda ax: ax.figure.colorbar(scale, ax=ax, label=text)
    kinds = list(dict.fromkeys(map(str, values)))
    style: dict[str, Any] = {
        k: {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
        for i, k in enumerate(kinds)
    }

    def legend(ax: Axes) -> None:
        handles = [ax.plot([], [], linestyle="", label=kind, **style[kind])[0] for kind in kinds]
        ax.legend(handles=handles, frameon=False)

    return [style[str(v)] for v in values], legend


def _interval(ax: Axes, at: float, draws: np.ndarray, style: dict, vertical: bool) -> None:
    mean, (low, high) = draws.mean(), np.quantile(draws, INTERVAL)
    error = np.array([[max(mean - low, 0.0)], [max(high - mean, 0.0)]])
    where = {"x": at, "y": mean, "yerr": error} if vertical else {"x": mean, "y": at, "xerr": error}
    ax.errorbar(**where, linestyle="", markersize=5, capsize=2, linewidth=1.2, **style)


def _write_names(
    ax: Axes, names: Sequence[str], points: np.ndarray, intervals: np.ndarray | None = None
) -> None:
    """Names beside points ``(recording, 2)``, where they cover nothing: those of points that coincide in one label.

    Names that have room only farther away are tied to their point by a line. Of many recordings those without any room
    are left out, and a note says how many. ``intervals``, ``(recording, 2)``, are vertical bars to keep off, too.
    """
    size = "small" if len(names) <= FEW else "x-small"
    note: dict[str, Any] = {"fontsize": "x-small", "loc": "right", "color": "0.3"}
    if len(names) > FEW:
        ax.set_title(
            "names left out", **note
        )  # whether there is one is known below; its room is to be known here
    ax.figure.figure.draw_without_rendering()  # the layout makes room for labels and legends: then sizes are known
    box, dot = ax.get_window_extent(), ax.figure.dpi / 72
    to_pixels = lambda xy: ax.transData.transform(xy) - [box.x0, box.y0]
    pixels, frame = to_pixels(points), (0.0, 0.0, box.width, box.height)
    taken: list[Box] = [(x - 4 * dot, y - 4 * dot, x + 4 * dot, y + 4 * dot) for x, y in pixels.tolist()]
    if intervals is not None:
        ends = [to_pixels(np.stack([points[:, 0], end], 1)) for end in intervals.T]
        taken += [(x - 2 * dot, low, x + 2 * dot, high) for (x, low), (_, high) in zip(*ends, strict=True)]
    if (legend := ax.get_legend()) is not None:
        (x0, y0), (x1, y1) = legend.get_window_extent().get_points() - [box.x0, box.y0]
        taken.append((x0, y0, x1, y1))
    left, without = list(range(len(names))), 0
    while left:
        group = [row for row in left if (np.abs(pixels[row] - pixels[left[0]]) < ONE * dot).all()]
        left = [row for row in left if row not in group]
        text = ", ".join(names[row] for row in group[:3]) + (
            f" and {len(group) - 3} more" if len(group) > 3 else ""
        )
        at, (wide, tall) = pixels[group].mean(0), _size(ax, text, size)
        side = -1 if at[0] > box.width / 2 else 1  # towards the middle first
        lost, _, away, found = min(
            (_lost(place, taken, frame), number, away, place)
            for number, (away, place) in enumerate(_places(at, wide, tall, side, dot))
        )
        if lost > 0 and len(names) > FEW:
            without += len(group)
            continue
        taken.append(found)
        offset = ((found[0] - at[0]) / dot, (found[1] - at[1]) / dot)
        tie = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": size}
        style |= {"arrowprops": tie} if away > AWAY[0] else {}
        ax.annotate(text, tuple(points[group].mean(0)), xytext=offset, **style).set_in_layout(False)
    if len(names) > FEW:
        ax.set_title(f"{without} of {len(names)} names left out" if without else "", **note)


def _size(ax: Axes, text: str, size: str) -> tuple[float, float]:
    """Of a text in pixels."""
    probe = ax.text(0.0, 0.0, text, fontsize=size)
    box = probe.get_window_extent()
    probe.remove()
    return box.width, box.height


def _places(at: np.ndarray, wide: float, tall: float, side: int, dot: float) -> Iterator[tuple[float, Box]]:
    """Where a name of this size may stand around a point, the best first, and how far away that is, in points."""
    for away in AWAY:
        for right, up in (
            (side, 0),
            (side, 1),
            (side, -1),
            (-side, 0),
            (-side, 1),
            (-side, -1),
            (0, 1),
            (0, -1),
        ):
            gap = away * dot * (0.7 if right and up else 1.0)
            x = at[0] + (gap if right > 0 else -gap - wide if right < 0 else -wide / 2)
            y = at[1] + (gap if up > 0 else -gap - tall if up < 0 else -tall / 2)
            yield away, (x, y, x + wide, y + tall)


def _lost(place: Box, taken: Sequence[Box], frame: Box) -> float:
    """The area of a name that others cover or that is outside."""
    outside = (place[2] - place[0]) * (place[3] - place[1]) - _overlap(place, frame)
    return round(sum(_overlap(place, other) for other in taken) + outside, 3)


def _overlap(one: Box, other: Box) -> float:
    """The common area of two rectangles (left, bottom, right, top)."""
    wide, tall = (max(min(one[k + 2], other[k + 2]) - max(one[k], other[k]), 0.0) for k in (0, 1))
    return wide * tall


def _axes(ax: Any, size: int) -> np.ndarray:
    """One axes for each embedding dim."""
    if ax is None and size > 1:
        import matplotlib.pyplot as plt

        ax = plt.subplots(1, size, figsize=(4 * size, 3.5), layout="constrained")[1]
    axes = np.atleast_1d(np.asarray(new_axes(ax), object))
    if len(axes) < size:
        raise ValueError(f"embedding: needed {size} axes, one for each embedding dim, got {len(axes)}")
    return axes


def _dim_label(dim: int, size: int) -> str:
    return "embedding" if size == 1 else f"embedding dim {dim + 1}"
