"""Helpers for dataset readers: listings, text tables, image files, sort keys.

No image is opened, and no order depends on the file system.
"""

import collections
import dataclasses
import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cra_jax.runtime import run_directory

SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg"}
    | {".jpg", ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
"""Suffixes of image files, in lower case.

HEIC files are listed so that they are reported as unreadable, and not skipped.
"""

SPLIT_WORDS = {
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val"},
}
"""Names that people give to splits, in lower case -> split."""

FILLERS = frozenset(
    {"set", "data", "dataset", "image", "images", "img", "imgs", "jpegimages", "photo"}
    | {"photos", "picture", "pictures", "crop", "crops", "cropped", "raw", "resized"}
    | {"seg", "split", "splits", "folder"}
)
"""Words that add nothing to the name of a split, as in `train_images`."""

# Folders of file systems and of network storage, in lower case.
_SYSTEM_FOLDERS = frozenset(
    {"@eadir", "@recycle", "@recently-snapshot", "@sharebin", "@tmp", "#recycle"}
    | {"#snapshot", "$recycle.bin", "recycler", "lost+found", "found.000", "__macosx"}
    | {"system volume information", "network trash folder", "temporary items"}
)

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
    """A dataset's entries.

    `splits` has "train", "test" or both, and may have "val"; `notes` are for the log.
    """

    root: Path
    class_names: tuple[str, ...]
    splits: Splits
    notes: tuple[str, ...] = ()
    drawn: bool = False
    """Whether the test split was drawn at random from the images."""


@dataclasses.dataclass
class Skipped:
    """What a walk through folders leaves out.

    Attributes:
      files: suffix or reason -> number of files.
      folders: name of a folder whose images are not read -> number of its images.
    """

    files: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )
    folders: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )

    def add_folder(self, path: str) -> None:
        """Counts the images of a folder that is not read."""
        names = (name for _, _, files in os.walk(path) for name in files)
        count = sum(_suffix(name) in SUFFIXES for name in names)
        if count:
            self.folders[os.path.basename(path)] += count

    def notes(self) -> list[str]:
        """Notes for the log."""
        lines = []
        if self.files:
            kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.files.items()))
            lines.append(f"{self.files.total()} files skipped: {kinds}")
        if self.folders:
            found = [f"{name} ({n})" for name, n in sorted(self.folders.items())]
            lines.append(
                f"{self.folders.total()} images in hidden folders, system folders or"
                f" run directories are ignored: {some(found)}"
            )
        return lines


def image_files(folder: Path, skipped: Skipped) -> list[Path]:
    """All images below a folder in natural order; counts what it leaves out.

    Links are followed; a folder that contains a link to itself is visited once. Hidden
    folders, folders of systems and run directories are left out.

    Raises:
      OSError: a folder cannot be read.
    """
    found, seen = [], set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(_read_folders(here, folders, skipped))
        for name in files:
            path = os.path.join(here, name)
            if name.startswith("."):
                skipped.files["hidden"] += 1
            elif _suffix(name) not in SUFFIXES:
                skipped.files[_suffix(name) or "without a suffix"] += 1
            elif not _may_be_regular(path):
                skipped.files["pipes or devices"] += 1
            else:
                found.append(Path(path))
    return sorted(found, key=lambda file: natural_key(name_below(file, folder)))


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _raise(error: OSError) -> None:
    raise error


def _read_folders(
    parent: str | Path, names: Iterable[str], skipped: Skipped | None
) -> list[str]:
    """The names of the folders that may hold data; counts the others."""
    kept, written = [], run_directory.written_names(parent)
    for name in names:
        path = os.path.join(parent, name)
        if (
            name.startswith(".")
            or name in written
            or name.casefold() in _SYSTEM_FOLDERS
            or run_directory.is_run(path)
        ):
            if skipped is not None:
                skipped.add_folder(path)
        else:
            kept.append(name)
    return kept


def _may_be_regular(path: str) -> bool:
    """Whether a path is a regular file, or missing, which is reported elsewhere."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True


def regular(file: Path) -> os.stat_result:
    """The status of a regular file; a pipe or a device could be read without an end.

    Raises:
      ValueError: it is something else.
      OSError: there is no such file, or it cannot be read.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file}: it is no regular file; remove it, or get it again")
    return status


def unlisted(folder: Path, splits: Splits) -> tuple[str, ...]:
    """A note on images below a folder that are not in the lists."""
    listed = {str(entry.file) for entries in splits.values() for entry in entries}
    found = map(str, image_files(folder, Skipped()))
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


def sub_folders(folder: Path, skipped: Skipped | None = None) -> list[Path]:
    """Folders in a folder that may hold data, in natural order; see `image_files`."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir()]
    found = _read_folders(folder, names, skipped)
    return [folder / name for name in sorted(found, key=natural_key)]


def split_of(name: str) -> tuple[str | None, str]:
    """The split that a folder's name means, and what else the name says.

    `Train`, `training_set` and `train_images` mean "train"; `birds_train` means "train"
    of "birds"; other names mean None.
    """
    words = [w for w in re.findall(r"[^\W\d_]+", name.casefold()) if w not in FILLERS]
    words = [w.removesuffix("set") if w not in SPLIT_WORDS else w for w in words]
    found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    rest = " ".join(word for word in words if word not in SPLIT_WORDS)
    return (found.pop() if len(found) == 1 else None), rest


def draw_share(
    items: Iterable[tuple[str, int]], *, share: float, seed: int | str, key: str
) -> set[str]:
    """Draws a share of each class: names of (name, label).

    At least one item of a class that has two is drawn, and at least one is left unless
    the share is 1. The result depends only on the seed and the items.

    Args:
      items: names and labels.
      share: of each class, above 0 and at most 1.
      seed: of the draw.
      key: config key of the share, for the message.

    Raises:
      ValueError: the share is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"{key} is {share}: set it above 0, to at most 1")
    classes: dict[int, list[str]] = {}
    for name, label in items:
        classes.setdefault(label, []).append(name)
    drawn = set()
    for names in classes.values():
        lot = {
            name: hashlib.sha256(
                f"{seed} {name}".encode(errors="surrogateescape")
            ).digest()
            for name in names
        }
        count = min(max(round(len(names) * share), 1), len(names) - (share < 1))
        drawn.update(sorted(names, key=lot.__getitem__)[:count])
    return drawn


def test_split(splits: dict[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """The splits with "val" as "test" if there is no other, and a note on that."""
    if "test" in splits or "val" not in splits:
        return splits, []
    splits = {("test" if s == "val" else s): found for s, found in splits.items()}
    return splits, [
        f"{where} has no test split: its validation split is used instead, so the"
        " checkpoint `best` is chosen on it, too"
    ]


def check_differ(names: Iterable[str], where: str) -> None:
    """Checks that no two class names differ only in case.

    Raises:
      ValueError: two do.
    """
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(
                f"{where}: the classes {other!r} and {name!r} differ only in case;"
                " write them alike, or give different classes different names"
            )


def name_below(file: Path, root: Path) -> str:
    """The path from `root` to `file`, the same on every system."""
    return unicodedata.normalize("NFC", file.relative_to(root).as_posix())


def natural_key(text: str) -> tuple[list[tuple[int, str] | str], str]:
    """Sort key with "b2" before "b10", the same on every system."""
    text = unicodedata.normalize("NFC", text)
    parts = re.split(r"(\d+)", text.casefold())
    return [_number_key(p) if i % 2 else p for i, p in enumerate(parts)], text


def _number_key(digits: str) -> tuple[int, str]:
    """Sort key of a number; `int` refuses numbers of several thousand digits."""
    plain = plain_number(digits)
    return len(plain), plain


def plain_number(digits: str) -> str:
    """Decimal digits of any script in ASCII, without leading zeros."""
    ascii_digits = "".join(str(unicodedata.decimal(c)) for c in digits)
    return ascii_digits.lstrip("0") or "0"


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
