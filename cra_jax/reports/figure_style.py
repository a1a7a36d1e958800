"""Style of the figures, their grid of images, annotations and files.

Colours are those of Okabe and Ito, which are distinct with any colour vision. Dashes,
markers or words always repeat what a colour means, so that the figures are readable in
grey. Class activation maps use inferno, whose lightness rises uniformly. This module
does not use pyplot, and therefore changes no global state.
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
from cra_jax.runtime import files, fonts

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
    "text.parse_math": False,  # a class name may contain a dollar sign
    "pdf.fonttype": 42,  # embeds text as text
    "svg.fonttype": "none",
}
_DPI = 220
_LINE_PT = 8.3  # distance of lines of text


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorates a function so that it draws in the style of this project.

    Matplotlib's own settings are restored afterwards.
    """

    @functools.wraps(draw)
    def draw_styled(*arguments: Any, **named: Any) -> Figure:
        with matplotlib.rc_context(_STYLE):
            return draw(*arguments, **named)

    return draw_styled


def save_figure(figure: Figure, directory: Path, name: str) -> Path:
    """Writes `<name>.pdf` and `<name>.png`.

    The files contain no date, so that the same figure gives the same bytes.

    Returns:
      Path of the PNG file.
    """
    png = directory / f"{name}.png"
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Texts other than class names may have characters that the font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        for kind, date in (("pdf", "CreationDate"), ("png", "Software")):
            with files.written_atomically(directory / f"{name}.{kind}") as file:
                figure.savefig(file, format=kind, dpi=_DPI, metadata={date: None})
    return png


def wrap_class_name(name: str, *, width: int = 16) -> str:
    """A class name on one or two lines: "001.Red_bird" -> "Red bird".

    Args:
      name: of the class.
      width: limit of a line, in characters; a longer name is truncated.
    """
    readable = fonts.drawable(html_page.readable_class_name(name))
    wrapped = textwrap.wrap(readable, width) or [readable]
    if len(wrapped) > 2:
        wrapped = [wrapped[0], wrapped[1][: width - 1].rstrip(" .,") + "…"]
    return "\n".join(wrapped)


def overlay_cam(image: np.ndarray, cam: np.ndarray) -> np.ndarray:
    """Overlays a class activation map on its image in grey.

    Args:
      image: uint8 ``[h, w, 3]``.
      cam: ``[h, w]``; values of 0 and less are transparent, the maximum is the lightest
        and most opaque.

    Returns:
      uint8 ``[h, w, 3]``.
    """
    rgb, share = overlay.activation_colors(cam)
    grey = image @ np.array([0.299, 0.587, 0.114]) * 0.85
    opacity = (0.85 * share)[..., None]
    return np.round(opacity * rgb + (1 - opacity) * grey[..., None]).astype(np.uint8)


def create_grid(
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
    """Creates a figure of square cells of equal size, with space for text.

    Args:
      rows: number of rows.
      columns: number of columns.
      cell_in: side of a cell.
      top_in: space above the first row.
      left_in: space left of the first column.
      gap_in: space below each row.
      first_gap_in: space below the first row; None: `gap_in`.
      block: number of rows in a block; 0: all rows are one block.
      block_gap_in: additional space between blocks.
      pair_gap_in: additional space after every second column.

    Returns:
      The figure, and its axes as rows of columns.
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
        row_axes = []
        for column in range(columns):
            right = left_in + column * (cell_in + across_in)
            right += (column // 2) * pair_gap_in
            position = (
                *(right / width, 1 - down / height),
                *(cell_in / width, cell_in / height),
            )
            ax = figure.add_axes(position)
            ax.set_xticks([])
            ax.set_yticks([])
            row_axes.append(ax)
        axes.append(row_axes)
    return figure, axes


def draw_image(ax: Axes, image: np.ndarray) -> None:
    """Draws an image that fills its cell; data coordinates are pixels of the image."""
    ax.imshow(image, interpolation="bicubic")
    ax.autoscale(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _outline_style(color: str, width: float) -> dict[str, Any]:
    """Style of an outline that is visible on light and on dark images."""
    edge = patheffects.withStroke(linewidth=width + 1.2, foreground="black")
    return {
        **{"fill": False, "edgecolor": color, "linewidth": width},
        "path_effects": [edge],
    }


def draw_box(ax: Axes, box: Sequence[float] | None) -> None:
    """Draws the box of an object, dashed; None draws nothing."""
    if box is not None:
        x_min, y_min, x_max, y_max = box
        style: dict[str, Any] = _outline_style("white", 0.7)
        style["linestyle"] = (0, (3, 2))
        ax.add_patch(Rectangle((x_min, y_min), x_max - x_min, y_max - y_min, **style))


def draw_attention(ax: Axes, corners: np.ndarray) -> None:
    """Outlines the attention, with a dot at the top left corner of its own frame."""
    ax.add_patch(Polygon(corners, closed=True, **_outline_style(ORANGE, 1.2)))
    ax.plot(
        *corners[0],
        marker="o",
        markersize=3.5,
        color=ORANGE,
        markeredgecolor="black",
        markeredgewidth=0.6,
    )


def draw_title(ax: Axes, text: str) -> None:
    """Writes one or more lines above a cell."""
    lines = text.split("\n")
    for number, line in enumerate(reversed(lines)):
        _write_line(ax, line, (0.5, 1), (0, 3.5 + _LINE_PT * number), ha="center")


def draw_text_below(
    ax: Axes, text: str, color: str, *, first_line: int = 0, bold: bool = False
) -> None:
    """Writes lines below a cell; `first_line` is the number of lines to skip."""
    style = {"ha": "center", "color": color, "weight": "bold" if bold else "normal"}
    for number, line in enumerate(text.split("\n"), start=first_line):
        _write_line(ax, line, (0.5, 0), (0, -8 - _LINE_PT * number), **style)


def draw_prediction(
    ax: Axes, predicted: str, *, correct: bool, width: int = 12
) -> None:
    """Writes the predicted class below a cell, with a tick or a cross."""
    mark, color = ("✓", GREEN) if correct else ("✗", VERMILLION)
    draw_text_below(ax, f"{mark} {wrap_class_name(predicted, width=width)}", color)


def draw_row_label(ax: Axes, text: str, *, bold: bool = False) -> None:
    """Writes a label left of a row; a bold label is one line higher than others."""
    lines = text.split("\n")
    for number, line in enumerate(reversed(lines)):
        up = _LINE_PT * (number + (1.4 if bold else -0.3))
        weight = "bold" if bold else "normal"
        _write_line(ax, line, (0, 0.5), (-4, up), ha="right", weight=weight)


def _write_line(
    ax: Axes,
    text: str,
    position: tuple[float, float],
    offset_pt: tuple[float, float],
    **style: Any,
) -> None:
    """Writes a line whose baseline is `offset_pt` away from a position in a cell."""
    ax.annotate(
        text,
        position,
        offset_pt,
        xycoords="axes fraction",
        textcoords="offset points",
        va="baseline",
        fontfamily=fonts.families(text),
        **style,
    )
