"""uint8 images -> input of the networks."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array


def normalize(
    images: Array, *, mean: Sequence[float], std: Sequence[float], dtype=jnp.float32
) -> Array:
    """uint8 ``[b, h, w, 3]`` -> floats with mean 0 and deviation 1 on ImageNet.

    The sampler and padding use 0 outside an image, which is then the mean colour.
    """
    shift, scale = jnp.array(mean, jnp.float32), jnp.array(std, jnp.float32)
    return ((images.astype(jnp.float32) / 255 - shift) / scale).astype(dtype)
