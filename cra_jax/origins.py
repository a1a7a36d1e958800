"""What `model.pretrained` may name -> arrays under the names that are used here.

A file of published weights, a name on the hub, the `export` folder of a run, or a run.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from cra_jax import efficientnet, hub, torch_files, torch_names
from cra_jax.checkpoint import Checkpoints

_STREAM = "classification_stream"
_COLLECTIONS = ("params", "batch_stats")


class Origin(NamedTuple):
    """Weights that a training may start from.

    Attributes:
      arrays: of a plain backbone, by torch's names.
      place: the file, or the run and its step.
      about: what is known of them, in one line.
      class_names: what their classifier knows, if it is a run's own; else empty.
    """

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
    folder = Path(pretrained).expanduser()
    if (folder / "checkpoints").is_dir():
        return _open_run(folder)
    if (file := folder / "model.safetensors").is_file():
        return _open_export(file)
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
    return Origin(read(file), str(file), hub.describe(record))


def _open_run(folder: Path) -> Origin:
    """The classification stream of a run's newest checkpoint."""
    with Checkpoints(folder / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose("latest")
        meta, saved = checkpoints.meta(step), checkpoints.shapes(step)
        part = {c: {_STREAM: saved[c][_STREAM]} for c in _COLLECTIONS}
        found = checkpoints.restore(step, part)
    flat: Any = flatten_dict({c: found[c][_STREAM] for c in _COLLECTIONS})
    arrays = {
        torch_names.torch_name(key): torch_names.to_torch(x) for key, x in flat.items()
    }
    model, data = meta["config"]["model"], meta["config"]["data"]
    about = {"architecture": model["backbone"], **model, **data}
    place = f"{folder}, step {step}, epoch {meta['epoch']}"
    return _own(arrays, place, about | {"class_names": meta["class_names"]})


def _open_export(file: Path) -> Origin:
    """What `--mode export` wrote."""
    try:
        about = json.loads(file.with_name("config.json").read_text())
        return _own(read(file), str(file), about)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} has no config.json of an export beside it ({error!r}): export the "
            "run again, or name the file itself to leave its classifier"
        ) from error


def _own(arrays: dict[str, np.ndarray], place: str, about: Mapping[str, Any]) -> Origin:
    """Weights that were trained here."""
    names = tuple(about["class_names"])
    text = (
        f"{about['architecture']}, width {about['width']}, stem {about['stem']}, "
        f"{len(names)} classes; data.mean and data.std must be what it was trained on: "
        f"{tuple(about['mean'])} and {tuple(about['std'])}"
    )
    return Origin(arrays, place, text, names)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """A file's arrays by torchvision's names, whoever's it has.

    Raises:
      ValueError: as `torch_files.read`, or two of them get the same name.
    """
    arrays = torch_files.read(path)
    renamed = {
        n: efficientnet.plain_name(torch_names.from_transformers(n)) for n in arrays
    }
    return unique((renamed[name], x) for name, x in arrays.items())


def unique(pairs: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The pairs as a dict.

    Raises:
      ValueError: two have the same name.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, array in pairs:
        if name in arrays:
            raise ValueError(f"two arrays stand for {name}: keep one of them")
        arrays[name] = array
    return arrays
