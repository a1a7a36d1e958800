"""Accuracies and loss of a whole split."""

import numpy as np
from scipy.special import log_softmax

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
      ``top1``, ``top5`` (only for more than 5 classes) and ``mean_per_class`` (over the
      classes with images) as fractions, ``loss_cls1`` (mean cross-entropy), ``count``
      and, if there are any, ``tied_count``: images whose highest score several classes
      have.

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
        "loss_cls1": -float(
            np.take_along_axis(log_probability, labels[:, None], 1).mean()
        ),
        "count": len(labels),
        **({"tied_count": int(tied.sum())} if tied.any() else {}),
    }
