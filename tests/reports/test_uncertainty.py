"""Intervals and tests against published and hand-worked figures."""

import math

import numpy as np
import pytest

from cra_jax.reports import uncertainty


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_as_published(successes, count, low, high):
    """Newcombe (1998), Table I, method 3."""
    found = uncertainty.wilson(successes, count)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_wilson_ends_at_0_and_1():
    assert uncertainty.wilson(0, 40).low == 0
    assert uncertainty.wilson(40, 40).high == 1


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(successes, count):
    with pytest.raises(ValueError, match="must"):
        uncertainty.wilson(successes, count)


def test_spread_by_hand():
    found = uncertainty.spread([0.80, 0.84, 0.85])
    assert found.mean == pytest.approx(0.83)
    # Deviations -3, 1, 2 in hundredths: sum of squares 14, over 2.
    assert found.sd == pytest.approx(math.sqrt(7) / 100)
    assert found.interval is not None
    # t of 2 degrees of freedom at 97.5 %, from any table.
    half = 4.30265 * math.sqrt(7) / 100 / math.sqrt(3)
    assert found.interval.low == pytest.approx(0.83 - half, abs=1e-6)
    assert found.interval.high == pytest.approx(0.83 + half, abs=1e-6)
    assert found.count == 3


def test_one_run_has_no_spread():
    assert uncertainty.spread([0.8]) == (0.8, None, 1, None)
    with pytest.raises(ValueError, match="no values"):
        uncertainty.spread([])


def test_mcnemar_by_hand():
    first = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 1], bool)
    second = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 1], bool)
    found = uncertainty.mcnemar(first, second)
    assert found[:4] == (3, 1, 5, 1)
    # 6 images differ: 2 * (C(6,0) + C(6,1)) / 2 ** 6.
    assert found.p == pytest.approx(2 * 7 / 64)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert uncertainty.mcnemar(second, first).p == pytest.approx(found.p)


def test_mcnemar_of_the_same_answers():
    right = np.array([True, False, True])
    assert uncertainty.mcnemar(right, right) == (2, 0, 0, 1, 1.0)


def test_mcnemar_refuses_other_images():
    with pytest.raises(ValueError, match="no pairs"):
        uncertainty.mcnemar(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="no pairs"):
        uncertainty.mcnemar(np.ones(0), np.ones(0))


def test_holm_by_hand():
    # 3 * .01, 2 * .03, and .04 raised to the one before it.
    found = uncertainty.holm([0.04, 0.01, 0.03])
    assert found == pytest.approx([0.06, 0.03, 0.06])
    assert uncertainty.holm([0.9, 0.8]) == [1.0, 1.0]
    assert uncertainty.holm([]) == []
