"""The families of backbones: which there are, and what each owes to the other rooms.

A family is one room with all that is its own: networks, names of published files, and
records of published weights. It is named here, in `FAMILIES`, and nowhere else.
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
    """What a family's `create` gives: a linen module with these, and a Dense `fc`.

    Its variables are `{"params", "batch_stats"}`. float64 pictures are computed in
    float64; others in the dtype that it was made for, with statistics, pooled features
    and scores in float32.
    """

    @property
    def stride_px(self) -> int:
        """Pixels of the picture per cell of the feature map."""
        ...

    @property
    def feature_channels(self) -> int:
        """Channels of the feature map."""
        ...

    def feature_extent(self, extent_px: Any) -> Any:
        """Valid part of the feature map for `[..., 2]` valid (height, width) in pixels.

        Any integer array does; needs no variables.
        """
        ...

    def feature_place_px(self, cells: Any, extent_px: Any) -> Any:
        """Centre of the receptive fields of these cells of the feature map, in pixels.

        Args:
            cells: indices along an axis of the feature map; any array of numbers does.
            extent_px: the picture's size along that axis, integer, which broadcasts
                with them.

        Returns:
            Coordinates of which pixel centres are the integers.
        """
        ...

    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        """Scores, feature map and its mean for `[b, H, W, 3]` normalised pictures.

        Args:
            images: floating point, already normalised.
            train: normalise with the batch's statistics, and update the running ones:
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
        """Last feature map, `[b, ceil(H / stride_px), ceil(W / stride_px), c]`.

        Args:
            images: as in `__call__`.
            train: as in `__call__`.
            extent_px: int `[b, 2]`, valid (height, width) of each picture, if they were
                padded at the right and the bottom to share a batch. Within
                `feature_extent(extent_px)` the features are then those of the picture
                alone, rounding aside; those beyond mean nothing.

        Raises:
            ValueError: if the shape or dtype of an argument is wrong, if `extent_px` is
                given in training, or as `batch_norm.BatchNorm`.
        """
        ...

    def classify(self, pooled: jax.Array) -> jax.Array:
        """Scores `[..., k]`, at least float32, of pooled features `[..., c]`."""
        ...


class Family(Protocol):
    """What a family's room holds.

    Plain names are a variable's path in linen with dots and torch's words for its end:
    `("batch_stats", "layer1_0", "bn1", "mean")` is `layer1.0.bn1.running_mean`.
    """

    @property
    def ARCHITECTURES(self) -> Mapping[str, Any]:
        """The names of its architectures; no two families share one."""
        ...

    @property
    def PUBLISHED(self) -> Mapping[str, WeightRecord]:
        """Published weights by their names; of each architecture the default first."""
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
        """The plain name of what published files call `name`; a plain name stays."""
        ...

    def published_name(self, name: str) -> str:
        """What its published files, and so ours, call a plain name."""
        ...

    def looks_like(self, names: Iterable[str]) -> str | None:
        """The architecture whose blocks these plain names are, if it is one of its."""
        ...

    def size_options(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """`width` and `stem` of the network that these arrays, by plain names, fit.

        Whatever is missing or misshapen is taken for the default.
        """
        ...


FAMILIES: tuple[Family, ...] = (resnet, efficientnet)


def backbones() -> tuple[str, ...]:
    """The names of all architectures."""
    return tuple(name for family in FAMILIES for name in family.ARCHITECTURES)


def family_of(arch: str) -> Family:
    """The family of an architecture.

    Raises:
      ValueError: the name is unknown; the message lists the known ones.
    """
    for family in FAMILIES:
        if arch in family.ARCHITECTURES:
            return family
    raise ValueError(f"unknown backbone {arch!r}; choose from {', '.join(backbones())}")


def create_backbone(arch: str, num_classes: int, **options: Any) -> nn.Module:
    """A `Backbone` by its name; the options are those of `BackboneOptions`.

    Raises:
      ValueError: as `family_of` and `Family.create`.
    """
    backbone = family_of(arch).create(arch, num_classes, **options)
    return backbone  # pyright: ignore[reportReturnType] (no protocol can say so)


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
    """The architecture that arrays of these published or plain names belong to."""
    names = list(names)
    for family in FAMILIES:
        if arch := family.looks_like(family.plain_name(name) for name in names):
            return arch
    return None


def variable_shapes(backbone: nn.Module, crop_px: int) -> dict[str, Any]:
    """Abstract variables ``{"params", "batch_stats"}`` of a network; nothing is drawn.

    Args:
      backbone: or any module that takes ``[b, crop_px, crop_px, 3]`` images.
      crop_px: height and width of the images.
    """
    images = jax.ShapeDtypeStruct((2, crop_px, crop_px, 3), jnp.float32)
    return dict(jax.eval_shape(backbone.init, jax.random.key(0), images))
