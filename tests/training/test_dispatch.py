"""The loop hands out steps and never waits for one, but to log, to score or to save."""

import traceback
from typing import Any

import jax
import pytest

from cra_jax.training import train
from tests.helpers import tiny_config

WAITS = {"_log_window", "_evaluate", "_save", "_record_first_attention"}


@pytest.fixture
def reads(monkeypatch):
    """Who reads an array's numbers on the host, as names of functions, in order."""
    found: list[list[str]] = []
    array: Any = type(jax.numpy.zeros(()))
    value = array._value

    def seen(self):
        # Names alone: looking up lines of source is slow.
        found.append([f.f_code.co_name for f, _ in traceback.walk_stack(None)])
        return value.fget(self)

    monkeypatch.setattr(array, "_value", property(seen))
    return found


def test_a_read_is_seen(reads):
    float(jax.numpy.ones(()) + 1)
    assert [stack[0] for stack in reads] == ["test_a_read_is_seen"]


def test_the_loop_waits_for_no_step(tmp_path, reads):
    config = tiny_config.config(tmp_path / "cache")
    config.train.log_every_steps = 3
    config.model.kind = "baseline"
    train.run(config, tmp_path / "run")
    inside = [set(stack) for stack in reads if "_train" in stack]
    assert inside
    early = [stack for stack in inside if not stack & WAITS]
    assert not early
