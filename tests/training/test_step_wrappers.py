"""Step wrappers: alternate freezing, averages of weights, several steps at once."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import model, schedule, train_step
from cra_jax.art_module import ArtConfig
from cra_jax.backbones import resnet
from cra_jax.input.normalize import normalize
from cra_jax.runtime import devices
from cra_jax.training import build, step_wrappers
from cra_jax.training.optimizer import make_optimizer
from tests.helpers import tiny_config
from tests.helpers.loss_options import LOSS


def _batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8),
        "flip": rng.random(8) < 0.5,
        "label": rng.integers(0, 5, 8).astype(np.int32),
    }


@pytest.fixture(scope="module")
def plain():
    """Returns a small CRA-CNN, its optimizer and its unwrapped training step."""
    network = model.create(
        "cra",
        lambda: resnet.create("resnet10", 5, width=8, stem="small"),
        ArtConfig(size_px=16, inside=False),
    )
    rate = partial(schedule.learning_rate, steps_per_epoch=10, base=1e-2)
    optimizer = make_optimizer(rate)
    loss = train_step.make_loss(
        network,
        LOSS,
        restriction_weight=partial(schedule.restriction_weight, steps_per_epoch=10),
    )
    step = train_step.make_train_step(
        loss,
        optimizer,
        learning_rate=rate,
        normalize=partial(normalize, mean=(0.5,) * 3, std=(0.2,) * 3),
    )
    return network, optimizer, step


def _unchanged(a, b):
    """Returns by path whether each leaf is bitwise the same."""
    found = jax.tree.map(lambda x, y: bool((x == y).all()), a, b)
    leaves, _ = jax.tree_util.tree_flatten_with_path(found)
    return {jax.tree_util.keystr(p, simple=True, separator="."): v for p, v in leaves}


def test_n_cls_without_its_classifier_is_frozen_in_alternate_periods(plain):
    network, optimizer, step = plain
    times = {"steps_per_epoch": 1, "first_epochs": 1, "period_epochs": 2}
    step = step_wrappers.freeze_alternately(
        step, partial(step_wrappers.is_frozen, **times)
    )
    state = train_step.create_state(jax.random.key(0), network, optimizer, crop_px=32)
    run, states, frozen = jax.jit(step), [state], []
    for _ in range(4):
        state, terms = run(state, _batch())
        states.append(state)
        frozen.append(float(terms["stream_frozen"]))
    assert frozen == [0, 1, 1, 0]
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        for name in ("params", "opt_state", "batch_stats"):
            same = _unchanged(getattr(before, name), getattr(after, name))
            assert len(same) > 20
            for path, is_same in same.items():
                part = path[path.find("classification_stream") :]
                in_n_cls = "attention_head" in path or (
                    part.startswith("classification_stream.")
                    and not part.startswith("classification_stream.fc.")
                )
                assert is_same == (bool(frozen[number]) and in_n_cls), (number, path)
    # A resumed run freezes the same steps: freezing depends only on the step.
    again, _ = run(states[2], _batch())
    jax.tree.map(assert_array_equal, again, states[3])


def _counting_loss(params, batch_stats, images, labels, step):
    """A loss whose steps change the weights by -1 and the statistics by 2."""
    loss = sum(leaf.sum() for leaf in jax.tree.leaves(params)) + 0 * images.sum()
    stats = jax.tree.map(lambda x: x + 2, batch_stats)
    return loss, (stats, {"loss": jnp.where(labels.sum() < 0, jnp.nan, loss)})


def _counting_step(all_mean=lambda tree: tree):
    def rate(step):
        return jnp.ones(())

    optimizer = make_optimizer(rate, momentum=0, weight_decay=0)
    step = train_step.make_train_step(
        _counting_loss,
        optimizer,
        learning_rate=rate,
        normalize=partial(normalize, mean=(0, 0, 0), std=(1, 1, 1)),
        all_mean=all_mean,
    )
    params = {
        "classification_stream": {"w": jnp.full(2, 50.0)},
        "attention_head": {"bias": jnp.full(3, 70.0)},
        "regularization_stream": {"w": jnp.full(2, 90.0)},
    }
    stats = {
        "classification_stream": {"mean": jnp.zeros(2)},
        "regularization_stream": {"mean": jnp.zeros(2)},
    }
    state = train_step.TrainState(
        jnp.int32(0),
        params,
        stats,
        optimizer.init(params),
        train_step.prediction_variables(params, stats),
    ).started_from(params, stats)
    return step, state


def _average(values, decay):
    """Returns the average of a series by its definition; values[0] is the start."""
    mean = values[0]
    for t, value in enumerate(values[1:]):
        kept = min(decay, (1 + t) / (10 + t))
        mean = kept * mean + (1 - kept) * value
    return mean


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_average_is_exponential_with_an_increasing_decay(decay):
    step, state = _counting_step()
    run = jax.jit(step_wrappers.average_weights(step, decay))
    weights, stats, heads = [50.0], [0.0], [70.0]
    for _ in range(12):
        state, _ = run(state, _batch())
        weights.append(float(state.params["classification_stream"]["w"][0]))
        heads.append(float(state.params["attention_head"]["bias"][0]))
        stats.append(float(state.batch_stats["classification_stream"]["mean"][0]))
        params, batch_stats = state.to_predict()
        assert set(params) == {"classification_stream", "attention_head"}
        assert set(batch_stats) == {"classification_stream"}
        for found, series in (
            (params["classification_stream"]["w"], weights),
            (params["attention_head"]["bias"], heads),
            (batch_stats["classification_stream"]["mean"], stats),
        ):
            assert_allclose(found, _average(series, decay), rtol=1e-5)
    assert (weights[-1], stats[-1]) == (38, 24)
    # After twelve steps, the start has a weight below 1e-3 with any decay.
    assert _average([1.0] + [0.0] * 12, decay) < 1e-3


def test_average_is_the_same_on_devices_and_in_several_steps_at_once():
    step, state = _counting_step(devices.all_mean)
    averaging_step = step_wrappers.average_weights(step, 0.9)
    batch = devices.split(_batch())
    run = devices.train_step(step_wrappers.run_steps(averaging_step))
    found, _ = run(jax.tree.map(jnp.array, state), [batch] * 3)
    alone = jax.jit(step_wrappers.average_weights(_counting_step()[0], 0.9))
    for _ in range(3):
        state, _ = alone(state, _batch())
    jax.tree.map(partial(assert_allclose, rtol=1e-6), found.average, state.average)
    assert found.average["params"]["classification_stream"]["w"][0] < 50


def test_average_skips_steps_with_nan():
    step, state = _counting_step()
    average = step_wrappers.average_weights(step, 0.9)
    run = jax.jit(step_wrappers.skip_non_finite(average))
    nan_batch = _batch() | {"label": np.full(8, -1, np.int32)}
    after, terms = run(state, nan_batch)
    assert np.isnan(terms["loss"])
    jax.tree.map(assert_array_equal, after.average, state.average)


def test_started_from_resets_the_average():
    _, state = _counting_step()
    other = jax.tree.map(lambda x: x + 1, (state.params, state.batch_stats))
    started = state.started_from(*other)
    jax.tree.map(
        assert_array_equal, started.average, train_step.prediction_variables(*other)
    )
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(started)]
    assert len(set(pointers)) == len(pointers)
    without = dataclasses.replace(started, average={}).started_from(*other)
    assert without.average == {}
    assert without.to_predict() == other


def test_options_that_are_off_add_nothing_to_state_and_metrics(tmp_path):
    """Options that are on do add arrays or metrics."""

    def traced(**changes):
        config = tiny_config.config(tmp_path, **changes)
        training = build.build_training(config, 5, steps_per_epoch=3)
        state = train_step.create_state(
            jax.random.key(0),
            training.network,
            training.optimizer,
            crop_px=32,
            averaged=config.optim.ema_decay > 0,
        )
        batch = devices.split({k: np.repeat(v, 2, 0) for k, v in _batch().items()})
        out = jax.eval_shape(training.step, state, batch)
        return len(jax.tree.leaves(out[0])), set(out[1])

    leaves, terms = traced()
    more, _ = traced(**{"optim.ema_decay": 0.9})
    assert more > leaves
    _, frozen_terms = traced(
        **{"optim.freeze_first_epochs": 1, "optim.freeze_period_epochs": 1}
    )
    assert frozen_terms - terms == {"stream_frozen"}
