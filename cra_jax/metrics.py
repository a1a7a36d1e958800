"""Scores that are exact on ragged batches: sums and counts, divided once at the end."""

from collections.abc import Callable, Mapping

import jax
import numpy as np


class Mean:
    """The mean of named numbers over the steps since it was last taken.

    What is added may still be on its way from the device: it is fetched when the mean
    is taken, so that adding never waits.
    """

    def __init__(self) -> None:
        self._pending: list[Mapping[str, object]] = []

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, values: Mapping[str, object]) -> None:
        """Adds one step's numbers."""
        self._pending.append(values)

    def fetch(self) -> list[dict[str, float]]:
        """What was added since the last `take`, as floats: JSON for a checkpoint."""
        self._pending = [
            {name: float(value) for name, value in step.items()}
            for step in jax.device_get(self._pending)  # all copies at once
        ]
        return list(self._pending)  # pyright: ignore[reportReturnType]

    def take(
        self, keep: Callable[[Mapping[str, float]], bool] = lambda step: True
    ) -> dict[str, float]:
        """The mean of each number over what was added, which is then forgotten.

        Args:
          keep: which steps count; empty is the mean of none.
        """
        steps = [step for step in self.fetch() if keep(step)]
        self._pending = []
        return {
            name: float(np.mean([step[name] for step in steps], dtype=np.float64))
            for name in (steps[0] if steps else ())
        }


def classification_scores(
    logits: np.ndarray, labels: np.ndarray
) -> dict[str, float | int]:
    """Accuracies of a whole split, each picture counted once.

    Args:
      logits: ``[n, k]`` scores.
      labels: ``[n]`` classes.

    Returns:
      ``top1``, ``top5`` (top k where there are fewer classes), ``mean_per_class`` (over
      the classes that are present), all as fractions, ``loss_cls1`` (mean
      cross-entropy) and ``count``. Of equal scores the lower class comes first.

    Raises:
      ValueError: there is no picture, or a score is not finite.
    """
    logits = np.asarray(logits, np.float64)
    labels = np.asarray(labels)
    if not len(labels):
        raise ValueError("there are no pictures to score: the split is empty")
    if not np.isfinite(logits).all():
        bad = int(np.flatnonzero(~np.isfinite(logits).all(1))[0])
        raise ValueError(
            f"the scores of picture {bad} of the split are not finite: the checkpoint "
            "is of a run that diverged, or is damaged; evaluate an earlier one"
        )
    true_score = np.take_along_axis(logits, labels[:, None], 1)
    before = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > true_score) | ((logits == true_score) & before)).sum(1)
    correct = rank == 0
    shifted = logits - logits.max(1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
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
