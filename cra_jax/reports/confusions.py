"""What of a test split is classified wrongly: pairs of classes, images put right."""

import collections
import dataclasses
from collections.abc import Sequence

from cra_jax.runtime.run_directory import Result


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two classes that are taken for each other.

    Attributes:
      labels: of both.
      wrong: how many images of each are taken for the other.
      count: how many images of each there are.
      examples: index of the image of each that is most surely taken for the other,
        or of its first where none is.
    """

    labels: tuple[int, int]
    wrong: tuple[int, int]
    count: tuple[int, int]
    examples: tuple[int, int]


def confused_pairs(results: Sequence[Result], *, most: int) -> list[Pair]:
    """The pairs that are confused most often, either way; of equals the lower first.

    A class without test images has none to show: its pairs are left out.
    """
    wrong = collections.Counter(
        (x.label, x.predicted) for x in results if x.label != x.predicted
    )
    count = collections.Counter(x.label for x in results)
    pairs = {
        (min(pair), max(pair)) for pair in wrong if count[pair[0]] * count[pair[1]]
    }
    ordered = sorted(pairs, key=lambda p: (-wrong[p] - wrong[p[1], p[0]], p))
    return [
        Pair(
            (a, b),
            (wrong[a, b], wrong[b, a]),
            (count[a], count[b]),
            (_example(results, a, b), _example(results, b, a)),
        )
        for a, b in ordered[:most]
    ]


def _example(results: Sequence[Result], label: int, other: int) -> int:
    own = [x for x in results if x.label == label]
    wrong = [x for x in own if x.predicted == other]
    return max(wrong, key=lambda x: x.confidence).index if wrong else own[0].index


def put_right(before: Sequence[Result], after: Sequence[Result]) -> list[int]:
    """Images that `before` has wrong and `after` right, of the same split."""
    return [
        y.index
        for x, y in zip(before, after, strict=True)
        if x.predicted != x.label and y.predicted == y.label
    ]


def alike(
    label: int, *, but: int, before: Sequence[Result], after: Sequence[Result]
) -> int | None:
    """Another image of a class, if there is one that both get right, then that."""
    own = [x.index for x in after if x.label == label and x.index != but]
    sure = [i for i in own if before[i].predicted == after[i].predicted == label]
    return next(iter(sure or own), None)
