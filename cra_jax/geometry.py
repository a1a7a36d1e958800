"""Attention grid, redundancy grid and bilinear sampler (Sec. 3.1).

The whole package uses one coordinate frame. A grid holds points ``(x, y)``: x points
right, y points down, and -1 and +1 are the *centres* of the first and the last pixel.
Samples outside the image are 0; they fall to 0 linearly within one pixel of the border.

Shapes: ``b`` batch size, ``H W`` height and width of the image, ``h w`` height and
width of the grid, ``c`` channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Coordinate of covered points, left of and above the image. If the image has at least
# two pixels along an axis, samples and their gradients are exactly 0 beyond -3.
_OUTSIDE = -5.0


def restrict(
    gamma: Array, *, alpha_p: float = 1.0, alpha_s: float = 0.5, inside: bool = False
) -> Array:
    """Restricts the attention parameters Gamma to their bounds.

    Args:
      gamma: ``[..., 4]``: x and y of the centre, scale, angle in radians.
      alpha_p: bound of x and y.
      alpha_s: bound of the scale; 0.5 is half the width of the image.
      inside: whether to keep the whole attention inside the image. The bound of x and y
        is then at most ``1 - |s| (|cos g4| + |sin g4|)``, where s is the restricted
        scale. An attention without padding cannot pass information from the first
        stream to the second through the shape of the padding.

    Returns:
      ``[..., 4]``: ``(alpha_p tanh g1, alpha_p tanh g2, alpha_s tanh g3, g4)``.

    Source: Eq. (6).

    Differs: the paper has no `inside`.
    """
    centre, scale, angle_rad = gamma[..., :2], gamma[..., 2:3], gamma[..., 3:]
    scale = alpha_s * jnp.tanh(scale)
    bound = place_bound(scale, angle_rad, alpha_p=alpha_p) if inside else alpha_p
    return jnp.concatenate([bound * jnp.tanh(centre), scale, angle_rad], -1)


def place_bound(
    scale: Array | float, angle_rad: Array | float, *, alpha_p: float = 1.0
) -> Array:
    """Largest |x| and |y| of the centre that keep the attention inside the image.

    Python numbers are computed with NumPy, so that a config is checked without a
    device.

    Args:
      scale: ``[...]``, of either sign.
      angle_rad: ``[...]``.
      alpha_p: upper limit of the bound.

    Returns:
      ``[...]``; at least 0 if ``|scale|`` is at most ``1 / sqrt 2``.
    """
    xp: Any = jnp if isinstance(scale, Array) else np
    reach = xp.abs(scale) * (xp.abs(xp.cos(angle_rad)) + xp.abs(xp.sin(angle_rad)))
    return xp.minimum(alpha_p, 1 - reach)


def attention_matrix(gamma_res: Array) -> Array:
    """Affine matrix of the attention: scale, rotation and translation.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.

    Returns:
      ``[b, 2, 3]``, the input of `affine_grid`.

    Source: Eq. (4).
    """
    x, y, scale, angle_rad = jnp.moveaxis(gamma_res, -1, 0)
    cos, sin = scale * jnp.cos(angle_rad), scale * jnp.sin(angle_rad)
    return jnp.stack([jnp.stack([cos, -sin, x], -1), jnp.stack([sin, cos, y], -1)], -2)


def affine_grid(theta: Array, size: tuple[int, int]) -> Array:
    """Applies an affine matrix to each point of the regular grid G.

    Args:
      theta: ``[b, 2, 3]``, affine matrices.
      size: ``(h, w)`` of the grid.

    Returns:
      ``[b, h, w, 2]``.

    Source: Eq. (2).
    """
    x, y = _regular_grid(size, theta.dtype)
    t = theta[:, :, :, None, None]
    # Not a matrix product, because accelerators round its inputs.
    return jnp.stack(
        [t[:, row, 0] * x + t[:, row, 1] * y + t[:, row, 2] for row in (0, 1)], -1
    )


def attention_grid(gamma_res: Array, size: tuple[int, int]) -> Array:
    """Sampling grid of the attention.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.
      size: ``(h, w)`` of the grid.

    Returns:
      ``[b, h, w, 2]``.

    Source: Eq. (4).
    """
    return affine_grid(attention_matrix(gamma_res), size)


def redundancy_grid(
    gamma_res: Array, size: tuple[int, int], *, filled: bool = False
) -> Array:
    """Sampling grid of the redundancy: the regular grid without the attention.

    Points that the attention covers are moved outside the image, where they sample
    exactly 0 (for images of at least 2 x 2 pixels). A set difference has no gradient,
    so `gamma_res` receives none.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.
      size: ``(h, w)`` of the grid.
      filled: whether covered points are moved beside the attention instead, see
        `beside`, so that no hole shows where the attention was.

    Returns:
      ``[b, h, w, 2]``.

    Source: Eq. (5).

    Differs: the paper has no `filled`.
    """
    gamma_res = jax.lax.stop_gradient(gamma_res)
    grid = regular_grid(size, gamma_res.dtype)
    covered = (depth_inside(gamma_res, size) >= 0).all(-1)[..., None]
    return jnp.where(covered, beside(gamma_res, grid) if filled else _OUTSIDE, grid)


def beside(gamma_res: Array, grid: Array) -> Array:
    """Moves points into the widest strip of the image beside the attention.

    The strip lies left or right of the attention, or above or below it, over the whole
    width or height of the image. Points are moved along one axis, by mirroring at both
    edges of the strip, so that neighbours stay neighbours.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.
      grid: ``[b, h, w, 2]``, points in the image.

    Returns:
      ``[b, h, w, 2]``. An attention that leaves no strip moves points to the edge of
      the image.
    """
    centre, scale, angle_rad = gamma_res[:, :2], gamma_res[:, 2:3], gamma_res[:, 3:]
    half = jnp.abs(scale) * (jnp.abs(jnp.cos(angle_rad)) + jnp.abs(jnp.sin(angle_rad)))
    # The strip is wider on the side of the image's centre; the other side is mirrored.
    side = jnp.where(centre > 0, -1.0, 1.0)
    start = side * centre + half
    width = jnp.maximum(1 - start, 0)
    is_widest = width == width.max(-1, keepdims=True)
    is_widest &= jnp.cumsum(is_widest, -1) == 1
    side, start, width, is_widest = (
        x[:, None, None] for x in (side, start, width, is_widest)
    )
    offset = jnp.mod(side * grid - start, jnp.maximum(2 * width, 1e-6))
    moved = side * (start + jnp.minimum(offset, 2 * width - offset))
    return jnp.where(is_widest, jnp.clip(moved, -1, 1), grid)


def redundancy_weight(
    gamma_res: Array, size: tuple[int, int], *, softness: float
) -> Array:
    """Weight of each grid point in the redundancy: Eq. (5) with soft edges.

    The product of this weight and the sampled image is a redundancy whose gradient
    reaches Gamma.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.
      size: ``(h, w)`` of the grid.
      softness: width of the logistic edge, in grid coordinates (the image is 2 wide).

    Returns:
      ``[b, h, w]`` in 0..1: 0 deep inside the attention, 1 far from it.

    Differs: Eq. (5) is the limit ``softness -> 0``.
    """
    inside = jax.nn.sigmoid(depth_inside(gamma_res, size) / softness)
    return 1 - inside.prod(-1)


def depth_inside(gamma_res: Array, size: tuple[int, int]) -> Array:
    """Signed distance of each point of G to the attention's edges: ``[b, h, w, 2]``.

    ``(u, v)`` is the offset of a point from the centre along the rotated axes of the
    attention, which extends to ``|scale|`` along each axis. Both distances are
    ``|scale| - |u|`` and ``|scale| - |v|``, positive inside. A negative scale is a half
    turn and covers the same region, hence the absolute value.
    """
    grid_x, grid_y = _regular_grid(size, gamma_res.dtype)
    x, y, scale, angle_rad = (p[:, None, None] for p in jnp.moveaxis(gamma_res, -1, 0))
    cos, sin = jnp.cos(angle_rad), jnp.sin(angle_rad)
    right, down = grid_x - x, grid_y - y
    u, v = cos * right + sin * down, cos * down - sin * right
    return jnp.abs(scale)[..., None] - jnp.abs(jnp.stack([u, v], -1))


def regular_grid(size: tuple[int, int], dtype=jnp.float32) -> Array:
    """The regular grid G, which samples the whole image: ``[h, w, 2]``."""
    return jnp.stack(_regular_grid(size, dtype), -1)


def _regular_grid(size: tuple[int, int], dtype) -> tuple[Array, Array]:
    """Coordinates x and y of the regular grid G, ``[h, w]`` each, from -1 to +1."""
    height, width = size
    y, x = jnp.meshgrid(
        jnp.linspace(-1, 1, height, dtype=dtype),
        jnp.linspace(-1, 1, width, dtype=dtype),
        indexing="ij",
    )
    return x, y


@jax.custom_vjp
def bilinear_sample(image: Array, grid: Array) -> Array:
    """Samples an image bilinearly at the points of a grid.

    The backward pass is in closed form. The gradient of the grid needs only the four
    pixels that the forward pass read. The gradient of the image is a scatter, which XLA
    removes if it is unused, as in a training step.

    Args:
      image: ``[b, H, W, c]``.
      grid: ``[b, h, w, 2]`` of ``(x, y)``, in float32 or wider. At 448 pixels, bfloat16
        coordinates are off by a pixel.

    Returns:
      ``[b, h, w, c]`` in the dtype of the image; 0 outside the image.

    Raises:
      ValueError: the shapes do not match, or the dtype of the grid is narrower than
        float32.

    Source: Sec. 3.1 and the bilinear kernel of Jaderberg et al., 2015.
    """
    return _sample_forward(image, grid)[0]


def _sample_forward(image: Array, grid: Array):
    if image.ndim != 4 or grid.ndim != 4 or grid.shape[::3] != (len(image), 2):
        raise ValueError(
            f"the shapes of image {image.shape} and grid {grid.shape} do not match: "
            "pass [b, H, W, c] and [b, h, w, 2]"
        )
    if jnp.finfo(grid.dtype).bits < 32:
        raise ValueError(f"a grid of {grid.dtype} is too coarse: convert it to float32")
    return _interpolate(image, grid).astype(image.dtype), (image, grid)


def _sample_backward(residuals, cotangent: Array) -> tuple[Array, Array]:
    image, grid = residuals
    _, height, width, channels = image.shape
    cotangent = cotangent.astype(grid.dtype)
    (nw, ne, sw, se), across, down = _neighbours(image, grid)
    # Derivatives of the sample along x and y, per pixel.
    slopes = _mix(ne - nw, se - sw, down), _mix(sw - nw, se - ne, across)
    pixels_per_unit = jnp.array([0.5 * (width - 1), 0.5 * (height - 1)], grid.dtype)
    # Summed channel by channel, because XLA reduces an axis of 3 slowly on CPUs.
    shares = [cotangent * slope for slope in slopes]
    to_grid = [sum(share[..., c] for c in range(channels)) for share in shares]
    _, to_image = jax.vjp(lambda image: _interpolate(image, grid), image)
    return *to_image(cotangent), pixels_per_unit * jnp.stack(to_grid, -1)


bilinear_sample.defvjp(_sample_forward, _sample_backward)


def _mix(a: Array, b: Array, weight: Array) -> Array:
    return a + (b - a) * weight


def _interpolate(image: Array, grid: Array) -> Array:
    """The samples ``[b, h, w, c]``, in the dtype of the grid."""
    (nw, ne, sw, se), across, down = _neighbours(image, grid)
    return _mix(_mix(nw, ne, across), _mix(sw, se, across), down)


def _neighbours(image: Array, grid: Array) -> tuple[list[Array], Array, Array]:
    """The four pixels around each point, and the point's position between them.

    Returns:
      The pixels north-west, north-east, south-west and south-east of the points,
      ``[b, h, w, c]`` each, in the dtype of the grid, 0 outside the image; the fraction
      along x from west to east; the fraction along y from north to south;
      ``[b, h, w, 1]`` each, in 0..1.
    """
    _, height, width, _ = image.shape
    # All points two or more pixels outside the image give the same sample, 0.
    x = jnp.clip((grid[..., 0] + 1) * (0.5 * (width - 1)), -2, width + 1)
    y = jnp.clip((grid[..., 1] + 1) * (0.5 * (height - 1)), -2, height + 1)
    left, top = jnp.floor(x), jnp.floor(y)
    # Zero padding, so that all four pixels exist for the outermost points too.
    padded = jnp.pad(image, ((0, 0), (2, 3), (2, 3), (0, 0)))
    corner = [(edge + 2).astype(jnp.int32) for edge in (top, left)]
    pixels = jax.lax.platform_dependent(
        padded, *corner, tpu=_gather_from_planes, default=_gather_squares
    )
    pixels = [pixel.astype(grid.dtype) for pixel in pixels]
    return pixels, (x - left)[..., None], (y - top)[..., None]


def _gather_squares(image: Array, top: Array, left: Array) -> list[Array]:
    """Gathers 2 x 2 pixels at corners ``[b, h, w]``: four arrays ``[b, h, w, c]``."""
    row_of_batch = jax.lax.broadcasted_iota(jnp.int32, left.shape, 0)
    squares = jax.lax.gather(
        image,
        jnp.stack([row_of_batch, top, left], -1),
        jax.lax.GatherDimensionNumbers(
            offset_dims=(3, 4, 5), collapsed_slice_dims=(0,), start_index_map=(0, 1, 2)
        ),
        slice_sizes=(1, 2, 2, image.shape[-1]),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return [squares[..., row, column, :] for row in (0, 1) for column in (0, 1)]


def _gather_from_planes(image: Array, top: Array, left: Array) -> list[Array]:
    """Gathers the same pixels from one plane per channel.

    For `_gather_squares`, a TPU pads the three channels to 128, which takes 17 times
    the memory and 12 times the memory traffic according to its compiler
    (`benchmarks.sampler_speed --topology ...`).
    """
    b, _, width, channels = image.shape
    planes = image.transpose(0, 3, 1, 2).reshape(b, channels, -1)
    first = (top * width + left).reshape(b, 1, -1)
    return [
        jnp.take_along_axis(planes, first + after, -1, mode="promise_in_bounds")
        .reshape(b, channels, *top.shape[1:])
        .transpose(0, 2, 3, 1)
        for after in (0, 1, width, width + 1)
    ]
