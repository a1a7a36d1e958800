"""Helpers for dataset readers: listings, text tables, image files, sort keys.

No image is opened, and no order depends on the file system.
"""

import collections
import dataclasses
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".mpo", ".pbm"}
    | {".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes of image files, in lower case."""

Corners = tuple[float, float, float, float]


class Entry(NamedTuple):
    """One image: its file, its label, and the box of the object, if known."""

    file: Path
    label: int
    corners: Corners | Callable[[], Corners] | None
    """(left, top, right, bottom) in pixels of the stored image, or a picklable function
    that returns them."""
    parts: Mapping[str, tuple[float, float]] | None = None
    """The object's visible parts, if known: name -> (x, y) in pixels of the stored
    image."""


Splits = dict[str, list[Entry]]


@dataclasses.dataclass(frozen=True)
class Listing:
    """A dataset's entries: `splits` has "train" and "test"; `notes` are for the log."""

    root: Path
    class_names: tuple[str, ...]
    splits: Splits
    notes: tuple[str, ...] = ()
    cut_bottom_px: int = 0
    """Rows at the bottom of every image to be cropped."""


def image_files(folder: Path, skipped: collections.Counter) -> list[Path]:
    """All images below a folder in natural order; counts the other files by suffix.

    Links are followed; a folder that contains a link to itself is visited once.
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
    """A note on images below a folder that are not in the lists."""
    listed = {str(entry.file) for entries in splits.values() for entry in entries}
    found = map(str, image_files(folder, collections.Counter()))
    extra = [file for file in found if file not in listed]
    return (f"{len(extra)} images not listed: {some(extra)}",) if extra else ()


def first_below(path: Path, is_root: Callable[[Path], bool]) -> Path | None:
    """The first folder with `is_root`, in breadth-first order to depth 2."""
    level = [path]
    for _ in range(3):
        for folder in level:
            if is_root(folder):
                return folder
        level = [child for folder in level for child in sub_folders(folder)]
    return None


def find_below(root: Path, places: Sequence[str], name: str = "") -> Path | None:
    """The first of ``root / place / name`` that exists."""
    files = (root / place / name for place in places)
    return next((file for file in files if file.exists()), None)


def from_one(x1: float, y1: float, x2: float, y2: float) -> Corners:
    """Corners of a box from 1-based, inclusive pixel coordinates."""
    return x1 - 1, y1 - 1, x2, y2


def sub_folders(folder: Path) -> list[Path]:
    """Folders in a folder, in natural order, without hidden ones."""
    found = [f for f in folder.iterdir() if _is_shown(f.name) and f.is_dir()]
    return sorted(found, key=lambda f: natural_key(f.name))


def _is_shown(name: str) -> bool:
    return not name.startswith(".") and name != "__MACOSX"


def name_below(file: Path, root: Path) -> str:
    """The path from `root` to `file`, the same on every system."""
    return unicodedata.normalize("NFC", file.relative_to(root).as_posix())


def natural_key(text: str) -> tuple[list[int | str], str]:
    """Sort key with "b2" before "b10", the same on every system."""
    text = unicodedata.normalize("NFC", text)
    parts = re.split(r"(\d+)", text.casefold())
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], text


def some(items: Sequence[str]) -> str:
    """The first three of a list, for a message."""
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def read_table(file: Path, like: Mapping[str, str] | None = None) -> dict[str, str]:
    """Reads lines of "id value"; the ids must be those of `like`, if given."""
    table = {}
    for number, line in numbered_lines(file):
        key, _, value = line.partition(" ")
        if not value or key in table:
            raise ValueError(
                f"{file}, line {number}: {line!r} is not a new id and its value; unpack"
                " the archive again"
            )
        table[key] = value.strip()
    if like is not None and table.keys() != like.keys():
        odd = sorted(table.keys() ^ like.keys(), key=natural_key)
        raise ValueError(
            f"{file}: {len(table)} ids, but images.txt has {len(like)}; not in both:"
            f" {some(odd)}; unpack the archive again"
        )
    return table


def numbered_lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    if not file.is_file():
        raise ValueError(f"{file}: this file is missing; unpack the archive again")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
