"""The lists that CUB-200-2011 and Stanford Cars came with -> files and their classes.

Stanford Cars has lost its home, and is handed around in three layouts: all are read.
No picture is opened.
"""

import collections
import csv
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cra_jax import folders
from cra_jax.folders import Corners, Entry, Listing, Splits, natural_key, some

LAYOUTS = {
    "cub": (
        "expected the folder CUB_200_2011 as published (images.txt,"
        " image_class_labels.txt, train_test_split.txt, classes.txt, images/), or its"
        " parent; get CUB_200_2011.tgz (1.15 GB) from"
        " https://data.caltech.edu/records/65de6-vp158 and unpack it"
    ),
    "cars": (
        "expected cars_train/, cars_test/, devkit/ with its .mat files and"
        " cars_test_annos_withlabels.mat; or car_ims/ with cars_annos.mat; or train/"
        " and test/ with one folder a class. The address at Stanford is dead; Kaggle"
        " has copies in all three layouts (about 2 GB)"
    ),
}
"""What each source expects on disk, and where to get it; ends messages."""


def cub(path: Path) -> Listing:
    """Lists CUB-200-2011, whose folder `path` is or contains.

    Raises:
        ValueError: a list is missing, damaged or at odds with the others.
    """
    root = _below(path, lambda folder: (folder / "images.txt").is_file())
    if root is None:
        raise ValueError(f"{path}: no images.txt here; {LAYOUTS['cub']}")
    files = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt", files)
    is_train = _table(root / "train_test_split.txt", files)
    classes = _table(root / "classes.txt")
    has_boxes = (root / "bounding_boxes.txt").is_file()
    boxes = _table(root / "bounding_boxes.txt", files) if has_boxes else {}
    position = {key: i for i, key in enumerate(sorted(classes, key=natural_key))}

    splits: Splits = {"train": [], "test": []}
    for key, file in files.items():
        try:
            label = position[labels[key]]
            split = {"0": "test", "1": "train"}[is_train[key]]
            corners = None
            if has_boxes:
                x, y, width, height = map(float, boxes[key].split())
                corners = (x, y, x + width, y + height)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{root}: image {key} has class {labels[key]!r}, split"
                f" {is_train[key]!r}, box {boxes.get(key)!r}: the class must be in"
                " classes.txt, the split 0 or 1, the box four numbers; unpack the"
                " archive anew"
            ) from error
        splits[split].append(Entry(root / "images" / file, label, corners))
    names = tuple(classes[key] for key in position)
    return Listing(root, names, splits, _unlisted(root / "images", splits))


def _table(file: Path, like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Reads lines of "id value"; ids must be those of `like`."""
    if not file.is_file():
        raise ValueError(f"{file}: this file is missing; {LAYOUTS['cub']}")
    table = {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        key, _, value = line.strip().partition(" ")
        if not key:
            continue
        if not value or key in table:
            raise ValueError(
                f"{file}, line {number}: {line!r} is not a new id and its value; unpack"
                " the archive anew"
            )
        table[key] = value.strip()
    if like is not None and table.keys() != like.keys():
        odd = sorted(table.keys() ^ like.keys(), key=natural_key)
        raise ValueError(
            f"{file}: {len(table)} ids, but images.txt has {len(like)}; not in both:"
            f" {some(odd)}; unpack the archive anew"
        )
    return table


def cars(path: Path) -> Listing:
    """Lists Stanford Cars, in any of the three layouts that are handed around.

    Raises:
        ValueError: a list is missing or damaged, or a label is out of range.
    """
    markers = ("cars_train", "car_ims", "train")
    root = _below(path, lambda folder: any((folder / m).is_dir() for m in markers))
    if root is None:
        raise ValueError(f"{path}: no Stanford Cars here; {LAYOUTS['cars']}")
    if (root / "cars_train").is_dir():
        return _cars_devkit(root)
    if (root / "car_ims").is_dir():
        return _cars_one_folder(root)
    return _cars_class_folders(root, path)


def _cars_devkit(root: Path) -> Listing:
    """`cars_train/`, `cars_test/`, and the lists of the devkit wherever they lie."""
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
        notes += _unlisted(folder, splits)
    return Listing(root, names, splits, notes)


def _cars_one_folder(root: Path) -> Listing:
    """`car_ims/` and `cars_annos.mat`."""
    file = _find_mat(root, "cars_annos.mat")
    names = _mat_names(file)
    splits: Splits = {"train": [], "test": []}
    for row in _mat_rows(file, "relative_im_path", "class", "test"):
        picture = root / "car_ims" / Path(str(row["relative_im_path"])).name
        split = "test" if row["test"] else "train"
        splits[split].append(_mat_entry(picture, row, file, names))
    return Listing(root, names, splits, _unlisted(root / "car_ims", splits))


def _cars_class_folders(root: Path, path: Path) -> Listing:
    """Class folders, and the boxes in Kaggle's `anno_*.csv`, somewhere above them."""
    listing = folders.class_folders(root)
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
                boxes[row[0]] = _from_one(*map(float, row[1:5]))
            except (IndexError, ValueError, TypeError) as error:
                raise ValueError(
                    f"{file}: {','.join(row)!r} is not file, x1, y1, x2, y2, class; get"
                    " the file anew, or remove it to go without boxes"
                ) from error
    return boxes


def _from_one(x1: float, y1: float, x2: float, y2: float) -> Corners:
    """Stanford's pixels count from 1, and both ends belong to the box."""
    return x1 - 1, y1 - 1, x2, y2


def _mat_entry(picture: Path, row, file: Path, names: Sequence[str]) -> Entry:
    number = int(row["class"])
    if not 1 <= number <= len(names):
        raise ValueError(
            f"{file}: class {number} is not one of the {len(names)} classes; get the"
            " file anew"
        )
    sides = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    corners = None
    if set(sides) <= set(row.dtype.names):
        corners = _from_one(*(float(row[side]) for side in sides))
    return Entry(picture, number - 1, corners)


def _mat_names(file: Path) -> tuple[str, ...]:
    return tuple(str(name) for name in np.atleast_1d(_mat(file, "class_names")))


def _mat_rows(file: Path, *columns: str) -> np.ndarray:
    rows = np.atleast_1d(_mat(file, "annotations"))
    missing = sorted(set(columns) - set(rows.dtype.names or ()))
    if missing:
        raise ValueError(
            f"{file}: its annotations lack {', '.join(missing)}; is it another list"
            " under this name?"
        )
    return rows


def _mat(file: Path, variable: str) -> np.ndarray:
    import scipy.io  # 0.2 s that only Cars should cost

    try:
        return scipy.io.loadmat(file, squeeze_me=True)[variable]
    except Exception as error:  # a damaged file may raise anything at all in scipy
        raise ValueError(
            f"{file}: no {variable!r} can be read from it ({type(error).__name__}:"
            f" {error}); get the file anew"
        ) from error


def _find_mat(root: Path, name: str) -> Path:
    for folder in ("", "devkit", "car_devkit/devkit", "car_devkit", "cars_devkit"):
        if (root / folder / name).is_file():
            return root / folder / name
    message = f"{root / name}: this file is missing; put it there or into devkit/"
    if name == "cars_test_annos_withlabels.mat":
        message += (
            " (185,758 bytes; it came as a file of its own, beside the devkit, whose"
            " cars_test_annos.mat has no labels)"
        )
    if (root / "cars_annos.mat").is_file():
        message += (
            ". cars_annos.mat cannot replace it: it numbers the files of car_ims/,"
            " which are in another order"
        )
    raise ValueError(f"{message}. Layouts: {LAYOUTS['cars']}")


def _unlisted(folder: Path, splits: Splits) -> tuple[str, ...]:
    """A note on pictures below a folder that the lists do not name."""
    listed = {str(entry.file) for entries in splits.values() for entry in entries}
    found = map(str, folders.picture_files(folder, collections.Counter()))
    extra = [file for file in found if file not in listed]
    return (f"{len(extra)} pictures not listed: {some(extra)}",) if extra else ()


def _below(path: Path, is_root: Callable[[Path], bool]) -> Path | None:
    """The first folder that passes the test: `path`, those in it, those in them."""
    level = [path]
    for _ in range(3):
        for folder in level:
            if is_root(folder):
                return folder
        level = [child for folder in level for child in folders.sub_folders(folder)]
    return None
