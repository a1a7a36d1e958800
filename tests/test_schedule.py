"""Schedules compared with loops over the epochs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from cra_jax import schedule
from cra_jax.training import step_wrappers, train
from tests.oracles import equations

EPOCHS = range(240)  # beyond the fifth change of both schedules
SHORT = {"first_epochs": 3, "period_epochs": 2}


def steps_of(epoch, steps_per_epoch):
    """Returns the first and the last step of an epoch."""
    return epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch - 1


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 93])
def test_learning_rate_is_section_4_1(steps_per_epoch):
    rate = jax.jit(
        jax.vmap(lambda s: schedule.learning_rate(s, steps_per_epoch=steps_per_epoch))
    )
    steps = np.array([steps_of(epoch, steps_per_epoch) for epoch in EPOCHS])
    want = [equations.learning_rate(epoch) for epoch in EPOCHS]
    assert len(set(want)) == 6
    for edge in (0, 1):
        assert_allclose(rate(jnp.asarray(steps[:, edge])), want, rtol=1e-6)


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 93])
def test_restriction_weight_is_section_4_1(steps_per_epoch):
    weight = jax.jit(
        jax.vmap(
            lambda s: schedule.restriction_weight(s, steps_per_epoch=steps_per_epoch)
        )
    )
    steps = np.array([steps_of(epoch, steps_per_epoch) for epoch in EPOCHS])
    want = [equations.restriction_weight(epoch) for epoch in EPOCHS]
    for edge in (0, 1):
        assert_array_equal(weight(jnp.asarray(steps[:, edge])), want)


def test_schedules_of_140_epochs_equal_the_papers_numbers():
    def at(epoch):
        rate = schedule.learning_rate(epoch * 10, steps_per_epoch=10)
        weight = schedule.restriction_weight(epoch * 10, steps_per_epoch=10)
        return round(float(rate), 9), float(weight)

    assert at(0) == at(49) == (1e-3, 1.0)
    assert at(50) == at(94) == (1e-4, 0.0)
    assert at(95) == at(139) == (1e-5, 1.0)
    assert at(140) == (1e-6, 0.0)


def test_schedules_with_other_arguments_equal_the_oracles():
    for epoch in range(14):
        for step in steps_of(epoch, 5):
            rate = schedule.learning_rate(
                step, steps_per_epoch=5, base=0.4, factor=0.5, **SHORT
            )
            want = equations.learning_rate(epoch, base=0.4, factor=0.5, **SHORT)
            assert_allclose(rate, want, rtol=1e-6)
            weight = schedule.restriction_weight(step, steps_per_epoch=5, **SHORT)
            assert weight == equations.restriction_weight(epoch, **SHORT)


@pytest.mark.parametrize(
    "function",
    [schedule.learning_rate, schedule.restriction_weight, step_wrappers.is_frozen],
)
@pytest.mark.parametrize("step", [0, 14, 15, 24, 25, 400])
def test_number_and_traced_step_give_the_same_value(function, step):
    traced = jax.jit(lambda s: function(s, steps_per_epoch=5, **SHORT))
    number = function(step, steps_per_epoch=5, **SHORT)
    assert np.shape(number) == ()
    assert_allclose(number, traced(jnp.int32(step)), rtol=1e-6)


def test_restriction_weight_is_exact_after_many_steps():
    # In float32, a step above 2^24 would be rounded and the change shifted.
    change = 50 * 1_000_001
    for step, weight in ((change - 1, 1.0), (change, 0.0)):
        got = schedule.restriction_weight(step, steps_per_epoch=1_000_001)
        assert got == weight


def test_warm_up_rises_linearly_and_changes_no_later_step():
    warm = np.array(
        [
            schedule.learning_rate(
                step, steps_per_epoch=4, base=0.1, warmup_epochs=2, **SHORT
            )
            for step in range(32)
        ]
    )
    plain = np.array(
        [
            schedule.learning_rate(step, steps_per_epoch=4, base=0.1, **SHORT)
            for step in range(32)
        ]
    )
    assert 0 < warm[0] < 0.02
    assert_allclose(np.diff(warm[:8]), warm[1] - warm[0], rtol=1e-4)
    assert_allclose(warm[7], 0.1, rtol=1e-6)
    assert_array_equal(warm[8:], plain[8:])


def test_period_zero_keeps_the_restriction_weight_at_one():
    for step in (0, 50, 51, 10_000):
        weight = schedule.restriction_weight(step, steps_per_epoch=1, period_epochs=0)
        assert weight == 1


def test_dispatches_end_at_the_given_steps():
    def stops(first, total, most, *ends):
        runs = train.dispatches(first, total, most=most, ends=ends)
        assert [step for run in runs for step in run] == list(range(first, total))
        return [run.stop for run in runs]

    assert stops(0, 4, 1, 6) == [1, 2, 3, 4]
    assert stops(0, 12, 4, 6, 0) == [4, 6, 8, 12]
    assert stops(0, 12, 100, 5) == [5, 10, 12]
    assert stops(7, 12, 4, 6, 0) == [8, 12]  # the same ends as without an interruption
    assert stops(12, 12, 4, 6) == []


def test_n_cls_is_frozen_in_every_second_period_after_the_first_epochs():
    epochs = [
        [
            step_wrappers.is_frozen(step, steps_per_epoch=5, **SHORT)
            for step in steps_of(e, 5)
        ]
        for e in range(9)
    ]
    assert [first for first, _ in epochs] == [False] * 3 + [
        True,
        True,
        False,
        False,
    ] + [
        True,
        True,
    ]
    assert all(first == last for first, last in epochs)
    never = {"first_epochs": 0, "period_epochs": 0}
    assert not any(
        step_wrappers.is_frozen(step, steps_per_epoch=5, **never) for step in (0, 99)
    )


@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_cosine_learning_rate_ends_at_zero(warmup_epochs):
    lengths = {"steps_per_epoch": 7, "epochs": 20, "warmup_epochs": warmup_epochs}
    rate = jax.jit(lambda s: schedule.cosine_learning_rate(s, base=0.3, **lengths))
    got = [float(rate(jnp.int32(step))) for step in range(142)]
    want = [
        equations.cosine_learning_rate(step, 140, 0.3, 7 * warmup_epochs)
        for step in range(140)
    ]
    assert_allclose(got, [*want, 0, 0], atol=1e-7)
    assert got[7 * warmup_epochs] == pytest.approx(0.3) == pytest.approx(max(got))
    number = schedule.cosine_learning_rate(30, base=0.3, **lengths)
    assert np.asarray(number) == pytest.approx(got[30])
