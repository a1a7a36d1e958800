"""Accuracies compared with counts image by image."""

import numpy as np
import pytest

from cra_jax.inference import accuracy


def test_classification_scores_equal_counts_image_by_image():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(37, 9)), rng.integers(0, 8, 37)
    top1 = top5 = loss = 0
    per_class: dict[int, list[int]] = {}
    for scores, label in zip(logits, labels, strict=True):
        ranked = sorted(range(9), key=lambda k: -scores[k])
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
        per_class.setdefault(label, []).append(ranked[0] == label)
        loss -= scores[label] - np.log(sum(np.exp(s) for s in scores))
    found = accuracy.classification_scores(logits, labels)
    assert found["top1"] == pytest.approx(top1 / 37, abs=1e-15)
    assert found["top5"] == pytest.approx(top5 / 37, abs=1e-15)
    means = [np.mean(hits) for hits in per_class.values()]
    assert found["mean_per_class"] == pytest.approx(np.mean(means), abs=1e-15)
    assert found["loss_cls1"] == pytest.approx(loss / 37, rel=1e-12)
    assert found["count"] == 37


def test_mean_per_class_skips_classes_without_images():
    found = accuracy.classification_scores(np.eye(4)[[0, 1, 1]], np.array([0, 1, 3]))
    assert found["mean_per_class"] == pytest.approx((1 + 1 + 0) / 3)


def test_lower_class_is_predicted_for_equal_scores():
    logits = np.zeros((2, 7))
    found = accuracy.classification_scores(logits, np.array([0, 6]))
    assert (found["top1"], found["top5"]) == (0.5, 0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_scores_are_an_error(value):
    logits = np.zeros((3, 4))
    logits[1, 2] = value
    with pytest.raises(ValueError, match="image 1 of the split are not finite"):
        accuracy.classification_scores(logits, np.zeros(3, int))


def test_empty_split_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        accuracy.classification_scores(np.zeros((0, 4)), np.zeros(0, int))
