"""A split kept in device memory: a training step is then sent numbers, no pixels.

All pictures lie in one array `[lines, 3 * width]`, one after another along the first
axis, each with its shorter side across. The store resizes every shorter side to one
length, so nothing is padded; a picture that is wider than high lies on its side. Every
crop is one slice of that array, whatever the picture's shape, and is turned back.
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
    """Pictures of known sizes, such as a `store.Store`."""

    shapes: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


class DeviceImages:
    """Pictures in the memory of every device, and the crops that are cut out there.

    Attributes:
        about: one line for the log: how much memory they take, and of how much.
    """

    def __init__(self, pictures: Sized, *, crop_px: int, progress: bool = True):
        """Copies all pictures to every device.

        The host holds one copy more while this runs.

        Args:
            pictures: uint8 `[h, w, 3]` each, none smaller than the crop.
            crop_px: side of the square that is cut out.
            progress: report on stderr.

        Raises:
            ValueError: they need more memory than a device has free.
        """
        shapes = np.asarray(pictures.shapes, np.int64)
        lengths, self._turned = shapes.max(1), shapes[:, 1] > shapes[:, 0]
        width_px = int(shapes.min(1).max())
        need = int(lengths.sum()) * width_px * 3
        free = devices.free_bytes()
        self.about = (
            f"{len(pictures):,} training pictures take {need / 1e6:,.1f} MB of "
            f"{free / 1e6:,.1f} MB free on each of {devices.describe_devices()}"
        )
        if need > free:
            raise ValueError(
                f"data.on_device: {self.about}: set data.on_device=False, or make "
                "data.short_side_px smaller"
            )
        self._starts = np.cumsum(lengths) - lengths
        lines = self._lay_out(pictures, int(lengths.sum()), width_px, show=progress)
        self._lines = devices.on_each_device(lines)
        self._cut = devices.batch_step(functools.partial(cut, crop_px=crop_px))

    def batch(self, plan: Batch) -> dict[str, Any]:
        """The batch that `batches.TrainBatches` plans, cut out on the devices.

        Args:
            plan: of `TrainBatches.plan`.

        Returns:
            `image` uint8 `[n, b / n, crop, crop, 3]`, on `n` devices, and `flip` and
            `label` `[n, b / n]`: as `devices.split` gives them of
            `TrainBatches.batch`.
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
        self, pictures: Sized, count: int, width_px: int, *, show: bool
    ) -> np.ndarray:
        """The array of the module's first lines, in host memory."""
        lines = np.zeros((count, width_px, 3), np.uint8)

        def put(i: int) -> None:
            picture = pictures[i].swapaxes(0, 1) if self._turned[i] else pictures[i]
            length, width = picture.shape[:2]
            lines[self._starts[i] :][:length, :width] = picture

        title = "to the device"
        with Progress(len(pictures), title, unit="pictures", show=show) as bar:
            for _ in prefetch(put, 0, len(pictures), workers=os.cpu_count() or 1):
                bar.advance()
        return lines.reshape(count, 3 * width_px)


def cut(lines: Array, batch: Any, *, crop_px: int) -> Array:
    """Cuts crops out of pictures that lie as this module's first lines say.

    Args:
        lines: uint8 `[n, 3 * width]`.
        batch: `place` int32 `[b, 2]`, the line and the column of a crop's corner, and
            `turned` bool `[b]`, whether its picture lies on its side.
        crop_px: side of a crop.

    Returns:
        uint8 `[b, crop, crop, 3]`.
    """

    def one(place: Array, turned: Array) -> Array:
        size = (crop_px, 3 * crop_px)
        window = jax.lax.dynamic_slice(lines, (place[0], 3 * place[1]), size)
        window = window.reshape(crop_px, crop_px, 3)
        return jnp.where(turned, window.swapaxes(0, 1), window)

    return jax.vmap(one)(batch["place"], batch["turned"])
