import os
import pickle
import random
import unicodedata

import pytest

from cra_jax.datasets import listing, sources
from tests.helpers.dataset_folders import labels, names, save_image, tree


def test_train_and_test_directories_are_read(tmp_path):
    tree(
        tmp_path,
        "train/class10/b.jpg",
        "train/class2/img10.JPG",
        "train/class2/img9.png",
        "train/class2/deep/er/img1.webp",
        "test/class2/c.jpeg",
        "train/.cache/d.jpg",
        "train/class2/._img9.png",
        "train/class2/Thumbs.db",
        "train/class10/notes.txt",
        "train/class10/README",
        "train/stray.jpg",
        "__MACOSX/e.jpg",
        "extra/f.jpg",
    )
    dataset = sources.load("folder", tmp_path)

    assert dataset.class_names == ("class2", "class10")
    assert names(dataset, "train") == [
        "train/class2/deep/er/img1.webp",
        "train/class2/img9.png",
        "train/class2/img10.JPG",
        "train/class10/b.jpg",
    ]
    assert labels(dataset, "train") == [0, 0, 0, 1]
    assert names(dataset, "test") == ["test/class2/c.jpeg"]  # class10 may be missing
    assert dataset.root == tmp_path
    assert dataset.notes == (
        f"folders of {tmp_path} that are ignored: extra",
        "5 files skipped: 1 .db, 1 .txt, 1 hidden, 1 outside the class folders,"
        " 1 without a suffix",
    )
    record = pickle.loads(pickle.dumps(dataset.splits["train"][0]))
    assert record.read(20).shape == (20, 24, 3)
    assert record.box is None
    assert record.content() == (tmp_path / record.name).read_bytes()


@pytest.mark.parametrize("name", ["val", "Valid", "TEST"])
def test_test_directory_may_have_other_names(name, tmp_path):
    files = [f"Train/{c}/1.png" for c in "ab"] + [f"{name}/{c}/2.png" for c in "ab"]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert names(dataset, "test") == [f"{name}/a/2.png", f"{name}/b/2.png"]


def test_test_directory_is_preferred_to_val(tmp_path):
    files = [f"{s}/{c}/{s}.png" for c in "ab" for s in ("train", "test", "val")]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert names(dataset, "test") == ["test/a/test.png", "test/b/test.png"]
    assert dataset.notes == (f"folders of {tmp_path} that are ignored: val",)


def test_class_may_have_the_name_train(tmp_path):
    files = [f"{c}/{i}.png" for c in ("bus", "train", "tram") for i in range(2)]
    assert sources.load("folder", tree(tmp_path, *files)).class_names == (
        "bus",
        "train",
        "tram",
    )


def test_share_of_the_images_is_drawn_for_testing(tmp_path):
    counts = {"a": 10, "b": 3, "c": 2, "d": 1, "e": 25}
    files = [f"{c}/{i}.png" for c, n in counts.items() for i in range(n)]
    dataset = sources.load("folder", tree(tmp_path / "set", *files), seed=1)

    train, test = names(dataset, "train"), names(dataset, "test")
    assert sorted(train + test) == sorted(files)
    drawn = {c: sum(name.startswith(c) for name in test) for c in counts}
    assert drawn == {"a": 2, "b": 1, "c": 1, "d": 0, "e": 5}
    assert train == sorted(train, key=listing.natural_key)
    assert "9 of 41 images were drawn for testing" in dataset.notes[0]

    again = sources.load("folder", tree(tmp_path / "copy", *files), seed=1)
    assert names(again, "test") == test
    assert names(sources.load("folder", tmp_path / "set", seed=2), "test") != test
    half = sources.load("folder", tmp_path / "set", seed=1, test_share=0.5)
    assert len(half.splits["test"]) == 5 + 2 + 1 + 0 + 12
    most = sources.load("folder", tmp_path / "set", seed=1, test_share=0.99)
    assert len(most.splits["train"]) == 5  # one training image of each class remains


@pytest.mark.parametrize("share", [0, 1, -0.2, 20])
def test_test_share_out_of_range_is_an_error(share, tmp_path):
    tree(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    with pytest.raises(ValueError, match=f"test_share is {share}: set it betw"):
        sources.load("folder", tmp_path, test_share=share)


def test_dataset_in_nested_directories_is_found(tmp_path):
    files = [f"pack/pack/{s}/{c}/1.png" for s in ("train", "test") for c in "ab"]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert dataset.root == tmp_path / "pack" / "pack"
    assert names(dataset, "train") == ["train/a/1.png", "train/b/1.png"]


WRONG_FILES = {
    "only train": (["train/a/1.png", "train/b/1.png"], r"only train/ is here"),
    "only test": (["test/a/1.png", "test/b/1.png"], r"only test/ is here"),
    "one class": (["birds/1.png", "birds/2.png"], "no images in folders"),
    "one class in train": (["train/a/1.png", "test/a/1.png"], "only the class a; two"),
    "new class in test": (
        ["train/a/1.png", "train/b/1.png", "test/c/1.png"],
        "without a folder in .*train: c; rename",
    ),
    "empty class": (
        ["train/a/1.png", "train/b/x.txt", "test/a/1.png"],
        "1 classes have no training image: b",
    ),
    "no test images": (["a/1.png", "b/1.png"], "split 'test' has no images"),
    "loose images": (["1.png", "2.png"], "no images in folders"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_directories_are_errors(case, tmp_path):
    files, message = WRONG_FILES[case]
    with pytest.raises(ValueError, match=message) as caught:
        sources.load("folder", tree(tmp_path, *files))
    assert str(tmp_path) in str(caught.value)


def test_links_are_followed_but_not_in_cycles(tmp_path):
    other_root = tree(tmp_path / "elsewhere", "1.png", "2.png")
    root = tree(tmp_path / "set", "a/1.png", "a/2.png", "b/1.png")
    (root / "c").symlink_to(other_root, target_is_directory=True)
    (root / "a" / "self").symlink_to(root / "a", target_is_directory=True)
    dataset = sources.load("folder", root)
    assert sorted(names(dataset, "train") + names(dataset, "test")) == [
        f"{c}.png" for c in ("a/1", "a/2", "b/1", "c/1", "c/2")
    ]


def test_order_and_names_do_not_depend_on_unicode_normalization(tmp_path):
    files = ["zebra/1.png", "épée/1.png", "épée/2.png", "Ahorn/1.png"]
    results = {}
    for form in ("NFC", "NFD"):
        root = tree(tmp_path / form, *(unicodedata.normalize(form, f) for f in files))
        dataset = sources.load("folder", root)
        results[form] = (dataset.class_names, names(dataset, "train"))
    assert results["NFC"] == results["NFD"]

    both = tmp_path / "both"
    tree(both, *(unicodedata.normalize(form, files[1]) for form in ("NFC", "NFD")))
    with pytest.raises(ValueError, match="two folders have the name 'épée'"):
        sources.load("folder", tree(both, "a/1.png"))


def test_natural_key_sorts_numbers_by_value():
    shuffled = ["b10", "B2", "b2", "a", "b02", "10", "9", "b2c10", "b2c9"]
    expected = ["9", "10", "a", "B2", "b02", "b2", "b2c9", "b2c10", "b10"]
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        assert sorted(shuffled, key=listing.natural_key) == expected


def test_stamp_changes_with_the_file(tmp_path):
    files = ["train/a/1.png", "train/b/1.png", "test/a/1.png"]
    tree(tmp_path, *files)

    def stamp():
        return sources.load("folder", tmp_path).splits["train"][0].stamp

    first = stamp()
    assert stamp() == first
    file = tmp_path / files[0]
    save_image(file, seed=99)
    os.utime(file, ns=(10**15, 10**15))
    second = stamp()
    assert second != first
    save_image(file, size=(20, 20))
    os.utime(file, ns=(10**15, 10**15))
    assert stamp() != second
