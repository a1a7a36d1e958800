import functools
import io
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from cra_jax.datasets import sources, survey
from cra_jax.input.records import Dataset, Record


def noise(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def save(image: Image.Image, file: Path, **options) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return file


def lines_of(dataset: Dataset, **options) -> list[str]:
    return survey.describe(dataset, progress=False, **options).splitlines()


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Makes a dataset of 3 classes with all special cases of the survey."""
    root = tmp_path / "dataset"
    for i, name in enumerate(("Tit", "Tit", "Wren", "Wren", "Wren", "Owl")):
        save(noise(i), root / "train" / name / f"{i}.png")
    save(noise(10, 30, 20).convert("L"), root / "train/Owl/grey.png")
    save(noise(11, 500, 20), root / "train/Owl/long.png")
    frames = [noise(i).convert("P") for i in (12, 13)]
    animation = root / "train/Owl/moving.gif"
    save(frames[0], animation, save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    save(noise(14), root / "test/Tit/turned.jpg", exif=exif)
    save(noise(15), root / "test/Wren/plain.jpg")
    (root / "test/Wren/page.jpg").write_text("<html>not an image</html>")
    return root


def test_survey_of_a_dataset_without_special_cases(tmp_path):
    for i in range(8):
        split = "test" if i < 2 else "train"
        save(noise(i), tmp_path / split / "ab"[i % 2] / f"{i}.jpg")
    assert lines_of(sources.load("folder", tmp_path)) == [
        f"folder: 2 classes in {tmp_path}",
        "train: 6 images of 2 classes, 3 each",
        "test: 2 images of 2 classes, 1 each",
        "sizes: median 60 x 40 pixels; shorter side 40 to 40, median 40",
        "  smallest train/a/2.jpg (60 x 40), largest test/b/1.jpg (60 x 40)",
        "kinds: 8 JPEG RGB",
        "rotated by EXIF: none",
        "boxes: none",
        "duplicates within train: none",
        "duplicates within test: none",
        "duplicates between the splits: none",
        "unreadable: none",
    ]


@pytest.mark.parametrize("workers", [1, 4])
def test_survey_of_a_dataset_with_all_special_cases(mixed, workers):
    dataset = sources.load("folder", mixed)
    lines = lines_of(dataset, workers=workers)
    assert lines[:10] == [
        f"folder: 3 classes in {mixed}",
        "train: 9 images of 3 classes; of a class 2 to 4, median 3",
        "  fewest, 2: Tit",
        "  most, 4: Owl",
        "test: 3 images of 2 classes; of a class 1 to 2, median 1.5",
        "  fewest, 1: Tit",
        "  most, 2: Wren",
        "  classes without an image: 1: Owl",
        "note: 'test' has no images of 1 of the 3 classes, which its scores leave out:"
        " Owl",
        "sizes: median 60 x 40 pixels; shorter side 20 to 40, median 40",
    ]
    assert lines[10:] == [
        "  smallest train/Owl/grey.png (30 x 20),"
        " largest train/Owl/long.png (500 x 20)",
        "  longer than 8 to 1, ends are cropped: 1: train/Owl/long.png",
        "kinds: 7 PNG RGB, 2 JPEG RGB, 1 PNG L, 1 GIF P",
        "rotated by EXIF: 1: test/Tit/turned.jpg",
        "boxes: none",
        "duplicates within train: none",
        "duplicates within test: none",
        "duplicates between the splits: none",
        "unreadable: 1",
        lines[-1],
    ]
    assert lines[-1].startswith("  test/Wren/page.jpg: not an image")


def test_images_with_equal_pixels_are_duplicates(mixed):
    train, test = mixed / "train", mixed / "test"
    shutil.copy(train / "Tit/0.png", train / "Wren/copy.png")
    note = PngImagePlugin.PngInfo()
    note.add_text("Comment", "saved again")
    save(Image.open(train / "Tit/1.png"), test / "Tit/again.png", pnginfo=note)
    save(noise(1, 40, 60), test / "Tit/other.png")  # the same number of pixels as 1.png
    for name in ("x", "y"):
        save(noise(99), test / f"Wren/{name}.png")
    lines = lines_of(sources.load("folder", mixed))
    start = lines.index("duplicates within train: 1")
    assert lines[start:-2] == [
        "duplicates within train: 1",
        "  train/Tit/0.png (train) = train/Wren/copy.png (train);"
        " LABELS DIFFER: Tit / Wren",
        "duplicates within test: 1",
        "  test/Wren/x.png (test) = test/Wren/y.png (test)",
        "duplicates between the splits: 1",
        "  train/Tit/1.png (train) = test/Tit/again.png (test)",
    ]


def test_images_of_different_shapes_are_no_duplicates(tmp_path):
    for i, size in enumerate([(20, 30), (30, 20)]):
        save(Image.new("RGB", size, "red"), tmp_path / f"train/{'ab'[i]}/1.png")
        save(noise(i), tmp_path / f"test/{'ab'[i]}/1.png")
    lines = lines_of(sources.load("folder", tmp_path))
    assert "duplicates within train: none" in lines


def test_long_lists_of_names_are_truncated(tmp_path):
    for i in range(13):
        save(noise(i, 90, 10), tmp_path / f"train/{'ab'[i % 2]}/{i}.png")
    save(noise(50), tmp_path / "test/a/1.png")
    lines = lines_of(sources.load("folder", tmp_path))
    (line,) = [line for line in lines if "ends are cropped" in line]
    assert line.startswith(
        "  longer than 8 to 1, ends are cropped: 13: train/a/0.png, "
    )
    assert line.endswith("and 3 more")


def test_survey_of_only_unreadable_images(tmp_path):
    for name in ("train/a", "train/b", "test/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").write_bytes(b"")
    lines = lines_of(sources.load("folder", tmp_path), sheet=tmp_path / "sheet.png")
    assert lines[5] == "unreadable: 3"
    assert all("the file is empty" in line for line in lines[6:9])
    assert lines[9] == f"contact sheet of 0 of 2 classes: {tmp_path / 'sheet.png'}"


def test_missing_file_is_listed_as_unreadable(mixed):
    dataset = sources.load("folder", mixed)
    (mixed / "train/Tit/0.png").unlink()
    lines = lines_of(dataset)
    assert "unreadable: 2" in lines
    assert any("train/Tit/0.png" in line for line in lines[-2:])


def boxed(root: Path, *boxes: str) -> Dataset:
    """Makes a CSV of images of 100 x 50 pixels: class a is red, class b is green."""
    rows = ["path,label,split,x_min,y_min,x_max,y_max"]
    for i, box in enumerate(boxes):
        label = "ab"[i % 2]
        color = {"a": (200, 0, 0), "b": (0, 200, 0)}[label]
        save(Image.new("RGB", (100, 50), color), root / f"{i}.png")
        rows.append(f"{i}.png,{label},{'test' if i > 1 else 'train'},{box}")
    (root / "list.csv").write_text("\n".join(rows))
    return sources.load("csv", root / "list.csv")


def test_survey_of_boxes(tmp_path):
    dataset = boxed(
        tmp_path, "0,0,100,50", "50,25,100,50", "0,0,50,50", "200,60,300,70", ",,,"
    )
    lines = lines_of(dataset)
    index = lines.index("boxes: of 3 images; 25% to 100% of the area, median 50%")
    assert "3.png: its box 200, 60, 300, 70 lies outside" in lines[index + 1]


def test_dark_images_are_listed(tmp_path):
    for split, label, i in itertools.product(("train", "test"), "ab", range(2)):
        values = np.random.default_rng(i).integers(0, 4096, (20, 20)).astype(np.uint16)
        values *= 16 if label == "a" else 1
        save(Image.fromarray(values), tmp_path / split / label / f"{i}.png")
    lines = lines_of(sources.load("folder", tmp_path))
    (line,) = [line for line in lines if "if 12 bits are stored in 16" in line]
    assert line.endswith("4: train/b/0.png, train/b/1.png, test/b/0.png, test/b/1.png")


def test_unreadable_box_is_listed(mixed, tmp_path):
    def fail():
        raise ValueError("no such annotation")

    dataset = sources.load("folder", mixed)
    content = io.BytesIO()
    noise(1).save(content, "PNG")
    record = Record(
        "x.png",
        0,
        lambda side: np.zeros((side, side, 3), np.uint8),
        "",
        fail,
        content.getvalue,
    )
    dataset.splits["test"] = (record,)
    lines = lines_of(dataset, sheet=tmp_path / "sheet.png")
    index = lines.index("boxes: of 0 images")
    assert lines[index + 1] == "  x.png: no such annotation"


def test_contact_sheet_shows_images_boxes_and_class_names(tmp_path):
    dataset = boxed(tmp_path, "25,0,100,50", "25,0,100,50", "0,0,50,50", "1,1,9,9")
    file = tmp_path / "new" / "sheet.png"
    lines = lines_of(dataset, sheet=file)
    assert lines[-1] == f"contact sheet of 2 of 2 classes: {file}"
    sheet = np.asarray(Image.open(file)).astype(int)
    step = survey._SIDE_PX + survey._GAP_PX
    for row, color in enumerate([(200, 0, 0), (0, 200, 0)]):
        tile = sheet[row * step :, survey._NAME_PX :][
            : survey._SIDE_PX, : survey._SIDE_PX
        ]
        assert (tile[56, 56] == color).all()
        assert (tile[56, 0] == survey._FRAME).all()  # the box's left edge
        assert (sheet[row * step :, : survey._NAME_PX][:112] < 100).any()  # class name
    rest = sheet[:, survey._NAME_PX + step :]
    assert (rest == 255).all()  # one training image a class, and no test images


def test_contact_sheet_shows_a_subset_of_many_images(tmp_path):
    def read(label: int, side_px: int) -> np.ndarray:
        if label == 1:
            raise ValueError("lost")
        return np.full((side_px, side_px, 3), label, np.uint8)

    records = tuple(
        Record(f"{label} {i}", label, functools.partial(read, label), "")
        for label in range(26)
        for i in range(9)
    )
    names = tuple(f"class {label} with a very long name" for label in range(26))
    dataset = Dataset("made", names, {"train": records, "test": records})
    lines = lines_of(dataset, sheet=tmp_path / "sheet.png")
    assert lines[-2] == "no image is stored: images are drawn when they are read"
    assert lines[-1].startswith("contact sheet of 24 of 26 classes")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (24 * 116, 208 + 8 * 116, 3)
    shown = sheet[56::116, 208 + 56 :: 116]
    assert (shown == shown[:, :1]).all()
    values = shown[:, 0, 0].tolist()
    assert values[0] == 0
    assert values[1] == 128  # grey, because it is unreadable
    assert values[2:] == sorted(values[2:])


def test_spread_selects_evenly_spaced_items():
    assert survey._evenly_spaced(range(10), 5) == [0, 2, 4, 6, 8]
    assert survey._evenly_spaced(range(3), 5) == [0, 1, 2]
    assert survey._evenly_spaced([], 5) == []


def test_unwritable_contact_sheet_is_an_error(mixed):
    dataset = sources.load("folder", mixed)
    file = mixed / "train/Tit/0.png/sheet.png"
    with pytest.raises(ValueError, match=r"cannot write the contact sheet .*another"):
        survey.describe(dataset, sheet=file, progress=False)


def test_progress_is_shown(mixed, capsys):
    survey.describe(sources.load("folder", mixed))
    assert "examining: 12 of 12 images" in capsys.readouterr().err


def test_survey_of_real_birds(shared_data, tmp_path):
    dataset = sources.load("cub", shared_data / "cub_10")
    lines = lines_of(dataset, sheet=tmp_path / "sheet.png")
    assert "kinds: 294 JPEG RGB" in lines
    assert "unreadable: none" in lines
    index = lines.index("duplicates between the splits: 1")  # an error in CUB
    assert "Crested_Auklet_0024_2676149281.jpg (train) = " in lines[index + 1]
    assert "LABELS DIFFER: 005.Crested_Auklet / 007.Par" in lines[index + 1]
