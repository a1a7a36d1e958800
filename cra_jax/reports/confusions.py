"""Misclassified test images: confused pairs of classes, and corrected images."""

import collections
import dataclasses
from collections.abc import Sequence

from cra_jax.runtime.run_directory import Result


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two classes that the network confuses.

    Attributes:
      labels: the two classes.
      confused: for each class, the number of its images that are predicted as the
        other class.
      counts: for each class, the number of its images.
      examples: for each class, the index of the image that is predicted as the other
        class with the highest confidence; the first image of the class if none is.
    """

    labels: tuple[int, int]
    confused: tuple[int, int]
    counts: tuple[int, int]
    examples: tuple[int, int]


def most_confused_pairs(results: Sequence[Result], *, max_pairs: int) -> list[Pair]:
    """The pairs of classes with the most confusions, counted in both directions.

    Pairs with equally many confusions are ordered by label. A pair is left out if one
    of its classes has no test image.

    Args:
      results: of a test split.
      max_pairs: upper limit of the number of pairs.
    """
    confused = collections.Counter(
        (x.label, x.predicted) for x in results if x.label != x.predicted
    )
    counts = collections.Counter(x.label for x in results)
    pairs = {
        (min(pair), max(pair)) for pair in confused if counts[pair[0]] * counts[pair[1]]
    }
    ordered = sorted(pairs, key=lambda p: (-confused[p] - confused[p[1], p[0]], p))
    return [
        Pair(
            (a, b),
            (confused[a, b], confused[b, a]),
            (counts[a], counts[b]),
            (_example(results, a, b), _example(results, b, a)),
        )
        for a, b in ordered[:max_pairs]
    ]


def _example(results: Sequence[Result], label: int, other: int) -> int:
    """Index of the image of a class that is predicted as `other` most confidently."""
    of_class = [x for x in results if x.label == label]
    confused = [x for x in of_class if x.predicted == other]
    if not confused:
        return of_class[0].index
    return max(confused, key=lambda x: x.confidence).index


def corrected_images(before: Sequence[Result], after: Sequence[Result]) -> list[int]:
    """Indices of the images that are wrong in `before` and correct in `after`.

    Args:
      before: of a test split.
      after: of the same test split.
    """
    return [
        y.index
        for x, y in zip(before, after, strict=True)
        if x.predicted != x.label and y.predicted == y.label
    ]


def another_image(
    label: int, *, exclude: int, before: Sequence[Result], after: Sequence[Result]
) -> int | None:
    """Another image of a class, preferably one that both runs classify correctly.

    Args:
      label: the class.
      exclude: index of an image that is not returned.
      before: of a test split.
      after: of the same test split.

    Returns:
      The index of the image; None if the class has no other image.
    """
    others = [x.index for x in after if x.label == label and x.index != exclude]
    correct = [i for i in others if before[i].predicted == after[i].predicted == label]
    return next(iter(correct or others), None)
