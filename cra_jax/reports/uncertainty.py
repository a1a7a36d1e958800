"""How sure a number is: intervals, and tests of a difference."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # `scipy.stats` loads on first use, because it takes a second

LEVEL = 0.95
"""Confidence of every interval that this project prints."""


class Interval(NamedTuple):
    """From `low` to `high`, in the unit of what it is an interval of."""

    low: float
    high: float


class Spread(NamedTuple):
    """Numbers of several runs, in short.

    Attributes:
      mean: their mean.
      sd: their standard deviation (of a sample: n - 1); None for one number.
      count: how many.
      interval: of the mean, by Student's t; None for one number.
    """

    mean: float
    sd: float | None
    count: int
    interval: Interval | None


class Paired(NamedTuple):
    """Two networks on the same images.

    Attributes:
      both: images that both get right.
      only_first: that the first alone gets right.
      only_second: that the second alone gets right.
      neither: that both get wrong.
      p: of the exact McNemar test, two-sided.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p: float

    @property
    def difference(self) -> float:
        """Accuracy of the second less that of the first."""
        return (self.only_second - self.only_first) / sum(self[:4])


def wilson(successes: int, count: int) -> Interval:
    """The score interval of a proportion, of use at 0 and at 1 as well.

    Raises:
      ValueError: `count` is below 1, or `successes` is not between 0 and `count`.

    Source: Wilson (1927).
    """
    if count < 1 or not 0 <= successes <= count:  # scipy 1.18 answers NaN
        raise ValueError(
            f"{successes} of {count} is no proportion: the count must be at least 1, "
            "and the successes between 0 and the count"
        )
    test = scipy.stats.binomtest(successes, count)
    low, high = test.proportion_ci(LEVEL, method="wilson")
    return Interval(float(low), float(high))


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation, and Student's interval of the mean.

    Raises:
      ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values to take the mean of")
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Spread(mean, None, 1, None)
    sd = float(np.std(values, ddof=1))
    half = float(scipy.stats.t.isf((1 - LEVEL) / 2, count - 1)) * sd / math.sqrt(count)
    return Spread(mean, sd, count, Interval(mean - half, mean + half))


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> Paired:
    """Whether two networks differ on the same images: the exact test.

    Images that both get right, or both wrong, say nothing about a difference; among
    the others, either is as likely to be right where there is none.

    Args:
      first_right: ``[n]`` of bool.
      second_right: ``[n]`` of bool, the same images in the same order.

    Raises:
      ValueError: the numbers of images differ, or there are none.

    Source: McNemar (1947), with the binomial in place of its approximation.
    """
    first, second = np.asarray(first_right, bool), np.asarray(second_right, bool)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(
            f"no pairs of images: {first.shape} answers and {second.shape}"
        )
    only_first = int((first & ~second).sum())
    only_second = int((~first & second).sum())
    differ = only_first + only_second
    p = float(scipy.stats.binomtest(only_first, differ).pvalue) if differ else 1.0
    both = int((first & second).sum())
    return Paired(both, only_first, only_second, first.size - both - differ, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several tests, adjusted so that one limit holds for all of them.

    By hand, because scipy has no such adjustment.

    Source: Holm (1979): the i-th smallest of m times m - i + 1, made monotone.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
