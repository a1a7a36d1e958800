"""Page and figures of the study, computed from `results.jsonl` alone.

The page states what was compared, on what, the result and its interval, and then lists
all tables. The words "higher", "lower" and "no difference shown" follow from intervals.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks.study import cars_subset, class_leak
from benchmarks.study.results import (
    Difference,
    Found,
    Key,
    Line,
    collect,
    difference,
    values,
)
from benchmarks.study.rows import (
    BUDGETS,
    BY_NAME,
    GROUPS,
    ROWS,
    Row,
    budget_row,
    settings_of,
)
from cra_jax import art_module
from cra_jax.datasets import synthetic
from cra_jax.inference import localization
from cra_jax.input import center_crop
from cra_jax.reports import figure_style, html_page, uncertainty
from cra_jax.runtime import files

_TEST, _SHIFTED = ("test", "top1"), ("test_shifted", "top1")
_LOCALIZATION = {
    "pointing": "pointing accuracy",
    "activation_in_box": "CAM inside the box",
    "attention_iou": "attention IoU",
    "head_in_attention": "head in the attention",
}
_NONE = "\N{EN DASH}"
_MOVED = 0.1  # a smaller change of the attention IoU counts as no movement
_MIN_SEEDS = 3  # for an interval and a p-value
_HIGHER, _LOWER = "higher", "lower"
_NO_DIFFERENCE, _TOO_FEW = "no difference shown", "too few seeds"
_COLOURS = {
    "baseline": figure_style.BLACK,
    "cra": figure_style.VERMILLION,
    "stn": figure_style.BLUE,
}
_MARKERS = {"baseline": "s", "cra": "o", "stn": "D"}
_DPI = 200


def summarize(line: Line) -> str:
    """Scores of a run in one line: "test 93.1 %, test_shifted 83.0 %, 150 s"."""
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
    if any(found[row.name] for row in ROWS if row.group == "budget"):
        path = docs / _figure_of("curves")
        draw_budgets(found).savefig(path, dpi=_DPI, metadata={"Software": None})
    for group in GROUPS:
        if rows := _with_runs(group, found):
            figure, path = draw(rows, found), docs / _figure_of(group)
            figure.savefig(path, dpi=_DPI, metadata={"Software": None})
    files.write_atomically(docs / "study.md", text_of(lines))


def text_of(lines: Iterable[Line]) -> str:
    """Text of `study.md`."""
    return "\n".join(_page(*collect(lines)))


def _figure_of(group: str) -> str:
    return f"study/{group}.png"


def _image_link(group: str) -> str:
    return f"![A marker per run, a bar at each mean]({_figure_of(group)})"


def _with_runs(group: str, found: Found) -> list[Row]:
    """Rows of a group that have runs."""
    return [row for row in ROWS if row.group == group and found[row.name]]


def _page(found: Found, others: Sequence[Line]) -> Iterable[str]:
    yield from ("# Does contrastive reinforcement help?", "")
    yield from answer(found)
    yield from ("", *_gain(found))
    yield from ("", *_method(found))
    yield from ("", *_drawn_birds(found))
    yield from ("", *_photographs(found))
    yield from ("", *_runs(found, others))
    yield from ("", *_appendix(found))
    yield ""


class _Comparison(NamedTuple):
    """CRA-CNN compared with one other row in one score.

    Attributes:
      what: what is compared, for the summary.
      key: split and metric.
      ours: name of the row of CRA-CNN.
      reference: name of the other row.
    """

    what: str
    key: Key
    ours: str
    reference: str


_SPLITS = {"test": _TEST, "test_shifted": _SHIFTED}


def _top1_comparisons(reference: str) -> list[_Comparison]:
    """Top-1 of CRA-CNN on all datasets against one kind of baseline.

    Args:
      reference: "baseline" or "baseline-long".
    """
    drawn = [
        _Comparison(f"drawn birds, `{split}`", key, "cra", reference)
        for split, key in _SPLITS.items()
    ]
    photographs = [
        _Comparison(
            f"{_dataset(row)}, {_start(row)}",
            _TEST,
            row.name,
            f"{row.name.removesuffix('cra')}{reference}",
        )
        for row in _photograph_rows()
    ]
    return drawn + photographs


def _photograph_rows() -> list[Row]:
    """Rows of CRA-CNN on photographs with the settings of the main comparison."""
    return [
        row
        for row in ROWS
        if row.group in ("cub", "cars") and row.name.endswith("-cra")
    ]


def _dataset(row: Row) -> str:
    """Name of the dataset of a row on photographs."""
    return GROUPS[row.group].partition(": ")[2]


def _start(row: Row) -> str:
    """Initial weights of a row on photographs, such as "from scratch"."""
    return row.title.partition("(")[2].rstrip(")")


def _difference(found: Found, comparison: _Comparison) -> Difference | None:
    return difference(found, comparison.ours, comparison.reference, comparison.key)


def _judge(spread: uncertainty.Spread) -> str:
    """What the 95 % interval of a difference shows."""
    if spread.count < _MIN_SEEDS or not spread.interval:
        return _TOO_FEW
    if spread.interval.low > 0:
        return _HIGHER
    return _LOWER if spread.interval.high < 0 else _NO_DIFFERENCE


def answer(found: Found) -> Iterable[str]:
    """The first section of the page: the claim, and what the runs show."""
    yield (
        "The paper claims that contrastive reinforcement makes a plain ResNet attend "
        "to the object, and that the ResNet generalizes better. This study tests the "
        "claim with small networks on small images. It does not test the setting of "
        "the paper (ResNet-50, 448 px, 140 epochs)."
    )
    yield ""
    yield from _gain_sentences(found)
    words = [
        _judge(one.spread)
        for comparison in _top1_comparisons("baseline-long")
        if (one := _difference(found, comparison))
    ]
    if words and set(words) != {_TOO_FEW}:
        yield (
            "- **The paper's method.** CRA-CNN is more accurate than the baseline with "
            f"the same compute in {words.count(_HIGHER)} of {len(words)} "
            f"comparisons, and less "
            f"accurate in {words.count(_LOWER)}."
        )
    for reference, other in (
        ("baseline", "the baseline with the same number of epochs"),
        ("baseline-long", "the baseline with the same compute"),
    ):
        yield f"- **Top-1, compared with {other}:** {_count(found, reference)}"
    pointing = [
        difference(found, "cra", reference, ("test_shifted", "pointing"))
        for reference in ("baseline", "baseline-long")
    ]
    words = [_judge(one.spread) if one else "no runs" for one in pointing]
    yield (
        "- **Pointing accuracy on drawn birds (`test_shifted`):** compared with the "
        f"baseline, {words[0]}; compared with the baseline with the same compute, "
        f"{words[1]}."
    )
    ious = list(values(found["cra"], ("test", "attention_iou")).values())
    if ious:
        start = start_iou(settings_of(BY_NAME["cra"], seed=0))
        spread = uncertainty.spread([iou - start for iou in ious])
        yield (
            f"- **Attention on drawn birds:** {_movement(spread)} Its mean IoU with "
            f"the bird's box on `test` is {start:.2f} before training and "
            f"{start + spread.mean:.2f} after it."
        )
    yield ""
    yield (
        '"Higher" and "lower" mean that the 95 % interval of the mean difference '
        'excludes 0; "no difference shown" means that it includes 0. If the methods '
        "did not differ, about 1 in 20 intervals would exclude 0 by chance."
    )


def _count(found: Found, reference: str) -> str:
    """How often top-1 of CRA-CNN is higher and lower, and where."""
    named: dict[str, list[str]] = {_HIGHER: [], _LOWER: []}
    count = few = 0
    for comparison in _top1_comparisons(reference):
        one = _difference(found, comparison)
        if one is None:
            continue
        count += 1
        word = _judge(one.spread)
        few += word == _TOO_FEW
        if word in named:
            points = _signed(100 * one.spread.mean, 1)
            named[word].append(f"{comparison.what}: {points}")
    if not count:
        return "no runs."
    parts = [
        f"CRA-CNN is {word} in {len(where)}" + f" ({'; '.join(where)})" * bool(where)
        for word, where in named.items()
    ]
    rest = count - few - sum(map(len, named.values()))
    text = f"{parts[0]} and {parts[1].removeprefix('CRA-CNN is ')} of {count} "
    text += f"comparisons; {rest} show no difference"
    return text + (f"; {few} have too few seeds." if few else ".")


def _movement(change: uncertainty.Spread) -> str:
    """What the change of the attention IoU shows."""
    word = _judge(change)
    if word == _TOO_FEW:
        return "There are too few seeds to judge whether the attention moves."
    assert change.interval
    if change.interval.low > -_MOVED and change.interval.high < _MOVED:
        return "The attention does not move onto the bird."
    if word == _NO_DIFFERENCE:
        return "No movement is shown."
    if word == _HIGHER:
        return "The attention moves onto the bird."
    return "The attention moves away from the bird."


_GAINS = (("gain-best", "gain-baseline"), ("gain-plus", "gain-baseline-plus"))
"""What the extensions are compared with: the same training without them."""


def _gain_sentences(found: Found) -> Iterable[str]:
    """What the extensions change, on both splits."""
    for ours, reference in _GAINS:
        parts = []
        for split, key in _SPLITS.items():
            one = difference(found, ours, reference, key)
            if one is None:
                continue
            scores = [values(found[name], key) for name in (ours, reference)]
            common = set.intersection(*(set(x) for x in scores))
            mean = [_mean({seed: x[seed] for seed in common}) for x in scores]
            parts.append(
                f"{mean[0]} % on `{split}`, against {mean[1]} % ({_judge(one.spread)}, "
                f"{one.spread.count} seeds)"
            )
        if parts:
            yield (
                f"- **{BY_NAME[ours].title[0].upper()}{BY_NAME[ours].title[1:]}, "
                f"compared with {BY_NAME[reference].title}, the same compute:** "
                f"{'; '.join(parts)}."
            )


def _gain(found: Found) -> Iterable[str]:
    """The extensions and their rivals, all with the same compute."""
    rows = _with_runs("gain", found)
    if not rows:
        return
    settings = settings_of(BY_NAME["gain-baseline"], seed=0)
    yield from ("## With few images and the same compute", "")
    yield (
        f"{settings['data.train_size'] // len(synthetic.class_names())} drawn birds of "
        f"each species; every row takes {settings['train.epochs']} passes over them "
        "(forward and backward; an image of half the width counts as a quarter, a "
        "forward pass alone as a third). The rate falls after 0.7 and 0.9 of the "
        "epochs. On `test_shifted` the habitat never matches the species. The "
        "differences are those from the baseline, and for `plus` those from the "
        "baseline with smoothing and averages."
    )
    yield ""
    body = []
    for row in rows:
        by_seed = found[row.name]
        cells = [row.title, str(len(by_seed)), _minutes(by_seed)]
        for key in (_TEST, _SHIFTED):
            one = None
            if row.references:
                one = difference(found, row.name, row.references[0], key)
            cells += [_mean(values(by_seed, key)), _interval(one.spread) if one else ""]
        iou = _mean(values(by_seed, ("test", "attention_iou")), scale=1)
        head = _mean(values(by_seed, ("test", "head_in_attention")))
        body.append([*cells, iou, head])
    head = ["row", "runs", "minutes", "`test`", "difference", "`test_shifted`"]
    head += ["difference", "IoU", "head in the attention"]
    yield html_page.markdown_table(head, body)
    yield from ("", _image_link("gain"))
    if _with_runs("budget", found):
        yield ""
        yield f"![Accuracy over compute and over images]({_figure_of('curves')})"


def _method(found: Found) -> Iterable[str]:
    drawn = settings_of(BY_NAME["cra"], seed=0)
    long = settings_of(BY_NAME["baseline-long"], seed=0)["train.epochs"]
    ratio = long / drawn["train.epochs"]
    yield from ("## Method", "")
    yield (
        "- **Networks.** `CRA-CNN` has the defaults of this repository. `baseline` is "
        "the same recipe without N_ar and the ART module. `baseline, same compute` "
        f"trains the baseline for {ratio:g} times the epochs, which takes the FLOPs of "
        "CRA-CNN. `STN` predicts the six parameters of Eq. 2 and has no L_cntr."
    )
    yield (
        f"- **Drawn birds.** {drawn['data.train_size']:,} training images and "
        f"{drawn['data.test_size']:,} images in each test split, "
        f"{len(synthetic.class_names())} species, {drawn['data.crop_px']} px. In "
        "training and on `test`, the habitat matches the species in "
        f"{100 * drawn['data.habitat_share']:.0f} % of the images; on `test_shifted` "
        f"it never does. ResNet-10 of width {drawn['model.width']}, from scratch, "
        f"{drawn['train.epochs']} epochs."
    )
    tuned, longer, scratch = (
        settings_of(BY_NAME[f"cub-{name}-cra"], seed=0)
        for name in ("tuned", "tuned-40", "scratch")
    )
    counts = " and ".join(f"{count}" for count in _test_images(found) if count)
    sizes = f" ({counts} test images)" if counts else ""
    yield (
        f"- **Photographs.** Ten species of CUB and {cars_subset.MODELS} models of "
        f"Stanford Cars{sizes}, {tuned['data.crop_px']} px. "
        "`fine-tuned`: EfficientNet-Lite0 from ImageNet weights, "
        f"{tuned['train.epochs']} epochs, or {longer['train.epochs']} where stated. "
        f"`from scratch`: ResNet-10 of width {scratch['model.width']}, "
        f"{scratch['train.epochs']} epochs."
    )
    yield (
        "- **Numbers.** Mean ± standard deviation over seeds, in percent except the "
        "IoU. The last checkpoint is evaluated on centre crops. Pointing accuracy is "
        "the share of images whose class activation map (CAM) has its maximum inside "
        "the bird's box."
    )
    yield (
        "- **Differences.** Taken seed by seed, with Student's 95 % interval of the "
        "mean. p is that of the exact two-sided sign-flip test; it cannot be below "
        f"{2 / 2**5:.3f} with 5 seeds and {2 / 2**3:.2f} with 3. Neither is adjusted "
        "for the number of comparisons."
    )


def _test_images(found: Found) -> list[int]:
    """Test images of each dataset of photographs; 0 if it has no runs."""
    counts = []
    for group in ("cub", "cars"):
        lines = [
            line
            for row in _with_runs(group, found)
            for line in found[row.name].values()
        ]
        counts.append(lines[0]["test"]["count"] if lines else 0)
    return counts


def _drawn_birds(found: Found) -> Iterable[str]:
    yield from ("## Drawn birds", "")
    body = []
    for metric, key in (
        ("top-1, `test_shifted`", _SHIFTED),
        ("top-1, `test`", _TEST),
        ("pointing accuracy, `test_shifted`", ("test_shifted", "pointing")),
    ):
        for reference in ("baseline", "baseline-long"):
            one = difference(found, "cra", reference, key)
            if one is None:
                continue
            ours, theirs = (values(found[name], key) for name in ("cra", reference))
            common = ours.keys() & theirs.keys()
            ours, theirs = (
                _mean({seed: scores[seed] for seed in common})
                for scores in (ours, theirs)
            )
            few = one.spread.count < _MIN_SEEDS
            body.append(
                [
                    *(metric, BY_NAME[reference].title, str(one.spread.count)),
                    *(ours, theirs, _interval(one.spread)),
                    *(_NONE if few else html_page.p_value(one.p), _judge(one.spread)),
                ]
            )
    if not body:
        yield "No runs."
        return
    head = ["metric", "compared with", "seeds", "CRA-CNN", "the other"]
    head += ["difference (95 % interval)", "p", "result"]
    yield html_page.markdown_table(head, body)
    yield from ("", _image_link("main"), "")
    yield "Other settings, compared in top-1 on `test_shifted` (all tables are below):"
    yield ""
    for group in ("ablations", "robust", "modern"):
        yield from _changes(found, group)
    yield from _leak_sentence(found)


def _changes(found: Found, group: str) -> Iterable[str]:
    """Which rows of a group differ from the row whose settings they change."""
    named: dict[str, list[str]] = {_HIGHER: [], _LOWER: []}
    count = 0
    for row in _with_runs(group, found):
        reference = [x for x in row.references if BY_NAME[x].group == "main"][-1]
        one = difference(found, row.name, reference, _SHIFTED)
        if one is None:
            continue
        count += 1
        if (word := _judge(one.spread)) in named:
            points = _signed(100 * one.spread.mean, 1)
            named[word].append(f"{row.title} ({points})")
    if count:
        heading = GROUPS[group].partition(": ")[2]
        yield (
            f"- **{heading[0].upper()}{heading[1:]}.** {count} rows, each compared "
            "with the main row that it changes. "
            f"Higher: {'; '.join(named[_HIGHER]) or 'none'}. "
            f"Lower: {'; '.join(named[_LOWER]) or 'none'}."
        )


def _leak_sentence(found: Found) -> Iterable[str]:
    """Accuracy of N_ar without the pixels of the image, for CRA-CNN and the STN."""
    parts = []
    for name in ("cra", "stn"):
        noise, image = (_leak(found[name], key) for key in ("noise", "image"))
        if noise and image:
            parts.append(
                f"{BY_NAME[name].title} {_mean(noise)} % (on its attention "
                f"{_mean(image)} %)"
            )
    chance = _leak(found["cra"], "chance")
    if parts and chance:
        yield (
            "- **Class information in Gamma.** Accuracy of N_ar if the pixels are "
            f"replaced by noise and Gamma is kept: {', '.join(parts)}; chance is "
            f"{_mean(chance).partition(' ')[0]} %."
        )


def _leak(by_seed: Mapping[int, Line], name: str) -> dict[int, float]:
    """A column of `class_leak.COLUMNS` by seed, of the runs that have it."""
    key = f"leak_{name}"
    return {seed: line[key] for seed, line in by_seed.items() if key in line}


def _photographs(found: Found) -> Iterable[str]:
    """CRA-CNN and the differences from both baselines on each dataset and start."""
    yield from ("## Photographs", "")
    body = []
    for row in _photograph_rows():
        differences = [difference(found, row.name, x, _TEST) for x in row.references]
        if any(differences):
            body.append(
                [
                    *(_dataset(row), _start(row)),
                    str(min(one.spread.count for one in differences if one)),
                    _mean(values(found[row.name], _TEST)),
                    *(_interval(x.spread) if x else _NONE for x in differences),
                ]
            )
    if not body:
        yield "No runs."
        return
    head = ["dataset", "start", "seeds", "CRA-CNN"]
    head += [f"difference from `{BY_NAME[x].title}`" for x in ("baseline",)]
    head += [f"difference from `{BY_NAME['baseline-long'].title}`"]
    yield "Top-1 on `test`, and the difference (95 % interval) from both baselines:"
    yield from ("", html_page.markdown_table(head, body))


def _runs(found: Found, others: Sequence[Line]) -> Iterable[str]:
    lines = [line for by_seed in found.values() for line in by_seed.values()]
    planned = sum(row.seeds for row in ROWS)
    missing = sum(max(row.seeds - len(found[row.name]), 0) for row in ROWS)
    yield from ("## Runs", "")
    yield (
        f"{len(lines)} runs; {missing} of {planned} planned runs are missing. "
        "`make study` runs the missing ones and writes this page from "
        "`docs/study/results.jsonl`."
    )
    if lines:
        hours = html_page.duration(sum(line["seconds"] for line in lines))
        machines = sorted({line["machine"] for line in lines})
        yield f"Training took {hours} in total, on: {', '.join(machines)}."
    if others:
        names = ", ".join(sorted({line["row"] for line in others}))
        yield (
            f"{len(others)} results have other settings than their rows have now, and "
            f"are not counted: {names}."
        )


def _appendix(found: Found) -> Iterable[str]:
    yield from ("## Appendix: all tables", "")
    yield from _COLUMNS
    for group, heading in GROUPS.items():
        rows = [row for row in ROWS if row.group == group]
        yield from ("", f"### {heading}", "")
        if group == "instrument":
            yield from (*_task_introduction(found), "")
        else:
            yield from (_INTRODUCTIONS[group], "")
        missing = sum(max(row.seeds - len(found[row.name]), 0) for row in rows)
        total = sum(row.seeds for row in rows)
        if missing:
            how = f" (`--{group} DIR`)" if group in ("cub", "cars") else ""
            yield from (f"{missing} of {total} runs are missing{how}.", "")
        if rows := _with_runs(group, found):
            if group == "instrument":
                yield from (_task_table(rows, found), "")
            else:
                yield from (_accuracy_table(rows, found), "")
                yield from _difference_table(rows, found)
                yield from _localization_table(rows, found)
                yield from _leak_table(rows, found)
            yield _image_link(group)
    commits = sorted({line["commit"] for x in found.values() for line in x.values()})
    if commits:
        yield from ("", "### Commits", "", f"{', '.join(commits)}.")


_COLUMNS = (
    "- **drop**: top-1 on `test` minus top-1 on `test_shifted`.",
    "- **minutes per run**: median training time.",
    "- **difference**: the row minus the row that it is compared with, in points.",
    "- **only one right**: images of all seeds that only the row, and only the other "
    "row, classifies correctly, with McNemar's exact p. It compares these networks, "
    "not the methods: networks of the same method differ as well.",
    "- **CAM inside the box**: share of the positive activation inside the bird's box.",
    "- **attention IoU**: IoU of the attention and the bird's box.",
)
_INTRODUCTIONS = {
    "budget": "`plus` and its baseline with more and less compute, and with more and "
    "fewer images.",
    "gain": "The extensions one by one and together, and their rivals.",
    "main": "CRA-CNN, the baselines and the STN.",
    "ablations": "One setting of CRA-CNN is changed, or BatchNorm takes its "
    "statistics over groups of 4 images.",
    "robust": "The defaults have four guards that the paper does not have: the "
    "attention is kept inside the image (`art.inside`), the head's input is normalized "
    "(`art.normalize_head`), Gamma is limited (`art.guard`), and the gradient of the "
    "affine matrix is clipped (`art.gradient_clip`). `Gamma as in the paper` turns off "
    "all four, `Gamma as in the released code` all but the clipping.",
    "modern": "Additions that the paper does not have. None changes the network that "
    "predicts.",
    "cub": "Fine-tuned EfficientNet-Lite0, or ResNet-10 from scratch.",
    "cars": f"The first {cars_subset.MODELS} models by name; every second image is a "
    "test image.",
}
"""What the tables of each group but "instrument" are of."""


def _task_introduction(found: Found) -> Iterable[str]:
    """Criteria for the drawn-bird task, and why the study uses the one it uses."""
    yield from (
        "The task should separate methods. Three criteria were set for the baseline:",
        "",
        "- accuracy: 85 to 95 % on `test`;",
        "- shift: a drop of 5 to 15 points;",
        "- spread: a standard deviation of at most 2 points on `test_shifted`.",
        "",
    )
    images = settings_of(BY_NAME["cra"], seed=0)["data.train_size"]
    yield (
        "The table lists the criteria that each candidate meets. The study uses few "
        "images for many epochs, as fine-grained datasets do "
        f"({images // len(synthetic.class_names())} per species; CUB has 30). The last "
        "two rows are those of the study."
    )
    short, long = (BY_NAME[f"instrument-ten-half{x}"] for x in ("", "-long"))
    drops = [_drop(found[row.name]) for row in (short, long)]
    if all(drops):
        before, after = (_mean(drop) for drop in drops)
        yield (
            f"`{short.title}` was not used because its drop depends on the number of "
            f"epochs: it is {before} points, and {after} with `{long.title}`."
        )


@functools.cache
def _boxes(count: int, seed: int) -> list[tuple[float, float, float, float]]:
    return [synthetic.draw("test", i, seed=seed, size_px=32).box for i in range(count)]


def start_iou(settings: Mapping[str, Any]) -> float:
    """Mean IoU of the untrained attention and the birds' boxes on `test`.

    Args:
      settings: a flat config of drawn birds.
    """
    x, y, scale, angle_rad = settings["art.init"]
    c, s = scale * math.cos(angle_rad), scale * math.sin(angle_rad)
    crop_px, side_px = settings["data.crop_px"], settings["data.short_side_px"]
    corners = art_module.corners_px(np.array([[c, -s, x], [s, c, y]]), crop_px)
    boxes = _boxes(settings["data.test_size"], settings["data.seed"])
    boxes_px = [
        center_crop.box_in_crop_px(box, (side_px, side_px), crop_px) for box in boxes
    ]
    return float(np.mean([localization.iou(corners, box) for box in boxes_px]))


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", html_page.MINUS)


def _mean(scores: Mapping[int, float], *, scale: float = 100) -> str:
    """Mean ± standard deviation: "93.4 ± 1.3"."""
    if not scores:
        return _NONE
    spread = uncertainty.spread(list(scores.values()))
    digits = 1 if scale == 100 else 2
    text = f"{spread.mean * scale:.{digits}f}"
    return f"{text} ± {spread.sd * scale:.{digits}f}" if spread.sd is not None else text


def _drop(by_seed: Mapping[int, Line]) -> dict[int, float]:
    """Top-1 on `test` minus top-1 on `test_shifted`, by seed."""
    before, after = values(by_seed, _TEST), values(by_seed, _SHIFTED)
    return {seed: before[seed] - after[seed] for seed in before if seed in after}


def _minutes(by_seed: Mapping[int, Line]) -> str:
    seconds = [line["seconds"] for line in by_seed.values()]
    return f"{np.median(seconds) / 60:.1f}"


def _task_table(rows: Sequence[Row], found: Found) -> str:
    head = ("task", "runs", "top-1, test", "top-1, test_shifted", "drop")
    head += ("sd, test_shifted", "criteria met", "minutes per run")
    body = []
    for row in (*rows, BY_NAME["baseline"], BY_NAME["baseline-long"]):
        by_seed = found[row.name]
        if not by_seed:
            continue
        test, shifted, drop = (
            values(by_seed, _TEST),
            values(by_seed, _SHIFTED),
            _drop(by_seed),
        )
        sd = uncertainty.spread(list(shifted.values())).sd
        met = [
            name
            for name, is_met in (
                ("accuracy", 0.85 <= np.mean(list(test.values())) <= 0.95),
                ("shift", 0.05 <= np.mean(list(drop.values())) <= 0.15),
                ("spread", sd is not None and sd <= 0.02),
            )
            if is_met
        ]
        title = row.title if row.group == "instrument" else f"the study's {row.title}"
        body.append(
            (
                *(title, str(len(by_seed)), _mean(test), _mean(shifted), _mean(drop)),
                *(
                    html_page.percent(sd),
                    ", ".join(met) or "none",
                    _minutes(by_seed),
                ),
            )
        )
    return html_page.markdown_table(head, body)


def _accuracy_table(rows: Sequence[Row], found: Found) -> str:
    shifted = any(values(found[row.name], _SHIFTED) for row in rows)
    head = ["row", "runs", "top-1, test"]
    head += ["top-1, test_shifted", "drop"] if shifted else []
    head += ["minutes per run"]
    # A question that all rows share says nothing about a row.
    has_questions = len({row.question for row in rows}) > 1
    body = []
    for row in rows:
        by_seed = found[row.name]
        cells = [row.title, str(len(by_seed)), _mean(values(by_seed, _TEST))]
        if shifted:
            cells += [_mean(values(by_seed, _SHIFTED)), _mean(_drop(by_seed))]
        cells += [_minutes(by_seed)]
        body.append([*cells, *([row.question] if has_questions else [])])
    head += ["question"] if has_questions else []
    return html_page.markdown_table(head, body)


def _localization_table(rows: Sequence[Row], found: Found) -> Iterable[str]:
    """Scores of CAM and attention against the boxes, of datasets that have boxes."""
    columns: dict[str, dict[str, str]] = {}
    for metric, words in _LOCALIZATION.items():
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
    """Accuracy of N_ar without the pixels of the image, of runs that have it."""
    columns = [
        name
        for name in class_leak.COLUMNS
        if any(_leak(found[row.name], name) for row in rows)
    ]
    body = []
    for row in rows:
        cells = [_mean(_leak(found[row.name], name)) for name in columns]
        if any(cell != _NONE for cell in cells):
            body.append([row.title, *cells])
    if body:
        yield (
            "Class information in Gamma on `test` (`benchmarks/study/class_leak.py`):"
        )
        yield from ("", html_page.markdown_table(["row", *columns], body), "")
        yield from (f"- {name}: {class_leak.COLUMNS[name]}." for name in columns)
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
            few = one.spread.count < _MIN_SEEDS
            cells += [_interval(one.spread), _NONE if few else html_page.p_value(one.p)]
            last = one
        assert last is not None
        cells.insert(2, str(last.spread.count))
        body.append([*cells, _images(last.images)])
    if body:
        head = ["row", "compared with", "seeds", "difference, test", "p"]
        head += ["difference, test_shifted", "p"] if shifted else []
        head += [f"only one right, {'test_shifted' if shifted else 'test'} (p)"]
        yield from (html_page.markdown_table(head, body), "")


def _interval(spread: uncertainty.Spread) -> str:
    text = _signed(100 * spread.mean, 1)
    if spread.count < _MIN_SEEDS or not spread.interval:
        return text
    low, high = (_signed(100 * x, 1) for x in spread.interval)
    return f"{text} ({low} to {high})"


def _images(images: uncertainty.Paired | None) -> str:
    if images is None:
        return "not the same images"
    return f"{images.only_second} : {images.only_first} ({html_page.p_value(images.p)})"


@figure_style.styled
def draw_budgets(found: Found) -> Figure:
    """Draws accuracy over compute, and over the number of images of a species."""
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    budgets = (
        ("passes over 64 images of a species", [x for x in BUDGETS if x[1] == 64], 0),
        (
            "images of a species, the same compute",
            [x for x in BUDGETS if x[0] * x[1] == 160 * 64],
            1,
        ),
    )
    for ax, (words, points, axis) in zip(panels, budgets, strict=True):
        for kind, colour in (
            ("baseline-plus", _COLOURS["baseline"]),
            ("plus", _COLOURS["cra"]),
        ):
            for key, style in ((_TEST, "-"), (_SHIFTED, "--")):
                drawn = []
                for point in sorted(points, key=lambda x: x[axis]):
                    scores = values(found[budget_row(kind, *point)], key).values()
                    drawn += [(point[axis], 100 * score) for score in scores]
                places = sorted({x for x, _ in drawn})
                means = [np.mean([y for x, y in drawn if x == at]) for at in places]
                label = f"{kind.replace('-plus', '')}, {key[0]}"
                ax.plot(places, means, style, color=colour, label=label)
                ax.plot([x for x, _ in drawn], [y for _, y in drawn], ".", color=colour)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(point[axis] for point in points))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_xlabel(words)
        ax.grid(linewidth=0.4, color="0.85")
    panels[0].set_ylabel("top-1, %")
    panels[1].legend(fontsize="x-small")
    return figure


@figure_style.styled
def draw(rows: Sequence[Row], found: Found) -> Figure:
    """Draws a marker for each run and a bar for the mean of each row.

    There is a panel for each metric that any row has: top-1, pointing accuracy and
    attention IoU.
    """
    panels = [
        (key, words)
        for key, words in (
            (_TEST, "top-1, %,\ntest"),
            (_SHIFTED, "top-1, %,\ntest_shifted"),
            (("test", "pointing"), "pointing accuracy,\n%, test"),
            (("test", "attention_iou"), "attention IoU,\n%, test"),
            (("test", "head_in_attention"), "head in the\nattention, %, test"),
        )
        if any(values(found[row.name], key) for row in rows)
    ]
    row_in, top_in, bottom_in = 0.21, 0.1, 0.5
    panel_in = max(1.35, 3.6 / len(panels))  # a single panel is wider
    name_in = 0.2 + 0.056 * max(len(row.title) for row in rows)
    height = top_in + bottom_in + row_in * len(rows)
    width = name_in + (panel_in + 0.12) * len(panels)
    figure = Figure(figsize=(width, height))
    for position, (key, words) in enumerate(panels):
        left = (name_in + position * (panel_in + 0.12)) / width
        span = (panel_in / width, row_in * len(rows) / height)
        ax = figure.add_axes((left, bottom_in / height, *span))
        for y, row in enumerate(rows):
            xs = [100 * x for x in values(found[row.name], key).values()]
            if not xs:
                continue
            colour = _COLOURS[row.kind]
            ax.plot([np.mean(xs)] * 2, [y - 0.36, y + 0.36], color=colour)
            ax.plot(
                *(xs, [y] * len(xs)),
                linestyle="none",
                marker=_MARKERS[row.kind],
                markersize=4,
                alpha=0.55,
                color=colour,
                markeredgewidth=0,
            )
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.set_yticks(range(len(rows)))
        ax.set_yticklabels([row.title for row in rows] if not position else [])
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x", linewidth=0.4, color="0.85")
        ax.set_axisbelow(True)
        ax.spines["left"].set_visible(False)
        ax.margins(x=0.1)
        ax.set_xlabel(words)
    return figure
