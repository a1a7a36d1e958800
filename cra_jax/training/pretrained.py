"""What `model.pretrained` may name -> arrays by name.

A file of published weights, a name on the hub, the `export` folder of a run, or a run.
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


def open_pretrained(pretrained: str | Path, *, arch: str) -> PretrainedWeights:
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
    if folder.is_dir():
        place = trained.locate(folder)
        if place.is_run:
            return _open_run(name, place)
        return _open_export(name, place.folder / "model.safetensors")
    record = hub.record_of(pretrained)
    if record and record.arch != arch:
        raise ValueError(
            f"{pretrained} is a {record.arch}, and model.backbone is {arch!r}: change "
            "one of the two"
        )
    file = hub.fetch(pretrained)
    about = weight_record.describe(record)
    return PretrainedWeights(name, torch_files.read(file), str(file), about)


def normalization(
    pretrained: str | Path,
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and std of the pictures that weights were trained on, where that is known.

    Reads no weights and asks no hub, so that it can be said before any work is done.

    Args:
      pretrained: as for `open_pretrained`; empty: no weights.

    Returns:
      Of the channels, pictures in 0..1; None where nobody says, or where there is
      something wrong that `open_pretrained` will name.
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
    """The classification stream of a run's checkpoint, averaged if it is."""
    with Checkpoints(place.folder / "checkpoints", writable=False) as checkpoints:
        step = checkpoints.choose(place.checkpoint or "latest")
        meta, saved = checkpoints.meta(step), checkpoints.shapes(step)
        averaged = has_average(checkpoints, step)  # what predicts, and what is exported
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
    return _own(name, arrays, where, about | {"class_names": meta["class_names"]})


def _open_export(name: str, file: Path) -> PretrainedWeights:
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
) -> PretrainedWeights:
    """Weights that were trained here."""
    names = tuple(about["class_names"])
    text = (
        f"{about['architecture']}, width {about['width']}, stem {about['stem']}, "
        f"{len(names)} classes; trained on pictures normalised by mean "
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
    """Starts every stream from the same weights; Gamma's head stays.

    So do the classifiers, unless the weights come from a run or an export of the same
    classes: the authors' code starts CRA-CNN from a backbone that was already
    fine-tuned on the target set, classifier included.

    Args:
      params: a training state's, with one or both of `STREAMS`.
      batch_stats: the same state's.
      pretrained: as for `pretrained.open_pretrained`, or what that has read.
      arch: the streams' architecture.
      class_names: of the training to come; empty: classes that are as many are the
        same.

    Returns:
      New `params` and `batch_stats`, no two of whose new arrays share memory, and lines
      that say what was used, what was left and what stays fresh.

    Raises:
      ValueError: as `open_pretrained` and `load_torch`; the file must fit the streams'
        width and stem, too.
    """
    filled, lines = _plan(params, batch_stats, pretrained, arch, class_names)
    new: Flat = flatten_dict({"params": dict(params), "batch_stats": dict(batch_stats)})
    # Copies: the training step gives its buffers away.
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
    """What `start_from` would do, line by line; the state may be abstract.

    Raises:
      ValueError: what `start_from` would.
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
    """The arrays that a state gets, by their path in it, and lines that say so."""
    streams = [stream for stream in STREAMS if stream in params]
    if not streams:
        raise ValueError(f"params hold {list(params)}, none of {', '.join(STREAMS)}")
    origin = (
        pretrained
        if isinstance(pretrained, PretrainedWeights)
        else open_pretrained(pretrained, arch=arch)
    )
    file = WeightFile.of(origin.arrays, arch, origin.place)
    tree: Flat = flatten_dict(
        {"params": dict(params), "batch_stats": dict(batch_stats)}
    )
    own = {(c, *k): x.shape for (c, s, *k), x in tree.items() if s == streams[0]}
    wanted = tuple(class_names) or origin.class_names
    same = bool(origin.class_names) and wanted == origin.class_names
    same = same and own["params", "fc", "bias"] == (len(wanted),)
    leave = () if same else CLASSIFIER
    expected = own if same else weights.without_classifier(own)
    found, left = weights.match_variables(
        expected, file, source=origin.place, arch=arch, unused=leave
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
    ]
    return {(c, s, *k): x for s in streams for (c, *k), x in found.items()}, lines
