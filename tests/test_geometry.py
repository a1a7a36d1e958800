"""Grids and sampler compared with loops over the paper's equations, in 64 bits."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import geometry
from tests.helpers.torch_or_skip import torch
from tests.oracles import equations

pytestmark = pytest.mark.usefixtures("optimized")

# Compiled, as in training; run op by op, the tests would take minutes.
affine_grid = jax.jit(geometry.affine_grid, static_argnums=1)
attention_grid = jax.jit(geometry.attention_grid, static_argnums=1)
redundancy_grid = jax.jit(geometry.redundancy_grid, static_argnums=1)
redundancy_weight = jax.jit(
    geometry.redundancy_weight, static_argnums=1, static_argnames="softness"
)
bilinear_sample = jax.jit(geometry.bilinear_sample)

SIZES = [(6, 6), (4, 9), (7, 3)]
IDENTITY = np.array([[[1.0, 0, 0], [0, 1, 0]]])

# Restricted parameters: centre crop, off centre, scale 0 on and off a grid point,
# negative scale, multiples of a quarter turn, a half turn, many turns, off the image.
GAMMAS = np.array(
    [
        [0.0, 0.0, 0.47, 0.0],
        [0.31, -0.22, 0.37, 0.4],
        [0.1, 0.05, 0.0, 0.9],
        [1.0, -1.0, 0.0, 0.0],
        [-0.23, 0.11, -0.41, 0.6],
        [0.13, 0.21, 0.43, math.pi / 2],
        [0.13, 0.21, 0.43, math.pi],
        [0.13, 0.21, -0.43, math.pi],
        [-0.42, 0.33, 0.29, -3 * math.pi / 2],
        [0.05, 0.06, 0.48, 1234.5],
        [0.97, 0.98, 0.44, -0.7],
        [2.9, -2.8, 0.5, 0.2],
    ]
)


def random_gamma(seed, count=8):
    """Draws restricted parameters over their whole range, angles over many turns."""
    rng = np.random.default_rng(seed)
    return rng.uniform([-1, -1, -0.5, -20], [1, 1, 0.5, 20], (count, 4))


def on_the_edge(gammas, size):
    """Marks points of G so close to an attention's outline that rounding decides."""
    grid = equations.regular_grid(size)
    distance = [
        [[equations.edge_distance(p, g) for p in row] for row in grid] for g in gammas
    ]
    return np.array(distance) < 1e-9


def points(rng, count, size, region):
    """Draws points (x, y), each at least 0.05 pixel from every integer coordinate.

    `region`: "inside": inside the image; "straddling": at least one coordinate is at
    most one pixel outside the border; "outside": at least one is further outside.
    """
    limits = np.array([size[1], size[0]]) - 1
    fraction = rng.uniform(0.05, 0.95, (count, 2))
    inside = rng.integers(0, limits, (count, 2))
    sides = {
        "inside": inside,
        "straddling": np.where(rng.random((count, 2)) < 0.5, -1, limits),
        "outside": np.where(rng.random((count, 2)) < 0.5, -3, limits + 1),
    }
    which = np.ones((count, 2), bool)
    which[::3, 0] = False  # only x outside, only y outside, both outside
    which[1::3, 1] = False
    whole = np.where(which, sides[region], inside)
    return (whole + fraction) / limits * 2 - 1


def scatters(function, *arguments):
    """Returns the scatters in the compiled program, including fused ones."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text
    return re.findall(r"\bscatter(?:-add)?\b", text)


# --- Eq. 6


@pytest.mark.parametrize("alphas", [(1.0, 0.5), (0.8, 0.3), (0.0, 1.0)])
def test_restrict_is_equation_6(x64, alphas):
    alpha_p, alpha_s = alphas
    gamma = np.random.default_rng(0).normal(0, 3, (2, 5, 4))
    gamma[0, 0] = [0, 0, 0, 50]
    gamma[0, 1] = [-40, 40, -40, -50]
    got = geometry.restrict(jnp.asarray(gamma), alpha_p=alpha_p, alpha_s=alpha_s)
    assert_allclose(got, equations.restrict(gamma, alpha_p, alpha_s), rtol=1e-12)


def test_restrict_has_the_papers_bounds_as_defaults(x64):
    extreme = jnp.array([[99.0, -99.0, 99.0, 7.0], [-99.0, 99.0, -99.0, -7.0]])
    assert_allclose(
        geometry.restrict(extreme), [[1, -1, 0.5, 7], [-1, 1, -0.5, -7]], rtol=1e-12
    )


@pytest.mark.parametrize("alphas", [(1.0, 0.5), (0.4, 0.3), (1.0, 0.7)])
def test_restrict_inside_bounds_the_position_by_the_attentions_corners(x64, alphas):
    alpha_p, alpha_s = alphas
    gamma = np.random.default_rng(1).normal(0, 3, (2, 20, 4))
    gamma[0, :3, 2:] = [[0, 0], [40, 0], [-40, math.pi / 4]]
    got = geometry.restrict(
        jnp.asarray(gamma), alpha_p=alpha_p, alpha_s=alpha_s, inside=True
    )
    expected = equations.restrict(gamma, alpha_p, alpha_s, inside=True)
    assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


@settings(deadline=None)  # the first call compiles
@given(st.lists(st.floats(-60, 60), min_size=4, max_size=4))
def test_restrict_inside_keeps_the_corners_in_the_image(gamma):
    gamma_res = geometry.restrict(jnp.array([gamma], jnp.float32), inside=True)
    grid = geometry.attention_grid(gamma_res, (2, 2))  # its corners
    assert jnp.abs(grid).max() <= 1 + 1e-6


# --- Eq. 2 and 4


@pytest.mark.parametrize("size", SIZES)
def test_affine_grid_is_equation_2(x64, size):
    theta = np.random.default_rng(1).normal(size=(3, 2, 3))
    got = affine_grid(jnp.asarray(theta), size)
    assert_allclose(
        got, equations.affine_grid(theta, size), rtol=1e-12, atol=1e-14, strict=True
    )


@pytest.mark.parametrize("size", SIZES)
def test_attention_grid_is_equation_4(x64, size):
    gammas = np.concatenate([GAMMAS, random_gamma(2)])
    got = attention_grid(jnp.asarray(gammas), size)
    assert_allclose(
        got, equations.attention_grid(gammas, size), rtol=1e-12, atol=1e-14, strict=True
    )


def test_attention_without_rotation_is_a_crop_around_its_centre():
    # y points down: a positive gamma2 moves the attention to the lower half.
    grid = attention_grid(jnp.array([[0.25, 0.5, 0.5, 0.0]]), (3, 5))
    assert_allclose(grid[0, 0, 0], [-0.25, 0.0], atol=1e-6)
    assert_allclose(grid[0, -1, -1], [0.75, 1.0], atol=1e-6)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("seed", [3, 4])
def test_gradient_of_attention_grid_after_restrict_is_the_finite_difference(
    x64, seed, inside
):
    gammas = np.random.default_rng(seed).normal(0, 1, (3, 4))
    # With `inside`, the function is not differentiable at scale 0.
    gammas[0] = [0, 0, 0.3 * inside, 0.1 * inside]
    cotangent = np.random.default_rng(seed + 10).normal(size=(3, 4, 5, 2))

    def implemented(gamma):
        gamma_res = geometry.restrict(gamma, inside=inside)
        return (attention_grid(gamma_res, (4, 5)) * cotangent).sum()

    def written_out(gamma):
        gamma_res = equations.restrict(gamma, inside=inside)
        grid = equations.attention_grid(gamma_res, (4, 5))
        return (grid * cotangent).sum()

    got = gradient(implemented)(jnp.asarray(gammas))
    assert_allclose(got, finite_difference(written_out, gammas), rtol=1e-7, atol=1e-8)


def gradient(function, argnums: int | tuple[int, ...] = 0):
    return jax.jit(jax.grad(function, argnums))


def finite_difference(function, at, step=1e-6):
    """Returns the gradient of a scalar function of an array by central differences."""
    slope = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        slope[index] = (function(up) - function(down)) / (2 * step)
    return slope


# --- Eq. 5


@pytest.mark.parametrize("size", [(6, 6), (5, 9), (13, 8)])
def test_redundancy_grid_is_equation_5(x64, size):
    gammas = np.concatenate([GAMMAS, random_gamma(5, 12)])
    ties = on_the_edge(gammas, size)
    assert ties.mean() < 0.02  # only scale 0 on a grid point is a tie
    got = np.asarray(redundancy_grid(jnp.asarray(gammas), size))
    stays = equations.redundancy(gammas, size)
    whole = np.broadcast_to(equations.regular_grid(size), got.shape)
    assert 0.5 < stays.mean() < 0.99, "the data must have covered and uncovered points"
    assert_allclose(got[stays & ~ties], whole[stays & ~ties], rtol=1e-12, atol=1e-14)
    # "Far outside": no pixel of even the smallest image has an influence.
    far = np.abs(got).max(-1) >= 3
    assert_array_equal(far[~ties], ~stays[~ties])


def test_scale_zero_covers_only_its_centre():
    grid = redundancy_grid(jnp.array([[0.0, 0.5, 0.0, 0.0]]), (5, 5))
    covered = np.abs(np.asarray(grid[0])).max(-1) > 1
    assert_array_equal(np.argwhere(covered), [[3, 2]])


@pytest.mark.parametrize("shape", [(2, 2), (2, 9), (9, 2), (6, 7), (64, 48)])
def test_covered_points_are_sampled_as_exactly_zero(shape):
    gammas = jnp.asarray(np.concatenate([GAMMAS, random_gamma(6)]), jnp.float32)
    image = jnp.ones((len(gammas), *shape, 1))
    grid = redundancy_grid(gammas, (11, 12))
    got = np.asarray(bilinear_sample(image, grid))[..., 0]
    stays = equations.redundancy(np.asarray(gammas), (11, 12))
    ties = on_the_edge(np.asarray(gammas), (11, 12))
    assert (~stays & ~ties).sum() > 100
    assert_array_equal(got[~stays & ~ties], 0)
    assert_allclose(got[stays & ~ties], 1, atol=1e-5)


def test_uncovered_points_are_bitwise_the_regular_grid():
    gammas = jnp.asarray(random_gamma(7), jnp.float32)
    whole = affine_grid(jnp.asarray(IDENTITY, jnp.float32), (14, 10))
    grid = np.asarray(redundancy_grid(gammas, (14, 10)))
    moved = (grid != np.asarray(whole)).any(-1)
    assert_array_equal(np.abs(grid).max(-1) > 1, moved)
    assert 0 < moved.mean() < 0.5


def test_hard_redundancy_has_no_gradient_to_gamma(x64):
    image = np.random.default_rng(8).random((len(GAMMAS), 6, 7, 2))

    def total(gamma):
        grid = redundancy_grid(gamma, (5, 6))
        return bilinear_sample(jnp.asarray(image), grid).sum()

    assert_array_equal(gradient(total)(jnp.asarray(GAMMAS)), np.zeros_like(GAMMAS))


@pytest.mark.parametrize("softness", [0.05, 0.3])
def test_soft_redundancy_is_a_product_of_logistic_edges(x64, softness):
    gammas = np.concatenate([GAMMAS, random_gamma(9)])
    got = redundancy_weight(jnp.asarray(gammas), (5, 8), softness=softness)
    want = equations.redundancy_weight(gammas, (5, 8), softness)
    assert_allclose(got, want, rtol=1e-11, atol=1e-15, strict=True)


def test_soft_redundancy_converges_to_equation_5(x64):
    gammas, size = random_gamma(10), (9, 11)
    weight = redundancy_weight(jnp.asarray(gammas), size, softness=1e-11)
    ties = on_the_edge(gammas, size)
    assert_allclose(
        np.asarray(weight)[~ties], equations.redundancy(gammas, size)[~ties], atol=1e-12
    )


def test_soft_redundancy_has_the_gradient_of_equation_5(x64):
    gammas = random_gamma(11, 3)
    cotangent = np.random.default_rng(12).normal(size=(3, 5, 8))

    def implemented(gamma):
        weight = redundancy_weight(gamma, (5, 8), softness=0.2)
        return (weight * cotangent).sum()

    def written_out(gamma):
        return (equations.redundancy_weight(gamma, (5, 8), 0.2) * cotangent).sum()

    got = gradient(implemented)(jnp.asarray(gammas))
    want = finite_difference(written_out, gammas)
    assert np.abs(want).min() > 1e-4
    assert_allclose(got, want, rtol=1e-6, atol=1e-8)


# --- the sampler


@pytest.mark.parametrize("region", ["inside", "straddling", "outside"])
@pytest.mark.parametrize("shape", [(5, 7), (6, 2), (2, 2)])
def test_sampler_equals_the_sum_over_all_pixels(x64, shape, region):
    rng = np.random.default_rng(13)
    image = rng.normal(size=(2, *shape, 3))
    grid = points(rng, 24, shape, region).reshape(2, 4, 3, 2)
    got = bilinear_sample(jnp.asarray(image), jnp.asarray(grid))
    want = equations.bilinear_sample(image, grid)
    assert_allclose(got, want, rtol=1e-12, atol=1e-14, strict=True)
    if region == "outside":
        assert_array_equal(got, 0)
    else:
        assert np.abs(want).min() > 0


def test_sampler_is_exact_at_pixel_centres_and_beyond_the_border(x64):
    rng = np.random.default_rng(14)
    image = rng.normal(size=(1, 5, 9, 2))  # 4 and 8 steps are exact in binary
    y, x = np.meshgrid(np.arange(-2, 7), np.arange(-2, 11), indexing="ij")
    grid = np.stack([x / 4 - 1, y / 2 - 1], -1)[None]
    got = bilinear_sample(jnp.asarray(image), jnp.asarray(grid))
    want = np.pad(image, ((0, 0), (2, 2), (2, 2), (0, 0)))
    assert_array_equal(got, want)


@pytest.mark.parametrize("place", [-3.5, 3.5, 1e4, -1e30, np.inf, -np.inf])
@pytest.mark.parametrize("axis", [0, 1])
def test_samples_far_outside_are_exactly_zero_with_zero_gradient(place, axis):
    grid = jnp.zeros((1, 1, 1, 2)).at[..., axis].set(place)
    image = jnp.ones((1, 2, 3, 1))

    def total(image, grid):
        return bilinear_sample(image, grid).sum()

    assert total(image, grid) == 0
    for slope in gradient(total, (0, 1))(image, grid):
        assert_array_equal(slope, 0)


def test_identity_grid_returns_the_image():
    image = jax.random.uniform(jax.random.key(0), (1, 5, 9, 3))
    identity = jnp.asarray(IDENTITY, jnp.float32)
    exact = bilinear_sample(image, affine_grid(identity, (5, 9)))
    assert_array_equal(exact, image)
    # If the spacing is no binary fraction, coordinates are rounded to float32: by at
    # most 4 units in the last place of 448, times the difference of two pixels.
    image = jax.random.uniform(jax.random.key(1), (1, 448, 448, 1))
    close = bilinear_sample(image, affine_grid(identity, (448, 448)))
    assert_allclose(close, image, atol=4 * np.spacing(np.float32(448)))


def test_identity_grid_returns_any_image_in_64_bits(x64):
    image = np.random.default_rng(15).normal(size=(1, 7, 12, 2))
    grid = affine_grid(jnp.asarray(IDENTITY), (7, 12))
    got = bilinear_sample(jnp.asarray(image), grid)
    assert_allclose(got, image, atol=1e-13)


@pytest.mark.parametrize("axis", [0, 1])
def test_flip_grid_returns_the_flipped_image(axis):
    image = jax.random.uniform(jax.random.key(2), (1, 5, 9, 3))
    theta = IDENTITY.copy()
    theta[0, axis, axis] = -1
    grid = affine_grid(jnp.asarray(theta, jnp.float32), (5, 9))
    got = bilinear_sample(image, grid)
    assert_array_equal(got, jnp.flip(image, axis=2 - axis))


def test_quarter_turn_of_the_attention_rotates_the_image(x64):
    # x' = -y, y' = x: the right of the crop shows the region below the centre. The
    # image thus rotates in the opposite direction, counterclockwise.
    image = np.random.default_rng(16).normal(size=(1, 5, 5, 1))
    grid = attention_grid(jnp.array([[0.0, 0.0, 1.0, math.pi / 2]]), (5, 5))
    got = bilinear_sample(jnp.asarray(image), grid)[0, ..., 0]
    assert_allclose(got, np.rot90(image[0, ..., 0]), atol=1e-12)


@pytest.mark.parametrize("region", ["inside", "straddling", "outside"])
@pytest.mark.parametrize("shape", [(5, 7), (3, 2)])
def test_sampler_gradient_to_the_grid_is_the_finite_difference(x64, shape, region):
    rng = np.random.default_rng(17)
    image = rng.normal(size=(2, *shape, 2))
    grid = points(rng, 18, shape, region).reshape(2, 3, 3, 2)
    cotangent = rng.normal(size=(2, 3, 3, 2))

    def total(grid):
        return (bilinear_sample(jnp.asarray(image), grid) * cotangent).sum()

    got = np.asarray(gradient(total)(jnp.asarray(grid)))
    # Within a cell, the sample is linear in x and in y: a long step is exact.
    step = 0.01 * 2 / (max(shape) - 1)
    for axis in (0, 1):
        shift = step * np.eye(2)[axis]
        change = equations.bilinear_sample(image, grid + shift)
        change -= equations.bilinear_sample(image, grid - shift)
        want = (change * cotangent).sum(-1) / (2 * step)
        assert_allclose(got[..., axis], want, rtol=1e-9, atol=1e-11)
    if region == "outside":
        assert_array_equal(got, 0)
    else:
        assert np.abs(got).max() > 0.1


def test_sampler_gradient_to_the_image_is_the_finite_difference(x64):
    rng = np.random.default_rng(18)
    shape = (4, 3)
    image = rng.normal(size=(2, *shape, 2))
    regions = ("inside", "straddling", "outside")
    grid = np.concatenate([points(rng, 8, shape, region) for region in regions])
    grid = grid.reshape(2, 4, 3, 2)
    cotangent = rng.normal(size=(2, 4, 3, 2))

    def total(image):
        return (bilinear_sample(image, jnp.asarray(grid)) * cotangent).sum()

    def written_out(image):
        return (equations.bilinear_sample(image, grid) * cotangent).sum()

    got = gradient(total)(jnp.asarray(image))
    want = finite_difference(written_out, image, step=1e-3)
    assert_allclose(got, want, rtol=1e-9, atol=1e-11)


def test_gradients_of_two_stacked_samplers_are_the_finite_differences(x64):
    rng = np.random.default_rng(19)
    image = rng.normal(size=(1, 4, 5, 1))
    first = points(rng, 12, (4, 5), "inside").reshape(1, 3, 4, 2)
    second = points(rng, 6, (3, 4), "straddling").reshape(1, 2, 3, 2)
    second[0, 0] = points(rng, 3, (3, 4), "inside")
    cotangent = rng.normal(size=(1, 2, 3, 1))

    def stacked(sample):
        def total(image, first, second):
            return (sample(sample(image, first), second) * cotangent).sum()

        return total

    got = gradient(stacked(bilinear_sample), (0, 1, 2))(
        jnp.asarray(image), jnp.asarray(first), jnp.asarray(second)
    )
    arguments = [image, first, second]
    for position, slope in enumerate(got):

        def written_out(changed, position=position):
            replaced = [*arguments[:position], changed, *arguments[position + 1 :]]
            return stacked(equations.bilinear_sample)(*replaced)

        want = finite_difference(written_out, arguments[position], step=1e-4)
        assert np.abs(want).max() > 0.1
        assert_allclose(slope, want, rtol=1e-8, atol=1e-10)


def test_gradient_to_gamma_through_all_equations_is_the_finite_difference(x64):
    rng = np.random.default_rng(20)
    image = rng.normal(size=(3, 6, 8, 2))
    gammas = rng.normal(0, 0.7, (3, 4))
    cotangent = rng.normal(size=(3, 4, 5, 2))

    def total(module):
        def of_gamma(gamma):
            grid = module.attention_grid(module.restrict(gamma), (4, 5))
            return (module.bilinear_sample(image, grid) * cotangent).sum()

        return of_gamma

    got = gradient(total(geometry))(jnp.asarray(gammas))
    want = finite_difference(total(equations), gammas)
    assert_allclose(got, want, rtol=1e-6, atol=1e-7)


def test_sampler_equals_torch_grid_sample():
    rng = np.random.default_rng(21)
    image = rng.normal(size=(2, 31, 45, 3)).astype(np.float32)
    grid = rng.uniform(-1.3, 1.3, (2, 20, 24, 2)).astype(np.float32)
    cotangent = rng.normal(size=(2, 20, 24, 3)).astype(np.float32)

    t_image = torch.tensor(image, requires_grad=True)
    t_grid = torch.tensor(grid, requires_grad=True)
    t_out = torch.nn.functional.grid_sample(
        t_image.permute(0, 3, 1, 2), t_grid, padding_mode="zeros", align_corners=True
    ).permute(0, 2, 3, 1)
    t_out.backward(torch.tensor(cotangent))
    assert t_image.grad is not None
    assert t_grid.grad is not None

    got, backward = jax.vjp(bilinear_sample, image, grid)
    to_image, to_grid = backward(jnp.asarray(cotangent))
    assert_allclose(got, t_out.detach().numpy(), atol=3e-5)
    assert_allclose(to_image, t_image.grad.numpy(), atol=1e-4)
    assert_allclose(to_grid, t_grid.grad.numpy(), rtol=1e-3, atol=3e-3)


# --- types, transformations, compilation


def test_bfloat16_images_keep_float32_coordinates():
    image = jax.random.uniform(jax.random.key(3), (1, 448, 448, 1), jnp.bfloat16)
    grid = attention_grid(jnp.array([[0.2, -0.1, 0.45, 0.3]]), (40, 40))
    got = bilinear_sample(image, grid)
    assert got.dtype == jnp.bfloat16
    wide = bilinear_sample(image.astype(jnp.float32), grid)
    assert_array_equal(got, wide.astype(jnp.bfloat16))
    coarse = grid.astype(jnp.bfloat16).astype(jnp.float32)
    assert jnp.abs(bilinear_sample(image, coarse) - got).max() > 0.1


def test_bfloat16_images_get_float32_gradients_to_the_grid():
    image = jax.random.uniform(jax.random.key(4), (1, 20, 30, 2), jnp.bfloat16)
    grid = attention_grid(jnp.array([[0.2, -0.1, 0.45, 0.3]]), (8, 8))

    def total(image, grid):
        return bilinear_sample(image, grid).astype(jnp.float32).sum()

    to_image, to_grid = gradient(total, (0, 1))(image, grid)
    assert (to_image.dtype, to_grid.dtype) == (jnp.bfloat16, jnp.float32)
    _, wide = gradient(total, (0, 1))(image.astype(jnp.float32), grid)
    assert_allclose(to_grid, wide, rtol=1e-5, atol=1e-4)


def test_vmap_equals_a_loop(x64):
    rng = np.random.default_rng(22)
    image = jnp.asarray(rng.normal(size=(3, 2, 5, 6, 2)))
    gammas = jnp.asarray(random_gamma(23, 6).reshape(3, 2, 4))

    def module(image, gamma):
        gamma = geometry.restrict(gamma)
        grids = [attention_grid(gamma, (4, 3)), redundancy_grid(gamma, (4, 3))]
        return jnp.stack([bilinear_sample(image, grid) for grid in grids])

    def outputs(image, gamma):
        sample, backward = jax.vjp(module, image, gamma)
        return sample, *backward(jnp.cos(sample))

    together = jax.jit(jax.vmap(outputs))(image, gammas)
    for k in range(3):
        alone = jax.jit(outputs)(image[k], gammas[k])
        for got, want in zip(together, alone, strict=True):
            assert_allclose(got[k], want, rtol=1e-12, atol=1e-14)


def test_gradient_to_gamma_has_no_scatter():
    image = jnp.ones((2, 12, 12, 3))
    gammas = jnp.asarray(random_gamma(24, 2), jnp.float32)

    def total(gamma, image):
        gamma_res = geometry.restrict(gamma)
        attention = bilinear_sample(image, attention_grid(gamma_res, (6, 6)))
        redundancy = bilinear_sample(image, redundancy_grid(gamma_res, (6, 6)))
        return jnp.square(attention).sum() + jnp.square(redundancy).sum()

    assert not scatters(jax.grad(total, 0), gammas, image)
    # The search does find the scatter in the gradient to the image.
    assert scatters(jax.grad(total, 1), gammas, image)


def test_both_gather_functions_return_the_same_pixels():
    rng = np.random.default_rng(5)
    image = jnp.asarray(rng.normal(size=(2, 9, 11, 3)))
    top, left = (jnp.asarray(rng.integers(0, n, (2, 5, 4))) for n in (8, 10))
    ways = geometry._gather_squares, geometry._gather_from_planes
    squares, planes = (way(image, top, left) for way in ways)
    for i, (row, column) in enumerate(np.ndindex(2, 2)):
        want = np.stack([image[b, top[b] + row, left[b] + column] for b in (0, 1)])
        assert_array_equal(squares[i], want)
        assert_array_equal(planes[i], want)


def test_each_platform_uses_its_own_gather_function():
    image, grid = jnp.ones((2, 9, 11, 3)), jnp.zeros((2, 5, 4, 2))
    traced = jax.jit(bilinear_sample).trace(image, grid)

    def gathered(platform):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return re.findall(r"gather.*?slice_sizes = array<i64: ([\d, ]+)>", text)

    assert gathered("tpu") == ["1, 3, 1"]  # in a function that is called four times
    assert gathered("cpu") == gathered("cuda") == ["1, 2, 2, 3"]


def test_no_value_or_gradient_is_nan_at_edge_cases():
    gammas = jnp.asarray(GAMMAS, jnp.float32)
    image = jnp.ones((len(gammas), 6, 7, 1))

    def total(gamma, image):
        weight = redundancy_weight(gamma, (4, 5), softness=0.1)
        attention = bilinear_sample(image, attention_grid(gamma, (4, 5)))
        redundancy = bilinear_sample(image, redundancy_grid(gamma, (4, 5)))
        return attention.sum() + redundancy.sum() + weight.sum()

    with jax.debug_nans(True):  # checks each function's values and gradients
        slopes = jax.grad(total, (0, 1))(gammas, image)
    assert all(bool(jnp.isfinite(slope).all()) for slope in slopes)


# --- properties

locations = st.floats(-1, 1)
scales = st.floats(-0.5, 0.5)
angles_rad = st.floats(-10, 10)


@settings(max_examples=30, deadline=None)
@given(locations, locations, scales, angles_rad)
def test_half_turn_is_a_negative_scale(x, y, scale, angle_rad):
    turned = np.array([[x, y, scale, angle_rad + math.pi]])
    negative = np.array([[x, y, -scale, angle_rad]])
    size = (6, 7)
    with jax.enable_x64(True):
        grids = [attention_grid(jnp.asarray(g), size) for g in (turned, negative)]
        assert_allclose(grids[0], grids[1], atol=1e-12)
        rest = [redundancy_grid(jnp.asarray(g), size) for g in (turned, negative)]
    sure = ~on_the_edge(negative, size)
    assert_array_equal(np.asarray(rest[0])[sure], np.asarray(rest[1])[sure])


@settings(max_examples=30, deadline=None)
@given(st.floats(-0.5, 0.5), st.floats(-0.5, 0.5), st.floats(0.06, 0.5))
def test_covered_area_of_an_upright_attention_inside_the_image(x, y, scale):
    height, width = 41, 61
    with jax.enable_x64(True):
        gamma = jnp.array([[x, y, scale, 0.0]])
        grid = np.asarray(redundancy_grid(gamma, (height, width)))[0]
    covered = np.abs(grid).max(-1) > 1
    rows, columns = covered.any(1), covered.any(0)
    assert_array_equal(covered, rows[:, None] & columns)  # a rectangle
    for axis, length in ((rows, height), (columns, width)):
        # A length of 2 scale has scale (n - 1) grid steps, within one point.
        assert abs(axis.sum() - scale * (length - 1)) <= 1 + 1e-9
        assert np.diff(np.flatnonzero(axis)).max(initial=1) == 1  # without holes


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(-5, 5), st.floats(-5, 5))
def test_sampler_is_linear_in_the_image(seed, a, b):
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        grid = jnp.asarray(rng.uniform(-1.5, 1.5, (1, 4, 5, 2)))
        p, q = jnp.asarray(rng.normal(size=(2, 1, 6, 7, 2)))
        together = bilinear_sample(a * p + b * q, grid)
        apart = a * bilinear_sample(p, grid)
        apart += b * bilinear_sample(q, grid)
        assert_allclose(together, apart, atol=1e-12)
