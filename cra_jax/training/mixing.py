"""CutMix and SnapMix: pastes a part of another image, and weighs both labels.

Both streams get the mixed image, and both cross-entropies use the same label weights.
The weights do not depend on the attention's crop: otherwise the attention would be
rewarded for choosing the image with the easier label. Eq. (8) uses no labels. Its pairs
are direct neighbours, whereas partners here are two positions away, so that no pair
contains parts of the same image.

Shapes: ``b`` batch size, ``H W`` height and width of the image, ``h w`` height and
width of a feature map.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cra_jax import geometry
from cra_jax.art_module import CLASSIFICATION_STREAM
from cra_jax.backbones import class_activation
from cra_jax.losses import MixedLabels
from cra_jax.train_step import Batch, TrainState

KINDS = ("", "cutmix", "snapmix")
Mix = Callable[[TrainState, Array, Batch], tuple[Array, MixedLabels]]

_SALT = 20210202  # makes the draws independent of those of the initial weights


def make_mix(
    kind: str, backbone: nn.Module, *, probability: float, alpha: float, seed: int
) -> Mix:
    """Creates the function that mixes a batch on the device.

    Draws depend on (seed, step, image) only. The partner of an image is in the same
    group of four neighbours, see `partners`. The result is the same on any number of
    devices and micro-batches if each gets a multiple of 4 images; otherwise the
    remainders have other partners.

    Args:
      kind: "cutmix" replaces a box by the same box of the partner, and weighs labels by
        area. "snapmix" replaces it by a resized box of another size and position, and
        weighs labels by the share of the class activation. The maps come from N_cls
        with running statistics, which takes one more forward pass per step.
      backbone: N_cls.
      probability: probability that an image is mixed.
      alpha: parameter of Beta(alpha, alpha), the distribution of the share of the image
        that stays; 1: uniform, larger: close to a half.
      seed: seed of the draws.

    Returns:
      ``(state, images, batch) -> (images, labels)``; the batch must have ``index``.

    Raises:
      ValueError: the kind is unknown, or a number is out of range.

    Source: Yun et al., "CutMix", 2019, Sec. 3.1; Huang et al., "SnapMix", 2021, Eq. (1)
      to (4). The paper does not mix images.

    Differs: both draw once per batch; here each image has its own draws.
    """
    if kind not in KINDS[1:]:
        raise ValueError(
            f"unknown mix.kind {kind!r}; choose from {', '.join(KINDS[1:])}, or leave "
            "it empty"
        )
    if not 0 <= probability <= 1:
        raise ValueError(f"mix.probability={probability} must be in [0, 1]")
    if alpha <= 0:
        raise ValueError(f"mix.alpha={alpha} must be above 0: 1 or 5 are usual")

    def mix(state: TrainState, images: Array, batch: Batch) -> tuple[Array, Any]:
        labels, partner = batch["label"], partners(len(images))
        key = jax.random.fold_in(jax.random.key(seed), _SALT)
        key = jax.random.fold_in(key, state.step)

        def draw(index: Array) -> tuple[Array, Array, Array]:
            coin, box, source = jax.random.split(jax.random.fold_in(key, index), 3)
            size = images.shape[1:3]
            drawn = jax.random.uniform(coin) < probability
            return drawn, draw_box(box, size, alpha), draw_box(source, size, alpha)

        mixed, box, source = jax.vmap(draw)(batch["index"])
        mixed &= partner != np.arange(len(images))
        if kind == "cutmix":
            source = box
        box = jnp.where((mixed & (area(source) > 0))[:, None], box, 0)
        activation = None
        if kind == "snapmix":
            variables = {
                "params": state.params[CLASSIFICATION_STREAM],
                "batch_stats": state.batch_stats[CLASSIFICATION_STREAM],
            }
            activation = _activation(backbone, variables, images, labels)
        return (
            paste(images, partner, box, source),
            MixedLabels(
                labels,
                labels[partner],
                *weigh(images, partner, box, source, activation),
            ),
        )

    return mix


def partners(count: int) -> np.ndarray:
    """Index of each image's partner, two positions further or back.

    Returns:
      int ``[count]``: ``2 3 0 1`` for the images ``0 1 2 3``, and likewise for each
      group of four. A remaining pair are partners; a remaining single image is its own
      partner.
    """
    places = np.arange(count)
    fours, pairs = count // 4 * 4, count // 2 * 2
    return np.where(
        places < fours, places ^ 2, np.where(places < pairs, places ^ 1, places)
    )


def draw_box(key: Array, size: tuple[int, ...], alpha: float) -> Array:
    """Draws a random box, clipped to the image.

    Args:
      key: a `jax.random` key.
      size: ``(H, W)``.
      alpha: the box has the share 1 - Beta(alpha, alpha) of the image's area.

    Returns:
      int ``[4]``: top, bottom, left, right, in pixels; bottom and right are exclusive.

    Source: Yun et al., 2019, Eq. (2).
    """
    share, down, across = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(share, alpha, alpha))
    edges = []
    for place, length in zip((down, across), size, strict=True):
        centre = jax.random.randint(place, (), 0, length)
        half = (side * length).astype(jnp.int32) // 2
        edges += [
            jnp.clip(centre - half, 0, length),
            jnp.clip(centre + half, 0, length),
        ]
    return jnp.stack(edges)


def area(box: Array) -> Array:
    """Number of pixels of boxes ``[b, 4]``: ``[b]``."""
    return (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])


def paste(images: Array, partner: np.ndarray, box: Array, source: Array) -> Array:
    """Pastes a box of the partner, resized bilinearly, into each image.

    Args:
      images: ``[b, H, W, c]``.
      partner: result of `partners`.
      box: int ``[b, 4]``, the replaced boxes; an empty box leaves the image unchanged.
      source: int ``[b, 4]``, the boxes of the partners that are pasted.

    Returns:
      ``[b, H, W, c]``.
    """
    height, width = images.shape[1:3]
    down = _places(jnp.arange(height), box[:, :2], source[:, :2])
    across = _places(jnp.arange(width), box[:, 2:], source[:, 2:])
    grid = jnp.stack(
        jnp.broadcast_arrays(
            2 * across[:, None, :] / (width - 1) - 1,
            2 * down[:, :, None] / (height - 1) - 1,
        ),
        -1,
    )
    pasted = geometry.bilinear_sample(images[partner], grid)
    return jnp.where(_inside(box, height, width)[..., None], pasted, images)


def weigh(
    images: Array,
    partner: np.ndarray,
    box: Array,
    source: Array,
    activation: Array | None,
) -> tuple[Array, Array]:
    """Computes the label weights of mixed images.

    Args:
      images: the images, for their shape.
      partner: as for `paste`.
      box: the replaced boxes, as for `paste`.
      source: the pasted boxes of the partners, as for `paste`.
      activation: ``[b, h, w]`` of either sign, class activation maps of the images' own
        classes; None: uniform maps.

    Returns:
      ``[b]``, weights of the images' own labels: the share of their maps outside the
      box; and ``[b]``, weights of the partners' labels: the share of the partners' maps
      inside the source. They sum to 1 for uniform maps and boxes of equal size, but not
      in general.

    Source: Huang et al., 2021, Eq. (3) and (4).
    """
    count, height, width, _ = images.shape
    even = jnp.full((count, height, width), 1 / (height * width))
    if activation is None:
        maps = even
    else:
        # The minimum is subtracted before resizing too, so that rounding errors do not
        # turn a uniform map into a structured one.
        maps = activation - activation.min((1, 2), keepdims=True)
        maps = jax.image.resize(maps, even.shape, "linear", antialias=False)
        maps -= maps.min((1, 2), keepdims=True)
        total = maps.sum((1, 2), keepdims=True)
        maps = jnp.where(total > 0, maps / jnp.where(total > 0, total, 1), even)
    gone = (maps * _inside(box, height, width)).sum((1, 2))
    came = (maps[partner] * _inside(source, height, width)).sum((1, 2))
    return 1 - gone, jnp.where(area(box) > 0, came, 0)


def _activation(
    backbone: nn.Module, variables: Mapping[str, Any], images: Array, labels: Array
) -> Array:
    """Class activation maps of N_cls for the images' own classes: ``[b, h, w]``."""
    features = backbone.apply(variables, images, method="extract")
    assert isinstance(features, Array)
    activation = class_activation.class_activation(
        backbone, variables, features, labels
    )
    return activation.astype(jnp.float32)


def _places(pixels: Array, box: Array, source: Array) -> Array:
    """Source coordinates of a box's pixels along an axis: ``[b, n]``."""
    start, end = source[:, :1], source[:, 1:]
    scale = (end - start) / jnp.maximum(box[:, 1:] - box[:, :1], 1)
    places = start + (pixels - box[:, :1] + 0.5) * scale - 0.5
    return jnp.clip(places, start, jnp.maximum(end - 1, start))


def _inside(box: Array, height: int, width: int) -> Array:
    """Whether pixels lie inside boxes ``[b, 4]``: bool ``[b, H, W]``."""
    rows, columns = jnp.arange(height), jnp.arange(width)
    down = (rows >= box[:, :1]) & (rows < box[:, 1:2])
    across = (columns >= box[:, 2:3]) & (columns < box[:, 3:])
    return down[:, :, None] & across[:, None, :]
