"""What the families of backbones share: layers with torch's numerics, and small help.

Layers follow the dtype of their input and keep parameters in float32; statistics are at
least float32.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

_BN_EPSILON = 1e-5
_BN_MOMENTUM = 0.9  # torch says 0.1: there it is the weight of the new value


@struct.dataclass
class Outputs:
    """What a backbone gives for a batch.

    Attributes:
        logits: `[b, k]` class scores, before any softmax; at least float32.
        features: `[b, h, w, c]` last feature map, in the compute dtype.
        pooled: `[b, c]` mean of the features over the picture; at least float32.
    """

    logits: jax.Array
    features: jax.Array
    pooled: jax.Array


class Conv(nn.Module):
    """Square convolution without bias, padded with `size // 2` zeros on each side."""

    features: int
    size: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, h, w, c]`; each side shrinks to `ceil(side / stride)`."""
        kernel = self.param(
            "kernel",
            nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            (self.size, self.size, x.shape[-1], self.features),
            jnp.float32,
        ).astype(x.dtype)
        if self.size == 1:
            # XLA's CPU gradient of a 1x1 convolution is up to 3x slower than this.
            return x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=[(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as torch does it.

    Pictures are normalised with the biased variance; the running variance is the
    unbiased one. Statistics are at least float32, whatever the input is.

    Attributes:
        group_size: consecutive pictures that share statistics; 0: the whole batch.
        all_mean: array -> its mean over all replicas; None: no synchronisation.
        num_replicas: how many replicas `all_mean` averages, for the unbiased variance.
    """

    group_size: int = 0
    all_mean: Callable[[jax.Array], jax.Array] | None = None
    num_replicas: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Normalises `[b, h, w, c]`; shape and dtype stay.

        Raises:
            ValueError: in training, if the groups do not divide the batch, or a channel
                has a single value: its variance says nothing.
        """
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        shape = (channels,), jnp.float32
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, *shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, *shape)

        stats_dtype = at_least_float32(x.dtype)
        wide = x.astype(stats_dtype)
        if train:
            wide = wide.reshape(-1, self._group(x.shape), *x.shape[1:])
            mean, var, unbiased_var = self._statistics(wide)
            if not self.is_initializing():
                _update(running_mean, mean)
                _update(running_var, unbiased_var)
        else:
            mean = running_mean.value.astype(stats_dtype)
            var = running_var.value.astype(stats_dtype)
        gain = scale.astype(stats_dtype) * jax.lax.rsqrt(var + _BN_EPSILON)
        y = (wide - mean) * gain + bias.astype(stats_dtype)
        return y.reshape(x.shape).astype(x.dtype)

    def _group(self, shape: tuple[int, ...]) -> int:
        """Pictures that share statistics in a batch of this shape."""
        group = self.group_size or shape[0]
        if shape[0] % group:
            raise ValueError(
                f"bn_group_size={group} does not divide a batch of {shape[0]} pictures;"
                " choose a batch size that is a multiple of it, or bn_group_size=0"
            )
        return group

    def _statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean, biased and unbiased variance of `[groups, g, h, w, c]`."""
        axes = tuple(range(1, x.ndim - 1))
        count = self.num_replicas * x[0, ..., 0].size
        if count == 1:
            raise ValueError(
                f"BatchNorm has one value per channel to train on ({x.shape[1:]});"
                " use a larger batch or larger pictures"
            )
        synchronise = self.all_mean
        if synchronise is None or self.is_initializing():
            synchronise = _identity
        mean = synchronise(x.mean(axes, keepdims=True))
        # The variance does not change with the mean to first order (deviations sum to
        # 0), so cutting that path changes no gradient and saves a pass over x.
        deviation = x - jax.lax.stop_gradient(mean)
        var = synchronise(jnp.square(deviation).mean(axes, keepdims=True))
        return mean, var, var * (count / (count - 1))


def mask(x: jax.Array, extent_px: jax.Array | None) -> jax.Array:
    """`x` with zeros beyond each picture's valid (height, width)."""
    if extent_px is None:
        return x
    rows = jnp.arange(x.shape[1]) < extent_px[:, :1]
    columns = jnp.arange(x.shape[2]) < extent_px[:, 1:]
    valid = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(valid, x, jnp.zeros_like(x))


def shrink(extent_px: jax.Array | None, stride: int) -> jax.Array | None:
    """The valid part that is left after an operation with this stride."""
    return None if extent_px is None else -(-extent_px // stride)


def at_least_float32(dtype: Any) -> Any:
    """float32, or `dtype` where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def symmetric_uniform(limit: float) -> Callable[..., jax.Array]:
    """An initializer that draws from [-limit, limit), as torch's linear layers do."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def check_images(images: jax.Array, train: bool, extent_px: jax.Array | None) -> None:
    """Refuses arguments of `extract` of a wrong shape or dtype, with a `ValueError`."""
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be [b, height, width, 3], not {images.shape}")
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(f"images are {images.dtype}; normalise them to float first")
    if extent_px is None:
        return
    if train:
        raise ValueError(
            "extent_px is for testing: BatchNorm's statistics would count the padding;"
            " crop the pictures to one size to train"
        )
    if extent_px.shape != (len(images), 2):
        raise ValueError(
            f"extent_px must hold (height, width) of {len(images)} pictures, not"
            f" {extent_px.shape}"
        )


def _update(running: nn.Variable, new: jax.Array) -> None:
    """Moves a running statistic towards the mean of the groups' new ones."""
    old = running.value
    new = new.mean(tuple(range(new.ndim - 1))).astype(old.dtype)
    running.value = _BN_MOMENTUM * old + (1 - _BN_MOMENTUM) * new


def _identity(x: jax.Array) -> jax.Array:
    return x
