"""What `model.pretrained` may name -> arrays by name.

A file of published weights, a name on the hub, the `export` folder of a run, or a run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from cra_jax import hub, torch_files, torch_names, weight_record
from cra_jax.checkpoint import Checkpoints

_STREAM = "classification_stream"
_COLLECTIONS = ("params", "batch_stats")


class Origin(NamedTuple):
    """Weights that a training may start from.

    Attributes:
      name: what `model.pretrained` said.
      arrays: of a plain backbone, by published or plain names (`families.Family`).
      place: the file, or the run and its step.
      about: what is known of them, in one line.
      class_names: what their classifier knows, if it is a run's own; else empty.
    """

    name: str
    arrays: dict[str, np.ndarray]
    place: str
    about: str
    class_names: tuple[str, ...] = ()


def open_origin(pretrained: str | Path, *, arch: str) -> Origin:
    """Reads what `model.pretrained` names.

    Args:
      pretrained: a file or a name, as for `hub.fetch`; a run folder, of whose newest
        checkpoint the classification stream is read; or what `--mode export` wrote.
      arch: what it should be.

    Raises:
      ValueError: as `hub.fetch`, `torch_files.read` and `Checkpoints`; the folder is of
        another kind, or the record speaks of another architecture.
    """
    name, folder = str(pretrained), Path(pretrained).expanduser()
    if _is_run(folder):
        return _open_run(name, folder)
    if (file := folder / "model.safetensors").is_file():
        return _open_export(name, file)
    if folder.is_dir():
        raise ValueError(
            f"{folder} is neither a run (no checkpoints/ in it) nor an export (no "
            "model.safetensors): name one of those, or a file of weights"
        )
    record = hub.record_of(pretrained)
    if record and record.arch != arch:
        raise ValueError(
            f"{pretrained} is a {record.arch}, and model.backbone is {arch!r}: change "
            "one of the two"
        )
    file = hub.fetch(pretrained)
    about = weight_record.describe(record)
    return Origin(name, torch_files.read(file), str(file), about)


def normalization(
    pretrained: str | Path,
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std of the pictures that weights were trained on, where that is known.

    Reads no weights and asks no hub, so that it can be said before any work is done.

    Args:
      pretrained: as for `open_origin`; empty: no weights.

    Returns:
      Of the channels, pictures in 0..1; None where nobody says, or where there is
      something wrong that `open_origin` will name.
    """
    if not pretrained:
        return None
    if record := hub.record_of(pretrained):
        return record.mean, record.std
    path = Path(pretrained).expanduser()
    try:
        if _is_run(path):
            with Checkpoints(path / "checkpoints", writable=False) as checkpoints:
                meta = checkpoints.meta(checkpoints.choose("latest"))
            about = meta["config"]["data"]
        else:
            folder = path.parent if path.is_file() else path
            about = json.loads((folder / "config.json").read_text())
        return tuple(about["mean"]), tuple(about["std"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _is_run(folder: Path) -> bool:
    return (folder / "checkpoints").is_dir()


def _open_run(name: str, folder: Path) -> Origin:
    """The classification stream of a run's newest checkpoint, averaged if it is."""
    with Checkpoints(folder / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose("latest")
        meta, saved = checkpoints.meta(step), checkpoints.shapes(step)
        averaged = "average" in saved  # what predicts, and what an export holds
        saved = saved["average"] if averaged else saved
        part = {c: {_STREAM: saved[c][_STREAM]} for c in _COLLECTIONS}
        found = checkpoints.restore(step, {"average": part} if averaged else part)
        found = found["average"] if averaged else found
    model, data = meta["config"]["model"], meta["config"]["data"]
    flat: Any = flatten_dict({c: found[c][_STREAM] for c in _COLLECTIONS})
    arrays = {
        torch_names.torch_name(key): torch_names.to_torch(x) for key, x in flat.items()
    }
    about = {"architecture": model["backbone"], **model, **data}
    place = f"{folder}, step {step}, epoch {meta['epoch']}"
    return _own(name, arrays, place, about | {"class_names": meta["class_names"]})


def _open_export(name: str, file: Path) -> Origin:
    """What `--mode export` wrote."""
    try:
        about = json.loads(file.with_name("config.json").read_text())
        return _own(name, torch_files.read(file), str(file), about)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} has no config.json of an export beside it ({error!r}): export the "
            "run again, or name the file itself to leave its classifier"
        ) from error


def _own(
    name: str, arrays: dict[str, np.ndarray], place: str, about: Mapping[str, Any]
) -> Origin:
    """Weights that were trained here."""
    names = tuple(about["class_names"])
    text = (
        f"{about['architecture']}, width {about['width']}, stem {about['stem']}, "
        f"{len(names)} classes; trained on pictures normalised by mean "
        f"{tuple(about['mean'])} and std {tuple(about['std'])}"
    )
    return Origin(name, arrays, place, text, names)
