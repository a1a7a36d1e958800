"""Figures of a paper (Fig. 1, 3, 4) from images and the outputs of networks.

The functions of this module read no files. Sizes are in inches. The width of a figure
depends on the number of its images: eight images take about 7 inches, the text width of
most journals.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from cra_jax.reports import figure_style


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Output of a network for an image.

    Attributes:
      cam: ``[crop, crop]``, class activation map of the predicted class.
      predicted: name of the predicted class.
      correct: whether the predicted class is the label.
    """

    cam: np.ndarray
    predicted: str
    correct: bool


@dataclasses.dataclass(frozen=True)
class AttentionHistory:
    """An image and its attention at several epochs.

    Attributes:
      image: uint8 ``[crop, crop, 3]``.
      class_name: name of its class.
      corners: ``[e, 4, 2]``, corners of the attention at each epoch, in pixels.
      attention: uint8 ``[e, s, s, 3]``.
      redundancy: uint8 ``[e, s, s, 3]``; None if the network has no redundancy.
      box: ``(x_min, y_min, x_max, y_max)`` of the object in pixels, or None.
    """

    image: np.ndarray
    class_name: str
    corners: np.ndarray
    attention: np.ndarray
    redundancy: np.ndarray | None
    box: Sequence[float] | None


@dataclasses.dataclass(frozen=True)
class Correction:
    """A test image that one network misclassifies and another classifies correctly.

    Attributes:
      image: uint8 ``[crop, crop, 3]``.
      true_class: name of its class.
      wrong_class: name of the class that the first network predicts.
      true_class_image: another image of the true class.
      wrong_class_image: an image of the wrong class.
      cams: ``[crop, crop]`` each, class activation maps of both networks.
    """

    image: np.ndarray
    true_class: str
    wrong_class: str
    true_class_image: np.ndarray
    wrong_class_image: np.ndarray
    cams: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Confusion:
    """Two classes that a network confuses.

    Attributes:
      class_names: of the two classes.
      images: one image of each class, misclassified as the other class if possible.
      confused: for each class, the number of its images predicted as the other class.
      counts: for each class, the number of its images.
    """

    class_names: tuple[str, str]
    images: tuple[np.ndarray, np.ndarray]
    confused: tuple[int, int]
    counts: tuple[int, int]


@figure_style.styled
def draw_cams(
    images: Sequence[np.ndarray],
    class_names: Sequence[str],
    predictions: Mapping[str, Sequence[Prediction]],
    *,
    boxes: Sequence[Sequence[float] | None],
) -> Figure:
    """Draws class activation maps of one or more networks for the same images (Fig. 3).

    Args:
      images: uint8 ``[crop, crop, 3]`` each; one column per image.
      class_names: of the images.
      predictions: name of a network -> a prediction per image; one row per network,
        below the images.
      boxes: of the objects in pixels, or None.
    """
    rows = 1 + len(predictions)
    figure, axes = figure_style.create_grid(
        rows,
        len(images),
        cell_in=0.8,
        top_in=0.3,
        left_in=0.8,
        gap_in=0.29,
        first_gap_in=0.06,
    )
    for column, (image, class_name, box) in enumerate(
        zip(images, class_names, boxes, strict=True)
    ):
        figure_style.draw_image(axes[0][column], image)
        title = figure_style.wrap_class_name(class_name)
        figure_style.draw_title(axes[0][column], title)
        figure_style.draw_box(axes[0][column], box)
        for row, of_network in enumerate(predictions.values(), start=1):
            prediction, ax = of_network[column], axes[row][column]
            figure_style.draw_image(ax, figure_style.overlay_cam(image, prediction.cam))
            figure_style.draw_box(ax, box)
            figure_style.draw_prediction(
                ax, prediction.predicted, correct=prediction.correct
            )
    for row, name in enumerate(("test image", *predictions)):
        figure_style.draw_row_label(axes[row][0], name)
    return figure


@figure_style.styled
def draw_attention_by_epoch(
    histories: Sequence[AttentionHistory], epochs: Sequence[int], *, title: str
) -> Figure:
    """Draws the attention at several epochs of training, one column each (Fig. 4).

    Args:
      histories: of the images; one block of rows each.
      epochs: of the columns.
      title: name of the network.
    """
    has_redundancy = histories[0].redundancy is not None
    labels = ["test image", "attention", *(["redundancy"] if has_redundancy else [])]
    block = len(labels)
    figure, axes = figure_style.create_grid(
        block * len(histories),
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
    for number, history in enumerate(histories):
        first_row = number * block
        for column, epoch in enumerate(epochs):
            ax = axes[first_row][column]
            figure_style.draw_image(ax, history.image)
            figure_style.draw_box(ax, history.box)
            figure_style.draw_attention(ax, history.corners[column])
            figure_style.draw_image(
                axes[first_row + 1][column], history.attention[column]
            )
            if history.redundancy is not None:
                figure_style.draw_image(
                    axes[first_row + 2][column], history.redundancy[column]
                )
            if number == 0:
                figure_style.draw_title(ax, f"epoch {epoch}")
        for row, label in enumerate(labels):
            figure_style.draw_row_label(axes[first_row + row][0], label)
        figure_style.draw_row_label(
            axes[first_row][0],
            figure_style.wrap_class_name(history.class_name, width=12),
            bold=True,
        )
    return figure


@figure_style.styled
def draw_corrections(
    corrections: Sequence[Correction], networks: tuple[str, str]
) -> Figure:
    """Draws test images that one network misclassifies and another does not (Fig. 1).

    Args:
      corrections: one row each.
      networks: names of the network that is wrong and of the one that is correct.
    """
    wrong, correct = networks
    figure, axes = figure_style.create_grid(
        len(corrections), 5, cell_in=1.1, top_in=0.32, left_in=0.05, gap_in=0.3
    )
    for row, one in zip(axes, corrections, strict=True):
        figure_style.draw_image(row[0], one.wrong_class_image)
        figure_style.draw_prediction(row[0], one.wrong_class, correct=False, width=18)
        figure_style.draw_image(row[1], one.image)
        figure_style.draw_text_below(
            row[1],
            figure_style.wrap_class_name(one.true_class, width=18),
            figure_style.BLACK,
        )
        figure_style.draw_image(row[2], one.true_class_image)
        figure_style.draw_prediction(row[2], one.true_class, correct=True, width=18)
        for ax, cam in zip(row[3:], one.cams, strict=True):
            figure_style.draw_image(ax, figure_style.overlay_cam(one.image, cam))
    titles = (
        f"class predicted by\n{wrong}",
        "test image,\ntrue class",
        f"class predicted by\n{correct}",
        f"CAM of\n{wrong}",
        f"CAM of\n{correct}",
    )
    for ax, title in zip(axes[0], titles, strict=True):
        figure_style.draw_title(ax, title)
    return figure


@figure_style.styled
def draw_confusions(confusions: Sequence[Confusion]) -> Figure:
    """Draws pairs of classes that a network confuses, with an image of each class."""
    columns = min(3, len(confusions))
    rows = -(-len(confusions) // columns)
    figure, axes = figure_style.create_grid(
        rows,
        2 * columns,
        cell_in=1.1,
        top_in=0.08,
        left_in=0.05,
        gap_in=0.56,
        pair_gap_in=0.16,
    )
    flat = [ax for row in axes for ax in row]
    for ax in flat[2 * len(confusions) :]:
        ax.set_axis_off()
    for number, one in enumerate(confusions):
        names = [
            figure_style.wrap_class_name(name, width=17) for name in one.class_names
        ]
        lines = 1 + max(name.count("\n") for name in names)
        for side in (0, 1):
            ax = flat[2 * number + side]
            figure_style.draw_image(ax, one.images[side])
            figure_style.draw_text_below(ax, names[side], figure_style.BLACK, bold=True)
            figure_style.draw_text_below(
                ax,
                f"{one.confused[side]} of {one.counts[side]} predicted\n"
                "as the other class",
                figure_style.VERMILLION if one.confused[side] else figure_style.GREY,
                first_line=lines,
            )
    return figure
