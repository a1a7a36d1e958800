"""Pictures with a part of another pasted in, and what their labels then are worth.

The whole network sees the mixed picture, and both cross-entropies weigh its two labels
alike. N_ar sees no more than N_cls does, and what of the paste its crop holds is for
the attention to choose: a weight by the crop would pay the attention for choosing the
picture whose label is the easier one. Eq. (8) knows no labels; its pairs are direct
neighbours, partners here are two apart, so that no pair holds parts of one picture.

Shapes: ``b`` batch, ``H W`` the picture's and ``h w`` a feature map's height and width.
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

_SALT = 20210202  # draws are others than those that weights begin with


def make_mix(
    kind: str, backbone: nn.Module, *, probability: float, alpha: float, seed: int
) -> Mix:
    """What mixes a batch, on the device, by draws of (seed, step, picture).

    A picture's partner is one of the four neighbours in its batch, see `partners`. So
    the same is mixed on any number of devices and in any number of micro-batches, where
    each gets a multiple of 4 pictures; else the remainder pairs otherwise.

    Args:
      kind: "cutmix": a box is replaced by the same box of the partner, and labels
        weigh as their areas. "snapmix": by a box of another size and place, resized,
        and labels weigh as much of their class activation as there is of it. The maps
        come from N_cls itself, with running statistics: one forward pass more a step.
      backbone: N_cls.
      probability: how often a picture is mixed.
      alpha: of Beta(alpha, alpha), from which the share of the picture that stays is
        drawn; 1: any is as likely, more: about half.
      seed: of the draws.

    Returns:
      ``(state, images, batch) -> (images, labels)``; the batch needs ``index``.

    Raises:
      ValueError: the kind is unknown, or a number is out of range.

    Source: Yun et al., "CutMix", 2019, Sec. 3.1; Huang et al., "SnapMix", 2021, Eq. (1)
      to (4). The paper mixes nothing.

    Differs: both draw once a batch; here each picture has its own draws.
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
    """Whose part each of so many pictures gets: the one two places on or back.

    Returns:
      Places, int ``[count]``: of ``0 1 2 3`` they are ``2 3 0 1``, and so on in fours;
      two that are left over get each other's, and a last one its own.
    """
    places = np.arange(count)
    fours, pairs = count // 4 * 4, count // 2 * 2
    return np.where(
        places < fours, places ^ 2, np.where(places < pairs, places ^ 1, places)
    )


def draw_box(key: Array, size: tuple[int, ...], alpha: float) -> Array:
    """A box somewhere in a picture, cut off at its edges.

    Args:
      key: of `jax.random`.
      size: ``(H, W)``.
      alpha: 1 less a draw of Beta(alpha, alpha) is the box's area by the picture's.

    Returns:
      int ``[4]``: top, bottom, left, right, in pixels; the ends are outside.

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
    """Pixels of boxes ``[b, 4]``: ``[b]``."""
    return (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])


def paste(images: Array, partner: np.ndarray, box: Array, source: Array) -> Array:
    """Puts a box of its partner, resized bilinearly, into each picture.

    Args:
      images: ``[b, H, W, c]``.
      partner: of `partners`.
      box: int ``[b, 4]``, which is replaced; an empty one leaves the picture alone.
      source: int ``[b, 4]``, of the partner, by what.

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
    """What the labels of mixed pictures are worth.

    Args:
      images: before they are mixed, for their shape.
      partner: as for `paste`, as the next two.
      box: which part is gone.
      source: which part of the partner came.
      activation: ``[b, h, w]``, where each picture's own class is, of either sign;
        None: evenly everywhere.

    Returns:
      ``[b]`` for the picture's own label, what the box left of its map, and ``[b]``
      for the partner's, what the box took of the partner's map. They sum to 1 for
      even maps and boxes of one size; others need not.

    Source: Huang et al., 2021, Eq. (3) and (4).
    """
    count, height, width, _ = images.shape
    even = jnp.full((count, height, width), 1 / (height * width))
    if activation is None:
        maps = even
    else:
        # From 0 up before it is resized: rounding must not make a map of an even one.
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
    """Where N_cls sees each picture's own class: ``[b, h, w]``."""
    features = backbone.apply(variables, images, method="extract")
    assert isinstance(features, Array)
    activation = class_activation.class_activation(
        backbone, variables, features, labels
    )
    return activation.astype(jnp.float32)


def _places(pixels: Array, box: Array, source: Array) -> Array:
    """Where along an axis a box's pixels come from: ``[b, n]``, within the source."""
    start, end = source[:, :1], source[:, 1:]
    scale = (end - start) / jnp.maximum(box[:, 1:] - box[:, :1], 1)
    places = start + (pixels - box[:, :1] + 0.5) * scale - 0.5
    return jnp.clip(places, start, jnp.maximum(end - 1, start))


def _inside(box: Array, height: int, width: int) -> Array:
    """Which pixels lie in boxes ``[b, 4]``: ``[b, H, W]``."""
    rows, columns = jnp.arange(height), jnp.arange(width)
    down = (rows >= box[:, :1]) & (rows < box[:, 1:2])
    across = (columns >= box[:, 2:3]) & (columns < box[:, 3:])
    return down[:, :, None] & across[:, None, :]
