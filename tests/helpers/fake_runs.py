"""Run directories without training, to test reports and study pages."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.cub import get_config
from cra_jax.runtime import run_directory


def make(
    workdir: Path,
    *,
    variant: str = "",
    right: int = 7,
    labels: tuple[int, ...] = (0, 1) * 5,
    seed: int = 0,
    scores: dict[str, Any] | None = None,
    changes: dict[str, Any] | None = None,
    digests: Sequence[str] | None = None,
    folder: str = "test",
) -> Path:
    """Writes a run directory whose network classifies `right` images correctly.

    Args:
      workdir: the run directory.
      variant: the variant of `configs/cub.py`.
      right: the number of correct images, counted from the first.
      labels: the labels of all images, of 2 classes.
      seed: the seed of the run.
      scores: further fields of the metrics line of the test split.
      changes: config keys and values, as {"train.epochs": 3}.
      digests: of the images; None: the same in each run.
      folder: the folder in the images' names.
    """
    workdir.mkdir(parents=True)
    config = get_config(variant)
    config.update_from_flattened_dict(
        {"train.epochs": 2, "seed": seed, **(changes or {})}
    )
    run_directory.keep_config(workdir, config.to_dict())
    for step in (10, 20):
        train = {"step": step, "epoch": step // 10, "split": "train", "loss": 1.0}
        run_directory.append_metrics(workdir, train | {"images_per_second": 64.0})
    line = {"step": 20, "epoch": 2, "split": "test", "protocol": "center"}
    top1 = right / len(labels)
    line |= {"top1": top1, "top5": 1.0, "mean_per_class": top1, "count": len(labels)}
    run_directory.append_metrics(workdir, line | (scores or {}))
    results = [
        run_directory.Result(
            index=i,
            name=f"{folder}/{i:03}.jpg",
            label=label,
            predicted=label if i < right else 1 - label,
            confidence=0.5 + i / 100,
            step=20,
            digest=f"{i:016x}" if digests is None else digests[i],
        )
        for i, label in enumerate(labels)
    ]
    run_directory.write_results(workdir, "test", "center", results)
    return workdir


def write_start(workdir: Path, **changes: Any) -> None:
    """Adds a start to a run's `provenance.json`."""
    path = workdir / "provenance.json"
    starts = json.loads(path.read_text())["starts"] if path.is_file() else []
    start = {
        "started": "2026-01-01T10:00:00+00:00",
        "ended": "2026-01-01T12:05:00+00:00",
        "outcome": "finished",
        "first_step": 0,
        "command": "python launch.py",
        "code": {"commit": "a" * 40, "changed": []},
        "versions": {"python": "3.11.0", "jax": "0.10.2"},
        "system": "Linux x86_64, 8 cores",
        "devices": "8 x test",
    }
    path.write_text(json.dumps({"starts": [*starts, start | changes]}))
