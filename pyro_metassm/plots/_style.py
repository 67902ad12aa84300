"""How all pictures look: colours, markers, line styles, and axes of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
