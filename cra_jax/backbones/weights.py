"""Reads and writes weight files under published names: all arrays, or an error.

Nothing is ignored silently: each array of a file is used or reported, and each variable
of the network is filled. A prefix of all names is removed, and other floating-point
numbers become float32; `WeightFile.notes` says so.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save

from cra_jax.backbones import families, torch_files
from cra_jax.backbones.torch_names import Key, counters, to_linen, to_torch, torch_name
from cra_jax.runtime import files
from cra_jax.runtime.progress import print_line

CLASSIFIER = ("fc.weight", "fc.bias")
"""Plain names of the classifier's arrays, in every family."""

_MAX_SHOWN = 8  # names of each kind of problem in an error
_MOST_PREFIXES = 5  # modules around the network

Flat = dict[Any, Any]
"""The result of `flatten_dict`, whose own type is too loose to check."""


def load_torch(
    path: str | Path, *, arch: str, num_classes: int | None = None
) -> dict[str, Any]:
    """Loads a weight file as linen variables, classifier included.

    Width and stem are those of the file. ResNets of transformers are read as V1.5 (the
    stride in the 3x3 convolution), which is its default: the file does not record it.

    Args:
      path: `.safetensors`, `.pth`, or the index of several; ResNets with the names of
        torchvision, timm or transformers, EfficientNet-Lite with those of its PyTorch
        package; also below a prefix, as in `module.conv1.weight`.
      arch: one of `families.backbones()`.
      num_classes: number of classes that the file must have; None: any number.

    Returns:
      `{"params", "batch_stats"}`, float32 arrays: the file's values, float64 rounded.
      The file's counters `num_batches_tracked` are not used. A line on standard error
      says what else was left or converted.

    Raises:
      ValueError: as `torch_files.read`; or the file does not fit the network, or holds
        NaN; one error lists all problems.
    """
    notes: list[str] = []
    file = WeightFile.adapted(torch_files.read(path, notes=notes), arch, path)
    for note in (*notes, *file.notes):
        print_line(f"{path}: {note}")
    found = file.num_classes
    if num_classes is not None and found is not None and found != num_classes:
        raise ValueError(
            f"the classifier of {path} has {found} classes, not {num_classes}: give "
            f"num_classes={found} or None"
        )
    expected = expected_shapes(arch, found or num_classes or 1, file)
    matched, _ = match_variables(expected, file, source=path, arch=arch)
    return unflatten_dict(matched)


def save_torch(path: str | Path, variables: Mapping[str, Any]) -> None:
    """Writes a network's variables under published names, whole or not at all.

    torchvision and timm (for EfficientNet-Lite, its package) load the file strictly:
    BatchNorm's counters are included, as 0.

    Args:
      path: the `.safetensors` file; its directory is made, an older file is replaced.
      variables: `{"params", "batch_stats"}` of a plain backbone, of any width or stem.

    Raises:
      ValueError: the variables are not exactly a backbone's, or not finite float32.
    """
    path = Path(path)
    flat: Flat = flatten_dict(dict(variables))
    names = [torch_name(key) for key in flat]
    arch = families.looks_like(names)
    if arch is None:
        raise ValueError(
            f"cannot write {path}: {', '.join(names[:3])}, ... are not the variables "
            f"of one of {', '.join(families.backbones())}; give the classification "
            "stream's, without anything else"
        )
    family = families.family_of(arch)
    published = [family.published_name(name) for name in names]
    arrays = dict(zip(published, map(to_torch, flat.values()), strict=True))
    file = WeightFile.of(arrays, arch, path)
    match_variables(
        expected_shapes(arch, file.num_classes or 1, file),
        file,
        source=f"what should go to {path}",
        arch=arch,
        fix="give them all, as the network has them",
    )
    zero = np.array(0, np.int64)
    arrays |= {family.published_name(n): zero.copy() for n in counters(names)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.written_atomically(path) as file:
        # transformers refuses a file that does not name the library it is for.
        file.write(save(arrays, metadata={"format": "pt"}))


class WeightFile(NamedTuple):
    """The arrays of a weight file.

    Attributes:
      arrays: by plain names (`families.Family`), with torch's shapes.
      original_names: plain name -> the file's own name.
      notes: what was left or converted, a line each.
    """

    arrays: dict[str, np.ndarray]
    original_names: dict[str, str]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, arrays: Mapping[str, np.ndarray], arch: str, source: str | Path
    ) -> "WeightFile":
        """Renames the arrays of a file to plain names.

        Args:
          arrays: by published or plain names.
          arch: one of `families.backbones()`, whose family knows the names.
          source: where the arrays come from, for errors.

        Raises:
          ValueError: the architecture is unknown, or two names are the same array's.
        """
        family = families.family_of(arch)
        file = cls({}, {})
        for name, array in arrays.items():
            plain = family.plain_name(name)
            if plain in file.arrays:
                raise ValueError(
                    f"two arrays of {source} stand for {plain}: "
                    f"{file.original_names[plain]} and {name}; keep one of them"
                )
            file.arrays[plain], file.original_names[plain] = array, name
        return file

    @classmethod
    def adapted(
        cls, arrays: Mapping[str, np.ndarray], arch: str, source: str | Path
    ) -> "WeightFile":
        """As `of`, for files of other origin.

        A prefix of the network's names is removed (`module.`, `model.`, `backbone.`,
        ...), and arrays without it are left out. A classifier `fc.1` becomes `fc`, and
        floating-point numbers become float32.

        Raises:
          ValueError: as `of`, or there are networks below several prefixes.
        """
        notes = []
        prefix = _prefix(arrays, source)
        left = [name for name in arrays if not name.startswith(prefix)]
        if prefix:
            notes.append(f"the prefix {prefix} was removed from all names")
        if left:
            notes.append(_list_names("left in the file", left))
        inside = {n: array for n, array in arrays.items() if n.startswith(prefix)}
        short = {name.removeprefix(prefix): array for name, array in inside.items()}
        file = cls.of(short, arch, source)
        originals = dict(zip(short, inside, strict=True))
        kinds = {x.dtype.name for x in short.values()}
        kinds &= {"float16", "bfloat16", "float64"}
        if kinds:
            lost = " with fewer digits" * (kinds != {"float64"})
            stored = " and ".join(sorted(kinds))
            notes.append(f"stored as {stored}{lost}, converted to float32")
        found = cls({}, {}, tuple(notes))
        last = [n for n in file.arrays if re.fullmatch(r"fc\.\d+\.weight", n)]
        for name, array in file.arrays.items():
            plain = name
            if len(last) == 1 and "fc.weight" not in file.arrays:
                plain = re.sub(r"^fc\.\d+\.", "fc.", name)
            if array.dtype.name in kinds:
                with np.errstate(over="ignore"):  # reported as not finite
                    array = array.astype(np.float32)
            found.arrays[plain] = array
            found.original_names[plain] = originals[file.original_names[name]]
        return found

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the classifier; None: there is no classifier."""
        kernel = self.arrays.get(CLASSIFIER[0])
        return kernel.shape[0] if kernel is not None and kernel.ndim else None


def _prefix(names: Iterable[str], source: str | Path) -> str:
    """The prefix below which the names are those of a network; empty if there is none.

    Raises:
      ValueError: there are networks below several prefixes.
    """
    level = {"": list(names)}
    for _ in range(_MOST_PREFIXES):
        found = [p for p, inside in level.items() if families.looks_like(inside)]
        if len(found) > 1:
            raise ValueError(
                f"{source} has several networks, below {', '.join(sorted(found))}; "
                "save one of them"
            )
        if found:
            return found[0]
        below: dict[str, list[str]] = {}
        for prefix, inside in level.items():
            for name in inside:
                first, dot, rest = name.partition(".")
                if dot:
                    below.setdefault(f"{prefix}{first}.", []).append(rest)
        # A network has more arrays than this, so there are few prefixes.
        level = {p: inside for p, inside in below.items() if len(inside) > 9}
    return ""


def expected_shapes(
    arch: str, num_classes: int, file: WeightFile
) -> dict[Key, tuple[int, ...]]:
    """Shapes of the variables of the network that a file is for.

    Args:
      arch: one of `families.backbones()`.
      num_classes: number of classes of the network.
      file: its arrays give width and stem.

    Returns:
      Path of each variable -> its shape in linen.

    Raises:
      ValueError: the architecture is unknown.
    """
    options = families.family_of(arch).size_options(file.arrays)
    network = families.create_backbone(arch, num_classes, **options)
    leaves: Flat = flatten_dict(families.variable_shapes(network, 32))
    return {key: leaf.shape for key, leaf in leaves.items()}


def without_classifier(expected: Mapping[Key, Any]) -> dict[Key, Any]:
    """A copy of a mapping by variable paths without the classifier's entries."""
    return {key: value for key, value in expected.items() if key[1] != "fc"}


def match_variables(
    expected: Mapping[Key, tuple[int, ...]],
    file: WeightFile,
    *,
    source: str | Path,
    arch: str,
    unused: Iterable[str] = (),
    fix: str = (
        "choose the backbone, width and stem that it was trained with, or another file"
    ),
) -> tuple[dict[Key, np.ndarray], tuple[str, ...]]:
    """Matches the arrays of a file to the variables of a network.

    Args:
      expected: path of each variable -> its shape in linen.
      file: the arrays.
      source: where they come from, for errors.
      arch: one of `families.backbones()`.
      unused: plain names of arrays that the file may have besides; BatchNorm's counters
        always may.
      fix: what to do, for errors.

    Returns:
      Path of each variable -> its array with linen's shape; plain names of the arrays
      that the file has besides.

    Raises:
      ValueError: an array is missing, unknown, of another shape, not float32 or not
        finite; the message lists all of them.
    """
    published_name = families.family_of(arch).published_name
    keys = {torch_name(key): key for key in expected}
    allowed = {*unused, *counters(keys)}
    left = tuple(name for name in file.arrays if name in allowed)
    matched: dict[Key, np.ndarray] = {}
    missing = sorted(keys.keys() - file.arrays.keys())
    unknown = [n for n in file.arrays if n not in keys and n not in allowed]
    problems: dict[str, list[str]] = {
        "missing": [published_name(name) for name in missing],
        "unknown": [file.original_names[name] for name in unknown],
        "of another shape": [],
        "not float32": [],
        "not finite": [],
    }
    shape_problems, dtype_problems, value_problems = list(problems.values())[2:]
    for plain in (name for name in file.arrays if name in keys):
        key, name = keys[plain], file.original_names[plain]
        matched[key] = array = to_linen(file.arrays[plain])
        if array.shape != expected[key]:
            wanted = to_torch(np.empty(expected[key], "b")).shape
            shape_problems.append(f"{name} {file.arrays[plain].shape}, not {wanted}")
        if array.dtype != np.float32:
            dtype_problems.append(f"{name} {array.dtype}")
        elif not np.isfinite(array).all():
            value_problems.append(name)
    if any(problems.values()):
        lines = [_list_names(kind, names) for kind, names in problems.items() if names]
        like = families.looks_like(file.original_names.values())
        hint = f" (it looks like a {like})" if like and like != arch else ""
        raise ValueError(
            f"{source} does not fit {arch}{hint}; {fix}:\n  " + "\n  ".join(lines)
        )
    return matched, left


def _list_names(kind: str, names: list[str]) -> str:
    more = len(names) - _MAX_SHOWN
    shown = ", ".join(names[:_MAX_SHOWN]) + (f", and {more} more" if more > 0 else "")
    return f"{len(names)} {kind}: {shown}"
