"""Accuracies compared with counts image by image."""

import numpy as np
import pytest

from cra_jax.inference import accuracy
from cra_jax.runtime import training_log


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


@pytest.mark.parametrize("labels", [[0, 0], [0, 6], [6, 6]])
def test_equal_scores_are_right_by_chance(labels):
    found = accuracy.classification_scores(np.zeros((2, 7)), np.array(labels))
    wanted = {"top1": 1 / 7, "top5": 5 / 7, "mean_per_class": 1 / 7, "tied_count": 2}
    assert {name: found[name] for name in wanted} == pytest.approx(wanted)
    shown = training_log.describe_scores(found)
    assert "top-1 14.3 %" in shown
    assert "(warning: of 2 images, several classes have the highest score)" in shown


def test_equal_scores_share_the_ranks_that_they_take():
    logits = np.array([[3.0, 2, 2, 2, 1, 1, 1, 0], [3.0, 3, 2, 1, 0, 0, 0, 0]])
    for labels, top1, top5 in (
        ([1, 0], [0, 1 / 2], [1, 1]),
        ([4, 4], [0, 0], [1 / 3, 1 / 4]),
        ([7, 3], [0, 0], [0, 1]),
    ):
        found = accuracy.classification_scores(logits, np.array(labels))
        assert found["top1"] == pytest.approx(np.mean(top1))
        assert found["top5"] == pytest.approx(np.mean(top5))
        assert found["tied_count"] == 1


def test_top5_is_left_out_for_at_most_five_classes():
    for classes, there in ((3, False), (5, False), (6, True)):
        found = accuracy.classification_scores(np.eye(classes), np.arange(classes))
        assert ("top5" in found) == there
        assert "tied_count" not in found
        assert ("top-5" in training_log.describe_scores(found)) == there


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_scores_are_an_error(value):
    logits = np.zeros((3, 4))
    logits[1, 2] = value
    with pytest.raises(ValueError, match="image 1 of the split are not finite"):
        accuracy.classification_scores(logits, np.zeros(3, int))


def test_empty_split_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        accuracy.classification_scores(np.zeros((0, 4)), np.zeros(0, int))


@pytest.mark.parametrize(
    ("right", "count", "chance", "warned"),
    [
        (14, 48, 1 / 3, True),
        (20, 48, 1 / 3, True),  # 42 %, 95 % interval from 29 %
        (30, 48, 1 / 3, False),
        (80, 100, 0.9, True),  # less than the most frequent class
        (99, 100, 0.9, False),
        (3, 5, 0.2, False),
        (2, 5, 0.2, True),
    ],
)
def test_scores_of_guessing_give_a_warning(right, count, chance, warned):
    scores = {"top1": right / count, "count": count, "chance": chance}
    assert bool(accuracy.describe_chance(scores)) == warned
    del scores["chance"]  # of an older version
    assert not accuracy.describe_chance(scores)


def test_chance_is_the_share_of_the_most_frequent_class():
    logits, labels = np.eye(4)[[0, 1, 1, 2]], np.array([1, 1, 3, 1])
    assert accuracy.classification_scores(logits, labels)["chance"] == 0.75
