"""Small tfds datasets, built as array_record files without TensorFlow."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import registered

from cra_jax.datasets import tfds_archives, tfds_build

Examples = Sequence[dict[str, Any]]


def jpeg(seed: int, orientation: int = 1) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (10, 20, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    return file.getvalue()


def build(
    folder: Path, name: str, features: dict[str, Any], splits: Mapping[str, Examples]
) -> Path:
    """Builds `<folder>/<name>/1.0.0`; tfds stores bytes values unchanged."""

    def info(self):
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features)
        )

    def examples(rows: Examples):
        for i, row in enumerate(rows):
            yield (
                i,
                {k: io.BytesIO(v) if type(v) is bytes else v for k, v in row.items()},
            )

    body = {
        "VERSION": tfds.core.Version("1.0.0"),
        "name": name,
        "pkg_dir_path": folder,
        "_info": info,
        "_split_generators": lambda self, _: {
            k: examples(v) for k, v in splits.items()
        },
        "_generate_examples": examples,
    }
    folder.mkdir(exist_ok=True)
    with registered.skip_registration():
        builder_class = type(name, (tfds.core.GeneratorBasedBuilder,), body)
    builder = builder_class(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder / name / "1.0.0"


def labelled(num_classes: int = 2) -> dict[str, Any]:
    return {
        "image": tfds.features.Image(),
        "label": tfds.features.ClassLabel(num_classes=num_classes),
    }


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"image": jpeg(first + i), "label": i % 2} for i in range(count)]


def plain(folder: Path, **splits: Examples) -> Path:
    splits = splits or {"train": rows(4), "test": rows(2, 10)}
    return build(folder, "plain", labelled(), splits)


def build_registered(name: str, folder: Path) -> None:
    """Builds a dataset registered in tfds without TensorFlow; runs in a subprocess."""
    tfds_archives.MODULES.clear()
    tfds_build.build(name, folder)
