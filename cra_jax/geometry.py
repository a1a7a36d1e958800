"""Where to look: the attention and redundancy grids, and the sampler (Sec. 3.1).

One coordinate frame serves the whole package. A grid holds ``(x, y)``, x to the right
and y downwards; -1 and +1 are the *centres* of the first and the last pixel. Outside
the picture a sample is 0, reached linearly within one pixel of the border.

Shapes: ``b`` batch, ``H W`` the picture's and ``h w`` the grid's height and width,
``c`` channels.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Covered points are sent here, to the left of and above every picture: with two pixels
# or more along an axis, a sample and its slope are exactly 0 beyond -3.
_OUTSIDE = -5.0


def restrict(
    gamma: Array, *, alpha_p: float = 1.0, alpha_s: float = 0.5, inside: bool = False
) -> Array:
    """Keeps location and scale of the attention in a reasonable range.

    Args:
      gamma: ``[..., 4]``: horizontal place, vertical place, scale, angle in radians.
      alpha_p: bound of the two places.
      alpha_s: bound of the scale; 0.5 is half the picture's width.
      inside: whether the places' bound is also what keeps the whole attention in the
        picture, ``1 - |s| (|cos g4| + |sin g4|)`` at the scale s: no padding is seen,
        whose shape could tell the second stream what the first one knows.

    Returns:
      ``[..., 4]``: ``(alpha_p tanh g1, alpha_p tanh g2, alpha_s tanh g3, g4)``.

    Source: Eq. (6).

    Differs: the paper has no `inside`.
    """
    place, scale, angle_rad = gamma[..., :2], gamma[..., 2:3], gamma[..., 3:]
    scale = alpha_s * jnp.tanh(scale)
    bound = place_bound(scale, angle_rad, alpha_p=alpha_p) if inside else alpha_p
    return jnp.concatenate([bound * jnp.tanh(place), scale, angle_rad], -1)


def place_bound(
    scale: Array | float, angle_rad: Array | float, *, alpha_p: float = 1.0
) -> Array:
    """How far out the attention's centre may lie with all of it in the picture.

    Numbers are computed by NumPy, so that a config can be checked without a device.

    Args:
      scale: of either sign, ``[...]``.
      angle_rad: ``[...]``.
      alpha_p: the bound is at most this.

    Returns:
      ``[...]``; 0 or more where the scale is at most ``1 / sqrt 2``.
    """
    xp: Any = jnp if isinstance(scale, Array) else np
    reach = xp.abs(scale) * (xp.abs(xp.cos(angle_rad)) + xp.abs(xp.sin(angle_rad)))
    return xp.minimum(alpha_p, 1 - reach)


def attention_matrix(gamma_res: Array) -> Array:
    """The affine matrix that scales, turns and places the attention.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.

    Returns:
      ``[b, 2, 3]``, to be used with `affine_grid`.

    Source: Eq. (4).
    """
    x, y, scale, angle_rad = jnp.moveaxis(gamma_res, -1, 0)
    cos, sin = scale * jnp.cos(angle_rad), scale * jnp.sin(angle_rad)
    return jnp.stack([jnp.stack([cos, -sin, x], -1), jnp.stack([sin, cos, y], -1)], -2)


def affine_grid(theta: Array, size: tuple[int, int]) -> Array:
    """Where each point of the regular grid G lands under an affine map.

    Args:
      theta: ``[b, 2, 3]``.
      size: ``(h, w)`` of the grid.

    Returns:
      ``[b, h, w, 2]``.

    Source: Eq. (2).
    """
    x, y = _regular_grid(size, theta.dtype)
    t = theta[:, :, :, None, None]
    # Written out rather than as a matrix product: accelerators round those.
    return jnp.stack(
        [t[:, row, 0] * x + t[:, row, 1] * y + t[:, row, 2] for row in (0, 1)], -1
    )


def attention_grid(gamma_res: Array, size: tuple[int, int]) -> Array:
    """Where the attention looks.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.
      size: ``(h, w)`` of the grid.

    Returns:
      ``[b, h, w, 2]``.

    Source: Eq. (4).
    """
    return affine_grid(attention_matrix(gamma_res), size)


def redundancy_grid(gamma_res: Array, size: tuple[int, int]) -> Array:
    """The regular grid without what the attention covers.

    Covered points are moved so far outside that they sample exactly 0 (from any
    picture of 2 x 2 pixels or more). A set difference has no gradient: none reaches
    `gamma_res`.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.
      size: ``(h, w)`` of the grid.

    Returns:
      ``[b, h, w, 2]``.

    Source: Eq. (5).
    """
    grid = jnp.stack(_regular_grid(size, gamma_res.dtype), -1)
    inside = jax.lax.stop_gradient(_depth_inside(gamma_res, size)) >= 0
    return jnp.where(inside.all(-1)[..., None], _OUTSIDE, grid)


def redundancy_weight(
    gamma_res: Array, size: tuple[int, int], *, softness: float
) -> Array:
    """How much of each grid point the attention leaves: Eq. 5 with soft edges.

    Args:
      gamma_res: ``[b, 4]``, restricted attention parameters.
      size: ``(h, w)`` of the grid.
      softness: width of the logistic edge, in units of the frame.

    Returns:
      ``[b, h, w]`` in 0..1: 0 deep inside the attention, 1 far from it. Multiplied
      with the sampled picture it gives a redundancy whose gradient reaches Gamma.

    Differs: Eq. (5) is the limit ``softness -> 0``.
    """
    inside = jax.nn.sigmoid(_depth_inside(gamma_res, size) / softness)
    return 1 - inside.prod(-1)


def _depth_inside(gamma_res: Array, size: tuple[int, int]) -> Array:
    """How deep each point of G lies inside the attention: ``[b, h, w, 2]``.

    Turned back into the attention's own axes, a point is ``(u, v)`` away from the
    centre; the attention reaches to ``|scale|`` along each. The absolute value makes a
    negative scale, which is a half turn, cover the same region.
    """
    grid_x, grid_y = _regular_grid(size, gamma_res.dtype)
    x, y, scale, angle_rad = (p[:, None, None] for p in jnp.moveaxis(gamma_res, -1, 0))
    cos, sin = jnp.cos(angle_rad), jnp.sin(angle_rad)
    right, down = grid_x - x, grid_y - y
    u, v = cos * right + sin * down, cos * down - sin * right
    return jnp.abs(scale)[..., None] - jnp.abs(jnp.stack([u, v], -1))


def _regular_grid(size: tuple[int, int], dtype) -> tuple[Array, Array]:
    """X and y of the regular grid G, ``[h, w]`` each, from -1 to +1."""
    height, width = size
    y, x = jnp.meshgrid(
        jnp.linspace(-1, 1, height, dtype=dtype),
        jnp.linspace(-1, 1, width, dtype=dtype),
        indexing="ij",
    )
    return x, y


@jax.custom_vjp
def bilinear_sample(image: Array, grid: Array) -> Array:
    """Samples a picture at the grid's points, bilinearly.

    The backward pass is in closed form: the gradient to the grid needs only the four
    pixels that the forward pass read, and the gradient to the picture is a scatter,
    which XLA drops where nobody asks for it (in a training step, where pictures are
    data).

    Args:
      image: ``[b, H, W, c]``.
      grid: ``[b, h, w, 2]`` of ``(x, y)``, in float32 or wider: at 448 pixels,
        bfloat16 coordinates would be off by a pixel.

    Returns:
      ``[b, h, w, c]`` in the picture's type; 0 outside the picture.

    Raises:
      ValueError: the shapes do not fit, or the grid is narrower than float32.

    Source: Sec. 3.1 and the bilinear kernel of Jaderberg et al., 2015.
    """
    return _sample_forward(image, grid)[0]


def _sample_forward(image: Array, grid: Array):
    if image.ndim != 4 or grid.ndim != 4 or grid.shape[::3] != (len(image), 2):
        raise ValueError(
            f"image {image.shape} and grid {grid.shape} do not fit: they must be "
            "[b, H, W, c] and [b, h, w, 2]"
        )
    if jnp.finfo(grid.dtype).bits < 32:
        raise ValueError(f"a grid of {grid.dtype} is too coarse: make it float32")
    return _interpolate(image, grid).astype(image.dtype), (image, grid)


def _sample_backward(residuals, cotangent: Array) -> tuple[Array, Array]:
    image, grid = residuals
    _, height, width, channels = image.shape
    cotangent = cotangent.astype(grid.dtype)
    (nw, ne, sw, se), across, down = _neighbours(image, grid)
    # How fast the sample changes, per pixel, to the right and downwards.
    slopes = _mix(ne - nw, se - sw, down), _mix(sw - nw, se - ne, across)
    pixels_per_unit = jnp.array([0.5 * (width - 1), 0.5 * (height - 1)], grid.dtype)
    # Summed channel by channel: over an axis of 3, XLA's CPU reductions are slow.
    shares = [cotangent * slope for slope in slopes]
    to_grid = [sum(share[..., c] for c in range(channels)) for share in shares]
    _, to_image = jax.vjp(lambda image: _interpolate(image, grid), image)
    return *to_image(cotangent), pixels_per_unit * jnp.stack(to_grid, -1)


bilinear_sample.defvjp(_sample_forward, _sample_backward)


def _mix(a: Array, b: Array, weight: Array) -> Array:
    return a + (b - a) * weight


def _interpolate(image: Array, grid: Array) -> Array:
    """The samples ``[b, h, w, c]``, in the grid's type."""
    (nw, ne, sw, se), across, down = _neighbours(image, grid)
    return _mix(_mix(nw, ne, across), _mix(sw, se, across), down)


def _neighbours(image: Array, grid: Array) -> tuple[list[Array], Array, Array]:
    """The four pixels around each point, and where between them it lies.

    Returns:
      ``[b, h, w, c]`` each, in reading order and in the grid's type, 0 outside the
      picture; then how far the point is across and down from the first to the last,
      ``[b, h, w, 1]`` each, in 0..1.
    """
    _, height, width, _ = image.shape
    # Two pixels outside is as good as infinitely far.
    x = jnp.clip((grid[..., 0] + 1) * (0.5 * (width - 1)), -2, width + 1)
    y = jnp.clip((grid[..., 1] + 1) * (0.5 * (height - 1)), -2, height + 1)
    left, top = jnp.floor(x), jnp.floor(y)
    # A frame of zeros, where even the points farthest out find all four.
    framed = jnp.pad(image, ((0, 0), (2, 3), (2, 3), (0, 0)))
    corner = [(edge + 2).astype(jnp.int32) for edge in (top, left)]
    pixels = jax.lax.platform_dependent(
        framed, *corner, tpu=_gather_from_planes, default=_gather_squares
    )
    pixels = [pixel.astype(grid.dtype) for pixel in pixels]
    return pixels, (x - left)[..., None], (y - top)[..., None]


def _gather_squares(image: Array, top: Array, left: Array) -> list[Array]:
    """The 2 x 2 pixels at ``[b, h, w]`` corners: four times ``[b, h, w, c]``."""
    picture = jax.lax.broadcasted_iota(jnp.int32, left.shape, 0)
    squares = jax.lax.gather(
        image,
        jnp.stack([picture, top, left], -1),
        jax.lax.GatherDimensionNumbers(
            offset_dims=(3, 4, 5), collapsed_slice_dims=(0,), start_index_map=(0, 1, 2)
        ),
        slice_sizes=(1, 2, 2, image.shape[-1]),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )
    return [squares[..., row, column, :] for row in (0, 1) for column in (0, 1)]


def _gather_from_planes(image: Array, top: Array, left: Array) -> list[Array]:
    """The same pixels, from a plane for each channel.

    Of squares, a TPU pads the three channels to 128: its compiler says 17 times the
    memory and 12 times the traffic (`benchmarks.sampler_speed --topology ...`).
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
