"""Data sets -> records: what there is to read, before anything is read.

A record names a picture, its class and how to read it. Loading opens no picture: labels
come from the published lists or from folder names, and orders never depend on the file
system. What is missing, doubled or out of range is an error that says how to mend it;
files that are left out are counted in `Dataset.notes`.
"""

import collections
import dataclasses
import functools
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cra_jax import pictures, synthetic

Box = tuple[float, float, float, float]

SOURCES = ("synthetic", "cub", "cars", "folder")

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "synthetic": ("num_species", "habitat_share", "train_size", "test_size"),
    "cub": (),
    "cars": (),
    "folder": ("test_share",),
}
"""The options of `load` that each source reads."""

_LAYOUTS = {
    "cub": (
        "expected the folder CUB_200_2011 as published (images.txt,"
        " image_class_labels.txt, train_test_split.txt, classes.txt, images/), or its"
        " parent; get CUB_200_2011.tgz (1.15 GB) from"
        " https://data.caltech.edu/records/65de6-vp158 and unpack it"
    ),
    "cars": (
        "expected cars_train/, cars_test/, devkit/ with its .mat files and"
        " cars_test_annos_withlabels.mat; or car_ims/ with cars_annos.mat; or train/"
        " and test/ with one folder a class. The address at Stanford is dead; Kaggle has"
        " copies in all three layouts (about 2 GB)"
    ),
    "folder": (
        "expected train/ and test/ (or val/), each with one folder of pictures a class;"
        " or the folders of the classes alone, from which a test share is then drawn"
    ),
}
_TRAIN_NAMES, _TEST_NAMES = ("train",), ("test", "val", "valid")


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture of a data set.

    Attributes:
        name: unique in the data set; for files the path below the data set's root.
        label: index into the data set's `class_names`.
        read: takes short_side_px, returns the picture as uint8 `[h, w, 3]`; picklable.
        stamp: what the picture's content depends on; another stamp, other pixels.
        locate: finds `box`, where the source marks the object; picklable.
    """

    name: str
    label: int
    read: Callable[[int], np.ndarray]
    stamp: str
    locate: Callable[[], Box] | None = None

    @property
    def box(self) -> Box | None:
        """Where the object is, or None where the source does not say.

        (x_min, y_min, x_max, y_max) as fractions of the picture that `read` returns.
        Found at each call, in 0.5 to 2 ms: a file's header or a drawing is needed.
        """
        return self.locate() if self.locate else None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set: "train", "test" and, for the drawn birds, "test_shifted".

    Attributes:
        name: the source's name.
        class_names: names in the order of the labels.
        splits: the records of each split, in an order fixed by their names or lists.
        root: the folder that the names of files start from; None without files.
        notes: what was left out or decided while loading, one line each, to be shown.
    """

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, tuple[Record, ...]]
    root: Path | None = None
    notes: tuple[str, ...] = ()


def load(
    source: str,
    path: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Dataset:
    """Lists the records of a data set.

    Args:
        source: one of `SOURCES`.
        path: the data set's folder; empty or None for "synthetic".
        seed: of the drawings, or of the split that is drawn from folders of classes.
        **options: those of the source in `OPTIONS`.
            num_species (8), habitat_share (0.9), train_size (4096), test_size (1024):
            of the drawn birds.
            test_share (0.2): of each class, where the folders hold no test split.

    Returns:
        A data set whose every class has a training picture. A class may be missing from
        a test split.

    Raises:
        ValueError: the source or an option is unknown, files are missing or damaged,
            labels are out of range, names are doubled, a class has no training picture.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}: choose one of {', '.join(SOURCES)}")
    unknown = sorted(set(options) - set(OPTIONS[source]))
    if unknown:
        known = ", ".join(OPTIONS[source]) or "none"
        raise ValueError(
            f"source {source!r} has no option {', '.join(unknown)}; it has: {known}"
        )
    if source == "synthetic":
        if path:
            raise ValueError(
                f"path is {str(path)!r}, but source 'synthetic' reads no files: empty"
                " the path, or choose another source"
            )
        return _check(_synthetic(seed, **options))
    if not path:
        raise ValueError(f"source {source!r} needs a path: {_LAYOUTS[source]}")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder; {_LAYOUTS[source]}")
    if source == "folder":
        return _check(_folder(root, seed, **options))
    return _check(_cub(root) if source == "cub" else _cars(root))


# --- the drawn birds ---------------------------------------------------------------


def _synthetic(
    seed: int,
    *,
    num_species: int = 8,
    habitat_share: float = 0.9,
    train_size: int = 4096,
    test_size: int = 1024,
) -> Dataset:
    names = synthetic.class_names(num_species)
    setting = {"seed": seed, "num_species": num_species, "habitat_share": habitat_share}
    # Drawings change with the code that draws them.
    code = hashlib.sha256(Path(synthetic.__file__).read_bytes()).hexdigest()[:12]
    stamp = " ".join(f"{key}={value}" for key, value in setting.items()) + f" {code}"
    splits = {}
    for split in synthetic.SPLITS:
        size = train_size if split == "train" else test_size
        splits[split] = tuple(
            Record(
                f"{split}/{index:06d}",
                index % num_species,
                functools.partial(_drawn_image, split, index, setting),
                stamp,
                functools.partial(_drawn_box, split, index, setting),
            )
            for index in range(size)
        )
    return Dataset("synthetic", names, splits)


def _drawn_image(split: str, index: int, setting: dict, short_side_px: int):
    return synthetic.draw(split, index, size_px=short_side_px, **setting).image


def _drawn_box(split: str, index: int, setting: dict) -> Box:
    return synthetic.draw(split, index, size_px=32, **setting).box


# --- CUB-200-2011 ------------------------------------------------------------------


def _cub(path: Path) -> Dataset:
    root = _below(path, lambda folder: (folder / "images.txt").is_file())
    if root is None:
        raise ValueError(f"{path}: no images.txt here; {_LAYOUTS['cub']}")
    files = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt", files)
    is_train = _table(root / "train_test_split.txt", files)
    classes = _table(root / "classes.txt")
    has_boxes = (root / "bounding_boxes.txt").is_file()
    boxes = _table(root / "bounding_boxes.txt", files) if has_boxes else {}
    position = {key: i for i, key in enumerate(sorted(classes, key=natural_key))}

    entries = {"train": [], "test": []}
    for key, file in files.items():
        if labels[key] not in position or is_train[key] not in ("0", "1"):
            raise ValueError(
                f"{root}: image {key} has class {labels[key]!r} and split"
                f" {is_train[key]!r}: the class must be in classes.txt and the split 0"
                " or 1; unpack the archive anew"
            )
        corners = None
        if has_boxes:
            x, y, width, height = map(float, boxes[key].split())
            corners = (x, y, x + width, y + height)
        split = "train" if is_train[key] == "1" else "test"
        entry = (root / "images" / file, position[labels[key]], corners)
        entries[split].append(entry)
    names = tuple(classes[key] for key in position)
    splits = _file_records(root, entries)
    return Dataset("cub", names, splits, root, _unlisted(root / "images", splits))


def _table(file: Path, like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Reads lines of "id value"; ids must be those of `like`."""
    if not file.is_file():
        raise ValueError(f"{file}: this file is missing; {_LAYOUTS['cub']}")
    table = {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        key, _, value = line.strip().partition(" ")
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
            f" {_some(odd)}; unpack the archive anew"
        )
    return table


# --- Stanford Cars -----------------------------------------------------------------


def _cars(path: Path) -> Dataset:
    markers = ("cars_train", "car_ims", "train")
    root = _below(path, lambda folder: any((folder / m).is_dir() for m in markers))
    if root is None:
        raise ValueError(f"{path}: no Stanford Cars here; {_LAYOUTS['cars']}")
    if (root / "cars_train").is_dir():
        return _cars_devkit(root)
    if (root / "car_ims").is_dir():
        return _cars_one_folder(root)
    return dataclasses.replace(_folder(root, 0), name="cars")


def _cars_devkit(root: Path) -> Dataset:
    """`cars_train/`, `cars_test/` and the lists of the devkit, wherever they lie."""
    meta = _find_mat(root, "cars_meta.mat")
    lists = {
        "train": _find_mat(root, "cars_train_annos.mat"),
        "test": _find_mat(root, "cars_test_annos_withlabels.mat"),
    }
    names = tuple(str(name) for name in np.atleast_1d(_mat(meta, "class_names")))
    entries = {}
    for split, file in lists.items():
        folder = root / f"cars_{split}"
        if (folder / folder.name).is_dir():  # Kaggle packs each folder twice
            folder = folder / folder.name
        entries[split] = [
            (folder / str(row["fname"]), *_label_and_corners(row, file, names))
            for row in np.atleast_1d(_mat(file, "annotations", "fname", "class"))
        ]
    splits = _file_records(root, entries)
    left_out = [_unlisted(root / f"cars_{split}", splits) for split in lists]
    return Dataset("cars", names, splits, root, sum(left_out, ()))


def _cars_one_folder(root: Path) -> Dataset:
    """`car_ims/` and `cars_annos.mat`."""
    file = _find_mat(root, "cars_annos.mat")
    names = tuple(str(name) for name in np.atleast_1d(_mat(file, "class_names")))
    entries = {"train": [], "test": []}
    columns = ("relative_im_path", "class", "test")
    for row in np.atleast_1d(_mat(file, "annotations", *columns)):
        picture = root / "car_ims" / Path(str(row["relative_im_path"])).name
        entry = (picture, *_label_and_corners(row, file, names))
        entries["test" if row["test"] else "train"].append(entry)
    splits = _file_records(root, entries)
    return Dataset("cars", names, splits, root, _unlisted(root / "car_ims", splits))


def _label_and_corners(row, file: Path, names: Sequence[str]) -> tuple[int, Box | None]:
    number = int(row["class"])
    if not 1 <= number <= len(names):
        raise ValueError(
            f"{file}: class {number} is not one of the {len(names)} classes; get the"
            " file anew"
        )
    if "bbox_x1" not in row.dtype.names:
        return number - 1, None
    x1, y1, x2, y2 = (float(row[f"bbox_{side}"]) for side in ("x1", "y1", "x2", "y2"))
    return number - 1, (x1 - 1, y1 - 1, x2, y2)  # pixels count from 1, both ends in


def _find_mat(root: Path, name: str) -> Path:
    folders = ("", "devkit", "car_devkit/devkit", "car_devkit", "cars_devkit")
    for folder in folders:
        if (root / folder / name).is_file():
            return root / folder / name
    place = root / name
    message = f"{place}: this file is missing; put it there or into {root / 'devkit'}"
    if name == "cars_test_annos_withlabels.mat":
        message += (
            " (185,758 bytes; it came as a file of its own, beside the devkit, whose"
            " cars_test_annos.mat has no labels)"
        )
    if (root / "cars_annos.mat").is_file() and name != "cars_annos.mat":
        message += (
            ". cars_annos.mat cannot replace it: it numbers the files of car_ims/,"
            " which are in another order"
        )
    raise ValueError(f"{message}. Layouts: {_LAYOUTS['cars']}")


def _mat(file: Path, variable: str, *columns: str) -> np.ndarray:
    import scipy.io  # 0.2 s that only Cars should cost

    try:
        value = scipy.io.loadmat(file, squeeze_me=True)[variable]
        missing = set(columns) - set(value.dtype.names or ())
    except Exception as error:  # scipy raises anything on a damaged file
        raise ValueError(
            f"{file}: no list {variable!r} can be read from it"
            f" ({type(error).__name__}: {error}); get the file anew"
        ) from error
    if missing:
        raise ValueError(
            f"{file}: its list {variable!r} lacks {', '.join(sorted(missing))}; is it"
            " another list under this name?"
        )
    return value


# --- folders of classes ------------------------------------------------------------


def _folder(path: Path, seed: int, *, test_share: float = 0.2) -> Dataset:
    root = path
    while len(only := _folders(root)) == 1 and not _split_folder(root, _TRAIN_NAMES):
        root = only[0]
    skipped = collections.Counter()
    train_folder = _split_folder(root, _TRAIN_NAMES)
    test_folder = _split_folder(root, _TEST_NAMES)
    if not train_folder and not test_folder:
        classes = _classes(root, skipped)
        entries = _split_classes(root, classes, seed, test_share)
        names = tuple(classes)
        notes = [
            f"no train/ and test/ in {root}: {len(entries['test'])} of"
            f" {sum(map(len, entries.values()))} pictures were drawn for testing"
        ]
    elif train_folder and test_folder:
        groups = {"train": _classes(train_folder, skipped)}
        groups["test"] = _classes(test_folder, skipped)
        names = tuple(groups["train"])
        unknown = [name for name in groups["test"] if name not in names]
        if unknown:
            raise ValueError(
                f"{test_folder}: classes without a folder in {train_folder}:"
                f" {_some(unknown)}; rename them or add training pictures"
            )
        position = {name: label for label, name in enumerate(names)}
        entries = {
            split: [
                (file, position[name], None)
                for name, files in classes.items()
                for file in files
            ]
            for split, classes in groups.items()
        }
        used = {train_folder, test_folder}
        unused = [f.name for f in _folders(root) if f not in used]
        notes = [f"folders not used: {_some(unused)}"] if unused else []
    else:
        found = train_folder or test_folder
        lacking = _TEST_NAMES if train_folder else _TRAIN_NAMES
        raise ValueError(
            f"{root}: {found.name}/ is here, but no {' or '.join(lacking)}; add it, or"
            f" name {found} as the path to have a test share drawn from it"
        )
    if skipped:
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(skipped.items()))
        notes.append(f"{skipped.total()} files that are no pictures skipped: {kinds}")
    return Dataset("folder", names, _file_records(root, entries), root, tuple(notes))


def _split_classes(root: Path, classes, seed: int, test_share: float) -> dict:
    """Draws a test share of each class, from the seed and the files' names alone."""
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}: give a share between 0 and 1")
    entries = {"train": [], "test": []}
    for label, files in enumerate(classes.values()):
        draw = {
            file: hashlib.sha256(f"{seed} {_name(file, root)}".encode()).digest()
            for file in files
        }
        count = min(max(round(len(files) * test_share), 1), len(files) - 1)
        test = set(sorted(files, key=draw.__getitem__)[:count])
        for file in files:
            entries["test" if file in test else "train"].append((file, label, None))
    return entries


def _classes(folder: Path, skipped: collections.Counter) -> dict[str, list[Path]]:
    classes = {}
    for class_folder in _folders(folder):
        name = unicodedata.normalize("NFC", class_folder.name)
        classes[name] = _picture_files(class_folder, skipped)
    for file in folder.iterdir():
        if file.is_file():
            skipped["outside the class folders"] += 1
    if not any(classes.values()):
        raise ValueError(f"{folder}: no pictures in folders; {_LAYOUTS['folder']}")
    return classes


def _picture_files(folder: Path, skipped: collections.Counter) -> list[Path]:
    """All pictures below a folder; a folder linked into itself is entered once."""
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else [f for f in folders if _is_shown(f)]
        for file in files if real not in seen else ():
            suffix = os.path.splitext(file)[1].lower()
            if not _is_shown(file):
                skipped["hidden"] += 1
            elif suffix not in pictures.SUFFIXES:
                skipped[suffix or "no suffix"] += 1
            else:
                found.append(Path(here, file))
        seen.add(real)
    return sorted(found, key=lambda file: natural_key(_name(file, folder)))


def _folders(folder: Path) -> list[Path]:
    found = [f for f in folder.iterdir() if _is_shown(f.name) and f.is_dir()]
    return sorted(found, key=lambda f: natural_key(f.name))


def _split_folder(root: Path, names: Iterable[str]) -> Path | None:
    by_name = {folder.name.lower(): folder for folder in _folders(root)}
    return next((by_name[name] for name in names if name in by_name), None)


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


# --- what all files share ----------------------------------------------------------


def natural_key(text: str) -> tuple[list[int | str], str]:
    """Sorts names as people do: "b2" before "b10", the same on every file system."""
    text = unicodedata.normalize("NFC", text)
    parts = re.split(r"(\d+)", text.casefold())
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], text


def _below(path: Path, is_root: Callable[[Path], bool], depth: int = 2) -> Path | None:
    """The first folder, from `path` down, that passes the test."""
    level = [path]
    for _ in range(depth + 1):
        for folder in level:
            if is_root(folder):
                return folder
        level = [child for folder in level for child in _folders(folder)]
    return None


def _file_records(root: Path, entries: Mapping[str, Iterable]) -> dict:
    """Turns (file, label, corners in pixels or None) into records, split by split."""
    splits, missing = {}, []
    for split, rows in entries.items():
        records = []
        for file, label, corners in rows:
            try:
                status = file.stat()
            except OSError:
                missing.append(str(file))
                continue
            stamp = f"{status.st_size} bytes, mtime {status.st_mtime_ns // 1_000_000}"
            read = functools.partial(pictures.read, str(file))
            locate = functools.partial(_fraction_box, str(file), corners)
            locate = locate if corners else None
            records.append(Record(_name(file, root), label, read, stamp, locate))
        splits[split] = tuple(records)
    if missing:
        raise ValueError(
            f"{root}: {len(missing)} listed pictures are missing: {_some(missing)};"
            " unpack the archive anew"
        )
    return splits


def _fraction_box(file: str, corners: Box) -> Box:
    """Corners in pixels as stored -> fractions of the picture as it is read."""
    header = pictures.read_header(file)
    width, height = header.width_px, header.height_px
    x, y = np.array(corners[::2]) / width, np.array(corners[1::2]) / height
    if header.orientation in (2, 3, 7, 8):
        x = 1 - x
    if header.orientation in (3, 4, 6, 7):
        y = 1 - y
    if header.orientation >= 5:
        x, y, width, height = y, x, height, width
    left, top, right, bottom = pictures.kept_region(width, height)
    x = np.clip((np.sort(x) * width - left) / (right - left), 0, 1)
    y = np.clip((np.sort(y) * height - top) / (bottom - top), 0, 1)
    return float(x[0]), float(y[0]), float(x[1]), float(y[1])


def _name(file: Path, root: Path) -> str:
    return unicodedata.normalize("NFC", file.relative_to(root).as_posix())


def _unlisted(folder: Path, splits: Mapping[str, Sequence[Record]]) -> tuple[str, ...]:
    """A note on pictures below a folder that the lists do not name."""
    listed = {record.read.args[0] for records in splits.values() for record in records}
    found = {str(file) for file in _picture_files(folder, collections.Counter())}
    extra = sorted(found - listed)
    return (f"{len(extra)} pictures not listed: {_some(extra)}",) if extra else ()


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def _check(dataset: Dataset) -> Dataset:
    where = dataset.root or dataset.name
    if len(dataset.class_names) < 2:
        raise ValueError(
            f"{where}: only the class {_some(dataset.class_names)}; two are needed. The"
            " path must be the folder that holds the folders of the classes"
        )
    for split, records in dataset.splits.items():
        if not records:
            raise ValueError(f"{where}: the split {split!r} has no pictures; add some")
    trained = {record.label for record in dataset.splits["train"]}
    idle = [name for i, name in enumerate(dataset.class_names) if i not in trained]
    if idle:
        raise ValueError(
            f"{where}: {len(idle)} classes have no training picture: {_some(idle)}; add"
            " some, or remove the classes"
        )
    for what, names in {
        "class names": dataset.class_names,
        "pictures": [r.name for records in dataset.splits.values() for r in records],
    }.items():
        doubled = [n for n, count in collections.Counter(names).items() if count > 1]
        if doubled:
            raise ValueError(
                f"{where}: {what} listed more than once: {_some(doubled)}; rename or"
                " remove them"
            )
    return dataset
