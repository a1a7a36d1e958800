"""Converts names and shapes of arrays between torch and linen.

Names are plain names, which `families.Family` defines; each family converts those of
its published files.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

Key = tuple[str, ...]
"""A variable's path in linen, its collection first."""

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}


def torch_name(key: Key) -> str:
    """`("params", "layer1_0", "bn1", "scale")` -> `layer1.0.bn1.weight`."""
    _, *modules, leaf = key
    # Flax names the members of a list layer1_0, layer1_1, ...; torch has a dot there.
    modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*modules, _LEAVES.get(leaf, leaf)])


def to_torch(array: Any) -> np.ndarray:
    """Linen's `HWIO` and `IO` kernels as torch's `OIHW` and `OI`; vectors stay."""
    array = np.asarray(array)
    order = (3, 2, 0, 1) if array.ndim == 4 else None
    return np.ascontiguousarray(array.transpose(order))


def to_linen(array: np.ndarray) -> np.ndarray:
    """Torch's `OIHW` and `OI` kernels as linen's `HWIO` and `IO`; vectors stay."""
    order = (2, 3, 1, 0) if array.ndim == 4 else None
    return np.ascontiguousarray(array.transpose(order))


def counters(names: Iterable[str]) -> list[str]:
    """Names of the counters of the BatchNorm layers among these names."""
    means = [name for name in names if name.endswith(".running_mean")]
    return [n.replace(".running_mean", ".num_batches_tracked") for n in means]
