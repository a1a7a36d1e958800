"""Reads examples of datasets built by TensorFlow Datasets, without TensorFlow.

TensorFlow is needed once, to build a dataset; as "array_record", NumPy alone reads it.
Images are returned as the encoded bytes that the dataset stores.

Each example is read once for its label: tfds has no cheaper way.
"""

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cra_jax.datasets import tfds_archives
from cra_jax.datasets.listing import test_split
from cra_jax.input import decoding
from cra_jax.runtime.progress import Progress

FORMAT = "array_record"
"""The one format of tfds that is read without TensorFlow."""

_FILE_NAMES = ("image/filename", "file_name", "filename")


class Example(NamedTuple):
    """One image of a dataset."""

    name: str
    """The name of its file if the dataset has one, else `<split>/<index>`."""
    label: int
    content: Callable[[], bytes]
    """Reads the image as it is stored; picklable."""
    stamp: str
    """Of the image's content; a copy of the dataset has the same stamps."""
    version: str
    """Changes if the files are written, replaced or copied."""
    box: tuple[float, float, float, float] | None
    """(x_min, y_min, x_max, y_max) as fractions of the image as it is stored."""


class BuiltDataset(NamedTuple):
    """A built dataset."""

    root: Path
    """The folder of its files."""
    class_names: tuple[str, ...]
    splits: dict[str, tuple[Example, ...]]
    """"train", "test" and "val", those that are there, in the order of the dataset."""
    notes: tuple[str, ...]


class _Keys(NamedTuple):
    """Which features are read; None for those that the dataset lacks."""

    image: str
    label: str
    box: str | None
    file_name: str | None
    class_name: str | None


def read_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    progress: bool = True,
) -> BuiltDataset:
    """Lists the examples of a dataset that was built as array_record.

    Args:
      name: as in tfds: `set`, `set/config`, `set:1.0.0`.
      data_dir: directory of the datasets of tfds; None or "" for tfds' own default.
      progress: report on standard error.

    Returns:
      The splits "train", "test" and "val" that are there; "validation" is "test" if
      there is no other.

    Raises:
      ValueError: the dataset does not exist, is not built, has another format, is
        damaged, or does not have one class per image. The message says how to build it.
    """
    folder = _folder(name, data_dir)
    builder = _find(name, folder)
    info, root = builder.info, Path(builder.data_path)
    chosen, notes = _choose_splits(name, list(info.splits))
    keys = _keys(name, info)
    label_names = tuple(info.features[keys.label].names)
    splits, shown = {}, {}
    total = sum(info.splits[split].num_examples for split in chosen.values())
    with Progress(total, f"labels of {name}", unit="images", show=progress) as bar:
        for split, stored in chosen.items():
            try:
                examples = _examples(root, info.full_name, stored, keys, shown, bar)
                splits[split] = tuple(examples)
            # The readers of shards and of examples may raise any error.
            except Exception as error:
                raise ValueError(
                    f"{root}: the split {stored!r} of {name} is damaged"
                    f" ({type(error).__name__}: {error}); remove the folder and"
                    f" {tfds_archives.BUILD}"
                ) from error
    _check_labels(name, splits, len(label_names))
    found = tuple(shown.get(label, "") for label in range(len(label_names)))
    if (
        all(map(str.isdecimal, label_names))
        and all(found)
        and len(set(found)) == len(found)
    ):
        label_names = found  # caltech_birds2011 numbers its classes, but names birds
    return BuiltDataset(root, label_names, _unique_names(splits), notes)


def build_directory(
    name: str, data_dir: str | os.PathLike[str] | None = None
) -> Path | None:
    """The folder to build a dataset in; None if it is built already.

    Args:
      name: as for `read_dataset`.
      data_dir: as for `read_dataset`.

    Raises:
      ValueError: the dataset is damaged, or in a format that only TensorFlow reads.
    """
    folder = _folder(name, data_dir)
    return folder if _open(name, folder) is None else None


def _folder(name: str, data_dir: str | os.PathLike[str] | None) -> Path:
    """The directory of the datasets of tfds."""
    tfds_archives.check_installed()
    from tensorflow_datasets.core import constants

    if not name:
        raise ValueError(
            "data.name is empty: set it to a dataset of tfds, such as caltech_birds2011"
        )
    return Path(data_dir or constants.DATA_DIR).expanduser().absolute()


def _find(name: str, folder: Path) -> Any:
    """The builder of a dataset that must exist."""
    builder = _open(name, folder)
    if builder is None:
        dataset = tfds_archives.dataset_name(name)
        doubt = ""
        if (folder / dataset).is_dir():
            built = sorted(f.name for f in (folder / dataset).iterdir() if f.is_dir())
            doubt = f" (of {dataset} there is: {', '.join(built) or 'nothing'})"
        elif unknown := tfds_archives.unknown_name_hint(name):
            doubt = f" ({unknown})"
        by_hand = ""
        if dataset in tfds_archives.UNAVAILABLE:  # downloading it cannot succeed
            by_hand = tfds_archives.manual_download_help(
                name, folder / "downloads" / "manual"
            )
        raise ValueError(
            f"{folder}: the dataset {name!r} is not built there{doubt};"
            f" {tfds_archives.BUILD}{by_hand}"
        )
    return builder


def _open(name: str, folder: Path) -> Any:
    """The builder of a dataset on disk; reading runs none of the code that built it."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    try:
        builder = read_only_builder.builder_from_files(name, data_dir=str(folder))
    except tfds.core.DatasetNotFoundError:
        return None
    # tfds may raise any error for a damaged description.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{folder}: tfds cannot open {name!r} ({reason}); names are set, set/config"
            " or set:1.0.0; remove its folder and build it again if it is damaged"
        ) from error
    formats = sorted(f.value for f in builder.info.available_file_formats())
    if FORMAT not in formats:
        raise ValueError(
            f"{builder.data_path}: the dataset is stored as {', '.join(formats)}, which"
            f" only TensorFlow reads; move that folder away and {tfds_archives.BUILD}"
        )
    return builder


def _choose_splits(
    name: str, stored: list[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Split -> split of the dataset, and notes on the others."""
    known = {"train": "train", "test": "test", "validation": "val"}
    chosen = {known[s]: s for s in ("train", "test", "validation") if s in stored}
    if not chosen:
        raise ValueError(
            f"{name}: its splits are {', '.join(sorted(stored)) or 'none'}; train,"
            " test or validation is needed: choose another dataset"
        )
    chosen, notes = test_split(chosen, name)
    notes += [f"the split {s!r} is not used" for s in stored if s not in known]
    return chosen, tuple(notes)


def _keys(name: str, info: Any) -> _Keys:
    import tensorflow_datasets as tfds

    features = dict(info.features.items())
    supervised = info.supervised_keys or ()
    if not (len(supervised) == 2 and all(isinstance(key, str) for key in supervised)):
        supervised = "image", "label"
    image, label = supervised
    kinds = {key: type(feature).__name__ for key, feature in features.items()}
    if not (
        isinstance(features.get(image), tfds.features.Image)
        and isinstance(features.get(label), tfds.features.ClassLabel)
        and features[image].np_dtype == np.uint8
    ):
        raise ValueError(
            f"{name} does not have uint8 images of one class each: its features are"
            f" {kinds}; choose a dataset for image classification"
        )
    box = features.get("bbox")
    has_box = isinstance(box, tfds.features.BBoxFeature)
    # Datasets built before formats existed have this one.
    relative = has_box and getattr(box.bbox_format, "value", "REL_YXYX") == "REL_YXYX"
    texts = [key for key, kind in kinds.items() if kind == "Text"]
    file_name = next((key for key in _FILE_NAMES if key in texts), None)
    class_name = f"{label}_name"
    return _Keys(
        image,
        label,
        "bbox" if relative else None,
        file_name,
        class_name if class_name in texts else None,
    )


def _examples(
    root: Path,
    full_name: str,
    split: str,
    keys: _Keys,
    shown: dict[int, str],
    bar: Progress,
) -> Iterator[Example]:
    """Reads a split; `shown` collects the class names in examples."""
    version = _version(root, split)
    written = _version(root, split, of_copies=True)
    source = _source(root, split, version)
    for index in range(len(source)):
        stored = source[index]
        label = int(stored[keys.label])
        if keys.class_name:
            shown[label] = stored[keys.class_name].decode()
        box = None
        if keys.box:
            top, left, bottom, right = map(float, stored[keys.box])
            # Some datasets have zeros for "none".
            if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
                box = left, top, right, bottom
        yield Example(
            stored[keys.file_name].decode() if keys.file_name else f"{split}/{index}",
            label,
            functools.partial(_content, root, split, version, keys.image, index),
            f"{full_name} {split} {index}, shards {version}",
            written,
            box,
        )
        bar.advance()


def _content(root: Path, split: str, version: str, image: str, index: int) -> bytes:
    try:
        return _source(root, split, version)[index][image]
    # array_record and tfds may raise any error.
    except Exception as error:
        raise decoding.ImageError(
            f"{root}: image {index} of {split!r} cannot be read"
            f" ({type(error).__name__}: {error}); build the dataset again"
        ) from error


@functools.lru_cache(maxsize=16)
def _source(root: Path, split: str, version: str) -> Sequence[dict[str, Any]]:
    """An open split. `version` is there so that a rebuilt dataset is opened again."""
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(root)
    skip = {
        key: tfds.decode.SkipDecoding()  # masks, too, would cost a decoding
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source(split, decoders=skip, file_format=FORMAT)


def _version(root: Path, split: str, *, of_copies: bool = False) -> str:
    """Digest of the sizes and times of a split's files.

    Args:
      root: the folder of the dataset.
      split: of the dataset.
      of_copies: whether copies of the files have other digests.
    """
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(root, file_format=FORMAT).info
    digest = hashlib.sha256()
    for file in info.splits[split].filepaths:
        status = os.stat(file)
        digest.update(f"{status.st_size} {status.st_mtime_ns // 10**6} ".encode())
        if of_copies:
            identity = status.st_dev, status.st_ino, status.st_ctime_ns
            digest.update(f"{identity} ".encode())
    return digest.hexdigest()[:12]


def _check_labels(
    name: str, splits: dict[str, tuple[Example, ...]], num_classes: int
) -> None:
    for split, examples in splits.items():
        wrong = [e for e in examples if not 0 <= e.label < num_classes]
        if wrong:
            raise ValueError(
                f"{name}: {len(wrong)} of {len(examples)} images of {split!r} have no"
                f" class (the label of {wrong[0].name} is {wrong[0].label}, of"
                f" {num_classes} classes); choose a dataset whose test images are"
                " labelled"
            )


def _unique_names(
    splits: dict[str, tuple[Example, ...]],
) -> dict[str, tuple[Example, ...]]:
    """Replaces file names by numbers if they are not unique."""
    names = [example.name for example in itertools.chain(*splits.values())]
    if len(set(names)) == len(names):
        return splits
    return {
        split: tuple(
            example._replace(name=f"{split}/{index}")
            for index, example in enumerate(examples)
        )
        for split, examples in splits.items()
    }
