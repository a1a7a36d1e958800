"""The inner attention: a second, smaller crop that N_ar also classifies."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import losses, model, schedule, train_step
from cra_jax.art_module import ArtConfig
from cra_jax.backbones import layers
from cra_jax.input.normalize import normalize
from cra_jax.training import build, check_config
from cra_jax.training.optimizer import make_optimizer
from tests.helpers import tiny_config
from tests.helpers.echo_backbone import Echo
from tests.helpers.loss_options import LOSS
from tests.oracles import equations

SIZE = 6
SHARE = 0.6
IMAGES = np.random.default_rng(0).normal(size=(4, 10, 12, 3))
LABELS = np.array([5, 0, 77, 31])
GAMMAS = np.array(
    [[0.3, -0.5, 0.8, 0.4], [-0.2, 0.1, -0.9, 2.0], [0, 0, 2, -0.7], [0.7, 0.6, 0.2, 9]]
)


def _network(**options: Any):
    return model.create("cra", Echo, ArtConfig(size_px=SIZE, **options))


def _variables(gammas, dtype=jnp.float32):
    """Makes an Echo network give Gamma i to image i, whose mean colour is e_i."""
    gammas = jnp.asarray(gammas, dtype)
    head = {"kernel": gammas[:3] - gammas[3], "bias": gammas[3]}
    streams = ("classification_stream", "regularization_stream")
    params = {name: {"gain": jnp.ones((), dtype)} for name in streams}
    return {
        "params": {**params, "attention_head": head},
        "batch_stats": {name: {"seen": jnp.zeros(())} for name in streams},
    }


def _images():
    """Returns `IMAGES` with mean colours e_0, e_1, e_2 and 0."""
    return IMAGES - IMAGES.mean((1, 2), keepdims=True) + np.eye(4, 3)[:, None, None]


RAW: Any = {"normalize_head": False, "guard": 0.0, "gradient_clip": 0.0}
RAW |= {"inside": False}


def _run(train=False, **options):
    images = jnp.asarray(_images(), jnp.float32)
    network = _network(**(RAW | options))
    out, _ = network.apply(_variables(GAMMAS), images, train, mutable=["batch_stats"])
    return out


def _crop(gammas, share, inside=False):
    """Returns the inner attention's crops, computed by the oracles."""
    gamma_res = equations.restrict(gammas, inside=inside)
    gamma_res[:, 2] *= share
    grid = equations.attention_grid(gamma_res, (SIZE, SIZE))
    return equations.bilinear_sample(_images(), grid)


@pytest.mark.parametrize("inside", [False, True])
def test_inner_attention_has_the_same_centre_and_angle_and_a_smaller_scale(inside):
    out = _run(inner_scale=SHARE, inside=inside)
    assert_allclose(out.attention.gamma, GAMMAS, rtol=1e-5, atol=1e-6)
    for logits, share in ((out.inner_logits, SHARE), (out.attention_logits, 1.0)):
        crop = _crop(GAMMAS, share, inside)
        assert_allclose(logits, crop.reshape(4, -1), atol=3e-5)


def test_inner_attention_changes_no_other_output():
    paper, both = _run(), _run(inner_scale=SHARE)
    assert paper.inner_logits is None
    assert both.inner_logits is not None
    for name in ("gamma", "gamma_res", "matrix"):
        one, two = (getattr(out.attention, name) for out in (paper, both))
        assert_array_equal(one, two, err_msg=name)
    for name in ("logits", "attention_logits", "redundancy_logits"):
        assert_array_equal(getattr(both, name), getattr(paper, name), err_msg=name)


def _terms(labels, **options):
    loss = train_step.make_loss(
        _network(**RAW, **options),
        dataclasses.replace(LOSS, threshold=(0.1, 0.1, 0.1, 0.1), cls2_weight=0.7),
        restriction_weight=partial(schedule.restriction_weight, steps_per_epoch=10),
    )
    variables, images = _variables(GAMMAS), jnp.asarray(_images(), jnp.float32)
    params, batch_stats = variables["params"], variables["batch_stats"]
    total, (_, terms) = loss(params, batch_stats, images, labels, jnp.asarray(0))
    assert float(total) == float(terms["loss"])
    return {name: float(value) for name, value in terms.items()}


def _mixed(labels):
    weights = jnp.array([[1.0, 0.3, 0.5, 0.8], [0.0, 0.7, 0.6, 0.2]])
    return losses.MixedLabels(labels, labels[::-1], weights[0], weights[1])


@pytest.mark.parametrize("mixed", [False, True])
def test_loss_cls2_is_the_mean_over_both_attentions(mixed):
    labels: Any = _mixed(jnp.asarray(LABELS)) if mixed else jnp.asarray(LABELS)
    right = LABELS
    if mixed:
        right = np.array([LABELS[0], LABELS[2], LABELS[1], LABELS[3]])
    paper, both = (_terms(labels, inner_scale=share) for share in (0.0, SHARE))
    scores = _crop(GAMMAS, SHARE).reshape(4, -1)

    def cross_entropy(labels):
        return np.array(
            [
                equations.smoothed_cross_entropy(row, label, 0)
                for row, label in zip(scores, labels, strict=True)
            ]
        )

    inner = cross_entropy(LABELS)
    if mixed:
        inner = labels.own_weight * inner + labels.other_weight * cross_entropy(
            LABELS[::-1]
        )
    want = (paper["loss_cls2"] + float(np.mean(inner))) / 2
    assert both["loss_cls2"] == pytest.approx(want, rel=2e-5)
    assert both["loss_cls2"] != pytest.approx(paper["loss_cls2"], rel=1e-3)
    change = both["loss"] - paper["loss"]
    assert change == pytest.approx(0.7 * (want - paper["loss_cls2"]), rel=1e-3)
    assert both.pop("inner_top1") == np.mean(scores.argmax(-1) == right)
    # L_res, L_cntr and the statistics of Gamma depend on the first attention only.
    assert both.keys() == paper.keys()
    changed = {name for name, value in paper.items() if both[name] != value}
    assert changed == {"loss_cls2", "loss"}


def test_inner_top1_is_the_accuracy_of_the_inner_attention():
    best = _crop(GAMMAS, SHARE).reshape(4, -1).argmax(-1)
    assert _terms(jnp.asarray(best), inner_scale=SHARE)["inner_top1"] == 1.0
    some = np.where([True, False, False, True], best, best - 1)
    assert _terms(jnp.asarray(some), inner_scale=SHARE)["inner_top1"] == 0.5


def _seen(network, images):
    """Returns a function: Gamma of each image -> N_ar's outer and inner inputs."""

    def of(gammas):
        out: Any = network.apply(_variables(gammas, gammas.dtype), images)
        return jnp.stack([out.attention_logits, out.inner_logits])

    return of


def test_gradient_of_the_inner_attention_to_gamma_is_the_finite_difference(x64):
    weights = np.random.default_rng(2).normal(size=(4, SIZE, SIZE, 3))
    images = jnp.asarray(_images())
    seen = _seen(_network(**RAW, inner_scale=SHARE), images)

    def loss(gammas):
        return (seen(gammas)[1] * weights.reshape(4, -1)).sum()

    def written_out(gammas):
        return (_crop(gammas, SHARE) * weights).sum((1, 2, 3))  # of each image

    got = jax.jit(jax.grad(loss))(jnp.asarray(GAMMAS, jnp.float64))
    assert got.dtype == jnp.float64
    for entry, step in enumerate(1e-6 * np.eye(4)):
        slope = (written_out(GAMMAS + step) - written_out(GAMMAS - step)) / 2e-6
        assert_allclose(got[:, entry], slope, rtol=1e-6, atol=1e-7)
    assert np.abs(got).max(0).min() > 0.1


def test_gradient_clip_bounds_the_sum_of_both_attentions_gradients():
    """The bound on an image's gradient is the same as without an inner attention."""
    images = jnp.asarray(_images(), jnp.float32)
    options = {**RAW, "gradient_clip": 0.8}
    seen = _seen(_network(**options, inner_scale=SHARE), images)
    gammas = jnp.asarray(GAMMAS, jnp.float32)

    @jax.jit
    def gradient(weights):
        """Returns the gradient of each image's own loss (the mean loss times 4)."""
        return 4 * jax.grad(lambda g: (seen(g) * weights).sum() / 4)(gammas)

    slope = 1 - np.tanh(GAMMAS[:, :2]) ** 2
    alone = 1e4 * np.random.default_rng(3).normal(size=(2, 4, SIZE * SIZE * 3))
    reached = []
    for weights in (alone * [[[1]], [[0]]], alone * [[[0]], [[1]]], alone):
        place = np.abs(gradient(weights)[:, :2])
        assert_allclose(place, 0.8 * slope, rtol=1e-4)  # all exceed the limit
        reached.append(np.abs(gradient(1e-8 * weights)).max())
    assert min(reached) > 1e-6  # and none is 0 below it


class Small(nn.Module):
    """A network of one convolution that can learn."""

    stride_px = 2

    @nn.compact
    def __call__(self, images, train=False):
        features = nn.Conv(16, (3, 3), strides=2)(images)
        features = nn.relu(nn.BatchNorm(not train)(features))
        pooled = features.mean((1, 2))
        return layers.Outputs(nn.Dense(5)(pooled), features, pooled)

    def feature_place_px(self, cells, extent_px):
        return cells * self.stride_px


def test_training_lowers_the_loss_of_both_attentions():
    paper, network = (
        model.create("cra", Small, ArtConfig(size_px=16, inner_scale=share))
        for share in (0.0, 0.5)
    )

    def rate(step):
        return jnp.float32(0.1)

    optimizer = make_optimizer(rate)
    loss = train_step.make_loss(
        network,
        dataclasses.replace(LOSS, cntr_weight=0.0),
        restriction_weight=partial(schedule.restriction_weight, steps_per_epoch=10),
    )
    make = partial(train_step.make_train_step, loss, optimizer, learning_rate=rate)
    step = jax.jit(make(normalize=partial(normalize, mean=(0.5,) * 3, std=(0.2,) * 3)))
    rng = np.random.default_rng(4)
    batch = {
        "image": rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8),
        "flip": np.zeros(8, bool),
        "label": np.arange(8) % 5,
    }
    batch["image"] //= 1 + batch["label"][:, None, None, None].astype(np.uint8)
    state = train_step.create_state(jax.random.key(0), network, optimizer, crop_px=32)
    # The parameters are the same as without an inner attention.
    images = jnp.zeros((2, 32, 32, 3))
    shapes = jax.eval_shape(paper.init, jax.random.key(0), images)
    assert jax.eval_shape(lambda: state.params) == shapes["params"]
    history = []
    for _ in range(30):
        state, terms = step(state, batch)
        history.append({name: float(value) for name, value in terms.items()})
    assert all(np.isfinite(value) for line in history for value in line.values())
    assert history[-1]["loss_cls2"] < 0.6 * history[0]["loss_cls2"]
    assert history[-1]["inner_top1"] > history[0]["inner_top1"]


def test_config_turns_on_the_inner_attention(tmp_path):
    for share in (0.0, 0.25):
        config = tiny_config.config(tmp_path, **{"art.inner_scale": share})
        assert build.build_network(config, 5).art.inner_scale == share
    assert tiny_config.config(tmp_path).art.inner_scale == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"art.inner_scale": 1.5}, r"art.inner_scale=1.5 must be in \[0, 1\)"),
        ({"art.inner_scale": 1.0}, r"art.inner_scale=1.0 must be in \[0, 1\)"),
        ({"art.inner_scale": -0.5}, r"art.inner_scale=-0.5 must be in \[0, 1\)"),
        *(
            ({"art.inner_scale": 0.5, "model.kind": kind}, f"CRA-CNN.*kind='{kind}'")
            for kind in ("baseline", "stn")
        ),
    ],
)
def test_wrong_inner_scale_is_an_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check_config.check(tiny_config.config(tmp_path, **changes))
