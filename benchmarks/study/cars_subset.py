"""Writes a CSV list of the first models of Stanford Cars by name.

The study takes a subset to limit its training time. The first models by name include
several of the same maker, which look alike.
"""

import csv
import io
from pathlib import Path

from PIL import Image

from cra_jax.datasets import sources
from cra_jax.input.records import Record
from cra_jax.runtime import files

MODELS = 16
"""Number of class names that the study takes, in alphabetical order."""


def file_in(root: Path) -> Path:
    """Path of the list in the directory of the study's runs."""
    return root / "cars" / "cars.csv"


def write(path: Path, file: Path, models: int = MODELS) -> None:
    """Writes the list; every second image of each model is a test image.

    Half of the images are for testing, as in the official split.

    Args:
      path: directory of Stanford Cars, in any layout that `sources` reads.
      file: path of the CSV file; a link to the images is placed beside it.
      models: number of class names.

    Raises:
      ValueError: there is no such dataset, or it has fewer models.
    """
    data = sources.load("cars", path)
    if len(data.class_names) < models:
        raise ValueError(
            f"{path} has {len(data.class_names)} models, and the study takes {models}:"
            " give the complete Stanford Cars"
        )
    root = data.root or path
    records = sorted(
        (record for split in data.splits.values() for record in split),
        key=lambda record: (record.label, record.name),
    )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "split", "x_min", "y_min", "x_max", "y_max"))
    for label, name in enumerate(data.class_names[:models]):
        of_model = [record for record in records if record.label == label]
        for position, record in enumerate(of_model):
            split = ("train", "test")[position % 2]
            box = _box_in_pixels(record, root / record.name)
            writer.writerow((f"images/{record.name}", name, split, *box))
    file.parent.mkdir(parents=True, exist_ok=True)
    link = file.parent / "images"
    if not link.is_symlink() or link.resolve() != root.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(root.resolve(), target_is_directory=True)
    files.write_atomically(file, text.getvalue())


def _box_in_pixels(record: Record, file: Path) -> tuple[str, ...]:
    """Four fields, which are empty if the record has no box."""
    if record.box is None:
        return ("",) * 4
    with Image.open(file) as image:
        sides = image.size * 2
    return tuple(
        f"{share * side:.0f}" for share, side in zip(record.box, sides, strict=True)
    )
