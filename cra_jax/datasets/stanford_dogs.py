"""Reads Stanford Dogs as published: image files, classes and boxes.

No image is opened.
"""

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cra_jax.datasets import listing, matlab_files
from cra_jax.datasets.listing import Corners, Entry, Listing, Splits

LAYOUT = (
    "expected Images/ with one folder per breed, train_list.mat and test_list.mat"
    " (here or in lists/) and, for boxes, Annotation/, as in images.tar, lists.tar"
    " and annotation.tar from http://vision.stanford.edu/aditya86/ImageNetDogs"
    " (816 MB)"
)
"""Expected layout on disk, and the download address; for messages."""

_IMAGES = ("Images", "images/Images", "images")
_LISTS = ("", "lists", "splits")
_BOXES = ("Annotation", "annotation/Annotation", "annotations/Annotation")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


def dogs(path: Path) -> Listing:
    """Lists Stanford Dogs; `path` is or contains its folder.

    If an image shows several dogs, the box encloses all of them.

    Raises:
      ValueError: a list is missing, damaged or inconsistent.
    """
    root = listing.first_below(
        path, lambda folder: bool(listing.find_below(folder, _IMAGES))
    )
    images = root and listing.find_below(root, _IMAGES)
    if root is None or images is None:
        raise ValueError(f"{path}: no Images/ here; {LAYOUT}")
    breeds: dict[int, str] = {}
    splits: Splits = {}
    for split in ("train", "test"):
        file = listing.find_below(root, _LISTS, f"{split}_list.mat")
        if file is None:
            raise ValueError(
                f"{root}: there is no {split}_list.mat; {LAYOUT}. Copies at"
                " Kaggle leave out lists.tar (481,280 bytes)"
            )
        splits[split] = []
        for name, label in _rows(file):
            breed = name.rpartition("/")[0]
            if not breed or breeds.setdefault(label, breed) != breed:
                raise ValueError(
                    f"{file}: {name!r} has class {label}, which is"
                    f" {breeds.get(label)!r} elsewhere; get the file again"
                )
            splits[split].append(Entry(images / name, label, None))
    position = {label: i for i, label in enumerate(sorted(breeds))}
    boxes = listing.find_below(root, _BOXES)
    splits = {
        split: [
            Entry(e.file, position[e.label], boxes and _corners(boxes, e.file))
            for e in entries
        ]
        for split, entries in splits.items()
    }
    names = tuple(breeds[label] for label in position)
    notes = listing.unlisted(images, splits)
    if boxes is None:
        notes += (f"no boxes: {root / _BOXES[0]} is missing",)
    return Listing(root, names, splits, notes)


def _rows(file: Path) -> list[tuple[str, int]]:
    names = list(map(str, matlab_files.read_variable(file, "file_list", list)))
    labels = matlab_files.read_variable(file, "labels", np.ndarray)
    if not np.isfinite(labels).all():
        raise ValueError(
            f"{file}: its labels are not whole numbers; get the file again"
        )
    if len(names) != len(labels):
        raise ValueError(
            f"{file}: {len(names)} files, but {len(labels)} labels; get the file again"
        )
    return [(name, int(label)) for name, label in zip(names, labels, strict=True)]


def _corners(boxes: Path, image: Path) -> Callable[[], Corners]:
    return functools.partial(_round_all, boxes / image.parent.name / image.stem)


def _round_all(file: Path) -> Corners:
    """The box that encloses all boxes of an annotation, an XML file without a suffix.

    Read only on access: there are 20,580 files.
    """
    try:
        listing.regular(file)
        boxes = [
            [float(box.findtext(side, "")) for side in _SIDES]
            for box in ElementTree.parse(file).iter("bndbox")
        ]
        left, top, right, bottom = zip(*boxes, strict=True)
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise ValueError(
            f"{file}: no boxes can be read from it ({error}); unpack annotation.tar"
            " again, or remove Annotation/ to load no boxes"
        ) from error
    return min(left), min(top), max(right), max(bottom)
