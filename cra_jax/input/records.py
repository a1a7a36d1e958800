"""Datasets and their records: one record per image."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Record:
    """One image of a dataset.

    Attributes:
      name: unique in the dataset; for files, the path relative to the root.
      label: index into the dataset's `class_names`.
      read: takes short_side_px, returns the image as uint8 `[h, w, 3]`; picklable.
      stamp: of the image's content; a copy of the file has the same stamp.
      locate: finds `box`; picklable. None if the source has no boxes.
      content: returns the bytes of the file; picklable. None for drawings.
      locate_parts: finds `parts`; picklable. None if the source has no parts.
      version: changes if the file is written, replaced or copied; empty if `stamp`
        says all.
    """

    name: str
    label: int
    read: Callable[[int], np.ndarray]
    stamp: str
    locate: Callable[[], Box | None] | None = None
    content: Callable[[], bytes] | None = None
    locate_parts: Callable[[], Mapping[str, Point]] | None = None
    version: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """Hex digest of the file, read at the first use; of name and stamp without one.

        "unreadable" if the file cannot be read.
        """
        try:
            content = self.content() if self.content else None
        except (OSError, ValueError):
            return "unreadable"
        if content is None:
            content = f"{self.name} {self.stamp}".encode(errors="surrogateescape")
        return hashlib.sha256(content).hexdigest()[:16]

    @property
    def box(self) -> Box | None:
        """The bounding box of the object; None if it is not known or was cropped.

        (x_min, y_min, x_max, y_max) as fractions of the image that `read` returns.
        Computed at each call, in 0.5 to 2 ms, from a file's header or a drawing.
        """
        return self.locate() if self.locate else None

    @property
    def parts(self) -> Mapping[str, Point]:
        """Places of the object's visible parts by name; empty if none are known.

        (x, y) as fractions of the image that `read` returns. "head" is the middle of
        a bird's head. Computed at each call, as `box`.
        """
        return self.locate_parts() if self.locate_parts else {}


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset with splits "train", "test" and perhaps "val".

    The drawn birds also have "test_shifted". For evaluation, "train" may be missing.

    Attributes:
      name: the source's name.
      class_names: names in the order of the labels.
      splits: the records of each split, in an order fixed by their names or lists.
      root: the directory that names of files are relative to, or that has the built
        dataset; None without files.
      notes: one line each on what was omitted or chosen while loading, for the log.
      drawn: whether the test split was drawn at random from the images.
    """

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, tuple[Record, ...]]
    root: Path | None = None
    notes: tuple[str, ...] = ()
    drawn: bool = False
