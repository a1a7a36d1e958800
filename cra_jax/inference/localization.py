"""How well an activation map and an attention fit the object's box.

Boxes are ``(x_min, y_min, x_max, y_max)`` in pixels of the crop, pixel centres at
integers, so that the crop reaches from -0.5 to size - 0.5.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def share_inside(
    activation: np.ndarray,
    box_px: Sequence[float],
    *,
    rows_px: np.ndarray,
    columns_px: np.ndarray,
    crop_px: int,
) -> float:
    """Which share of the positive activation lies inside a box.

    Each point of the crop has the activation of the nearest cell, negative ones count
    as 0; the share is the integral over the box by the integral over the crop, exact.
    A map that is spread evenly gets the box's share of the crop.

    Args:
      activation: ``[h, w]``.
      box_px: as `box_in_crop_px` gives it.
      rows_px: ``[h]``, as `places_px` gives them.
      columns_px: ``[w]``, the same.
      crop_px: height and width of the crop.

    Returns:
      In 0..1; 0 where nothing is positive.

    Source: the energy-based pointing game of Wang et al., "Score-CAM", 2020, there on
      an upsampled map.
    """
    positive = np.maximum(np.asarray(activation, np.float64), 0)
    x_min, y_min, x_max, y_max = box_px
    wide, wide_inside = _lengths(columns_px, crop_px, x_min, x_max)
    high, high_inside = _lengths(rows_px, crop_px, y_min, y_max)
    total = high @ positive @ wide
    return float(high_inside @ positive @ wide_inside / total) if total > 0 else 0.0


def _lengths(places: np.ndarray, crop_px: int, low: float, high: float):
    """How many pixels along an axis each cell is the nearest of; and of low..high."""
    middles = np.clip((places[1:] + places[:-1]) / 2, -0.5, crop_px - 0.5)
    edges = np.concatenate([[-0.5], middles, [crop_px - 0.5]])
    return np.diff(edges), np.diff(np.clip(edges, low, max(low, high)))


def iou(corners: np.ndarray, box: Sequence[float]) -> float:
    """Area that a convex polygon and a box share, by the area that they cover together.

    Args:
      corners: ``[k, 2]``, in order around the polygon, either way.
      box: in the same coordinates.

    Returns:
      In 0..1; 0 where both are of area 0. What of the polygon lies outside the crop
      counts as covered: attention to padding is attention to nothing.
    """
    x_min, y_min, x_max, y_max = box
    shared = [(float(x), float(y)) for x, y in corners]
    for axis, bound, keep in (
        (0, x_min, 1),
        (0, x_max, -1),
        (1, y_min, 1),
        (1, y_max, -1),
    ):
        shared = _clip(shared, axis, bound, keep)
    both = _area(shared)
    union = _area(corners) + max(0, x_max - x_min) * max(0, y_max - y_min) - both
    return both / union if union > 0 else 0.0


def _clip(polygon: list[tuple[float, float]], axis: int, bound: float, keep: int):
    """The part of a convex polygon on one side of a line (Sutherland and Hodgman)."""
    kept = []
    for a, b in zip(polygon[-1:] + polygon[:-1], polygon, strict=True):
        before, after = keep * (a[axis] - bound), keep * (b[axis] - bound)
        if (before < 0) != (after < 0):
            t = before / (before - after)
            kept.append((a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])))
        if after >= 0:
            kept.append(b)
    return kept


def _area(polygon: Sequence[Any] | np.ndarray) -> float:
    """Of a polygon whose corners are in order, either way round."""
    if len(polygon) < 3:
        return 0.0
    x, y = np.asarray(polygon, np.float64).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
