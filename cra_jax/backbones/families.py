"""The families of backbones, and what each family must provide.

A family is one module with its networks, the names of its published files, and the
records of its published weights. It has one entry, in `FAMILIES`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cra_jax.backbones import efficientnet, resnet
from cra_jax.backbones.layers import Outputs
from cra_jax.backbones.weight_record import WeightRecord


class Backbone(Protocol):
    """A linen module with these methods and a Dense layer `fc`.

    Its variables are `{"params", "batch_stats"}`. float64 images are computed in
    float64; others in the compute dtype, with statistics, pooled features and scores in
    float32.
    """

    @property
    def stride_px(self) -> int:
        """Image pixels per cell of the feature map."""
        ...

    @property
    def feature_channels(self) -> int:
        """Channels of the feature map."""
        ...

    def feature_extent(self, extent_px: Any) -> Any:
        """Valid part of the feature map, in cells; needs no variables.

        Args:
          extent_px: valid height, width or both in pixels; any integer array.
        """
        ...

    def feature_place_px(self, cells: Any, extent_px: Any) -> Any:
        """Centres of the receptive fields of cells of the feature map, in pixels.

        Args:
          cells: indices along an axis of the feature map; any array of numbers.
          extent_px: the image's size along that axis, integer; broadcasts with `cells`.

        Returns:
          Coordinates in which pixel centres are integers.
        """
        ...

    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Scores, feature map and its mean.

        Args:
          images: `[b, H, W, 3]`, floating point, normalized.
          train: normalize with the batch's statistics, and update the running ones:
            `apply` then needs `mutable=["batch_stats"]`.

        Raises:
          ValueError: as `extract`.
        """
        ...

    def extract(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        extent_px: jax.Array | None = None,
    ) -> jax.Array:
        """The last feature map.

        Args:
          images: as in `__call__`.
          train: as in `__call__`.
          extent_px: int `[b, 2]`, valid (height, width) of each image, for images that
            were padded at the right and the bottom to share a batch. Features within
            `feature_extent(extent_px)` are then those of the image alone, except for
            rounding; the others are undefined.

        Returns:
          `[b, ceil(H / stride_px), ceil(W / stride_px), c]`.

        Raises:
          ValueError: the shape or dtype of an argument is wrong, `extent_px` is given
            in training, or as `batch_norm.BatchNorm`.
        """
        ...

    def classify(self, pooled: jax.Array) -> jax.Array:
        """Scores `[..., k]`, at least float32, of pooled features `[..., c]`."""
        ...


class Family(Protocol):
    """What the module of a family must provide.

    A plain name is a variable's path in linen with dots and torch's word for its leaf:
    `("batch_stats", "layer1_0", "bn1", "mean")` is `layer1.0.bn1.running_mean`.
    """

    @property
    def ARCHITECTURES(self) -> Mapping[str, Any]:
        """Its architectures by name; no two families share a name."""
        ...

    @property
    def PUBLISHED(self) -> Mapping[str, WeightRecord]:
        """Published weights by name; the first of an architecture is its default."""
        ...

    def create(self, arch: str, num_classes: int, **options: Any) -> Backbone:
        """An untrained network.

        Args:
          arch: a key of `ARCHITECTURES`.
          num_classes: length of the score vector.
          **options: those of `options.BackboneOptions`.

        Raises:
          TypeError: there is no such option.
          ValueError: an argument is out of range, or contradicts another.
        """
        ...

    def plain_name(self, name: str) -> str:
        """The plain name of a published or plain name."""
        ...

    def published_name(self, name: str) -> str:
        """The name in published files, which is also written, of a plain name."""
        ...

    def looks_like(self, names: Iterable[str]) -> str | None:
        """The architecture whose blocks have these plain names; None: none of these."""
        ...

    def size_options(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """`width` and `stem` of the network that arrays, by plain names, belong to.

        Options that cannot be inferred are left out.
        """
        ...


FAMILIES: tuple[Family, ...] = (resnet, efficientnet)


def backbones() -> tuple[str, ...]:
    """The names of all architectures."""
    return tuple(name for family in FAMILIES for name in family.ARCHITECTURES)


def family_of(arch: str) -> Family:
    """The family of an architecture.

    Raises:
      ValueError: there is no such architecture; the message lists all.
    """
    for family in FAMILIES:
        if arch in family.ARCHITECTURES:
            return family
    raise ValueError(f"unknown backbone {arch!r}; choose from {', '.join(backbones())}")


def create_backbone(arch: str, num_classes: int, **options: Any) -> nn.Module:
    """An untrained `Backbone`.

    Args:
      arch: one of `backbones()`.
      num_classes: length of the score vector.
      **options: those of `options.BackboneOptions`.

    Raises:
      TypeError: there is no such option.
      ValueError: an argument is unknown, out of range, or contradicts another.
    """
    backbone = family_of(arch).create(arch, num_classes, **options)
    return backbone  # pyright: ignore[reportReturnType] (a protocol cannot require it)


def variable_shapes(network: nn.Module, crop_px: int) -> dict[str, Any]:
    """Shapes and dtypes of a network's variables; computes nothing.

    Args:
      network: a backbone, or any other network whose `init` takes a batch of images.
      crop_px: height and width of the images.

    Returns:
      `{"params", "batch_stats"}` with a `jax.ShapeDtypeStruct` for each array.
    """
    images = jax.ShapeDtypeStruct((2, crop_px, crop_px, 3), jnp.float32)
    return dict(jax.eval_shape(network.init, jax.random.key(0), images))


def looks_like(names: Iterable[str]) -> str | None:
    """The architecture with these published or plain names; None: no known one."""
    names = list(names)
    for family in FAMILIES:
        if arch := family.looks_like(family.plain_name(name) for name in names):
            return arch
    return None
