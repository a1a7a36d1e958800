import os
import pickle

import numpy as np
import pytest
from PIL import Image

from cra_jax.datasets import sources
from tests.helpers.dataset_folders import (
    CUB_FILES,
    cub_parts,
    cub_tree,
    labels,
    nabirds_tree,
    names,
    save_image,
)


def test_cub_is_read(tmp_path):
    cub_tree(tmp_path / "CUB_200_2011")
    for path in (tmp_path, str(tmp_path / "CUB_200_2011")):
        dataset = sources.load("cub", path)
        assert dataset.class_names == ("001.Wren", "002.Tit")
        assert names(dataset, "train") == [f"images/{CUB_FILES[i]}" for i in (0, 3)]
        assert names(dataset, "test") == [f"images/{CUB_FILES[i]}" for i in (1, 2)]
        assert labels(dataset, "train") == labels(dataset, "test") == [0, 1]
        assert dataset.notes == ()
    record = pickle.loads(pickle.dumps(dataset.splits["train"][0]))
    assert record.box == pytest.approx((0.1, 0.1, 0.6, 0.5))
    assert record.read(25).shape == (25, 50, 3)


def test_cub_is_read_without_boxes_and_unlisted_images_are_noted(tmp_path):
    cub_tree(tmp_path, boxes=False)
    save_image(tmp_path / "images/001.Wren/w3.jpg")
    dataset = sources.load("cub", tmp_path)
    assert dataset.splits["train"][0].box is None
    assert len(dataset.notes) == 1
    assert dataset.notes[0].startswith("1 images not listed: ")
    assert dataset.notes[0].endswith("w3.jpg")


def test_cub_with_gaps_in_its_class_numbers_is_read(tmp_path):
    cub_tree(
        tmp_path,
        classes="17 017.Tit\n9 009.Wren\n",
        image_class_labels="1 9\n2 9\n3 17\n4 17\n",
    )
    dataset = sources.load("cub", tmp_path)
    assert dataset.class_names == ("009.Wren", "017.Tit")
    assert labels(dataset, "train") == [0, 1]


WRONG_LISTS = {
    "no labels": ({"image_class_labels": ""}, r"labels\.txt: this file is missing"),
    "no classes": ({"classes": ""}, r"classes\.txt: this file is missing"),
    "one label short": (
        {"image_class_labels": "1 1\n2 1\n3 2\n"},
        r"labels\.txt: 3 ids, but images\.txt has 4; not in both: 4",
    ),
    "one split too many": (
        {"train_test_split": "1 1\n2 0\n3 0\n4 1\n5 1\n"},
        r"split\.txt: 5 ids, but images\.txt has 4; not in both: 5",
    ),
    "unknown class": (
        {"image_class_labels": "1 1\n2 1\n3 2\n4 3\n"},
        r"image 4 has class '3'.*must be in classes\.txt",
    ),
    "odd split": (
        {"train_test_split": "1 1\n2 0\n3 2\n4 1\n"},
        r"image 3 .* split '2'.*the split 0 or 1",
    ),
    "odd box": (
        {"bounding_boxes": "1 1 1 5 5\n2 1 1 x 5\n3 1 1 5 5\n4 1 1 5 5\n"},
        r"image 2 .* box '1 1 x 5'.*four numbers",
    ),
    "doubled id": (
        {"train_test_split": "1 1\n2 0\n2 0\n4 1\n"},
        r"split\.txt, line 3: '2 0' is not a new id",
    ),
    "half a line": (
        {"classes": "1 001.Wren\n2\n"},
        r"classes\.txt, line 2: '2' is not",
    ),
    "doubled class": ({"classes": "1 Tit\n2 Tit\n"}, "class names listed .*: Tit"),
    "doubled image": (
        {"images": "".join(f"{i} {CUB_FILES[i // 3]}\n" for i in range(1, 5))},
        r"images listed more than once: images/001\.Wren/w1\.jpg",
    ),
    "class never trained": (
        {"train_test_split": "1 1\n2 1\n3 0\n4 0\n"},
        r"1 classes have no training image: 002\.Tit",
    ),
    "no test": ({"train_test_split": "1 1\n2 1\n3 1\n4 1\n"}, "'test' has no images"),
}


@pytest.mark.parametrize("case", WRONG_LISTS)
def test_wrong_cub_lists_are_errors(case, tmp_path):
    changes, message = WRONG_LISTS[case]
    with pytest.raises(ValueError, match=message) as caught:
        sources.load("cub", cub_tree(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)


def test_missing_images_are_an_error_with_their_count_and_names(tmp_path):
    cub_tree(tmp_path)
    for file in (CUB_FILES[0], CUB_FILES[2]):
        (tmp_path / "images" / file).unlink()
    with pytest.raises(
        ValueError, match=r"2 listed images are missing: .*w1\.jpg, .*t1"
    ):
        sources.load("cub", tmp_path)


def test_load_opens_no_image(tmp_path):
    cub_tree(tmp_path)
    for file in CUB_FILES:
        (tmp_path / "images" / file).write_bytes(b"not an image")
    record = sources.load("cub", tmp_path).splits["train"][0]
    for use in (lambda: record.box, lambda: record.read(32)):
        with pytest.raises(ValueError, match=r"w1\.jpg: not an image"):
            use()


def read_rectangle(folder, orientation, columns):
    """Saves a white rectangle in rows 8 to 16 as the first image of `folder`.

    Returns its record, and where the image is white as it is read.
    """
    pixels = np.zeros((48, 80, 3), np.uint8)
    pixels[8:16, slice(*columns)] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = folder / "images" / CUB_FILES[0]
    Image.fromarray(pixels).save(file, exif=exif, quality=100)
    record = sources.load("cub", folder).splits["train"][0]
    return record, record.read(48)[..., 0] > 128


# The stored image has a white rectangle in its top left quarter.
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_rotate_with_the_image(orientation, tmp_path):
    cub_tree(tmp_path, bounding_boxes="".join(f"{i} 8 8 24 8\n" for i in range(1, 5)))
    record, seen = read_rectangle(tmp_path, orientation, (8, 32))
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    height, width = seen.shape
    assert record.box == pytest.approx(
        (
            columns[0] / width,
            rows[0] / height,
            (columns[-1] + 1) / width,
            (rows[-1] + 1) / height,
        )
    )


def test_boxes_of_cropped_long_images_are_cropped_and_clipped(tmp_path):
    cub_tree(
        tmp_path,
        bounding_boxes="1 950 0 100 5\n2 0 0 10 5\n3 -5 -5 20 20\n4 90 40 13 12\n",
    )
    for file in CUB_FILES[:2]:
        save_image(tmp_path / "images" / file, size=(2000, 10))
    dataset = sources.load("cub", tmp_path)
    long, corner = dataset.splits["train"]
    outside, edge = dataset.splits["test"]
    assert long.box == pytest.approx((0, 0, 1, 0.5))
    assert corner.box == pytest.approx((0.9, 0.8, 1, 1))
    assert outside.box is None  # in the end that is cropped
    assert edge.box == pytest.approx((0, 0, 0.15, 0.3))


def test_parts_are_the_visible_ones_and_the_middle_of_the_head(tmp_path):
    lines = (
        *("1 1 20 10 1", "1 2 40 20.0 1", "1 3 100.0 50.0 1"),
        *("2 1 0 0 0", "2 2 50 30 1", "2 3 0.0 0.0 0"),
        *("3 1 0 0 0", "3 2 0 0 0", "3 3 10 10 1"),
        *("4 1 0 0 0", "4 2 0 0 0", "4 3 0 0 0"),
    )
    dataset = sources.load("cub", cub_tree(tmp_path, **cub_parts(*lines)))
    first, last = pickle.loads(pickle.dumps(dataset.splits["train"]))
    second, third = dataset.splits["test"]
    assert first.parts == {
        "beak": pytest.approx((0.2, 0.2)),
        "left eye": pytest.approx((0.4, 0.4)),
        "tail": pytest.approx((1, 1)),
        "head": pytest.approx((0.3, 0.3)),
    }
    assert second.parts == {
        "left eye": pytest.approx((0.5, 0.6)),
        "head": pytest.approx((0.5, 0.6)),
    }
    assert third.parts == {"tail": pytest.approx((0.1, 0.2))}
    assert last.parts == {}


def test_there_are_no_parts_without_their_folder(tmp_path):
    dataset = sources.load("cub", cub_tree(tmp_path))
    assert dataset.splits["train"][0].parts == {}


def test_nabirds_parts_are_read(tmp_path):
    changes = cub_parts("a-0 7 20 10 1", "a-0 8 40 30 1", parts="7 bill\n8 crown\n")
    dataset = sources.load("nabirds", nabirds_tree(tmp_path, **changes))
    found = dataset.splits["train"][0].parts
    assert found["head"] == pytest.approx((0.3, 0.4))
    assert found["bill"] == pytest.approx((0.2, 0.2))


@pytest.mark.parametrize(
    "line",
    ["5 1 2 3 1", "1 4 2 3 1", "1 1 x 3 1", "1 1 2 3 2", "1 1 2 3", "1 1 2 3 1 0"],
)
def test_damaged_part_locations_are_an_error_with_the_line(line, tmp_path):
    cub_tree(tmp_path, **cub_parts("1 2 3 4 0", line))
    with pytest.raises(ValueError, match=rf"part_locs\.txt, line 2: '{line}'.*remove"):
        sources.load("cub", tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_parts_follow_the_exif_orientation(orientation, tmp_path):
    cub_tree(tmp_path, **cub_parts("1 1 20 12 1"))
    # A square around (20, 12).
    record, seen = read_rectangle(tmp_path, orientation, (16, 24))
    rows, columns = np.nonzero(seen)
    height, width = seen.shape
    middle = (columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height
    assert record.parts["beak"] == pytest.approx(middle)


def test_parts_in_the_cropped_ends_of_long_images_lie_outside(tmp_path):
    cub_tree(tmp_path, **cub_parts("1 1 950 0 1", "2 1 10 5 1"))
    for file in CUB_FILES[:2]:
        save_image(tmp_path / "images" / file, size=(2000, 10))
    dataset = sources.load("cub", tmp_path)
    box = sources.decoding.kept_region(2000, 10)
    for split, x, y in (("train", 950, 0), ("test", 10, 0.5)):
        expected = (x - box[0]) / (box[2] - box[0]), y
        assert dataset.splits[split][0].parts["beak"] == pytest.approx(expected)
    assert dataset.splits["test"][0].parts["beak"][0] < 0


def test_nabirds_has_only_classes_with_images(tmp_path):
    dataset = sources.load("nabirds", nabirds_tree(tmp_path / "nabirds").parent)
    assert dataset.name == "nabirds"
    assert dataset.class_names == ("Titmouse", "Junco (Red-backed/Grey)")
    assert labels(dataset, "train") == labels(dataset, "test") == [0, 1]
    assert dataset.splits["train"][0].box == pytest.approx((0.1, 0.1, 0.6, 0.5))
    assert dataset.notes == ("2 of 4 names in classes.txt are groups without images",)


def test_nabirds_label_without_a_name_is_an_error(tmp_path):
    root = nabirds_tree(tmp_path, classes="0 Birds\n817 Titmouse\n")
    with pytest.raises(
        ValueError, match=r"image a-2 has class '1010'.*in classes\.txt"
    ):
        sources.load("nabirds", root)


def test_pipe_in_the_place_of_a_listed_image_is_an_error(tmp_path):
    file = cub_tree(tmp_path) / "images" / CUB_FILES[0]
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"w1\.jpg: it is no regular file; remove"):
        sources.load("cub", tmp_path)
