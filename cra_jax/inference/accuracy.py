"""Accuracies and loss of a whole split."""

import numpy as np
from scipy.special import log_softmax


def classification_scores(
    logits: np.ndarray, labels: np.ndarray
) -> dict[str, float | int]:
    """Computes accuracies and loss of a whole split, each image counted once.

    Args:
      logits: ``[n, k]`` scores.
      labels: ``[n]`` classes.

    Returns:
      ``top1``, ``top5`` (top k for k < 5 classes) and ``mean_per_class`` (over the
      classes with images) as fractions, ``loss_cls1`` (mean cross-entropy) and
      ``count``. Of equal scores, the lower class ranks first.

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
    before = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > true_score) | ((logits == true_score) & before)).sum(1)
    correct = rank == 0
    log_probability = log_softmax(logits, axis=1)
    return {
        "top1": float(correct.mean()),
        "top5": float((rank < 5).mean()),
        "mean_per_class": float(
            np.mean([correct[labels == k].mean() for k in np.unique(labels)])
        ),
        "loss_cls1": -float(
            np.take_along_axis(log_probability, labels[:, None], 1).mean()
        ),
        "count": len(labels),
    }
