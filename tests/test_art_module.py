"""The ART module: attention parameters Gamma, crops, and gradients to Gamma."""

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
    as_images,
    constant_head,
    make_network,
    run,
)
from tests.oracles import equations


def test_initial_gamma_is_close_to_init():
    out = run(make_network(init=(0.1, -0.2, 0.45, 0.3)))
    # The kernel is near 0, not 0: Gamma differs slightly between images from the start.
    assert_allclose(out.attention.gamma_res, [[0.1, -0.2, 0.45, 0.3]] * 2, atol=5e-3)
    assert np.ptp(np.asarray(out.attention.gamma_res), axis=0).max() > 0


def test_initial_gamma_is_close_to_init_if_attention_stays_inside():
    init = (0.3, -0.2, 0.45, 0.1)
    network = make_network(init=init, inside=True)
    assert_allclose(run(network).attention.gamma_res, [init] * 2, atol=5e-3)
    far = run(network, constant_head((9.0, -9.0, 9.0, 0.0)))
    assert_allclose(far.attention.gamma_res, [[0.5, -0.5, 0.5, 0.0]] * 2, atol=1e-5)


def test_soft_redundancy_converges_to_the_hard_redundancy(monkeypatch):
    monkeypatch.setattr(art_module, "_SOFTNESS", 1e-4)
    hard = as_images(run(make_network(), constant_head(GAMMA)).redundancy_logits)
    soft = run(make_network(redundancy="soft"), constant_head(GAMMA))
    assert_allclose(as_images(soft.redundancy_logits), hard, atol=1e-4)


@pytest.mark.parametrize("normalized", [True, False])
def test_attention_head_normalizes_its_features_by_default(normalized):
    kernel = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    head = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(4)}
    out = run(make_network(normalize_head=normalized), head)
    pooled = IMAGES.mean((1, 2))
    if normalized:
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    assert_allclose(out.attention.gamma, pooled @ kernel, rtol=1e-4, atol=1e-5)


def _gradient_to_gamma(network, gamma, weights):
    """Returns the gradient of a weighted sum of N_ar's inputs to the head's bias."""
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


def test_soft_redundancy_has_a_gradient_to_gamma_and_hard_redundancy_has_none(
    monkeypatch,
):
    monkeypatch.setattr(art_module, "_SOFTNESS", 0.1)
    only_redundancy = (0 * WEIGHTS[0], WEIGHTS[1])
    hard = _gradient_to_gamma(make_network(**FREE), GAMMA, only_redundancy)
    assert_array_equal(hard, 0)
    soft = make_network("cra", redundancy="soft", **FREE)
    assert np.abs(_gradient_to_gamma(soft, GAMMA, only_redundancy)).min() > 1e-3


def test_guard_replaces_outward_gradients_by_a_restoring_gradient():
    gamma = jnp.array([[2.0, -2.0, 0.1, 9.0]] * 2)
    edge = np.arctanh(0.9)
    inward = art_module._GUARD_STRENGTH * (2 - edge) / 2  # a mean over two images
    restoring = np.array([inward, -inward, 0, 0])
    for cotangent, passed in ((-1.0, [0, 1, 1, 1]), (1.0, [1, 0, 1, 1])):
        value, vjp = jax.vjp(lambda g: art_module.guard_gradient(g, 0.9), gamma)
        assert_array_equal(value, gamma)
        # A descent step is -cotangent; the guard removes it where it points outwards.
        expected = cotangent * np.array(passed) + restoring
        for row in vjp(jnp.full((2, 4), cotangent))[0]:
            assert_allclose(row, expected, rtol=1e-5)


def test_guarded_gamma_returns_to_the_bound_under_a_constant_gradient():
    """Without the guard, Gamma moves far beyond the bound, where the loss is flat."""

    def descend(guard):
        gamma = jnp.array([[0.0, 0.0, 1.0, 0.0]])

        def loss(gamma):
            guarded = art_module.guard_gradient(gamma, guard) if guard else gamma
            return -jnp.tanh(guarded)[0, 0]

        velocity = jnp.zeros_like(gamma)
        for _ in range(400):
            velocity = 0.9 * velocity + jax.grad(loss)(gamma)
            gamma -= 0.2 * velocity
        return float(gamma[0, 0])

    assert descend(0.0) > 3
    assert descend(0.9) == pytest.approx(np.arctanh(0.9), abs=0.1)


def test_guard_acts_only_beyond_its_share_of_the_range():
    for share, acts in ((0.9, True), (0.99, False)):
        network = make_network(guard=share, gradient_clip=0.0)
        gamma = np.array([1.6, 0.0, 0.8, 0.0])  # tanh 1.6 = 0.92
        free = _gradient_to_gamma(make_network(**FREE), gamma, WEIGHTS)
        outwards = WEIGHTS * np.sign(free[0])  # descent then moves gamma1 inwards
        inwards_gradient = _gradient_to_gamma(network, gamma, outwards)
        outwards_gradient = _gradient_to_gamma(network, gamma, -outwards)
        assert inwards_gradient[0] > 0
        # The guard leaves only the restoring gradient, which also points inwards.
        assert (outwards_gradient[0] > 0) == acts
        assert outwards_gradient[1] != 0


def test_gradient_of_each_image_is_clipped_entry_by_entry():
    def loss(matrix):
        return (
            art_module.clip_gradient(matrix, 0.5) * jnp.array([[3.0, -4.0, 0.2]])
        ).sum()

    assert_allclose(jax.grad(loss)(jnp.zeros((1, 3))), [[0.5, -0.5, 0.2]])
    steep = tuple(1e3 * w for w in WEIGHTS)
    clipped = make_network(gradient_clip=1.0, guard=0.0)
    gradient = _gradient_to_gamma(clipped, GAMMA, steep)
    # The position is two matrix entries; each gradient is at most 1 / b for b images.
    slope = 1 - np.tanh(np.array(GAMMA[:2])) ** 2
    assert (np.abs(gradient[:2]) <= slope * (1 + 1e-6)).all()
    assert np.abs(_gradient_to_gamma(make_network(**FREE), GAMMA, steep)).max() > 10


class ScaledEcho(Echo):
    """An `Echo` that multiplies its features by a parameter."""

    @nn.compact
    def __call__(self, images, train=False):
        scale = self.param("scale", nn.initializers.ones, ())
        flat = images.reshape(len(images), -1)
        return Outputs(flat, scale * images, scale * images.mean((1, 2)))


@pytest.mark.parametrize("head_kind", art_module.HEADS)
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_gradient_share_scales_gammas_gradient_to_the_classification_stream(
    share, head_kind
):
    images = jnp.asarray(IMAGES, jnp.float32)
    options = {**FREE, "size_px": SIZE, "normalize_head": False, "inside": False}

    def gradients(share):
        config = ArtConfig(gradient_share=share, head=head_kind, **options)
        network = model.create("cra", ScaledEcho, config)
        params = network.init(jax.random.key(0), images)["params"]
        params = {**params, "attention_head": {**params["attention_head"]}}
        if head_kind == "pooled":
            params["attention_head"]["kernel"] = jnp.full((3, 4), 0.3)
        else:  # only the centre: its gradient goes through the feature map
            params["attention_head"]["kernel"] = jnp.zeros((3, 2))
            params["attention_head"]["place_conv"] = {"kernel": jnp.full((3, 1), 0.3)}

        def loss(params):
            out: Any = network.apply({"params": params}, images)
            return (out.attention_logits * WEIGHTS[0]).sum()

        value, gradient = jax.value_and_grad(loss)(params)
        stream = gradient["classification_stream"]["scale"]
        return value, stream, gradient["attention_head"]

    value, stream, head = gradients(share)
    full_value, full_stream, full_head = gradients(1.0)
    assert abs(full_stream) > 0.1
    assert_allclose(value, full_value, rtol=1e-6)
    assert_allclose(stream, share * full_stream, rtol=1e-4)
    jax.tree.map(partial(assert_allclose, rtol=1e-4), head, full_head)


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
def test_wrong_art_options_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make_network(**options)


CROP = 64


def test_corners_px_are_the_corners_of_the_sampling_grid(x64):
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(5, 2, 3))
    grid = np.asarray(geometry.affine_grid(jnp.asarray(matrices), (9, 9)))
    ends = np.stack([grid[:, i, j] for i, j in ((0, 0), (0, -1), (-1, -1), (-1, 0))], 1)
    assert_allclose(art_module.corners_px(matrices, CROP), (ends + 1) / 2 * (CROP - 1))
    whole = art_module.corners_px(np.eye(2, 3), CROP)
    assert_array_equal(whole, [[0, 0], [63, 0], [63, 63], [0, 63]])


@pytest.mark.parametrize("gamma", [(0.2, -0.3, 0.4, 1.0), (0.0, 0.9, 0.3, -3.0)])
def test_gamma_of_inverts_the_attention_matrix(gamma):
    assert_allclose(art_module.gamma_of(equations.attention_matrix(gamma)), gamma)
    x, y, scale, angle = gamma
    turned = art_module.gamma_of(equations.attention_matrix((x, y, -scale, angle)))
    assert turned[2] == pytest.approx(scale)
    assert np.cos(turned[3] - angle) == pytest.approx(-1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("kind", "head_kind"), [("cra", "pooled"), ("cra", "spatial"), ("stn", "pooled")]
)
def test_trained_head_gives_the_attention_matrix_of_the_training_network(
    kind, head_kind, normalize
):
    config = ArtConfig(
        size_px=16,
        alpha_p=0.8,
        alpha_s=0.6,
        head=head_kind,
        normalize_head=normalize,
    )
    network = model.create(
        kind,
        lambda: resnet.create("resnet10", 5, width=8, stem="small"),
        config,
    )
    images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
    variables: Any = jax.jit(network.init)(jax.random.key(1), images)
    params = dict(variables["params"])
    params["attention_head"] = jax.tree.map_with_path(
        lambda path, x: (
            x + jax.random.normal(jax.random.key(2), x.shape)
            if path[-1].key == "kernel"
            else x
        ),
        params["attention_head"],
    )
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
    centres = art_module.cell_centres(backbone, classified.features, images)
    found = head(classified.pooled, classified.features, centres)
    assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.ptp(np.asarray(found), axis=0).max() > 1e-3  # not only the bias


@pytest.mark.parametrize("redundancy", art_module.REDUNDANCIES)
def test_views_are_the_inputs_of_the_regularization_stream(redundancy):
    config = ArtConfig(size_px=8, redundancy=redundancy)
    network = model.create("cra", Echo, config)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    variables = jax.jit(network.init)(jax.random.key(1), images)
    out = jax.jit(network.apply)(variables, images)
    assert isinstance(out, model.Outputs)
    assert out.attention is not None
    # A run saves only the matrices; figures compute the rest from them.
    matrices = np.asarray(out.attention.matrix)
    gamma_res = jnp.asarray(art_module.gamma_of(matrices))
    saved = art_module.Attention(out.attention.gamma, gamma_res, jnp.asarray(matrices))
    views = art_module.views(images, saved, config)
    for found, logits in (
        (views.attention, out.attention_logits),
        (views.redundancy, out.redundancy_logits),
    ):
        assert found is not None
        assert logits is not None
        assert_allclose(found.reshape(2, -1), logits, atol=1e-4)
