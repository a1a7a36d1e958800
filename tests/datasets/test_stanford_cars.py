import csv

import pytest

from cra_jax.datasets import sources
from tests.helpers.dataset_folders import (
    CAR_LABELS,
    CARS,
    car_rows,
    devkit_tree,
    labels,
    names,
    save_image,
    save_mat,
)


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"test_labels": "devkit"},
        {"kit": "", "nested": True},
        {"kit": "car_devkit/devkit", "nested": True},
    ],
    ids=str,
)
def test_cars_with_devkit_is_read(layout, tmp_path):
    devkit_tree(tmp_path / "stanford_cars", **layout)
    for path in (tmp_path, tmp_path / "stanford_cars"):
        dataset = sources.load("cars", path)
        assert dataset.name == "cars"
        assert dataset.class_names == CARS
        assert labels(dataset, "train") == [2, 0, 1, 0]
        assert labels(dataset, "test") == [1, 2]
        folder = "cars_test/cars_test" if layout.get("nested") else "cars_test"
        assert names(dataset, "test") == [f"{folder}/00001.jpg", f"{folder}/00002.jpg"]
        (note,) = dataset.notes
        assert note.startswith("'test' has no images of 1 of the 3 classes")
    record = dataset.splits["train"][0]
    assert record.box == pytest.approx((0.1, 0, 0.6, 0.5))
    assert record.read(25).shape == (25, 50, 3)


def test_cars_without_test_labels_is_an_error_that_names_the_file(tmp_path):
    devkit_tree(tmp_path, test_labels=None)
    missing = tmp_path / "cars_test_annos_withlabels.mat"
    with pytest.raises(
        ValueError, match=f"{missing}: this file is missing; put it there"
    ):
        sources.load("cars", tmp_path)
    save_mat(tmp_path / "cars_annos.mat", "annotations", [{"a": 1}])
    with pytest.raises(
        ValueError, match=r"cars_annos\.mat cannot replace it: it numbers"
    ):
        sources.load("cars", tmp_path)


def test_test_list_without_labels_is_an_error(tmp_path):
    devkit_tree(tmp_path)
    unlabelled = tmp_path / "devkit" / "cars_test_annos.mat"
    unlabelled.replace(tmp_path / "cars_test_annos_withlabels.mat")
    with pytest.raises(ValueError, match="its annotations lack class; is it another"):
        sources.load("cars", tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 20, None])
def test_damaged_mat_file_is_an_error(content, tmp_path):
    file = devkit_tree(tmp_path) / "devkit" / "cars_train_annos.mat"
    file.write_bytes(file.read_bytes()[:150] if content is None else content)
    with pytest.raises(
        ValueError, match=r"cars_train_annos\.mat: no 'annotations' can"
    ):
        sources.load("cars", tmp_path)


def test_cars_label_out_of_range_is_an_error(tmp_path):
    devkit_tree(tmp_path)
    rows = car_rows("train")
    rows[1]["class"] = 4
    save_mat(tmp_path / "devkit" / "cars_train_annos.mat", "annotations", rows)
    with pytest.raises(ValueError, match=r"annos\.mat: class 4 is not one of the 3"):
        sources.load("cars", tmp_path)


def test_unlisted_images_are_noted_and_missing_images_are_an_error(tmp_path):
    devkit_tree(tmp_path)
    save_image(tmp_path / "cars_test" / "00009.jpg")
    note, _ = sources.load("cars", tmp_path).notes
    assert note.startswith("1 images not listed: ")
    (tmp_path / "cars_test" / "00002.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 listed images are missing: .*00002\.jpg"):
        sources.load("cars", tmp_path)


def test_cars_in_one_directory_is_read(tmp_path):
    train = car_rows("train", "relative_im_path", "car_ims/", first=1)
    test = car_rows("test", "relative_im_path", "car_ims/", first=5)
    rows = [{**row, "test": 0} for row in train] + [{**row, "test": 1} for row in test]
    save_mat(tmp_path / "cars_annos.mat", "annotations", rows)
    for row in rows:
        save_image(tmp_path / row["relative_im_path"], size=(100, 50))

    dataset = sources.load("cars", tmp_path)
    assert dataset.class_names == CARS
    assert labels(dataset, "train") == [2, 0, 1, 0]
    assert labels(dataset, "test") == [1, 2]
    assert names(dataset, "test") == ["car_ims/00005.jpg", "car_ims/00006.jpg"]
    assert dataset.splits["test"][0].box == pytest.approx((0.1, 0, 0.6, 0.5))

    (tmp_path / "cars_annos.mat").unlink()
    with pytest.raises(ValueError, match=r"cars_annos\.mat: this file is missing"):
        sources.load("cars", tmp_path)


def test_cars_in_class_directories_is_read(tmp_path):
    safe = [name.replace("/", "-") for name in CARS]
    for split, numbers in CAR_LABELS.items():
        for i, number in enumerate(numbers, 1):
            folder = tmp_path / "car_data" / "car_data" / split / safe[number - 1]
            save_image(folder / f"{i:05d}.jpg", size=(100, 50))
        with (tmp_path / f"anno_{split}.csv").open("w", newline="") as file:
            for i, number in enumerate(numbers, 1):
                csv.writer(file).writerow([f"{i:05d}.jpg", 10 + i, 1, 60, 25, number])

    for path in (tmp_path, tmp_path / "car_data", tmp_path / "car_data" / "car_data"):
        dataset = sources.load("cars", path)
        assert dataset.name == "cars"
        assert dataset.class_names == tuple(safe)
        assert labels(dataset, "train") == [0, 0, 1, 2]
        assert labels(dataset, "test") == [1, 2]
        has_boxes = [record.box is not None for record in dataset.splits["train"]]
        assert has_boxes == [path == tmp_path] * 4  # the lists are next to car_data/
    dataset = sources.load("cars", tmp_path)
    assert dataset.splits["train"][0].box == pytest.approx((0.11, 0, 0.6, 0.5))

    (tmp_path / "anno_test.csv").write_text("fname,x1,y1,x2,y2,label\n")
    with pytest.raises(
        ValueError, match=r"anno_test\.csv: 'fname,x1,y1,x2,y2,label' is"
    ):
        sources.load("cars", tmp_path)
