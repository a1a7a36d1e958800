"""Folders of pictures -> which file shows which class, in which split.

No picture is opened, and no order depends on the file system.
"""

import collections
import dataclasses
import hashlib
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm"}
    | {".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Endings of files that count as pictures, in lower case."""

LAYOUT = (
    "expected train/ and test/ (or val/), each with one folder of pictures a class; or"
    " the folders of the classes alone, from which a test share is then drawn"
)
"""What is expected on disk; ends messages."""

_TRAIN, _TEST = ("train",), ("test", "val", "valid")

Corners = tuple[float, float, float, float]


class Entry(NamedTuple):
    """One picture: its file, its label, and where the object is, if known."""

    file: Path
    label: int
    corners: Corners | None
    """(left, top, right, bottom) in pixels of the picture as stored."""


Splits = dict[str, list[Entry]]


@dataclasses.dataclass(frozen=True)
class Listing:
    """A data set's entries: `splits` has "train" and "test"; notes are to be shown."""

    root: Path
    class_names: tuple[str, ...]
    splits: Splits
    notes: tuple[str, ...] = ()


def class_folders(path: Path, *, seed: int = 0, test_share: float = 0.2) -> Listing:
    """Lists `train/` and `test/` of class folders, or class folders alone.

    From class folders alone a share of each class is drawn for testing: at least one
    picture of a class that has two, the same ones for the same seed and file names.

    Raises:
        ValueError: no such folders, no pictures, a test class that is not trained.
    """
    root = path
    for _ in range(2):  # archives are often packed with a folder around
        only = sub_folders(root)
        if len(only) == 1 and not _split_folder(root, _TRAIN + _TEST):
            root = only[0]
    skipped = collections.Counter()
    train = _split_folder(root, _TRAIN)
    test = _split_folder(root, _TEST)
    notes = []
    if train and test:
        groups = {"train": _classes(train, skipped), "test": _classes(test, skipped)}
        names = list(groups["train"])
        unknown = [name for name in groups["test"] if name not in names]
        if unknown:
            raise ValueError(
                f"{test}: classes without a folder in {train}: {some(unknown)}; rename"
                " them or add training pictures"
            )
        splits = {
            split: [
                Entry(file, names.index(name), None)
                for name, files in classes.items()
                for file in files
            ]
            for split, classes in groups.items()
        }
        unused = [f.name for f in sub_folders(root) if f not in (train, test)]
        if unused:
            notes.append(f"folders of {root} that are not used: {some(unused)}")
    elif train or test:
        raise ValueError(
            f"{root}: only {(train or test or root).name}/ is here;"
            f" {LAYOUT} (give the path of that folder then)"
        )
    else:
        classes = _classes(root, skipped)
        names = list(classes)
        splits = _draw_test(root, classes, seed, test_share)
        count = sum(map(len, splits.values()))
        notes.append(
            f"no train/ and test/ in {root}: {len(splits['test'])} of {count} pictures"
            " were drawn for testing"
        )
    if skipped:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.items()))
        notes.append(f"{skipped.total()} files skipped: {kinds}")
    return Listing(root, tuple(names), splits, tuple(notes))


def _draw_test(root: Path, classes, seed: int, test_share: float) -> Splits:
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}: give a share between 0 and 1")
    splits: Splits = {"train": [], "test": []}
    for label, files in enumerate(classes.values()):
        lot = {
            file: hashlib.sha256(f"{seed} {name_below(file, root)}".encode()).digest()
            for file in files
        }
        count = min(max(round(len(files) * test_share), 1), len(files) - 1)
        test = set(sorted(files, key=lot.__getitem__)[: max(count, 0)])
        for file in files:
            splits["test" if file in test else "train"].append(Entry(file, label, None))
    return splits


def _classes(folder: Path, skipped: collections.Counter) -> dict[str, list[Path]]:
    classes = {}
    for class_folder in sub_folders(folder):
        name = unicodedata.normalize("NFC", class_folder.name)
        if name in classes:
            raise ValueError(
                f"{folder}: two folders are called {name!r}, spelt with different"
                " Unicode; merge them"
            )
        classes[name] = picture_files(class_folder, skipped)
    for file in folder.iterdir():
        if file.is_file():
            skipped["outside the class folders"] += 1
    if not any(classes.values()):
        raise ValueError(f"{folder}: no pictures in folders; {LAYOUT}")
    return classes


def picture_files(folder: Path, skipped: collections.Counter) -> list[Path]:
    """All pictures below a folder in natural order; counts the other files by kind.

    Links are followed; a folder that is linked into itself is entered once.
    """
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if _is_shown(name))
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if not _is_shown(name):
                skipped["hidden"] += 1
            elif suffix not in SUFFIXES:
                skipped[suffix or "without a suffix"] += 1
            else:
                found.append(Path(here, name))
    return sorted(found, key=lambda file: natural_key(name_below(file, folder)))


def _split_folder(root: Path, names: Iterable[str]) -> Path | None:
    """The first sub-folder of such a name; without folders in it, it is a class."""
    by_name = {folder.name.lower(): folder for folder in sub_folders(root)}
    found = [by_name[name] for name in names if name in by_name]
    return next((folder for folder in found if sub_folders(folder)), None)


def sub_folders(folder: Path) -> list[Path]:
    """Folders in a folder, in natural order, but for hidden ones."""
    found = [f for f in folder.iterdir() if _is_shown(f.name) and f.is_dir()]
    return sorted(found, key=lambda f: natural_key(f.name))


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def name_below(file: Path, root: Path) -> str:
    """The path from `root` to `file`, spelt alike on every system."""
    return unicodedata.normalize("NFC", file.relative_to(root).as_posix())


def natural_key(text: str) -> tuple[list[int | str], str]:
    """Sorts names as people do, "b2" before "b10", and alike on every system."""
    text = unicodedata.normalize("NFC", text)
    parts = re.split(r"(\d+)", text.casefold())
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], text


def some(items: Sequence[str]) -> str:
    """The first three of a list, for a message."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")
