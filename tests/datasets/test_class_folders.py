import math
import os
import pickle
import random
import shutil
import unicodedata

import pytest

from cra_jax.datasets import listing, sources
from cra_jax.inference import run_options
from tests.helpers import tiny_config
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
        "1 folders within class folders count as the class around them: class2/deep",
        f"folders of {tmp_path} that are ignored: extra",
        "5 files skipped: 1 .db, 1 .txt, 1 hidden, 1 outside the class folders,"
        " 1 without a suffix",
        "2 images in hidden folders, system folders or run directories are ignored:"
        " .cache (1), __MACOSX (1)",
        "'test' has no images of 1 of the 2 classes, which its scores leave out:"
        " class10",
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


def test_val_is_a_split_beside_test(tmp_path):
    files = [f"{s}/{c}/{s}.png" for c in "ab" for s in ("train", "test", "val")]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert list(dataset.splits) == ["train", "test", "val"]
    assert names(dataset, "test") == ["test/a/test.png", "test/b/test.png"]
    assert names(dataset, "val") == ["val/a/val.png", "val/b/val.png"]
    assert dataset.notes == ()


def test_val_alone_is_the_test_split_and_a_note_says_so(tmp_path):
    files = [f"{s}/{c}/1.png" for c in "ab" for s in ("train", "val")]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert names(dataset, "test") == ["val/a/1.png", "val/b/1.png"]
    (note,) = dataset.notes
    assert note.startswith(f"{tmp_path} has no test split: its validation split is us")


SPLIT_NAMES = {
    "in full": ("training", "validation"),
    "capitals": ("TRAIN", "Testing"),
    "Kaggle, packed twice": ("seg_train/seg_train", "seg_test/seg_test"),
    "with fillers": ("Training_Set", "test-images"),
    "of one dataset": ("asl_alphabet_train/asl_alphabet_train", "asl_alphabet_test"),
    "images inside": ("train/images", "test/Images"),
    "with a number": ("train2017", "val2017"),
}


@pytest.mark.parametrize("case", SPLIT_NAMES)
def test_usual_names_of_splits_are_known(case, tmp_path):
    train, test = SPLIT_NAMES[case]
    files = [f"{split}/{c}/1.png" for c in "abc" for split in (train, test)]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert dataset.class_names == ("a", "b", "c")
    assert names(dataset, "train") == [f"{train}/{c}/1.png" for c in "abc"]
    assert names(dataset, "test") == [f"{test}/{c}/1.png" for c in "abc"]


def test_names_that_only_contain_a_split_are_classes(tmp_path):
    classes = ["bullet train", "freight_train", "test_tube", "validator"]
    files = [f"{c}/deep/{i}.png" for c in classes for i in range(2)]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert dataset.class_names == tuple(classes)


def test_splits_within_the_class_folders_are_read(tmp_path):
    files = [f"{c}/{s}/1.png" for c in "abc" for s in ("Train", "test")]
    tree(tmp_path, *files, "a/val/1.png", "b/loose.png")
    dataset = sources.load("folder", tmp_path)
    assert dataset.class_names == ("a", "b", "c")
    assert names(dataset, "train") == [f"{c}/Train/1.png" for c in "abc"]
    assert names(dataset, "test") == [f"{c}/test/1.png" for c in "abc"]
    assert names(dataset, "val") == ["a/val/1.png"]
    assert "1 files skipped: 1 outside the splits of the classes" in dataset.notes

    tree(tmp_path, "d/1.png")
    with pytest.raises(ValueError, match="a/ has the splits inside, but not d; give"):
        sources.load("folder", tmp_path)


def test_folders_of_systems_hidden_folders_and_pipes_are_left_out(tmp_path):
    files = [f"{c}/{i}.png" for c in ("gull", "wren") for i in range(4)]
    tree(
        *(tmp_path, *files),
        *(f"{c}/@eaDir/{i}.png/SYNOPHOTO_THUMB_M.jpg" for c in "gw" for i in range(3)),
        *(f"gull/@EADIR/{i}.png/SYNOPHOTO_THUMB_M.jpg" for i in range(4)),
        *("#recycle/1.png", "$RECYCLE.BIN/1.png", "lost+found/1.png"),
        *(".22_rifle/1.png", ".22_rifle/2.png"),
    )
    for stray in "gw":
        shutil.rmtree(tmp_path / stray)
    os.mkfifo(tmp_path / "gull" / "pipe.png")
    (tmp_path / "wren" / "zero.png").symlink_to("/dev/zero")
    dataset = sources.load("folder", tmp_path)
    assert dataset.class_names == ("gull", "wren")
    assert sorted(names(dataset, "train") + names(dataset, "test")) == files
    assert dataset.notes[1:] == (
        "2 files skipped: 2 pipes or devices",
        "9 images in hidden folders, system folders or run directories are ignored:"
        " #recycle (1), $RECYCLE.BIN (1), .22_rifle (2), ...",
    )


def test_run_directories_in_the_dataset_are_no_classes(tmp_path):
    files = [f"{c}/{i}.png" for c in "ab" for i in range(4)]
    tree(
        *(tmp_path, *files, "runs/one/config.json", "runs/one/report/attention.png"),
        *("runs/one/checkpoints/6/meta", "runs/one/notes.txt", "runs/two/data.png"),
        *("a/deep/config.json", "a/deep/checkpoints/1", "a/deep/figures/1.png"),
    )
    dataset = sources.load("folder", tmp_path)
    assert dataset.class_names == ("a", "b")
    assert sorted(names(dataset, "train") + names(dataset, "test")) == files
    assert "deep (1), runs (2)" in dataset.notes[-1]
    # The dataset's folder may itself be a run directory.
    tree(tmp_path, "config.json", "metrics.jsonl", "report/1.png", "overlays/1.png")
    assert sources.load("folder", tmp_path).class_names == ("a", "b")


def test_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    tree(tmp_path, "train/a/1.png", "train/b/1.png", "test/a/1.png")
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("train/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"train/b: Permission denied; make it read"):
        sources.load("folder", tmp_path)


def test_folders_in_class_folders_are_named(tmp_path):
    genera = ("Larus/argentatus", "Larus/fuscus", "Parus/major")
    files = [f"{folder}/{i}.png" for folder in genera for i in range(2)]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert dataset.class_names == ("Larus", "Parus")
    assert dataset.notes[0] == (
        "2 folders within class folders count as the class around them:"
        " Larus/argentatus, Larus/fuscus"
    )


def test_classes_without_test_images_are_named(tmp_path):
    files = [f"train/{c}/1.png" for c in "abc"] + ["test/a/1.png"]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert dataset.notes == (
        "'test' has no images of 2 of the 3 classes, which its scores leave out: b, c",
    )


def test_evaluation_reads_a_dataset_without_training_images(tmp_path):
    tree(tmp_path, "test/b/1.png", "test/c/1.png")
    dataset = sources.load("folder", tmp_path, needs_train=False)
    assert list(dataset.splits) == ["test"]
    assert labels(dataset, "test") == [0, 1]
    wider = sources.with_classes(dataset, ("a", "b", "c", "d"))
    assert wider.class_names == ("a", "b", "c", "d")
    assert labels(wider, "test") == [1, 2]
    assert wider.notes == (
        "'test' has no images of 2 of the 4 classes, which its scores leave out: a, d",
    )
    assert sources.with_classes(dataset, ("b", "x")) is dataset

    tree(tmp_path / "loose", "a/1.png", "a/2.png", "b/1.png")
    options = {"test_share": 1, "needs_train": False}
    dataset = sources.load("folder", tmp_path / "loose", **options)
    assert names(dataset, "test") == ["a/1.png", "a/2.png", "b/1.png"]
    with pytest.raises(ValueError, match="only test is here, and no training split"):
        sources.load("folder", tmp_path / "loose", test_share=1)


def test_links_between_the_splits_are_found(tmp_path):
    tree(tmp_path, *(f"train/{c}/{i}.png" for c in "ab" for i in range(2)))
    (tmp_path / "test").symlink_to("train", target_is_directory=True)
    with pytest.raises(ValueError, match="all 4 images of 'test' are links to train"):
        sources.load("folder", tmp_path)

    (tmp_path / "test").unlink()
    tree(tmp_path, "test/a/own.png")
    os.link(tmp_path / "train/a/1.png", tmp_path / "test/a/hard.png")
    (tmp_path / "test/b").symlink_to("../train/b", target_is_directory=True)
    assert sources.load("folder", tmp_path).notes == (
        "warning: 3 of 4 images of 'test' are links to training images"
        " (test/a/hard.png = train/a/1.png, test/b/0.png = train/b/0.png,"
        " test/b/1.png = train/b/1.png); remove them from one of the splits",
    )


def test_share_of_the_training_images_is_held_out(tmp_path):
    files = [f"train/{c}/{i}.png" for c in "abc" for i in range(10)]
    files += [f"test/{c}/1.png" for c in "abc"] + ["train/c/10.png"]
    tree(tmp_path, *files)

    def load(share, seed=0, **options):
        config = tiny_config.config(tmp_path, **{"data.val_share": share})
        config.data.update({"source": "folder", "path": str(tmp_path), "seed": seed})
        data = run_options.from_config(config).data
        return sources.load_dataset(data, **options)

    assert list(load(0).splits) == ["train", "test"]
    dataset = load(0.3)
    val = names(dataset, "val")
    assert [sum(f"/{c}/" in name for name in val) for c in "abc"] == [3, 3, 3]
    assert sorted(val + names(dataset, "train") + names(dataset, "test")) == sorted(
        files
    )
    assert names(load(0.3, needs_train=False), "val") == val
    assert names(load(0.3, seed=1), "val") != val
    with pytest.raises(ValueError, match=r"data\.val_share.*1\.5"):
        load(1.5)
    tree(tmp_path, *(f"val/{c}/1.png" for c in "abc"))
    with pytest.raises(ValueError, match=r"0\.3, but .* has a validation split: s"):
        load(0.3)


def test_files_with_the_name_of_heic_are_counted(tmp_path):
    root = tree(tmp_path, *(f"{c}/{i}.png" for c in "ab" for i in range(3)))
    for c in "ab":
        (root / c / "1.png").rename(root / c / "1.HEIC")
    (note,) = [x for x in sources.load("folder", root).notes if "heic" in x]
    assert note.startswith(f"2 files of {tmp_path} are named .heic")


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


@pytest.mark.parametrize("share", [0, -0.2, 20, math.nan])
def test_test_share_out_of_range_is_an_error(share, tmp_path):
    tree(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    with pytest.raises(ValueError, match=f"test_share is {share}: set it above 0"):
        sources.load("folder", tmp_path, test_share=share)


def test_dataset_in_nested_directories_is_found(tmp_path):
    files = [f"pack/pack/{s}/{c}/1.png" for s in ("train", "test") for c in "ab"]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert dataset.root == tmp_path / "pack" / "pack"
    assert names(dataset, "train") == ["train/a/1.png", "train/b/1.png"]


WRONG_FILES = {
    "only train": (["train/a/1.png", "train/b/1.png"], r"only train/ is here"),
    "only test": (["test/a/1.png", "test/b/1.png"], "only test is here, and no train"),
    "one class": (["birds/1.png", "birds/2.png"], "no images in folders"),
    "one class in train": (["train/a/1.png", "test/a/1.png"], "only the class a; two"),
    "new class in test": (
        ["train/a/1.png", "train/b/1.png", "test/c/1.png"],
        "of the split 'test' without a folder in that of 'train': c; rename",
    ),
    "empty class": (
        ["train/a/1.png", "train/b/x.txt", "test/a/1.png"],
        "1 classes have no training image: b",
    ),
    "no test images": (["a/1.png", "b/1.png"], "split 'test' has no images"),
    "loose images": (["1.png", "2.png"], "no images in folders"),
    "annotations": (
        ["images/a_1.jpg", "images/b_1.jpg", "annotations/trimaps/a_1.png"],
        r"annotations is not the name of a class; .* \(if images/ holds them, set",
    ),
    "VOC": (
        ["JPEGImages/1.jpg", "SegmentationClass/1.png", "Annotations/1.xml"],
        "Annotations, SegmentationClass is not the name of a class",
    ),
    "masks": (["Images/1.png", "Masks/1.png"], "Masks is not the name of a class"),
    "YOLO": (
        [
            f"{s}/{f}"
            for s in ("train", "val")
            for f in ("images/1.png", "labels/1.txt")
        ],
        "labels is not the name of a class",
    ),
    "parts": (
        [f"part{i}/{c}/1.png" for i in range(2) for c in "abc"],
        r"part0, part1 have the same folders inside \(a, b, c\), so that either",
    ),
    "folds": (
        [f"fold{i}/{c}/1.png" for i in range(5) for c in ("cat", "dog")],
        "fold0, fold1, fold2, ... have the same folders inside",
    ),
    "two training splits": (
        [f"{s}/{c}/1.png" for s in ("train", "training", "test") for c in "ab"],
        "several folders have the name of the split 'train': train, training; keep",
    ),
    "names that differ in case": (
        ["train/Wren/1.png", "train/wren/1.png", "test/wren/1.png"],
        "the classes 'Wren' and 'wren' differ only in case; write",
    ),
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


def test_natural_key_sorts_numbers_of_any_length_and_script():
    texts = ["a9", "a" + "9" * 5000, "a1" + "0" * 5000, "a٣", "a003", "a"]
    ordered = ["a", "a003", "a٣", "a9", "a" + "9" * 5000, "a1" + "0" * 5000]
    assert sorted(texts, key=listing.natural_key) == ordered


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
