"""Where a network looks: its class activation map, and the region that Gamma cuts out.

Points are ``(x, y)``. Pixel coordinates are those of the crop that the network is
shown, pixel centres at integers, so that the crop reaches from -0.5 to size - 0.5.
Boxes are ``(x_min, y_min, x_max, y_max)``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from cra_jax import geometry, losses


@struct.dataclass
class Head:
    """The attention head of a trained network: pooled features -> affine matrices.

    A tree of arrays, so that it may be handed to a step beside the variables.

    Attributes:
      kernel: ``[c, 4]`` of a CRA-CNN, Eq. (3); ``[c, 6]`` of an STN, Eq. (2).
      bias: ``[4]`` or ``[6]``.
      alpha_p: bound of the place, Eq. (6).
      alpha_s: bound of the scale, Eq. (6).
      normalize: whether it sees pooled features of length 1, as in training.
      inside: whether the attention stays in the picture, see `geometry.restrict`.
    """

    kernel: Array
    bias: Array
    alpha_p: float = struct.field(pytree_node=False)
    alpha_s: float = struct.field(pytree_node=False)
    normalize: bool = struct.field(pytree_node=False)
    inside: bool = struct.field(pytree_node=False, default=False)

    def __call__(self, pooled: Array) -> Array:
        """Matrices ``[b, 2, 3]`` for `geometry.affine_grid`, of pooled ``[b, c]``."""
        if self.normalize:
            pooled = losses.l2_normalize(pooled)
        # At full precision, as in training: coordinates need the digits.
        gamma = jnp.matmul(pooled, self.kernel, precision="highest") + self.bias
        if gamma.shape[-1] == 6:
            return gamma.reshape(-1, 2, 3)
        restricted = geometry.restrict(
            gamma, alpha_p=self.alpha_p, alpha_s=self.alpha_s, inside=self.inside
        )
        return geometry.attention_matrix(restricted)


def class_activation(
    backbone: nn.Module, variables: Mapping[str, Any], features: Array, classes: Array
) -> Array:
    """The class activation map: the classifier at each place, without its bias.

    The mean over the places plus the bias is the class's score.

    Args:
      backbone: of a family, whose `classify` is linear.
      variables: of the backbone.
      features: ``[b, h, w, c]``, the last feature map.
      classes: int ``[b]``, whose map is wanted.

    Returns:
      ``[b, h, w]``, of either sign.

    Source: Zhou et al., "Learning deep features for discriminative localization", 2016.
    """
    scores = backbone.apply(variables, features, method="classify")
    bias = backbone.apply(variables, jnp.zeros_like(features[0, 0]), method="classify")
    assert isinstance(scores, Array)
    assert isinstance(bias, Array)
    chosen = classes[:, None, None, None]
    return jnp.take_along_axis(scores - bias, chosen, -1)[..., 0]


def places_px(
    backbone: nn.Module, shape: Sequence[int], crop_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the cells of a feature map look: y of its rows ``[h]``, x of its columns.

    Args:
      backbone: of a family, which knows the centres of its receptive fields.
      shape: ``(h, w)`` of the map.
      crop_px: height and width of the crop.
    """
    place: Any = backbone.feature_place_px  # pyright: ignore[reportAttributeAccessIssue]
    rows, columns = (np.asarray(place(np.arange(n), crop_px), float) for n in shape)
    return rows, columns


def peak_px(activation: np.ndarray, rows_px: np.ndarray, columns_px: np.ndarray):
    """``[n, 2]``: where maps ``[n, h, w]`` are strongest, at the centre of the cell."""
    width = activation.shape[2]
    peak = activation.reshape(len(activation), -1).argmax(-1)
    return np.stack([columns_px[peak % width], rows_px[peak // width]], -1)


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


def enlarge(
    activation: np.ndarray, rows_px: np.ndarray, columns_px: np.ndarray, crop_px: int
) -> np.ndarray:
    """A map ``[h, w]`` at each pixel ``[crop, crop]``, bilinear between cells' centres.

    For pictures: beyond the outermost centres a map goes on as it is there.
    """
    pixels = np.arange(crop_px)
    wide = np.stack([np.interp(pixels, columns_px, row) for row in activation])
    return np.stack([np.interp(pixels, rows_px, column) for column in wide.T], 1)


def corners_px(matrix: np.ndarray, crop_px: int) -> np.ndarray:
    """The attention's parallelogram: corners ``[..., 4, 2]`` in pixels of the crop.

    They go around it, from the attention's own top left over its top right, and may lie
    outside the crop, where the attention is padding.

    Args:
      matrix: ``[..., 2, 3]``, of a `Head`.
      crop_px: height and width of the crop.

    Source: Eq. (2) and (4), at the corners of the grid.
    """
    unit = np.array([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]], np.float64)
    frame = np.einsum("...rk,ck->...cr", np.asarray(matrix, np.float64), unit)
    return (frame + 1) / 2 * (crop_px - 1)


def gamma_of(matrix: np.ndarray) -> np.ndarray:
    """Gamma_res ``[..., 4]`` of matrices of Eq. (4), with a scale of 0 or more.

    A negative scale is a half turn, and comes back as one.
    """
    m = np.asarray(matrix)
    scale, angle_rad = (
        np.hypot(m[..., 0, 0], m[..., 1, 0]),
        np.arctan2(m[..., 1, 0], m[..., 0, 0]),
    )
    return np.stack([m[..., 0, 2], m[..., 1, 2], scale, angle_rad], -1)


def shown_to_second_stream(
    images: Array, matrices: np.ndarray, size_px: int, *, softness: float | None = None
) -> tuple[Array, Array]:
    """Attention and redundancy of pictures, as N_ar is shown them (Sec. 3.1).

    Args:
      images: ``[b, H, W, 3]``, normalised.
      matrices: ``[b, 2, 3]`` of Eq. (4).
      size_px: of what comes back.
      softness: of the redundancy's edge; None: hard, Eq. (5).

    Returns:
      Two ``[b, size, size, 3]``, normalised: 0 outside a picture and where it is left
      out. The second means nothing for an STN, whose matrices are not of Eq. (4).
    """
    size = (size_px, size_px)
    theta = jnp.asarray(matrices, jnp.float32)
    gamma_res = jnp.asarray(gamma_of(matrices), jnp.float32)
    attended = geometry.bilinear_sample(images, geometry.affine_grid(theta, size))
    if softness is None:
        grid = geometry.redundancy_grid(gamma_res, size)
        return attended, geometry.bilinear_sample(images, grid)
    identity = jnp.tile(jnp.eye(2, 3), (len(images), 1, 1))
    whole = geometry.bilinear_sample(images, geometry.affine_grid(identity, size))
    weight = geometry.redundancy_weight(gamma_res, size, softness=softness)
    return attended, whole * weight[..., None]


def centre_offset_px(size_px: Sequence[int], crop_px: int) -> np.ndarray:
    """``(left, top)`` of the centre crop in a picture of ``(width, height)``."""
    return (np.asarray(size_px) - crop_px) // 2


def in_picture(
    points_px: np.ndarray, size_px: Sequence[int], crop_px: int
) -> np.ndarray:
    """Points of the centre crop ``[..., 2]`` as fractions of the whole picture.

    Args:
      points_px: in pixels of the crop.
      size_px: ``(width, height)`` of the picture that the crop was cut out of.
      crop_px: height and width of the crop.

    Returns:
      ``[..., 2]``; 0 and 1 are the picture's edges.
    """
    return (points_px + 0.5 + centre_offset_px(size_px, crop_px)) / np.asarray(size_px)


def box_in_crop_px(
    box: Sequence[float], size_px: Sequence[int], crop_px: int
) -> tuple[float, float, float, float]:
    """What the centre crop shows of a box, in pixels of the crop.

    Args:
      box: fractions of the whole picture.
      size_px: ``(width, height)`` of the picture that the crop is cut out of.
      crop_px: height and width of the crop.

    Returns:
      A box within the crop; of area 0 where the crop shows nothing of it.
    """
    corners = np.reshape(np.asarray(box, np.float64), (2, 2)) * np.asarray(size_px)
    corners -= 0.5 + centre_offset_px(size_px, crop_px)
    x_min, y_min, x_max, y_max = np.clip(corners, -0.5, crop_px - 0.5).ravel().tolist()
    return x_min, y_min, x_max, y_max


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
