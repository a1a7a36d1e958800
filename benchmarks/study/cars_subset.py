"""As many models of Stanford Cars as the study's machine has hours for, as a CSV file.

98 models have ten times the images. The first models by name are as hard to tell
apart as any: they are neighbours.
"""

import csv
import io
from pathlib import Path

from PIL import Image

from cra_jax.datasets import sources
from cra_jax.input.records import Record
from cra_jax.runtime import files

MODELS = 16
"""The first so many class names: the models of four makers and a Hummer."""


def file_in(root: Path) -> Path:
    """Where the list is, in the folder of the study's runs."""
    return root / "cars" / "cars.csv"


def write(path: Path, file: Path, models: int = MODELS) -> None:
    """Lists the first models, every second image of each for testing.

    Half of the images, as in the data set's own split: a fifth of so few would make
    one image half a percent.

    Args:
      path: of Stanford Cars, in any layout that `sources` reads.
      file: the CSV file; a link to the images comes to lie beside it.
      models: how many class names.

    Raises:
      ValueError: there is no such data set, or it has fewer models.
    """
    data = sources.load("cars", path)
    if len(data.class_names) < models:
        raise ValueError(
            f"{path} has {len(data.class_names)} models, and the study takes {models}:"
            " give the whole of Stanford Cars"
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
        chosen = [record for record in records if record.label == label]
        for place, record in enumerate(chosen):
            split = ("train", "test")[place % 2]
            box = _box_in_pixels(record, root / record.name)
            writer.writerow((f"images/{record.name}", name, split, *box))
    file.parent.mkdir(parents=True, exist_ok=True)
    link = file.parent / "images"
    if not link.is_symlink() or link.resolve() != root.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(root.resolve(), target_is_directory=True)
    files.write_atomically(file, text.getvalue())


def _box_in_pixels(record: Record, file: Path) -> tuple[str, ...]:
    """Four fields, empty where the data set does not say."""
    if record.box is None:
        return ("",) * 4
    with Image.open(file) as image:
        sides = image.size * 2
    return tuple(
        f"{share * side:.0f}" for share, side in zip(record.box, sides, strict=True)
    )
