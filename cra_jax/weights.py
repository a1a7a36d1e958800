"""Weights in and out: ResNets of torchvision, timm and transformers; all or an error.

Names are torchvision's (timm's ResNets bear the same); those of EfficientNet-Lite are
their PyTorch package's, less the underscores. Nothing is skipped in silence: each array
of a file is used or named as left, and each parameter is filled.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from cra_jax import efficientnet, origins, resnet
from cra_jax.torch_names import Key, counters, to_linen, to_torch, torch_name

STREAMS = ("classification_stream", "regularization_stream")
_ARCHITECTURES = (*resnet.ARCHITECTURES, *efficientnet.ARCHITECTURES)
_CLASSIFIER = ("fc.weight", "fc.bias")
_SHOWN = 8  # names of each kind of problem in an error

Flat = dict[Any, Any]  # what flatten_dict gives, too loosely typed to check


def load_torch(
    path: str | Path, *, arch: str, num_classes: int | None = None
) -> dict[str, Any]:
    """A file's weights as linen variables, classifier included.

    Width and stem are those of the file. Transformers' ResNets are read as V1.5, the
    stride in the 3x3 convolution, as theirs are by default: weights do not tell.

    Args:
      path: `.safetensors` or `.pth`, in torchvision's, timm's or transformers' names.
      arch: a key of some family's `ARCHITECTURES`.
      num_classes: how many classes the file must know; None: as many as it does.

    Returns:
      `{"params", "batch_stats"}`, float32 arrays, exactly the file's values. Its
      counters `num_batches_tracked` are left: nothing here has a use for them.

    Raises:
      ValueError: as `torch_files.read`; or the file is not this network's, is rounded
        to half precision, or holds NaN; one error lists all that is wrong.
    """
    arrays = origins.read(path)
    known = _rows(arrays, "fc.weight")
    if num_classes is not None and known is not None and known != num_classes:
        raise ValueError(
            f"the classifier of {path} knows {known} classes, not {num_classes}: give "
            f"num_classes={known} or None, or take the rest of it by load_trunk"
        )
    expected = _expected(arch, known or num_classes or 1, arrays)
    filled, _ = _fill(expected, arrays, path=path, arch=arch)
    return unflatten_dict(filled)


def load_trunk(
    path: str | Path, *, arch: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A file's weights without the classifier, which may be of any size or absent.

    Args:
      path: as for `load_torch`.
      arch: as for `load_torch`.

    Returns:
      `{"params", "batch_stats"}` without `fc`, and the names of the file's arrays that
      were left: the classifier's, and the counters.

    Raises:
      ValueError: as `load_torch`.
    """
    arrays = origins.read(path)
    expected = _without_classifier(_expected(arch, 1, arrays))
    filled, left = _fill(expected, arrays, path=path, arch=arch, leave=_CLASSIFIER)
    return unflatten_dict(filled), left


def save_torch(path: str | Path, variables: Mapping[str, Any]) -> None:
    """Writes a network's variables under torch's names, whole or not at all.

    torchvision's class (for EfficientNet-Lite its package's) loads the file strictly:
    BatchNorm's counters are there, as 0.

    Args:
      path: the `.safetensors` file; its folder is made, what was there is replaced.
      variables: `{"params", "batch_stats"}` of a plain backbone, of any width or stem.

    Raises:
      ValueError: the variables are not exactly a backbone's, or not finite float32.
    """
    path = Path(path)
    flat: Flat = flatten_dict(dict(variables))
    arrays = origins.unique((torch_name(key), to_torch(x)) for key, x in flat.items())
    arch = _looks_like(arrays)
    if arch is None:
        raise ValueError(
            f"cannot write {path}: {', '.join(list(arrays)[:3])}, ... are "
            f"not the variables of one of {', '.join(_ARCHITECTURES)}; give the "
            "classification stream's, without anything else"
        )
    expected = _expected(arch, _rows(arrays, "fc.weight") or 1, arrays)
    cure = "give them all, as the network has them"
    _fill(expected, arrays, path=f"what should go to {path}", arch=arch, cure=cure)
    arrays |= {name: np.array(0, np.int64) for name in counters(arrays)}
    if arch in efficientnet.ARCHITECTURES:
        arrays = {efficientnet.published_name(n): x for n, x in arrays.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        # transformers refuses a file that does not say which library it is for.
        save_file(arrays, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def start_from(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    *,
    pretrained: str | Path,
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
      pretrained: as for `origins.open_origin`.
      arch: the streams' architecture.
      class_names: of the training to come; empty: classes that are as many are the
        same.

    Returns:
      New `params` and `batch_stats`, no two of whose new arrays share memory, and lines
      that say what was used, what was left and what stays fresh.

    Raises:
      ValueError: as `origins.open_origin` and `load_torch`; the file must fit the
        streams' width and stem, too.
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
    pretrained: str | Path,
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
    pretrained: str | Path,
    arch: str,
    class_names: Sequence[str],
) -> tuple[dict[Key, np.ndarray], list[str]]:
    """The arrays that a state gets, by their path in it, and lines that say so."""
    streams = [stream for stream in STREAMS if stream in params]
    if not streams:
        raise ValueError(f"params hold {list(params)}, none of {', '.join(STREAMS)}")
    origin = origins.open_origin(pretrained, arch=arch)
    tree: Flat = flatten_dict(
        {"params": dict(params), "batch_stats": dict(batch_stats)}
    )
    own = {(c, *k): x.shape for (c, s, *k), x in tree.items() if s == streams[0]}
    wanted = tuple(class_names) or origin.class_names
    same = bool(origin.class_names) and wanted == origin.class_names
    same = same and own["params", "fc", "bias"] == (len(wanted),)
    leave = () if same else _CLASSIFIER
    expected = own if same else _without_classifier(own)
    found, left = _fill(
        expected, origin.arrays, path=origin.place, arch=arch, leave=leave
    )
    named = [name for name in _CLASSIFIER if name in left]
    why = " (of other classes)" if named and origin.class_names else ""
    heads = [] if same else [f"fc of {' and '.join(streams)}"]
    heads += [name for name in params if name not in STREAMS]
    shown = "" if origin.place == str(pretrained) else f" ({origin.place})"
    lines = [
        f"pretrained: {pretrained}{shown}",
        origin.about,
        f"{len(found)} arrays start {' and '.join(streams)}"
        + (", classifier included" if same else ""),
        f"left in the file: {', '.join(named) or 'no classifier'}{why}; "
        f"{len(left) - len(named)} counters (num_batches_tracked)",
        f"fresh: {', '.join(heads) or 'nothing'}",
    ]
    return {(c, s, *k): x for s in streams for (c, *k), x in found.items()}, lines


def _rows(arrays: Mapping[str, np.ndarray], name: str) -> int | None:
    """How many outputs a layer has, if it is there at all."""
    array = arrays.get(name)
    return array.shape[0] if array is not None and array.ndim else None


def _looks_like(names: Iterable[str]) -> str | None:
    """The architecture with just these blocks."""
    names = list(names)
    if arch := efficientnet.looks_like(names):
        return arch
    found = {m[0] for name in names if (m := re.match(r"layer\d+\.\d+\.", name))}
    bottleneck = any(name.endswith(".conv3.weight") for name in names)
    for arch, (blocks, is_bottleneck) in resnet.ARCHITECTURES.items():
        wanted = {f"layer{s}.{i}." for s, n in enumerate(blocks, 1) for i in range(n)}
        if (found, bottleneck) == (wanted, is_bottleneck):
            return arch
    return None


def _expected(
    arch: str, num_classes: int, arrays: Mapping[str, np.ndarray]
) -> dict[Key, tuple[int, ...]]:
    """Path and shape of each variable; width and stem are those of the arrays."""
    if arch not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise ValueError(f"unknown arch {arch!r}; choose from {known}")
    if arch in efficientnet.ARCHITECTURES:
        model = efficientnet.create(arch, num_classes)
    else:
        conv1 = arrays.get("conv1.weight")
        size = conv1.shape[-1] if conv1 is not None and conv1.ndim == 4 else 7
        model = resnet.create(
            arch,
            num_classes,
            width=_rows(arrays, "conv1.weight") or 64,
            stem="imagenet" if size == 7 else "small",  # "medium" has the same shapes
        )
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    leaves: Flat = flatten_dict(
        dict(jax.eval_shape(model.init, jax.random.key(0), images))
    )
    return {key: leaf.shape for key, leaf in leaves.items()}


def _without_classifier(expected: Mapping[Key, Any]) -> dict[Key, Any]:
    return {key: shape for key, shape in expected.items() if key[1] != "fc"}


def _fill(
    expected: Mapping[Key, tuple[int, ...]],
    arrays: Mapping[str, np.ndarray],
    *,
    path: str | Path,
    arch: str,
    leave: Iterable[str] = (),
    cure: str = (
        "choose the backbone, width and stem that it was trained with, or another file"
    ),
) -> tuple[dict[Key, np.ndarray], tuple[str, ...]]:
    """An array for each expected variable, and the names of those that were left.

    Raises:
      ValueError: anything is missing, left over, or not as it should be.
    """
    keys = {torch_name(key): key for key in expected}
    may_stay = {*leave, *counters(keys)}
    left = tuple(name for name in arrays if name in may_stay)
    filled: dict[Key, np.ndarray] = {}
    problems: dict[str, list[str]] = {
        "missing": sorted(keys.keys() - arrays.keys()),
        "unknown": [n for n in arrays if n not in keys and n not in may_stay],
        "of another shape": [],
        "not float32 (half precision has lost digits; take the float32 file)": [],
        "not finite": [],
    }
    shape_problems, dtype_problems, value_problems = list(problems.values())[2:]
    for name in (name for name in arrays if name in keys):
        key, array = keys[name], to_linen(arrays[name])
        filled[key] = array
        if array.shape != expected[key]:
            wanted = to_torch(np.empty(expected[key], "b")).shape
            shape_problems.append(f"{name} {arrays[name].shape}, not {wanted}")
        if array.dtype != np.float32:
            dtype_problems.append(f"{name} {array.dtype}")
        elif not np.isfinite(array).all():
            value_problems.append(name)
    if any(problems.values()):
        lines = [_listed(kind, names) for kind, names in problems.items() if names]
        like = _looks_like(arrays)
        hint = f" (it looks like a {like})" if like and like != arch else ""
        raise ValueError(
            f"{path} does not fit {arch}{hint}; {cure}:\n  " + "\n  ".join(lines)
        )
    return filled, left


def _listed(kind: str, names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}"
