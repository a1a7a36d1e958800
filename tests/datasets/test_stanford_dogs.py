import pickle

import numpy as np
import pytest
import scipy.io

from cra_jax.datasets import sources
from tests.helpers.dataset_folders import DOGS, dogs_tree, labels, names


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"lists": ""},
        {
            "images": "images/Images",
            "lists": "",
            "boxes": "annotations/Annotation",
        },
    ],
    ids=str,
)
def test_dogs_is_read(layout, tmp_path):
    dogs_tree(tmp_path / "dogs", **layout)
    for path in (tmp_path, tmp_path / "dogs"):
        dataset = sources.load("dogs", path)
        assert dataset.class_names == DOGS
        assert labels(dataset, "train") == [0, 1, 0]
        assert labels(dataset, "test") == [1, 0]
        folder = layout.get("images", "Images")
        assert names(dataset, "test")[0] == f"{folder}/{DOGS[1]}/test_1.jpg"
        assert dataset.notes == ()
    record = pickle.loads(pickle.dumps(dataset.splits["train"][0]))
    assert record.box == pytest.approx((0.1, 0.1, 0.6, 0.5))  # the box around both dogs
    assert record.read(25).shape == (25, 50, 3)


def test_dogs_is_read_without_boxes(tmp_path):
    dataset = sources.load("dogs", dogs_tree(tmp_path, boxes=None))
    assert dataset.splits["train"][0].box is None
    assert dataset.notes == (f"no boxes: {tmp_path / 'Annotation'} is missing",)


@pytest.mark.parametrize("content", [None, "", "<annotation/>", "<a><bndbox/></a>"])
def test_missing_or_damaged_annotation_is_an_error(content, tmp_path):
    dogs_tree(tmp_path)
    file = tmp_path / "Annotation" / DOGS[0] / "train_1"
    file.unlink() if content is None else file.write_text(content)
    record = sources.load("dogs", tmp_path).splits["train"][0]
    with pytest.raises(ValueError, match=f"{file}: no boxes can be read from it"):
        _ = record.box


def test_wrong_dogs_lists_are_errors(tmp_path):
    dogs_tree(tmp_path)
    file = tmp_path / "lists" / "test_list.mat"
    listed = np.array(["n01-Chihuahua/test_2.jpg", "n02-Afghan_hound/test_1.jpg"])
    scipy.io.savemat(file, {"file_list": listed.astype(object), "labels": [2, 1]})
    with pytest.raises(ValueError, match=r"test_2\.jpg' has class 2, which is 'n02-Af"):
        sources.load("dogs", tmp_path)
    scipy.io.savemat(file, {"file_list": listed.astype(object), "labels": [1]})
    with pytest.raises(ValueError, match="2 files, but 1 labels"):
        sources.load("dogs", tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"no test_list\.mat; .*Kaggle leave out"):
        sources.load("dogs", tmp_path)
