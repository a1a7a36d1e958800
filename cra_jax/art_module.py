"""The ART module: features of N_cls -> input of the second stream (Sec. 3.1).

`AttentionHead` predicts the attention parameters Gamma, Eq. (3) and (6). `views`
samples the attention and the redundancy from the image, Eq. (4) and (5). Training,
figures and prediction use both.

Points are ``(x, y)``. Pixel coordinates are those of the network's input crop, with
pixel centres at integers, so that the crop extends from -0.5 to size - 0.5.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from cra_jax import geometry, losses

CLASSIFICATION_STREAM = "classification_stream"
REGULARIZATION_STREAM = "regularization_stream"
ATTENTION_HEAD = "attention_head"
"""Keys of the parts in a tree of parameters."""

REDUNDANCIES = ("hard", "soft", "filled")
HEADS = ("pooled", "spatial")

# Width of the edges of a soft redundancy, in grid coordinates; the image is 2 wide.
_SOFTNESS = 0.05

# Strength of the guard, in loss per image and squared unit of Gamma. A step changes
# Gamma by at most 2 lr / (1 - momentum) times the gradient, so it is stable to lr 0.2.
_GUARD_STRENGTH = 0.5

# Sharpness of a spatial head's map, and its gain at the start before it is divided by
# the bound of the centre: the softmax of a soft map has its mean near the middle.
_SHARPNESS = 4.0
_GAIN = 2.5


@dataclasses.dataclass(frozen=True)
class ArtConfig:
    """Options of the ART module; `config.art` has the same keys.

    Raises:
      ValueError: an option is unknown or out of range.
    """

    # --- the paper -----------------------------------------------------------------
    size_px: int = 224
    """Height and width of attention and redundancy (Sec. 4.1)."""
    alpha_p: float = 1.0
    """Bound of the attention's centre, in (0, 1] (Eq. 6, Sec. 4.1)."""
    alpha_s: float = 0.5
    """Bound of its scale, in (0, 1] (Eq. 6, Sec. 4.1)."""
    init: tuple[float, float, float, float] = (0.0, 0.0, 0.45, 0.0)
    """Gamma_res before training, strictly inside the bounds. The paper does not give
    it; a bias of 0 would mean scale 0, a constant image without a gradient."""

    # --- the four guards; the variant `paper` turns them off ------------------------
    gradient_clip: float = 1.0
    """Limit on the gradient of one image's loss to each entry of the affine matrix, as
    in the authors' released code; 0: no limit. An inner attention shares the matrix,
    so the sum of both gradients is clipped."""
    normalize_head: bool = True
    """Whether the head gets pooled features of length 1. With raw features a step
    moves Gamma in proportion to their squared length, which is in the hundreds."""
    inside: bool = True
    """Whether the attention stays inside the image, see `geometry.restrict`. Otherwise
    its padding can reveal the class to the second stream. Needs alpha_s <= 0.7."""
    guard: float = 0.95
    """Share of the bounds, in [0, 1), beyond which a restoring gradient acts on centre
    and scale, see `guard_gradient`; 0: never."""

    # --- beyond the paper -----------------------------------------------------------
    head: str = "pooled"
    """How Gamma is predicted: "pooled", all of it from the pooled features (Sec. 4.1),
    or "spatial", the centre from the feature map, see `AttentionHead`."""
    redundancy: str = "hard"
    """Edges of the redundancy: "hard" (Eq. 5, no gradient), "soft" (logistic), or
    "filled", hard with the image beside the attention in place of the hole."""
    rotate: bool = True
    """Whether the angle is predicted; otherwise it keeps its value in `init`."""
    gradient_share: float = 1.0
    """Share, in [0, 1], of Gamma's gradient that reaches N_cls. The head itself always
    gets the full gradient."""
    inner_scale: float = 0.0
    """Scale of an inner attention as a share of the attention's scale, in [0, 1); 0: no
    inner attention. It has the same centre and angle, and is another input of N_ar;
    L_cls2 is the mean of both."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("redundancy", self.redundancy, REDUNDANCIES),
            ("head", self.head, HEADS),
        ):
            if value not in known:
                raise ValueError(
                    f"unknown art.{name} {value!r}; choose from {', '.join(known)}"
                )
        for name, holds, rule in (
            ("size_px", self.size_px >= 1, "1 or more"),
            ("alpha_p", 0 < self.alpha_p <= 1, "in (0, 1]"),
            ("alpha_s", 0 < self.alpha_s <= 1, "in (0, 1]"),
            ("gradient_clip", self.gradient_clip >= 0, "0 or more"),
            ("guard", 0 <= self.guard < 1, "in [0, 1)"),
            ("gradient_share", 0 <= self.gradient_share <= 1, "in [0, 1]"),
            ("inner_scale", 0 <= self.inner_scale < 1, "in [0, 1)"),
        ):
            if not holds:
                raise ValueError(f"art.{name}={getattr(self, name)} must be {rule}")
        if self.inside and self.alpha_s > math.sqrt(0.5):
            raise ValueError(
                f"art.inside=True cannot keep an attention of art.alpha_s="
                f"{self.alpha_s} inside the image at every angle: set art.alpha_s to "
                "0.7 or less"
            )
        bounds = (self.place_bound, self.place_bound, self.alpha_s)
        if any(abs(x) >= bound for x, bound in zip(self.init, bounds, strict=False)):
            raise ValueError(
                f"art.init={tuple(self.init)} must lie strictly inside the bounds of "
                f"Eq. 6{' and inside the image' if self.inside else ''}, {bounds}"
            )

    @property
    def place_bound(self) -> float:
        """Bound of the centre at `init`, see `geometry.restrict`."""
        if not self.inside:
            return self.alpha_p
        _, _, scale, angle_rad = self.init
        return float(geometry.place_bound(scale, angle_rad, alpha_p=self.alpha_p))


@struct.dataclass
class Attention:
    """Position of the attention in each image of a batch.

    Attributes:
      gamma: ``[b, 4]``, attention parameters before the restriction, Eq. (3); for the
        STN ``[b, 6]``, the rows of Theta, Eq. (2).
      gamma_res: ``[b, 4]``, restricted attention parameters, Eq. (6); None for the STN.
      matrix: ``[b, 2, 3]``, affine matrices for `geometry.affine_grid`.
    """

    gamma: Array
    gamma_res: Array | None
    matrix: Array


class AttentionHead(nn.Module):
    """Features of N_cls -> `Attention`, in training and in prediction.

    The head "pooled" is one fully connected layer on the pooled features, Eq. (3). The
    head "spatial" predicts scale and angle in the same way, and the centre from a score
    of each cell k of the last feature map f, whose receptive field is centred at c_k::

        z_k = 4 (f_k . w) / |mean_k f_k|,    m = softmax(z),
        (gamma_1, gamma_2) = bias + gain * sum_k m_k (c_k - mean_k c_k)

    Its weights w are shared by all cells, and 0 at the start, so that training starts
    at `ArtConfig.init`. Without the mean of the c_k it would not, because the cells of
    most backbones are not centred in the image. Eq. (6) multiplies the centre by its
    bound, so the gain starts at 2.5 by that bound.

    Attributes:
      config: options of the ART module.
      kind: "cra", or "stn", which learns the six parameters of Eq. (2).

    Source: Sec. 4.1.

    Differs: the paper has no spatial head.
    """

    config: ArtConfig
    kind: str = "cra"

    @nn.compact
    def __call__(
        self, pooled: Array, features: Array, centres: tuple[Array, Array]
    ) -> Attention:
        """Predicts Gamma, and restricts it.

        Args:
          pooled: ``[b, c]``, mean of the feature map.
          features: ``[b, h, w, c]``, the last feature map.
          centres: result of `cell_centres`.
        """
        config = self.config
        if config.gradient_share < 1:
            pooled = scale_gradient(pooled, config.gradient_share)
            features = scale_gradient(features, config.gradient_share)
        gamma = self.gamma(pooled, features, centres)
        if self.kind == "stn":
            return Attention(gamma, None, self._clip(gamma.reshape(-1, 2, 3)))
        gamma_res = geometry.restrict(
            guard_gradient(gamma, config.guard) if config.guard else gamma,
            alpha_p=config.alpha_p,
            alpha_s=config.alpha_s,
            inside=config.inside,
        )
        matrix = self._clip(geometry.attention_matrix(gamma_res))
        return Attention(gamma, gamma_res, matrix)

    def gamma(
        self, pooled: Array, features: Array, centres: tuple[Array, Array]
    ) -> Array:
        """Gamma before the restriction: ``[b, 4]``, for the STN ``[b, 6]``."""
        config, bias = self.config, self._bias()
        spatial = config.head == "spatial"
        linear = nn.Dense(
            len(bias) - 2 * spatial,
            use_bias=False,
            kernel_init=nn.initializers.normal(1e-3),
            precision="highest",  # the rounding of accelerators is too coarse here
        )
        nn.share_scope(self, linear)
        gamma = linear(losses.l2_normalize(pooled) if config.normalize_head else pooled)
        if spatial:
            place = self._place(pooled, features, centres)
            gamma = jnp.concatenate([place, gamma], -1)
        gamma += self.param("bias", lambda _: jnp.array(bias, jnp.float32))
        if not config.rotate:
            angle = jnp.full((len(gamma), 1), config.init[3], gamma.dtype)
            gamma = jnp.concatenate([gamma, angle], -1)
        return gamma

    def _place(
        self, pooled: Array, features: Array, centres: tuple[Array, Array]
    ) -> Array:
        """gamma_1 and gamma_2 of the spatial head, without their bias: ``[b, 2]``."""
        scores = nn.Dense(
            1,
            use_bias=False,
            kernel_init=nn.initializers.zeros,
            precision="highest",
            name="place_conv",
        )(features.astype(pooled.dtype))[..., 0]
        if self.config.normalize_head:
            scores = scores / losses.safe_length(pooled)[..., None]
        gain = nn.initializers.constant(_GAIN / self.config.place_bound)
        place = mean_place(_SHARPNESS * scores, centres)
        return self.param("place_gain", gain, (2,)) * place

    def _bias(self) -> list[float]:
        """Bias that makes training start at `ArtConfig.init`."""
        x, y, scale, angle_rad = self.config.init
        if self.kind == "stn":
            cos, sin = scale * math.cos(angle_rad), scale * math.sin(angle_rad)
            return [cos, -sin, x, sin, cos, y]
        p, s = self.config.place_bound, self.config.alpha_s
        bias = [math.atanh(x / p), math.atanh(y / p), math.atanh(scale / s)]
        return [*bias, angle_rad] if self.config.rotate else bias

    def _clip(self, matrix: Array) -> Array:
        """Clips the gradient of matrices ``[b, 2, 3]``; returns them unchanged."""
        if not self.config.gradient_clip:
            return matrix
        # The loss is a mean over the batch: the gradient of one image's loss is b times
        # the gradient here.
        return clip_gradient(matrix, self.config.gradient_clip / len(matrix))


@struct.dataclass
class TrainedHead:
    """An attention head and its weights, as a tree of arrays for a jitted step.

    Attributes:
      params: parameters of the head.
      head: the module.
    """

    params: Any
    head: AttentionHead = struct.field(pytree_node=False)

    def __call__(
        self, pooled: Array, features: Array, centres: tuple[Array, Array]
    ) -> Array:
        """Predicts matrices ``[b, 2, 3]``; the arguments are those of the head."""
        attention = self.head.apply({"params": self.params}, pooled, features, centres)
        assert isinstance(attention, Attention)
        return attention.matrix


def trained_head(
    params: Mapping[str, Any], config: ArtConfig, kind: str
) -> TrainedHead | None:
    """Selects the attention head in a tree of parameters; None if there is none.

    Args:
      params: parameters of a network of `model.create`, or of its head only.
      config: ART options of the training.
      kind: kind of the network.
    """
    if ATTENTION_HEAD not in params:
        return None
    return TrainedHead(params[ATTENTION_HEAD], AttentionHead(config, kind))


def cell_centres(backbone: Any, features: Array, images: Array) -> tuple[Array, Array]:
    """Centres of the receptive fields of the cells of a feature map.

    Args:
      backbone: has a `feature_place_px`, as each of `backbones.families`.
      features: ``[b, h, w, c]``, its last feature map.
      images: ``[b, H, W, 3]``, its images.

    Returns:
      y of the map's rows ``[h]`` and x of its columns ``[w]``, in the frame of
      `geometry`.
    """
    rows, columns = (
        2
        * np.asarray(backbone.feature_place_px(np.arange(cells), size_px), float)
        / (size_px - 1)
        - 1
        for cells, size_px in zip(features.shape[1:3], images.shape[1:3], strict=True)
    )
    dtype = jnp.promote_types(features.dtype, jnp.float32)
    return jnp.asarray(rows, dtype), jnp.asarray(columns, dtype)


def mean_place(scores: Array, centres: tuple[Array, Array]) -> Array:
    """Mean centre of the cells, weighted by the softmax of their scores.

    Args:
      scores: ``[b, h, w]``.
      centres: result of `cell_centres`.

    Returns:
      ``[b, 2]`` of ``(x, y)``, relative to the mean centre of all cells: 0 if all
      scores are equal.
    """
    weight = jax.nn.softmax(scores.reshape(len(scores), -1)).reshape(scores.shape)
    rows, columns = (places - places.mean() for places in centres)
    # Not a matrix product, because accelerators round its inputs.
    x, y = (weight.sum(1) * columns).sum(-1), (weight.sum(2) * rows).sum(-1)
    return jnp.stack([x, y], -1)


@struct.dataclass
class Views:
    """Inputs of N_ar for a batch, ``[b, size, size, c]`` each.

    Attributes:
      attention: crops of the matrices, Eq. (4); 0 outside the image.
      redundancy: the whole image, 0 inside the attention, Eq. (5); None for the STN.
      inner: a smaller attention inside the first; None without `ArtConfig.inner_scale`.
    """

    attention: Array
    redundancy: Array | None = None
    inner: Array | None = None


def views(images: Array, attention: Attention, config: ArtConfig) -> Views:
    """Samples the inputs of N_ar from images ``[b, H, W, c]``.

    Source: Sec. 3.1, Eq. (4) and (5).
    """
    size = (config.size_px, config.size_px)

    def crop(matrix: Array) -> Array:
        return geometry.bilinear_sample(images, geometry.affine_grid(matrix, size))

    if attention.gamma_res is None:
        return Views(crop(attention.matrix))
    if config.redundancy != "soft":
        filled = config.redundancy == "filled"
        grid = geometry.redundancy_grid(attention.gamma_res, size, filled=filled)
        redundancy = geometry.bilinear_sample(images, grid)
    else:
        whole = crop(jnp.tile(jnp.eye(2, 3), (len(images), 1, 1)))
        weight = geometry.redundancy_weight(
            attention.gamma_res, size, softness=_SOFTNESS
        )
        redundancy = whole * weight[..., None].astype(whole.dtype)
    inner = None
    if config.inner_scale:
        # Eq. (4) with a share of the scale, a factor of all columns but the last.
        share = config.inner_scale
        shares = jnp.array([share, share, 1.0], attention.matrix.dtype)
        inner = crop(shares * attention.matrix)
    return Views(crop(attention.matrix), redundancy, inner)


@jax.custom_vjp
def clip_gradient(x: Array, limit: float) -> Array:
    """Returns `x`; clips each entry of its gradient to ``[-limit, limit]``."""
    del limit
    return x


clip_gradient.defvjp(
    lambda x, limit: (x, limit),
    lambda limit, cotangent: (jnp.clip(cotangent, -limit, limit), None),
)


@jax.custom_vjp
def scale_gradient(x: Array, share: float) -> Array:
    """Returns `x`; multiplies its gradient by `share`."""
    del share
    return x


scale_gradient.defvjp(
    lambda x, share: (x, share),
    lambda share, cotangent: (share * cotangent, None),
)


@jax.custom_vjp
def guard_gradient(gamma: Array, share: float) -> Array:
    """Returns `gamma`; adds a restoring gradient near the bounds of Eq. (6).

    If ``|tanh gamma|`` of a centre coordinate or the scale exceeds `share`, a gradient
    that would increase it further is set to 0, and a restoring gradient proportional to
    the excess is added. Without it, tanh is so flat there that no loss can move Gamma
    back. The restoring gradient outweighs the effect of the other images of the batch
    on the shared weights.

    Args:
      gamma: ``[b, 4]``, before the restriction; the loss is a mean over ``b``.
      share: share of the bound of Eq. (6), in 0..1.

    Returns:
      ``[b, 4]``.

    Differs: the paper has no such guard.
    """
    del share
    return gamma


def is_beyond(gamma: Array, share: float) -> Array:
    """Whether x, y and scale exceed `share` of their bounds: bool ``[b, 3]``."""
    return jnp.abs(jnp.tanh(gamma[..., :3])) > share


def _guard_backward(residuals, cotangent: Array):
    gamma, share = residuals
    guarded = jnp.pad(is_beyond(gamma, share), ((0, 0), (0, 1)))
    outwards = cotangent * gamma < 0  # descent subtracts the gradient
    excess = gamma - jnp.sign(gamma) * jnp.arctanh(share)
    restoring = _GUARD_STRENGTH * excess / len(gamma)
    inwards = jnp.where(outwards, 0, cotangent) + restoring
    return jnp.where(guarded, inwards, cotangent), None


guard_gradient.defvjp(lambda gamma, share: (gamma, (gamma, share)), _guard_backward)


def corners_px(matrix: np.ndarray, crop_px: int) -> np.ndarray:
    """Corners of the attention's parallelogram, in pixels of the crop.

    Args:
      matrix: ``[..., 2, 3]``, matrices of an `Attention`.
      crop_px: height and width of the crop.

    Returns:
      ``[..., 4, 2]``: top left, top right, bottom right and bottom left corner of the
      attention. Corners may lie outside the crop, where the attention is padding.

    Source: Eq. (2) and (4), at the corners of the grid.
    """
    unit = np.array([[-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]], np.float64)
    frame = np.einsum("...rk,ck->...cr", np.asarray(matrix, np.float64), unit)
    return (frame + 1) / 2 * (crop_px - 1)


def gamma_of(matrix: np.ndarray) -> np.ndarray:
    """Gamma_res ``[..., 4]`` of matrices of Eq. (4), with a scale of 0 or more.

    A negative scale is returned as a positive scale and a half turn.
    """
    m = np.asarray(matrix)
    scale, angle_rad = (
        np.hypot(m[..., 0, 0], m[..., 1, 0]),
        np.arctan2(m[..., 1, 0], m[..., 0, 0]),
    )
    return np.stack([m[..., 0, 2], m[..., 1, 2], scale, angle_rad], -1)
