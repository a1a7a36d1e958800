"""What a dataset lists: its images as records, and how each is read."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture of a data set.

    Attributes:
        name: unique in the data set; for files the path below the data set's root.
        label: index into the data set's `class_names`.
        read: takes short_side_px, returns the picture as uint8 `[h, w, 3]`; picklable.
        stamp: what the picture's content depends on; another stamp, other pixels.
        locate: finds `box`, where the source marks the object; picklable.
        content: returns the file as it is stored; picklable. None for drawings.
    """

    name: str
    label: int
    read: Callable[[int], np.ndarray]
    stamp: str
    locate: Callable[[], Box] | None = None
    content: Callable[[], bytes] | None = None

    @property
    def box(self) -> Box | None:
        """Where the object is, or None where the source does not say.

        (x_min, y_min, x_max, y_max) as fractions of the picture that `read` returns.
        Found at each call, in 0.5 to 2 ms: a file's header or a drawing is needed.
        """
        return self.locate() if self.locate else None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set: "train", "test" and, for the drawn birds, "test_shifted".

    Attributes:
        name: the source's name.
        class_names: names in the order of the labels.
        splits: the records of each split, in an order fixed by their names or lists.
        root: the folder that the names of files start from, or that holds the built
            set; None without files.
        notes: what was left out or decided while loading, one line each, to be shown.
    """

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, tuple[Record, ...]]
    root: Path | None = None
    notes: tuple[str, ...] = ()
