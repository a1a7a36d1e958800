"""The numbers of a run -> its training curves."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cra_jax.reports import figure_style
from cra_jax.reports.figure_style import BLUE, GREEN, GREY, PURPLE, VERMILLION


@dataclasses.dataclass(frozen=True)
class Phases:
    """The schedule of a run, in epochs.

    Attributes:
      epochs: of the whole run.
      restriction_off: (begin, end) of each phase without L_res.
      rate_falls: where the learning rate falls, and by which factor.
      factor: of each fall.
    """

    epochs: int
    restriction_off: Sequence[tuple[float, float]]
    rate_falls: Sequence[float]
    factor: float


def phases(
    epochs: int,
    *,
    restriction: tuple[int, int] | None,
    rate: tuple[int, int],
    factor: float,
) -> Phases:
    """The phases of Sec. 4.1 in epochs, as `schedule` has them in steps.

    Args:
      epochs: of the whole run.
      restriction: of L_res, the length of the first phase, which is on, and of those
        that follow, off and on by turns (0: there are none); None without L_res.
      rate: the same of the learning rate, which falls where a phase begins.
      factor: of each fall.
    """
    switches = _starts(epochs, *restriction) if restriction else []
    ends = [*switches[1:], epochs]
    off = list(zip(switches, ends, strict=False))[::2]
    return Phases(epochs, off, _starts(epochs, *rate), factor)


def _starts(epochs: int, first_epochs: int, period_epochs: int) -> list[int]:
    """Where the second and later phases begin."""
    return list(range(first_epochs, epochs, period_epochs)) if period_epochs else []


@figure_style.styled
def draw(
    lines: Sequence[Mapping[str, Any]],
    phases: Phases,
    *,
    other: Sequence[Mapping[str, Any]] = (),
    other_name: str = "baseline",
) -> Figure:
    """How training went: accuracy, losses, and where the network looked.

    Phases without L_res are shaded, and dashed lines stand where the learning rate
    falls.

    Args:
      lines: of `metrics.jsonl`.
      phases: of the schedule.
      other: of another run's, whose accuracy is drawn beside this one's.
      other_name: of that run.
    """
    training = [x for x in lines if x["split"] == "train"]
    tests = [
        x for x in lines if x["split"] != "train" and x.get("protocol") == "center"
    ]
    splits = list(dict.fromkeys(x["split"] for x in tests))
    looks = [x for x in tests if x["split"] == "test" and "pointing" in x]
    panels = 2 + bool(looks)
    figure = Figure(figsize=(7.2, 0.35 + 1.55 * panels), layout="constrained")
    axes = np.atleast_1d(figure.subplots(panels, sharex=True))

    def line(
        ax: Axes, name: str, where, label: str, *, percent: bool = True, **look: Any
    ) -> None:
        known = [x for x in where if name in x]
        if known:
            values = [(100 if percent else 1) * x[name] for x in known]
            ax.plot(
                [_epochs(x, training) for x in known],
                values,
                label=label,
                clip_on=False,
                **look,
            )

    marks: tuple[dict[str, Any], ...] = (
        {"color": BLUE, "marker": "o"},
        {"color": VERMILLION, "marker": "s"},
    )
    line(axes[0], "top1", training, "train", color=GREY, linewidth=0.7)
    for split, look in zip(splits, marks, strict=False):
        here = [x for x in tests if x["split"] == split]
        there = [x for x in other if x["split"] == split]
        there = [x for x in there if x.get("protocol") == "center"]
        line(axes[0], "top1", here, split, markersize=3, **look)
        look = {**look, "linestyle": "--", "markerfacecolor": "white"}
        label = f"{split}, {other_name}"
        line(axes[0], "top1", there, label, markersize=3, **look)
    axes[0].set_ylabel("top-1 accuracy (%)")

    terms: dict[str, tuple[str, dict[str, Any]]] = {
        "loss_cls1": ("$L_{cls1}$", {"color": BLUE}),
        "loss_cls2": ("$L_{cls2}$", {"color": VERMILLION, "linestyle": "--"}),
        "loss_res": ("$L_{res}$", {"color": GREEN, "linestyle": "-."}),
        "loss_cntr": ("$L_{cntr}$", {"color": PURPLE, "linestyle": ":"}),
    }
    for name, (label, look) in terms.items():
        line(axes[1], name, training, label, percent=False, **look)
    axes[1].set_ylabel("loss, training")

    if looks:
        measured: dict[str, tuple[str, dict[str, Any]]] = {
            "pointing": ("peak in the box", {"color": BLUE, "marker": "o"}),
            "activation_in_box": (
                "activation in the box",
                {"color": VERMILLION, "marker": "s"},
            ),
            "attention_iou": ("attention IoU", {"color": GREEN, "marker": "^"}),
            "box_share": ("box's share of the crop", {"color": GREY, "dashes": (1, 1)}),
        }
        for name, (label, look) in measured.items():
            line(axes[2], name, looks, label, markersize=3, **look)
        axes[2].set_ylabel("test, where it looks (%)")
        axes[2].set_ylim(0, 100)

    for ax in axes:
        for begin, end in phases.restriction_off:
            ax.axvspan(begin, end, color="0.92", linewidth=0, zorder=0)
        for epoch in phases.rate_falls:
            ax.axvline(epoch, color="0.45", linewidth=0.7, dashes=(4, 3), zorder=1)
        ax.margins(x=0)
        ax.set_xlim(0, phases.epochs)
        handles, labels = ax.get_legend_handles_labels()
        legend = ax.legend(
            handles,
            labels,
            loc="center left",
            bbox_to_anchor=(1.01, 0.5),
            frameon=False,
        )
        for text in legend.get_texts():
            text.set_parse_math(True)
    _name_phases(axes[0], phases)
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(list(axes))
    return figure


def _epochs(line: Mapping[str, Any], training: Sequence[Mapping[str, Any]]) -> float:
    """When a line was logged: a test split's at the end of an epoch, others between."""
    if line["split"] != "train":
        return line["epoch"]
    # Lines are logged as each epoch ends, too: there the ratio is exact, else below.
    return line["step"] / max(x["step"] / x["epoch"] for x in training)


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
