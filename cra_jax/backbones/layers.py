"""What the families of backbones share: convolutions, and small help.

Convolutions follow the dtype of their input and keep parameters in float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

_PARTS = 8  # of a batch, see _sum_of_products


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
    """Square convolution without bias.

    Attributes:
        features: channels that come out.
        size: of the kernel, odd.
        stride: in both directions.
        padding_px: zeros on each side; None: `size // 2`, as torch's ResNets have.
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
    """Square convolution of each channel with a kernel of its own; pads nothing."""

    size: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b, h, w, c]`; a side becomes `(side - size) // stride + 1`."""
        kernel = self.param(
            "kernel",
            nn.initializers.normal(math.sqrt(2) / self.size),  # each output: one kernel
            (self.size, self.size, 1, x.shape[-1]),
            jnp.float32,
        )
        return depthwise(x, kernel.astype(x.dtype), self.stride)


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`[b, h, w, c]` times `[c, d]`: a convolution with a kernel of 1 x 1."""
    return x @ kernel


def _product_backward(residuals, cotangent: jax.Array):
    x, kernel = residuals
    to_kernel = jax.lax.platform_dependent(
        x, cotangent, cpu=_sum_of_products, default=_transposed_product
    )
    return cotangent @ kernel.T, to_kernel


def _transposed_product(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[..., c]` and `[..., d]` -> `[c, d]`, summed over all else."""
    return jnp.einsum("...c,...d->cd", x, y)


def _sum_of_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """The same in a loop over parts of the batch: both are there before it begins.

    Else XLA's CPU computes them again, and strides: a fifth of ResNet-50's step. The
    narrow one goes first, which makes the product up to 1.5 times as quick.
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
    # One past the last place where a kernel's corner may stand.
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
    # To the input: the kernel turned round, over the cotangent with its gaps filled.
    around = [
        (size - 1, side - ((out - 1) * stride + 1), stride - 1)
        for side, out in zip(x.shape[1:3], cotangent.shape[1:3], strict=True)
    ]
    zero = jnp.zeros((), cotangent.dtype)
    spread = jax.lax.pad(cotangent, zero, [(0, 0, 0), *around, (0, 0, 0)])
    x_cotangent = depthwise(spread, kernel[::-1, ::-1], 1)

    # To the kernel: pixels at the same distance from the corner lie in one phase.
    b, h, w, c = x.shape
    x = jnp.pad(x, [(0, 0), (0, -h % stride), (0, -w % stride), (0, 0)])
    phases = x.reshape(b, -(-h // stride), stride, -(-w // stride), stride, c)
    sizes = (b, cotangent.shape[1], 1, cotangent.shape[2], 1, c)

    def tap(place: jax.Array) -> jax.Array:
        i, j = place // size, place % size
        start = (0, i // stride, i % stride, j // stride, j % stride, 0)
        seen = jax.lax.dynamic_slice(phases, start, sizes).reshape(cotangent.shape)
        return (seen.astype(wide) * cotangent.astype(wide)).sum((0, 1, 2))

    taps = jax.lax.map(tap, jnp.arange(size**2))
    return x_cotangent, taps.reshape(kernel.shape).astype(kernel.dtype)


depthwise.defvjp(
    lambda x, kernel, stride: (depthwise(x, kernel, stride), (x, kernel)),
    _depthwise_backward,
)


def relu(x: jax.Array, ceiling: float = math.inf) -> jax.Array:
    """`x` between 0 and a ceiling; no gradient at either or beyond, as in torch.

    The backward pass reads the output, which the next convolution keeps in any case;
    `jax.nn.relu` keeps a mask beside it.
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


def run_block(
    block: nn.Module,
    x: jax.Array,
    *,
    train: bool,
    extent_px: jax.Array | None,
    remat: bool,
) -> jax.Array:
    """A block's output; with `remat` only its input is kept for the backward pass.

    What lies in between is computed again there: up to a third more arithmetic, and the
    memory of one block instead of all.
    """

    def run(block: Any, x: jax.Array, extent_px: jax.Array | None) -> jax.Array:
        return block(x, train=train, extent_px=extent_px)

    run = nn.remat(run) if remat and train else run
    return run(block, x, extent_px)


def mask(x: jax.Array, extent_px: jax.Array | None) -> jax.Array:
    """`x` with zeros beyond each picture's valid (height, width)."""
    if extent_px is None:
        return x
    rows = jnp.arange(x.shape[1]) < extent_px[:, :1]
    columns = jnp.arange(x.shape[2]) < extent_px[:, 1:]
    valid = rows[:, :, None, None] & columns[:, None, :, None]
    return jnp.where(valid, x, jnp.zeros_like(x))


def pad_same(
    x: jax.Array, size: int, stride: int, extent_px: jax.Array | None
) -> jax.Array:
    """`x` with zeros around it, such that a convolution strides as TensorFlow's "SAME".

    A side of n then becomes `ceil(n / stride)`, and what must be padded is halved, the
    odd pixel going to the bottom or the right. With stride 2 that depends on whether n
    is even, so pictures that share a batch are each padded for their own size.

    Args:
        x: `[b, h, w, c]`.
        size: of the kernel, odd.
        stride: 1 or 2.
        extent_px: `[b, 2]`, valid (height, width) of each picture, or None: all of it.
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
