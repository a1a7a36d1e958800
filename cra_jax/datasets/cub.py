"""Reads CUB-200-2011 and NABirds as published: image files, classes, boxes and parts.

Both datasets have the same text lists. No image is opened.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from cra_jax.datasets.listing import (
    Entry,
    Listing,
    Splits,
    first_below,
    natural_key,
    numbered_lines,
    read_table,
    unlisted,
)

LAYOUT = (
    "expected the folder CUB_200_2011 as published (images.txt,"
    " image_class_labels.txt, train_test_split.txt, classes.txt, images/), or its"
    " parent; get CUB_200_2011.tgz (1.15 GB) from"
    " https://data.caltech.edu/records/65de6-vp158 and unpack it"
)
NABIRDS_LAYOUT = (
    "expected the folder nabirds as published (images.txt, image_class_labels.txt,"
    " train_test_split.txt, classes.txt, images/), or its parent; get"
    " nabirds.tar.gz from https://dl.allaboutbirds.org/nabirds and unpack it"
)
"""Expected layout on disk, and the download address; for messages."""

# "beak" is CUB's, "bill" NABirds'.
_HEAD_PARTS = ("beak", "bill", "crown", "forehead", "left eye", "right eye", "nape")
_HEAD_PARTS += ("throat",)


def cub(path: Path) -> Listing:
    """Lists CUB-200-2011; `path` is or contains its folder.

    Raises:
      ValueError: a list is missing, damaged or inconsistent with the others.
    """
    root = first_below(path, lambda folder: (folder / "images.txt").is_file())
    if root is None:
        raise ValueError(f"{path}: no images.txt here; {LAYOUT}")
    return _birds(root, read_table(root / "classes.txt"))


def nabirds(path: Path) -> Listing:
    """Lists NABirds; `path` is or contains its folder.

    Its classes.txt also has the groups of a hierarchy, which have no images: only names
    with images (555 as published) are classes.

    Raises:
      ValueError: a list is missing, damaged or inconsistent with the others.
    """
    root = first_below(path, lambda folder: (folder / "images.txt").is_file())
    if root is None:
        raise ValueError(f"{path}: no images.txt here; {NABIRDS_LAYOUT}")
    named = read_table(root / "classes.txt")
    used = set(read_table(root / "image_class_labels.txt").values())
    classes = {key: name for key, name in named.items() if key in used}
    listing = _birds(root, classes)
    groups = len(named) - len(classes)
    if not groups:
        return listing
    note = f"{groups} of {len(named)} names in classes.txt are groups without images"
    return dataclasses.replace(listing, notes=(*listing.notes, note))


def _birds(root: Path, classes: Mapping[str, str]) -> Listing:
    """Reads the lists of CUB and NABirds, which have lines of "id value"."""
    files = read_table(root / "images.txt")
    labels = read_table(root / "image_class_labels.txt", files)
    is_train = read_table(root / "train_test_split.txt", files)
    has_boxes = (root / "bounding_boxes.txt").is_file()
    boxes = read_table(root / "bounding_boxes.txt", files) if has_boxes else {}
    parts = _parts(root, files)
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
                " archive again"
            ) from error
        image = root / "images" / file
        splits[split].append(Entry(image, label, corners, parts.get(key)))
    names = tuple(classes[key] for key in position)
    return Listing(root, names, splits, unlisted(root / "images", splits))


def _parts(
    root: Path, images: Mapping[str, str]
) -> dict[str, dict[str, tuple[float, float]]]:
    """Visible parts of images, by the images' ids; empty without the folder `parts`.

    "head" is the mean of the visible parts of the head.
    """
    file = root / "parts" / "part_locs.txt"
    if not file.is_file():
        return {}
    names = read_table(root / "parts" / "parts.txt")
    found: dict[str, dict[str, tuple[float, float]]] = {key: {} for key in images}
    for number, line in numbered_lines(file):
        try:
            key, part, x, y, visible = line.split()
            name, place = names[part], (float(x), float(y))
            if {"0": False, "1": True}[visible]:
                found[key][name] = place
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{file}, line {number}: {line!r} is not an image of images.txt, a part"
                " of parts.txt, x, y, and 0 or 1; unpack the archive again, or remove"
                " parts/ to load no parts"
            ) from error
    for parts in found.values():
        head = [parts[name] for name in _HEAD_PARTS if name in parts]
        if head:
            x, y = (sum(values) / len(head) for values in zip(*head, strict=True))
            parts["head"] = x, y
    return found
