"""What several runs say together: means over seeds, and tests of differences."""

import itertools
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cra_jax.reports import html_page, paper_results, run_summary, uncertainty
from cra_jax.runtime import provenance, run_directory

# What cannot change a score: where things lie, how much is done at once, what is kept.
_INDIFFERENT = (
    "seed",
    "checkpoint.",
    "data.cache_dir",
    "data.on_device",
    "data.prefetch_batches",
    "data.prepare",
    "data.workers",
    "eval.",
    "train.log_every_steps",
    "train.report",
)
# What tells the paper's cells apart, and where their images and weights lie.
_CELL = ("data.path", "data.source", "data.name", "model.backbone", "model.kind")
_CELL += ("model.pretrained", "data.manual_dir")
METRICS = {
    "top5": "top-5",
    "mean_per_class": "per class",
    "pointing": "pointing",
    "activation_in_box": "activation in box",
    "attention_iou": "attention IoU",
}
"""What is compared beside top-1, with its printed name."""

Test = tuple[str, str]
"""A split and a protocol."""

Answers = dict[str, tuple[int, bool]]
"""By image: its label, and whether the run is right."""


class Run(NamedTuple):
    """A run directory that was read.

    Attributes:
      workdir: the folder.
      settings: its config, flat.
      scores: of its last scored checkpoint, by split and protocol.
      title: what was trained, on what.
    """

    workdir: Path
    settings: dict[str, Any]
    scores: dict[Test, dict[str, Any]]
    title: str

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.settings["seed"]


class Group(NamedTuple):
    """Runs that differ in the seed only.

    Attributes:
      letter: a name for tables.
      label: what sets it apart.
      runs: one a seed, in the order of seeds.
    """

    letter: str
    label: str
    runs: tuple[Run, ...]

    def values(self, test: Test, metric: str) -> dict[int, float]:
        """A metric by seed, of the runs that have it."""
        lines = {run.seed: run.scores.get(test, {}) for run in self.runs}
        return {seed: x[metric] for seed, x in lines.items() if metric in x}


class Row(NamedTuple):
    """A group's top-1 under one test.

    Attributes:
      group: whose.
      spread: mean over seeds and what goes with it.
      interval: of the mean by Student's t; of one run, Wilson's.
      by_seed: what each run has.
      paper: the paper's figure for the same, if it has one.
    """

    group: Group
    spread: uncertainty.Spread
    interval: uncertainty.Interval
    by_seed: dict[int, float]
    paper: paper_results.Row | None


class Pair(NamedTuple):
    """Two runs' answers to the same images.

    Attributes:
      test: split and protocol.
      first: a run.
      second: a run of another group.
      letters: of the groups.
      counts: who is right how often, and McNemar's p.
      adjusted_p: for the number of pairs, by Holm.
    """

    test: Test
    first: Run
    second: Run
    letters: tuple[str, str]
    counts: uncertainty.Paired
    adjusted_p: float


class Difference(NamedTuple):
    """Two groups' mean difference over the seeds that both have.

    Attributes:
      test: split and protocol.
      letters: of the groups; the second less the first.
      spread: of the differences, by seed.
    """

    test: Test
    letters: tuple[str, str]
    spread: uncertainty.Spread


class Comparison(NamedTuple):
    """All that is said of some runs.

    Attributes:
      groups: in the order in which they were named.
      tables: rows by test.
      others: for each test, spreads of `METRICS` by group letter.
      differences: of groups with two or more seeds in common.
      pairs: of runs of the same seed.
      settings: what differs between groups: key -> a value a group.
      notes: what a reader should know.
    """

    groups: list[Group]
    tables: dict[Test, list[Row]]
    others: dict[Test, dict[str, dict[str, uncertainty.Spread]]]
    differences: list[Difference]
    pairs: list[Pair]
    settings: dict[str, list[Any]]
    notes: list[str]


def compare(workdirs: Sequence[Path]) -> Comparison:
    """Reads the runs, groups them, and tests what differs.

    Raises:
      ValueError: there are no runs, or one of them has no scores.
    """
    folders = list(dict.fromkeys(path.resolve() for path in workdirs))
    if not folders:
        raise ValueError(
            "no runs to compare: name their folders, as in --mode compare runs/a runs/b"
        )
    runs = [_read(folder) for folder in folders]
    notes: list[str] = []
    groups = _group(runs, notes)
    tests = sorted({test for run in runs for test in run.scores}, key=run_summary.order)
    pairs = _pairs(groups, tests, notes)
    tables = {test: list(_rows(groups, test)) for test in tests}
    return Comparison(
        groups=groups,
        tables=tables,
        others={test: _others(groups, test) for test in tests},
        differences=list(_differences(groups, tests)),
        pairs=pairs,
        settings=_differing([group.runs[0] for group in groups]),
        notes=[*notes, *_doubts(groups), *_departures(tables)],
    )


def _read(workdir: Path) -> Run:
    settings = run_directory.read_config(workdir)
    lines = run_summary.newest(run_directory.read_metrics(workdir))
    if not lines:
        raise ValueError(
            f"{workdir} has no scores yet: train it to its first evaluation, or leave "
            "it out"
        )
    scores = {(line["split"], line["protocol"]): line for line in lines}
    # What an older run does not know of had its default.
    flat = run_summary.recipe() | run_directory.flatten(settings)
    return Run(workdir, flat, scores, run_summary.title(settings))


def _group(runs: Sequence[Run], notes: list[str]) -> list[Group]:
    found: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        key = tuple(
            (name, value)
            for name, value in sorted(run.settings.items())
            if not name.startswith(_INDIFFERENT)
        )
        seeds = found.setdefault(key, {})
        if run.seed in seeds:
            notes.append(
                f"{run.workdir.name} is left out: it is {seeds[run.seed].workdir.name} "
                f"again, seed {run.seed} and all, and no second draw"
            )
        seeds.setdefault(run.seed, run)
    members = [tuple(seeds[seed] for seed in sorted(seeds)) for seeds in found.values()]
    differing = _differing([runs[0] for runs in members])
    titles = [runs[0].title for runs in members]
    groups = []
    for i, runs_of_one in enumerate(members):
        label = titles[i]
        if titles.count(label) > 1:
            label += "".join(
                f", {key}={html_page.plain(values[i])}"
                for key, values in differing.items()
                if not key.startswith(("model.kind", "model.backbone", "data.source"))
            )
        groups.append(Group(_letter(i), label, runs_of_one))
    return groups


def _letter(index: int) -> str:
    """A, B, ..., Z, A2, B2, ..."""
    turn, place = divmod(index, 26)
    return string.ascii_uppercase[place] + (str(turn + 1) if turn else "")


def _differing(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs, but for those that cannot matter."""
    keys = sorted({key for run in runs for key in run.settings})
    values = {key: [run.settings.get(key, "not there") for run in runs] for key in keys}
    return {
        key: found
        for key, found in values.items()
        if not key.startswith(_INDIFFERENT) and any(x != found[0] for x in found)
    }


def _rows(groups: Iterable[Group], test: Test) -> Iterable[Row]:
    for group in groups:
        by_seed = group.values(test, "top1")
        if not by_seed:
            continue
        spread = uncertainty.spread(list(by_seed.values()))
        first = next(run for run in group.runs if test in run.scores)
        count = first.scores[test]["count"]
        # No accuracy lies beyond 0 and 1; Student's t does not know that.
        interval = (
            uncertainty.Interval(*np.clip(spread.interval, 0, 1).tolist())
            if spread.interval
            else uncertainty.wilson(round(spread.mean * count), count)
        )
        published = run_summary.published(first.settings, first.scores[test])
        yield Row(group, spread, interval, by_seed, published)


def _others(
    groups: Iterable[Group], test: Test
) -> dict[str, dict[str, uncertainty.Spread]]:
    """Metric of `METRICS` -> group letter -> spread."""
    found = {}
    for metric in METRICS:
        values = {g.letter: list(g.values(test, metric).values()) for g in groups}
        spreads = {k: uncertainty.spread(v) for k, v in values.items() if v}
        if spreads:
            found[metric] = spreads
    return found


def _differences(
    groups: Sequence[Group], tests: Iterable[Test]
) -> Iterable[Difference]:
    for test in tests:
        for a, b in itertools.combinations(groups, 2):
            first, second = a.values(test, "top1"), b.values(test, "top1")
            common = [seed for seed in first if seed in second]
            if len(common) > 1 and _same_images(a, b, test):
                changes = [second[seed] - first[seed] for seed in common]
                letters = a.letter, b.letter
                yield Difference(test, letters, uncertainty.spread(changes))


def _same_images(a: Group, b: Group, test: Test) -> bool:
    first, second = (_answers(group.runs[0], test) for group in (a, b))
    if first is not None and second is not None:
        return _labels(first) == _labels(second)
    # Without each image's result: the same data, cut in the same way.
    return not any(k.startswith("data.") for k in _differing([a.runs[0], b.runs[0]]))


def _labels(answers: Answers) -> dict[str, int]:
    return {name: label for name, (label, _) in answers.items()}


def _answers(run: Run, test: Test) -> Answers | None:
    """Label by image, and whether the run is right; None where it is not known."""
    try:
        results = run_directory.read_results(run.workdir, *test)
    except ValueError:
        return None
    line = run.scores.get(test, {})
    answers = {r.name: (r.label, r.predicted == r.label) for r in results}
    of_that_checkpoint = all(r.step == line.get("step") for r in results)
    if not of_that_checkpoint or len(answers) != line.get("count"):
        return None
    return answers


def _pairs(
    groups: Sequence[Group], tests: Iterable[Test], notes: list[str]
) -> list[Pair]:
    found, unknown = [], set()
    for test in tests:
        for a, b in itertools.combinations(groups, 2):
            for first, second in _partners(a, b, test):
                one, other = _answers(first, test), _answers(second, test)
                if one is None or other is None:
                    runs = ((first, one), (second, other))
                    unknown |= {(r.workdir.name, *test) for r, x in runs if x is None}
                    continue
                if _labels(one) != _labels(other):
                    notes.append(
                        f"{first.workdir.name} and {second.workdir.name} saw different "
                        f"images or labels under {', '.join(test)}: no paired test"
                    )
                    continue
                counts = uncertainty.mcnemar(
                    np.array([one[name][1] for name in one]),
                    np.array([other[name][1] for name in one]),
                )
                letters = a.letter, b.letter
                found.append(Pair(test, first, second, letters, counts, counts.p))
    for name, split, protocol in sorted(unknown):
        notes.append(
            f"what {name} says of each image is not known for {split}, {protocol}: "
            "no paired test (--mode eval on it writes that)"
        )
    adjusted = uncertainty.holm([pair.counts.p for pair in found])
    return [
        pair._replace(adjusted_p=p) for pair, p in zip(found, adjusted, strict=True)
    ]


def _partners(a: Group, b: Group, test: Test) -> list[tuple[Run, Run]]:
    """Runs of the same seed; where there is one of each, those."""
    first = {run.seed: run for run in a.runs if test in run.scores}
    second = {run.seed: run for run in b.runs if test in run.scores}
    common = [(first[seed], second[seed]) for seed in first if seed in second]
    if not common and len(first) == len(second) == 1:
        return list(zip(first.values(), second.values(), strict=True))
    return common


def _departures(tables: Mapping[Test, Iterable[Row]]) -> Iterable[str]:
    """What is not the paper's in groups that stand beside a figure of the paper's."""
    recipe = run_summary.recipe()
    groups = {
        r.group.letter: r.group for rows in tables.values() for r in rows if r.paper
    }
    for group in groups.values():
        settings = group.runs[0].settings
        changes = [
            f"{key}={html_page.plain(settings[key])} ({html_page.plain(value)})"
            for key, value in recipe.items()
            if settings[key] != value and not key.startswith((*_INDIFFERENT, *_CELL))
        ]
        if changes:
            yield (
                f"{group.letter} stands beside the paper's figure and departs from its "
                f"recipe: {', '.join(changes)}"
            )


def _doubts(groups: Iterable[Group]) -> Iterable[str]:
    """Why a mean may not be what it seems."""
    for group in groups:
        codes = set()
        for run in group.runs:
            epochs = run.settings["train.epochs"]
            reached = max(line["epoch"] for line in run.scores.values())
            if reached < epochs:
                yield f"{run.workdir.name} was scored at epoch {reached} of {epochs}"
            starts = provenance.read(run.workdir)
            codes |= {provenance.describe_commit(start["code"]) for start in starts}
        if len(codes) > 1:
            yield (
                f"the runs of {group.letter} were made with different code: "
                f"{', '.join(sorted(codes))}"
            )
