"""Where a network looks: its class activation map, and the region that Gamma cuts out.

Points are ``(x, y)``. Pixel coordinates are those of the crop that the network is
shown, pixel centres at integers, so that the crop reaches from -0.5 to size - 0.5.
Boxes are ``(x_min, y_min, x_max, y_max)``.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from cra_jax import geometry, losses
from cra_jax.runtime.run_folder import Config


@struct.dataclass
class AttentionHead:
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


ATTENTION_HEAD = "attention_head"


def attention_head(config: Config, params: Mapping[str, Any]) -> AttentionHead | None:
    """What turns pooled features into attention; None where the kind has no such thing.

    Args:
      config: that the parameters were trained with.
      params: of `build_network`, or of them the attention head's alone.
    """
    if ATTENTION_HEAD not in params:
        return None
    head = params[ATTENTION_HEAD]
    art = config.art
    return AttentionHead(
        kernel=head["kernel"],
        bias=head["bias"],
        alpha_p=art.alpha_p,
        alpha_s=art.alpha_s,
        normalize=art.normalize_head,
        inside=art.get("inside", False),  # older checkpoints know Eq. 6 alone
    )
