"""Statistics of several runs: means over seeds, and tests of differences."""

import collections
import itertools
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cra_jax.reports import html_page, paper_results, run_summary, uncertainty
from cra_jax.runtime import provenance, run_directory

# Config keys that do not define a method: the seed, paths, speed, logging, evaluation.
_IGNORED_KEYS = (
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
# Config keys that differ between the rows of the paper's tables, and paths of inputs.
_PAPER_ROW_KEYS = (
    "data.path",
    "data.source",
    "data.name",
    "data.manual_dir",
    "model.backbone",
    "model.kind",
    "model.pretrained",
)
METRICS = {
    "top5": "top-5",
    "mean_per_class": "per-class mean",
    "pointing": "pointing accuracy",
    "activation_in_box": "CAM share in box",
    "attention_iou": "attention IoU",
    "head_in_attention": "head in attention",
}
"""Metrics other than top-1 -> their printed names."""

Evaluation = tuple[str, str]
"""A split and a protocol."""

Correctness = dict[Any, tuple[int, bool]]
"""Image -> its label, and whether the prediction of the run is correct."""


class Run(NamedTuple):
    """Contents of a run directory.

    Attributes:
      workdir: the run directory.
      config: its flattened config.
      scores: of its last evaluated checkpoint, by split and protocol.
      title: printed name of the network and its dataset.
    """

    workdir: Path
    config: dict[str, Any]
    scores: dict[Evaluation, dict[str, Any]]
    title: str

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.config["seed"]


class Group(NamedTuple):
    """Runs that differ only in the seed.

    Attributes:
      letter: short name of the group in tables.
      label: printed name that distinguishes the group from the others.
      runs: one run per seed, ordered by seed.
    """

    letter: str
    label: str
    runs: tuple[Run, ...]

    def values(self, evaluation: Evaluation, metric: str) -> dict[int, float]:
        """Seed -> value of a metric, for the runs that have the metric."""
        lines = {run.seed: run.scores.get(evaluation, {}) for run in self.runs}
        return {seed: x[metric] for seed, x in lines.items() if metric in x}


class Row(NamedTuple):
    """Top-1 accuracy of a group on one split under one protocol.

    Attributes:
      group: the group.
      spread: mean and standard deviation over seeds.
      interval: Student's t interval of the mean; Wilson's interval for a single run.
      by_seed: seed -> accuracy.
      paper: the corresponding row of the paper's tables, if there is one.
    """

    group: Group
    spread: uncertainty.Spread
    interval: uncertainty.Interval
    by_seed: dict[int, float]
    paper: paper_results.Row | None


class Pair(NamedTuple):
    """Paired test of two runs on the same images.

    Attributes:
      evaluation: split and protocol.
      first: a run.
      second: a run of another group.
      letters: of the two groups.
      counts: numbers of images by correctness, and the p-value of McNemar's test.
      adjusted_p: the p-value, adjusted for the number of pairs by Holm's method.
    """

    evaluation: Evaluation
    first: Run
    second: Run
    letters: tuple[str, str]
    counts: uncertainty.Paired
    adjusted_p: float


class Difference(NamedTuple):
    """Mean difference of two groups over their common seeds.

    Attributes:
      evaluation: split and protocol.
      letters: of the two groups.
      spread: of the accuracy of the second group minus that of the first, by seed.
    """

    evaluation: Evaluation
    letters: tuple[str, str]
    spread: uncertainty.Spread


class Comparison(NamedTuple):
    """Result of `compare`.

    Attributes:
      groups: in the order of their first runs.
      tables: split and protocol -> rows.
      others: split and protocol -> metric of `METRICS` -> group letter -> spread.
      differences: between groups with at least two common seeds.
      pairs: of runs with the same seed.
      config_differences: config key -> its value in each group, for the keys whose
        values differ.
      notes: warnings about the comparison.
    """

    groups: list[Group]
    tables: dict[Evaluation, list[Row]]
    others: dict[Evaluation, dict[str, dict[str, uncertainty.Spread]]]
    differences: list[Difference]
    pairs: list[Pair]
    config_differences: dict[str, list[Any]]
    notes: list[str]


def compare(workdirs: Sequence[Path]) -> Comparison:
    """Reads runs, groups those that differ only in the seed, and tests differences.

    Args:
      workdirs: run directories; repeated ones are read once.

    Raises:
      ValueError: there are no runs, or a run has no scores.
    """
    directories = list(dict.fromkeys(path.resolve() for path in workdirs))
    if not directories:
        raise ValueError(
            "there are no runs to compare: give run directories, as in "
            "--mode compare runs/a runs/b"
        )
    runs = _told_apart_by_data([_read(directory) for directory in directories])
    notes: list[str] = []
    groups = _group(runs, notes)
    evaluations = sorted(
        {evaluation for run in runs for evaluation in run.scores},
        key=run_summary.sort_key,
    )
    pairs = _pairs(groups, evaluations, notes)
    tables = {evaluation: list(_rows(groups, evaluation)) for evaluation in evaluations}
    return Comparison(
        groups=groups,
        tables=tables,
        others={evaluation: _others(groups, evaluation) for evaluation in evaluations},
        differences=list(_differences(groups, evaluations)),
        pairs=pairs,
        config_differences=_config_differences([group.runs[0] for group in groups]),
        notes=[*notes, *_warnings(groups), *_recipe_warnings(tables)],
    )


def _read(workdir: Path) -> Run:
    config = run_summary.read_config(workdir)
    lines = run_summary.latest_scores(run_directory.read_metrics(workdir))
    if not lines:
        raise ValueError(
            f"{workdir} has no scores: train the run until its first evaluation, or "
            "leave it out"
        )
    scores = {(line["split"], line["protocol"]): line for line in lines}
    # The config of an older run lacks newer keys; the run used their defaults.
    flat = run_summary.paper_config() | run_directory.flatten(config)
    return Run(workdir, flat, scores, run_summary.run_title(config))


def _told_apart_by_data(runs: Sequence[Run]) -> list[Run]:
    """Adds the digests of the test data to the configs, if all runs have them.

    Runs of the same config can have been trained before and after a change of the data.
    """
    digests = [
        {x: line["data"] for x, line in run.scores.items() if "data" in line}
        for run in runs
    ]
    common = set.intersection(*map(set, digests))
    if len({tuple(found[x] for x in sorted(common)) for found in digests}) < 2:
        return list(runs)
    return [
        run._replace(
            config=run.config
            | {f"data.digest of {x[0]}": found[x] for x in sorted(common)}
        )
        for run, found in zip(runs, digests, strict=True)
    ]


def _group(runs: Sequence[Run], notes: list[str]) -> list[Group]:
    by_config: dict[tuple, dict[int, Run]] = {}
    for run in runs:
        identity = tuple(
            (key, value)
            for key, value in sorted(run.config.items())
            if not key.startswith(_IGNORED_KEYS)
        )
        by_seed = by_config.setdefault(identity, {})
        if run.seed in by_seed:
            notes.append(
                f"Run {run.workdir.name} is left out, because it has the same config "
                f"and seed as run {by_seed[run.seed].workdir.name}."
            )
        by_seed.setdefault(run.seed, run)
    members = [
        tuple(by_seed[seed] for seed in sorted(by_seed))
        for by_seed in by_config.values()
    ]
    differences = _config_differences([runs[0] for runs in members])
    titles = [runs[0].title for runs in members]
    groups = []
    for i, group_runs in enumerate(members):
        label = titles[i]
        if titles.count(label) > 1:
            label += "".join(
                f", {key}={html_page.format_value(values[i])}"
                for key, values in differences.items()
                if not key.startswith(("model.kind", "model.backbone", "data.source"))
            )
        groups.append(Group(_letter(i), label, group_runs))
    return groups


def _letter(index: int) -> str:
    """A, B, ..., Z, A2, B2, ..."""
    cycle, position = divmod(index, 26)
    return string.ascii_uppercase[position] + (str(cycle + 1) if cycle else "")


def _config_differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Config key -> its value in each run, for keys whose values differ.

    Keys that cannot change a score are left out.
    """
    keys = sorted({key for run in runs for key in run.config})
    values = {key: [run.config.get(key, "missing") for run in runs] for key in keys}
    return {
        key: found
        for key, found in values.items()
        if not key.startswith(_IGNORED_KEYS) and any(x != found[0] for x in found)
    }


def _rows(groups: Iterable[Group], evaluation: Evaluation) -> Iterable[Row]:
    for group in groups:
        by_seed = group.values(evaluation, "top1")
        if not by_seed:
            continue
        spread = uncertainty.spread(list(by_seed.values()))
        first = next(run for run in group.runs if evaluation in run.scores)
        count = first.scores[evaluation]["count"]
        # Student's t interval can exceed 0..1, but an accuracy cannot.
        interval = (
            uncertainty.Interval(*np.clip(spread.interval, 0, 1).tolist())
            if spread.interval
            else uncertainty.wilson_interval(round(spread.mean * count), count)
        )
        paper = run_summary.paper_result(first.config, first.scores[evaluation])
        yield Row(group, spread, interval, by_seed, paper)


def _others(
    groups: Iterable[Group], evaluation: Evaluation
) -> dict[str, dict[str, uncertainty.Spread]]:
    """Metric of `METRICS` -> group letter -> spread."""
    spreads_by_metric = {}
    for metric in METRICS:
        values = {g.letter: list(g.values(evaluation, metric).values()) for g in groups}
        spreads = {k: uncertainty.spread(v) for k, v in values.items() if v}
        if spreads:
            spreads_by_metric[metric] = spreads
    return spreads_by_metric


def _differences(
    groups: Sequence[Group], evaluations: Iterable[Evaluation]
) -> Iterable[Difference]:
    for evaluation in evaluations:
        for a, b in itertools.combinations(groups, 2):
            first, second = a.values(evaluation, "top1"), b.values(evaluation, "top1")
            common = [seed for seed in first if seed in second]
            if len(common) > 1 and _same_images(a, b, evaluation):
                changes = [second[seed] - first[seed] for seed in common]
                letters = a.letter, b.letter
                yield Difference(evaluation, letters, uncertainty.spread(changes))


def _same_images(a: Group, b: Group, evaluation: Evaluation) -> bool:
    first, second = (_results(group.runs[0], evaluation) for group in (a, b))
    if first and second:
        one, other = _matched(first, second)
        return _labels(one) == _labels(other)
    # Without per-image results, equal `data.*` config keys imply the same images.
    differences = _config_differences([a.runs[0], b.runs[0]])
    return not any(key.startswith("data.") for key in differences)


def _labels(correctness: Correctness) -> dict[Any, int]:
    return {image: label for image, (label, _) in correctness.items()}


def _results(run: Run, evaluation: Evaluation) -> list[run_directory.Result]:
    """Reads the per-image results; empty if they do not belong to the run's scores."""
    try:
        results = run_directory.read_results(run.workdir, *evaluation)
    except ValueError:
        return []
    line = run.scores.get(evaluation, {})
    same_checkpoint = all(r.step == line.get("step") for r in results)
    return results if same_checkpoint and len(results) == line.get("count") else []


def _matched(
    first: Sequence[run_directory.Result], second: Sequence[run_directory.Result]
) -> tuple[Correctness, Correctness]:
    """Correctness by image, where both runs name an image alike.

    An image is its content. Results of older versions lack that; it is then its name.
    """
    by_content = all(result.digest for result in (*first, *second))

    def keyed(results: Sequence[run_directory.Result]) -> Correctness:
        copies: collections.Counter[str] = collections.Counter()
        found: Correctness = {}
        for result in results:
            image = result.digest if by_content else result.name
            found[image, copies[image]] = (
                result.label,
                result.predicted == result.label,
            )
            copies[image] += 1
        return found

    return keyed(first), keyed(second)


def _pairs(
    groups: Sequence[Group], evaluations: Iterable[Evaluation], notes: list[str]
) -> list[Pair]:
    pairs, missing = [], set()
    for evaluation in evaluations:
        for a, b in itertools.combinations(groups, 2):
            for first, second in _paired_runs(a, b, evaluation):
                results = [_results(run, evaluation) for run in (first, second)]
                if not all(results):
                    missing |= {
                        (run.workdir.name, *evaluation)
                        for run, found in zip((first, second), results, strict=True)
                        if not found
                    }
                    continue
                one, other = _matched(*results)
                if not all(r.digest for found in results for r in found):
                    notes.append(
                        f"Images of runs {first.workdir.name} and "
                        f"{second.workdir.name} are matched by their names alone for "
                        f"{', '.join(evaluation)}: write their results again with "
                        "--mode eval."
                    )
                if _labels(one) != _labels(other):
                    notes.append(
                        f"Runs {first.workdir.name} and {second.workdir.name} have no "
                        f"paired test for {', '.join(evaluation)}, because their "
                        "images or labels differ."
                    )
                    continue
                counts = uncertainty.mcnemar(
                    np.array([one[image][1] for image in one]),
                    np.array([other[image][1] for image in one]),
                )
                letters = a.letter, b.letter
                pairs.append(Pair(evaluation, first, second, letters, counts, counts.p))
    for name, split, protocol in sorted(missing):
        notes.append(
            f"Run {name} has no paired test for {split}, {protocol}, because the "
            "per-image results of its last checkpoint are missing: write them with "
            "--mode eval."
        )
    adjusted = uncertainty.holm([pair.counts.p for pair in pairs])
    return [
        pair._replace(adjusted_p=p) for pair, p in zip(pairs, adjusted, strict=True)
    ]


def _paired_runs(a: Group, b: Group, evaluation: Evaluation) -> list[tuple[Run, Run]]:
    """Runs of two groups with the same seed.

    If each group has a single run, these two are paired whatever their seeds.
    """
    first = {run.seed: run for run in a.runs if evaluation in run.scores}
    second = {run.seed: run for run in b.runs if evaluation in run.scores}
    common = [(first[seed], second[seed]) for seed in first if seed in second]
    if not common and len(first) == len(second) == 1:
        return list(zip(first.values(), second.values(), strict=True))
    return common


def _recipe_warnings(tables: Mapping[Evaluation, Iterable[Row]]) -> Iterable[str]:
    """Departures from the paper's recipe, for groups shown with a paper's result."""
    recipe = run_summary.paper_config()
    groups = {
        r.group.letter: r.group for rows in tables.values() for r in rows if r.paper
    }
    for group in groups.values():
        config = group.runs[0].config
        changes = [
            f"{key}={html_page.format_value(config[key])} "
            f"(paper: {html_page.format_value(value)})"
            for key, value in recipe.items()
            if config[key] != value
            and not key.startswith((*_IGNORED_KEYS, *_PAPER_ROW_KEYS))
        ]
        if changes:
            yield (
                f"Group {group.letter} is shown with the paper's result, but its "
                f"config differs from the paper's recipe: {', '.join(changes)}."
            )


def _warnings(groups: Iterable[Group]) -> Iterable[str]:
    """Reasons why the mean of a group may be misleading."""
    for group in groups:
        codes = set()
        for run in group.runs:
            epochs = run.config["train.epochs"]
            reached = max(line["epoch"] for line in run.scores.values())
            if reached < epochs:
                yield (
                    f"Run {run.workdir.name} was evaluated at epoch {reached} of "
                    f"{epochs}."
                )
            starts = provenance.read(run.workdir)
            codes |= {provenance.describe_commit(start["code"]) for start in starts}
        if len(codes) > 1:
            yield (
                f"The runs of group {group.letter} were trained with different code: "
                f"{', '.join(sorted(codes))}."
            )
