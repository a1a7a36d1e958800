"""Reads folders of images: image files, classes and splits.

Without a test split, a random share of each class is used for testing. No image is
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
    "expected train/ and test/ (or val/), each with one folder of images per class; or"
    " only the folders of the classes, from which a test share is drawn"
)
"""Expected layout on disk; for messages."""

_TRAIN, _TEST = ("train",), ("test", "val", "valid")


def class_folders(path: Path, *, seed: int = 0, test_share: float = 0.2) -> Listing:
    """Lists class folders in `train/` and `test/`, or class folders without splits.

    Without splits, a random share of each class is used for testing: at least one image
    of a class that has two, the same for the same seed and file names.

    Raises:
      ValueError: no such folders, no images, or a test class without a training folder.
    """
    root = path
    for _ in range(2):  # archives often have one extra outer folder
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
                " rename them or add training images"
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
            notes.append(f"folders of {root} that are ignored: {listing.some(unused)}")
    elif train or test:
        raise ValueError(
            f"{root}: only {(train or test or root).name}/ is here;"
            f" {LAYOUT} (then set the path to that folder)"
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
            " images were drawn for testing"
        )
    if skipped:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(skipped.items()))
        notes.append(f"{skipped.total()} files skipped: {kinds}")
    return Listing(root, tuple(names), splits, tuple(notes))


def draw_test(
    root: Path, entries: Sequence[Entry], *, seed: int, test_share: float
) -> Splits:
    """Draws a share of each class for testing; both splits keep the order of `entries`.

    A class that has two images gets at least one in each split. The result depends only
    on the seed and the names relative to `root`.

    Raises:
      ValueError: the share is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise ValueError(f"test_share is {test_share}: set it between 0 and 1")
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
                f"{folder}: two folders have the name {name!r} in different Unicode"
                " forms; merge them"
            )
        classes[name] = listing.image_files(class_folder, skipped)
    for file in folder.iterdir():
        if file.is_file():
            skipped["outside the class folders"] += 1
    if not any(classes.values()):
        raise ValueError(f"{folder}: no images in folders; {LAYOUT}")
    return classes


def _split_folder(root: Path, names: Iterable[str]) -> Path | None:
    """The first sub-folder with one of the names and with sub-folders of its own."""
    by_name = {folder.name.lower(): folder for folder in listing.sub_folders(root)}
    found = [by_name[name] for name in names if name in by_name]
    return next((folder for folder in found if listing.sub_folders(folder)), None)
