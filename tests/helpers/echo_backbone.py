"""A backbone that returns the pixels of its images as scores."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cra_jax.backbones.layers import Outputs


class Echo(nn.Module):
    """Scores = pixels; pooled feature = mean of each channel; no BatchNorm."""

    stride_px = 1

    @nn.compact
    def __call__(self, images, train=False):
        seen = self.variable("batch_stats", "seen", jnp.zeros, ())
        if train and not self.is_initializing():
            seen.value = images.mean()
        gain = self.param("gain", lambda key: 1 + 1e-6 * jax.random.normal(key))
        flat = images.reshape(len(images), -1) * gain
        return Outputs(flat, images, images.mean((1, 2)))

    @nn.nowrap
    def feature_place_px(self, cells, extent_px):
        """Returns the pixel of a cell: every cell is one pixel."""
        return cells + 0 * extent_px
