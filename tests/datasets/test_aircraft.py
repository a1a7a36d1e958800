import pickle

import pytest

from cra_jax.datasets import sources
from tests.helpers.dataset_folders import aircraft_tree, labels, names, save_image


def test_aircraft_images_are_read_without_their_banner(tmp_path):
    root = aircraft_tree(tmp_path)
    data = root / "fgvc-aircraft-2013b" / "data"
    for path in (root, data.parent, data):
        dataset = sources.load("aircraft", path)
        assert dataset.class_names == ("An-12", "F/A-18")
        assert names(dataset, "train") == ["images/0000001.jpg", "images/0000002.jpg"]
        assert labels(dataset, "train") == [1, 0]
        assert labels(dataset, "test") == [1]
        note, _ = dataset.notes
        assert note.startswith("the lowest 20 rows")
    record = pickle.loads(pickle.dumps(dataset.splits["train"][0]))
    image = record.read(50)
    assert image.shape == (50, 100, 3)
    assert image[..., 0].min() > 200  # red in every row
    assert image[..., 2].max() < 50
    # x 11 to 60 and y 6 to 70, counted from 1, of 100 x 50 pixels
    assert record.box == pytest.approx((0.1, 0.1, 0.6, 1))
    assert "20 px cut off" in record.stamp


def test_aircraft_is_read_without_boxes(tmp_path):
    dataset = sources.load("aircraft", aircraft_tree(tmp_path, images_box=""))
    assert dataset.splits["train"][0].box is None


WRONG_LISTS = {
    "unknown variant": (
        {"variants": "An-12\nF-16\n"},
        r"image 0000001 has variant 'F/A-18'",
    ),
    "no variants": ({"variants": ""}, r"variants\.txt: this file is missing"),
    "no test": ({"images_variant_test": ""}, r"_test\.txt: this file is missing"),
    "box lacks": ({"images_box": "0000001 1 1 2 2\n"}, "image 0000002 .* box None"),
    "box short": (
        {"images_box": "".join(f"000000{i} 1 1 2\n" for i in range(1, 4))},
        "box '1 1 2'.* four numbers",
    ),
    "in both": (
        {"images_variant_test": "0000001 F/A-18\n"},
        r"images listed more than once: images/0000001\.jpg",
    ),
}


@pytest.mark.parametrize("case", WRONG_LISTS)
def test_wrong_aircraft_lists_are_errors(case, tmp_path):
    changes, message = WRONG_LISTS[case]
    with pytest.raises(ValueError, match=message):
        sources.load("aircraft", aircraft_tree(tmp_path, **changes))


def test_aircraft_image_that_is_only_banner_is_an_error(tmp_path):
    aircraft_tree(tmp_path)
    file = tmp_path / "fgvc-aircraft-2013b" / "data" / "images" / "0000001.jpg"
    save_image(file, size=(100, 20))
    record = sources.load("aircraft", tmp_path).splits["train"][0]
    with pytest.raises(ValueError, match=r"0000001\.jpg: 20 rows, of which"):
        record.read(50)
