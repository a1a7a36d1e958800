"""The lines of the study -> its page and figures; no number in it is typed by hand."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study import class_leak
from benchmarks.study.results import Found, Key, Line, collect, difference, values
from benchmarks.study.rows import BY_NAME, GROUPS, ROWS, Row, settings_of
from cra_jax import art_module
from cra_jax.datasets import synthetic
from cra_jax.inference import localization
from cra_jax.input import center_crop
from cra_jax.reports import figure_style, html_page, uncertainty
from cra_jax.runtime import files

_TEST, _SHIFTED = ("test", "top1"), ("test_shifted", "top1")
_LOOKS = {
    "pointing": "strongest activation in the box",
    "activation_in_box": "share of activation in it",
    "attention_iou": "IoU of the attention with it",
}
_NONE = "\N{EN DASH}"
_MOVED = 0.1  # of IoU: less is no move onto anything
_ENOUGH = 3  # paired seeds that an interval needs to mean something
_COLOURS = {
    "baseline": figure_style.BLACK,
    "cra": figure_style.VERMILLION,
    "stn": figure_style.BLUE,
}
_MARKERS = {"baseline": "s", "cra": "o", "stn": "D"}
_DPI = 200


def in_short(line: Line) -> str:
    """A line for the terminal: "test 93.1 %, test_shifted 83.0 %, 150 s"."""
    scores = [
        f"{split} {html_page.percent(line[split]['top1'])} %"
        for split in synthetic.SPLITS
        if "top1" in line.get(split, {}) and split != "train"
    ]
    return ", ".join((*scores, html_page.duration(line["seconds"])))


def write(lines: Iterable[Line], docs: Path) -> None:
    """Writes `study.md` and a figure for each group that has runs."""
    (docs / "study").mkdir(parents=True, exist_ok=True)
    lines = list(lines)
    found, _ = collect(lines)
    for group in GROUPS:
        if rows := _with_runs(group, found):
            figure, path = draw(rows, found), docs / _figure_of(group)
            figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    files.write_atomically(docs / "study.md", text_of(lines))


def text_of(lines: Iterable[Line]) -> str:
    """`study.md`, which is made of the lines and of nothing else."""
    return "\n".join(_page(*collect(lines)))


def _figure_of(group: str) -> str:
    return f"study/{group}.png"


def _with_runs(group: str, found: Found) -> list[Row]:
    """The rows of a group that have runs."""
    return [row for row in ROWS if row.group == group and found[row.name]]


def _page(found: Found, others: Sequence[Line]) -> Iterable[str]:
    yield from ("# Does contrastive reinforcement help?", "")
    yield from answer(found)
    yield from ("", *_method(found, others))
    for group, heading in GROUPS.items():
        rows = [row for row in ROWS if row.group == group]
        yield from ("", f"## {heading}", "", *_INTRODUCTIONS.get(group, ()))
        missing = sum(max(row.seeds - len(found[row.name]), 0) for row in rows)
        total = sum(row.seeds for row in rows)
        if missing:
            how = f" (`--{group} DIR`)" if group in ("cub", "cars") else ""
            yield from (f"{missing} of {total} runs are missing{how}.", "")
        if rows := _with_runs(group, found):
            if group == "instrument":
                yield from (_instrument_table(rows, found), "")
            else:
                yield from (_accuracy_table(rows, found), "")
                yield from _difference_table(rows, found)
                yield from _looks_table(rows, found)
                yield from _leak_table(rows, found)
            yield f"![A dot for each run of a row]({_figure_of(group)})"
    yield ""


_INTRODUCTIONS = {
    "instrument": (
        "The drawn birds must tell methods apart: a baseline that is well trained "
        "(accuracy: 85 to 95 % on `test`, neither lost nor saturated), that the "
        "shifted habitat costs something (shift: 5 to 15 points), and whose seeds lie "
        "close together (spread: a standard deviation of at most 2 points on "
        "`test_shifted`), at a price at which many runs can be paid. The table says "
        "what each candidate meets. With thousands of drawings for a few epochs, "
        "training ends while the bird is still being learnt, and where the habitat is "
        "at home in 60 % or more, seeds differ by when they learn it. The study takes "
        "few drawings for many epochs, as fine-grained sets are trained (64 of a "
        "species; CUB has 30), so that they are learnt by heart. It is a compromise: a "
        "candidate that meets more was left out where half as many epochs again take "
        "the cost of the shift away, and the last two lines say what the study's own "
        "meets and what more epochs do to it.",
        "",
    ),
}


def answer(found: Found) -> Iterable[str]:
    """The first lines of the page: the claim, and what the runs say to it."""
    yield (
        "The paper claims that contrastive reinforcement makes a plain ResNet attend "
        "to the object, and so generalise. On drawn birds, whose habitat tends to go "
        "with the species in training and never does in `test_shifted`:"
    )
    yield ""
    for question, key, reference, unit in (
        (
            "Does it generalise better than a baseline given the same compute?",
            *(_SHIFTED, "baseline-long", "points on `test_shifted`"),
        ),
        (
            "Than a baseline of as many epochs?",
            *(_SHIFTED, "baseline", "points on `test_shifted`"),
        ),
        (
            "Is it more accurate without a shift, at the same compute?",
            *(_TEST, "baseline-long", "points on `test`"),
        ),
        (
            "Does the plain ResNet look at the bird more often, at the same compute?",
            ("test_shifted", "pointing"),
            "baseline-long",
            "points of the images whose strongest activation lies in the box",
        ),
    ):
        yield f"- **{question}** {_verdict(found, reference, key, unit)}"
    ious = list(values(found["cra"], ("test", "attention_iou")).values())
    if ious:
        start = start_iou(settings_of(BY_NAME["cra"], seed=0))
        spread = uncertainty.spread([iou - start for iou in ious])
        yield (
            "- **Does the attention move onto the bird?** "
            f"{_sure(spread, 'of IoU with its box', scale=1, least=_MOVED)} It begins "
            f"at {start:.2f} and ends at {start + spread.mean:.2f}."
        )
    yield from _photographs(found)


def _photographs(found: Found) -> Iterable[str]:
    """CRA-CNN on each set of photographs, from each start, beside its baselines."""
    body = []
    for row in ROWS:
        if row.group not in ("cub", "cars") or not row.name.endswith("-cra"):
            continue
        less = [difference(found, row.name, name, _TEST) for name in row.references]
        if any(less):
            body.append(
                [
                    GROUPS[row.group].partition(": ")[2],
                    row.title.partition("(")[2].rstrip(")"),
                    str(min(one.spread.count for one in less if one)),
                    _mean(values(found[row.name], _TEST)),
                    *(_interval(one.spread) if one else _NONE for one in less),
                ]
            )
    if body:
        yield from ("", "On photographs, top-1 on `test`:", "")
        head = ["photographs", "start", "seeds", "CRA-CNN"]
        head += ["less the baseline", "less the baseline given the same compute"]
        yield html_page.markdown_table(head, body)


def _verdict(found: Found, reference: str, key: Key, unit: str) -> str:
    """CRA-CNN against a reference, in words."""
    one = difference(found, "cra", reference, key)
    if one is None:
        return "No runs yet."
    ours, theirs = (values(found[name], key) for name in ("cra", reference))
    common = ours.keys() & theirs.keys()
    ours, theirs = (_mean({seed: x[seed] for seed in common}) for x in (ours, theirs))
    return (
        f"{_sure(one.spread, unit)} CRA-CNN has {ours}, the baseline {theirs}; exact "
        f"paired test over {one.spread.count} seeds: p = {html_page.p_value(one.p)}."
    )


def _sure(
    spread: uncertainty.Spread, unit: str, *, scale: float = 100, least: float = 0
) -> str:
    """What an interval says of a difference, in words that go no further.

    Args:
      spread: of the difference.
      unit: what it is of.
      scale: what it is printed in, 100 for percent.
      least: what counts as a difference; all between its negative and it is next to
        nothing, however sure.
    """
    digits = 1 if scale == 100 else 2
    number = _signed(spread.mean * scale, digits)
    if spread.count < _ENOUGH or not spread.interval:
        return f"{number} {unit}; {spread.count} runs are too few to tell."
    low, high = (_signed(x * scale, digits) for x in spread.interval)
    if -least < spread.interval.low and spread.interval.high < least:
        word = "Next to nothing"
    elif spread.interval.low > 0:
        word = "Yes"
    elif spread.interval.high < 0:
        word = "No, the opposite"
    else:
        word = "Not seen"
    return f"{word}: {number} {unit} (95 % interval {low} to {high})."


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", html_page.MINUS)


@functools.cache
def _boxes(count: int, seed: int) -> list[tuple[float, float, float, float]]:
    return [synthetic.draw("test", i, seed=seed, size_px=32).box for i in range(count)]


def start_iou(settings: Mapping[str, Any]) -> float:
    """Mean IoU with the birds' boxes, on `test`, of the attention before training.

    Args:
      settings: a config of drawn birds, flat.
    """
    x, y, scale, angle_rad = settings["art.init"]
    c, s = scale * math.cos(angle_rad), scale * math.sin(angle_rad)
    crop_px, side_px = settings["data.crop_px"], settings["data.short_side_px"]
    corners = art_module.corners_px(np.array([[c, -s, x], [s, c, y]]), crop_px)
    boxes = _boxes(settings["data.test_size"], settings["data.seed"])
    cut = [
        center_crop.box_in_crop_px(box, (side_px, side_px), crop_px) for box in boxes
    ]
    return float(np.mean([localization.iou(corners, box) for box in cut]))


def _method(found: Found, others: Sequence[Line]) -> Iterable[str]:
    lines = [line for by_seed in found.values() for line in by_seed.values()]
    wanted = sum(row.seeds for row in ROWS)
    missing = sum(max(row.seeds - len(found[row.name]), 0) for row in ROWS)
    yield (
        "*`make study` made this page out of `docs/study/results.jsonl`: "
        f"{len(lines)} runs, {missing} of the {wanted} that are planned are missing. "
        "The same command runs what is missing.*"
    )
    yield ""
    commits = sorted({line["commit"] for line in lines})
    machines = sorted({line["machine"] for line in lines})
    if lines:
        hours = html_page.duration(sum(line["seconds"] for line in lines))
        yield f"Training took {hours} in all, on: {', '.join(machines)}."
        yield f"Code: {', '.join(commits)}."
    if others:
        names = ", ".join(sorted({line["row"] for line in others}))
        yield (
            f"{len(others)} lines are of other settings than these rows have now, and "
            f"are not counted: {names}."
        )
    yield ""
    yield (
        "Each number is a mean over seeds ± the standard deviation, in percent but for "
        "the IoU. A difference is taken seed by seed, with Student's 95 % interval of "
        "its mean; p is of the exact test that flips signs, which cannot fall below "
        f"{2 / 2**5:.3f} with 5 seeds and {2 / 2**3:.2f} with 3, and is not adjusted "
        "for the number of rows. The last column counts images over all seeds that "
        "only one of the two gets right, with McNemar's exact p: it says whether these "
        "networks differ, not whether the methods do, since networks of one method "
        "differ, too."
    )


def _mean(found: Mapping[int, float], *, scale: float = 100) -> str:
    """Mean ± standard deviation: "93.4 ± 1.3"."""
    if not found:
        return _NONE
    spread = uncertainty.spread(list(found.values()))
    digits = 1 if scale == 100 else 2
    text = f"{spread.mean * scale:.{digits}f}"
    return f"{text} ± {spread.sd * scale:.{digits}f}" if spread.sd is not None else text


def _lost(by_seed: Mapping[int, Line]) -> dict[int, float]:
    """What the shift costs, by seed."""
    before, after = values(by_seed, _TEST), values(by_seed, _SHIFTED)
    return {seed: before[seed] - after[seed] for seed in before if seed in after}


def _minutes(by_seed: Mapping[int, Line]) -> str:
    seconds = [line["seconds"] for line in by_seed.values()]
    return f"{np.median(seconds) / 60:.1f}"


def _instrument_table(rows: Sequence[Row], found: Found) -> str:
    head = ("instrument", "runs", "test", "test_shifted", "lost", "sd of test_shifted")
    head += ("meets", "minutes a run")
    body = []
    for row in (*rows, BY_NAME["baseline"], BY_NAME["baseline-long"]):
        by_seed = found[row.name]
        if not by_seed:
            continue
        test, shifted, lost = (
            values(by_seed, _TEST),
            values(by_seed, _SHIFTED),
            _lost(by_seed),
        )
        sd = uncertainty.spread(list(shifted.values())).sd
        met = [
            name
            for name, is_met in (
                ("accuracy", 0.85 <= np.mean(list(test.values())) <= 0.95),
                ("shift", 0.05 <= np.mean(list(lost.values())) <= 0.15),
                ("spread", sd is not None and sd <= 0.02),
            )
            if is_met
        ]
        title = row.title if row.group == "instrument" else f"the study's {row.title}"
        body.append(
            (
                *(title, str(len(by_seed)), _mean(test), _mean(shifted), _mean(lost)),
                *(
                    html_page.percent(sd),
                    ", ".join(met) or "nothing",
                    _minutes(by_seed),
                ),
            )
        )
    return html_page.markdown_table(head, body)


def _accuracy_table(rows: Sequence[Row], found: Found) -> str:
    shifted = any(values(found[row.name], _SHIFTED) for row in rows)
    head = ["row", "runs", "top-1, test"]
    head += ["top-1, test_shifted", "lost to the shift"] if shifted else []
    body = []
    for row in rows:
        by_seed = found[row.name]
        cells = [row.title, str(len(by_seed)), _mean(values(by_seed, _TEST))]
        if shifted:
            cells += [_mean(values(by_seed, _SHIFTED)), _mean(_lost(by_seed))]
        body.append([*cells, _minutes(by_seed), row.question])
    return html_page.markdown_table([*head, "minutes a run", "it asks"], body)


def _looks_table(rows: Sequence[Row], found: Found) -> Iterable[str]:
    """Where the network looks, of sets with boxes; and what N_ar makes of noise."""
    columns: dict[str, dict[str, str]] = {}
    for metric, words in _LOOKS.items():
        for split in ("test", "test_shifted"):
            scale = 1 if metric == "attention_iou" else 100
            cells = {row.name: values(found[row.name], (split, metric)) for row in rows}
            if any(cells.values()):
                columns[f"{words}, {split}"] = {
                    name: _mean(x, scale=scale) for name, x in cells.items()
                }
    if columns:
        body = [
            [row.title, *(column[row.name] for column in columns.values())]
            for row in rows
        ]
        yield from (html_page.markdown_table(["row", *columns], body), "")


def _leak_table(rows: Sequence[Row], found: Found) -> Iterable[str]:
    """What N_ar makes of an attention without its pixels, of runs that have one."""
    asked = [
        key
        for key in class_leak.COLUMNS
        if any(f"leak_{key}" in x for row in rows for x in found[row.name].values())
    ]
    body = []
    for row in rows:
        by_seed = found[row.name]
        cells = [
            _mean({s: x[name] for s, x in by_seed.items() if name in x})
            for name in (f"leak_{key}" for key in asked)
        ]
        if any(cell != _NONE for cell in cells):
            body.append([row.title, *cells])
    if body:
        yield from (
            "Without the bird (`benchmarks/study/class_leak.py`), on `test`:",
            "",
        )
        yield from (html_page.markdown_table(["row", *asked], body), "")
        yield "; ".join(f"{key}: {class_leak.COLUMNS[key]}" for key in asked) + "."
        yield ""


def _difference_table(rows: Sequence[Row], found: Found) -> Iterable[str]:
    body = []
    shifted = any(values(found[row.name], _SHIFTED) for row in rows)
    keys = (_TEST, _SHIFTED) if shifted else (_TEST,)
    pairs = [(row, reference) for row in rows for reference in row.references]
    for row, reference in pairs:
        differences = [difference(found, row.name, reference, key) for key in keys]
        if not all(differences):
            continue
        cells = [row.title, BY_NAME[reference].title]
        last = None
        for one in differences:
            assert one is not None
            few = one.spread.count < _ENOUGH
            cells += [_interval(one.spread), _NONE if few else html_page.p_value(one.p)]
            last = one
        assert last is not None
        cells.insert(2, str(last.spread.count))
        body.append([*cells, _images(last.images)])
    if body:
        head = ["row", "less", "seeds", "top-1, test", "p"]
        head += ["top-1, test_shifted", "p"] if shifted else []
        where = "test_shifted" if shifted else "test"
        head += [f"images of {where} that one gets right (McNemar's p)"]
        yield from (html_page.markdown_table(head, body), "")


def _interval(spread: uncertainty.Spread) -> str:
    text = _signed(100 * spread.mean, 1)
    if spread.count < _ENOUGH or not spread.interval:
        return text
    low, high = (_signed(100 * x, 1) for x in spread.interval)
    return f"{text} ({low} to {high})"


def _images(images: uncertainty.Paired | None) -> str:
    if images is None:
        return "other images"
    return f"{images.only_second} : {images.only_first} ({html_page.p_value(images.p)})"


@figure_style.styled
def draw(rows: Sequence[Row], found: Found) -> Figure:
    """A dot for each run, rows below each other; the bar is the mean.

    Panels are the metrics that any row has: accuracy, then where the network looks.
    """
    panels = [
        (key, words)
        for key, words in (
            (_TEST, "top-1, %,\ntest"),
            (_SHIFTED, "top-1, %,\ntest_shifted"),
            (("test", "pointing"), "strongest activation\nin the box, %, test"),
            (("test", "attention_iou"), "IoU of the attention\nwith the box, %, test"),
        )
        if any(values(found[row.name], key) for row in rows)
    ]
    row_in, top_in, bottom_in = 0.21, 0.1, 0.5
    panel_in = max(1.35, 3.6 / len(panels))  # a panel alone has room
    name_in = 0.2 + 0.056 * max(len(row.title) for row in rows)
    height = top_in + bottom_in + row_in * len(rows)
    width = name_in + (panel_in + 0.12) * len(panels)
    figure = Figure(figsize=(width, height))
    for place, (key, words) in enumerate(panels):
        left = (name_in + place * (panel_in + 0.12)) / width
        span = (panel_in / width, row_in * len(rows) / height)
        ax = figure.add_axes((left, bottom_in / height, *span))
        for down, row in enumerate(rows):
            xs = [100 * x for x in values(found[row.name], key).values()]
            if not xs:
                continue
            colour = _COLOURS[row.kind]
            ax.plot([np.mean(xs)] * 2, [down - 0.36, down + 0.36], color=colour)
            ax.plot(
                *(xs, [down] * len(xs)),
                linestyle="none",
                marker=_MARKERS[row.kind],
                markersize=4,
                alpha=0.55,
                color=colour,
                markeredgewidth=0,
            )
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks(range(len(rows)))
        ax.set_yticklabels([row.title for row in rows] if not place else [])
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", linewidth=0.4, color="0.85")
        ax.set_axisbelow(True)
        ax.spines["left"].set_visible(False)
        ax.margins(x=0.1)
        ax.set_xlabel(words)
    return figure
