"""ResNet with torchvision's numerics, so that its weights mean the same thing here.

Padding is explicit (Flax's "SAME" differs from torch's on even sizes), the bottleneck
strides in its 3x3 convolution, and BatchNorm keeps torch's unbiased running variance.
Names follow torchvision: `conv1`, `bn1`, `layer1_0`, `downsample_conv`, `fc`.

Two dtypes are at work. Images are cast once, on entry, to the compute dtype, and every
layer follows its input from there: convolutions and activations run in the compute
dtype, statistics, pooling and scores in at least float32, and parameters are kept in
float32. float64 images are never cast down: they are computed in float64 whatever the
compute dtype, so a gradient check needs nothing but float64 arrays.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cra_jax.layers import (
    BatchNorm,
    Conv,
    Outputs,
    at_least_float32,
    check_common_options,
    check_images,
    mask,
    shrink,
    symmetric_uniform,
)


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
                y = nn.relu(y)
            if size > 1:
                y = mask(y, extent_px)
            y = Conv(features, size, stride, name=f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y, train=train)
            extent_px = shrink(extent_px, stride)
        if x.shape[-1] != wide:  # true wherever a block strides, too
            x = Conv(wide, 1, self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_bn")(x, train=train)
        return nn.relu(y + x)


class ResNet(nn.Module):
    """Residual network; make one with `create`, which explains and checks these."""

    arch: str
    num_classes: int
    width: int = 64
    stem: str = "imagenet"
    dtype: Any = jnp.float32
    bn_group_size: int = 0
    all_mean: Callable[[jax.Array], jax.Array] | None = None
    num_replicas: int = 1

    def setup(self) -> None:  # noqa: D102 (Flax's hook)
        norm = partial(BatchNorm, self.bn_group_size, self.all_mean, self.num_replicas)
        self.conv1 = Conv(self.width, *_STEM_CONVOLUTIONS[self.stem])
        self.bn1 = norm()
        blocks, bottleneck = ARCHITECTURES[self.arch]
        # Flax names the members of a list layer1_0, layer1_1, ...
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            [
                Block(
                    self.width * 2**stage, 2 if stage and not i else 1, bottleneck, norm
                )
                for i in range(depth)
            ]
            for stage, depth in enumerate(blocks)
        )
        self.fc = nn.Dense(
            self.num_classes,
            kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            bias_init=symmetric_uniform(self.feature_channels**-0.5),
        )

    @property
    def stride_px(self) -> int:
        """Pixels of the picture per place of the feature map: 32, 16 or 8."""
        return _STRIDES_PX[self.stem]

    @property
    def feature_channels(self) -> int:
        """Channels of the feature map."""
        return self.width * 8 * (4 if ARCHITECTURES[self.arch].bottleneck else 1)

    @nn.nowrap
    def feature_extent(self, extent_px: Any) -> Any:
        """Valid part of the feature map for `[..., 2]` valid (height, width) in pixels.

        Any integer array does; needs no variables. Every operation that strides maps n
        to ceil(n / 2), and such ceilings compose.
        """
        return -(-extent_px // self.stride_px)

    @nn.nowrap
    def feature_place_px(self, cells: Any, extent_px: Any) -> Any:
        """Centre of the receptive fields of these cells of the feature map, in pixels.

        Args:
            cells: indices along an axis of the feature map; any array of numbers does.
            extent_px: the picture's size along that axis, which broadcasts with them.

        Returns:
            Coordinates of which pixel centres are the integers. Padding is symmetric
            here, so cell 0 looks at pixel 0, whatever the size.
        """
        return cells * self.stride_px + 0 * extent_px

    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Scores, feature map and its mean for `[b, H, W, 3]` normalised pictures.

        Args:
            images: floating point, already normalised.
            train: normalise with the batch's statistics, and update the running ones:
                `apply` then needs `mutable=["batch_stats"]`.

        Raises:
            ValueError: as `extract`.
        """
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
        """Last feature map, `[b, ceil(H / stride_px), ceil(W / stride_px), c]`.

        Args:
            images: `[b, H, W, 3]`, floating point, already normalised.
            train: as in `__call__`.
            extent_px: int `[b, 2]`, valid (height, width) of each picture, if they were
                padded at the right and the bottom to share a batch. Within
                `feature_extent(extent_px)` the features are then those of the picture
                alone, rounding aside; those beyond mean nothing.

        Raises:
            ValueError: if the shape or dtype of an argument is wrong, if `extent_px` is
                given in training, or as `BatchNorm`.
        """
        check_images(images, train, extent_px)
        is_float64 = images.dtype == jnp.float64
        x = mask(images.astype(jnp.float64 if is_float64 else self.dtype), extent_px)
        x = nn.relu(self.bn1(self.conv1(x), train=train))
        extent_px = shrink(extent_px, self.conv1.stride)
        if self.stem == "imagenet":
            # 0 is as good as -inf beyond the picture's edge: nothing here is negative.
            x = mask(x, extent_px)
            x = nn.max_pool(
                x,
                (3, 3),
                (2, 2),
                padding=((1, 1), (1, 1)),  # pyright: ignore[reportArgumentType]
            )
            extent_px = shrink(extent_px, 2)
        for block in (*self.layer1, *self.layer2, *self.layer3, *self.layer4):
            x = block(x, train=train, extent_px=extent_px)
            extent_px = shrink(extent_px, block.stride)
        return x

    def classify(self, pooled: jax.Array) -> jax.Array:
        """Scores `[..., k]`, at least float32, of pooled features `[..., c]`."""
        return self.fc(pooled.astype(at_least_float32(pooled.dtype)))


def create(
    arch: str,
    num_classes: int,
    *,
    width: int = 64,
    stem: str = "imagenet",
    dtype: Any = jnp.float32,
    bn_group_size: int = 0,
    all_mean: Callable[[jax.Array], jax.Array] | None = None,
    num_replicas: int = 1,
) -> ResNet:
    """A ResNet whose variables are `{"params", "batch_stats"}`.

    Args:
        arch: a key of `ARCHITECTURES`. `resnet10` is not torchvision's: basic blocks
            1, 1, 1, 1, for small pictures.
        num_classes: length of the score vector.
        width: channels of the first stage; 64 is torchvision's.
        stem: `"imagenet"`: 7x7 convolution and max-pool, stride 4 together. `"medium"`:
            3x3 convolution of stride 2, for pictures of 64 to 128 px. `"small"`: the
            same without stride, for pictures of 32 to 96 px.
        dtype: compute dtype of convolutions and activations.
        bn_group_size: in training, normalise each run of so many pictures on its own;
            0: all pictures of the device together.
        all_mean: array -> its mean over all replicas, to share BatchNorm's statistics.
        num_replicas: how many replicas `all_mean` averages.

    Raises:
        ValueError: if an argument is unknown, out of range, or contradicts another.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"unknown arch {arch!r}; choose from {', '.join(ARCHITECTURES)}"
        )
    if stem not in STEMS:
        raise ValueError(f"unknown stem {stem!r}; choose from {', '.join(STEMS)}")
    if width < 1:
        raise ValueError(f"width must be at least 1, not {width}")
    check_common_options(num_classes, dtype, bn_group_size, all_mean, num_replicas)
    return ResNet(
        arch, num_classes, width, stem, dtype, bn_group_size, all_mean, num_replicas
    )
