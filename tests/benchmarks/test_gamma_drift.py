"""Tests of the gradients into Gamma and into N_cls."""

import shutil
from pathlib import Path
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
DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A config, a probe of one batch, a state, and the number of classes.

    Gamma differs between the images.
    """
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
def test_gradients_to_gamma_equal_those_of_the_heads_bias(made):
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
    for name, norm in zip(gamma_drift.TERMS, expected, strict=True):
        mean = found[f"{name} gradient"] * found[f"{name} alignment"]
        assert mean == pytest.approx(float(norm), rel=1e-3, abs=1e-6)
        assert found[f"{name} alignment"] <= 1 + 1e-6
    assert found["cls2 gradient"] > 0
    assert found["gain"] == pytest.approx(2)  # the default head normalizes its input
    assert found["L_cls2"] == pytest.approx(float(terms_of(bias)[0]), rel=1e-4)


def test_moving_an_attention_to_its_own_centre_does_not_change_the_loss(made):
    _, probe, state, _ = made
    ((images, labels, _),) = probe._batches
    out, _ = probe._network.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        images,
        True,
        mutable=["batch_stats"],
    )
    place = out.attention.gamma_res[:, :2]
    found = probe._gamma_scores(state.params, state.batch_stats, images, labels, place)
    assert float(found["L_cls2 on bird"]) == pytest.approx(
        float(found["L_cls2"]), rel=1e-3
    )
    other = probe._gamma_scores(state.params, state.batch_stats, images, labels, -place)
    assert float(other["L_cls2 on bird"]) != pytest.approx(
        float(found["L_cls2"]), rel=1e-3
    )


@pytest.mark.parametrize("inside", [False, True])
def test_gamma_at_moves_the_centre_and_keeps_scale_and_angle(made, inside):
    config = made[0].copy_and_resolve_references()
    config.art.inside = inside
    probe = object.__new__(gamma_drift.Probe)
    probe._config = config
    before = jnp.array([[3.0, -1.0, 0.7, 0.4], [0.0, 0.2, -0.3, 2.0]])
    birds = jnp.array([[0.3, -0.2], [-0.1, 0.4]])
    after = geometry.restrict(probe._gamma_at(birds, before), inside=inside)
    assert_allclose(after[:, :2], birds, atol=1e-6)
    assert_allclose(after[:, 2:], geometry.restrict(before)[:, 2:], atol=1e-6)


def test_the_cosine_of_a_zero_vector_is_0():
    direction = jnp.array([[1.0, 2.0], [0.0, -3.0]])
    for other, cosine in (
        (2 * direction, 1),
        (-direction, -1),
        (0 * direction, 0),
        (direction * jnp.array([[1.0], [-1]]), 0),
    ):
        found = gamma_drift._cosine(other, direction)
        assert found == pytest.approx(cosine, abs=1e-6)


@pytest.mark.slow
def test_a_training_is_measured_before_the_given_steps(tmp_path):
    config = tiny_config.config(tmp_path)
    config.update_from_flattened_dict(gamma_drift.SETTINGS["paper"])
    found = gamma_drift.train_and_measure(config, AT)
    assert [line["step"] for line in found] == AT
    assert found[0]["res gradient"] == 0  # Gamma starts within the thresholds
    assert found[0]["offset"] != found[1]["offset"]
    figure = gamma_drift.draw({"paper": found})
    shown = figure.axes[0].lines[0]
    assert np.asarray(shown.get_ydata()).tolist() == [line["offset"] for line in found]
    about = {"seed": 0, "machine": "a machine"}
    before = {"default": [{**line, **about} for line in found]}
    gamma_drift.write(before, tmp_path / "docs")
    assert gamma_drift._read(tmp_path / "docs") == before
    text = (tmp_path / "docs" / "gamma.md").read_text()
    assert f"| default | {AT[-1]} | {found[-1]['offset']:.2g} |" in text
    ratio = f"{found[-1]['N_cls ratio']:.2g}"
    assert f"| default | none | {ratio} to {ratio} |" in text
    assert (tmp_path / "docs" / "study" / "gamma.png").stat().st_size > 1000
    config.data.test_size = 8
    with pytest.raises(ValueError, match="8 test images do not fill one batch of 16"):
        gamma_drift.train_and_measure(config, AT)


@pytest.mark.slow
def test_the_gradient_into_n_cls_is_that_of_cra_minus_the_baselines(made):
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
    found = probe._classifier_scores(state.params, state.batch_stats, images, labels)
    size = np.linalg.norm(more) / np.linalg.norm(own)
    assert size > 1e-3
    assert float(found["N_cls ratio"]) == pytest.approx(size, rel=1e-2)
    cosine = more @ own / np.linalg.norm(more) / np.linalg.norm(own)
    assert float(found["N_cls cosine"]) == pytest.approx(cosine, abs=1e-2)


def test_no_gradient_reaches_n_cls_through_a_head_with_zero_weights(made):
    _, probe, state, _ = made
    ((images, labels, _),) = probe._batches
    head = state.params[art_module.ATTENTION_HEAD]
    zero_head = {**head, "kernel": jnp.zeros_like(head["kernel"])}
    params = {**state.params, art_module.ATTENTION_HEAD: zero_head}
    found = probe._classifier_scores(params, state.batch_stats, images, labels)
    assert float(found["N_cls ratio"]) == 0


def test_the_page_in_the_repository_is_written_from_its_results(tmp_path, capsys):
    """If it fails: python -m benchmarks.study.gamma_drift --table."""
    (tmp_path / "study").mkdir()
    shutil.copy(DOCS / "study" / "gamma.jsonl", tmp_path / "study")
    gamma_drift.main(["--table", f"--docs={tmp_path}"])
    assert capsys.readouterr().out == f"written: {tmp_path / 'gamma.md'}\n"
    for name in ("gamma.md", "study/gamma.jsonl"):
        assert (tmp_path / name).read_text() == (DOCS / name).read_text()


def test_a_page_without_results_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gamma_drift.main(["--table", f"--docs={tmp_path}"])
    assert "has no results: run without --table" in capsys.readouterr().err
