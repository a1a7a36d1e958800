"""Training curves of a run."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cra_jax import schedule
from cra_jax.reports import figure_style
from cra_jax.reports.figure_style import BLUE, GREEN, GREY, PURPLE, VERMILLION

_Lines = Sequence[Mapping[str, Any]]
_Styles = Mapping[str, tuple[str, dict[str, Any]]]
# Metric -> its name in the legend, and the style of its curve.
_LOSSES: _Styles = {
    "loss_cls1": ("$L_{cls1}$", {"color": BLUE}),
    "loss_cls2": ("$L_{cls2}$", {"color": VERMILLION, "linestyle": "--"}),
    "loss_res": ("$L_{res}$", {"color": GREEN, "linestyle": "-."}),
    "loss_cntr": ("$L_{cntr}$", {"color": PURPLE, "linestyle": ":"}),
}
_LOCALIZATION: _Styles = {
    "pointing": ("pointing accuracy", {"color": BLUE, "marker": "o"}),
    "activation_in_box": ("CAM share in box", {"color": VERMILLION, "marker": "s"}),
    "attention_iou": ("attention IoU", {"color": GREEN, "marker": "^"}),
    "head_in_attention": ("head in attention", {"color": PURPLE, "marker": "D"}),
    "box_share": ("box share of crop", {"color": GREY, "dashes": (1, 1)}),
}
# Styles of the splits that are scored.
_SPLIT_STYLES: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "markersize": 3},
    {"color": VERMILLION, "marker": "s", "markersize": 3},
    {"color": GREEN, "marker": "^", "markersize": 3},
)


@dataclasses.dataclass(frozen=True)
class Phases:
    """The schedule of a run, in epochs.

    Attributes:
      epochs: number of epochs of the run.
      restriction_off: (begin, end) of each phase without L_res.
      rate_drops: epochs at which the learning rate drops.
      factor: factor of the learning rate at each drop.
    """

    epochs: int
    restriction_off: Sequence[tuple[int, int]]
    rate_drops: Sequence[int]
    factor: float


def compute_phases(
    epochs: int,
    *,
    restriction: Mapping[str, int] | None,
    rate: Mapping[str, int],
    factor: float,
) -> Phases:
    """The phases of Sec. 4.1, from the schedule at the start of each epoch.

    Args:
      epochs: number of epochs of the run.
      restriction: `first_epochs` and `period_epochs` of L_res; None without L_res.
      rate: `first_epochs` and `period_epochs` of the learning rate.
      factor: factor of the learning rate at each drop.
    """
    starts = np.arange(epochs)
    rates = schedule.learning_rate(
        starts, steps_per_epoch=1, base=1.0, factor=factor, **rate
    )
    weights = np.ones(epochs)
    if restriction:
        weights = schedule.restriction_weight(starts, steps_per_epoch=1, **restriction)
    drops = np.flatnonzero(np.diff([1.0, *rates])).tolist()
    # L_res counts as on before and after the run, so that every phase has an end.
    switches = np.flatnonzero(np.diff([1.0, *weights, 1.0])).tolist()
    off = list(zip(switches[::2], switches[1::2], strict=True))
    return Phases(epochs, off, drops, factor)


@figure_style.styled
def draw_training_curves(
    lines: _Lines, phases: Phases, *, other: _Lines = (), other_name: str = ""
) -> Figure:
    """Draws accuracy, losses and, if the test images have boxes, localization scores.

    Phases without L_res are shaded. Dashed lines mark drops of the learning rate.

    Args:
      lines: of `metrics.jsonl`.
      phases: of the schedule.
      other: lines of another run, whose test accuracy is added.
      other_name: printed name of the other run.
    """
    training = _training_lines(lines)
    localized = [x for x in _center_lines(lines, "test") if "pointing" in x]
    panels = 2 + bool(localized)
    figure = Figure(figsize=(7.2, 0.35 + 1.55 * panels), layout="constrained")
    axes = np.atleast_1d(figure.subplots(panels, sharex=True))
    _draw_accuracy(axes[0], training, lines, other, other_name)
    _draw_losses(axes[1], training)
    if localized:
        _draw_localization(axes[2], localized)
    for ax in axes:
        _draw_phases(ax, phases)
        _draw_legend(ax)
    _label_phases(axes[0], phases)
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(list(axes))
    return figure


def _training_lines(lines: _Lines) -> list[dict[str, Any]]:
    """The lines of the train split, with `epoch` as an exact fraction."""
    training = [x for x in lines if x["split"] == "train"]
    # `epoch` is rounded up; it is exact in the line at the end of each epoch.
    steps_per_epoch = max((x["step"] / x["epoch"] for x in training), default=1)
    return [{**x, "epoch": x["step"] / steps_per_epoch} for x in training]


def _center_lines(lines: _Lines, split: str) -> list[Mapping[str, Any]]:
    """The lines of a test split under the center protocol."""
    return [x for x in lines if x["split"] == split and x.get("protocol") == "center"]


def _draw_accuracy(
    ax: Axes, training: _Lines, lines: _Lines, other: _Lines, other_name: str
) -> None:
    _plot(ax, "top1", training, "train", scale=100, color=GREY, linewidth=0.7)
    splits = dict.fromkeys(x["split"] for x in lines if x.get("protocol") == "center")
    for split, style in zip(splits, _SPLIT_STYLES, strict=False):
        _plot(ax, "top1", _center_lines(lines, split), split, scale=100, **style)
        style = {**style, "linestyle": "--", "markerfacecolor": "white"}
        label = f"{split}, {other_name}"
        _plot(ax, "top1", _center_lines(other, split), label, scale=100, **style)
    ax.set_ylabel("top-1 accuracy (%)")


def _draw_losses(ax: Axes, training: _Lines) -> None:
    for metric, (label, style) in _LOSSES.items():
        _plot(ax, metric, training, label, **style)
    ax.set_ylabel("training loss")


def _draw_localization(ax: Axes, lines: _Lines) -> None:
    for metric, (label, style) in _LOCALIZATION.items():
        _plot(ax, metric, lines, label, scale=100, markersize=3, **style)
    ax.set_ylabel("localization, test (%)")
    ax.set_ylim(0, 100)


def _plot(
    ax: Axes, metric: str, lines: _Lines, label: str, *, scale: float = 1, **style: Any
) -> None:
    """Draws a metric by epoch, from the lines that have the metric."""
    lines = [x for x in lines if metric in x]
    if lines:
        epochs = [x["epoch"] for x in lines]
        values = [scale * x[metric] for x in lines]
        ax.plot(epochs, values, label=label, clip_on=False, **style)


def _draw_phases(ax: Axes, phases: Phases) -> None:
    for begin, end in phases.restriction_off:
        ax.axvspan(begin, end, color="0.92", linewidth=0, zorder=0)
    for epoch in phases.rate_drops:
        ax.axvline(epoch, color="0.45", linewidth=0.7, dashes=(4, 3), zorder=1)
    ax.margins(x=0)
    ax.set_xlim(0, phases.epochs)


def _draw_legend(ax: Axes) -> None:
    # Matplotlib warns about an empty legend unless the handles are passed.
    handles, labels = ax.get_legend_handles_labels()
    legend = ax.legend(
        handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(True)


def _label_phases(ax: Axes, phases: Phases) -> None:
    """Labels shading and dashed lines above the panel, except where labels overlap."""
    labels = dict.fromkeys(phases.rate_drops, f"learning rate × {phases.factor:g}")
    for begin, _ in phases.restriction_off:
        text = "no $L_{res}$"
        labels[begin] = f"{labels[begin]}, {text}" if begin in labels else text
    label_end = 0.0
    for epoch, text in sorted(labels.items()):
        if epoch < label_end:
            continue
        characters = len(re.sub(r"[${}_]", "", text))
        label_end = epoch + 0.01 * characters * phases.epochs
        ax.annotate(
            text,
            (epoch, 1),
            (0, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=6,
            color="0.3",
            parse_math=True,
        )
