"""BatchNorm with torch's numerics: over the batch, groups of it, or all replicas.

It follows the dtype of its input and keeps parameters in float32; statistics are at
least float32.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

_MOMENTUM = 0.9  # torch says 0.1: there it is the weight of the new value


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last, as torch does it.

    Pictures are normalised with the biased variance; the running variance is the
    unbiased one. Statistics are at least float32, whatever the input is.

    Attributes:
        group_size: consecutive pictures that share statistics; 0: the whole batch.
        all_mean: array -> its mean over all replicas; None: no synchronisation.
        num_replicas: how many replicas `all_mean` averages, for the unbiased variance.
        epsilon: added to the variance.
    """

    group_size: int = 0
    all_mean: Callable[[jax.Array], jax.Array] | None = None
    num_replicas: int = 1
    epsilon: float = 1e-5

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

        stats_dtype = jnp.promote_types(x.dtype, jnp.float32)
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
        gain = scale.astype(stats_dtype) * jax.lax.rsqrt(var + self.epsilon)
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


def _update(running: nn.Variable, new: jax.Array) -> None:
    """Moves a running statistic towards the mean of the groups' new ones."""
    old = running.value
    new = new.mean(tuple(range(new.ndim - 1))).astype(old.dtype)
    running.value = _MOMENTUM * old + (1 - _MOMENTUM) * new


def _identity(x: jax.Array) -> jax.Array:
    return x
