"""Accuracies and loss of a whole split."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import log_softmax
from scipy.stats import binomtest

_TOP = 5


def classification_scores(
    logits: np.ndarray, labels: np.ndarray
) -> dict[str, float | int]:
    """Computes accuracies and loss of a whole split, each image counted once.

    If several classes have the same score, an accuracy is the expectation over a random
    order of these classes: a network whose scores are all equal is right by chance.

    Args:
      logits: ``[n, k]`` scores.
      labels: ``[n]`` classes.

    Returns:
      ``top1``, ``top5`` (only for more than 5 classes), ``mean_per_class`` (over the
      classes with images) and ``chance`` (the top1 of always predicting the class with
      the most images) as fractions, ``loss_cls1`` (mean cross-entropy), ``count`` and,
      if there are any, ``tied_count``: images whose highest score several classes have.

    Raises:
      ValueError: the split is empty, or a score is not finite.
    """
    logits = np.asarray(logits, np.float64)
    labels = np.asarray(labels)
    if not len(labels):
        raise ValueError("the split is empty: choose one with images")
    if not np.isfinite(logits).all():
        bad = int(np.flatnonzero(~np.isfinite(logits).all(1))[0])
        raise ValueError(
            f"the scores of image {bad} of the split are not finite, because the run "
            "diverged or the checkpoint is damaged: evaluate an earlier checkpoint"
        )
    true_score = np.take_along_axis(logits, labels[:, None], 1)
    higher, equal = (logits > true_score).sum(1), (logits == true_score).sum(1)
    correct = np.clip((1 - higher) / equal, 0, 1)
    log_probability = log_softmax(logits, axis=1)
    top5, tied = {}, (logits == logits.max(1, keepdims=True)).sum(1) > 1
    if logits.shape[1] > _TOP:
        top5 = {"top5": float(np.clip((_TOP - higher) / equal, 0, 1).mean())}
    return {
        "top1": float(correct.mean()),
        **top5,
        "mean_per_class": float(
            np.mean([correct[labels == k].mean() for k in np.unique(labels)])
        ),
        "chance": float(np.bincount(labels).max() / len(labels)),
        "loss_cls1": -float(
            np.take_along_axis(log_probability, labels[:, None], 1).mean()
        ),
        "count": len(labels),
        **({"tied_count": int(tied.sum())} if tied.any() else {}),
    }


def describe_chance(scores: Mapping[str, Any]) -> str:
    """A warning if a split's top1 may be that of guessing; else empty.

    Args:
      scores: result of `classification_scores`; ``chance`` is missing in lines of older
        versions, which give no warning.
    """
    if "chance" not in scores:
        return ""
    top1, chance, count = scores["top1"], scores["chance"], scores["count"]
    test = binomtest(round(top1 * count), count)
    if test.proportion_ci(0.95, method="wilson").low > chance:
        return ""
    return (
        f"top-1 {100 * top1:.1f} % of {count} images is no better than guessing: the "
        f"most frequent class alone gives {100 * chance:.1f} %, which is within the "
        "95 % interval; check the labels, train longer, or change optim.base_lr"
    )
