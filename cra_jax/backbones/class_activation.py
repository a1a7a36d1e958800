"""Class activation maps (CAM), and the pixel coordinates of their cells.

Points are ``(x, y)`` in pixels of the crop that the network receives. Pixel centres are
integers, so the crop reaches from -0.5 to size - 0.5.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array


def class_activation(
    backbone: nn.Module, variables: Mapping[str, Any], features: Array, classes: Array
) -> Array:
    """The class activation map: the classifier at each cell, without its bias.

    The mean over the cells plus the bias is the class's score.

    Args:
      backbone: a `families.Backbone`, whose `classify` is linear.
      variables: of the backbone.
      features: ``[b, h, w, c]``, the last feature map.
      classes: int ``[b]``, the class of each image's map.

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
    """Centres of the receptive fields of the cells of a feature map.

    Args:
      backbone: a `families.Backbone`.
      shape: ``(h, w)`` of the map.
      crop_px: height and width of the crop.

    Returns:
      y of the map's rows ``[h]`` and x of its columns ``[w]``.
    """
    place: Any = backbone.feature_place_px  # pyright: ignore[reportAttributeAccessIssue]
    rows, columns = (np.asarray(place(np.arange(n), crop_px), float) for n in shape)
    return rows, columns


def peak_px(activation: np.ndarray, rows_px: np.ndarray, columns_px: np.ndarray):
    """Centre ``[n, 2]`` of the cell with the largest value of maps ``[n, h, w]``."""
    width = activation.shape[2]
    peak = activation.reshape(len(activation), -1).argmax(-1)
    return np.stack([columns_px[peak % width], rows_px[peak // width]], -1)


def enlarge(
    activation: np.ndarray, rows_px: np.ndarray, columns_px: np.ndarray, crop_px: int
) -> np.ndarray:
    """A map ``[h, w]`` at each pixel ``[crop, crop]``, bilinear between cell centres.

    Beyond the outermost centres the values of the nearest cells continue.
    """
    pixels = np.arange(crop_px)
    wide = np.stack([np.interp(pixels, columns_px, row) for row in activation])
    return np.stack([np.interp(pixels, rows_px, column) for column in wide.T], 1)
