"""Class activation maps, and where in the image their cells lie.

Points are ``(x, y)``. Pixel coordinates are those of the crop that the network is
shown, pixel centres at integers, so that the crop reaches from -0.5 to size - 0.5.
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


def enlarge(
    activation: np.ndarray, rows_px: np.ndarray, columns_px: np.ndarray, crop_px: int
) -> np.ndarray:
    """A map ``[h, w]`` at each pixel ``[crop, crop]``, bilinear between cells' centres.

    For pictures: beyond the outermost centres a map goes on as it is there.
    """
    pixels = np.arange(crop_px)
    wide = np.stack([np.interp(pixels, columns_px, row) for row in activation])
    return np.stack([np.interp(pixels, rows_px, column) for column in wide.T], 1)
