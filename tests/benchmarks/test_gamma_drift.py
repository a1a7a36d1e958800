"""The gradients into Gamma, against those of the head's bias, and what a bird is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from benchmarks.study import gamma_drift
from cra_jax import art_module, geometry, train_step
from cra_jax.training import build
from tests.helpers import tiny_config

AT = [0, 2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A config, a probe of one batch, and a state whose Gamma differs by image."""
    config = tiny_config.config(tmp_path_factory.mktemp("gamma"))
    config.train.batch_size = 32
    dataset = build.load_dataset(config)
    split = build.open_split(config, dataset, "test")
    num_classes = len(dataset.class_names)
    training = build.build_training(config, num_classes, steps_per_epoch=3)
    state: Any = train_step.create_state(
        jax.random.key(0),
        training.network,
        training.optimizer,
        crop_px=config.data.crop_px,
    )
    head = state.params[art_module.ATTENTION_HEAD]
    rng = np.random.default_rng(0)
    head["kernel"] = jnp.asarray(
        rng.normal(0, 0.5, head["kernel"].shape).astype(np.float32)
    )
    return config, gamma_drift.Probe(config, num_classes, split), state, num_classes


@pytest.mark.slow
def test_pulls_are_what_the_heads_bias_feels(made):
    config, probe, state, num_classes = made
    ((images, labels, _),) = probe._batches
    bare = config.copy_and_resolve_references()
    bare.update_from_flattened_dict({"art.guard": 0.0, "art.gradient_clip": 0.0})
    network = build.build_network(bare, num_classes)
    loss = build.build_loss(bare, network, steps_per_epoch=1)

    def terms_of(bias):
        head = {**state.params[art_module.ATTENTION_HEAD], "bias": bias}
        params = {**state.params, art_module.ATTENTION_HEAD: head}
        terms = loss(params, state.batch_stats, images, labels, 0)[1][1]
        return jnp.stack([terms[f"loss_{name}"] for name in gamma_drift.TERMS])

    bias = state.params[art_module.ATTENTION_HEAD]["bias"]
    expected = jnp.linalg.norm(jax.jit(jax.jacobian(terms_of))(bias), axis=1)
    found = probe(state)
    assert list(found) == list(gamma_drift.COLUMNS)
    for name, felt in zip(gamma_drift.TERMS, expected, strict=True):
        mean = found[f"{name} pull"] * found[f"{name} alike"]
        assert mean == pytest.approx(float(felt), rel=1e-3, abs=1e-6)
        assert found[f"{name} alike"] <= 1 + 1e-6
    assert found["cls2 pull"] > 0
    assert found["gain"] == pytest.approx(2)  # the default head sees length 1
    assert found["loss"] == pytest.approx(float(terms_of(bias)[0]), rel=1e-4)


def test_an_attention_that_is_on_the_bird_gains_nothing_by_going_there(made):
    _, probe, state, _ = made
    ((images, labels, _),) = probe._batches
    out, _ = probe._network.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        images,
        True,
        mutable=["batch_stats"],
    )
    place = out.attention.gamma_res[:, :2]
    found = probe._ask(state.params, state.batch_stats, images, labels, place)
    assert float(found["on bird"]) == pytest.approx(float(found["loss"]), rel=1e-3)
    other = probe._ask(state.params, state.batch_stats, images, labels, -place)
    assert float(other["on bird"]) != pytest.approx(float(found["loss"]), rel=1e-3)


@pytest.mark.parametrize("inside", [False, True])
def test_an_attention_that_is_moved_onto_a_bird_is_there(made, inside):
    config = made[0].copy_and_resolve_references()
    config.art.inside = inside
    probe = object.__new__(gamma_drift.Probe)
    probe._config = config
    before = jnp.array([[3.0, -1.0, 0.7, 0.4], [0.0, 0.2, -0.3, 2.0]])
    birds = jnp.array([[0.3, -0.2], [-0.1, 0.4]])
    after = geometry.restrict(probe._gamma_at(birds, before), inside=inside)
    assert_allclose(after[:, :2], birds, atol=1e-6)
    assert_allclose(after[:, 2:], geometry.restrict(before)[:, 2:], atol=1e-6)


def test_the_cosine_is_1_towards_the_bird_and_0_without_a_pull():
    way = jnp.array([[1.0, 2.0], [0.0, -3.0]])
    for pull, cosine in ((2 * way, 1), (-way, -1), (0 * way, 0)):
        assert gamma_drift._cosine(pull, way) == pytest.approx(cosine)
    assert gamma_drift._cosine(way * jnp.array([[1.0], [-1]]), way) == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.slow
def test_a_training_is_asked_before_the_steps_that_are_named(tmp_path):
    config = tiny_config.config(tmp_path)
    config.update_from_flattened_dict(gamma_drift.SETTINGS["paper"])
    found = gamma_drift.watch(config, AT)
    assert [line["step"] for line in found] == AT
    assert found[0]["res pull"] == 0  # it starts within the thresholds
    assert found[0]["place"] != found[1]["place"]
    figure = gamma_drift.draw({"paper": found})
    shown = figure.axes[0].lines[0]
    assert np.asarray(shown.get_ydata()).tolist() == [line["place"] for line in found]
    about = {"seed": 0, "machine": "a machine"}
    before = {"default": [{**line, **about} for line in found]}
    gamma_drift.write(before, tmp_path / "docs")
    assert gamma_drift._kept(tmp_path / "docs") == before
    text = (tmp_path / "docs" / "gamma.md").read_text()
    assert f"| default | {AT[-1]} | {found[-1]['place']:.2g} |" in text
    assert f"{found[-1]['into N_cls']:.2g} times L_cls1's own" in text
    assert (tmp_path / "docs" / "study" / "gamma.png").stat().st_size > 1000
    config.data.test_size = 8
    with pytest.raises(ValueError, match="8 test images do not fill one batch of 16"):
        gamma_drift.watch(config, AT)


@pytest.mark.slow
def test_what_reaches_n_cls_is_what_a_baseline_lacks(made):
    config, probe, state, num_classes = made
    ((images, labels, _),) = probe._batches

    def gradient(kind):
        changed = config.copy_and_resolve_references()
        changed.model.kind = kind
        network = build.build_network(changed, num_classes)
        loss = build.build_loss(changed, network, steps_per_epoch=1)

        def of(classifier):
            params = {"classification_stream": classifier}
            stats = {key: state.batch_stats[key] for key in params}
            if kind == "cra":
                params, stats = {**state.params, **params}, state.batch_stats
            return loss(params, stats, images, labels, 0)[0]

        tree = jax.jit(jax.grad(of))(state.params["classification_stream"])
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    own, whole = gradient("baseline"), gradient("cra")
    more = whole - own
    found = probe._reaching(state.params, state.batch_stats, images, labels)
    size = np.linalg.norm(more) / np.linalg.norm(own)
    assert size > 1e-3
    assert float(found["into N_cls"]) == pytest.approx(size, rel=1e-2)
    cosine = more @ own / np.linalg.norm(more) / np.linalg.norm(own)
    assert float(found["agrees"]) == pytest.approx(cosine, abs=1e-2)


def test_nothing_reaches_n_cls_through_a_head_that_ignores_it(made):
    _, probe, state, _ = made
    ((images, labels, _),) = probe._batches
    head = state.params[art_module.ATTENTION_HEAD]
    deaf = {**head, "kernel": jnp.zeros_like(head["kernel"])}
    params = {**state.params, art_module.ATTENTION_HEAD: deaf}
    found = probe._reaching(params, state.batch_stats, images, labels)
    assert float(found["into N_cls"]) == 0
