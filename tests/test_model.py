"""How the streams are wired: what each sees, what each owns, what reaches Gamma."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import art_module, model
from cra_jax.art_module import ArtConfig
from cra_jax.backbones.layers import Outputs
from tests.helpers.echo_backbone import Echo
from tests.oracles import equations

SIZE = 8
IMAGES = np.random.default_rng(0).normal(size=(2, 12, 12, 3))


def _network(kind="cra", **options: Any):
    options = {"inside": False, **options}
    return model.create(kind, Echo, ArtConfig(size_px=SIZE, **options))


def _run(network, head=None, train=False):
    images = jnp.asarray(IMAGES, jnp.float32)
    variables = network.init(jax.random.key(0), images)
    params = dict(variables["params"])
    if head is not None:
        params["attention_head"] = head
    variables = {**variables, "params": params}
    out, _ = network.apply(variables, images, train, mutable=["batch_stats"])
    return out


def _head(gamma):
    """A head that gives every picture the same Gamma."""
    gamma = jnp.asarray(gamma, jnp.float32)
    return {"kernel": jnp.zeros((3, len(gamma))), "bias": gamma}


def _seen(logits):
    return np.asarray(logits).reshape(2, SIZE, SIZE, 3)


GAMMA = (0.31, -0.52, 0.83, 0.4)


def test_training_starts_at_the_expected_attention():
    out = _run(_network(init=(0.1, -0.2, 0.45, 0.3)))
    # The kernel is near 0, not 0: pictures differ a little from the first step on.
    assert_allclose(out.attention.gamma_res, [[0.1, -0.2, 0.45, 0.3]] * 2, atol=5e-3)
    assert np.ptp(np.asarray(out.attention.gamma_res), axis=0).max() > 0


def test_an_attention_that_stays_in_the_picture_starts_where_it_is_told_to():
    init = (0.3, -0.2, 0.45, 0.1)
    network = _network(init=init, inside=True)
    assert_allclose(_run(network).attention.gamma_res, [init] * 2, atol=5e-3)
    far = _run(network, _head((9.0, -9.0, 9.0, 0.0)))
    assert_allclose(far.attention.gamma_res, [[0.5, -0.5, 0.5, 0.0]] * 2, atol=1e-5)


def test_the_second_stream_sees_attention_and_redundancy():
    out = _run(_network(), _head(GAMMA))
    gamma_res = equations.restrict(np.array([GAMMA] * 2))
    assert_allclose(out.attention.gamma_res, gamma_res, rtol=1e-6)
    grid = equations.attention_grid(gamma_res, (SIZE, SIZE))
    assert_allclose(
        _seen(out.attention_logits), equations.bilinear_sample(IMAGES, grid), atol=2e-5
    )
    whole = equations.regular_grid((SIZE, SIZE))[None].repeat(2, 0)
    rest = equations.bilinear_sample(IMAGES, whole)
    rest *= equations.redundancy(gamma_res, (SIZE, SIZE))[..., None]
    assert_allclose(_seen(out.redundancy_logits), rest, atol=2e-5)


def test_soft_edges_tend_to_the_set_difference(monkeypatch):
    monkeypatch.setattr(art_module, "_SOFTNESS", 1e-4)
    hard = _seen(_run(_network(), _head(GAMMA)).redundancy_logits)
    soft = _run(_network(redundancy="soft"), _head(GAMMA))
    assert_allclose(_seen(soft.redundancy_logits), hard, atol=1e-4)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_head_sees_features_of_length_one_unless_told_otherwise(normalized):
    kernel = np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32)
    head = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(4)}
    out = _run(_network(normalize_head=normalized), head)
    pooled = IMAGES.mean((1, 2))
    if normalized:
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    assert_allclose(out.attention.gamma, pooled @ kernel, rtol=1e-4, atol=1e-5)


def test_the_stn_learns_all_six_parameters():
    theta = np.array([0.7, 0.1, -0.2, -0.15, 0.6, 0.3])
    out = _run(_network("stn"), _head(theta))
    grid = equations.affine_grid(np.array([theta.reshape(2, 3)] * 2), (SIZE, SIZE))
    assert_allclose(
        _seen(out.attention_logits), equations.bilinear_sample(IMAGES, grid), atol=2e-5
    )
    assert out.attention.gamma.shape == (2, 6)
    assert out.attention.gamma_res is None
    assert out.redundancy_logits is None


def test_the_stn_starts_where_cra_cnn_does():
    init = (0.1, -0.2, 0.45, 0.3)
    stn, cra = (_run(_network(kind, init=init)) for kind in ("stn", "cra"))
    expected = [equations.attention_matrix(g).ravel() for g in cra.attention.gamma_res]
    assert_allclose(stn.attention.gamma, expected, atol=0.01)


def test_every_kind_has_the_plain_backbone_and_the_same_weights_for_it():
    images = jnp.zeros((2, 12, 12, 3))
    trees = {
        kind: _network(kind).init(jax.random.key(1), images) for kind in model.KINDS
    }
    plain = Echo().init(jax.random.key(1), images)
    for tree in trees.values():
        for collection in ("params", "batch_stats"):
            stream = tree[collection]["classification_stream"]
            assert jax.tree.structure(stream) == jax.tree.structure(plain[collection])
            jax.tree.map(
                assert_array_equal,
                stream,
                trees["baseline"][collection]["classification_stream"],
            )
    assert set(trees["baseline"]["params"]) == {"classification_stream"}
    streams = {"classification_stream", "regularization_stream", "attention_head"}
    assert set(trees["cra"]["params"]) == set(trees["stn"]["params"]) == streams


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
    hard = _gradient_to_gamma(_network(**FREE), GAMMA, only_redundancy)
    assert_array_equal(hard, 0)
    soft = _network("cra", redundancy="soft", **FREE)
    assert np.abs(_gradient_to_gamma(soft, GAMMA, only_redundancy)).min() > 1e-3


def test_the_guard_stops_what_pushes_outwards_and_pulls_back():
    gamma = jnp.array([[2.0, -2.0, 0.1, 9.0]] * 2)
    edge = np.arctanh(0.9)
    pull_in = art_module._GUARD_STRENGTH * (2 - edge) / 2  # a mean over two pictures
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
        network = _network(guard=share, gradient_clip=0.0)
        gamma = np.array([1.6, 0.0, 0.8, 0.0])  # tanh 1.6 = 0.92
        free = _gradient_to_gamma(_network(**FREE), gamma, WEIGHTS)
        outwards = WEIGHTS * np.sign(free[0])  # descent then pushes gamma1 inwards
        inwards_gradient = _gradient_to_gamma(network, gamma, outwards)
        outwards_gradient = _gradient_to_gamma(network, gamma, -outwards)
        assert inwards_gradient[0] > 0
        # Guarded, the push is gone and what restores is left: it points inwards, too.
        assert (outwards_gradient[0] > 0) == held
        assert outwards_gradient[1] != 0


def test_the_gradient_of_a_picture_is_clipped_entry_by_entry():
    def loss(matrix):
        return (
            art_module.clip_gradient(matrix, 0.5) * jnp.array([[3.0, -4.0, 0.2]])
        ).sum()

    assert_allclose(jax.grad(loss)(jnp.zeros((1, 3))), [[0.5, -0.5, 0.2]])
    steep = tuple(1e3 * w for w in WEIGHTS)
    clipped = _network(gradient_clip=1.0, guard=0.0)
    gradient = _gradient_to_gamma(clipped, GAMMA, steep)
    # Place is two entries of the matrix, each at most 1 / b for each of b pictures.
    slope = 1 - np.tanh(np.array(GAMMA[:2])) ** 2
    assert (np.abs(gradient[:2]) <= slope * (1 + 1e-6)).all()
    assert np.abs(_gradient_to_gamma(_network(**FREE), GAMMA, steep)).max() > 10


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
        ({"inside": True, "init": (0.56, 0, 0.45, 0)}, "and in the image"),
        ({"guard": 1.0}, "art.guard=1.0 must be in"),
        ({"gradient_clip": -1.0}, "art.gradient_clip=-1.0"),
        ({"gradient_share": 1.5}, r"art.gradient_share=1.5 must be in \[0, 1\]"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _network(**options)
