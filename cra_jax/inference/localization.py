"""Localization scores of class activation maps and attentions, from boxes and points.

Boxes are ``(x_min, y_min, x_max, y_max)`` in pixels of the crop, with pixel centres at
integers, so that the crop extends from -0.5 to size - 0.5.
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
    """Share of the positive activation inside a box.

    Each point of the crop has the activation of its nearest cell, and negative
    activations count as 0. The share is the exact integral over the box divided by that
    over the crop. A uniform map scores the box's share of the crop.

    Args:
      activation: ``[h, w]``.
      box_px: result of `box_in_crop_px`.
      rows_px: ``[h]``, result of `places_px`.
      columns_px: ``[w]``, result of `places_px`.
      crop_px: height and width of the crop.

    Returns:
      A share in 0..1; 0 if no activation is positive.

    Source: the energy-based pointing game of Wang et al., "Score-CAM", 2020, which uses
      an upsampled map.
    """
    positive = np.maximum(np.asarray(activation, np.float64), 0)
    x_min, y_min, x_max, y_max = box_px
    wide, wide_inside = _lengths(columns_px, crop_px, x_min, x_max)
    high, high_inside = _lengths(rows_px, crop_px, y_min, y_max)
    total = high @ positive @ wide
    return float(high_inside @ positive @ wide_inside / total) if total > 0 else 0.0


def _lengths(places: np.ndarray, crop_px: int, low: float, high: float):
    """Length in pixels along an axis that is nearest to each cell; in all, in a box."""
    middles = np.clip((places[1:] + places[:-1]) / 2, -0.5, crop_px - 0.5)
    edges = np.concatenate([[-0.5], middles, [crop_px - 0.5]])
    return np.diff(edges), np.diff(np.clip(edges, low, max(low, high)))


def iou(corners: np.ndarray, box: Sequence[float]) -> float:
    """Intersection over union of a convex polygon and a box.

    Args:
      corners: ``[k, 2]``, in order around the polygon, in either direction.
      box: a box in the same coordinates.

    Returns:
      A ratio in 0..1; 0 if both areas are 0. The part of the polygon outside the crop
      counts in the union, so attention to padding lowers the score.
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


def contains(corners: np.ndarray, point: Sequence[float] | np.ndarray) -> bool:
    """Whether a point lies in a convex polygon or on its edge.

    Args:
      corners: ``[k, 2]``, in order around the polygon, in either direction.
      point: ``[2]``, in the same coordinates.

    Returns:
      False for a polygon of area 0.
    """
    corners = np.asarray(corners, np.float64)
    along, offset = np.roll(corners, -1, 0) - corners, np.asarray(point) - corners
    # On which side of each edge the point lies.
    side = along[:, 0] * offset[:, 1] - along[:, 1] * offset[:, 0]
    return bool(_area(corners) > 0 and ((side >= 0).all() or (side <= 0).all()))


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
    """Area of a polygon with corners in order, in either direction."""
    if len(polygon) < 3:
        return 0.0
    x, y = np.asarray(polygon, np.float64).T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
