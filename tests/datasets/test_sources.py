import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cra_jax.datasets import sources, synthetic
from tests.helpers.dataset_folders import labels, names, tree


def test_wrong_arguments_of_load_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"'birds': choose .*cub, cars, .*csv"):
        sources.load("birds", tmp_path)
    with pytest.raises(ValueError, match=r"'cub' has no option test_share; .*none"):
        sources.load("cub", tmp_path, test_share=0.5)
    with pytest.raises(ValueError, match=r"no option size; .* test_share"):
        sources.load("folder", tmp_path, size=3)
    with pytest.raises(ValueError, match="'synthetic' reads no files"):
        sources.load("synthetic", tmp_path)


HINTS = {
    "cub": "CUB_200_2011",
    "cars": "Kaggle",
    "dogs": "ImageNetDogs",
    "aircraft": "fgvc-aircraft-2013b",
    "nabirds": "allaboutbirds",
    "folder": "train/ and test/",
    "csv": "columns path and label",
}


@pytest.mark.parametrize("source", HINTS)
def test_missing_or_other_path_is_an_error_that_names_the_layout(source, tmp_path):
    (tmp_path / "note.txt").write_text("nothing else here")
    for path in ("", None, tmp_path / "gone", tmp_path, tmp_path / "note.txt"):
        with pytest.raises(ValueError, match=HINTS[source]) as caught:
            sources.load(source, path)
        if path:
            assert str(path) in str(caught.value)


def test_relative_and_home_paths_are_resolved(tmp_path, monkeypatch):
    tree(
        tmp_path / "dataset",
        *(f"{s}/{c}/1.png" for s in ("train", "test") for c in "ab"),
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    relative, in_home = (
        sources.load("folder", "dataset"),
        sources.load("folder", "~/dataset"),
    )
    monkeypatch.chdir("/")
    for dataset in (relative, in_home):
        assert dataset.splits["test"][0].read(32).shape == (32, 38, 3)
    assert names(relative, "train") == names(in_home, "train")


def test_hints_cover_every_source():
    assert set(HINTS) | {"synthetic", "tfds"} == set(sources.SOURCES)


def test_unreadable_directory_is_an_error(tmp_path, monkeypatch):
    def deny(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", deny)  # as root, permissions have no effect
    with pytest.raises(ValueError, match=f"{tmp_path}: Permission denied; make"):
        sources.load("folder", tmp_path)


def test_every_option_changes_the_dataset():

    def contents(**options: Any):
        splits = sources.load("synthetic", **options).splits.values()
        return [[(r.name, r.label, r.stamp) for r in records] for records in splits]

    other = {
        "num_species": 5,
        "habitat_share": 0.3,
        "train_size": 100,
        "test_size": 50,
        "seed": 7,
    }
    assert set(sources.OPTIONS["synthetic"]) == set(other) - {"seed"}
    for option, value in other.items():
        assert contents(**{option: value}) != contents(), option


def test_synthetic_records_equal_the_drawings():
    options = {"num_species": 6, "habitat_share": 0.8}
    dataset = sources.load("synthetic", seed=3, train_size=60, test_size=12, **options)

    assert {k: len(v) for k, v in dataset.splits.items()} == {
        "train": 60,
        "test": 12,
        "test_shifted": 12,
    }
    assert dataset.class_names == synthetic.class_names(6)
    for split, index in (
        ("train", 0),
        ("train", 59),
        ("test", 5),
        ("test_shifted", 11),
    ):
        drawing = synthetic.draw(split, index, seed=3, size_px=40, **options)
        record = pickle.loads(pickle.dumps(dataset.splits[split][index]))
        assert record.label == drawing.label
        assert np.array_equal(record.read(40), drawing.image)
        assert record.box == pytest.approx(drawing.box)
        assert record.parts == {"head": pytest.approx(drawing.head)}


def test_stamp_of_a_drawing_changes_with_the_code(tmp_path, monkeypatch):
    before = sources.load("synthetic").splits["train"][0].stamp
    changed = tmp_path / "synthetic.py"
    code = Path(synthetic.__file__).read_text()
    monkeypatch.setattr(synthetic, "__file__", str(changed))
    # Comments and docstrings draw nothing.
    changed.write_text(code.replace('"""The embedded', '"""Embedded') + "# comment\n")
    assert sources.load("synthetic").splits["train"][0].stamp == before
    changed.write_text(code.replace("_MARGIN = 0.07", "_MARGIN = 0.08"))
    assert sources.load("synthetic").splits["train"][0].stamp != before


def test_too_few_drawings_for_all_classes_are_an_error():
    with pytest.raises(ValueError, match="2 classes have no training image: "):
        sources.load("synthetic", train_size=6)


def test_real_cub_is_read(shared_data):
    dataset = sources.load("cub", shared_data / "cub_10")
    assert [len(dataset.splits[split]) for split in ("train", "test")] == [149, 145]
    assert len(dataset.class_names) == 10
    assert dataset.notes == ()
    for records in dataset.splits.values():
        for record in records:
            assert f"/{dataset.class_names[record.label]}/" in record.name
    assert min(dataset.splits["train"][0].read(64).shape[:2]) == 64


def test_real_cars_is_read(shared_data):
    dataset = sources.load("cars", shared_data / "stanford_cars_98")
    assert [len(dataset.splits[split]) for split in ("train", "test")] == [3115, 993]
    assert len(dataset.class_names) == 98
    assert dataset.notes == ()
    assert set(labels(dataset, "test")) <= set(range(98))
    # The test images are cropped to the car.
    assert dataset.splits["test"][0].box == (0, 0, 1, 1)
    assert min(dataset.splits["test"][0].read(64).shape[:2]) == 64
