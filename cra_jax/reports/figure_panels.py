"""Images with what networks make of them -> figures for a paper (Fig. 1, 3, 4).

They know no run and no file. Sizes are in inches; a figure is as wide as its images
need, about 7 for eight of them, which is the text width of most journals.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from cra_jax.reports import figure_style


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a network makes of an image.

    Attributes:
      activation: ``[crop, crop]``, the map of the class that it predicts.
      predicted: name of that class.
      right: whether that is the truth.
    """

    activation: np.ndarray
    predicted: str
    right: bool


@dataclasses.dataclass(frozen=True)
class Attended:
    """An image and its attention at some epochs.

    Attributes:
      image: uint8 ``[crop, crop, 3]``.
      name: of its class.
      corners: ``[e, 4, 2]``, of the attention in pixels, an epoch each.
      attention: uint8 ``[e, s, s, 3]``.
      redundancy: the same, or None for a kind without.
      box: ``(x_min, y_min, x_max, y_max)`` of the object in pixels, where known.
    """

    image: np.ndarray
    name: str
    corners: np.ndarray
    attention: np.ndarray
    redundancy: np.ndarray | None
    box: Sequence[float] | None


@dataclasses.dataclass(frozen=True)
class Correction:
    """A test image that one network gets wrong and another right.

    Attributes:
      image: uint8 ``[crop, crop, 3]``.
      truth: its class.
      taken_for: the class that the first network takes it for.
      like_truth: another image of its class.
      like_taken_for: an image of the class that it is taken for.
      activations: of both networks, ``[crop, crop]`` each.
    """

    image: np.ndarray
    truth: str
    taken_for: str
    like_truth: np.ndarray
    like_taken_for: np.ndarray
    activations: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Two classes that are taken for each other.

    Attributes:
      names: of both.
      images: one of each, wrongly classified where there is such a one.
      wrong: how many of each are taken for the other.
      count: how many there are of each.
    """

    names: tuple[str, str]
    images: tuple[np.ndarray, np.ndarray]
    wrong: tuple[int, int]
    count: tuple[int, int]


@figure_style.styled
def activation_maps(
    images: Sequence[np.ndarray],
    truths: Sequence[str],
    answers: Mapping[str, Sequence[Answer]],
    *,
    boxes: Sequence[Sequence[float] | None],
) -> Figure:
    """Class activation maps of one or more networks for the same images (Fig. 3).

    Args:
      images: uint8 ``[crop, crop, 3]`` each; a column each.
      truths: names of their classes.
      answers: network -> an answer an image; a row each, below the images.
      boxes: of the objects in pixels, or None.
    """
    rows = 1 + len(answers)
    figure, axes = figure_style.grid(
        rows,
        len(images),
        cell_in=0.8,
        top_in=0.3,
        left_in=0.8,
        gap_in=0.29,
        first_gap_in=0.06,
    )
    for column, (image, truth, box) in enumerate(
        zip(images, truths, boxes, strict=True)
    ):
        figure_style.show(axes[0][column], image)
        figure_style.title_above(axes[0][column], figure_style.tidy(truth))
        figure_style.draw_box(axes[0][column], box)
        for row, answered in enumerate(answers.values(), start=1):
            answer, ax = answered[column], axes[row][column]
            figure_style.show(
                ax, figure_style.overlay_activation(image, answer.activation)
            )
            figure_style.draw_box(ax, box)
            figure_style.verdict(ax, answer.predicted, right=answer.right)
    for row, name in enumerate(("test image", *answers)):
        figure_style.row_name(axes[row][0], name)
    return figure


@figure_style.styled
def attention_over_epochs(
    attended: Sequence[Attended], epochs: Sequence[int], *, title: str
) -> Figure:
    """Where the attention is while it forms (Fig. 4): a column an epoch.

    Args:
      attended: images, below each other.
      epochs: of the columns.
      title: of the network.
    """
    has_redundancy = attended[0].redundancy is not None
    names = ["test image", "attention", *(["redundancy"] if has_redundancy else [])]
    block = len(names)
    figure, axes = figure_style.grid(
        block * len(attended),
        len(epochs),
        cell_in=0.85,
        top_in=0.38,
        left_in=0.8,
        gap_in=0.04,
        block=block,
        block_gap_in=0.14,
    )
    first, last = (axes[0][column].get_position() for column in (0, -1))
    middle, top = (first.x0 + last.x1) / 2, 1 - 0.14 / figure.get_figheight()
    figure.text(middle, top, title, ha="center", weight="bold")
    for number, one in enumerate(attended):
        for column, epoch in enumerate(epochs):
            ax = axes[number * block][column]
            figure_style.show(ax, one.image)
            figure_style.draw_box(ax, one.box)
            figure_style.draw_attention(ax, one.corners[column])
            figure_style.show(axes[number * block + 1][column], one.attention[column])
            if one.redundancy is not None:
                figure_style.show(
                    axes[number * block + 2][column], one.redundancy[column]
                )
            if number == 0:
                figure_style.title_above(ax, f"epoch {epoch}")
        for row, name in enumerate(names):
            figure_style.row_name(axes[number * block + row][0], name)
        figure_style.row_name(
            axes[number * block][0], figure_style.tidy(one.name, width=12), bold=True
        )
    return figure


@figure_style.styled
def corrections(found: Sequence[Correction], names: tuple[str, str]) -> Figure:
    """Test images that one network gets wrong and another right (Fig. 1).

    Args:
      found: a row each.
      names: of the network that is wrong, and of the one that is right.
    """
    wrong, right = names
    figure, axes = figure_style.grid(
        len(found), 5, cell_in=1.1, top_in=0.32, left_in=0.05, gap_in=0.3
    )
    for row, one in zip(axes, found, strict=True):
        figure_style.show(row[0], one.like_taken_for)
        figure_style.verdict(row[0], one.taken_for, right=False, width=18)
        figure_style.show(row[1], one.image)
        figure_style.words_below(
            row[1], figure_style.tidy(one.truth, width=18), figure_style.BLACK
        )
        figure_style.show(row[2], one.like_truth)
        figure_style.verdict(row[2], one.truth, right=True, width=18)
        for ax, activation in zip(row[3:], one.activations, strict=True):
            figure_style.show(
                ax, figure_style.overlay_activation(one.image, activation)
            )
    titles = (
        f"{wrong} says:\nlike this one",
        "test image\nand its truth",
        f"{right} says:\nlike this one",
        f"activation of\n{wrong}",
        f"activation of\n{right}",
    )
    for ax, title in zip(axes[0], titles, strict=True):
        figure_style.title_above(ax, title)
    return figure


@figure_style.styled
def confusions(found: Sequence[Confusion]) -> Figure:
    """The pairs of classes that are taken for each other most often, with examples."""
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, axes = figure_style.grid(
        rows,
        2 * columns,
        cell_in=1.1,
        top_in=0.08,
        left_in=0.05,
        gap_in=0.56,
        pair_gap_in=0.16,
    )
    flat = [ax for row in axes for ax in row]
    for ax in flat[2 * len(found) :]:
        ax.set_axis_off()
    for number, one in enumerate(found):
        names = [figure_style.tidy(name, width=17) for name in one.names]
        lines = 1 + max(name.count("\n") for name in names)
        for side in (0, 1):
            ax = flat[2 * number + side]
            figure_style.show(ax, one.images[side])
            figure_style.words_below(ax, names[side], figure_style.BLACK, bold=True)
            figure_style.words_below(
                ax,
                f"{one.wrong[side]} of {one.count[side]} taken for\nthe other",
                figure_style.VERMILLION if one.wrong[side] else figure_style.GREY,
                line=lines,
            )
    return figure
