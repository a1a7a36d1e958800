"""Losses compared with loops over the paper's equations, and their gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import losses
from tests.helpers.torch_or_skip import torch
from tests.oracles import equations

pytestmark = pytest.mark.usefixtures("optimized")

# Compiled, as in training; one function for each distance.
contrast = {
    name: jax.jit(
        lambda *features, name=name: losses.contrastive_loss(*features, distance=name)
    )
    for name in ("euclidean", "squared")
}
contrast_slopes = {
    name: jax.jit(
        jax.grad(lambda *features, f=f: f(*features).sum(), argnums=(0, 1, 2, 3))
    )
    for name, f in contrast.items()
}
restriction = jax.jit(losses.restriction_loss)
restriction_slope = jax.jit(jax.grad(lambda g: losses.restriction_loss(g).sum()))

INSIDE = np.array(
    [
        [0.0, 0.0, 0.5, 0.0],
        [0.39, -0.39, 0.11, 3.14],
        [-0.4, 0.4, 0.5, -3.14],  # on the threshold, not beyond it
        [0.0, 0.1, 0.89, 0.0],
    ]
)
OUTSIDE = np.array(
    [
        [0.41, 0.0, 0.5, 0.0],
        [0.4 + 1e-6, 0.0, 0.5, 0.0],  # the gate's own gradient would be 1/eps here
        [0.0, -0.99, 0.5, 0.0],
        [0.0, 0.0, -0.47, 0.0],
        [0.0, 0.0, 0.0, 3.2],
        [-0.7, 0.8, -0.2, -40.0],
        [1.0, 1.0, -0.5, 60.0],
    ]
)


def finite_difference(function, at, step=1e-6):
    slope = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        slope[index] = (function(up) - function(down)) / (2 * step)
    return slope


# --- Eq. 7


def test_restriction_loss_is_equation_7(x64):
    rng = np.random.default_rng(0)
    gammas = rng.uniform([-1, -1, -0.5, -9], [1, 1, 0.5, 9], (60, 4))
    gammas = np.concatenate([INSIDE, OUTSIDE, gammas])
    want = equations.restriction_loss(gammas)
    assert 0.04 < (want == 0).mean() < 0.5, (
        "the data must have zero and positive losses"
    )
    assert_allclose(
        restriction(jnp.asarray(gammas)), want, rtol=1e-12, atol=0, strict=True
    )


def test_restriction_loss_with_other_arguments_is_equation_7(x64):
    gammas = np.random.default_rng(1).normal(0, 1, (40, 4))
    expectation, threshold = (0.1, -0.2, 0.3, 0.5), (0.2, 0.1, 0.5, 1.0)
    got = losses.restriction_loss(
        jnp.asarray(gammas), expectation=expectation, threshold=threshold
    )
    want = equations.restriction_loss(gammas, expectation, threshold)
    assert_allclose(got, want, rtol=1e-12)


def test_restriction_loss_is_the_whole_distance_beyond_the_threshold():
    loss = restriction(jnp.array([[0.5, 0.3, 0.5, 0.0], [0.6, -0.8, 0.5, 0.0]]))
    assert_allclose(loss, [0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize("gamma", INSIDE)
def test_restriction_loss_and_gradient_are_exactly_zero_inside(x64, gamma):
    with jax.debug_nans(True):
        slope = jax.grad(lambda g: losses.restriction_loss(g[None])[0])(
            jnp.asarray(gamma)
        )
    assert_array_equal(slope, np.zeros(4))
    assert losses.restriction_loss(jnp.asarray(gamma[None]))[0] == 0


@pytest.mark.parametrize("gamma", OUTSIDE)
def test_restriction_loss_gradient_outside_is_the_finite_difference(x64, gamma):
    gamma = gamma[None]
    got = restriction_slope(jnp.asarray(gamma))
    want = finite_difference(
        lambda g: equations.restriction_loss(g).sum(), gamma, step=1e-7
    )
    assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    # The gradient of a distance has norm 1; the gate must not add to it.
    assert_allclose(np.linalg.norm(got), 1, rtol=1e-12)


def test_restriction_loss_gradients_of_images_are_independent(x64):
    mixed = np.stack([INSIDE[0], OUTSIDE[0], INSIDE[1]])
    assert_allclose(
        restriction_slope(jnp.asarray(mixed)),
        [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]],
        rtol=1e-12,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4))
def test_restriction_loss_is_finite_everywhere(gamma):
    gamma = jnp.asarray([gamma], jnp.float32)
    with jax.debug_nans(True):
        loss, slope = restriction(gamma), restriction_slope(gamma)
    assert np.isfinite(loss).all()
    assert np.linalg.norm(slope) <= 1 + 1e-5


# --- Eq. 8


@pytest.mark.parametrize("distance", ["euclidean", "squared"])
@pytest.mark.parametrize("margin", [0.7, 0.0, 2.0])
def test_contrastive_loss_is_equation_8(x64, distance, margin):
    features = np.random.default_rng(2).normal(0, 0.5, (4, 40, 3))
    features[:2] *= 4
    got = losses.contrastive_loss(
        *jnp.asarray(features), margin=margin, distance=distance
    )
    squared = distance == "squared"
    want = equations.contrastive_loss(*features, margin=margin, squared=squared)
    assert (want == 0).any(), "the data must have inactive hinges"
    assert_allclose(got, want, rtol=1e-12, atol=1e-14, strict=True)


def test_contrastive_loss_has_the_papers_defaults(x64):
    features = np.random.default_rng(3).normal(0, 0.5, (4, 20, 3))
    got = losses.contrastive_loss(*jnp.asarray(features))
    assert_allclose(got, equations.contrastive_loss(*features), rtol=1e-12)


def test_contrastive_loss_equals_a_value_computed_by_hand():
    # The redundancies' distance is 1; those of attention and redundancy are 3 and 1.2.
    rm, rn = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]])
    am, an = jnp.array([[0.0, 3.0]]), jnp.array([[1.0, 1.2]])
    assert_allclose(losses.contrastive_loss(am, an, rm, rn), [0.5], rtol=1e-6)
    squared = losses.contrastive_loss(am, an, rm, rn, distance="squared")
    assert_allclose(squared, [1 - 1.44 + 0.7], rtol=1e-5)


@pytest.mark.parametrize("distance", ["euclidean", "squared"])
def test_contrastive_loss_gradient_is_the_finite_difference(x64, distance):
    features = np.random.default_rng(4).normal(0, 0.5, (4, 6, 3))
    squared = distance == "squared"
    got = contrast_slopes[distance](*jnp.asarray(features))
    want = finite_difference(
        lambda f: equations.contrastive_loss(*f, squared=squared).sum(), features
    )
    assert np.abs(want).max() > 0.1
    assert_allclose(np.stack(got), want, rtol=1e-6, atol=1e-8)


def coinciding():
    one = np.array([[0.6, 0.8, 0.0]])
    other = np.array([[0.0, 0.0, 1.0]])
    return {
        "everything": (one, one, one, one),
        "redundancies": (other, other, one, one),
        "attention and redundancy": (one, other, one, other),
        "the second attention and redundancy": (other, other, one, other),
        "all zero": (one * 0, one * 0, one * 0, one * 0),
        "nearly": (one, one + 1e-30, one, one),
    }


@pytest.mark.parametrize("distance", ["euclidean", "squared"])
@pytest.mark.parametrize("case", coinciding())
def test_contrastive_gradient_is_finite_where_features_coincide(case, distance):
    features = [jnp.asarray(f, jnp.float32) for f in coinciding()[case]]
    with jax.debug_nans(True):
        value = contrast[distance](*features)
        slopes = np.stack(contrast_slopes[distance](*features))
        jax.grad(  # op by op: finds a NaN even if it is masked later
            lambda a: losses.contrastive_loss(a, *features[1:], distance=distance).sum()
        )(features[0])
    assert np.isfinite(slopes).all()
    assert np.abs(slopes).max() <= 4
    want = equations.contrastive_loss(
        *coinciding()[case], squared=distance == "squared"
    )
    assert_allclose(value, want, rtol=1e-6)


@pytest.mark.parametrize("exponent", [-10, -19, -20, -22, -30])
def test_contrastive_gradient_is_bounded_for_tiny_distances(exponent):
    a = jnp.zeros((1, 3)).at[0, 0].set(10.0**exponent)
    zero = jnp.zeros((1, 3))
    slopes = np.stack(contrast_slopes["euclidean"](zero, zero, a, zero))
    assert np.isfinite(slopes).all()
    assert np.abs(slopes).max() <= 2.001


def test_inactive_hinges_have_zero_loss_and_gradient():
    far, near = jnp.array([[0.0, 9.0]]), jnp.array([[0.0, 0.0]])
    features = (far, far, near, near)
    assert contrast["euclidean"](*features) == 0
    assert_array_equal(np.stack(contrast_slopes["euclidean"](*features)), 0)


def test_unknown_distance_is_an_error():
    zero = jnp.zeros((1, 2))
    with pytest.raises(ValueError, match=r"'cosine'.*euclidean.*squared"):
        losses.contrastive_loss(zero, zero, zero, zero, distance="cosine")


def test_jit_and_vmap_equal_a_loop(x64):
    rng = np.random.default_rng(5)
    gammas = jnp.asarray(rng.normal(size=(3, 5, 4)))
    assert_allclose(
        jax.jit(jax.vmap(losses.restriction_loss))(gammas),
        jnp.stack([losses.restriction_loss(g) for g in gammas]),
        rtol=1e-12,
    )
    features = jnp.asarray(rng.normal(size=(4, 3, 5, 2)))
    assert_allclose(
        jax.jit(jax.vmap(losses.contrastive_loss))(*features),
        jnp.stack([losses.contrastive_loss(*features[:, k]) for k in range(3)]),
        rtol=1e-12,
    )


# --- features, cross-entropy, pairs


def test_l2_normalize_gives_length_one_and_keeps_the_direction(x64):
    features = np.random.default_rng(6).normal(size=(2, 5, 7)) * 100
    got = np.asarray(losses.l2_normalize(jnp.asarray(features)))
    assert_allclose(np.linalg.norm(got, axis=-1), 1, rtol=1e-12)
    cosine = (got * features).sum(-1) / np.linalg.norm(features, axis=-1)
    assert_allclose(cosine, 1, rtol=1e-12)


def test_l2_normalize_of_zero_is_zero_with_a_finite_gradient():
    features = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    with jax.debug_nans(True):
        got = losses.l2_normalize(features)
        slope = jax.grad(lambda f: losses.l2_normalize(f)[:, 0].sum())(features)
    assert_allclose(got, [[0, 0], [0.6, 0.8]], rtol=1e-6)
    assert np.isfinite(slope).all()
    # d(x / |x|) / d(x, y) = (y^2, -x y) / |x|^3.
    assert_allclose(slope[1], [16 / 125, -12 / 125], rtol=1e-5)


def test_cross_entropy_is_minus_the_log_probability(x64):
    rng = np.random.default_rng(7)
    logits, labels = rng.normal(0, 3, (9, 5)), rng.integers(0, 5, 9)
    want = [
        -math.log(math.exp(row[label]) / sum(math.exp(x) for x in row))
        for row, label in zip(logits, labels, strict=True)
    ]
    got = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_smoothed_cross_entropy_equals_oracle_and_torch(x64, smoothing):
    rng = np.random.default_rng(3)
    logits, labels = 3 * rng.normal(size=(6, 5)), rng.integers(0, 5, 6)
    want = [
        equations.smoothed_cross_entropy(row, label, smoothing)
        for row, label in zip(logits, labels, strict=True)
    ]
    got = losses.cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), smoothing=smoothing
    )
    assert_allclose(got, want, rtol=1e-12)
    from_torch = torch.nn.functional.cross_entropy(
        torch.tensor(logits),
        torch.tensor(labels),
        label_smoothing=smoothing,
        reduction="none",
    )
    assert_allclose(got, from_torch, rtol=1e-12)


def test_smoothed_cross_entropy_has_no_gradient_at_the_smoothed_label():
    """If the softmax is the smoothed label, only the one-hot label has a gradient."""
    smoothed = np.full(4, 0.1 / 4)
    smoothed[2] += 0.9
    logits = jnp.log(jnp.asarray(smoothed, jnp.float32))[None]

    def slope(smoothing):
        label = jnp.array([2])
        return jax.grad(
            lambda x: losses.cross_entropy(x, label, smoothing=smoothing)[0]
        )(logits)

    assert_allclose(slope(0.1), 0, atol=1e-6)
    assert np.abs(slope(0.0)).max() > 0.07


def test_cross_entropy_of_huge_scores_is_finite():
    logits, labels = jnp.array([[1e4, 0.0], [1e4, 0.0]]), jnp.array([0, 1])
    with jax.debug_nans(True):
        assert_allclose(losses.cross_entropy(logits, labels), [0, 1e4])


@pytest.mark.parametrize("count", range(2, 10))
def test_neighbour_pairs_are_disjoint_neighbours(count):
    first, second = losses.neighbour_pairs(count)
    want = [(i, i + 1) for i in range(count - 1) if i % 2 == 0]
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == want
    used = [*first, *second]
    assert len(set(used)) == len(used) == count - count % 2


@pytest.mark.parametrize("count", range(2, 7))
def test_all_pairs_has_every_pair_once(count):
    first, second = losses.all_pairs(count)
    want = [(m, n) for m in range(count) for n in range(count) if m < n]
    assert sorted(zip(first.tolist(), second.tolist(), strict=True)) == want


@pytest.mark.parametrize("pairs", [losses.neighbour_pairs, losses.all_pairs])
@pytest.mark.parametrize("count", [0, 1])
def test_pairs_of_fewer_than_two_images_are_an_error(pairs, count):
    with pytest.raises(ValueError, match=rf"{count} image.*batch_size"):
        pairs(count)
