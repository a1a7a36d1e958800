"""Reading tfds datasets; tfds builds them as array_record without TensorFlow."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from cra_jax.datasets import sources, tfds_archives, tfds_build, tfds_read
from cra_jax.input import decoding, image_cache
from cra_jax.input.records import Record
from cra_jax.training import check_config
from tests.helpers import tiny_config
from tests.helpers.tiny_tfds import build, jpeg, labelled, plain, rows

BOX = (0.125, 0.25, 0.5, 0.75)  # tfds order: y_min, x_min, y_max, x_max


def content(record: Record) -> bytes:
    assert record.content is not None
    return record.content()


def test_without_the_extra_the_source_says_how_to_install_it(tmp_path, monkeypatch):
    """Before any work: in the check of a config, and where a dataset is read."""
    modules = "tensorflow_datasets", "no_such_module"
    monkeypatch.setattr(tfds_archives, "READ_MODULES", modules)
    message = (
        r"data\.source='tfds' needs no_such_module, which this Python does not have: "
        r'pip install "cra_jax\[tfds\]"'
    )
    config = tiny_config.config(tmp_path, **{"data.source": "tfds"})
    for call in (
        lambda: check_config.check(config),
        lambda: sources.load("tfds", tmp_path, name="mnist"),
        lambda: tfds_build.build("mnist", tmp_path),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not list(tmp_path.iterdir())


# --- what is read -------------------------------------------------------------------


def test_features_of_caltech_birds2011_are_read(tmp_path):
    species = "wren", "tit", "owl"
    stored = {
        f"{split}/{i}.jpg": {
            "image": jpeg(i, orientation=6 if i == 4 else 1),
            "image/filename": f"{split}/{i}.jpg",
            "label": i % 3,
            "label_name": species[i % 3],
            "bbox": tfds.features.BBox(*((0.0,) * 4 if i == 5 else BOX)),
            "segmentation_mask": b"no image, so decoding it would fail",
        }
        for split, numbers in (("train", range(6)), ("test", range(6, 9)))
        for i in numbers
    }
    features = {
        **labelled(3),
        "image/filename": tfds.features.Text(),
        "label_name": tfds.features.Text(),
        "bbox": tfds.features.BBoxFeature(),
        "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
    }
    splits = {
        split: [row for name, row in stored.items() if name.startswith(split)]
        for split in ("train", "test")
    }
    root = build(tmp_path, "birds", features, splits)

    imported = set(sys.modules)

    dataset = sources.load("tfds", tmp_path, name="birds")

    assert "tensorflow" not in set(sys.modules) - imported
    assert dataset.class_names == species
    assert dataset.root == root
    assert dataset.notes == ()
    assert {split: len(found) for split, found in dataset.splits.items()} == {
        "train": 6,
        "test": 3,
    }
    for split, records in dataset.splits.items():
        assert {record.name for record in records} == {
            name for name in stored if name.startswith(split)
        }
        for record in pickle.loads(pickle.dumps(records)):
            row = stored[record.name]
            assert record.label == row["label"]
            assert content(record) == row["image"]
            assert np.array_equal(record.read(8), decoding.read(row["image"], 8))
            if record.name == "train/4.jpg":  # rotated clockwise: y becomes 1 - x
                assert record.read(8).shape == (16, 8, 3)
                assert record.box == pytest.approx((0.5, 0.25, 0.875, 0.75))
            elif record.name == "train/5.jpg":
                assert record.box is None
            else:
                assert record.box == pytest.approx((0.25, 0.125, 0.75, 0.5))


def test_class_names_of_label_are_used_and_images_are_numbered(tmp_path):
    features = {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(names=["wren", "tit"]),
        "label_name": tfds.features.Text(),  # not used, as the label has names
    }
    splits = {
        split: [{**row, "label_name": str(row["label"])} for row in rows(*span)]
        for split, span in {"train": (3, 0), "test": (2, 10)}.items()
    }
    build(tmp_path, "named", features, splits)
    dataset = sources.load("tfds", tmp_path, name="named:1.0.0")
    assert dataset.class_names == ("wren", "tit")
    train = dataset.splits["train"]
    assert [record.name for record in train] == ["train/0", "train/1", "train/2"]
    assert [record.box for record in train] == [None] * 3
    by_content = {row["image"]: row["label"] for row in splits["train"]}
    assert {content(record): record.label for record in train} == by_content


def test_file_names_in_both_splits_are_replaced_by_numbers(tmp_path):
    features = {**labelled(), "file_name": tfds.features.Text()}
    train, test = (
        [{**row, "file_name": f"{i}.jpg"} for i, row in enumerate(rows(2, first))]
        for first in (0, 10)
    )
    build(tmp_path, "shared", features, {"train": train, "test": test})
    found = tfds_read.read_dataset("shared", tmp_path).splits
    assert [e.name for e in found["train"]] == ["train/0", "train/1"]
    assert [e.name for e in found["test"]] == ["test/0", "test/1"]


@pytest.mark.parametrize(
    ("bbox_format", "corners"),
    [("REL_XYXY", BOX), (None, (1.0, 2.0, 3.0, 4.0)), (None, (0.5, 0.5, 0.5, 0.5))],
)
def test_boxes_of_another_format_are_not_used(tmp_path, bbox_format, corners):
    box = tfds.features.BBox(*corners)
    both = [{**row, "bbox": box} for row in rows(2)]
    features = {
        **labelled(),
        "bbox": tfds.features.BBoxFeature(bbox_format=bbox_format),
    }
    build(tmp_path, "boxes", features, {"train": both, "test": both})
    found = tfds_read.read_dataset("boxes", tmp_path).splits
    assert [e.box for e in found["train"]] == [None, None]


def test_class_names_are_numbers_if_names_are_not_unique(tmp_path):
    features = {**labelled(), "label_name": tfds.features.Text()}
    both = [{**row, "label_name": "bird"} for row in rows(2)]
    build(tmp_path, "same", features, {"train": both, "test": both})
    assert tfds_read.read_dataset("same", tmp_path).class_names == ("0", "1")


def test_rebuilt_dataset_has_other_stamps_and_contents(tmp_path):
    plain(tmp_path)
    before = sources.load("tfds", tmp_path, name="plain").splits["train"]
    again = sources.load("tfds", tmp_path, name="plain").splits["train"]
    assert [record.stamp for record in again] == [record.stamp for record in before]
    assert len({record.stamp for record in before}) == len(before)
    old = {content(record) for record in before}
    shutil.rmtree(tmp_path / "plain")
    plain(tmp_path, train=rows(4, 20), test=rows(2, 30))
    after = sources.load("tfds", tmp_path, name="plain").splits["train"]
    assert not {r.stamp for r in before} & {r.stamp for r in after}
    assert {content(r) for r in after}.isdisjoint(old)


def test_undecodable_image_is_an_error(tmp_path):
    both = [*rows(2), {"image": b"no image", "label": 0}]
    plain(tmp_path, train=both, test=both)
    records = sources.load("tfds", tmp_path, name="plain").splits["train"]
    (undecodable,) = [record for record in records if content(record) == b"no image"]
    with pytest.raises(decoding.ImageError, match=f"^{undecodable.name}: not an image"):
        undecodable.read(8)


def test_images_of_tfds_are_cached(tmp_path):
    plain(tmp_path)
    records = sources.load("tfds", tmp_path, name="plain").splits["train"]
    prepared = image_cache.prepare(
        records, short_side_px=8, cache_dir=tmp_path / "cache", name="plain", workers=2
    )
    assert len(prepared) == len(records)
    for i, record in enumerate(records):
        assert np.array_equal(prepared[i], decoding.read(content(record), 8))


def test_progress_is_printed_by_default(tmp_path, capsys):
    plain(tmp_path)
    tfds_read.read_dataset("plain", tmp_path)
    assert "labels of plain: 6 of 6 images" in capsys.readouterr().err
    tfds_read.read_dataset("plain", tmp_path, progress=False)
    assert capsys.readouterr().err == ""


# --- splits -------------------------------------------------------------------------


def test_validation_is_the_test_split_if_there_is_no_test(tmp_path):
    plain(tmp_path, train=rows(2), validation=rows(4, 10), extra=rows(2, 20))
    dataset = sources.load("tfds", tmp_path, name="plain")
    assert set(dataset.splits) == {"train", "test"}
    assert len(dataset.splits["test"]) == 4
    assert "its validation split is used" in dataset.notes[0]
    assert dataset.notes[1:] == ("the split 'extra' is not used",)


def test_validation_beside_test_is_a_split(tmp_path):
    plain(tmp_path, train=rows(2), validation=rows(4, 10), test=rows(2, 20))
    found = tfds_read.read_dataset("plain", tmp_path)
    assert {split: len(x) for split, x in found.splits.items()} == {
        **{"train": 2, "test": 2, "val": 4}
    }
    assert found.notes == ()


def test_test_split_is_drawn_if_there_is_only_train(tmp_path):
    plain(tmp_path, train=rows(20))
    dataset = sources.load("tfds", tmp_path, name="plain", seed=1)
    assert {split: len(x) for split, x in dataset.splits.items()} == {
        **{"train": 16, "test": 4}
    }
    assert dataset.notes == (
        "plain has only the split 'train': 4 of 20 images were drawn for testing",
    )
    half = sources.load("tfds", tmp_path, name="plain", seed=1, test_share=0.5)
    drawn = {record.name for record in half.splits["test"]}
    assert len(drawn) == 10
    assert drawn >= {record.name for record in dataset.splits["test"]}


def test_only_a_test_split_is_an_error_for_training(tmp_path):
    plain(tmp_path, test=rows(2))
    with pytest.raises(ValueError, match="only test is here, and no training split"):
        sources.load("tfds", tmp_path, name="plain")
    sources.load("tfds", tmp_path, name="plain", needs_train=False)
    plain(tmp_path / "odd", other=rows(2))
    with pytest.raises(ValueError, match="its splits are other; train, test or valid"):
        tfds_read.read_dataset("plain", tmp_path / "odd")


# --- errors -------------------------------------------------------------------------


def test_unbuilt_dataset_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="'mnist' is not built there; build") as caught:
        sources.load("tfds", tmp_path, name="mnist")
    message = str(caught.value)
    assert "--mode prepare" in message
    assert 'pip install ".[tfds-build]"' in message
    assert "sha256" not in message  # tfds downloads the archives itself


def test_unbuilt_cars196_is_an_error_that_lists_the_archives(tmp_path):
    with pytest.raises(ValueError, match="have not worked since 2023") as caught:
        tfds_read.read_dataset("cars196:2.1.0", tmp_path)
    message = str(caught.value)
    assert f"from {tmp_path / 'downloads' / 'manual'} " in message
    assert "--config.data.source=cars" in message
    listed = (
        Path(tfds.__file__).parent / "url_checksums" / "cars196.txt"
    ).read_text()  # the checksums that tfds checks
    assert len(listed.splitlines()) == 4
    for line in listed.splitlines():
        _, size, sha256, file = line.split("\t")
        assert f"    {file}  {size} bytes\n        sha256 {sha256}" in message


def test_build_directory_is_none_for_a_built_dataset(tmp_path):
    assert tfds_read.build_directory("plain", tmp_path) == tmp_path
    root = plain(tmp_path)
    assert tfds_read.build_directory("plain", tmp_path) is None
    assert tfds_read.build_directory("plain:2.0.0", tmp_path) == tmp_path
    info_file = root / "dataset_info.json"
    info_file.write_text(info_file.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match="stored as tfrecord"):
        tfds_read.build_directory("plain", tmp_path)


def test_misspelled_names_and_versions_are_errors(tmp_path):
    with pytest.raises(
        ValueError, match=r"no dataset of that name; meant is caltech_bi"
    ):
        tfds_read.read_dataset("caltech_birds2O11", tmp_path)
    with pytest.raises(ValueError, match=r"no dataset of that name\);"):
        tfds_read.read_dataset("qqqqqqqq", tmp_path)
    plain(tmp_path)
    with pytest.raises(ValueError, match=r"of plain there is: 1\.0\.0\)"):
        tfds_read.read_dataset("plain:9.0.0", tmp_path)
    with pytest.raises(ValueError, match=r"cannot open 'a b' .*names are set"):
        tfds_read.read_dataset("a b", tmp_path)
    with pytest.raises(ValueError, match="name is empty"):
        sources.load("tfds", tmp_path)


def test_default_path_is_the_data_dir_of_tfds(tmp_path, monkeypatch):
    plain(tmp_path)
    monkeypatch.setattr(constants, "DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for path in ("", None, f"~/{tmp_path.name}"):
        assert len(sources.load("tfds", path, name="plain").splits["train"]) == 4


def test_tfrecord_dataset_is_an_error(tmp_path):
    info_file = plain(tmp_path) / "dataset_info.json"
    text = info_file.read_text().replace("array_record", "tfrecord")
    info_file.write_text(text)
    with pytest.raises(ValueError, match=r"stored as tfrecord, .* move that folder aw"):
        tfds_read.read_dataset("plain", tmp_path)


def test_damaged_dataset_is_an_error(tmp_path):
    root = plain(tmp_path)
    records = sources.load("tfds", tmp_path, name="plain").splits["train"]
    (shard,) = root.glob("*train*")
    intact = shard.read_bytes()

    damaged = bytearray(intact)
    damaged[300] ^= 255
    shard.write_bytes(damaged)
    tfds_read._source.cache_clear()  # an open file may still be readable
    with pytest.raises(decoding.ImageError, match=r"image \d of 'train' cannot be"):
        _ = [record.read(8) for record in records]
    with pytest.raises(ValueError, match=r"'train' of plain is damaged .* remove"):
        tfds_read.read_dataset("plain", tmp_path)
    shard.write_bytes(intact[:-100])
    with pytest.raises(ValueError, match=r"'train' of plain is damaged .* remove"):
        tfds_read.read_dataset("plain", tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=r"damaged \(FileNotFoundError.* remove"):
        tfds_read.read_dataset("plain", tmp_path)
    (root / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot open 'plain' .*build it again"):
        tfds_read.read_dataset("plain", tmp_path)


def test_images_without_a_class_are_an_error(tmp_path):
    unlabelled = [{**row, "label": -1} for row in rows(2)]
    plain(tmp_path, train=rows(2), test=unlabelled)
    with pytest.raises(ValueError, match=r"2 of 2 images of 'test' have no class .*-1"):
        tfds_read.read_dataset("plain", tmp_path)


def test_datasets_without_uint8_images_and_labels_are_errors(tmp_path):
    both = [{**row, "label": "wren"} for row in rows(2)]
    features = {**labelled(), "label": tfds.features.Text()}
    build(tmp_path, "texts", features, {"train": both, "test": both})
    with pytest.raises(ValueError, match="not have uint8 images of one class each"):
        tfds_read.read_dataset("texts", tmp_path)

    info_file = plain(tmp_path) / "features.json"
    text = info_file.read_text().replace('"uint8"', '"uint16"')
    info_file.write_text(text)
    with pytest.raises(ValueError, match="not have uint8 images of one class each"):
        tfds_read.read_dataset("plain", tmp_path)


def test_supervised_keys_are_used_as_image_and_label(tmp_path):
    features = {
        "photo": tfds.features.Image(),
        "breed": tfds.features.ClassLabel(num_classes=2),
        "breed_name": tfds.features.Text(),
    }
    both = [
        {"photo": row["image"], "breed": row["label"], "breed_name": "ab"[row["label"]]}
        for row in rows(2)
    ]
    root = build(tmp_path, "dogs", features, {"train": both, "test": both})
    info_file = root / "dataset_info.json"
    info = json.loads(info_file.read_text())
    pair = [{"featureKey": "photo"}, {"featureKey": "breed"}]
    info["supervisedKeys"] = {"tuple": {"items": pair}}
    info_file.write_text(json.dumps(info))
    found = tfds_read.read_dataset("dogs", tmp_path)
    assert found.class_names == ("a", "b")
    assert {e.content() for e in found.splits["train"]} == {r["photo"] for r in both}
