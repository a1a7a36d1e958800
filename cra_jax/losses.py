"""Losses of Eq. (7), (8) and (9), and the pairs of Eq. (8).

Shapes: ``b`` batch size, ``p`` pairs, ``d`` feature size, ``k`` classes.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

DISTANCES = ("euclidean", "squared")
PAIRS = ("random", "all")
FEATURES = ("scores", "pooled")


def cross_entropy(logits: Array, labels: Array, *, smoothing: float = 0.0) -> Array:
    """Softmax cross-entropy, L_cls1 and L_cls2 of Eq. (9).

    Args:
      logits: ``[b, k]``.
      labels: ``[b]``.
      smoothing: share of the probability that is spread evenly over all classes,
        including the true one.

    Returns:
      ``[b]``.

    Source of the smoothing: Szegedy et al., "Rethinking the Inception architecture for
      computer vision", 2016, Sec. 7. The paper has none.
    """
    import optax  # here, because prediction does without

    if not smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    targets = optax.smooth_labels(targets, smoothing)
    return optax.softmax_cross_entropy(logits, targets)


@struct.dataclass
class MixedLabels:
    """Labels of images with a pasted part of another image; see `mixing`.

    Attributes:
      own: int ``[b]``, labels of the images.
      other: int ``[b]``, labels of the pasted parts.
      own_weight: ``[b]``, weights of `own`.
      other_weight: ``[b]``, weights of `other`; 0 where nothing was pasted. The two
        weights need not sum to 1.
    """

    own: Array
    other: Array
    own_weight: Array
    other_weight: Array

    def heavier(self) -> Array:
        """The label with the larger weight: ``[b]``."""
        return jnp.where(self.other_weight > self.own_weight, self.other, self.own)


def mixed_cross_entropy(
    logits: Array, labels: MixedLabels, *, smoothing: float = 0.0
) -> Array:
    """Weighted sum of the cross-entropies of both labels: ``[b, k] -> [b]``."""
    own = cross_entropy(logits, labels.own, smoothing=smoothing)
    other = cross_entropy(logits, labels.other, smoothing=smoothing)
    return labels.own_weight * own + labels.other_weight * other


def restriction_loss(
    gamma_res: Array,
    *,
    expectation: Sequence[float] = (0.0, 0.0, 0.5, 0.0),
    threshold: Sequence[float] = (0.4, 0.4, 0.4, math.pi),
) -> Array:
    """L_res: distance of Gamma from its expectation, beyond a threshold.

    A parameter counts with its whole distance if that exceeds its threshold, and with 0
    otherwise. The loss is the Euclidean norm over the four parameters.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.
      expectation: E, by default the centre crop of half the width of the image.
      threshold: T.

    Returns:
      ``[b]``. Within the thresholds the value and the gradient are 0, never NaN.

    Source: Eq. (7).

    Differs: the gate ``max(0, u) / (u + eps)`` is replaced by its limit, 0 or 1, and is
    constant for the gradient. The slope of the original gate, 1/eps near u = 0, would
    move Gamma in large jumps.
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
    """L_cntr: pulls two redundancies together and each away from its own attention.

    Args:
      attention_m: ``[p, d]``, attention features of the first image of each pair.
      attention_n: ``[p, d]``, attention features of the second image.
      redundancy_m: ``[p, d]``, redundancy features of the first image.
      redundancy_n: ``[p, d]``, redundancy features of the second image.
      margin: the attention must be further from its redundancy than the other
        redundancy by this much.
      distance: "euclidean", or "squared" as in the authors' released layer.

    Returns:
      ``[p]``, the sum of both hinges. Its gradient is finite where features coincide.

    Raises:
      ValueError: the distance is unknown.

    Source: Eq. (8).
    """
    if distance not in DISTANCES:
        raise ValueError(
            f"unknown distance {distance!r}; choose from {', '.join(DISTANCES)}"
        )

    def measure(a: Array, b: Array) -> Array:
        return _norm(a - b) if distance == "euclidean" else jnp.square(a - b).sum(-1)

    between = measure(redundancy_m, redundancy_n)
    hinge_m = between - measure(redundancy_m, attention_m) + margin
    hinge_n = between - measure(redundancy_n, attention_n) + margin
    return jnp.maximum(hinge_m, 0) + jnp.maximum(hinge_n, 0)


def uniform_loss(logits: Array) -> Array:
    """L_uniform: cross-entropy with the uniform distribution, ``[b, k] -> [b]``.

    The redundancy should not reveal the class. The loss is smallest, log k, if all
    classes are equally probable. The paper has no such term.
    """
    return -jax.nn.log_softmax(logits).mean(-1)


def l2_normalize(features: Array) -> Array:
    """Scales features to length 1, ``[..., d] -> [..., d]``; zeros stay zeros."""
    return features / safe_length(features)


def safe_length(features: Array) -> Array:
    """Length of features as a divisor, ``[..., d] -> [..., 1]``; 1 for zeros."""
    norm = _norm(features)[..., None]
    return jnp.where(norm > 0, norm, 1)


def _norm(vectors: Array) -> Array:
    """Euclidean norm along the last axis; its gradient at 0 is 0 instead of NaN."""
    import optax  # here, because prediction without an attention head does without

    return optax.safe_norm(vectors, min_norm=0.0, axis=-1)


def neighbour_pairs(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Disjoint pairs of neighbours in a batch: indices ``(0, 1), (2, 3), ...``.

    A batch is a slice of the epoch's random order, so its neighbours are random pairs
    regardless of labels. They depend on (seed, epoch, index) only, and are the same on
    any number of devices with batches of even size. In a batch of odd size the last
    image has no partner.

    Returns:
      Indices of the first and of the second images, ``[p]`` each.

    Raises:
      ValueError: there are fewer than 2 images.
    """
    _check_pairable(batch_size)
    first = np.arange(0, batch_size - 1, 2)
    return first, first + 1


def all_pairs(batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs ``m < n`` of a batch.

    Returns:
      Indices of the first and of the second images, ``[p]`` each.

    Raises:
      ValueError: there are fewer than 2 images.
    """
    _check_pairable(batch_size)
    return np.triu_indices(batch_size, k=1)


def _check_pairable(batch_size: int) -> None:
    if batch_size < 2:
        raise ValueError(
            f"L_cntr needs pairs, but the batch of a device has {batch_size} image(s): "
            "raise train.batch_size to at least 2 per device, or set loss.cntr=0"
        )
