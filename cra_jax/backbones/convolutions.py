"""Convolutions without bias, with gradients that are fast on a CPU.

They follow the dtype of their input and keep parameters in float32.
"""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cra_jax.backbones.layers import at_least_float32

_PARTS = 8  # of a batch, see _sum_of_products


class Conv(nn.Module):
    """Square convolution.

    Attributes:
      features: output channels.
      size: of the kernel, odd.
      stride: in both directions.
      padding_px: zeros on each side; None: `size // 2`, as in torch's ResNets.
    """

    features: int
    size: int
    stride: int = 1
    padding_px: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, h, w, c]`; by default each side becomes `ceil(side / stride)`."""
        kernel = self.param(
            "kernel",
            nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
            (self.size, self.size, x.shape[-1], self.features),
            jnp.float32,
        ).astype(x.dtype)
        if self.size == 1:
            # XLA's CPU gradient of a 1x1 convolution is up to 3x slower than this.
            return product(x[:, :: self.stride, :: self.stride], kernel[0, 0])
        padding_px = self.size // 2 if self.padding_px is None else self.padding_px
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride, self.stride),
            padding=[(padding_px, padding_px)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class DepthwiseConv(nn.Module):
    """Square convolution of each channel with its own kernel, without padding."""

    size: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, h, w, c]`; a side becomes `(side - size) // stride + 1`."""
        kernel = self.param(
            "kernel",
            nn.initializers.normal(math.sqrt(2) / self.size),  # fan-out: one kernel
            (self.size, self.size, 1, x.shape[-1]),
            jnp.float32,
        )
        return depthwise(x, kernel.astype(x.dtype), self.stride)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[b, h, w, c]` times `[c, d]`: a convolution with a 1x1 kernel."""
    return x @ kernel


def _product_backward(residuals, cotangent: jax.Array):
    x, kernel = residuals
    to_kernel = jax.lax.platform_dependent(
        x, cotangent, cpu=_sum_of_products, default=_transposed_product
    )
    return cotangent @ kernel.T, to_kernel


def _transposed_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[..., c]` and `[..., d]` -> `[c, d]`, summed over all other axes."""
    return jnp.einsum("...c,...d->cd", x, y)


def _sum_of_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """`_transposed_product` as a loop over parts of the batch, for CPUs.

    The loop makes XLA compute both inputs before it; otherwise XLA computes them twice,
    with strides, which takes a fifth of ResNet-50's step. The narrower input goes
    first, which makes the product up to 1.5 times as fast.
    """
    if x.shape[-1] > y.shape[-1]:
        return _sum_of_products(y, x).T
    parts = math.gcd(len(x), _PARTS)

    def add(total: jax.Array, part: Any) -> tuple[jax.Array, Any]:
        return total + _transposed_product(*part).astype(total.dtype), None

    split = tuple(z.reshape(parts, -1, z.shape[-1]) for z in (x, y))
    zeros = jnp.zeros((x.shape[-1], y.shape[-1]), at_least_float32(x.dtype))
    return jax.lax.scan(add, zeros, split)[0].astype(x.dtype)


product.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves each channel of `[b, h, w, c]` with its own of `[k, k, 1, c]`.

    As a sum of shifted products: on a CPU, XLA's convolution with as many groups as
    channels takes 15 to 60 times as long, its gradient 3 to 80 times. The gradient is
    written out because autodiff's takes twice as long to compile and to run.
    """
    size = len(kernel)
    # One past the last position of a kernel's corner.
    rows, columns = (side - size + 1 for side in x.shape[1:3])
    wide = at_least_float32(x.dtype)  # 25 terms are too many for bfloat16
    y = jnp.zeros((), wide)
    for i in range(size):
        for j in range(size):
            shifted = x[:, i : i + rows : stride, j : j + columns : stride]
            y = y + shifted.astype(wide) * kernel[i, j, 0].astype(wide)
    return y.astype(x.dtype)


def _depthwise_backward(stride: int, residuals, cotangent: jax.Array):
    x, kernel = residuals
    size, wide = len(kernel), at_least_float32(x.dtype)
    # To the input: the flipped kernel over the cotangent, dilated by the stride.
    around = [
        (size - 1, side - ((out - 1) * stride + 1), stride - 1)
        for side, out in zip(x.shape[1:3], cotangent.shape[1:3], strict=True)
    ]
    zero = jnp.zeros((), cotangent.dtype)
    spread = jax.lax.pad(cotangent, zero, [(0, 0, 0), *around, (0, 0, 0)])
    x_cotangent = depthwise(spread, kernel[::-1, ::-1], 1)

    # To the kernel: pixels at the same offset from the corner belong to one phase.
    b, h, w, c = x.shape
    x = jnp.pad(x, [(0, 0), (0, -h % stride), (0, -w % stride), (0, 0)])
    phases = x.reshape(b, -(-h // stride), stride, -(-w // stride), stride, c)
    sizes = (b, cotangent.shape[1], 1, cotangent.shape[2], 1, c)

    def tap(index: jax.Array) -> jax.Array:
        i, j = index // size, index % size
        start = (0, i // stride, i % stride, j // stride, j % stride, 0)
        shifted = jax.lax.dynamic_slice(phases, start, sizes).reshape(cotangent.shape)
        return (shifted.astype(wide) * cotangent.astype(wide)).sum((0, 1, 2))

    taps = jax.lax.map(tap, jnp.arange(size**2))
    return x_cotangent, taps.reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(
    lambda x, kernel, stride: (depthwise(x, kernel, stride), (x, kernel)),
    _depthwise_backward,
)
