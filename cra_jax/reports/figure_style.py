"""What the package's figures are made of: a style, marks on images, a grid, a file.

Colours are those of Okabe and Ito, which people of any colour vision tell apart, never
without a second sign (dashes, markers, words), so that a print in grey still reads.
Maps use inferno, whose lightness rises evenly. Nothing here touches pyplot.
"""

import functools
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from cra_jax.inference import overlay
from cra_jax.reports import html_page

BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE, GREY = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"),
)
_STYLE: Any = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a class name may hold a dollar sign
    "pdf.fonttype": 42,  # text stays text
    "svg.fonttype": "none",
}
_DPI = 220
_LINE_PT = 8.3  # from one line of text to the next


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws in this room's style, and leaves everyone else's as it was."""

    @functools.wraps(draw)
    def drawn(*arguments: Any, **named: Any) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*arguments, **named)

    return drawn


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Writes `<name>.pdf` and `<name>.png`, and returns the latter's path.

    The same figure gives the same bytes: no time of day is written.
    """
    png = folder / f"{name}.png"
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; so be it.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(
            folder / f"{name}.pdf", dpi=_DPI, metadata={"CreationDate": None}
        )
        figure.savefig(png, dpi=_DPI, metadata={"Software": None})
    return png


def tidy(name: str, *, width: int = 16) -> str:
    """A class name for a narrow space: "001.Black_footed_Albatross" -> two lines."""
    words = html_page.class_words(name)
    wrapped = textwrap.wrap(words, width) or [words]
    if len(wrapped) > 2:
        wrapped = [wrapped[0], wrapped[1][: width - 1].rstrip(" .,") + "…"]
    return "\n".join(wrapped)


def overlay_activation(image: np.ndarray, activation: np.ndarray) -> np.ndarray:
    """A map over its image in grey: the stronger, the more opaque and the lighter.

    Args:
      image: uint8 ``[h, w, 3]``.
      activation: ``[h, w]``; 0 and below is clear, its maximum strongest.

    Returns:
      uint8 ``[h, w, 3]``.
    """
    rgb, share = overlay.activation_colors(activation)
    grey = image @ np.array([0.299, 0.587, 0.114]) * 0.85
    opacity = (0.85 * share)[..., None]
    return np.round(opacity * rgb + (1 - opacity) * grey[..., None]).astype(np.uint8)


def grid(
    rows: int,
    columns: int,
    *,
    cell_in: float,
    top_in: float,
    left_in: float,
    gap_in: float,
    first_gap_in: float | None = None,
    block: int = 0,
    block_gap_in: float = 0.0,
    pair_gap_in: float = 0.0,
) -> tuple[Figure, list[list[Axes]]]:
    """Square cells of one size with room for words, placed by hand.

    Args:
      rows: of cells.
      columns: of cells.
      cell_in: side of a cell.
      top_in: above the first row.
      left_in: before the first column.
      gap_in: below each row.
      first_gap_in: below the first; None: as below the others.
      block: rows that belong together; 0: all.
      block_gap_in: more room between blocks.
      pair_gap_in: more room after every second column.
    """
    across_in = 0.05
    blocks = (rows - 1) // block if block else 0
    pairs = (columns - 1) // 2 if pair_gap_in else 0
    width = left_in + columns * (cell_in + across_in) + pairs * pair_gap_in
    less_in = 0.0 if first_gap_in is None else gap_in - first_gap_in
    height = top_in + rows * (cell_in + gap_in) + blocks * block_gap_in - less_in
    figure = Figure(figsize=(width, height))
    axes = []
    for row in range(rows):
        down = top_in + row * (cell_in + gap_in) + cell_in - (less_in if row else 0)
        down += (row // block) * block_gap_in if block else 0
        line = []
        for column in range(columns):
            right = left_in + column * (cell_in + across_in)
            right += (column // 2) * pair_gap_in
            place = (
                *(right / width, 1 - down / height),
                *(cell_in / width, cell_in / height),
            )
            ax = figure.add_axes(place)
            ax.set_xticks([])
            ax.set_yticks([])
            line.append(ax)
        axes.append(line)
    return figure, axes


def show(ax: Axes, image: np.ndarray) -> None:
    """An image that fills its cell, one unit a pixel, pixel centres at integers."""
    ax.imshow(image, interpolation="bicubic")
    ax.autoscale(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _outlined(color: str, width: float) -> dict[str, Any]:
    """A line that shows on light and on dark."""
    edge = patheffects.withStroke(linewidth=width + 1.2, foreground="black")
    return {
        **{"fill": False, "edgecolor": color, "linewidth": width},
        "path_effects": [edge],
    }


def draw_box(ax: Axes, box: Sequence[float] | None) -> None:
    """The object's box, dashed, where there is one."""
    if box is not None:
        x_min, y_min, x_max, y_max = box
        look: dict[str, Any] = _outlined("white", 0.7) | {"linestyle": (0, (3, 2))}
        ax.add_patch(Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, **look))


def draw_attention(ax: Axes, corners: np.ndarray) -> None:
    """The parallelogram, with a dot at the attention's own top left."""
    ax.add_patch(Polygon(corners, closed=True, **_outlined(ORANGE, 1.2)))
    ax.plot(
        *corners[0],
        marker="o",
        markersize=3.5,
        color=ORANGE,
        markeredgecolor="black",
        markeredgewidth=0.6,
    )


def title_above(ax: Axes, text: str) -> None:
    """Words above a cell."""
    lines = text.split("\n")
    for number, line in enumerate(reversed(lines)):
        _words(ax, line, (0.5, 1), (0, 3.5 + _LINE_PT * number), ha="center")


def words_below(
    ax: Axes, text: str, color: str, *, line: int = 0, bold: bool = False
) -> None:
    """Words below a cell, from its line number `line` on."""
    weight = "bold" if bold else "normal"
    for number, words in enumerate(text.split("\n"), start=line):
        down = -8 - _LINE_PT * number
        _words(ax, words, (0.5, 0), (0, down), ha="center", color=color, weight=weight)


def verdict(ax: Axes, predicted: str, *, right: bool, width: int = 12) -> None:
    """The answer, with a tick or a cross."""
    mark, color = ("✓", GREEN) if right else ("✗", VERMILLION)
    words_below(ax, f"{mark} {tidy(predicted, width=width)}", color)


def row_name(ax: Axes, text: str, *, bold: bool = False) -> None:
    """Words before a row; bold ones stand above where others do."""
    lines = text.split("\n")
    for number, line in enumerate(reversed(lines)):
        up = _LINE_PT * (number + (1.4 if bold else -0.3))
        weight = "bold" if bold else "normal"
        _words(ax, line, (0, 0.5), (-4, up), ha="right", weight=weight)


def _words(
    ax: Axes, text: str, place: tuple[float, float], off_pt: tuple[float, float], **look
) -> None:
    """One line at a place in a cell, so many points off it; its baseline counts."""
    ax.annotate(
        text,
        place,
        off_pt,
        xycoords="axes fraction",
        textcoords="offset points",
        va="baseline",
        **look,
    )
