"""The two streams, the baseline and the STN: inputs, outputs and parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import model
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


def test_regularization_stream_gets_attention_and_redundancy():
    out = run(make_network(), constant_head(GAMMA))
    gamma_res = equations.restrict(np.array([GAMMA] * 2))
    assert_allclose(out.attention.gamma_res, gamma_res, rtol=1e-6)
    grid = equations.attention_grid(gamma_res, (SIZE, SIZE))
    assert_allclose(
        as_images(out.attention_logits),
        equations.bilinear_sample(IMAGES, grid),
        atol=2e-5,
    )
    whole = equations.regular_grid((SIZE, SIZE))[None].repeat(2, 0)
    rest = equations.bilinear_sample(IMAGES, whole)
    rest *= equations.redundancy(gamma_res, (SIZE, SIZE))[..., None]
    assert_allclose(as_images(out.redundancy_logits), rest, atol=2e-5)


def test_stn_has_six_parameters_and_no_redundancy():
    theta = np.array([0.7, 0.1, -0.2, -0.15, 0.6, 0.3])
    out = run(make_network("stn"), constant_head(theta))
    grid = equations.affine_grid(np.array([theta.reshape(2, 3)] * 2), (SIZE, SIZE))
    assert_allclose(
        as_images(out.attention_logits),
        equations.bilinear_sample(IMAGES, grid),
        atol=2e-5,
    )
    assert out.attention.gamma.shape == (2, 6)
    assert out.attention.gamma_res is None
    assert out.redundancy_logits is None


def test_stn_starts_with_the_attention_of_cra_cnn():
    init = (0.1, -0.2, 0.45, 0.3)
    stn, cra = (run(make_network(kind, init=init)) for kind in ("stn", "cra"))
    expected = [equations.attention_matrix(g).ravel() for g in cra.attention.gamma_res]
    assert_allclose(stn.attention.gamma, expected, atol=0.01)


def test_classification_stream_is_the_plain_backbone_in_every_model():
    images = jnp.zeros((2, 12, 12, 3))
    trees = {
        kind: make_network(kind).init(jax.random.key(1), images) for kind in model.KINDS
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
