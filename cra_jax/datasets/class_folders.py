"""Folders of images -> image files, classes and splits.

A share of each class is drawn for testing where there is no test split. No image is
opened, and no order depends on the file system.
"""

import collections
import hashlib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from cra_jax.datasets import listing
from cra_jax.datasets.listing import Entry, Listing, Splits

LAYOUT = (
    "expected train/ and test/ (or val/), each with one folder of pictures a class; or"
    " the folders of the classes alone, from which a test share is then drawn"
)
"""What is expected on disk; ends messages."""

_TRAIN, _TEST = ("train",), ("test", "val", "valid")


def class_folders(path: Path, *, seed: int = 0, test_share: float = 0.2) -> Listing:
    """Lists `train/` and `test/` of class folders, or class folders alone.

    From class folders alone a share of each class is drawn for testing: at least one
    picture of a class that has two, the same ones for the same seed and file names.

    Raises:
        ValueError: no such folders, no pictures, a test class that is not trained.
    """
    root = path
    for _ in range(2):  # archives are often packed with a folder around
        only = listing.sub_folders(root)
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
                f"{test}: classes without a folder in {train}: {listing.some(unknown)};"
                " rename them or add training pictures"
            )
        splits = {
            split: [
                Entry(file, names.index(name), None)
                for name, files in classes.items()
                for file in files
            ]
            for split, classes in groups.items()
        }
        unused = [f.name for f in listing.sub_folders(root) if f not in (train, test)]
        if unused:
            notes.append(f"folders of {root} that are not used: {listing.some(unused)}")
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
            file: hashlib.sha256(
                f"{seed} {listing.name_below(file, root)}".encode()
            ).digest()
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
    for class_folder in listing.sub_folders(folder):
        name = unicodedata.normalize("NFC", class_folder.name)
        if name in classes:
            raise ValueError(
                f"{folder}: two folders are called {name!r}, spelt with different"
                " Unicode; merge them"
            )
        classes[name] = listing.picture_files(class_folder, skipped)
    for file in folder.iterdir():
        if file.is_file():
            skipped["outside the class folders"] += 1
    if not any(classes.values()):
        raise ValueError(f"{folder}: no pictures in folders; {LAYOUT}")
    return classes


def _split_folder(root: Path, names: Iterable[str]) -> Path | None:
    """The first sub-folder of such a name; without folders in it, it is a class."""
    by_name = {folder.name.lower(): folder for folder in listing.sub_folders(root)}
    found = [by_name[name] for name in names if name in by_name]
    return next((folder for folder in found if listing.sub_folders(folder)), None)
