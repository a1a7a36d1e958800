"""The training loop waits for a step only to log, to evaluate or to save."""

import sys
import traceback
from typing import Any

import jax
import pytest

from cra_jax.training import train
from tests.helpers import tiny_config

WAITS = {"_log_window", "_evaluate", "_save", "_record_first_attention"}


@pytest.fixture
def reads(monkeypatch):
    """Records the call stack of each read of an array on the host."""
    found: list[list[str]] = []
    array: Any = type(jax.numpy.zeros(()))
    value = array._value

    def record(self):
        # Only names, because looking up source lines is slow. The frame is given,
        # because which frames `walk_stack(None)` omits depends on the Python version.
        stack = traceback.walk_stack(sys._getframe())
        found.append([frame.f_code.co_name for frame, _ in stack])
        return value.fget(self)

    monkeypatch.setattr(array, "_value", property(record))
    return found


def test_read_of_an_array_is_recorded(reads):
    float(jax.numpy.ones(()) + 1)
    (stack,) = reads
    caller = stack.index("test_read_of_an_array_is_recorded")
    assert set(stack[:caller]) <= {"record", "__float__"}


def test_training_loop_waits_for_no_step(tmp_path, reads):
    config = tiny_config.config(tmp_path / "cache")
    config.train.log_every_steps = 3
    config.model.kind = "baseline"
    train.run(config, tmp_path / "run")
    in_loop = [set(stack) for stack in reads if "_train" in stack]
    assert in_loop
    unexpected = [stack for stack in in_loop if not stack & WAITS]
    assert not unexpected
