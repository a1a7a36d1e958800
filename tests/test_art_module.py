"""The ART module: where the attention is, what is cut out, what reaches Gamma."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import art_module, geometry, model
from cra_jax.art_module import ArtConfig
from cra_jax.backbones import resnet
from cra_jax.backbones.layers import Outputs
from tests.helpers.echo_backbone import Echo
from tests.helpers.echo_network import (
    GAMMA,
    IMAGES,
    SIZE,
    constant_head,
    make_network,
    run,
    seen_by,
)
from tests.oracles import equations


def test_training_starts_at_the_expected_attention():
    out = run(make_network(init=(0.1, -0.2, 0.45, 0.3)))
    # The kernel is near 0, not 0: images differ a little from the first step on.
    assert_allclose(out.attention.gamma_res, [[0.1, -0.2, 0.45, 0.3]] * 2, atol=5e-3)
    assert np.ptp(np.asarray(out.attention.gamma_res), axis=0).max() > 0


def test_an_attention_that_stays_in_the_image_starts_where_it_is_told_to():
    init = (0.3, -0.2, 0.45, 0.1)
    network = make_network(init=init, inside=True)
    assert_allclose(run(network).attention.gamma_res, [init] * 2, atol=5e-3)
    far = run(network, constant_head((9.0, -9.0, 9.0, 0.0)))
    assert_allclose(far.attention.gamma_res, [[0.5, -0.5, 0.5, 0.0]] * 2, atol=1e-5)


def test_soft_edges_tend_to_the_set_difference(monkeypatch):
    monkeypatch.setattr(art_module, "_SOFTNESS", 1e-4)
    hard = seen_by(run(make_network(), constant_head(GAMMA)).redundancy_logits)
    soft = run(make_network(redundancy="soft"), constant_head(GAMMA))
    assert_allclose(seen_by(soft.redundancy_logits), hard, atol=1e-4)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_head_sees_features_of_length_one_unless_told_otherwise(normalized):
    kernel = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    head = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(4)}
    out = run(make_network(normalize_head=normalized), head)
    pooled = IMAGES.mean((1, 2))
    if normalized:
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    assert_allclose(out.attention.gamma, pooled @ kernel, rtol=1e-4, atol=1e-5)


def _gradient_to_gamma(network, gamma, weights):
    """Of a weighted sum of what the second stream sees, with respect to the bias."""
    images = jnp.asarray(IMAGES, jnp.float32)
    variables = network.init(jax.random.key(0), images)

    def loss(gamma):
        params = {
            **variables["params"],
            "attention_head": {
                "kernel": jnp.zeros((3, gamma.shape[-1])),
                "bias": gamma,
            },
        }
        out = network.apply({**variables, "params": params}, images)
        seen = (out.attention_logits, out.redundancy_logits)
        return sum((w * x).sum() for w, x in zip(weights, seen, strict=True))

    return np.asarray(jax.grad(loss)(jnp.asarray(gamma, jnp.float32)))


WEIGHTS = (
    np.random.default_rng(1).normal(size=(2, 2, SIZE * SIZE * 3)).astype(np.float32)
)


FREE: Any = {"gradient_clip": 0.0, "guard": 0.0}


def test_a_hard_redundancy_sends_no_gradient_and_a_soft_one_does(monkeypatch):
    monkeypatch.setattr(art_module, "_SOFTNESS", 0.1)
    only_redundancy = (0 * WEIGHTS[0], WEIGHTS[1])
    hard = _gradient_to_gamma(make_network(**FREE), GAMMA, only_redundancy)
    assert_array_equal(hard, 0)
    soft = make_network("cra", redundancy="soft", **FREE)
    assert np.abs(_gradient_to_gamma(soft, GAMMA, only_redundancy)).min() > 1e-3


def test_the_guard_stops_what_pushes_outwards_and_pulls_back():
    gamma = jnp.array([[2.0, -2.0, 0.1, 9.0]] * 2)
    edge = np.arctanh(0.9)
    pull_in = art_module._GUARD_STRENGTH * (2 - edge) / 2  # a mean over two images
    restoring = np.array([pull_in, -pull_in, 0, 0])
    for push, passed in ((-1.0, [0, 1, 1, 1]), (1.0, [1, 0, 1, 1])):
        value, pull = jax.vjp(lambda g: art_module.guard_gradient(g, 0.9), gamma)
        assert_array_equal(value, gamma)
        # Descent moves every entry by -push: it is stopped where that is outwards.
        expected = push * np.array(passed) + restoring
        for row in pull(jnp.full((2, 4), push))[0]:
            assert_allclose(row, expected, rtol=1e-5)


def test_a_guarded_gamma_comes_back_against_a_steady_push():
    """What an unguarded one does not: its loss is flat out there."""

    def descend(guard):
        gamma = jnp.array([[0.0, 0.0, 1.0, 0.0]])

        def loss(gamma):
            held = art_module.guard_gradient(gamma, guard) if guard else gamma
            return -jnp.tanh(held)[0, 0]

        velocity = jnp.zeros_like(gamma)
        for _ in range(400):
            velocity = 0.9 * velocity + jax.grad(loss)(gamma)
            gamma -= 0.2 * velocity
        return float(gamma[0, 0])

    assert descend(0.0) > 3
    assert descend(0.9) == pytest.approx(np.arctanh(0.9), abs=0.1)


def test_the_guard_acts_in_the_network_beyond_its_share_alone():
    for share, held in ((0.9, True), (0.99, False)):
        network = make_network(guard=share, gradient_clip=0.0)
        gamma = np.array([1.6, 0.0, 0.8, 0.0])  # tanh 1.6 = 0.92
        free = _gradient_to_gamma(make_network(**FREE), gamma, WEIGHTS)
        outwards = WEIGHTS * np.sign(free[0])  # descent then pushes gamma1 inwards
        inwards_gradient = _gradient_to_gamma(network, gamma, outwards)
        outwards_gradient = _gradient_to_gamma(network, gamma, -outwards)
        assert inwards_gradient[0] > 0
        # Guarded, the push is gone and what restores is left: it points inwards, too.
        assert (outwards_gradient[0] > 0) == held
        assert outwards_gradient[1] != 0


def test_the_gradient_of_an_image_is_clipped_entry_by_entry():
    def loss(matrix):
        return (
            art_module.clip_gradient(matrix, 0.5) * jnp.array([[3.0, -4.0, 0.2]])
        ).sum()

    assert_allclose(jax.grad(loss)(jnp.zeros((1, 3))), [[0.5, -0.5, 0.2]])
    steep = tuple(1e3 * w for w in WEIGHTS)
    clipped = make_network(gradient_clip=1.0, guard=0.0)
    gradient = _gradient_to_gamma(clipped, GAMMA, steep)
    # Place is two entries of the matrix, each at most 1 / b for each of b images.
    slope = 1 - np.tanh(np.array(GAMMA[:2])) ** 2
    assert (np.abs(gradient[:2]) <= slope * (1 + 1e-6)).all()
    assert np.abs(_gradient_to_gamma(make_network(**FREE), GAMMA, steep)).max() > 10


class Loud(nn.Module):
    """An `Echo` whose pooled feature has a weight of its own."""

    stride_px = 1

    @nn.compact
    def __call__(self, images, train=False):
        volume = self.param("volume", nn.initializers.ones, ())
        flat = images.reshape(len(images), -1)
        return Outputs(flat, images, volume * images.mean((1, 2)))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_gammas_gradient_reaches_the_stream_that_predicts_it(share):
    images = jnp.asarray(IMAGES, jnp.float32)
    options = {**FREE, "size_px": SIZE, "normalize_head": False, "inside": False}

    def gradients(share):
        config = ArtConfig(gradient_share=share, **options)
        network = model.create("cra", Loud, config)
        params = network.init(jax.random.key(0), images)["params"]
        params = {**params, "attention_head": {**params["attention_head"]}}
        params["attention_head"]["kernel"] = jnp.full((3, 4), 0.3)

        def loss(params):
            out: Any = network.apply({"params": params}, images)
            return (out.attention_logits * WEIGHTS[0]).sum()

        value, gradient = jax.value_and_grad(loss)(params)
        reached = gradient["classification_stream"]["volume"]
        return value, reached, gradient["attention_head"]

    value, reached, head = gradients(share)
    value_of_all, all_of_it, head_of_all = gradients(1.0)
    assert abs(all_of_it) > 0.1
    assert_allclose(value, value_of_all, rtol=1e-6)
    assert_allclose(reached, share * all_of_it, rtol=1e-4)
    jax.tree.map(partial(assert_allclose, rtol=1e-4), head, head_of_all)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "cnn"}, "unknown model.kind 'cnn'; choose from cra, baseline, stn"),
        ({"redundancy": "none"}, "unknown art.redundancy 'none'"),
        ({"alpha_s": 1.5}, "art.alpha_s=1.5"),
        ({"init": (0, 0, 0.5, 0)}, "must lie strictly inside"),
        ({"inside": True, "alpha_s": 0.8}, "art.inside=True cannot keep"),
        ({"inside": True, "init": (0.56, 0, 0.45, 0)}, "and inside the image"),
        ({"guard": 1.0}, "art.guard=1.0 must be in"),
        ({"gradient_clip": -1.0}, "art.gradient_clip=-1.0"),
        ({"gradient_share": 1.5}, r"art.gradient_share=1.5 must be in \[0, 1\]"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_network(**options)


CROP = 64


def test_the_corners_are_where_the_sampler_looks(x64):
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(5, 2, 3))
    grid = np.asarray(geometry.affine_grid(jnp.asarray(matrices), (9, 9)))
    ends = np.stack([grid[:, i, j] for i, j in ((0, 0), (0, -1), (-1, -1), (-1, 0))], 1)
    assert_allclose(art_module.corners_px(matrices, CROP), (ends + 1) / 2 * (CROP - 1))
    whole = art_module.corners_px(np.eye(2, 3), CROP)
    assert_array_equal(whole, [[0, 0], [63, 0], [63, 63], [0, 63]])


@pytest.mark.parametrize("gamma", [(0.2, -0.3, 0.4, 1.0), (0.0, 0.9, 0.3, -3.0)])
def test_gamma_comes_back_from_its_matrix(gamma):
    assert_allclose(art_module.gamma_of(equations.attention_matrix(gamma)), gamma)
    x, y, scale, angle = gamma
    turned = art_module.gamma_of(equations.attention_matrix((x, y, -scale, angle)))
    assert turned[2] == pytest.approx(scale)
    assert np.cos(turned[3] - angle) == pytest.approx(-1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["cra", "stn"])
def test_the_head_says_what_the_network_in_training_says(kind, normalize):
    config = ArtConfig(size_px=16, alpha_p=0.8, alpha_s=0.6, normalize_head=normalize)
    network = model.create(
        kind,
        lambda: resnet.create("resnet10", 5, width=8, stem="small"),
        config,
    )
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    variables: Any = jax.jit(network.init)(jax.random.key(1), images)
    kernel = variables["params"]["attention_head"]["kernel"]
    params = dict(variables["params"])
    params["attention_head"] = {
        "kernel": kernel + jax.random.normal(jax.random.key(2), kernel.shape),
        "bias": params["attention_head"]["bias"],
    }
    out = jax.jit(network.apply)({**variables, "params": params}, images)
    assert isinstance(out, model.Outputs)
    assert out.attention is not None
    if kind == "stn":
        expected = out.attention.gamma.reshape(-1, 2, 3)
    else:
        assert out.attention.gamma_res is not None
        expected = geometry.attention_matrix(out.attention.gamma_res)
    stream = "classification_stream"
    backbone = resnet.create("resnet10", 5, width=8, stem="small")
    plain = {k: variables[k][stream] for k in ("params", "batch_stats")}
    head = art_module.trained_head(params, config, kind)
    assert head is not None
    classified: Any = jax.jit(backbone.apply)(plain, images)
    found = head(classified.pooled)
    assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(np.asarray(found), axis=0).max() > 1e-3  # not the bias alone


@pytest.mark.parametrize("redundancy", art_module.REDUNDANCIES)
def test_what_figures_show_is_what_the_second_stream_sees(redundancy):

    config = ArtConfig(size_px=8, redundancy=redundancy)
    network = model.create("cra", Echo, config)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    variables = jax.jit(network.init)(jax.random.key(1), images)
    out = jax.jit(network.apply)(variables, images)
    assert isinstance(out, model.Outputs)
    assert out.attention is not None
    # A run keeps matrices alone; figures make the rest from them.
    matrices = np.asarray(out.attention.matrix)
    gamma_res = jnp.asarray(art_module.gamma_of(matrices))
    kept = art_module.Attention(out.attention.gamma, gamma_res, jnp.asarray(matrices))
    shown = art_module.views(images, kept, config)
    for found, logits in (
        (shown.attention, out.attention_logits),
        (shown.redundancy, out.redundancy_logits),
    ):
        assert found is not None
        assert logits is not None
        assert_allclose(found.reshape(2, -1), logits, atol=1e-4)
