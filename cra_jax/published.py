"""The text lists of CUB, NABirds and FGVC-Aircraft -> files and their classes.

No picture is opened.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from cra_jax import folders
from cra_jax.folders import Corners, Entry, Listing, Splits, natural_key, some

LAYOUTS = {
    "cub": (
        "expected the folder CUB_200_2011 as published (images.txt,"
        " image_class_labels.txt, train_test_split.txt, classes.txt, images/), or its"
        " parent; get CUB_200_2011.tgz (1.15 GB) from"
        " https://data.caltech.edu/records/65de6-vp158 and unpack it"
    ),
    "nabirds": (
        "expected the folder nabirds as published (images.txt, image_class_labels.txt,"
        " train_test_split.txt, classes.txt, images/), or its parent; get"
        " nabirds.tar.gz from https://dl.allaboutbirds.org/nabirds and unpack it"
    ),
    "aircraft": (
        "expected the folder fgvc-aircraft-2013b as published (data/images/,"
        " data/variants.txt, data/images_variant_trainval.txt,"
        " data/images_variant_test.txt), or its parent; get fgvc-aircraft-2013b.tar.gz"
        " (2.75 GB) from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft and"
        " unpack it"
    ),
}
"""What each source expects on disk, and where to get it; ends messages."""

BANNER_PX = 20
"""Height of the copyright line at the foot of every picture of FGVC-Aircraft."""


def cub(path: Path) -> Listing:
    """Lists CUB-200-2011, whose folder `path` is or contains.

    Raises:
        ValueError: a list is missing, damaged or at odds with the others.
    """
    root = folders.first_below(path, lambda folder: (folder / "images.txt").is_file())
    if root is None:
        raise ValueError(f"{path}: no images.txt here; {LAYOUTS['cub']}")
    return _birds(root, _table(root / "classes.txt"))


def nabirds(path: Path) -> Listing:
    """Lists NABirds, whose folder `path` is or contains.

    Its classes.txt also names the groups of a hierarchy, which have no pictures of
    their own: only the names that have some (555 as published) are classes.

    Raises:
        ValueError: a list is missing, damaged or at odds with the others.
    """
    root = folders.first_below(path, lambda folder: (folder / "images.txt").is_file())
    if root is None:
        raise ValueError(f"{path}: no images.txt here; {LAYOUTS['nabirds']}")
    named = _table(root / "classes.txt")
    used = set(_table(root / "image_class_labels.txt").values())
    classes = {key: name for key, name in named.items() if key in used}
    listing = _birds(root, classes)
    groups = len(named) - len(classes)
    if not groups:
        return listing
    note = f"{groups} of {len(named)} names in classes.txt are groups without pictures"
    return dataclasses.replace(listing, notes=(*listing.notes, note))


def _birds(root: Path, classes: Mapping[str, str]) -> Listing:
    """The lists that CUB and NABirds share: an id and what is known of it, a line."""
    files = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt", files)
    is_train = _table(root / "train_test_split.txt", files)
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
    return Listing(root, names, splits, folders.unlisted(root / "images", splits))


def aircraft(path: Path) -> Listing:
    """Lists FGVC-Aircraft (its variants), whose folder `path` is or contains.

    Training is on "trainval". The banner of copyright at the foot of every picture is
    to be cut off, as the set's authors ask.

    Raises:
        ValueError: a list is missing, damaged or at odds with the others.
    """
    marker = "images_variant_trainval.txt"
    root = folders.first_below(path, lambda folder: (folder / marker).is_file())
    if root is None:
        raise ValueError(f"{path}: no {marker} here; {LAYOUTS['aircraft']}")
    names = [line for _, line in _lines(root / "variants.txt")]
    position = {name: i for i, name in enumerate(names)}
    boxes = {}
    if (root / "images_box.txt").is_file():
        boxes = _table(root / "images_box.txt")
    splits: Splits = {}
    for split, part in (("train", "trainval"), ("test", "test")):
        splits[split] = []
        for key, name in _table(root / f"images_variant_{part}.txt").items():
            try:
                label = position[name]
                corners = _aircraft_box(boxes[key]) if boxes else None
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(
                    f"{root}: image {key} has variant {name!r}, box {boxes.get(key)!r}:"
                    " the variant must be in variants.txt, the box four numbers; unpack"
                    " the archive anew"
                ) from error
            picture = root / "images" / f"{key}.jpg"
            splits[split].append(Entry(picture, label, corners))
    notes = folders.unlisted(root / "images", splits)
    notes += (f"the lowest {BANNER_PX} rows of every picture, a banner, are cut off",)
    return Listing(root, tuple(names), splits, notes, BANNER_PX)


def _aircraft_box(text: str) -> Corners:
    return folders.from_one(*map(float, text.split()))


def _table(file: Path, like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Reads lines of "id value"; ids must be those of `like`."""
    table = {}
    for number, line in _lines(file):
        key, _, value = line.partition(" ")
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


def _lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, and their numbers from 1."""
    if not file.is_file():
        raise ValueError(f"{file}: this file is missing; unpack the archive anew")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
