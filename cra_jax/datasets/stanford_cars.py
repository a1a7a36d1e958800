"""Reads Stanford Cars in each of its three layouts: image files, classes and boxes.

The original address is offline; copies have different layouts. No image is opened.
"""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cra_jax.datasets import class_folders, matlab_files
from cra_jax.datasets.listing import (
    Corners,
    Entry,
    Listing,
    Splits,
    find_below,
    first_below,
    from_one,
    unlisted,
)

LAYOUT = (
    "expected cars_train/, cars_test/, devkit/ with its .mat files and"
    " cars_test_annos_withlabels.mat; or car_ims/ with cars_annos.mat; or train/"
    " and test/ with one folder per class. The address at Stanford is offline; Kaggle"
    " has copies in all three layouts (about 2 GB)"
)
"""Expected layout on disk, and the download address; for messages."""

_KITS = ("", "devkit", "car_devkit/devkit", "car_devkit", "cars_devkit")


def cars(path: Path) -> Listing:
    """Lists Stanford Cars, in any of the three layouts in use.

    Raises:
      ValueError: a list is missing or damaged, or a label is out of range.
    """
    markers = ("cars_train", "car_ims", "train")
    root = first_below(path, lambda folder: any((folder / m).is_dir() for m in markers))
    if root is None:
        raise ValueError(f"{path}: no Stanford Cars here; {LAYOUT}")
    if (root / "cars_train").is_dir():
        return _cars_devkit(root)
    if (root / "car_ims").is_dir():
        return _cars_one_folder(root)
    return _cars_class_folders(root, path)


def _cars_devkit(root: Path) -> Listing:
    """`cars_train/`, `cars_test/`, and the lists of the devkit in any known place."""
    names = _mat_names(_find_mat(root, "cars_meta.mat"))
    lists = {
        "train": _find_mat(root, "cars_train_annos.mat"),
        "test": _find_mat(root, "cars_test_annos_withlabels.mat"),
    }
    splits: Splits = {}
    notes = ()
    for split, file in lists.items():
        folder = root / f"cars_{split}"
        if (folder / folder.name).is_dir():  # Kaggle packs each folder twice
            folder = folder / folder.name
        splits[split] = [
            _mat_entry(folder / str(row["fname"]), row, file, names)
            for row in _mat_rows(file, "fname", "class")
        ]
        notes += unlisted(folder, splits)
    return Listing(root, names, splits, notes)


def _cars_one_folder(root: Path) -> Listing:
    """`car_ims/` and `cars_annos.mat`."""
    file = _find_mat(root, "cars_annos.mat")
    names = _mat_names(file)
    splits: Splits = {"train": [], "test": []}
    for row in _mat_rows(file, "relative_im_path", "class", "test"):
        image = root / "car_ims" / Path(str(row["relative_im_path"])).name
        split = "test" if row["test"] else "train"
        splits[split].append(_mat_entry(image, row, file, names))
    return Listing(root, names, splits, unlisted(root / "car_ims", splits))


def _cars_class_folders(root: Path, path: Path) -> Listing:
    """Class folders, and the boxes in Kaggle's `anno_*.csv`, in a folder above them."""
    listing = class_folders.class_folders(root)
    above = [root, *root.parents][: len(root.parts) - len(path.parts) + 1]
    splits: Splits = {}
    for split, entries in listing.splits.items():
        lists = (folder / f"anno_{split}.csv" for folder in above)
        file = next((file for file in lists if file.is_file()), None)
        boxes = _csv_boxes(file) if file else {}
        splits[split] = [e._replace(corners=boxes.get(e.file.name)) for e in entries]
    return dataclasses.replace(listing, splits=splits)


def _csv_boxes(file: Path) -> dict[str, Corners]:
    """Lines of "file, x1, y1, x2, y2, class"."""
    boxes = {}
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.reader(lines):
            try:
                boxes[row[0]] = from_one(*map(float, row[1:5]))
            except (IndexError, ValueError, TypeError) as error:
                raise ValueError(
                    f"{file}: {','.join(row)!r} is not file, x1, y1, x2, y2, class; get"
                    " the file again, or remove it to load no boxes"
                ) from error
    return boxes


def _mat_entry(
    image: Path, row: dict[str, Any], file: Path, names: Sequence[str]
) -> Entry:
    number = row["class"]
    if not (1 <= number <= len(names) and number == int(number)):
        raise ValueError(
            f"{file}: class {number:g} is not one of the {len(names)} classes; get the"
            " file again"
        )
    sides = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    corners = None
    if set(sides) <= row.keys():
        corners = from_one(*(float(row[side]) for side in sides))
    return Entry(image, int(number) - 1, corners)


def _mat_names(file: Path) -> tuple[str, ...]:
    return tuple(map(str, matlab_files.read_variable(file, "class_names", list)))


def _mat_rows(file: Path, name: str, *numbers: str) -> list[dict[str, Any]]:
    """The annotations: each has a file name and, where known, numbers.

    Args:
      file: the list.
      name: the column of the names.
      numbers: required columns.
    """
    rows = matlab_files.read_variable(file, "annotations", list)
    for row in rows:
        missing = {name, *numbers}.difference(row if isinstance(row, dict) else ())
        if missing:
            raise ValueError(
                f"{file}: its annotations lack {', '.join(sorted(missing))}; is it"
                " another list under this name?"
            )
    try:
        return [
            {k: str(v) if k == name else float(v.item()) for k, v in row.items()}
            for row in rows
        ]
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"{file}: its annotations are not names and numbers ({error}); get the file"
            " again"
        ) from error


def _find_mat(root: Path, name: str) -> Path:
    file = find_below(root, _KITS, name)
    if file:
        return file
    message = f"{root / name}: this file is missing; put it there or into devkit/"
    if name == "cars_test_annos_withlabels.mat":
        message += (
            " (185,758 bytes; published separately from the devkit, whose"
            " cars_test_annos.mat has no labels)"
        )
    if (root / "cars_annos.mat").is_file():
        message += (
            ". cars_annos.mat cannot replace it: it numbers the files of car_ims/,"
            " which are in another order"
        )
    raise ValueError(f"{message}. Layouts: {LAYOUT}")
