"""Small directories in the layouts of published datasets."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from PIL import Image

from cra_jax.datasets import listing
from cra_jax.input.records import Dataset


def save_image(file: Path, seed: int = 0, size=(12, 10), **options) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(file, **options)


def tree(root: Path, *files: str) -> Path:
    """Makes files in random order: real images, and text files for all other names."""
    for i, name in enumerate(random.Random(0).sample(files, len(files))):
        if Path(name).suffix.lower() in listing.SUFFIXES:
            save_image(root / name, i)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("no image")
    return root


def names(dataset: Dataset, split: str) -> list[str]:
    return [record.name for record in dataset.splits[split]]


def labels(dataset: Dataset, split: str) -> list[int]:
    return [record.label for record in dataset.splits[split]]


CUB_FILES = ("001.Wren/w1.jpg", "001.Wren/w2.jpg", "002.Tit/t1.jpg", "002.Tit/t2.jpg")


def cub_tree(root: Path, *, boxes: Any = True, **changes) -> Path:
    """Makes a small CUB; `changes` replace the text of lists, "" removes a list."""
    for i, file in enumerate(CUB_FILES):
        save_image(root / "images" / file, i, size=(100, 50))
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
            file = root / f"{name}.txt"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
    return root


def cub_parts(*lines: str, parts: str = "1 beak\n2 left eye\n3 tail\n") -> dict:
    """Changes of `cub_tree` that add parts, by lines of "image part x y visible"."""
    return {"parts/parts": parts, "parts/part_locs": "".join(x + "\n" for x in lines)}


CARS = ("Acura TL Sedan 2012", "BMW M3 Coupe 2012", "Ram C/V Cargo Van Minivan 2012")


CAR_LABELS = {"train": (3, 1, 2, 1), "test": (2, 3)}


def save_mat(file: Path, variable: str, rows: list[dict]) -> None:
    """Writes a MATLAB struct array, as in the devkit of Stanford Cars."""
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
            save_image(folder / f"{i:05d}.jpg", i, size=(100, 50))
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


def nabirds_tree(root: Path, **changes) -> Path:
    """Makes a small NABirds: CUB's lists with text ids and classes without images."""
    lists = {
        "images": "".join(f"a-{i} {file}\n" for i, file in enumerate(CUB_FILES)),
        "image_class_labels": "a-0 817\na-1 817\na-2 1010\na-3 1010\n",
        "train_test_split": "a-0 1\na-1 0\na-2 0\na-3 1\n",
        "classes": "0 Birds\n69 Titmice\n817 Titmouse\n1010 Junco (Red-backed/Grey)\n",
        "bounding_boxes": "".join(f"a-{i} 10 5 50 20\n" for i in range(4)),
    }
    return cub_tree(root, **{**lists, **changes})


def aircraft_tree(root: Path, **changes) -> Path:
    """Makes three images of 100 x 70 pixels, whose lowest 20 rows are a banner."""
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


DOGS = ("n01-Chihuahua", "n02-Afghan_hound")


def dogs_tree(
    root: Path, *, images="Images", lists="lists", boxes: str | None = "Annotation"
) -> Path:
    for split, numbers in {"train": (1, 2, 1), "test": (2, 1)}.items():
        files = [
            f"{DOGS[n - 1]}/{split}_{i}.jpg" for i, n in enumerate(numbers, start=1)
        ]
        for name in files:
            save_image(root / images / name, size=(100, 50))
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


def csv_tree(root: Path, text: str, *, encoding="utf-8") -> Path:
    """Makes images 1 to 8 of 100 x 50 pixels and a CSV file; returns the CSV file."""
    for i in range(1, 9):
        save_image(root / "photos" / f"{i}.png", i, size=(100, 50))
    file = root / "list.csv"
    file.write_bytes(text.encode(encoding))
    return file
