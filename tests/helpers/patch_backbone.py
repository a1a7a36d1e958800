"""A minimal third family of backbones, with all that a family must provide."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from cra_jax.backbones.batch_norm import BatchNorm
from cra_jax.backbones.convolutions import Conv
from cra_jax.backbones.layers import Outputs, check_images, mask, shrink
from cra_jax.backbones.options import BackboneOptions, check_architecture
from cra_jax.backbones.weight_record import WeightRecord

ARCHITECTURES = {"patches": 2, "patches_deep": 3}
PUBLISHED = {
    "example/patches": WeightRecord(
        "patches",
        "patches-1234.pth",
        imagenet_top1=12.5,
        resize_px=64,
        crop_px=56,
        interpolation="nearest",
        mean=(0.25, 0.5, 0.75),
        std=(0.5, 0.5, 0.25),
        licence="CC0-1.0",
        source="these tests",
        mirror="https://example.org/",
    )
}


class Patches(nn.Module):
    """A sequence of convolutions of stride 2; the architecture gives their number."""

    arch: str
    num_classes: int
    width: int
    norm: Callable[..., BatchNorm]

    def setup(self):
        depth = ARCHITECTURES[self.arch]
        self.cuts = [Conv(self.width, 3, 2) for _ in range(depth)]
        self.norms = [self.norm() for _ in range(depth)]
        self.fc = nn.Dense(self.num_classes)

    @property
    def stride_px(self) -> int:
        return 2 ** ARCHITECTURES[self.arch]

    @property
    def feature_channels(self) -> int:
        return self.width

    @nn.nowrap
    def feature_extent(self, extent_px: Any) -> Any:
        return -(-extent_px // self.stride_px)

    @nn.nowrap
    def feature_place_px(self, cells: Any, extent_px: Any) -> Any:
        return cells * self.stride_px + 0 * extent_px

    def __call__(self, images: jax.Array, train: bool = False) -> Outputs:
        features = self.extract(images, train=train)
        pooled = features.mean((1, 2))
        return Outputs(self.classify(pooled), features, pooled)

    def extract(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        extent_px: jax.Array | None = None,
    ) -> jax.Array:
        check_images(images, train, extent_px)
        x = images
        for cut, norm in zip(self.cuts, self.norms, strict=True):
            x = nn.relu(norm(cut(mask(x, extent_px)), train=train))
            extent_px = shrink(extent_px, 2)
        return x

    def classify(self, pooled: jax.Array) -> jax.Array:
        return self.fc(pooled)


def create(arch: str, num_classes: int, **options: Any) -> Patches:
    check_architecture(arch, num_classes, ARCHITECTURES)
    checked = BackboneOptions(**options)
    if checked.remat:
        raise ValueError("patches have no blocks to compute again")
    if checked.stem != "imagenet":
        raise ValueError(f"patches have no stem {checked.stem!r}")
    return Patches(arch, num_classes, checked.width, checked.batch_norm())


def plain_name(name: str) -> str:
    return name.removeprefix("model.")


def published_name(name: str) -> str:
    return f"model.{name}"


def looks_like(names: Iterable[str]) -> str | None:
    depth = sum(name.startswith("cuts.") for name in names)
    return next((arch for arch, n in ARCHITECTURES.items() if n == depth), None)


def size_options(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    kernel = arrays.get("cuts.0.weight")
    return {} if kernel is None or not kernel.ndim else {"width": kernel.shape[0]}
