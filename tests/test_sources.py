import csv
import os
import pickle
import random
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image

from cra_jax import folders, sources, synthetic


def save_picture(file: Path, seed: int = 0, size=(12, 10), **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(file, **options)


def tree(root: Path, *files: str) -> Path:
    """Makes files in a scrambled order; pictures are real, other files are text."""
    for i, name in enumerate(random.Random(0).sample(files, len(files))):
        if Path(name).suffix.lower() in folders.SUFFIXES:
            save_picture(root / name, i)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("no picture")
    return root


def names(dataset: sources.Dataset, split: str) -> list[str]:
    return [record.name for record in dataset.splits[split]]


def labels(dataset: sources.Dataset, split: str) -> list[int]:
    return [record.label for record in dataset.splits[split]]


# --- load, whatever the source ----------------------------------------------------


def test_wrong_calls_are_refused(tmp_path):
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
def test_no_empty_or_foreign_path_says_what_is_expected(source, tmp_path):
    (tmp_path / "note.txt").write_text("nothing else here")
    for path in ("", None, tmp_path / "gone", tmp_path, tmp_path / "note.txt"):
        with pytest.raises(ValueError, match=HINTS[source]) as caught:
            sources.load(source, path)
        if path:
            assert str(path) in str(caught.value)


def test_paths_from_here_and_from_home(tmp_path, monkeypatch):
    tree(tmp_path / "set", *(f"{s}/{c}/1.png" for s in ("train", "test") for c in "ab"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    here, home = sources.load("folder", "set"), sources.load("folder", "~/set")
    monkeypatch.chdir("/")
    for dataset in (here, home):
        assert dataset.splits["test"][0].read(32).shape == (32, 38, 3)
    assert names(here, "train") == names(home, "train")


def test_every_source_is_tried_above():
    assert set(HINTS) | {"synthetic", "tfds"} == set(sources.SOURCES)


def test_unreadable_folder_is_named(tmp_path, monkeypatch):
    def deny(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", deny)  # root may read everything
    with pytest.raises(ValueError, match=f"{tmp_path}: Permission denied; make"):
        sources.load("folder", tmp_path)


def test_every_option_is_read():
    """Another value of an option is another data set."""

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


# --- the drawn birds ---------------------------------------------------------------


def test_synthetic():
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


def test_stamp_of_a_drawing_follows_the_code_that_draws(tmp_path, monkeypatch):
    before = sources.load("synthetic").splits["train"][0].stamp
    changed = tmp_path / "synthetic.py"
    changed.write_text(Path(synthetic.__file__).read_text() + "# redrawn\n")
    monkeypatch.setattr(synthetic, "__file__", str(changed))
    assert sources.load("synthetic").splits["train"][0].stamp != before


def test_too_few_drawings_to_show_every_species():
    with pytest.raises(ValueError, match="2 classes have no training picture: "):
        sources.load("synthetic", train_size=6)


# --- folders of classes ------------------------------------------------------------


def test_train_and_test_folders(tmp_path):
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
    assert names(dataset, "test") == ["test/class2/c.jpeg"]  # no class10: allowed
    assert dataset.root == tmp_path
    assert dataset.notes == (
        f"folders of {tmp_path} that are not used: extra",
        "5 files skipped: 1 .db, 1 .txt, 1 hidden, 1 outside the class folders,"
        " 1 without a suffix",
    )
    record = pickle.loads(pickle.dumps(dataset.splits["train"][0]))
    assert record.read(20).shape == (20, 24, 3)
    assert record.box is None
    assert record.content() == (tmp_path / record.name).read_bytes()


@pytest.mark.parametrize("word", ["val", "Valid", "TEST"])
def test_other_names_of_the_test_folder(word, tmp_path):
    files = [f"Train/{c}/1.png" for c in "ab"] + [f"{word}/{c}/2.png" for c in "ab"]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert names(dataset, "test") == [f"{word}/a/2.png", f"{word}/b/2.png"]


def test_test_folder_goes_before_val(tmp_path):
    files = [f"{s}/{c}/{s}.png" for c in "ab" for s in ("train", "test", "val")]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert names(dataset, "test") == ["test/a/test.png", "test/b/test.png"]
    assert dataset.notes == (f"folders of {tmp_path} that are not used: val",)


def test_a_class_may_be_called_train(tmp_path):
    files = [f"{c}/{i}.png" for c in ("bus", "train", "tram") for i in range(2)]
    assert sources.load("folder", tree(tmp_path, *files)).class_names == (
        "bus",
        "train",
        "tram",
    )


def test_a_share_is_drawn_for_testing(tmp_path):
    counts = {"a": 10, "b": 3, "c": 2, "d": 1, "e": 25}
    files = [f"{c}/{i}.png" for c, n in counts.items() for i in range(n)]
    dataset = sources.load("folder", tree(tmp_path / "set", *files), seed=1)

    train, test = names(dataset, "train"), names(dataset, "test")
    assert sorted(train + test) == sorted(files)
    held_out = {c: sum(name.startswith(c) for name in test) for c in counts}
    assert held_out == {"a": 2, "b": 1, "c": 1, "d": 0, "e": 5}
    assert train == sorted(train, key=folders.natural_key)
    assert "9 of 41 pictures were drawn for testing" in dataset.notes[0]

    again = sources.load("folder", tree(tmp_path / "copy", *files), seed=1)
    assert names(again, "test") == test
    assert names(sources.load("folder", tmp_path / "set", seed=2), "test") != test
    half = sources.load("folder", tmp_path / "set", seed=1, test_share=0.5)
    assert len(half.splits["test"]) == 5 + 2 + 1 + 0 + 12
    most = sources.load("folder", tmp_path / "set", seed=1, test_share=0.99)
    assert len(most.splits["train"]) == 5  # one of each is left to learn from


@pytest.mark.parametrize("share", [0, 1, -0.2, 20])
def test_share_out_of_range(share, tmp_path):
    tree(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    with pytest.raises(ValueError, match=f"test_share is {share}: give a share betw"):
        sources.load("folder", tmp_path, test_share=share)


def test_a_wrapped_archive_is_unwrapped(tmp_path):
    files = [f"pack/pack/{s}/{c}/1.png" for s in ("train", "test") for c in "ab"]
    dataset = sources.load("folder", tree(tmp_path, *files))
    assert dataset.root == tmp_path / "pack" / "pack"
    assert names(dataset, "train") == ["train/a/1.png", "train/b/1.png"]


FOLDER_MISTAKES = {
    "only train": (["train/a/1.png", "train/b/1.png"], r"only train/ is here"),
    "only test": (["test/a/1.png", "test/b/1.png"], r"only test/ is here"),
    "one class": (["birds/1.png", "birds/2.png"], "no pictures in folders"),
    "one class in train": (["train/a/1.png", "test/a/1.png"], "only the class a; two"),
    "new class in test": (
        ["train/a/1.png", "train/b/1.png", "test/c/1.png"],
        "without a folder in .*train: c; rename",
    ),
    "empty class": (
        ["train/a/1.png", "train/b/x.txt", "test/a/1.png"],
        "1 classes have no training picture: b",
    ),
    "no test pictures": (["a/1.png", "b/1.png"], "split 'test' has no pictures"),
    "loose pictures": (["1.png", "2.png"], "no pictures in folders"),
}


@pytest.mark.parametrize("mistake", FOLDER_MISTAKES)
def test_mistakes_in_folders(mistake, tmp_path):
    files, message = FOLDER_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message) as caught:
        sources.load("folder", tree(tmp_path, *files))
    assert str(tmp_path) in str(caught.value)


def test_links_are_followed_but_not_in_circles(tmp_path):
    elsewhere = tree(tmp_path / "elsewhere", "1.png", "2.png")
    root = tree(tmp_path / "set", "a/1.png", "a/2.png", "b/1.png")
    (root / "c").symlink_to(elsewhere, target_is_directory=True)
    (root / "a" / "self").symlink_to(root / "a", target_is_directory=True)
    dataset = sources.load("folder", root)
    assert sorted(names(dataset, "train") + names(dataset, "test")) == [
        f"{c}.png" for c in ("a/1", "a/2", "b/1", "c/1", "c/2")
    ]


def test_order_and_names_do_not_depend_on_the_spelling_of_accents(tmp_path):
    files = ["zebra/1.png", "épée/1.png", "épée/2.png", "Ahorn/1.png"]
    spelt = {}
    for form in ("NFC", "NFD"):
        root = tree(tmp_path / form, *(unicodedata.normalize(form, f) for f in files))
        dataset = sources.load("folder", root)
        spelt[form] = (dataset.class_names, names(dataset, "train"))
    assert spelt["NFC"] == spelt["NFD"]

    both = tmp_path / "both"
    tree(both, *(unicodedata.normalize(form, files[1]) for form in ("NFC", "NFD")))
    with pytest.raises(ValueError, match="two folders are called 'épée'"):
        sources.load("folder", tree(both, "a/1.png"))


def test_natural_order():
    shuffled = ["b10", "B2", "b2", "a", "b02", "10", "9", "b2c10", "b2c9"]
    expected = ["9", "10", "a", "B2", "b02", "b2", "b2c9", "b2c10", "b10"]
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        assert sorted(shuffled, key=folders.natural_key) == expected


def test_stamp_follows_the_file(tmp_path):
    files = ["train/a/1.png", "train/b/1.png", "test/a/1.png"]
    tree(tmp_path, *files)

    def stamp():
        return sources.load("folder", tmp_path).splits["train"][0].stamp

    first = stamp()
    assert stamp() == first
    file = tmp_path / files[0]
    save_picture(file, seed=99)
    os.utime(file, ns=(10**15, 10**15))
    second = stamp()
    assert second != first
    save_picture(file, size=(20, 20))
    os.utime(file, ns=(10**15, 10**15))
    assert stamp() != second


# --- CUB-200-2011 ------------------------------------------------------------------

CUB_FILES = ("001.Wren/w1.jpg", "001.Wren/w2.jpg", "002.Tit/t1.jpg", "002.Tit/t2.jpg")


def cub_tree(root: Path, *, boxes: Any = True, **changes) -> Path:
    """A small CUB; `changes` replace whole lists, "" removes one."""
    for i, file in enumerate(CUB_FILES):
        save_picture(root / "images" / file, i, size=(100, 50))
    lists = {
        "images": "".join(f"{i} {file}\n" for i, file in enumerate(CUB_FILES, 1)),
        "image_class_labels": "1 1\n2 1\n3 2\n4 2\n",
        "train_test_split": "1 1\n2 0\n3 0\n4 1\n",
        "classes": "1 001.Wren\n2 002.Tit\n",
    }
    if boxes:
        lists["bounding_boxes"] = "".join(
            f"{i} 10.0 5.0 50.0 20.0\n" for i in range(1, 5)
        )
    for name, text in {**lists, **changes}.items():
        if text:
            (root / f"{name}.txt").write_text(text)
    return root


def test_cub(tmp_path):
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


def test_cub_without_boxes_and_with_a_picture_too_many(tmp_path):
    cub_tree(tmp_path, boxes=False)
    save_picture(tmp_path / "images/001.Wren/w3.jpg")
    dataset = sources.load("cub", tmp_path)
    assert dataset.splits["train"][0].box is None
    assert len(dataset.notes) == 1
    assert dataset.notes[0].startswith("1 pictures not listed: ")
    assert dataset.notes[0].endswith("w3.jpg")


def test_cub_with_gaps_in_its_class_numbers(tmp_path):
    cub_tree(
        tmp_path,
        classes="17 017.Tit\n9 009.Wren\n",
        image_class_labels="1 9\n2 9\n3 17\n4 17\n",
    )
    dataset = sources.load("cub", tmp_path)
    assert dataset.class_names == ("009.Wren", "017.Tit")
    assert labels(dataset, "train") == [0, 1]


CUB_MISTAKES = {
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
    "doubled picture": (
        {"images": "".join(f"{i} {CUB_FILES[i // 3]}\n" for i in range(1, 5))},
        r"pictures listed more than once: images/001\.Wren/w1\.jpg",
    ),
    "class never trained": (
        {"train_test_split": "1 1\n2 1\n3 0\n4 0\n"},
        r"1 classes have no training picture: 002\.Tit",
    ),
    "no test": ({"train_test_split": "1 1\n2 1\n3 1\n4 1\n"}, "'test' has no pictures"),
}


@pytest.mark.parametrize("mistake", CUB_MISTAKES)
def test_mistakes_in_cub(mistake, tmp_path):
    changes, message = CUB_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message) as caught:
        sources.load("cub", cub_tree(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)


def test_missing_pictures_are_counted_and_named(tmp_path):
    cub_tree(tmp_path)
    for file in (CUB_FILES[0], CUB_FILES[2]):
        (tmp_path / "images" / file).unlink()
    with pytest.raises(
        ValueError, match=r"2 listed pictures are missing: .*w1\.jpg, .*t1"
    ):
        sources.load("cub", tmp_path)


def test_loading_opens_no_picture(tmp_path):
    cub_tree(tmp_path)
    for file in CUB_FILES:
        (tmp_path / "images" / file).write_bytes(b"not a picture")
    record = sources.load("cub", tmp_path).splits["train"][0]
    for use in (lambda: record.box, lambda: record.read(32)):
        with pytest.raises(ValueError, match=r"w1\.jpg: not a picture"):
            use()


# Where a mark in the stored picture's top left quarter goes once it is upright.
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_with_the_picture(orientation, tmp_path):
    cub_tree(tmp_path, bounding_boxes="".join(f"{i} 8 8 24 8\n" for i in range(1, 5)))
    pixels = np.zeros((48, 80, 3), np.uint8)
    pixels[8:16, 8:32] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "images" / CUB_FILES[0]
    Image.fromarray(pixels).save(file, exif=exif, quality=100)

    record = sources.load("cub", tmp_path).splits["train"][0]
    seen = record.read(48)[..., 0] > 128
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


def test_boxes_follow_the_cut_of_long_pictures_and_stay_inside(tmp_path):
    cub_tree(
        tmp_path,
        bounding_boxes="1 950 0 100 5\n2 0 0 10 5\n3 -5 -5 20 20\n4 90 40 99 99\n",
    )
    for file in CUB_FILES[:2]:
        save_picture(tmp_path / "images" / file, size=(2000, 10))
    dataset = sources.load("cub", tmp_path)
    long, corner = dataset.splits["train"]
    outside, edge = dataset.splits["test"]
    assert long.box == pytest.approx((0, 0, 1, 0.5))
    assert corner.box == pytest.approx((0.9, 0.8, 1, 1))
    assert outside.box == pytest.approx((0, 0, 0, 0.5))
    assert edge.box == pytest.approx((0, 0, 0.15, 0.3))


# --- Stanford Cars -----------------------------------------------------------------

CARS = ("Acura TL Sedan 2012", "BMW M3 Coupe 2012", "Ram C/V Cargo Van Minivan 2012")
CAR_LABELS = {"train": (3, 1, 2, 1), "test": (2, 3)}


def save_mat(file: Path, variable: str, rows: list[dict]) -> None:
    """Writes a MATLAB struct array, as the devkit has it."""
    array = np.empty((1, len(rows)), [(key, object) for key in rows[0]])
    for i, row in enumerate(rows):
        array[0, i] = tuple(row.values())
    file.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(file, {variable: array, "class_names": np.array([CARS], object)})


def car_rows(split: str, name: str = "fname", folder: str = "", first: int = 1) -> list:
    box = {"bbox_x1": 11, "bbox_y1": 1, "bbox_x2": 60, "bbox_y2": 25}
    return [
        {**box, "class": number, name: f"{folder}{i:05d}.jpg"}
        for i, number in enumerate(CAR_LABELS[split], first)
    ]


def devkit_tree(
    root: Path, *, kit="devkit", test_labels: str | None = "", nested: bool = False
) -> Path:
    for split, numbers in CAR_LABELS.items():
        folder = root / f"cars_{split}" / (f"cars_{split}" if nested else "")
        for i in range(1, len(numbers) + 1):
            save_picture(folder / f"{i:05d}.jpg", i, size=(100, 50))
    save_mat(root / kit / "cars_meta.mat", "unused", [{"a": 1}])
    save_mat(root / kit / "cars_train_annos.mat", "annotations", car_rows("train"))
    unlabelled = [
        {k: v for k, v in r.items() if k != "class"} for r in car_rows("test")
    ]
    save_mat(root / kit / "cars_test_annos.mat", "annotations", unlabelled)
    if test_labels is not None:
        file = root / test_labels / "cars_test_annos_withlabels.mat"
        save_mat(file, "annotations", car_rows("test"))
    return root


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
def test_cars_devkit(layout, tmp_path):
    devkit_tree(tmp_path / "stanford_cars", **layout)
    for path in (tmp_path, tmp_path / "stanford_cars"):
        dataset = sources.load("cars", path)
        assert dataset.name == "cars"
        assert dataset.class_names == CARS
        assert labels(dataset, "train") == [2, 0, 1, 0]
        assert labels(dataset, "test") == [1, 2]
        folder = "cars_test/cars_test" if layout.get("nested") else "cars_test"
        assert names(dataset, "test") == [f"{folder}/00001.jpg", f"{folder}/00002.jpg"]
        assert dataset.notes == ()
    record = dataset.splits["train"][0]
    assert record.box == pytest.approx((0.1, 0, 0.6, 0.5))
    assert record.read(25).shape == (25, 50, 3)


def test_cars_without_test_labels_says_which_file_goes_where(tmp_path):
    devkit_tree(tmp_path, test_labels=None)
    place = tmp_path / "cars_test_annos_withlabels.mat"
    with pytest.raises(
        ValueError, match=f"{place}: this file is missing; put it there"
    ):
        sources.load("cars", tmp_path)
    save_mat(tmp_path / "cars_annos.mat", "annotations", [{"a": 1}])
    with pytest.raises(
        ValueError, match=r"cars_annos\.mat cannot replace it: it numbers"
    ):
        sources.load("cars", tmp_path)


def test_unlabelled_test_list_under_the_other_name(tmp_path):
    devkit_tree(tmp_path)
    unlabelled = tmp_path / "devkit" / "cars_test_annos.mat"
    unlabelled.replace(tmp_path / "cars_test_annos_withlabels.mat")
    with pytest.raises(ValueError, match="its annotations lack class; is it another"):
        sources.load("cars", tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 20, None])
def test_damaged_mat_is_named(content, tmp_path):
    file = devkit_tree(tmp_path) / "devkit" / "cars_train_annos.mat"
    file.write_bytes(file.read_bytes()[:150] if content is None else content)
    with pytest.raises(
        ValueError, match=r"cars_train_annos\.mat: no 'annotations' can"
    ):
        sources.load("cars", tmp_path)


def test_cars_label_out_of_range(tmp_path):
    devkit_tree(tmp_path)
    rows = car_rows("train")
    rows[1]["class"] = 4
    save_mat(tmp_path / "devkit" / "cars_train_annos.mat", "annotations", rows)
    with pytest.raises(ValueError, match=r"annos\.mat: class 4 is not one of the 3"):
        sources.load("cars", tmp_path)


def test_cars_pictures_missing_or_too_many(tmp_path):
    devkit_tree(tmp_path)
    save_picture(tmp_path / "cars_test" / "00009.jpg")
    (note,) = sources.load("cars", tmp_path).notes
    assert note.startswith("1 pictures not listed: ")
    (tmp_path / "cars_test" / "00002.jpg").unlink()
    with pytest.raises(
        ValueError, match=r"1 listed pictures are missing: .*00002\.jpg"
    ):
        sources.load("cars", tmp_path)


def test_cars_one_folder(tmp_path):
    train = car_rows("train", "relative_im_path", "car_ims/", first=1)
    test = car_rows("test", "relative_im_path", "car_ims/", first=5)
    rows = [{**row, "test": 0} for row in train] + [{**row, "test": 1} for row in test]
    save_mat(tmp_path / "cars_annos.mat", "annotations", rows)
    for row in rows:
        save_picture(tmp_path / row["relative_im_path"], size=(100, 50))

    dataset = sources.load("cars", tmp_path)
    assert dataset.class_names == CARS
    assert labels(dataset, "train") == [2, 0, 1, 0]
    assert labels(dataset, "test") == [1, 2]
    assert names(dataset, "test") == ["car_ims/00005.jpg", "car_ims/00006.jpg"]
    assert dataset.splits["test"][0].box == pytest.approx((0.1, 0, 0.6, 0.5))

    (tmp_path / "cars_annos.mat").unlink()
    with pytest.raises(ValueError, match=r"cars_annos\.mat: this file is missing"):
        sources.load("cars", tmp_path)


def test_cars_class_folders(tmp_path):
    safe = [name.replace("/", "-") for name in CARS]
    for split, numbers in CAR_LABELS.items():
        for i, number in enumerate(numbers, 1):
            folder = tmp_path / "car_data" / "car_data" / split / safe[number - 1]
            save_picture(folder / f"{i:05d}.jpg", size=(100, 50))
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
        assert has_boxes == [path == tmp_path] * 4  # the lists lie beside car_data/
    dataset = sources.load("cars", tmp_path)
    assert dataset.splits["train"][0].box == pytest.approx((0.11, 0, 0.6, 0.5))

    (tmp_path / "anno_test.csv").write_text("fname,x1,y1,x2,y2,label\n")
    with pytest.raises(
        ValueError, match=r"anno_test\.csv: 'fname,x1,y1,x2,y2,label' is"
    ):
        sources.load("cars", tmp_path)


# --- NABirds -----------------------------------------------------------------------


def nabirds_tree(root: Path, **changes) -> Path:
    """CUB's lists, but for ids that are words and names of groups without pictures."""
    lists = {
        "images": "".join(f"a-{i} {file}\n" for i, file in enumerate(CUB_FILES)),
        "image_class_labels": "a-0 817\na-1 817\na-2 1010\na-3 1010\n",
        "train_test_split": "a-0 1\na-1 0\na-2 0\na-3 1\n",
        "classes": "0 Birds\n69 Titmice\n817 Titmouse\n1010 Junco (Red-backed/Grey)\n",
        "bounding_boxes": "".join(f"a-{i} 10 5 50 20\n" for i in range(4)),
    }
    return cub_tree(root, **{**lists, **changes})


def test_nabirds_counts_only_classes_with_pictures(tmp_path):
    dataset = sources.load("nabirds", nabirds_tree(tmp_path / "nabirds").parent)
    assert dataset.name == "nabirds"
    assert dataset.class_names == ("Titmouse", "Junco (Red-backed/Grey)")
    assert labels(dataset, "train") == labels(dataset, "test") == [0, 1]
    assert dataset.splits["train"][0].box == pytest.approx((0.1, 0.1, 0.6, 0.5))
    assert dataset.notes == ("2 of 4 names in classes.txt are groups without pictures",)


def test_nabirds_label_without_a_name(tmp_path):
    root = nabirds_tree(tmp_path, classes="0 Birds\n817 Titmouse\n")
    with pytest.raises(
        ValueError, match=r"image a-2 has class '1010'.*in classes\.txt"
    ):
        sources.load("nabirds", root)


# --- FGVC-Aircraft -----------------------------------------------------------------


def aircraft_tree(root: Path, **changes) -> Path:
    """Three pictures of 100 x 70 pixels, of which the lowest 20 rows are a banner."""
    data = root / "fgvc-aircraft-2013b" / "data"
    lists = {
        "variants": "An-12\nF/A-18\n",
        "images_variant_trainval": "0000001 F/A-18\n0000002 An-12\n",
        "images_variant_test": "0000003 F/A-18\n",
        "images_box": "".join(f"000000{i} 11 6 60 70\n" for i in range(1, 4)),
    }
    for i in range(1, 4):
        pixels = np.full((70, 100, 3), (255, 0, 0), np.uint8)
        pixels[50:] = (0, 0, 255)
        file = data / "images" / f"{i:07d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, quality=95, subsampling=0)
    for name, text in {**lists, **changes}.items():
        if text:
            (data / f"{name}.txt").write_text(text)
    return root


def test_aircraft_without_its_banner(tmp_path):
    root = aircraft_tree(tmp_path)
    data = root / "fgvc-aircraft-2013b" / "data"
    for path in (root, data.parent, data):
        dataset = sources.load("aircraft", path)
        assert dataset.class_names == ("An-12", "F/A-18")
        assert names(dataset, "train") == ["images/0000001.jpg", "images/0000002.jpg"]
        assert labels(dataset, "train") == [1, 0]
        assert labels(dataset, "test") == [1]
        (note,) = dataset.notes
        assert note.startswith("the lowest 20 rows")
    record = pickle.loads(pickle.dumps(dataset.splits["train"][0]))
    picture = record.read(50)
    assert picture.shape == (50, 100, 3)
    assert picture[..., 0].min() > 200  # red to its last row
    assert picture[..., 2].max() < 50
    # 11 to 60 and 6 to 70, counted from 1, of 100 x 50 pixels
    assert record.box == pytest.approx((0.1, 0.1, 0.6, 1))
    assert "20 px cut off" in record.stamp


def test_aircraft_without_boxes(tmp_path):
    dataset = sources.load("aircraft", aircraft_tree(tmp_path, images_box=""))
    assert dataset.splits["train"][0].box is None


AIRCRAFT_MISTAKES = {
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
        r"pictures listed more than once: images/0000001\.jpg",
    ),
}


@pytest.mark.parametrize("mistake", AIRCRAFT_MISTAKES)
def test_mistakes_in_aircraft(mistake, tmp_path):
    changes, message = AIRCRAFT_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        sources.load("aircraft", aircraft_tree(tmp_path, **changes))


def test_aircraft_that_is_all_banner(tmp_path):
    aircraft_tree(tmp_path)
    file = tmp_path / "fgvc-aircraft-2013b" / "data" / "images" / "0000001.jpg"
    save_picture(file, size=(100, 20))
    record = sources.load("aircraft", tmp_path).splits["train"][0]
    with pytest.raises(ValueError, match=r"0000001\.jpg: 20 rows, of which"):
        record.read(50)


# --- Stanford Dogs -----------------------------------------------------------------

DOGS = ("n01-Chihuahua", "n02-Afghan_hound")


def dogs_tree(
    root: Path, *, pictures="Images", lists="lists", boxes: str | None = "Annotation"
) -> Path:
    for split, numbers in {"train": (1, 2, 1), "test": (2, 1)}.items():
        files = [
            f"{DOGS[n - 1]}/{split}_{i}.jpg" for i, n in enumerate(numbers, start=1)
        ]
        for name in files:
            save_picture(root / pictures / name, size=(100, 50))
            if boxes:
                xml = root / boxes / name.removesuffix(".jpg")
                xml.parent.mkdir(parents=True, exist_ok=True)
                xml.write_text(
                    "<annotation><object><name>dog</name><bndbox><xmin>15</xmin>"
                    "<ymin>5</ymin><xmax>40</xmax><ymax>25</ymax></bndbox></object>"
                    "<object><bndbox><xmin>10</xmin><ymin>10</ymin><xmax>60</xmax>"
                    "<ymax>20</ymax></bndbox></object></annotation>"
                )
        cells = np.empty((len(files), 1), object)
        cells[:, 0] = files
        (root / lists).mkdir(parents=True, exist_ok=True)
        scipy.io.savemat(
            root / lists / f"{split}_list.mat",
            {"file_list": cells, "labels": np.array(numbers, np.uint8)[:, None]},
        )
    return root


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"lists": ""},
        {
            "pictures": "images/Images",
            "lists": "",
            "boxes": "annotations/Annotation",
        },
    ],
    ids=str,
)
def test_dogs(layout, tmp_path):
    dogs_tree(tmp_path / "dogs", **layout)
    for path in (tmp_path, tmp_path / "dogs"):
        dataset = sources.load("dogs", path)
        assert dataset.class_names == DOGS
        assert labels(dataset, "train") == [0, 1, 0]
        assert labels(dataset, "test") == [1, 0]
        folder = layout.get("pictures", "Images")
        assert names(dataset, "test")[0] == f"{folder}/{DOGS[1]}/test_1.jpg"
        assert dataset.notes == ()
    record = pickle.loads(pickle.dumps(dataset.splits["train"][0]))
    assert record.box == pytest.approx((0.1, 0.1, 0.6, 0.5))  # round both dogs
    assert record.read(25).shape == (25, 50, 3)


def test_dogs_without_boxes(tmp_path):
    dataset = sources.load("dogs", dogs_tree(tmp_path, boxes=None))
    assert dataset.splits["train"][0].box is None
    assert dataset.notes == (f"no boxes: {tmp_path / 'Annotation'} is missing",)


@pytest.mark.parametrize("content", [None, "", "<annotation/>", "<a><bndbox/></a>"])
def test_damaged_annotation_of_a_dog(content, tmp_path):
    dogs_tree(tmp_path)
    file = tmp_path / "Annotation" / DOGS[0] / "train_1"
    file.unlink() if content is None else file.write_text(content)
    record = sources.load("dogs", tmp_path).splits["train"][0]
    with pytest.raises(ValueError, match=f"{file}: no boxes can be read from it"):
        _ = record.box


def test_mistakes_in_dogs(tmp_path):
    dogs_tree(tmp_path)
    file = tmp_path / "lists" / "test_list.mat"
    names_of = np.array(["n01-Chihuahua/test_2.jpg", "n02-Afghan_hound/test_1.jpg"])
    scipy.io.savemat(file, {"file_list": names_of.astype(object), "labels": [2, 1]})
    with pytest.raises(ValueError, match=r"test_2\.jpg' has class 2, which is 'n02-Af"):
        sources.load("dogs", tmp_path)
    scipy.io.savemat(file, {"file_list": names_of.astype(object), "labels": [1]})
    with pytest.raises(ValueError, match="2 files, but 1 labels"):
        sources.load("dogs", tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"no test_list\.mat; .*Kaggle leave out"):
        sources.load("dogs", tmp_path)


# --- CSV ---------------------------------------------------------------------------


def csv_tree(root: Path, text: str, *, encoding="utf-8") -> Path:
    """Pictures 1 to 8 of 100 x 50 pixels, and a CSV beside them."""
    for i in range(1, 9):
        save_picture(root / "photos" / f"{i}.png", i, size=(100, 50))
    file = root / "list.csv"
    file.write_bytes(text.encode(encoding))
    return file


def test_csv_with_splits_and_boxes(tmp_path):
    file = csv_tree(
        tmp_path,
        "Path, label ,split,x_min,y_min,x_max,y_max,photographer\n"
        "photos/2.png,Wren,train,10,5,60,25,A\n"
        "\n"
        '"photos/1.png","Tit, great",TRAIN,,,,,B\n'
        "./photos/3.png,Wren,test,0,0,100,50,\n"
        "photos\\4.png,Wren,val,,,,,\n",
    )
    dataset = sources.load("csv", file, test_share=0.3)
    assert dataset.name == "csv"
    assert dataset.root == tmp_path
    assert dataset.class_names == ("Tit, great", "Wren")
    assert names(dataset, "train") == ["photos/2.png", "photos/1.png"]  # as listed
    assert labels(dataset, "train") == [1, 0]
    assert names(dataset, "test") == ["photos/3.png"]
    assert dataset.splits["train"][0].box == pytest.approx((0.1, 0.1, 0.6, 0.5))
    assert dataset.splits["train"][1].box is None
    assert dataset.splits["train"][0].read(25).shape == (25, 50, 3)
    assert dataset.notes == (
        "1 rows of the split 'val' are not used",
        f"columns of {file} that are not used: photographer",
    )


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_of_spreadsheets(separator, encoding, tmp_path):
    text = "label,split,path\r\n2,train,photos/1.png\r\n10,train,photos/2.png\r\n"
    text += "02,validation,photos/3.png\r\n"
    text = text.replace(",", separator)
    dataset = sources.load("csv", csv_tree(tmp_path, text, encoding=encoding))
    assert dataset.class_names == ("2", "10")
    assert labels(dataset, "train") == [0, 1]
    assert labels(dataset, "test") == [0]  # 02 is 2
    assert names(dataset, "test") == ["photos/3.png"]


def test_csv_without_splits_draws_as_from_folders(tmp_path):
    text = "path,label\n" + "".join(f"photos/{i}.png,{i % 2}\n" for i in range(1, 9))
    file = csv_tree(tmp_path, text)
    dataset = sources.load("csv", file, seed=1, test_share=0.5)
    assert len(dataset.splits["test"]) == 4
    assert sum(labels(dataset, "test")) == 2
    assert "4 of 8 pictures were drawn for testing" in dataset.notes[0]
    for split in ("train", "test"):
        assert names(dataset, split) == sorted(names(dataset, split))
    again = sources.load("csv", file, seed=1, test_share=0.5)
    assert names(again, "test") == names(dataset, "test")
    others = [sources.load("csv", file, seed=s, test_share=0.5) for s in (2, 3, 4)]
    assert any(names(other, "test") != names(dataset, "test") for other in others)


ROW = "photos/1.png,a,train\n"
CSV_MISTAKES = {
    "empty file": ("", r"header \[\] lacks path, label; expected"),
    "no rows": ("path,label\n\n", "there are no rows below the header"),
    "no header": (ROW, r"header .*1\.png.* lacks path, label"),
    "half a box": ("path,label,x_min,y_min\n", "lacks x_max, y_max"),
    "doubled column": ("path,label,Label\n", "doubles label"),
    "short row": (f"path,label,split\n{ROW}photos/2.png,b\n", "line 3: 2 values, but"),
    "after lines in quotes": ('path,label\nphotos/1.png,"a\nb"\nx\n', "line 4: 1 val"),
    "open quotes": ('path,label\nphotos/1.png,"a\n', "after line .*: unexpected end"),
    "no path": ("path,label\n,a\n", "line 2: the path is ''"),
    "upwards": ("path,label\nphotos/../../1.png,a\n", "line 2: .* leaves the CSV's"),
    "absolute": ("path,label\n/photos/1.png,a\n", "line 2: .* leaves the CSV's"),
    "drive": ("path,label\nC:\\photos\\1.png,a\n", "line 2: .* leaves the CSV's"),
    "no label": ("path,label\nphotos/1.png, \n", "line 2: the label is empty"),
    "odd split": (
        f"path,label,split\n{ROW}photos/2.png,b,dev\n",
        "line 3: the split is 'dev'; use",
    ),
    "no split": (
        f"path,label,split\n{ROW}photos/2.png,b,\n",
        "line 3: the split is ''; use",
    ),
    "twice": (
        "path,label\nphotos/1.png,a\n./photos/1.png,b\n",
        "line 3: './photos/1.png' is on line 2 already",
    ),
    "missing": (
        "path,label\nphotos/1.png,a\nphotos/9.png,b\nphotos,c\n",
        r"2 of 3 pictures are not there: line 3: photos/9\.png, line 4: photos; paths",
    ),
    "one class": ("path,label\nphotos/1.png,a\nphotos/2.png,a\n", "only the class a"),
    "no training": (
        "path,label,split\nphotos/1.png,a,test\nphotos/2.png,b,test\n",
        "split 'train' has no pictures",
    ),
}


@pytest.mark.parametrize("mistake", CSV_MISTAKES)
def test_mistakes_in_csv(mistake, tmp_path):
    text, message = CSV_MISTAKES[mistake]
    with pytest.raises(ValueError, match=message) as caught:
        sources.load("csv", csv_tree(tmp_path, text))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "box",
    [
        "1,2,3,",
        "1,2,3,x",
        "9,2,3,4",
        "1,9,3,4",
        "nan,1,2,3",
        "1,2,3,inf",
        "1,2,inf,4",
        "-inf,2,3,4",
        "1,-inf,3,4",
        "1,2,3,nan",
    ],
)
def test_odd_boxes_in_csv(box, tmp_path):
    text = f"path,label,x_min,y_min,x_max,y_max\nphotos/1.png,a,{box}\n"
    with pytest.raises(ValueError, match=r"line 2: the box is .*x_min < x_max"):
        sources.load("csv", csv_tree(tmp_path, text))


def test_csv_in_another_encoding(tmp_path):
    file = csv_tree(tmp_path, "path,label\nphotos/1.png,épée\n", encoding="latin-1")
    with pytest.raises(ValueError, match=r"list\.csv: .*save the file as UTF-8"):
        sources.load("csv", file)


# --- real photographs --------------------------------------------------------------


def test_real_cub(shared_data):
    dataset = sources.load("cub", shared_data / "cub_10")
    assert [len(dataset.splits[split]) for split in ("train", "test")] == [149, 145]
    assert len(dataset.class_names) == 10
    assert dataset.notes == ()
    for records in dataset.splits.values():
        for record in records:
            assert f"/{dataset.class_names[record.label]}/" in record.name
    assert min(dataset.splits["train"][0].read(64).shape[:2]) == 64


def test_real_cars(shared_data):
    dataset = sources.load("cars", shared_data / "stanford_cars_98")
    assert [len(dataset.splits[split]) for split in ("train", "test")] == [3115, 993]
    assert len(dataset.class_names) == 98
    assert dataset.notes == ()
    assert set(labels(dataset, "test")) <= set(range(98))
    assert dataset.splits["test"][0].box == (0, 0, 1, 1)  # these are cut to the car
    assert min(dataset.splits["test"][0].read(64).shape[:2]) == 64
