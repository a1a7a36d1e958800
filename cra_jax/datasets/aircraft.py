"""Reads FGVC-Aircraft as published: image files, variants as classes, and boxes.

No image is opened.
"""

from pathlib import Path

from cra_jax.datasets import listing
from cra_jax.datasets.listing import Corners, Entry, Listing, Splits

LAYOUT = (
    "expected the folder fgvc-aircraft-2013b as published (data/images/,"
    " data/variants.txt, data/images_variant_trainval.txt,"
    " data/images_variant_test.txt), or its parent; get fgvc-aircraft-2013b.tar.gz"
    " (2.75 GB) from https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft and"
    " unpack it"
)
"""Expected layout on disk, and the download address; for messages."""

BANNER_PX = 20
"""Height of the copyright banner at the bottom of every image."""


def aircraft(path: Path) -> Listing:
    """Lists FGVC-Aircraft, with variants as classes; `path` is or contains its folder.

    The training split is "trainval". The copyright banner at the bottom of every image
    is cropped, as the authors of the dataset ask.

    Raises:
      ValueError: a list is missing, damaged or inconsistent with the others.
    """
    marker = "images_variant_trainval.txt"
    root = listing.first_below(path, lambda folder: (folder / marker).is_file())
    if root is None:
        raise ValueError(f"{path}: no {marker} here; {LAYOUT}")
    names = [line for _, line in listing.numbered_lines(root / "variants.txt")]
    position = {name: i for i, name in enumerate(names)}
    boxes = {}
    if (root / "images_box.txt").is_file():
        boxes = listing.read_table(root / "images_box.txt")
    splits: Splits = {}
    for split, part in (("train", "trainval"), ("test", "test")):
        splits[split] = []
        for key, name in listing.read_table(
            root / f"images_variant_{part}.txt"
        ).items():
            try:
                label = position[name]
                corners = _corners(boxes[key]) if boxes else None
            except (KeyError, ValueError, TypeError) as error:
                raise ValueError(
                    f"{root}: image {key} has variant {name!r}, box {boxes.get(key)!r}:"
                    " the variant must be in variants.txt, the box four numbers; unpack"
                    " the archive again"
                ) from error
            image = root / "images" / f"{key}.jpg"
            splits[split].append(Entry(image, label, corners))
    notes = listing.unlisted(root / "images", splits)
    notes += (f"the lowest {BANNER_PX} rows of every image, a banner, are cropped",)
    return Listing(root, tuple(names), splits, notes)


def _corners(text: str) -> Corners:
    return listing.from_one(*map(float, text.split()))
