"""The swap, the filled redundancy and N_ar with shared weights."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import geometry, model, swap, train_step
from cra_jax.art_module import ArtConfig
from cra_jax.backbones import resnet
from cra_jax.swap import SwapConfig
from cra_jax.training import check_config
from tests.helpers import tiny_config
from tests.helpers.loss_options import LOSS
from tests.oracles import equations
from tests.oracles import swap as oracle

# Each with its widest strip on another side; angles, a half turn, and one centred.
GAMMAS = np.array(
    [
        [0.31, 0.12, 0.41, 0.0],
        [-0.4, 0.2, 0.33, 0.3],
        [0.1, 0.5, -0.37, 1.0],
        [0.2, -0.43, 0.45, -0.2],
        [0.0, 0.0, 0.45, 0.0],
    ]
)
SIZE = (11, 13)
IMAGES = np.random.default_rng(0).normal(size=(5, *SIZE, 3))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_points_are_mirrored_into_the_widest_strip(x64, gamma):
    grid = equations.regular_grid(SIZE)
    found = np.asarray(geometry.beside(jnp.array(gamma[None]), jnp.array(grid[None])))
    for i, j in np.ndindex(*SIZE):
        expected = oracle.beside(grid[i, j], gamma)
        assert_allclose(found[0, i, j], expected, atol=1e-9, err_msg=f"{grid[i, j]}")


@pytest.mark.parametrize(
    "gamma", [[0, 0, 1, 0], [0.5, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0.7, np.pi / 4]]
)
def test_an_attention_without_a_strip_moves_points_within_the_image(gamma):
    grid = geometry.beside(jnp.array([gamma]), geometry.regular_grid(SIZE)[None])
    assert np.isfinite(grid).all()
    assert np.abs(np.asarray(grid)).max() <= 1


def test_filled_redundancy_shows_the_image_beside_the_attention(x64):
    grid = geometry.redundancy_grid(jnp.array(GAMMAS), (9, 10), filled=True)
    found = geometry.bilinear_sample(jnp.array(IMAGES), grid)
    for image, gamma, filled in zip(IMAGES, GAMMAS, found, strict=True):
        expected = oracle.redundancy(image, gamma, (9, 10))
        assert_allclose(filled, expected, atol=1e-9)


@pytest.mark.parametrize("place", swap.PLACES)
def test_swap_equals_the_oracle(x64, place):
    target, source = jnp.array(IMAGES), jnp.array(IMAGES[::-1])
    gammas = jnp.array(GAMMAS), jnp.array(GAMMAS[::-1])
    config = SwapConfig(place=place)
    found = swap.swap(target, gammas[0], source, gammas[1], config)
    for i, image in enumerate(found):
        expected = oracle.swap(
            IMAGES[i], GAMMAS[i], IMAGES[-1 - i], GAMMAS[-1 - i], place=place
        )
        assert_allclose(image, expected, atol=1e-9)


@pytest.mark.parametrize("place", swap.PLACES)
def test_soft_edges_blend_both_images_and_become_hard(x64, place):
    target, source = jnp.zeros((1, 41, 41, 1)), jnp.ones((1, 41, 41, 1))
    gammas = jnp.array(GAMMAS[:1]), jnp.array(GAMMAS[1:2])

    def paste(edge):
        config = SwapConfig(place=place, edge=edge)
        return np.asarray(swap.swap(target, gammas[0], source, gammas[1], config))

    hard, soft, nearly_hard = paste(0.0), paste(0.4), paste(1e-6)
    assert set(np.unique(hard)) == {0, 1}
    region = GAMMAS[0] if place == "neighbour" else GAMMAS[1]
    grid = equations.regular_grid((41, 41))
    for i, j in np.ndindex(41, 41):
        distance = equations.edge_distance(grid[i, j], region)
        if distance < 1e-4:
            continue
        assert_allclose(nearly_hard[0, i, j], hard[0, i, j], atol=1e-6)
        if equations.covered(grid[i, j], region):
            # A quarter of the width is the logistic's scale; both axes multiply.
            weight = soft[0, i, j, 0]
            assert 0.24 < weight < 1
            assert distance < 0.2 or weight > 0.75
        else:
            assert soft[0, i, j, 0] < 0.51


@pytest.mark.parametrize(
    ("count", "every", "target", "source"),
    [
        (8, 1, [0, 1, 2, 3, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6]),
        (8, 2, [0, 2, 4, 6], [1, 3, 5, 7]),
        (8, 4, [0, 4], [1, 5]),
        (5, 2, [0, 2, 4], [1, 3, 4]),
        (1, 1, [0], [0]),
    ],
)
def test_neighbours(count, every, target, source):
    found = swap.neighbours(count, every)
    assert [list(x) for x in found] == [target, source]


def test_random_boxes_depend_on_seed_step_and_index_only():
    def draw(seed, step, index):
        start = (0.0, 0.0, 0.45, 0.1)
        index = jnp.array(index)
        return np.asarray(swap.draw_boxes(seed, start, jnp.array(step), index))

    boxes = draw(0, 3, np.arange(400))
    assert_array_equal(boxes[5:7], draw(0, 3, [5, 6]))
    assert (boxes[:, 2:] == np.array([0.45, 0.1], np.float32)).all()
    bound = 1 - 0.45 * (np.cos(0.1) + np.sin(0.1))
    assert 0.9 * bound < np.abs(boxes[:, :2]).max() <= bound
    assert np.abs(boxes[:, :2].mean(0)).max() < 0.1 * bound
    for other in (draw(1, 3, [5]), draw(0, 4, [5]), draw(0, 3, [4])):
        assert np.abs(other - boxes[5])[:, :2].min() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"place": "left"}, r"unknown swap\.place 'left'; choose from neighbour, own"),
        ({"boxes": "true"}, r"unknown swap\.boxes 'true'"),
        ({"weight": -1.0}, r"swap\.weight=-1\.0 must be 0 or more"),
        ({"every": 0}, r"swap\.every=0 must be 1 or more"),
        ({"edge": -0.1}, r"swap\.edge=-0\.1 must be 0 or more"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        SwapConfig(**options)


def _network(*, shared: bool = False, **options: Any):
    return model.create(
        "cra",
        lambda: resnet.create("resnet10", 5, width=8, stem="small"),
        ArtConfig(size_px=16, redundancy="filled"),
        swap=SwapConfig(**options),
        shared=shared,
    )


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (4, 32, 32, 3))


def _run(network, images, *, train=True, boxes=None):
    variables = jax.jit(network.init)(jax.random.key(1), images)
    out, updated = jax.jit(
        lambda variables: network.apply(
            variables, images, train, boxes, mutable=["batch_stats"]
        )
    )(variables)
    return variables, out, updated["batch_stats"]


def test_the_swap_changes_nothing_of_the_other_outputs_and_statistics(images):
    _, plain, stats = _run(_network(), images)
    assert plain.swap_logits is None
    _, swapped, swapped_stats = _run(_network(weight=1.0), images)
    assert_allclose(swapped.logits, plain.logits, rtol=1e-4, atol=1e-5)
    # The other program rounds differently.
    jax.tree.map(partial(assert_allclose, rtol=1e-3, atol=1e-6), swapped_stats, stats)
    _, evaluated, _ = _run(_network(weight=1.0), images, train=False)
    assert evaluated.swap_logits is None


def test_swap_logits_are_the_scores_of_swapped_images_by_themselves(images):
    variables, out, _ = _run(_network(weight=1.0, every=2), images)
    gamma = out.attention.gamma_res
    config = SwapConfig()
    swapped = swap.swap(images[::2], gamma[::2], images[1::2], gamma[1::2], config)
    stream = {name: tree["classification_stream"] for name, tree in variables.items()}
    backbone = resnet.create("resnet10", 5, width=8, stem="small")
    expected, _ = backbone.apply(stream, swapped, True, mutable=["batch_stats"])
    assert_allclose(out.swap_logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_boxes_take_the_place_of_the_attention_in_the_swap_alone(images):
    network = _network(weight=1.0)
    boxes = jnp.array([[0.3, -0.2, 0.45, 0.0]] * 4)
    _, attended, _ = _run(network, images)
    _, boxed, _ = _run(network, images, boxes=boxes)
    assert_array_equal(boxed.attention_logits, attended.attention_logits)
    assert np.abs(boxed.swap_logits - attended.swap_logits).max() > 1e-3


def test_shared_weights_leave_one_set_of_parameters_and_two_of_statistics(images):
    variables, out, stats = _run(_network(shared=True), images)
    assert set(variables["params"]) == {"classification_stream", "attention_head"}
    own, whole = stats["regularization_stream"], stats["classification_stream"]
    assert jax.tree.structure(own) == jax.tree.structure(whole)
    assert np.abs(own["bn1"]["mean"] - whole["bn1"]["mean"]).max() > 1e-5
    # N_ar's statistics in training are those of a separate N_ar of the same weights.
    separate = _network()
    streams = ("classification_stream", "regularization_stream")
    copied = {
        name: {**tree, **dict.fromkeys(streams, tree["classification_stream"])}
        for name, tree in variables.items()
    }
    expected, expected_stats = jax.jit(
        lambda variables: separate.apply(
            variables, images, True, mutable=["batch_stats"]
        )
    )(copied)
    assert_allclose(out.attention_logits, expected.attention_logits, rtol=1e-5)
    jax.tree.map(assert_array_equal, stats, expected_stats["batch_stats"])


def test_gradients_of_shared_weights_are_the_sums_of_both_streams(images):
    labels = jnp.array([0, 3, 1, 4])
    options = dataclasses.replace(LOSS, cntr_weight=0.5)

    def gradient(network, variables):
        loss = train_step.make_loss(
            network, options, restriction_weight=lambda step: jnp.ones(())
        )
        both = jax.jit(jax.grad(loss, has_aux=True))(
            variables["params"], variables["batch_stats"], images, labels, 0
        )
        return both[0]

    shared = _network(shared=True)
    variables = jax.jit(shared.init)(jax.random.key(1), images)
    streams = ("classification_stream", "regularization_stream")
    copied = {
        name: {**tree, **dict.fromkeys(streams, tree["classification_stream"])}
        for name, tree in variables.items()
    }
    separate = gradient(_network(), copied)
    found = gradient(shared, variables)["classification_stream"]
    summed = jax.tree.map(jnp.add, *(separate[stream] for stream in streams))
    jax.tree.map(
        lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, summed
    )


def test_l_swap_is_the_mean_cross_entropy_with_the_labels_of_the_pasted(images):
    labels = jnp.array([0, 3, 1, 4])
    network = _network(weight=0.7, every=2)
    variables, out, _ = _run(network, images)
    options = dataclasses.replace(LOSS, swap_weight=0.7)
    loss = train_step.make_loss(
        network, options, restriction_weight=lambda step: jnp.ones(())
    )
    total, (_, terms) = jax.jit(loss)(
        variables["params"], variables["batch_stats"], images, labels, 0
    )
    logits = np.asarray(out.swap_logits, np.float64)
    each = np.log(np.exp(logits).sum(-1)) - logits[[0, 1], [3, 4]]
    assert_allclose(terms["loss_swap"], each.mean(), rtol=1e-5)
    others = sum(terms[f"loss_{x}"] for x in ("cls1", "cls2", "res", "cntr"))
    assert_allclose(total, others + 0.7 * each.mean(), rtol=1e-5)


def test_l_uniform_is_smallest_for_even_scores():
    from cra_jax import losses

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4)) * 5
    expected = [
        -np.mean([x - np.log(sum(np.exp(y) for y in row)) for x in row])
        for row in logits
    ]
    assert_allclose(losses.uniform_loss(jnp.array(logits)), expected, rtol=1e-5)
    even = losses.uniform_loss(jnp.full((1, 4), 2.0))
    assert_allclose(even, np.log(4), rtol=1e-6)
    assert (np.array(expected) > np.log(4)).all()


@pytest.mark.parametrize("kind", ["baseline", "stn"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("art.rotate", False),
        ("art.redundancy", "filled"),
        ("contrast.features", "pooled"),
        ("loss.uniform", 0.5),
        ("model.shared_weights", True),
        ("swap.weight", 1.0),
    ],
)
def test_options_of_cra_cnn_are_refused_elsewhere_or_turned_off(
    tmp_path, capsys, kind, key, value
):
    changes = {"model.kind": kind, key: value}
    config = tiny_config.config(tmp_path, **changes)
    message = rf"{key}={value!r} changes CRA-CNN, and model.kind='{kind}'.*set {key}="
    check_config.turn_off_cra_options(config, changes)
    with pytest.raises(ValueError, match=message):
        check_config.check(config)
    check_config.turn_off_cra_options(config, {"model.kind"})
    check_config.check(config)
    assert f"options of CRA-CNN are off: {key}" in capsys.readouterr().err


def test_swap_and_mixed_labels_exclude_each_other(tmp_path):
    changes = {"mix.kind": "cutmix", "swap.weight": 1.0}
    with pytest.raises(ValueError, match=r"mix\.kind='cutmix'.*swap\.weight=1\.0"):
        check_config.check(tiny_config.config(tmp_path, **changes))


def test_freezing_n_cls_contradicts_shared_weights(tmp_path):
    changes = {"optim.freeze_first_epochs": 1, "optim.freeze_period_epochs": 1}
    changes["model.shared_weights"] = True
    with pytest.raises(ValueError, match=r"shared_weights=True gives both"):
        check_config.check(tiny_config.config(tmp_path, **changes))
