"""Tests of directories that hold other things than the images of classes."""

import os
from pathlib import Path

import pytest

from cra_jax.datasets import sources
from cra_jax.runtime import run_directory
from tests.helpers.dataset_folders import names, tree

IMAGES = tuple(f"{c}/{i}.png" for c in ("tit", "wren") for i in range(4))

LEFT_OUT = {
    "a pipe": lambda root: os.mkfifo(root / "tit" / "pipe.png"),
    "a device": lambda root: (root / "tit" / "x.png").symlink_to("/dev/zero"),
    "thumbnails": lambda root: tree(root, "tit/@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg"),
    "trash": lambda root: tree(root, "#recycle/1.png", "$RECYCLE.BIN/2.png"),
    "hidden images": lambda root: tree(root, ".thumbnails/1.png", "tit/._1.png"),
    "a run": lambda root: tree(root, "runs/one/config.json", "runs/one/report/1.png"),
    "a survey": lambda root: tree(root, "runs/one/data.png"),
}

NO_CLASSES = {
    "annotations": ("images/1.png", "annotations/1.png"),
    "masks": ("data/1.png", "masks/1.png"),
    "labels": ("train/images/1.png", "train/labels/1.txt", "test/images/1.png"),
    "parts": [f"part_{i}/{c}/1.png" for i in range(2) for c in ("tit", "wren", "owl")],
    "doubled split": [f"{s}/a/1.png" for s in ("train", "training", "test")],
    "other case": ("Wren/1.png", "wren/1.png", "tit/1.png"),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_is_no_image_of_a_class_is_left_out(kind, tmp_path, note):
    tree(tmp_path, *IMAGES)
    LEFT_OUT[kind](tmp_path)
    dataset = sources.load("folder", tmp_path)
    assert dataset.class_names == ("tit", "wren")
    assert sorted(names(dataset, "train") + names(dataset, "test")) == [*IMAGES]
    assert "skipped" in dataset.notes[-1] or "ignored" in dataset.notes[-1]
    note(
        "class folders hold pipes, devices, hidden or system folders, or runs",
        "left out; a note counts the files",
    )


@pytest.mark.parametrize("kind", NO_CLASSES)
def test_folders_that_are_no_classes_are_an_error(kind, tmp_path, note):
    tree(tmp_path, *NO_CLASSES[kind])
    with pytest.raises(ValueError, match=str(tmp_path)):
        sources.load("folder", tmp_path)
    note("folders that are not those of classes", "an error that names the folders")


@pytest.mark.parametrize("link", ["folder", "hard", "symbolic"])
def test_links_between_the_splits_are_noted(link, tmp_path, note):
    tree(tmp_path, *(f"{s}/{c}/{s}.png" for s in ("train", "test") for c in "ab"))
    train, test = tmp_path / "train" / "a" / "train.png", tmp_path / "test" / "a"
    if link == "hard":
        os.link(train, test / "2.png")
    elif link == "symbolic":
        (test / "2.png").symlink_to(train)
    else:
        (test / "2").symlink_to(train.parent, target_is_directory=True)
    dataset = sources.load("folder", tmp_path)
    assert any("1 of 3 images of 'test' are links" in text for text in dataset.notes)
    note("a test image is a link to a training image", "a warning that counts them")


@pytest.mark.parametrize("name", ["a[1]", "a\\b", "a\udcff", "gs:"])
def test_a_run_directory_that_cannot_be_read_is_an_error(name, tmp_path, note):
    folder: Path = tmp_path / name
    with (
        pytest.raises(ValueError, match="rename it, or choose another --workdir"),
        run_directory.locked(folder),
    ):
        pass
    assert not folder.exists()
    note(
        "the path of the run directory cannot be read by orbax", "an error before work"
    )
