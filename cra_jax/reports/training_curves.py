"""The metrics of a run -> its training curves."""

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
_Looks = Mapping[str, tuple[str, dict[str, Any]]]
# Metric -> its name in the legend, and the look of its curve.
_LOSSES: _Looks = {
    "loss_cls1": ("$L_{cls1}$", {"color": BLUE}),
    "loss_cls2": ("$L_{cls2}$", {"color": VERMILLION, "linestyle": "--"}),
    "loss_res": ("$L_{res}$", {"color": GREEN, "linestyle": "-."}),
    "loss_cntr": ("$L_{cntr}$", {"color": PURPLE, "linestyle": ":"}),
}
_ATTENTION: _Looks = {
    "pointing": ("peak in the box", {"color": BLUE, "marker": "o"}),
    "activation_in_box": (
        "activation in the box",
        {"color": VERMILLION, "marker": "s"},
    ),
    "attention_iou": ("attention IoU", {"color": GREEN, "marker": "^"}),
    "box_share": ("box's share of the crop", {"color": GREY, "dashes": (1, 1)}),
}
# Of the first two test splits.
_SPLIT_LOOKS: tuple[dict[str, Any], ...] = (
    {"color": BLUE, "marker": "o", "markersize": 3},
    {"color": VERMILLION, "marker": "s", "markersize": 3},
)


@dataclasses.dataclass(frozen=True)
class Phases:
    """The schedule of a run, in epochs.

    Attributes:
      epochs: of the whole run.
      restriction_off: (begin, end) of each phase without L_res.
      rate_falls: where the learning rate falls.
      factor: of each fall.
    """

    epochs: int
    restriction_off: Sequence[tuple[int, int]]
    rate_falls: Sequence[int]
    factor: float


def phases(
    epochs: int,
    *,
    restriction: Mapping[str, int] | None,
    rate: Mapping[str, int],
    factor: float,
) -> Phases:
    """The phases of Sec. 4.1: `schedule` at the start of each epoch.

    Args:
      epochs: of the whole run.
      restriction: `first_epochs` and `period_epochs` of L_res; None without L_res.
      rate: the same of the learning rate.
      factor: by which the rate falls.
    """
    starts = np.arange(epochs)
    rates = schedule.learning_rate(
        starts, steps_per_epoch=1, base=1.0, factor=factor, **rate
    )
    weights = np.ones(epochs)
    if restriction:
        weights = schedule.restriction_weight(starts, steps_per_epoch=1, **restriction)
    falls = np.flatnonzero(np.diff([1.0, *rates])).tolist()
    # As if L_res were on before and after the run: switches off and on alternate.
    switches = np.flatnonzero(np.diff([1.0, *weights, 1.0])).tolist()
    off = list(zip(switches[::2], switches[1::2], strict=True))
    return Phases(epochs, off, falls, factor)


@figure_style.styled
def draw(
    lines: _Lines, phases: Phases, *, other: _Lines = (), other_name: str = ""
) -> Figure:
    """Draws accuracy, losses and, where boxes are known, attention by epoch.

    Phases without L_res are shaded, and dashed lines stand where the learning rate
    falls.

    Args:
      lines: of `metrics.jsonl`.
      phases: of the schedule.
      other: lines of another run, whose test accuracy is drawn as well.
      other_name: of that run.
    """
    training = _training_lines(lines)
    boxes = [x for x in _center_lines(lines, "test") if "pointing" in x]
    panels = 2 + bool(boxes)
    figure = Figure(figsize=(7.2, 0.35 + 1.55 * panels), layout="constrained")
    axes = np.atleast_1d(figure.subplots(panels, sharex=True))
    _draw_accuracy(axes[0], training, lines, other, other_name)
    _draw_losses(axes[1], training)
    if boxes:
        _draw_attention(axes[2], boxes)
    for ax in axes:
        _draw_phases(ax, phases)
        _draw_legend(ax)
    _name_phases(axes[0], phases)
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(list(axes))
    return figure


def _training_lines(lines: _Lines) -> list[dict[str, Any]]:
    """The lines of the train split, each with its `epoch` as a fraction."""
    training = [x for x in lines if x["split"] == "train"]
    # `epoch` is rounded up, except in the lines that are logged as an epoch ends.
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
    for split, look in zip(splits, _SPLIT_LOOKS, strict=False):
        _plot(ax, "top1", _center_lines(lines, split), split, scale=100, **look)
        look = {**look, "linestyle": "--", "markerfacecolor": "white"}
        label = f"{split}, {other_name}"
        _plot(ax, "top1", _center_lines(other, split), label, scale=100, **look)
    ax.set_ylabel("top-1 accuracy (%)")


def _draw_losses(ax: Axes, training: _Lines) -> None:
    for name, (label, look) in _LOSSES.items():
        _plot(ax, name, training, label, **look)
    ax.set_ylabel("loss, training")


def _draw_attention(ax: Axes, boxes: _Lines) -> None:
    for name, (label, look) in _ATTENTION.items():
        _plot(ax, name, boxes, label, scale=100, markersize=3, **look)
    ax.set_ylabel("test, where it looks (%)")
    ax.set_ylim(0, 100)


def _plot(
    ax: Axes, name: str, lines: _Lines, label: str, *, scale: float = 1, **look: Any
) -> None:
    """Draws a metric by epoch, from the lines that have it; without any, nothing."""
    known = [x for x in lines if name in x]
    if known:
        values = [scale * x[name] for x in known]
        ax.plot([x["epoch"] for x in known], values, label=label, clip_on=False, **look)


def _draw_phases(ax: Axes, phases: Phases) -> None:
    for begin, end in phases.restriction_off:
        ax.axvspan(begin, end, color="0.92", linewidth=0, zorder=0)
    for epoch in phases.rate_falls:
        ax.axvline(epoch, color="0.45", linewidth=0.7, dashes=(4, 3), zorder=1)
    ax.margins(x=0)
    ax.set_xlim(0, phases.epochs)


def _draw_legend(ax: Axes) -> None:
    # Handles are given, because without them an empty legend is a warning.
    handles, labels = ax.get_legend_handles_labels()
    legend = ax.legend(
        handles, labels, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(True)


def _name_phases(ax: Axes, phases: Phases) -> None:
    """What shading and dashes mean, above the first panel, where there is room."""
    words = dict.fromkeys(phases.rate_falls, f"rate × {phases.factor:g}")
    for begin, _ in phases.restriction_off:
        text = "no $L_{res}$"
        words[begin] = f"{words[begin]}, {text}" if begin in words else text
    free_from = 0.0
    for epoch, text in sorted(words.items()):
        if epoch < free_from:
            continue
        letters = len(re.sub(r"[${}_]", "", text))
        free_from = epoch + 0.01 * letters * phases.epochs
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
