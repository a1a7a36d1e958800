"""ResNet with torchvision's numerics, so that its weights give the same scores.

Padding is explicit (Flax's "SAME" differs from torch's on even sizes), the bottleneck
strides in its 3x3 convolution, and BatchNorm keeps torch's unbiased running variance.
Names follow torchvision: `conv1`, `bn1`, `layer1_0`, `downsample_conv`, `fc`.

Images are cast once to the compute dtype, and every layer follows the dtype of its
input: convolutions and activations run in the compute dtype, statistics, pooling and
scores in at least float32. Parameters are kept in float32. float64 images are computed
in float64 whatever the compute dtype, so a gradient check needs only float64 arrays.

`families.py` documents what every family provides.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cra_jax.backbones.batch_norm import BatchNorm
from cra_jax.backbones.convolutions import Conv
from cra_jax.backbones.layers import (
    Outputs,
    at_least_float32,
    check_images,
    linear,
    mask,
    relu,
    run_block,
    shrink,
)
from cra_jax.backbones.max_pooling import max_pool
from cra_jax.backbones.options import BackboneOptions, check_architecture
from cra_jax.backbones.weight_record import WeightRecord


class Architecture(NamedTuple):
    """Blocks of each of the four stages, and whether they are bottlenecks."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool


ARCHITECTURES = {
    "resnet10": Architecture((1, 1, 1, 1), bottleneck=False),
    "resnet18": Architecture((2, 2, 2, 2), bottleneck=False),
    "resnet34": Architecture((3, 4, 6, 3), bottleneck=False),
    "resnet50": Architecture((3, 4, 6, 3), bottleneck=True),
    "resnet101": Architecture((3, 4, 23, 3), bottleneck=True),
    "resnet152": Architecture((3, 8, 36, 3), bottleneck=True),
}


def _torchvision(
    arch: str, file: str, imagenet_top1: float, resize_px: int
) -> WeightRecord:
    return WeightRecord(
        arch,
        f"{arch}-{file}.pth",
        imagenet_top1,
        resize_px,
        crop_px=224,
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        licence="BSD-3-Clause",
        source="https://github.com/pytorch/vision",
        mirror="https://download.pytorch.org/models/",
    )


PUBLISHED = {
    "timm/resnet18.tv_in1k": _torchvision("resnet18", "f37072fd", 69.758, 256),
    "timm/resnet34.tv_in1k": _torchvision("resnet34", "b627a593", 73.314, 256),
    "timm/resnet50.tv_in1k": _torchvision("resnet50", "0676ba61", 76.130, 256),
    "timm/resnet50.tv2_in1k": _torchvision("resnet50", "11ad3fa6", 80.858, 232),
    "timm/resnet101.tv_in1k": _torchvision("resnet101", "63fe2227", 77.374, 256),
    "timm/resnet101.tv2_in1k": _torchvision("resnet101", "cd907fc2", 81.886, 232),
    "timm/resnet152.tv_in1k": _torchvision("resnet152", "394f9c45", 78.312, 256),
    "timm/resnet152.tv2_in1k": _torchvision("resnet152", "f82ba261", 82.284, 232),
}

STEMS = ("imagenet", "medium", "small")
_STEM_CONVOLUTIONS = {"imagenet": (7, 2), "medium": (3, 2), "small": (3, 1)}
_STRIDES_PX = {"imagenet": 32, "medium": 16, "small": 8}


class Block(nn.Module):
    """Residual block: 3x3, 3x3; a bottleneck: 1x1, 3x3, 1x1 and 4x the channels."""

    features: int
    stride: int
    bottleneck: bool
    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, extent_px: jax.Array | None
    ) -> jax.Array:
        """Maps `[b, h, w, c]`; `extent_px` is the valid part of `x`."""
        wide = self.features * (4 if self.bottleneck else 1)
        plain = [(3, self.features, self.stride), (3, self.features, 1)]
        narrow = [(1, self.features, 1), (3, self.features, self.stride), (1, wide, 1)]
        y = x
        layers = enumerate(narrow if self.bottleneck else plain, start=1)
        for i, (size, features, stride) in layers:
            if i > 1:
                y = relu(y)
            if size > 1:
                y = mask(y, extent_px)
            y = Conv(features, size, stride, name=f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y, train=train)
            extent_px = shrink(extent_px, stride)
        if x.shape[-1] != wide:  # also true wherever a block strides
            x = Conv(wide, 1, self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x, train=train)
        return relu(y + x)


class ResNet(nn.Module):
    """Residual network; `create` makes one and checks its arguments."""

    arch: str
    num_classes: int
    options: BackboneOptions

    def setup(self) -> None:  # noqa: D102 (Flax's hook)
        width, norm = self.options.width, self.options.batch_norm()
        self.conv1 = Conv(width, *_STEM_CONVOLUTIONS[self.options.stem])
        self.bn1 = norm()
        blocks, bottleneck = ARCHITECTURES[self.arch]
        # Flax names the members of a list layer1_0, layer1_1, ...
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            [
                Block(width * 2**stage, 2 if stage and not i else 1, bottleneck, norm)
                for i in range(depth)
            ]
            for stage, depth in enumerate(blocks)
        )
        self.fc = linear(self.feature_channels, self.num_classes)

    @property
    def stride_px(self) -> int:
        """Image pixels per cell of the feature map: 32, 16 or 8."""
        return _STRIDES_PX[self.options.stem]

    @property
    def feature_channels(self) -> int:
        """Channels of the feature map."""
        expansion = 4 if ARCHITECTURES[self.arch].bottleneck else 1
        return self.options.width * 8 * expansion

    @nn.nowrap
    def feature_extent(self, extent_px: Any) -> Any:
        """Valid cells: each stride maps n to ceil(n / 2), and ceilings compose."""
        return -(-extent_px // self.stride_px)

    @nn.nowrap
    def feature_place_px(self, cells: Any, extent_px: Any) -> Any:
        """Centres in pixels: padding is symmetric, so cell 0 is centred at pixel 0."""
        return cells * self.stride_px + 0 * extent_px

    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Scores, features and their mean for `[b, H, W, 3]` normalized images."""
        features = self.extract(images, train=train)
        pooled = features.mean((1, 2), dtype=at_least_float32(features.dtype))
        return Outputs(self.classify(pooled), features, pooled)

    def extract(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        extent_px: jax.Array | None = None,
    ) -> jax.Array:
        """Last feature map; `extent_px` is the valid (height, width) of each image."""
        check_images(images, train, extent_px)
        options = self.options
        x = images if images.dtype == jnp.float64 else images.astype(options.dtype)
        x = relu(self.bn1(self.conv1(mask(x, extent_px)), train=train))
        extent_px = shrink(extent_px, self.conv1.stride)
        if options.stem == "imagenet":
            # 0 is as good as -inf beyond the image's edge: no value is negative.
            x = max_pool(mask(x, extent_px))
            extent_px = shrink(extent_px, 2)
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = run_block(
                block, x, train=train, extent_px=extent_px, remat=options.remat
            )
            extent_px = shrink(extent_px, block.stride)
        return x

    def classify(self, pooled: jax.Array) -> jax.Array:
        """Scores `[..., k]`, at least float32, of pooled features `[..., c]`."""
        return self.fc(pooled.astype(at_least_float32(pooled.dtype)))


def create(arch: str, num_classes: int, **options: Any) -> ResNet:
    """A ResNet whose variables are `{"params", "batch_stats"}`.

    Args:
      arch: a key of `ARCHITECTURES`. `resnet10` is not torchvision's: basic blocks
        1, 1, 1, 1, for small images.
      num_classes: length of the score vector.
      **options: those of `BackboneOptions`. `width` 64 is torchvision's. `stem` is
        `"imagenet"`: 7x7 convolution and max-pool, stride 4 together; `"medium"`: 3x3
        convolution of stride 2, for images of 64 to 128 px; or `"small"`: the same
        without stride, for images of 32 to 96 px.

    Raises:
      TypeError: there is no such option.
      ValueError: an argument is out of range, or contradicts another.
    """
    check_architecture(arch, num_classes, ARCHITECTURES)
    checked = BackboneOptions(**options)
    if checked.stem not in STEMS:
        raise ValueError(
            f"unknown stem {checked.stem!r}; choose from {', '.join(STEMS)}"
        )
    return ResNet(arch, num_classes, checked)


def plain_name(name: str) -> str:
    """The plain name of a name of torchvision, timm (the same) or transformers.

    `layer1.0.downsample.1.bias` -> `layer1.0.downsample_bn.bias`, and
    `resnet.encoder.stages.0.layers.1.layer.2.convolution.weight` ->
    `layer1.1.conv3.weight`.
    """
    name = name.replace(".downsample.0.", ".downsample_conv.")
    name = name.replace(".downsample.1.", ".downsample_bn.")
    match = re.fullmatch(
        r"(?:resnet\.)?(?:(?P<stem>embedder\.embedder)|encoder\.stages\.(?P<stage>\d+)"
        r"\.layers\.(?P<block>\d+)\.(?:layer\.(?P<layer>\d+)|shortcut))"
        r"\.(?P<kind>convolution|normalization)\.(?P<leaf>\w+)",
        name,
    )
    if match is None:
        return re.sub(r"^classifier\.1\.", "fc.", name)
    stem, stage, block, layer, kind, leaf = match.groups()
    short = "bn" if kind == "normalization" else "conv"
    if stem:
        return f"{short}1.{leaf}"
    last = f"{short}{int(layer) + 1}" if layer else f"downsample_{short}"
    return f"layer{int(stage) + 1}.{block}.{last}.{leaf}"


def published_name(name: str) -> str:
    """`layer1.0.downsample_bn.bias` -> torchvision's `layer1.0.downsample.1.bias`."""
    name = name.replace(".downsample_conv.", ".downsample.0.")
    return name.replace(".downsample_bn.", ".downsample.1.")


def looks_like(names: Iterable[str]) -> str | None:
    """The architecture with exactly the blocks of these plain names."""
    names = list(names)
    found = {m[0] for name in names if (m := re.match(r"layer\d+\.\d+\.", name))}
    bottleneck = any(name.endswith(".conv3.weight") for name in names)
    for arch, (blocks, is_bottleneck) in ARCHITECTURES.items():
        wanted = {f"layer{s}.{i}." for s, n in enumerate(blocks, 1) for i in range(n)}
        if (found, bottleneck) == (wanted, is_bottleneck):
            return arch
    return None


def size_options(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Width and stem of the network that arrays, by plain names, belong to.

    `"medium"` has the same shapes as `"small"`, which is returned for both.
    """
    conv1 = arrays.get("conv1.weight")
    if conv1 is None or conv1.ndim != 4:
        return {}
    stem = "imagenet" if conv1.shape[-1] == 7 else "small"
    return {"width": conv1.shape[0], "stem": stem}
