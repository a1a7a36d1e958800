"""Folders of pictures -> which file shows which class, in which split.

No picture is opened, and no order depends on the file system.
"""

import collections
import dataclasses
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
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
    corners: Corners | Callable[[], Corners] | None
    """(left, top, right, bottom) in pixels of the picture as stored, or who finds them;
    picklable."""


Splits = dict[str, list[Entry]]


@dataclasses.dataclass(frozen=True)
class Listing:
    """A data set's entries: `splits` has "train" and "test"; notes are to be shown."""

    root: Path
    class_names: tuple[str, ...]
    splits: Splits
    notes: tuple[str, ...] = ()
    cut_bottom_px: int = 0
    """Rows at the foot of every picture that are no part of it."""


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
        entries = [
            Entry(file, label, None)
            for label, files in enumerate(classes.values())
            for file in files
        ]
        splits = draw_test(root, entries, seed=seed, test_share=test_share)
        notes.append(
            f"no train/ and test/ in {root}: {len(splits['test'])} of {len(entries)}"
            " pictures were drawn for testing"
        )
    if skipped:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.items()))
        notes.append(f"{skipped.total()} files skipped: {kinds}")
    return Listing(root, tuple(names), splits, tuple(notes))


def draw_test(
    root: Path, entries: Sequence[Entry], *, seed: int, test_share: float
) -> Splits:
    """Draws a share of each class for testing; both splits keep the order of `entries`.

    At least one picture of a class that has two is drawn, and at least one is left; the
    same ones for the same seed and the same names below `root`.

    Raises:
        ValueError: the share is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}: give a share between 0 and 1")
    classes: dict[int, list[Path]] = {}
    for entry in entries:
        classes.setdefault(entry.label, []).append(entry.file)
    drawn = set()
    for files in classes.values():
        lot = {
            file: hashlib.sha256(f"{seed} {name_below(file, root)}".encode()).digest()
            for file in files
        }
        count = min(max(round(len(files) * test_share), 1), len(files) - 1)
        drawn.update(sorted(files, key=lot.__getitem__)[:count])
    return {
        "train": [entry for entry in entries if entry.file not in drawn],
        "test": [entry for entry in entries if entry.file in drawn],
    }


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


def unlisted(folder: Path, splits: Splits) -> tuple[str, ...]:
    """A note on pictures below a folder that the lists do not name."""
    listed = {str(entry.file) for entries in splits.values() for entry in entries}
    found = map(str, picture_files(folder, collections.Counter()))
    extra = [file for file in found if file not in listed]
    return (f"{len(extra)} pictures not listed: {some(extra)}",) if extra else ()


def first_below(path: Path, is_root: Callable[[Path], bool]) -> Path | None:
    """The first folder that passes the test: `path`, those in it, those in them."""
    level = [path]
    for _ in range(3):
        for folder in level:
            if is_root(folder):
                return folder
        level = [child for folder in level for child in sub_folders(folder)]
    return None


def from_one(x1: float, y1: float, x2: float, y2: float) -> Corners:
    """Corners of a box whose pixels count from 1, and whose ends belong to it."""
    return x1 - 1, y1 - 1, x2, y2


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
