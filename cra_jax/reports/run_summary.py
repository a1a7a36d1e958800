"""Summary of a run directory: scores, training time, hardest classes."""

import collections
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cra_jax.model import KINDS
from cra_jax.reports import html_page, paper_results, uncertainty
from cra_jax.runtime import config_files, config_rules, run_directory
from cra_jax.runtime.checkpoint import Checkpoints

_NEEDED = (
    *("seed", "data.source", "data.name", "model.kind", "model.backbone"),
    *("train.epochs", "train.batch_size", "restriction.first_epochs"),
    *("restriction.period_epochs", "optim.schedule", "optim.factor"),
    *("optim.first_epochs", "optim.period_epochs"),
)
_HARDEST_CLASSES = 10
_CONFIDENT_ERRORS = 8


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of a run, with the keys that reports use.

    Raises:
      ValueError: the directory holds no run, or its config is damaged or of a version
        whose keys differ.
    """
    config = run_directory.read_config(workdir)
    try:
        config_rules.check_values(run_directory.flatten(config), needed=_NEEDED)
    except ValueError as error:
        raise ValueError(f"{workdir / 'config.json'}: {error}") from None
    return config


def run_title(config: Mapping[str, Any]) -> str:
    """Network, backbone and dataset of a run: "CRA-CNN, resnet50, CUB-200-2011"."""
    model, data = config["model"], config["data"]
    source = data["name"] or data["source"]
    network = KINDS.get(model["kind"], model["kind"])
    return f"{network}, {model['backbone']}, {paper_results.NAMES.get(source, source)}"


def paper_result(
    config: Mapping[str, Any], line: Mapping[str, Any]
) -> paper_results.Row | None:
    """The paper's result for the same dataset, backbone, kind and protocol.

    Args:
      config: flattened config of a run.
      line: scores of the run on a split, from `latest_scores`.

    Returns:
      The row of the paper's table; None if the paper has no such row.
    """
    return paper_results.find(
        source=config["data.source"],
        name=config["data.name"],
        backbone=config["model.backbone"],
        kind=config["model.kind"],
        protocol=line["protocol"],
        count=line["count"] if line["split"] == "test" else 0,
    )


def latest_scores(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Scores of the last evaluated checkpoint, one line per split and protocol.

    Args:
      lines: of `metrics.jsonl`.
    """
    tested = [line for line in lines if line.get("protocol")]
    last = max((line["step"] for line in tested), default=0)
    scores: dict[tuple[str, str], dict[str, Any]] = {}
    for line in tested:
        key = line["split"], line["protocol"]
        if line["step"] == last:
            before = scores.get(key, {})
            # `--mode eval` repeats the scores of training without the attention's.
            same = all(before.get(x) == line[x] for x in ("top1", "count"))
            scores[key] = {**before, **line} if same else dict(line)
    return [scores[key] for key in sorted(scores, key=sort_key)]


def sort_key(key: tuple[str, str]) -> tuple:
    """Sort key of (split, protocol): "test" first, "center" first."""
    split, protocol = key
    return (split != "test", split, protocol != "center")


def paper_config() -> dict[str, Any]:
    """Flattened config of the paper's recipe, `configs/cub.py`."""
    config_files.make_importable()
    module = importlib.import_module("configs.cub")
    return run_directory.flatten(module.get_config().to_dict())


def training_time(
    lines: Iterable[Mapping[str, Any]], batch_size: int
) -> tuple[float, int]:
    """Duration of the training steps and number of images that they processed.

    Evaluation is not included. Steps that a resumed run repeated are counted once.

    Args:
      lines: of `metrics.jsonl`.
      batch_size: `train.batch_size`.

    Returns:
      Seconds and number of images.
    """
    seconds, step = 0.0, 0
    for line in lines:
        if line["split"] == "train":
            images = (line["step"] - step) * batch_size
            seconds += images / line["images_per_second"]
            step = line["step"]
    return seconds, step * batch_size


def hardest_classes(
    workdir: Path, scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Classes with the lowest accuracy, and the most confident errors.

    Args:
      workdir: the run directory.
      scores: result of `latest_scores`; the first line that has per-image results of
        the same checkpoint is used.

    Returns:
      None if no line has per-image results. Otherwise ``split``, ``protocol``,
      ``count`` (number of classes), ``rows`` and ``errors``. Each of ``rows`` is a
      class: ``name``, ``correct`` and ``count`` (numbers of images), ``accuracy`` with
      its interval ``low`` to ``high``, ``confused_with`` (the most frequent wrong
      prediction, or None) and ``confused_count`` (its number). Each of ``errors`` is an
      image: ``name``, ``true_class``, ``predicted_class`` and ``confidence``.
    """
    for line in scores:
        split, protocol = line["split"], line["protocol"]
        try:
            results = run_directory.read_results(workdir, split, protocol)
        except ValueError:
            continue
        results = [result for result in results if result.step == line["step"]]
        if results:
            names = _class_names(workdir, line["step"])
            return {
                "split": split,
                "protocol": protocol,
                **_summarize_classes(results, names),
            }
    return None


def _summarize_classes(
    results: Sequence[run_directory.Result], names: Sequence[str]
) -> dict[str, Any]:
    predictions = collections.defaultdict(list)
    for result in results:
        predictions[result.label].append(result.predicted)
    rows = []
    for label, predicted in predictions.items():
        correct, count = predicted.count(label), len(predicted)
        wrong = collections.Counter(p for p in predicted if p != label)
        other, other_count = wrong.most_common(1)[0] if wrong else (None, 0)
        low, high = uncertainty.wilson_interval(correct, count)
        rows.append(
            {
                "name": _class_name(names, label),
                "correct": correct,
                "count": count,
                "accuracy": correct / count,
                "low": low,
                "high": high,
                "confused_with": None if other is None else _class_name(names, other),
                "confused_count": other_count,
            }
        )
    rows.sort(key=lambda row: (row["accuracy"], row["name"]))
    wrong = [result for result in results if result.predicted != result.label]
    wrong.sort(key=lambda result: -result.confidence)
    errors = [
        {
            "name": result.name,
            "true_class": _class_name(names, result.label),
            "predicted_class": _class_name(names, result.predicted),
            "confidence": result.confidence,
        }
        for result in wrong[:_CONFIDENT_ERRORS]
    ]
    return {"count": len(rows), "rows": rows[:_HARDEST_CLASSES], "errors": errors}


def _class_names(workdir: Path, step: int) -> tuple[str, ...]:
    """Class names of a checkpoint; empty if the checkpoint does not exist."""
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        return ()
    with Checkpoints(directory, writable=False) as checkpoints:
        if step not in checkpoints.steps():
            return ()
        return tuple(checkpoints.meta(step)["class_names"])


def notes_on_best(workdir: Path) -> list[str]:
    """A sentence on the checkpoint `best` and the split that chose it."""
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        return []
    with Checkpoints(directory, writable=False) as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            return []
        meta = checkpoints.meta(step)
    split = meta.get("metric_split", "test")
    text = f"The checkpoint `best` is epoch {meta['epoch']}, chosen by top-1 on {split}"
    if split == "val":
        return [f"{text}; the test images chose nothing."]
    return [
        f"{text}, so its score there is too high. Give a validation split, or hold out "
        "training images with data.val_share, to choose it on other images."
    ]


def _class_name(names: Sequence[str], label: int) -> str:
    if label >= len(names):
        return f"class {label}"
    return html_page.readable_class_name(names[label])
