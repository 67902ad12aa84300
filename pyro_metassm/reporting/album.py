"""The pictures of a page: drawn, packed small, and no more of them than the page may hold."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyro_metassm.reporting import html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST = 5_000_000  # bytes of a page
SHARE = 0.85  # of them that may be pictures
COLORS = 96  # of a picture: a fifth of the bytes of all colours, and no difference that an eye sees
SHARP, PLAIN = 150, 100  # dots an inch: of pages of few pictures, of others
FEW = 12  # recordings
INCH = 92  # pixels of the page


class Album:
    """Makes pictures as HTML, within the bytes of a page.

    Args:
        num_recordings: of the page; more recordings have less sharp pictures.

    Attributes:
        left_out: how many pictures there was no room for.
    """

    def __init__(self, num_recordings: int):
        self.dpi = SHARP if num_recordings <= FEW else PLAIN
        self.room = SHARE * LARGEST
        self.left_out = 0

    def picture(
        self, draw: Callable[[Figure], object], size: tuple[float, float], alt: str, caption: str
    ) -> str:
        """A picture of so many inches; empty where there is no room.

        Args:
            draw: into a figure, which belongs to no window.
            size: inches.
            alt: what is to be seen, for who cannot see it.
            caption: below it.

        Raises:
            ValueError: what ``draw`` raises.
        """
        import matplotlib as mpl
        from matplotlib.figure import Figure

        # Names of recordings are no formulas, whatever they hold; letters that the font lacks are boxes.
        with mpl.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
            figure = Figure(figsize=size, layout="constrained", facecolor="white")
            draw(figure)
            file = io.BytesIO()
            figure.savefig(file, dpi=self.dpi, format="png")
        made = html.picture(packed(file.getvalue()), alt, caption, round(INCH * size[0]))
        if len(made) > self.room:
            self.left_out += 1
            return ""
        self.room -= len(made)
        return made


def packed(png: bytes) -> bytes:
    """A picture in few colours."""
    from PIL import Image

    file = io.BytesIO()
    with Image.open(io.BytesIO(png)) as image:
        few = image.convert("RGB").quantize(COLORS, dither=Image.Dither.NONE)
        few.save(file, format="PNG", optimize=True)
    return file.getvalue()
