"""The streams wired together: CRA-CNN, the baseline, and the STN of Fig. 4 (Sec. 3).

Whatever the kind, `params["classification_stream"]` is exactly the tree of the plain
backbone, and the backbone alone is what evaluation builds, restores and runs. The
regularization stream and the attention head exist in training only.
"""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from cra_jax import geometry, losses

# Of the guard's spring, in loss a picture per squared unit of Gamma. The head moves
# Gamma by at most 2 lr / (1 - momentum) times the gradient: stable up to lr 0.2.
_STIFFNESS = 0.5

KINDS = ("cra", "baseline", "stn")
REDUNDANCIES = ("hard", "soft")


@struct.dataclass
class Outputs:
    """What training sees of a batch; None where the kind has no such thing.

    Attributes:
      logits: ``[b, k]`` scores of the classification stream.
      gamma: ``[b, 4]`` attention parameters before the restriction, Eq. (3); for the
        STN ``[b, 6]``, Theta in rows, Eq. (2).
      gamma_res: ``[b, 4]`` after it, Eq. (6).
      attention_logits: ``[b, k]`` scores of the regularization stream for the
        attention.
      redundancy_logits: ``[b, k]`` and for the redundancy.
      inner_logits: ``[b, k]`` and for the inner attention.
    """

    logits: Array
    gamma: Array | None = None
    gamma_res: Array | None = None
    attention_logits: Array | None = None
    redundancy_logits: Array | None = None
    inner_logits: Array | None = None


class CRACNN(nn.Module):
    """Both streams and the ART module between them; make one with `create`.

    Attributes:
      kind: one of `KINDS`.
      classification_stream: N_cls, a backbone.
      regularization_stream: N_ar, a backbone of the same shape; None for the baseline.
      art_size_px: height and width of attention and redundancy.
      alpha_p: bound of the attention's place, Eq. (6).
      alpha_s: bound of its scale, Eq. (6).
      start: Gamma_res before training.
      redundancy: "hard", Eq. (5), or "soft".
      softness: width of the soft edge, in units of the frame.
      gradient_clip: limit on the gradient of one picture's loss to each entry of the
        affine matrix, as in the authors' released code; 0: none. An inner attention
        has no matrix of its own: both attentions' gradient to the one is clipped.
      gradient_share: of the gradient that goes from Gamma back to N_cls, how much gets
        there; 1: all of it, as in the paper. The head itself always learns from all.
      normalize_head: whether the attention head sees pooled features of length 1.
        With raw ones, as in the paper, a step moves Gamma in proportion to their
        squared length, which is in the hundreds.
      inside: whether the attention stays in the picture, see `geometry.restrict`.
      guard: beyond which share of its bound (a tanh) place and scale are held, see
        `hold_inside`; 0: unguarded, as in the paper.
      ar_passes: 1: all that N_ar sees goes through it as one batch; 2: attention,
        redundancy and inner attention go through it one after the other, each with
        BatchNorm statistics of its own.
      inner_scale: N_ar sees a second, inner attention as well, of the same place and
        angle, whose scale is this share of the first one's; 0: it sees none, as in the
        paper. CRA-CNN's alone.
    """

    kind: str
    classification_stream: nn.Module
    regularization_stream: nn.Module | None
    art_size_px: int
    alpha_p: float
    alpha_s: float
    start: tuple[float, float, float, float]
    redundancy: str
    softness: float
    gradient_clip: float
    gradient_share: float
    normalize_head: bool
    inside: bool
    guard: float
    ar_passes: int
    inner_scale: float

    @nn.compact
    def __call__(self, images: Array, train: bool = False) -> Outputs:
        """Runs everything that the kind has on ``[b, H, W, 3]`` normalised pictures."""
        classified = self.classification_stream(images, train)
        if self.regularization_stream is None:
            return Outputs(classified.logits)
        # From the last pooling, in float32 or wider: coordinates need the digits.
        pooled = classified.pooled
        if self.normalize_head:
            pooled = losses.l2_normalize(pooled)
        if self.gradient_share < 1:
            held_back = (1 - self.gradient_share) * jax.lax.stop_gradient(pooled)
            pooled = self.gradient_share * pooled + held_back
        gamma = nn.Dense(
            6 if self.kind == "stn" else 4,
            kernel_init=nn.initializers.normal(1e-3),
            bias_init=lambda *_: jnp.array(self._start(), jnp.float32),
            precision="highest",  # accelerators round products: see above
            name="attention_head",
        )(pooled)
        if self.kind == "stn":
            attention = self._attend(images, self._clip(gamma.reshape(-1, 2, 3)))
            regularized = self.regularization_stream(attention, train)
            return Outputs(
                classified.logits, gamma, attention_logits=regularized.logits
            )
        gamma_res = geometry.restrict(
            hold_inside(gamma, self.guard) if self.guard else gamma,
            alpha_p=self.alpha_p,
            alpha_s=self.alpha_s,
            inside=self.inside,
        )
        matrix = self._clip(geometry.attention_matrix(gamma_res))
        parts = [self._attend(images, matrix), self._leave_out(images, gamma_res)]
        if self.inner_scale:
            # Eq. (4) with a share of the scale, which is in all but the last column.
            shares = jnp.array([self.inner_scale, self.inner_scale, 1.0], matrix.dtype)
            parts.append(self._attend(images, shares * matrix))
        if self.ar_passes == 1:
            together = self.regularization_stream(jnp.concatenate(parts), train).logits
            logits = jnp.split(together, len(parts))
        else:
            logits = [self.regularization_stream(part, train).logits for part in parts]
        return Outputs(classified.logits, gamma, gamma_res, *logits)

    def _start(self) -> list[float]:
        """The attention head's bias, such that training starts at `start`."""
        x, y, scale, angle_rad = self.start
        if self.kind == "stn":
            cos, sin = scale * math.cos(angle_rad), scale * math.sin(angle_rad)
            return [cos, -sin, x, sin, cos, y]
        p, s = _place_bound(self.start, self.alpha_p, self.inside), self.alpha_s
        return [math.atanh(x / p), math.atanh(y / p), math.atanh(scale / s), angle_rad]

    def _clip(self, matrix: Array) -> Array:
        """The matrices ``[b, 2, 3]`` themselves; their gradient is clipped."""
        if not self.gradient_clip:
            return matrix
        # The loss is a mean over the batch, so a picture's own gradient is b times what
        # arrives here.
        return clip_gradient(matrix, self.gradient_clip / len(matrix))

    def _attend(self, images: Array, matrix: Array) -> Array:
        """The attention ``[b, s, s, 3]`` that ``[b, 2, 3]`` matrices cut out."""
        grid = geometry.affine_grid(matrix, (self.art_size_px, self.art_size_px))
        return geometry.bilinear_sample(images, grid)

    def _leave_out(self, images: Array, gamma_res: Array) -> Array:
        """The redundancy ``[b, s, s, 3]``: the whole picture without the attention."""
        size = (self.art_size_px, self.art_size_px)
        if self.redundancy == "hard":
            grid = geometry.redundancy_grid(gamma_res, size)
            return geometry.bilinear_sample(images, jax.lax.stop_gradient(grid))
        identity = jnp.tile(jnp.eye(2, 3), (len(images), 1, 1))
        whole = geometry.bilinear_sample(images, geometry.affine_grid(identity, size))
        weight = geometry.redundancy_weight(gamma_res, size, softness=self.softness)
        return whole * weight[..., None].astype(whole.dtype)


@jax.custom_vjp
def clip_gradient(x: Array, limit: float) -> Array:
    """`x` itself; its gradient is clipped to ``[-limit, limit]``, entry by entry."""
    del limit
    return x


clip_gradient.defvjp(
    lambda x, limit: (x, limit),
    lambda limit, cotangent: (jnp.clip(cotangent, -limit, limit), None),
)


@jax.custom_vjp
def hold_inside(gamma: Array, share: float) -> Array:
    """`gamma` itself, with a valve and a spring in its gradient.

    Far out tanh is flat, and no loss could bring Gamma back. So where ``|tanh gamma|``
    exceeds `share` for place or scale, nothing pushes a picture's Gamma further out
    (the valve), and it is drawn back in proportion to its excess (the spring, which
    overcomes what pictures that are still inside do to the shared weights).

    Args:
      gamma: ``[b, 4]``, before the restriction; the loss is a mean over ``b``.
      share: of the bound of Eq. (6), in 0..1.

    Returns:
      ``[b, 4]``.

    Differs: the paper has no such guard.
    """
    del share
    return gamma


def beyond(gamma: Array, share: float) -> Array:
    """Which of place and scale use more than `share` of their bound: ``[b, 3]``."""
    return jnp.abs(jnp.tanh(gamma[..., :3])) > share


def _hold_inside_backward(residuals, cotangent: Array):
    gamma, share = residuals
    held = jnp.pad(beyond(gamma, share), ((0, 0), (0, 1)))
    outwards = cotangent * gamma < 0  # descent adds minus the gradient
    excess = gamma - jnp.sign(gamma) * jnp.arctanh(share)
    spring = _STIFFNESS * excess / len(gamma)
    return jnp.where(held, jnp.where(outwards, 0, cotangent) + spring, cotangent), None


hold_inside.defvjp(lambda gamma, share: (gamma, (gamma, share)), _hold_inside_backward)


def create(
    kind: str,
    make_backbone,
    *,
    art_size_px: int = 224,
    alpha_p: float = 1.0,
    alpha_s: float = 0.5,
    init: Sequence[float] = (0.0, 0.0, 0.45, 0.0),
    redundancy: str = "hard",
    softness: float = 0.05,
    gradient_clip: float = 1.0,
    gradient_share: float = 1.0,
    normalize_head: bool = True,
    inside: bool = False,
    guard: float = 0.95,
    ar_passes: int = 1,
    inner_scale: float = 0.0,
) -> CRACNN:
    """The network to train; the arguments are `CRACNN`'s attributes.

    Args:
      kind: "cra", "baseline" or "stn".
      make_backbone: called without arguments, once for each stream.
      art_size_px: see `CRACNN`, as for the rest.
      alpha_p: in (0, 1].
      alpha_s: in (0, 1].
      init: strictly inside the bounds.
      redundancy: one of `REDUNDANCIES`.
      softness: above 0.
      gradient_clip: 0 or more.
      gradient_share: in [0, 1].
      normalize_head: False as in the paper.
      inside: needs an `alpha_s` of at most ``1 / sqrt 2``.
      guard: in [0, 1).
      ar_passes: 1 or 2.
      inner_scale: in [0, 1).

    Raises:
      ValueError: an argument is unknown or out of range.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown model.kind {kind!r}; choose from {', '.join(KINDS)}")
    if redundancy not in REDUNDANCIES:
        raise ValueError(
            f"unknown art.redundancy {redundancy!r}; choose from {REDUNDANCIES}"
        )
    if ar_passes not in (1, 2):
        raise ValueError(f"model.ar_passes must be 1 or 2, not {ar_passes}")
    if not (0 < alpha_p <= 1 and 0 < alpha_s <= 1):
        raise ValueError(
            f"art.alpha_p={alpha_p} and art.alpha_s={alpha_s} must be in (0, 1]"
        )
    if inside and alpha_s > math.sqrt(0.5):
        raise ValueError(
            f"art.inside=True cannot keep an attention of art.alpha_s={alpha_s} in the "
            "picture at every angle: set art.alpha_s to 0.7 or less"
        )
    bound = _place_bound(init, alpha_p, inside)
    bounds = (bound, bound, alpha_s)
    if any(abs(value) >= bound for value, bound in zip(init, bounds, strict=False)):
        raise ValueError(
            f"art.init={tuple(init)} must lie strictly inside the bounds of Eq. 6"
            f"{' and in the picture' if inside else ''}, {bounds}"
        )
    if not 0 <= guard < 1:
        raise ValueError(f"art.guard must be in [0, 1), not {guard}")
    if not 0 <= gradient_share <= 1:
        raise ValueError(f"art.gradient_share must be in [0, 1], not {gradient_share}")
    if not 0 <= inner_scale < 1:
        raise ValueError(
            f"art.inner_scale={inner_scale} must be in [0, 1): a share of the "
            "attention's own scale, such as 0.5, or 0 for no inner attention"
        )
    if inner_scale and kind != "cra":
        raise ValueError(
            f"art.inner_scale={inner_scale} is a second attention of CRA-CNN's, and "
            f"model.kind={kind!r} has none: set it to 0"
        )
    if gradient_clip < 0 or softness <= 0 or art_size_px < 1:
        raise ValueError(
            f"art.gradient_clip={gradient_clip} must be 0 or more, "
            f"art.softness={softness} and art.size_px={art_size_px} above 0"
        )
    return CRACNN(
        kind=kind,
        classification_stream=make_backbone(),
        regularization_stream=None if kind == "baseline" else make_backbone(),
        art_size_px=art_size_px,
        alpha_p=alpha_p,
        alpha_s=alpha_s,
        start=tuple(init),  # pyright: ignore[reportArgumentType]
        redundancy=redundancy,
        softness=softness,
        gradient_clip=gradient_clip,
        gradient_share=gradient_share,
        normalize_head=normalize_head,
        inside=inside,
        guard=guard,
        ar_passes=ar_passes,
        inner_scale=inner_scale,
    )


def _place_bound(gamma_res: Sequence[float], alpha_p: float, inside: bool) -> float:
    """The bound of the place in `geometry.restrict`, at one Gamma_res."""
    _, _, scale, angle_rad = gamma_res
    reach = abs(scale) * (abs(math.cos(angle_rad)) + abs(math.sin(angle_rad)))
    return min(alpha_p, 1 - reach) if inside else alpha_p
