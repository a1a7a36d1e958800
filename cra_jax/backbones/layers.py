"""Outputs, small layers and checks that the families of backbones share."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Outputs:
    """Outputs of a backbone for a batch.

    Attributes:
      logits: `[b, k]` class scores, before any softmax; at least float32.
      features: `[b, h, w, c]` last feature map, in the compute dtype.
      pooled: `[b, c]` mean of the features over the image; at least float32.
    """

    logits: jax.Array
    features: jax.Array
    pooled: jax.Array


def relu(x: jax.Array, ceiling: float = math.inf) -> jax.Array:
    """`x` clipped to 0..ceiling; no gradient at either bound or beyond, as in torch.

    The backward pass reads the output, which the next convolution keeps in any case;
    `jax.nn.relu` keeps a mask in addition.
    """
    clipped: Any = _clip(x, ceiling)
    return clipped


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _clip(x: jax.Array, ceiling: float) -> jax.Array:
    return jnp.clip(x, 0, ceiling)


def _clip_forward(x: jax.Array, ceiling: float):
    y = jnp.clip(x, 0, ceiling)
    return y, y


def _clip_backward(ceiling: float, y: jax.Array, cotangent: jax.Array):
    passes = (y > 0) & (y < ceiling)
    return (jnp.where(passes, cotangent, jnp.zeros((), cotangent.dtype)),)


_clip.defvjp(_clip_forward, _clip_backward)


def linear(in_features: int, features: int) -> nn.Dense:
    """A fully connected layer, initialized as `torch.nn.Linear`."""
    limit = in_features**-0.5

    def uniform(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    return nn.Dense(features, kernel_init=kernel_init, bias_init=uniform)


def run_block(
    block: nn.Module,
    x: jax.Array,
    *,
    train: bool,
    extent_px: jax.Array | None,
    remat: bool,
) -> jax.Array:
    """A block's output; with `remat`, only its input is kept for the backward pass.

    The backward pass then computes the rest again: up to a third more arithmetic, and
    the memory of one block instead of all.
    """

    def run(block: Any, x: jax.Array, extent_px: jax.Array | None) -> jax.Array:
        return block(x, train=train, extent_px=extent_px)

    run = nn.remat(run) if remat and train else run
    return run(block, x, extent_px)


def mask(x: jax.Array, extent_px: jax.Array | None) -> jax.Array:
    """`[b, h, w, c]` with zeros beyond each image's valid (height, width), `[b, 2]`."""
    if extent_px is None:
        return x
    rows = jnp.arange(x.shape[1]) < extent_px[:, :1]
    columns = jnp.arange(x.shape[2]) < extent_px[:, 1:]
    valid = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(valid, x, jnp.zeros_like(x))


def pad_same(
    x: jax.Array, size: int, stride: int, extent_px: jax.Array | None
) -> jax.Array:
    """Pads with zeros such that a convolution strides as TensorFlow's "SAME".

    A side of n then becomes `ceil(n / stride)`. The padding is halved, and an odd pixel
    goes to the bottom or the right. With stride 2 it depends on whether n is even, so
    images that share a batch are each padded for their own size.

    Args:
      x: `[b, h, w, c]`.
      size: of the kernel, odd.
      stride: 1 or 2.
      extent_px: `[b, 2]`, valid (height, width) of each image, or None: all of it.
    """
    if extent_px is None:
        sides = [
            max((-(-side // stride) - 1) * stride + size - side, 0)
            for side in x.shape[1:3]
        ]
        around = [(total // 2, total - total // 2) for total in sides]
        return jnp.pad(x, [(0, 0), *around, (0, 0)])
    half = size // 2
    x = mask(x, extent_px)
    if stride == 1:
        return jnp.pad(x, [(0, 0), (half, half), (half, half), (0, 0)])
    # Padded for odd sizes, and one more: where a size is even, drop the first instead.
    x = jnp.pad(x, [(0, 0), (half, half + 1), (half, half + 1), (0, 0)])
    even = (extent_px % 2 == 0)[:, :, None, None, None]
    x = jnp.where(even[:, 0], x[:, 1:], x[:, :-1])
    return jnp.where(even[:, 1], x[:, :, 1:], x[:, :, :-1])


def shrink(extent_px: jax.Array | None, stride: int) -> jax.Array | None:
    """The valid extent after a layer with this stride."""
    return None if extent_px is None else -(-extent_px // stride)


def at_least_float32(dtype: Any) -> Any:
    """float32, or `dtype` where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def check_images(images: jax.Array, train: bool, extent_px: jax.Array | None) -> None:
    """Checks the arguments of `extract`.

    Raises:
      ValueError: a shape or dtype is wrong, or `extent_px` is given in training.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be [b, height, width, 3], not {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; normalize them to float first")
    if extent_px is None:
        return
    if train:
        raise ValueError(
            "extent_px is for testing: BatchNorm's statistics would count the padding;"
            " crop the images to one size to train"
        )
    if extent_px.shape != (len(images), 2):
        raise ValueError(
            f"extent_px must hold (height, width) of {len(images)} images, not"
            f" {extent_px.shape}"
        )
