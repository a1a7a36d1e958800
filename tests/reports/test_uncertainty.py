"""Intervals and tests, compared with published and hand-computed numbers."""

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
def test_wilson_interval_equals_published_values(successes, count, low, high):
    """Newcombe (1998), Table I, method 3."""
    found = uncertainty.wilson_interval(successes, count)
    assert found == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_ends_at_0_and_1():
    assert uncertainty.wilson_interval(0, 40).low == 0
    assert uncertainty.wilson_interval(40, 40).high == 1


@pytest.mark.parametrize(("successes", "count"), [(1, 0), (-1, 5), (6, 5)])
def test_wilson_interval_refuses_invalid_counts(successes, count):
    with pytest.raises(ValueError, match="must"):
        uncertainty.wilson_interval(successes, count)


def test_spread_equals_hand_computed_values():
    found = uncertainty.spread([0.80, 0.84, 0.85])
    assert found.mean == pytest.approx(0.83)
    # The deviations are -3, 1 and 2 hundredths; their sum of squares, 14, over 2 is 7.
    assert found.sd == pytest.approx(math.sqrt(7) / 100)
    assert found.interval is not None
    # 4.30265 is the 97.5 % quantile of t with 2 degrees of freedom.
    half = 4.30265 * math.sqrt(7) / 100 / math.sqrt(3)
    assert found.interval.low == pytest.approx(0.83 - half, abs=1e-6)
    assert found.interval.high == pytest.approx(0.83 + half, abs=1e-6)
    assert found.count == 3


def test_one_run_has_no_standard_deviation():
    assert uncertainty.spread([0.8]) == (0.8, None, 1, None)
    with pytest.raises(ValueError, match="no values"):
        uncertainty.spread([])


def test_mcnemar_equals_hand_computed_values():
    first = np.array([1, 1, 1, 0, 0, 0, 0, 0, 0, 1], bool)
    second = np.array([1, 1, 0, 1, 1, 1, 1, 1, 0, 1], bool)
    found = uncertainty.mcnemar(first, second)
    assert found[:4] == (3, 1, 5, 1)
    # One network is correct on 6 images: 2 * (C(6,0) + C(6,1)) / 2 ** 6.
    assert found.p == pytest.approx(2 * 7 / 64)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert uncertainty.mcnemar(second, first).p == pytest.approx(found.p)


def test_mcnemar_of_equal_results():
    correct = np.array([True, False, True])
    assert uncertainty.mcnemar(correct, correct) == (2, 0, 0, 1, 1.0)


def test_mcnemar_refuses_unpaired_results():
    with pytest.raises(ValueError, match="not those of paired results"):
        uncertainty.mcnemar(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="not those of paired results"):
        uncertainty.mcnemar(np.ones(0), np.ones(0))


def test_holm_equals_hand_computed_values():
    # 3 * 0.01; 2 * 0.03; 0.04, raised to the previous value.
    found = uncertainty.holm([0.04, 0.01, 0.03])
    assert found == pytest.approx([0.06, 0.03, 0.06])
    assert uncertainty.holm([0.9, 0.8]) == [1.0, 1.0]
    assert uncertainty.holm([]) == []
