"""The centre crop: its position in an image, and the part of a box inside it.

Points are ``(x, y)``, boxes ``(x_min, y_min, x_max, y_max)``. Pixel coordinates are
those of the crop, pixel centres at integers.
"""

from collections.abc import Sequence

import numpy as np


def centre_offset_px(size_px: Sequence[int], crop_px: int) -> np.ndarray:
    """``(left, top)`` of the centre crop in an image of ``(width, height)``."""
    return (np.asarray(size_px) - crop_px) // 2


def in_image(points_px: np.ndarray, size_px: Sequence[int], crop_px: int) -> np.ndarray:
    """Points of the centre crop ``[..., 2]`` as fractions of the whole image.

    Args:
      points_px: in pixels of the crop.
      size_px: ``(width, height)`` of the image of the crop.
      crop_px: height and width of the crop.

    Returns:
      ``[..., 2]``; 0 and 1 are the edges of the image.
    """
    return (points_px + 0.5 + centre_offset_px(size_px, crop_px)) / np.asarray(size_px)


def in_crop_px(points: np.ndarray, size_px: Sequence[int], crop_px: int) -> np.ndarray:
    """Fractions of the whole image ``[..., 2]`` in pixels of the crop.

    The inverse of `in_image`; a point outside the crop lies outside -0.5 to crop - 0.5.
    """
    points_px = np.asarray(points, np.float64) * np.asarray(size_px)
    return points_px - 0.5 - centre_offset_px(size_px, crop_px)


def box_in_crop_px(
    box: Sequence[float], size_px: Sequence[int], crop_px: int
) -> tuple[float, float, float, float]:
    """The part of a box inside the centre crop, in pixels of the crop.

    Args:
      box: fractions of the whole image.
      size_px: ``(width, height)`` of the image of the crop.
      crop_px: height and width of the crop.

    Returns:
      A box inside the crop; of area 0 if they do not overlap.
    """
    corners = in_crop_px(np.reshape(box, (2, 2)), size_px, crop_px)
    x_min, y_min, x_max, y_max = np.clip(corners, -0.5, crop_px - 0.5).ravel().tolist()
    return x_min, y_min, x_max, y_max
