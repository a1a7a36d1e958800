"""Confidence intervals, and tests of a difference."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # `scipy.stats` loads on first use, because it takes a second

LEVEL = 0.95
"""Confidence level of every interval in this project."""


class Interval(NamedTuple):
    """An interval, in the unit of its quantity."""

    low: float
    high: float


class Spread(NamedTuple):
    """Summary of a number over several runs.

    Attributes:
      mean: the mean.
      sd: sample standard deviation (n - 1 degrees of freedom); None for one run.
      count: number of runs.
      interval: Student's t interval of the mean; None for one run.
    """

    mean: float
    sd: float | None
    count: int
    interval: Interval | None


class Paired(NamedTuple):
    """Comparison of two networks on the same images.

    Attributes:
      both: number of images that both networks classify correctly.
      only_first: number of images that only the first network classifies correctly.
      only_second: number of images that only the second network classifies correctly.
      neither: number of images that both networks misclassify.
      p: two-sided p-value of the exact McNemar test.
    """

    both: int
    only_first: int
    only_second: int
    neither: int
    p: float

    @property
    def difference(self) -> float:
        """Accuracy of the second network minus accuracy of the first."""
        return (self.only_second - self.only_first) / sum(self[:4])


def wilson_interval(successes: int, count: int) -> Interval:
    """Wilson's score interval of a proportion, valid at 0 and 1 too.

    Raises:
      ValueError: `count` is below 1, or `successes` is not between 0 and `count`.

    Source: Wilson (1927).
    """
    if count < 1 or not 0 <= successes <= count:  # SciPy 1.18 returns NaN
        raise ValueError(
            f"{successes} of {count} is not a proportion: the count must be at least "
            "1, and the successes between 0 and the count"
        )
    test = scipy.stats.binomtest(successes, count)
    low, high = test.proportion_ci(LEVEL, method="wilson")
    return Interval(float(low), float(high))


def spread(values: Sequence[float]) -> Spread:
    """Mean, standard deviation, and Student's t interval of the mean.

    Raises:
      ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values: pass at least one")
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Spread(mean, None, 1, None)
    sd = float(np.std(values, ddof=1))
    half = float(scipy.stats.t.isf((1 - LEVEL) / 2, count - 1)) * sd / math.sqrt(count)
    return Spread(mean, sd, count, Interval(mean - half, mean + half))


def mcnemar(first_correct: np.ndarray, second_correct: np.ndarray) -> Paired:
    """Exact McNemar test of two networks on the same images.

    The test uses only the images that exactly one of the two networks classifies
    correctly. Under the null hypothesis, each network is the correct one with
    probability 1/2.

    Args:
      first_correct: ``[n]`` of bool.
      second_correct: ``[n]`` of bool, for the same images in the same order.

    Raises:
      ValueError: the numbers of images differ, or there are no images.

    Source: McNemar (1947), with the binomial distribution instead of its approximation.
    """
    first, second = np.asarray(first_correct, bool), np.asarray(second_correct, bool)
    if first.shape != second.shape or first.ndim != 1 or not first.size:
        raise ValueError(
            f"the shapes {first.shape} and {second.shape} are not those of paired "
            "results: pass two arrays [n] with n above 0"
        )
    only_first = int((first & ~second).sum())
    only_second = int((~first & second).sum())
    differ = only_first + only_second
    p = float(scipy.stats.binomtest(only_first, differ).pvalue) if differ else 1.0
    both = int((first & second).sum())
    return Paired(both, only_first, only_second, first.size - both - differ, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for multiple tests by Holm's step-down method.

    It is implemented here, because SciPy does not have it.

    Source: Holm (1979): the i-th smallest of m times m - i + 1, made monotone.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
