"""What a run directory's numbers come to: scores, time, the hardest classes."""

import collections
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cra_jax.model import KINDS
from cra_jax.reports import html_page, paper_results, uncertainty
from cra_jax.runtime import config_files, run_directory
from cra_jax.runtime.checkpoint import Checkpoints

_HARDEST = 10
_SUREST = 8


def title(settings: Mapping[str, Any]) -> str:
    """What was trained, and on what: "CRA-CNN, resnet50, CUB-200-2011"."""
    model, data = settings["model"], settings["data"]
    source = data["name"] or data["source"]
    kind = KINDS.get(model["kind"], model["kind"])
    return f"{kind}, {model['backbone']}, {paper_results.NAMES.get(source, source)}"


def published(
    settings: Mapping[str, Any], line: Mapping[str, Any]
) -> paper_results.Row | None:
    """The paper's figure for the same data, backbone, kind and protocol, if any.

    Args:
      settings: a run's config, flat.
      line: its scores of a split.
    """
    return paper_results.find(
        source=settings["data.source"],
        name=settings["data.name"],
        backbone=settings["model.backbone"],
        kind=settings["model.kind"],
        protocol=line["protocol"],
        count=line["count"] if line["split"] == "test" else 0,
    )


def newest(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The scores of the last checkpoint that was scored, by split and protocol.

    Args:
      lines: of `metrics.jsonl`.
    """
    tested = [line for line in lines if line.get("protocol")]
    last = max((line["step"] for line in tested), default=0)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in tested:
        key = line["split"], line["protocol"]
        if line["step"] == last:
            before = found.get(key, {})
            # Evaluation by hand says the same, but for the attention.
            same = all(before.get(x) == line[x] for x in ("top1", "count"))
            found[key] = {**before, **line} if same else dict(line)
    return [found[key] for key in sorted(found, key=order)]


def order(key: tuple[str, str]) -> tuple:
    """Sorts splits and protocols: test first, center first."""
    split, protocol = key
    return (split != "test", split, protocol != "center")


def recipe() -> dict[str, Any]:
    """The paper's recipe, flat."""
    config_files.make_importable()
    module = importlib.import_module("configs.cub")
    return run_directory.flatten(module.get_config().to_dict())


def time_trained(
    lines: Iterable[Mapping[str, Any]], batch_size: int
) -> tuple[float, int]:
    """Seconds that training steps took, and images that went through them.

    Evaluation, and what a stopped run has lost, are not in them.

    Args:
      lines: of `metrics.jsonl`.
      batch_size: `train.batch_size`.
    """
    seconds, step = 0.0, 0
    for line in lines:
        if line["split"] == "train":
            images = (line["step"] - step) * batch_size
            seconds += images / line["images_per_second"]
            step = line["step"]
    return seconds, step * batch_size


def classes(
    workdir: Path, scored: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The hardest classes, where what was said of each image is known.

    Args:
      workdir: the run directory.
      scored: of `newest`; the first one whose results are of the same checkpoint is
        taken.

    Returns:
      ``split``, ``protocol``, ``count`` of classes; ``rows``, the hardest first, with
      ``name``, ``right``, ``count``, ``share``, ``low``, ``high``, ``taken_for`` and
      how many ``times``; ``surest``, wrong answers of the highest confidence, with
      ``name``, ``truth``, ``said`` and ``confidence``. None where nothing is known.
    """
    for line in scored:
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
                **_hardest(results, names),
            }
    return None


def _hardest(
    results: Sequence[run_directory.Result], names: Sequence[str]
) -> dict[str, Any]:
    said = collections.defaultdict(list)
    for result in results:
        said[result.label].append(result.predicted)
    rows = []
    for label, predicted in said.items():
        right, count = predicted.count(label), len(predicted)
        wrong = collections.Counter(p for p in predicted if p != label)
        other, times = wrong.most_common(1)[0] if wrong else (None, 0)
        low, high = uncertainty.wilson(right, count)
        rows.append(
            {
                "name": _class_name(names, label),
                "right": right,
                "count": count,
                "share": right / count,
                "low": low,
                "high": high,
                "taken_for": None if other is None else _class_name(names, other),
                "times": times,
            }
        )
    rows.sort(key=lambda row: (row["share"], row["name"]))
    wrong = [result for result in results if result.predicted != result.label]
    wrong.sort(key=lambda result: -result.confidence)
    surest = [
        {
            "name": result.name,
            "truth": _class_name(names, result.label),
            "said": _class_name(names, result.predicted),
            "confidence": result.confidence,
        }
        for result in wrong[:_SUREST]
    ]
    return {"count": len(rows), "rows": rows[:_HARDEST], "surest": surest}


def _class_names(workdir: Path, step: int) -> tuple[str, ...]:
    """Of a checkpoint; none where it is gone."""
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        return ()
    with Checkpoints(folder, writable=False) as checkpoints:
        if step not in checkpoints.steps():
            return ()
        return tuple(checkpoints.meta(step)["class_names"])


def _class_name(names: Sequence[str], label: int) -> str:
    if label >= len(names):
        return f"class {label}"
    return html_page.class_words(names[label])
