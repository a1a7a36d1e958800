"""Tests of counted and compiled memory."""

import jax
import pytest

from benchmarks import memory
from tests.helpers import tiny_config


def _step(tmp_path, **changes):
    return memory.one_device_step(
        tiny_config.config(tmp_path, **changes), num_classes=5
    )


def test_activations_depend_on_the_settings(tmp_path):
    plain = memory.count_kept(_step(tmp_path))
    twice = memory.count_kept(_step(tmp_path, **{"train.batch_size": 32}))
    parts = memory.count_kept(_step(tmp_path, **{"train.accumulate": 2}))
    again = memory.count_kept(_step(tmp_path, **{"model.remat": True}))
    assert twice == pytest.approx(2 * plain, rel=0.05)
    assert parts == pytest.approx(plain / 2, rel=0.05)
    assert again < 0.5 * plain


def test_the_state_has_parameters_momentum_and_gradient(tmp_path):
    step = _step(tmp_path)
    parameters = memory.size(step.state.params)
    counted = memory.count_state(step)
    rest = memory.size(step.batch) + memory.size(step.state.batch_stats)
    assert counted == pytest.approx(3 * parameters + rest, abs=100)
    assert memory.count_state(
        _step(tmp_path, **{"train.accumulate": 2})
    ) == pytest.approx(4 * parameters + rest, abs=100)


def test_compiled_memory(tmp_path):
    step = _step(tmp_path, **{"model.kind": "baseline", "model.width": 4})
    peak = memory.compile_and_measure(step, jax.local_devices()[0])
    assert peak > memory.size(step.state) + memory.size(step.batch)
    assert peak < 10 * (memory.count_state(step) + memory.count_kept(step))
