"""Pretrained weights of `model.pretrained` -> arrays by name.

They come from a file of published weights, a name on the hub, the `export` directory of
a run, or a run.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cra_jax.art_module import CLASSIFICATION_STREAM, REGULARIZATION_STREAM
from cra_jax.backbones import hub, torch_files, torch_names, weight_record, weights
from cra_jax.backbones.torch_names import Key
from cra_jax.backbones.weights import CLASSIFIER, Flat, WeightFile
from cra_jax.inference import trained
from cra_jax.inference.restore import (
    classification_variables,
    has_average,
    restore_part,
)
from cra_jax.runtime.checkpoint import Checkpoints

_COLLECTIONS = ("params", "batch_stats")


class PretrainedWeights(NamedTuple):
    """Pretrained weights for a training.

    Attributes:
      name: value of `model.pretrained`.
      arrays: arrays of a plain backbone, by published or plain names
        (`families.Family`).
      place: the file, or the run and its step.
      about: description in one line.
      class_names: classes of their classifier if they come from a run; else empty.
      notes: what was left in the file, a line each.
    """

    name: str
    arrays: dict[str, np.ndarray]
    place: str
    about: str
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def open_pretrained(pretrained: str | Path, *, arch: str) -> PretrainedWeights:
    """Reads the weights that `model.pretrained` names.

    Args:
      pretrained: a file or a name, as for `hub.fetch`; a run directory, whose newest
        checkpoint provides the classification stream; or an export directory.
      arch: the expected architecture.

    Raises:
      ValueError: as `hub.fetch`, `torch_files.read` and `Checkpoints`; or the directory
        is neither a run nor an export; or the weights have another architecture.
    """
    name, folder = str(pretrained), Path(pretrained).expanduser()
    if folder.is_dir() and torch_files.index_of(folder) is None:
        place = trained.locate(folder)
        if place.is_run:
            return _open_run(name, place)
        return _open_export(name, place.folder / "model.safetensors")
    record = hub.record_of(pretrained)
    if record and record.arch != arch:
        raise ValueError(
            f"{pretrained} is a {record.arch}, but model.backbone is {arch!r}: change "
            "one of the two"
        )
    file = folder if folder.is_dir() else hub.fetch(pretrained)
    about, notes = weight_record.describe(record), []
    arrays = torch_files.read(file, notes=notes)
    return PretrainedWeights(name, arrays, str(file), about, notes=tuple(notes))


def normalization(
    pretrained: str | Path,
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std of the images that weights were trained on, if known.

    Reads no weights and does not access the hub, so that configs are checked quickly.

    Args:
      pretrained: as for `open_pretrained`; empty: no weights.

    Returns:
      Mean and std of the channels of images in 0..1; None if they are unknown, or if
      something is wrong that `open_pretrained` reports.
    """
    if not pretrained:
        return None
    if record := hub.record_of(pretrained):
        return record.mean, record.std
    path = Path(pretrained).expanduser()
    try:
        place = trained.locate(path.parent if path.is_file() else path)
        if place.is_run:
            with Checkpoints(place.folder / "checkpoints", writable=False) as found:
                meta = found.meta(found.choose(place.checkpoint or "latest"))
            about = meta["config"]["data"]
        else:
            about = json.loads((place.folder / "config.json").read_text())
        return tuple(about["mean"]), tuple(about["std"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _open_run(name: str, place: trained.Place) -> PretrainedWeights:
    """Reads the classification stream of a run's checkpoint, averaged if available."""
    with Checkpoints(place.folder / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose(place.checkpoint or "latest")
        meta, saved = checkpoints.meta(step), checkpoints.shapes(step)
        averaged = has_average(checkpoints, step)  # prediction and export use it too
        saved = saved["average"] if averaged else saved
        part = {
            collection: {
                CLASSIFICATION_STREAM: saved[collection][CLASSIFICATION_STREAM]
            }
            for collection in _COLLECTIONS
        }
        found = restore_part(checkpoints, step, part, averaged=averaged)
    variables = classification_variables(found["params"], found["batch_stats"])
    model, data = meta["config"]["model"], meta["config"]["data"]
    flat: Any = flatten_dict(variables)
    arrays = {
        torch_names.torch_name(key): torch_names.to_torch(x) for key, x in flat.items()
    }
    about = {"architecture": model["backbone"], **model, **data}
    where = f"{place.folder}, step {step}, epoch {meta['epoch']}"
    about |= {"class_names": meta["class_names"]}
    return _with_classes(name, arrays, where, about)


def _open_export(name: str, file: Path) -> PretrainedWeights:
    """Reads weights that `--mode export` wrote."""
    try:
        about = json.loads(file.with_name("config.json").read_text())
        return _with_classes(name, torch_files.read(file), str(file), about)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{file} has no config.json of an export next to it ({error!r}): export "
            "the run again, or name the file itself to use it without its classifier"
        ) from error


def _with_classes(
    name: str, arrays: dict[str, np.ndarray], place: str, about: Mapping[str, Any]
) -> PretrainedWeights:
    """Weights of a run or an export, whose classes are known."""
    names = tuple(about["class_names"])
    text = (
        f"{about['architecture']}, width {about['width']}, stem {about['stem']}, "
        f"{len(names)} classes; trained on images normalised by mean "
        f"{tuple(about['mean'])} and std {tuple(about['std'])}"
    )
    return PretrainedWeights(name, arrays, place, text, names)


STREAMS = (CLASSIFICATION_STREAM, REGULARIZATION_STREAM)


def start_from(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    pretrained: str | Path | PretrainedWeights,
    arch: str,
    class_names: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Loads the same pretrained weights into every stream.

    The attention head keeps its initial weights. So do the classifiers, unless the
    weights come from a run or an export of the same classes: the authors' code starts
    CRA-CNN from a backbone that was fine-tuned on the target dataset, including its
    classifier.

    Args:
      params: parameters of a training state, with one or both of `STREAMS`.
      batch_stats: statistics of the same state.
      pretrained: as for `open_pretrained`, or its result.
      arch: architecture of the streams.
      class_names: classes of the training; empty: equal numbers of classes count as
        the same classes.

    Returns:
      New `params` and `batch_stats`, no two of whose new arrays share memory, and lines
      that describe which arrays were loaded, which were not and which are initial.

    Raises:
      ValueError: as `open_pretrained` and `load_torch`; or the weights do not fit the
        width and stem of the streams.
    """
    filled, lines = _plan(params, batch_stats, pretrained, arch, class_names)
    new: Flat = flatten_dict({"params": dict(params), "batch_stats": dict(batch_stats)})
    # Copies, because the training step donates its buffers.
    new |= {key: jnp.array(array, copy=True) for key, array in filled.items()}
    tree = unflatten_dict(new)
    return tree["params"], tree["batch_stats"], lines


def preview(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    pretrained: str | Path | PretrainedWeights,
    arch: str,
    class_names: Sequence[str] = (),
) -> list[str]:
    """Describes in lines what `start_from` would do; the state may be abstract.

    Raises:
      ValueError: as `start_from`.
    """
    filled, lines = _plan(params, batch_stats, pretrained, arch, class_names)
    stages: dict[str, list[int]] = {}
    for (_, stream, module, *_), array in filled.items():
        stage = f"{stream}.{re.sub(r'_[0-9]+$', '', module)}"
        stages.setdefault(stage, []).append(array.size)
    rows = [(s, f"{len(n)} arrays", f"{sum(n):,} values") for s, n in stages.items()]
    return lines + [f"  {s:<32}{n:>12}{v:>20}" for s, n, v in sorted(rows)]


def _plan(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    pretrained: str | Path | PretrainedWeights,
    arch: str,
    class_names: Sequence[str],
) -> tuple[dict[Key, np.ndarray], list[str]]:
    """The arrays to load, by their paths in the state, and lines that describe them."""
    streams = [stream for stream in STREAMS if stream in params]
    if not streams:
        raise ValueError(f"params have {list(params)}, none of {', '.join(STREAMS)}")
    origin = (
        pretrained
        if isinstance(pretrained, PretrainedWeights)
        else open_pretrained(pretrained, arch=arch)
    )
    file = WeightFile.adapted(origin.arrays, arch, origin.place)
    tree: Flat = flatten_dict(
        {"params": dict(params), "batch_stats": dict(batch_stats)}
    )
    own = {(c, *k): x.shape for (c, s, *k), x in tree.items() if s == streams[0]}
    wanted = tuple(class_names) or origin.class_names
    same = bool(origin.class_names) and wanted == origin.class_names
    same = same and own["params", "fc", "bias"] == (len(wanted),)
    unused = () if same else CLASSIFIER
    expected = own if same else weights.without_classifier(own)
    found, left = weights.match_variables(
        expected, file, source=origin.place, arch=arch, unused=unused
    )
    named = [file.original_names[name] for name in CLASSIFIER if name in left]
    why = " (of other classes)" if named and origin.class_names else ""
    heads = [] if same else [f"fc of {' and '.join(streams)}"]
    heads += [name for name in params if name not in STREAMS]
    shown = "" if origin.place == origin.name else f" ({origin.place})"
    lines = [
        f"pretrained: {origin.name}{shown}",
        origin.about,
        f"{len(found)} arrays start {' and '.join(streams)}"
        + (", classifier included" if same else ""),
        f"left in the file: {', '.join(named) or 'no classifier'}{why}; "
        f"{len(left) - len(named)} counters (num_batches_tracked)",
        f"fresh: {', '.join(heads) or 'nothing'}",
        *origin.notes,
        *file.notes,
    ]
    # With shared weights, N_ar has statistics, but no parameters.
    filled = {(c, s, *k): x for s in STREAMS for (c, *k), x in found.items()}
    return {key: x for key, x in filled.items() if key in tree}, lines
