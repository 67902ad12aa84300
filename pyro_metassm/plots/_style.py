"""How all pictures look: colours, markers, line styles, and axes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colours of Okabe and Ito, which colour-blind readers tell apart.
BLUE, ORANGE, BLACK = "#0072B2", "#D55E00", "#000000"
PALETTE = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", BLACK)
MARKERS = "osD^vP*"
STYLES = ("-", "--", "-.", ":")
INTERVAL = (0.05, 0.95)  # of the draws that bands and bars hold


def new_axes(ax: Any = None) -> Axes:
    """The axes given, or those of a new figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt  # here: importing the library must not choose a backend

    return plt.subplots(figsize=(5, 4), layout="constrained")[1]


def shades() -> Any:
    """A colour map from light to dark, not too light for white paper, that grows darker in grey, too."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["cividis_r"](np.linspace(0.2, 1.0, 256)))


def ellipse(ax: Axes, draws: np.ndarray, color: Any) -> None:
    """The ellipse that holds 90 % of a Normal with the mean and covariance of draws ``(2, draw)``."""
    from matplotlib.patches import Ellipse

    values, vectors = np.linalg.eigh(np.cov(draws) if draws.shape[1] > 1 else np.zeros((2, 2)))
    # A normal plane holds 90 % within sqrt(-2 ln 0.1) standard deviations.
    width, height = 2 * np.sqrt(-2 * np.log(0.1) * values.clip(min=0))
    angle = np.degrees(np.arctan2(vectors[1, 0], vectors[0, 0]))
    center = draws.mean(1)
    ax.add_patch(Ellipse((center[0], center[1]), width, height, angle=angle, facecolor=color, alpha=0.25))


def legend_below(ax: Axes, handles: Sequence[Any], columns: int = 3) -> None:
    """A legend under the labels of the x axis, where it covers nothing; what one there says is kept."""
    before = ax.get_legend()
    entries: dict[str, Any] = {}
    if before is not None:
        entries = dict(zip((text.get_text() for text in before.texts), before.legend_handles, strict=True))
    entries |= {handle.get_label(): handle for handle in handles}
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.0), "borderaxespad": 4.5}
    place |= {"frameon": False, "fontsize": "small", "ncols": columns, "columnspacing": 1.2}
    ax.legend(list(entries.values()), list(entries), **place)
