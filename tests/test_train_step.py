"""One training step: its loss terms, its update and its numerical edge cases."""

import dataclasses
import math
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import art_module, losses, model, schedule, train_step
from cra_jax.art_module import ArtConfig
from cra_jax.backbones import efficientnet, resnet
from cra_jax.input.normalize import normalize
from cra_jax.runtime import devices
from cra_jax.swap import SwapConfig
from cra_jax.training import step_wrappers
from cra_jax.training.optimizer import make_optimizer
from tests.helpers.echo_backbone import Echo
from tests.helpers.loss_options import LOSS
from tests.oracles import equations

SIZE = 4
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
NORMALIZE = partial(normalize, mean=MEAN, std=STD)
ON = partial(schedule.restriction_weight, steps_per_epoch=10)
ONES = {"cls2": 1.0, "res": 1.0, "cntr": 1.0}


def _batch(n=6, size=SIZE, classes=48):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8),
        "flip": rng.random(n) < 0.5,
        "label": rng.integers(0, classes, n).astype(np.int32),
    }


def _images(batch):
    flipped = [
        image[:, ::-1] if flip else image
        for image, flip in zip(batch["image"], batch["flip"], strict=True)
    ]
    return (np.array(flipped) / 255 - np.array(MEAN)) / np.array(STD)


def _loss(network, *, restriction_weight=ON, **options):
    return train_step.make_loss(
        network,
        dataclasses.replace(LOSS, **options),
        restriction_weight=restriction_weight,
    )


def _cross_entropy(scores, labels):
    exp = np.exp(scores)
    return np.mean(
        [-math.log(e[y] / e.sum()) for e, y in zip(exp, labels, strict=True)]
    )


GAMMA = (2.5, -0.3, 0.4, 0.3)  # gamma1 is beyond its threshold


def _terms(
    step,
    *,
    weights=ONES,
    pairs="random",
    normalize=True,
    distance="euclidean",
    smoothing=0.0,
):
    """Returns the terms of an Echo network with a fixed Gamma, images and labels."""
    network = model.create(
        "cra", Echo, ArtConfig(size_px=SIZE, guard=0.9, inside=False)
    )
    batch = _batch()
    images = jnp.asarray(_images(batch), jnp.float32)
    variables = network.init(jax.random.key(0), images)
    head = {"kernel": jnp.zeros((3, 4)), "bias": jnp.array(GAMMA)}
    loss = _loss(
        network,
        **{f"{name}_weight": value for name, value in weights.items()},
        pairs=pairs,
        normalize_features=normalize,
        distance=distance,
        label_smoothing=smoothing,
    )
    total, (_, terms) = loss(
        {**variables["params"], "attention_head": head},
        variables["batch_stats"],
        images,
        batch["label"],
        jnp.asarray(step),
    )
    assert float(total) == float(terms["loss"])
    return {k: float(v) for k, v in terms.items()}, _images(batch), batch["label"]


def _expected(images, labels, *, pairs, normalize=True, squared=False):
    """Returns the terms of Eq. (9), computed by the oracles."""
    gamma_res = equations.restrict(np.array([GAMMA] * len(images)))
    size = (SIZE, SIZE)
    attention = equations.bilinear_sample(
        images, equations.attention_grid(gamma_res, size)
    )
    whole = equations.regular_grid(size)[None].repeat(len(images), 0)
    rest = equations.bilinear_sample(images, whole)
    rest *= equations.redundancy(gamma_res, size)[..., None]
    a, r = (x.reshape(len(images), -1) for x in (attention, rest))
    expected = {
        "loss_cls1": _cross_entropy(images.reshape(len(images), -1), labels),
        "loss_cls2": _cross_entropy(a, labels),
        "loss_res": equations.restriction_loss(gamma_res)[0],
    }
    if normalize:
        a, r = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, r))
    m, n = np.array(pairs).T
    expected["loss_cntr"] = equations.contrastive_loss(
        a[m], a[n], r[m], r[n], squared=squared
    ).mean()
    return expected


NEIGHBOURS = [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize(("step", "on"), [(499, 1), (500, 0), (950, 1)])
def test_loss_is_equation_9_with_the_restriction_weight(step, on):
    terms, images, labels = _terms(step)
    expected = _expected(images, labels, pairs=NEIGHBOURS)
    for name, value in expected.items():
        assert terms[name] == pytest.approx(value, rel=2e-5), name
    assert expected["loss_res"] > 0.5
    total = sum(expected.values()) - (1 - on) * expected["loss_res"]
    assert terms["loss"] == pytest.approx(total, rel=2e-5)
    assert terms["restriction_weight"] == on


def test_loss_weights_scale_and_remove_terms():
    weights = {"cls2": 0.5, "res": 2.0, "cntr": 0.0}
    terms, images, labels = _terms(0, weights=weights)
    expected = _expected(images, labels, pairs=NEIGHBOURS)
    total = (
        expected["loss_cls1"] + 0.5 * expected["loss_cls2"] + 2 * expected["loss_res"]
    )
    assert terms["loss"] == pytest.approx(total, rel=2e-5)
    assert "loss_cntr" not in terms


@pytest.mark.parametrize(
    ("options", "oracle"),
    [
        ({"pairs": "all"}, {"pairs": [(m, n) for n in range(6) for m in range(n)]}),
        ({"normalize": False}, {"normalize": False, "pairs": NEIGHBOURS}),
        ({"distance": "squared"}, {"squared": True, "pairs": NEIGHBOURS}),
    ],
)
def test_contrast_options_equal_the_oracle(options, oracle):
    terms, images, labels = _terms(0, **options)
    expected = _expected(images, labels, **oracle)["loss_cntr"]
    assert terms["loss_cntr"] == pytest.approx(expected, rel=2e-5)


def test_label_smoothing_changes_only_both_cross_entropies():
    plain, *_ = _terms(0)
    smooth, images, labels = _terms(0, smoothing=0.2)
    scores = images.reshape(len(images), -1)
    want = [
        equations.smoothed_cross_entropy(row, label, 0.2)
        for row, label in zip(scores, labels, strict=True)
    ]
    assert smooth["loss_cls1"] == pytest.approx(np.mean(want), rel=2e-5)
    changed = {name for name, value in plain.items() if smooth[name] != value}
    assert changed == {"loss_cls1", "loss_cls2", "loss"}


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_out_of_range_is_an_error(smoothing):
    with pytest.raises(ValueError, match=rf"loss.label_smoothing={smoothing} must be"):
        _loss(Echo(), label_smoothing=smoothing)


def test_terms_include_statistics_of_gamma():
    terms, *_ = _terms(0)
    gamma_res = equations.restrict(np.array(GAMMA))
    for i in range(4):
        assert terms[f"gamma{i + 1}_mean"] == pytest.approx(gamma_res[i], rel=1e-5)
        assert terms[f"gamma{i + 1}_std"] == pytest.approx(0, abs=1e-6)
    assert terms["gamma_saturated"] == terms["gamma_guarded"] == 1.0  # tanh 2.5 = 0.987


def test_unknown_pairs_are_an_error():
    with pytest.raises(ValueError, match=r"unknown contrast.pairs 'some'"):
        _loss(Echo(), pairs="some")


def _tiny(kind="cra", **options):
    def make():
        return resnet.create("resnet10", 5, width=8, stem="small", **options)

    return model.create(kind, make, ArtConfig(size_px=16, inside=False))


def _step(network, all_mean=lambda x: x, rate=0.05, accumulate=1, **options):
    def learning_rate(step):
        return jnp.float32(rate)

    optimizer = make_optimizer(learning_rate)
    step = train_step.make_train_step(
        _loss(network, **options),
        optimizer,
        learning_rate=learning_rate,
        normalize=NORMALIZE,
        all_mean=all_mean,
        accumulate=accumulate,
    )
    return step, optimizer


def test_training_on_one_batch_lowers_the_loss_and_changes_all_variables():
    network = _tiny()
    step, optimizer = _step(network)
    state = first = train_step.create_state(
        jax.random.key(0), network, optimizer, crop_px=32
    )
    batch = _batch(8, 32, classes=5)
    step = jax.jit(step)
    history = []
    for _ in range(30):
        state, terms = step(state, batch)
        history.append({k: float(v) for k, v in terms.items()})
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert history[-1]["loss_cls1"] < 0.3 * history[0]["loss_cls1"]
    assert history[-1]["loss_cls2"] < 0.6 * history[0]["loss_cls2"]
    assert all(math.isfinite(v) for terms in history for v in terms.values())
    assert int(state.step) == 30
    for before, after in (
        (first.params, state.params),
        (first.batch_stats, state.batch_stats),
    ):
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
        assert all(jax.tree.leaves(changed))


def test_run_steps_equals_single_steps_in_order():
    network = _tiny("baseline")
    step, optimizer = _step(network, rate=1e-3)
    state = first = train_step.create_state(
        jax.random.key(0), network, optimizer, crop_px=32
    )
    batch = _batch(8, 32, classes=5)
    batches = [{k: np.roll(v, i, 0) for k, v in batch.items()} for i in (0, 1, 3)]
    batches[1]["label"] = (batches[1]["label"] + 1) % 5
    alone, one_by_one = jax.jit(step), []
    for each in batches:
        state, terms = alone(state, each)
        one_by_one.append(terms)
    several, together = jax.jit(step_wrappers.run_steps(step))(first, batches)
    assert len(together) == 3
    near = partial(assert_allclose, rtol=1e-4, atol=1e-5)
    for terms, expected in zip(together, one_by_one, strict=True):
        assert terms.keys() == expected.keys()
        assert float(terms["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-4)
    jax.tree.map(near, several, state)
    (only,) = jax.jit(step_wrappers.run_steps(step))(first, batches[:1])[1]
    assert only == one_by_one[0]


def test_training_step_flips_and_normalizes_the_images():
    network = model.create("baseline", Echo, ArtConfig())
    step, optimizer = _step(network)
    batch = _batch()
    state = train_step.create_state(jax.random.key(0), network, optimizer, crop_px=SIZE)
    seen = jax.jit(step)(state, batch)[0].batch_stats["classification_stream"]["seen"]
    assert float(seen) == pytest.approx(_images(batch).mean(), rel=1e-5)

    def first_pixel(params, batch_stats, images, labels, step):
        first = images[0, 0, 0, 0]
        return first * params["g"], (batch_stats, {"first": first})

    flipped = train_step.make_train_step(
        first_pixel,
        make_optimizer(lambda s: 0.0),
        learning_rate=lambda s: jnp.zeros(()),
        normalize=NORMALIZE,
    )
    params = {"g": jnp.ones(())}
    tiny = train_step.TrainState(
        jnp.int32(0), params, {}, make_optimizer(lambda s: 0.0).init(params)
    )
    for flip, column in ((False, 0), (True, -1)):
        _, terms = flipped(tiny, {**batch, "flip": np.full(6, flip)})
        value = (batch["image"][0, 0, column, 0] / 255 - MEAN[0]) / STD[0]
        assert float(terms["first"]) == pytest.approx(value, rel=1e-5)


def test_identical_images_give_no_nan():
    """Every distance of Eq. (8) between two of these images is exactly 0."""
    network = model.create("cra", Echo, ArtConfig(size_px=SIZE, inside=False))
    step, optimizer = _step(network)
    batch = _batch(4)
    batch["image"][:] = batch["image"][0]
    batch["flip"][:] = False
    state = train_step.create_state(jax.random.key(0), network, optimizer, crop_px=SIZE)
    with jax.debug_nans(True):
        for image in (batch["image"], np.zeros_like(batch["image"])):
            new, terms = jax.jit(step)(state, {**batch, "image": image})
            assert all(np.isfinite(float(v)) for v in terms.values())
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(new.params))


def _image_scatters(function, *arguments):
    """Returns the compiled program's scatters into the zero-padded images."""
    fusion = "xla_cpu_use_fusion_emitters"  # on for users; conftest.py turns it off
    options = {fusion: True} if fusion in os.environ["XLA_FLAGS"] else {}
    jitted = jax.jit(function, compiler_options=options)
    hlo = jitted.lower(*arguments).compile().as_text() or ""
    pixels = f"[6,{SIZE + 5},{SIZE + 5},3]"
    return [x for x in hlo.splitlines() if " scatter(" in x and pixels in x]


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("head", art_module.HEADS)
def test_training_step_has_no_scatter_into_the_images(head, extended):
    """Images are data; the step must not compute the sampler's gradient to them."""
    art = ArtConfig(size_px=SIZE, inside=False, head=head)
    more: dict[str, Any] = {}
    if extended:
        art = dataclasses.replace(art, redundancy="filled", rotate=False)
        more = {"swap": SwapConfig(weight=1.0), "shared": True}
    network = model.create("cra", Echo, art, **more)
    step, optimizer = _step(network)
    state = train_step.create_state(jax.random.key(0), network, optimizer, crop_px=SIZE)
    batch = {k: jnp.asarray(v) for k, v in _batch().items()}
    assert not _image_scatters(step, state, batch)

    def to_images(images):
        loss, _ = _loss(network)(
            state.params, state.batch_stats, images, batch["label"], state.step
        )
        return loss

    images = jnp.asarray(_images(_batch()), jnp.float32)
    assert _image_scatters(jax.grad(to_images), images)  # the search does find them


@pytest.mark.parametrize("n", [2, 3])
def test_odd_batch_has_a_finite_contrastive_loss(n):
    network = model.create("cra", Echo, ArtConfig(size_px=SIZE, inside=False))
    step, optimizer = _step(network)
    state = train_step.create_state(jax.random.key(0), network, optimizer, crop_px=SIZE)
    _, terms = jax.jit(step)(state, _batch(n))
    assert np.isfinite(float(terms["loss_cntr"]))


def test_batch_of_one_image_is_an_error():
    network = model.create("cra", Echo, ArtConfig(size_px=SIZE, inside=False))
    step, optimizer = _step(network)
    state = train_step.create_state(jax.random.key(0), network, optimizer, crop_px=SIZE)
    with pytest.raises(ValueError, match="at least 2 per device"):
        step(state, _batch(1))


def test_one_device_and_eight_give_the_same_update():
    """BatchNorm is synchronized; the pairs are neighbours, so they are the same."""
    batch = _batch(16, 32, classes=5)
    alone, optimizer = _step(_tiny())
    shared = {
        "all_mean": devices.all_mean,
        "num_replicas": devices.device_count(),
    }
    together, _ = _step(_tiny(**shared), devices.all_mean)
    assert devices.device_count() == 8
    state = train_step.create_state(jax.random.key(0), _tiny(), optimizer, crop_px=32)
    copy = jax.tree.map(jnp.array, state)
    one, one_terms = jax.jit(alone)(state, batch)
    eight, eight_terms = devices.train_step(together)(copy, devices.split(batch))
    for name, value in one_terms.items():
        if not name.endswith("_std"):  # the standard deviation is that of one device
            assert_allclose(
                eight_terms[name], value, rtol=2e-4, atol=1e-5, err_msg=name
            )
    changes = [
        jax.tree.leaves(jax.tree.map(lambda a, b: a - b, new, old))
        for new, old in (
            (one.params, state.params),
            (jax.tree.map(np.asarray, eight.params), state.params),
        )
    ]
    for a, b in zip(*changes, strict=True):
        assert_allclose(a, b, atol=2e-5 + 1e-3 * float(jnp.abs(a).max()))
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        one.batch_stats,
        jax.tree.map(np.asarray, eight.batch_stats),
    )


def test_pairs_are_the_same_on_any_number_of_devices():
    m, n = losses.neighbour_pairs(16)
    for count in (2, 4, 8):
        share = 16 // count
        local = losses.neighbour_pairs(share)
        starts = share * np.arange(count)[:, None]
        assert_array_equal((starts + local[0]).ravel(), m)
        assert_array_equal((starts + local[1]).ravel(), n)


def _assert_same_update(found, expected, state):
    """Compares two updates of a state to the rounding of float32."""
    for name in ("params", "batch_stats"):
        a, b, before = (
            jax.tree.leaves(getattr(x, name)) for x in (found, expected, state)
        )
        for new, other, old in zip(a, b, before, strict=True):
            change = np.abs(np.asarray(other) - np.asarray(old)).max()
            assert_allclose(new, other, atol=2e-5 + 1e-3 * float(change), rtol=0)


def test_micro_batches_give_the_update_of_the_whole_batch():
    """BatchNorm's group size divides the micro-batches."""
    batch = _batch(8, 32, classes=5)
    grouped = _tiny(bn_group_size=2)
    whole, optimizer = _step(grouped)
    parts, _ = _step(grouped, accumulate=2)
    state = train_step.create_state(jax.random.key(0), grouped, optimizer, crop_px=32)
    expected, expected_terms = jax.jit(whole)(state, batch)
    found, terms = jax.jit(parts)(state, batch)
    _assert_same_update(found, expected, state)
    assert terms.keys() == expected_terms.keys()
    for name, value in expected_terms.items():
        if not name.endswith(
            "_std"
        ):  # the standard deviation is that of one micro-batch
            assert_allclose(terms[name], value, rtol=2e-4, atol=1e-5, err_msg=name)


def test_micro_batches_on_several_devices_give_the_mean_gradient():
    """The network is one number, whose gradient is known in closed form."""

    def loss(params, batch_stats, images, labels, step):
        value = (params["w"] * labels).mean() + 0 * images.sum()
        return value, ({"seen": batch_stats["seen"] + labels.mean()}, {"loss": value})

    optimizer = make_optimizer(lambda s: 1.0, momentum=0, weight_decay=0)
    step = train_step.make_train_step(
        loss,
        optimizer,
        learning_rate=lambda s: jnp.ones(()),
        normalize=NORMALIZE,
        all_mean=devices.all_mean,
        accumulate=3,
    )
    params = {"w": jnp.full((), 2.0)}
    state = train_step.TrainState(
        jnp.int32(0), params, {"seen": jnp.float32(10)}, optimizer.init(params)
    )
    batch = _batch(48)
    state, terms = devices.train_step(step)(state, devices.split(batch))
    mean = batch["label"].mean()
    assert_allclose(float(state.params["w"]), 2 - mean, rtol=1e-5)
    assert_allclose(float(state.batch_stats["seen"]), 10 + mean, rtol=1e-6)
    assert_allclose(float(terms["loss"]), 2 * mean, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        partial(resnet.create, "resnet18", 5, width=8, stem="medium"),
        partial(efficientnet.create, "efficientnet_lite0", 5),
    ],
)
def test_rematerialized_blocks_need_less_memory(make):
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    trees, kept = {}, {}
    for remat in (False, True):
        network = make(remat=remat)
        variables = jax.eval_shape(network.init, jax.random.key(0), images)
        trees[remat] = variables

        def backward(variables, images, network=network):
            def loss(params):
                given = {**variables, "params": params}
                out, _ = network.apply(given, images, True, mutable=["batch_stats"])
                return jnp.square(out.logits).sum()

            return jax.vjp(loss, variables["params"])[1]

        residuals = jax.tree.leaves(jax.eval_shape(backward, variables, images))
        kept[remat] = sum(x.size * x.dtype.itemsize for x in residuals)
        kept[remat] -= sum(4 * x.size for x in jax.tree.leaves(variables))
    assert trees[False] == trees[True]
    assert kept[True] < 0.4 * kept[False]


def test_rematerialized_blocks_give_the_same_update():
    batch = _batch(8, 32, classes=5)
    found = {}
    for remat in (False, True):
        step, optimizer = _step(_tiny(remat=remat))
        state = train_step.create_state(
            jax.random.key(0), _tiny(), optimizer, crop_px=32
        )
        found[remat] = jax.jit(step)(state, batch)
    _assert_same_update(found[True][0], found[False][0], state)
    for name, value in found[False][1].items():
        assert_allclose(found[True][1][name], value, rtol=2e-4, atol=1e-5, err_msg=name)
