"""A split in device memory, so that a training step receives no pixels from the host.

All images are in one array `[lines, 3 * width]`, one after another along the first
axis, each with its shorter side along the second. The image cache resizes every shorter
side to one length, so nothing is padded; images wider than high are transposed. Every
crop is one slice of that array, and is transposed back.
"""

import functools
import os
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cra_jax.input.batches import Batch
from cra_jax.runtime import devices
from cra_jax.runtime.prefetch import prefetch
from cra_jax.runtime.progress import Progress


class Sized(Protocol):
    """Images of known sizes, such as a `image_cache.ImageCache`."""

    shapes: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


class DeviceImages:
    """Images in the memory of every device, cropped there.

    Attributes:
      about: one line for the log: the memory that they take, and the free memory.
    """

    def __init__(self, images: Sized, *, crop_px: int, progress: bool = True):
        """Copies all images to every device.

        The host holds one more copy while this runs.

        Args:
          images: uint8 `[h, w, 3]` each, none smaller than the crop.
          crop_px: height and width of a crop.
          progress: report on standard error.

        Raises:
          ValueError: they need more memory than a device has free.
        """
        shapes = np.asarray(images.shapes, np.int64)
        lengths, self._turned = shapes.max(1), shapes[:, 1] > shapes[:, 0]
        width_px = int(shapes.min(1).max())
        need = int(lengths.sum()) * width_px * 3
        free = devices.free_bytes()
        self.about = (
            f"{len(images):,} training images take {need / 1e6:,.1f} MB of "
            f"{free / 1e6:,.1f} MB free on each of {devices.describe_devices()}"
        )
        if need > free:
            raise ValueError(
                f"data.on_device: {self.about}: set data.on_device=False, or make "
                "data.short_side_px smaller"
            )
        self._starts = np.cumsum(lengths) - lengths
        lines = self._lay_out(images, int(lengths.sum()), width_px, show=progress)
        self._lines = devices.on_each_device(lines)
        self._cut = devices.batch_step(functools.partial(cut, crop_px=crop_px))

    def batch(self, plan: Batch) -> dict[str, Any]:
        """The batch of a plan of `batches.TrainBatches`, cropped on the devices.

        Args:
          plan: of `TrainBatches.plan`.

        Returns:
          `image` uint8 `[n, b / n, crop, crop, 3]`, on `n` devices, and `flip` and
          `label` `[n, b / n]`: as `devices.split` of `TrainBatches.batch`.
        """
        turned, (top, left) = self._turned[plan["index"]], plan["corner_px"].T
        along = self._starts[plan["index"]] + np.where(turned, left, top)
        across = np.where(turned, top, left)
        place = np.stack([along, across], 1).astype(np.int32)
        image = self._cut(self._lines, {"place": place, "turned": turned})
        return {
            "image": image,
            **devices.split({k: plan[k] for k in ("flip", "label")}),
        }

    def _lay_out(
        self, images: Sized, count: int, width_px: int, *, show: bool
    ) -> np.ndarray:
        """The array that the module docstring describes, in host memory."""
        lines = np.zeros((count, width_px, 3), np.uint8)

        def put(i: int) -> None:
            image = images[i].swapaxes(0, 1) if self._turned[i] else images[i]
            length, width = image.shape[:2]
            lines[self._starts[i] :][:length, :width] = image

        title = "copying to the device"
        with Progress(len(images), title, unit="images", show=show) as bar:
            for _ in prefetch(put, 0, len(images), workers=os.cpu_count() or 1):
                bar.advance()
        return lines.reshape(count, 3 * width_px)


def cut(lines: Array, batch: Any, *, crop_px: int) -> Array:
    """Crops images that are stored as the module docstring describes.

    Args:
      lines: uint8 `[n, 3 * width]`.
      batch: `place` int32 `[b, 2]`, the line and the column of a crop's corner, and
        `turned` bool `[b]`, whether its image is transposed.
      crop_px: height and width of a crop.

    Returns:
      uint8 `[b, crop, crop, 3]`.
    """

    def one(place: Array, turned: Array) -> Array:
        size = (crop_px, 3 * crop_px)
        window = jax.lax.dynamic_slice(lines, (place[0], 3 * place[1]), size)
        window = window.reshape(crop_px, crop_px, 3)
        return jnp.where(turned, window.swapaxes(0, 1), window)

    return jax.vmap(one)(batch["place"], batch["turned"])
