"""The losses on arrays: Eq. 7, Eq. 8, and which pictures are contrasted.

Shapes: ``b`` batch, ``p`` pairs, ``d`` feature size, ``k`` classes.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

# Euclidean length along the last axis, with gradient 0 at 0 instead of NaN.
_norm = partial(optax.safe_norm, min_norm=0.0, axis=-1)

DISTANCES = ("euclidean", "squared")
PAIRS = ("random", "all")


def cross_entropy(logits: Array, labels: Array, *, smoothing: float = 0.0) -> Array:
    """Softmax cross-entropy, L_cls1 and L_cls2 of Eq. (9).

    Args:
      logits: ``[b, k]``.
      labels: ``[b]``.
      smoothing: share of the probability that is spread evenly over all classes, the
        right one among them.

    Returns:
      ``[b]``.

    Source of the smoothing: Szegedy et al., "Rethinking the Inception architecture for
      computer vision", 2016, Sec. 7. The paper has none.
    """
    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(targets, smoothing)
    return optax.softmax_cross_entropy(logits, targets)


@struct.dataclass
class MixedLabels:
    """Labels of pictures that hold a part of another; see `mixing`.

    Attributes:
      own: int ``[b]``, of each picture.
      other: int ``[b]``, of what was pasted in.
      own_weight: ``[b]``.
      other_weight: ``[b]``; 0 where nothing was. The two need not sum to 1.
    """

    own: Array
    other: Array
    own_weight: Array
    other_weight: Array

    def heavier(self) -> Array:
        """The label that weighs more: ``[b]``."""
        return jnp.where(self.other_weight > self.own_weight, self.other, self.own)


def mixed_cross_entropy(
    logits: Array, labels: MixedLabels, *, smoothing: float = 0.0
) -> Array:
    """Cross-entropies against both labels, weighted and summed: ``[b, k] -> [b]``."""
    own = cross_entropy(logits, labels.own, smoothing=smoothing)
    other = cross_entropy(logits, labels.other, smoothing=smoothing)
    return labels.own_weight * own + labels.other_weight * other


def restriction_loss(
    gamma_res: Array,
    *,
    expectation: Sequence[float] = (0.0, 0.0, 0.5, 0.0),
    threshold: Sequence[float] = (0.4, 0.4, 0.4, math.pi),
) -> Array:
    """L_res: how far Gamma is from what is expected, where it is too far.

    A parameter counts once it is further than its threshold from its expectation, and
    then with its whole distance.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.
      expectation: E, the centre crop of half the picture's width.
      threshold: T.

    Returns:
      ``[b]``. Inside the thresholds the value and the gradient are 0, never NaN.

    Source: Eq. (7).

    Differs: the gate ``max(0, u) / (u + eps)`` is its limit, 0 or 1, and a constant to
    the gradient: its own slope, 1/eps near u = 0, would throw Gamma about.
    """
    distance = gamma_res - jnp.array(expectation, gamma_res.dtype)
    outside = jnp.abs(distance) > jnp.array(threshold, gamma_res.dtype)
    return _norm(jnp.where(outside, distance, 0))


def contrastive_loss(
    attention_m: Array,
    attention_n: Array,
    redundancy_m: Array,
    redundancy_n: Array,
    *,
    margin: float = 0.7,
    distance: str = "euclidean",
) -> Array:
    """L_cntr: two redundancies are alike, each unlike its own attention.

    Args:
      attention_m: ``[p, d]``, feature of the attention of the pair's first picture.
      attention_n: ``[p, d]``, and of its second.
      redundancy_m: ``[p, d]``, feature of the redundancy of the first.
      redundancy_n: ``[p, d]``, and of the second.
      margin: by how much further the attention must be.
      distance: "euclidean", or "squared" as in the authors' released layer.

    Returns:
      ``[p]``, the sum of both hinges. Its gradient is finite where features coincide.

    Source: Eq. (8).
    """
    if distance not in DISTANCES:
        raise ValueError(f"distance {distance!r} is unknown; one of {DISTANCES}")

    def apart(a: Array, b: Array) -> Array:
        return _norm(a - b) if distance == "euclidean" else jnp.square(a - b).sum(-1)

    between = apart(redundancy_m, redundancy_n)
    hinge_m = between - apart(redundancy_m, attention_m) + margin
    hinge_n = between - apart(redundancy_n, attention_n) + margin
    return jnp.maximum(hinge_m, 0) + jnp.maximum(hinge_n, 0)


def l2_normalize(features: Array) -> Array:
    """Scales features to length 1, ``[..., d] -> [..., d]``; a zero stays zero."""
    norm = _norm(features)[..., None]
    return features / jnp.where(norm > 0, norm, 1)


def neighbour_pairs(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint pairs of neighbours: places ``(0, 1), (2, 3), ...`` of a batch.

    A batch is a run of the epoch's random order, so neighbours in it are random
    disjoint pairs, labels ignored: drawn by (seed, epoch, index) alone, and the same
    on any number of devices whose batches are even. In a batch of odd size the last
    picture has no partner that time.

    Returns:
      Places of the first and of the second pictures, ``[p]`` each.

    Raises:
      ValueError: there are fewer than 2 pictures.
    """
    _check_pairable(batch_size)
    first = np.arange(0, batch_size - 1, 2)
    return first, first + 1


def all_pairs(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every pair ``m < n`` of a batch.

    Returns:
      Places of the first and of the second pictures, ``[p]`` each.

    Raises:
      ValueError: there are fewer than 2 pictures.
    """
    _check_pairable(batch_size)
    return np.triu_indices(batch_size, k=1)


def _check_pairable(batch_size: int) -> None:
    if batch_size < 2:
        raise ValueError(
            f"L_cntr contrasts pairs, but a device's batch has {batch_size} image(s): "
            "raise train.batch_size to at least 2 per device, or set loss.cntr=0"
        )
