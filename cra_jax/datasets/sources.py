"""Loads a dataset by the name of its source: converts listings to records.

A record has the name of an image, its class and how to read it. Loading opens no image:
labels come from the published lists or from folder names, and orders never depend on
the file system. Missing files, duplicate names and labels out of range are errors;
`Dataset.notes` has the numbers of omitted files.
"""

import ast
import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cra_jax.datasets import (
    aircraft,
    archives,
    class_folders,
    csv_file,
    cub,
    stanford_cars,
    stanford_dogs,
    synthetic,
    synthetic_drawing,
    tfds_read,
)
from cra_jax.datasets.listing import (
    Corners,
    Listing,
    draw_share,
    name_below,
    regular,
    some,
)
from cra_jax.input import decoding, image_cache
from cra_jax.input.records import Box, Dataset, Point, Record
from cra_jax.input.splits import DataOptions


class Reader(NamedTuple):
    """How a dataset on disk is read.

    Attributes:
      read: the folder or file, with a seed and the options if any -> Listing.
      layout: expected layout on disk, and the download address; for messages.
      options: the keyword arguments of `read`.
      cut_bottom_px: rows at the bottom of every image to be cropped, also in
        prediction.
    """

    read: Callable[..., Listing]
    layout: str
    options: tuple[str, ...] = ()
    cut_bottom_px: int = 0


READERS = {
    "cub": Reader(cub.cub, cub.LAYOUT),
    "cars": Reader(stanford_cars.cars, stanford_cars.LAYOUT),
    "dogs": Reader(stanford_dogs.dogs, stanford_dogs.LAYOUT),
    "aircraft": Reader(
        aircraft.aircraft, aircraft.LAYOUT, cut_bottom_px=aircraft.BANNER_PX
    ),
    "nabirds": Reader(cub.nabirds, cub.NABIRDS_LAYOUT),
    "folder": Reader(
        class_folders.class_folders, class_folders.LAYOUT, ("test_share",)
    ),
    "csv": Reader(csv_file.csv_list, csv_file.LAYOUT, ("test_share",)),
}
"""The datasets on disk: one entry each."""

OPTIONS: Mapping[str, tuple[str, ...]] = {
    "synthetic": ("num_species", "habitat_share", "train_size", "test_size"),
    **{name: reader.options for name, reader in READERS.items()},
    "tfds": ("name", "test_share"),
}
"""The options of `load` that each source reads."""

SOURCES = tuple(OPTIONS)


def cut_bottom_px(source: str) -> int:
    """Rows at the bottom of every image of a source that are cropped."""
    return READERS[source].cut_bottom_px if source in READERS else 0


def load(
    source: str,
    path: str | os.PathLike[str] | None = None,
    *,
    seed: int = 0,
    needs_train: bool = True,
    **options: Any,
) -> Dataset:
    """Lists the records of a dataset.

    Args:
      source: one of `SOURCES`.
      path: the dataset's folder, or the CSV file; empty or None for "synthetic".
        For "tfds" the directory of its datasets; empty or None for its own default.
      seed: of the drawings, or of the random test split.
      needs_train: False allows a dataset without training images, for evaluation.
      **options: those of the source in `OPTIONS`.
        num_species (8), habitat_share (0.7), train_size (4096), test_size (1024):
        of the drawn birds.
        test_share (0.2): of each class, if folders, CSV or tfds have no test split.
        name (""): of the dataset in tfds, built there as array_record.

    Returns:
      A dataset whose every class has a training image. A class may be missing from
      a test split; a note names it.

    Raises:
      ValueError: the source or an option is unknown, files are missing or damaged,
        labels are out of range, names are repeated, a class has no training image.
    """
    if source not in SOURCES:
        raise ValueError(f"source is {source!r}: choose one of {', '.join(SOURCES)}")
    unknown = sorted(set(options) - set(OPTIONS[source]))
    if unknown:
        known = ", ".join(OPTIONS[source]) or "none"
        raise ValueError(
            f"source {source!r} has no option {', '.join(unknown)}; it has: {known}"
        )
    if source == "synthetic":
        if path:
            raise ValueError(
                f"path is {str(path)!r}, but source 'synthetic' reads no files: leave"
                " the path empty, or choose another source"
            )
        return _check(_synthetic(seed, **options))
    if source == "tfds":
        return _check(_from_tfds(path, seed, **options), needs_train=needs_train)
    reader = READERS[source]
    if not path:
        raise ValueError(f"source {source!r} needs a path: {reader.layout}")
    root = Path(path).expanduser().absolute()
    kind = "file" if source == "csv" else "folder"
    if not (root.is_file() if kind == "file" else root.is_dir()):
        raise ValueError(f"{root}: there is no such {kind}; {reader.layout}")
    if reader.options:
        options["seed"] = seed
    try:
        dataset = _from_listing(source, reader.read(root, **options))
        return _check(dataset, needs_train=needs_train, layout=f"; {reader.layout}")
    except OSError as error:
        raise ValueError(
            f"{error.filename}: {error.strerror}; make it readable, or remove it"
        ) from error


def _synthetic(
    seed: int,
    *,
    num_species: int = 8,
    habitat_share: float = 0.7,
    train_size: int = 4096,
    test_size: int = 1024,
) -> Dataset:
    names = synthetic.class_names(num_species)
    setting = {"seed": seed, "num_species": num_species, "habitat_share": habitat_share}
    # The stamp changes with the code that draws.
    text = "\n".join(_code_of(module) for module in (synthetic_drawing, synthetic))
    code = hashlib.sha256(text.encode()).hexdigest()[:12]
    stamp = " ".join(f"{key}={value}" for key, value in setting.items()) + f" {code}"
    splits = {}
    for split in synthetic.SPLITS:
        size = train_size if split == "train" else test_size
        splits[split] = tuple(
            Record(
                f"{split}/{index:06d}",
                index % num_species,
                functools.partial(_drawn_image, split, index, setting),
                stamp,
                functools.partial(_drawn_box, split, index, setting),
                locate_parts=functools.partial(_drawn_parts, split, index, setting),
            )
            for index in range(size)
        )
    return Dataset("synthetic", names, splits)


def _code_of(module: Any) -> str:
    """The code of a module, without its comments and docstrings."""
    tree = ast.parse(Path(str(module.__file__)).read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [x for x in body if not _is_text(x)]  # pyright: ignore[reportAttributeAccessIssue]
    return ast.unparse(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _drawn_image(split: str, index: int, setting: dict, short_side_px: int):
    return synthetic.draw(split, index, size_px=short_side_px, **setting).image


def _drawn_box(split: str, index: int, setting: dict) -> Box:
    return synthetic.draw(split, index, size_px=32, **setting).box


def _drawn_parts(split: str, index: int, setting: dict) -> dict[str, Point]:
    return {"head": synthetic.draw(split, index, size_px=32, **setting).head}


def _from_listing(name: str, listing: Listing) -> Dataset:
    root, cut_px, splits, missing = listing.root, cut_bottom_px(name), {}, []
    identities: dict[str, dict[tuple[int, int], str]] = {}
    for split, entries in listing.splits.items():
        identities[split] = {}
        records = []
        for file, label, corners, parts in entries:
            if not file.is_relative_to(root) or ".." in file.relative_to(root).parts:
                raise ValueError(
                    f"{root}: its lists contain {file}, which is outside: get the"
                    " dataset from its publisher"
                )
            try:
                status = regular(file)
            except FileNotFoundError:
                missing.append(str(file))
                continue
            if status.st_ino:
                identity = status.st_dev, status.st_ino
                identities[split][identity] = name_below(file, root)
            stamp = f"{status.st_size} bytes, mtime {status.st_mtime_ns // 10**6} ms"
            read = functools.partial(decoding.read, str(file))
            if cut_px:
                stamp += f", {cut_px} px cut off"
                read = functools.partial(_read_cut, str(file), cut_px)
            locate = corners and functools.partial(
                _fraction_box, str(file), corners, cut_px
            )
            records.append(
                Record(
                    name_below(file, root),
                    label,
                    read,
                    stamp,
                    locate,
                    file.read_bytes,
                    functools.partial(_fraction_parts, str(file), parts, cut_px)
                    if parts
                    else None,
                    f"{status.st_dev} {status.st_ino} {status.st_ctime_ns}",
                )
            )
        splits[split] = tuple(records)
    if missing:
        raise ValueError(
            f"{root}: {len(missing)} listed images are missing: {some(missing)};"
            " unpack the archive again"
        )
    linked = _linked(root, identities)
    notes = *listing.notes, *_named_heic(root, splits), *linked
    return Dataset(name, listing.class_names, splits, root, notes, drawn=listing.drawn)


def _named_heic(root: Path, splits: Mapping[str, Sequence[Record]]) -> list[str]:
    """A note on files with the endings of HEIC, whose content may be another format."""
    count = sum(
        record.name.lower().endswith((".heic", ".heif"))
        for records in splits.values()
        for record in records
    )
    if not count:
        return []
    return [
        f"{count} files of {root} are named .heic or .heif: those that are in this"
        " format cannot be read; save them as JPEG or PNG"
    ]


def _linked(
    root: Path, identities: Mapping[str, Mapping[tuple[int, int], str]]
) -> list[str]:
    """Notes on files that are in the training split and in another, by links.

    Args:
      root: of the dataset, for messages.
      identities: split -> device and inode of a file -> its name.

    Raises:
      ValueError: all files of a split are training images.
    """
    trained, notes = identities.get("train", {}), []
    for split, files in identities.items():
        both = [
            f"{name} = {trained[key]}"
            for key, name in files.items()
            if trained.get(key, name) != name  # a name in both is an error of its own
        ]
        if split == "train" or not both:
            continue
        if len(both) == len(files):
            raise ValueError(
                f"{root}: all {len(both)} images of {split!r} are links to training"
                f" images ({some(both)}); give it images of its own"
            )
        notes.append(
            f"warning: {len(both)} of {len(files)} images of {split!r} are links to"
            f" training images ({some(both)}); remove them from one of the splits"
        )
    return notes


def _from_tfds(
    path: str | os.PathLike[str] | None,
    seed: int,
    *,
    name: str = "",
    test_share: float = 0.2,
) -> Dataset:
    found = tfds_read.read_dataset(name, path)
    splits = {
        split: tuple(
            Record(
                example.name,
                example.label,
                functools.partial(_read_content, example.content, example.name),
                example.stamp,
                example.box
                and functools.partial(_content_box, example.content, example.box),
                example.content,
                version=example.version,
            )
            for example in examples
        )
        for split, examples in found.splits.items()
    }
    dataset = Dataset("tfds", found.class_names, splits, found.root, found.notes)
    if set(splits) != {"train"}:
        return dataset
    dataset = _hold_out(dataset, "test", test_share, seed, "data.test_share")
    note = (
        f"{name} has only the split 'train': {len(dataset.splits['test'])} of"
        f" {len(splits['train'])} images were drawn for testing"
    )
    return dataclasses.replace(dataset, notes=(*dataset.notes, note), drawn=True)


def _hold_out(
    dataset: Dataset, split: str, share: float, seed: int | str, key: str
) -> Dataset:
    """Moves a share of the training images of each class into a new split."""
    train = dataset.splits["train"]
    drawn = draw_share(
        ((record.name, record.label) for record in train),
        share=share,
        seed=seed,
        key=key,
    )
    kept = tuple(record for record in train if record.name not in drawn)
    held_out = tuple(record for record in train if record.name in drawn)
    splits = {**dataset.splits, "train": kept, split: held_out}
    return dataclasses.replace(dataset, splits=splits)


def _read_content(content: Callable[[], bytes], name: str, short_side_px: int):
    return decoding.read(content(), short_side_px, name=name)


def _content_box(content: Callable[[], bytes], box: Box) -> Box | None:
    header = decoding.read_header(content())
    return _whole_box(*_upright(header, np.array(box[::2]), np.array(box[1::2])))


def _read_cut(file: str, cut_px: int, short_side_px: int) -> np.ndarray:
    """Reads an image without its lowest rows, a banner."""
    image = decoding.cut_bottom(decoding.decode(file), cut_px, name=file)
    return decoding.resize_short_side(image, short_side_px)


def _fraction_box(
    file: str, corners: Corners | Callable[[], Corners], cut_px: int
) -> Box | None:
    """Converts corners in stored pixels to fractions of the image as it is read.

    Raises:
      ValueError: less than half of the box lies in the image, or it is below a pixel.
    """
    if callable(corners):
        corners = corners()
    header = decoding.read_header(file)
    size = np.array([header.width_px, header.height_px])
    box = np.sort(np.reshape(corners, (2, 2)), axis=0)
    sides = box[1] - box[0]
    inside = np.clip(box, 0, size)
    if min(sides) < 1 or np.prod(inside[1] - inside[0]) < 0.5 * np.prod(sides):
        shown = ", ".join(f"{corner:g}" for corner in corners)
        problem = "is smaller than a pixel" if min(sides) < 1 else "lies outside"
        raise ValueError(
            f"{file}: its box {shown} {problem}, the image has"
            f" {size[0]} x {size[1]} pixels; give the box in pixels of the stored image"
        )
    x, y = (box / size).T
    return _whole_box(*_upright(header, x, y, cut_px))


def _fraction_parts(
    file: str, parts: Mapping[str, Point], cut_px: int
) -> dict[str, Point]:
    """Converts parts in stored pixels to fractions of the image as it is read."""
    header = decoding.read_header(file)
    x, y = np.transpose([*parts.values()])
    x, y = _upright(header, x / header.width_px, y / header.height_px, cut_px)
    return dict(zip(parts, zip(x.tolist(), y.tolist(), strict=True), strict=True))


def _whole_box(x: np.ndarray, y: np.ndarray) -> Box | None:
    """The box between two corners, clipped to the image; None if nothing is left."""
    x, y = np.clip(np.sort(x), 0, 1), np.clip(np.sort(y), 0, 1)
    if x[0] == x[1] or y[0] == y[1]:
        return None
    return float(x[0]), float(y[0]), float(x[1]), float(y[1])


def _upright(
    header: decoding.Header, x: np.ndarray, y: np.ndarray, cut_px: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Converts fractions of the stored image to those of the image as it is read."""
    width, height = header.width_px, header.height_px
    if header.orientation in (2, 3, 7, 8):
        x = 1 - x
    if header.orientation in (3, 4, 6, 7):
        y = 1 - y
    if header.orientation >= 5:
        x, y, width, height = y, x, height, width
    left, top, right, bottom = decoding.kept_region(width, height - cut_px)
    return (x * width - left) / (right - left), (y * height - top) / (bottom - top)


def _check(dataset: Dataset, *, needs_train: bool = True, layout: str = "") -> Dataset:
    where = dataset.root or dataset.name
    if needs_train and "train" not in dataset.splits:
        raise ValueError(
            f"{where}: only {', '.join(dataset.splits)} is here, and no training"
            f" split{layout}"
        )
    if len(dataset.class_names) < 2 and needs_train:
        raise ValueError(
            f"{where}: only the class {some(dataset.class_names)}; two are needed: set"
            " the path to the folder that has the class folders"
        )
    for split, records in dataset.splits.items():
        if not records and (needs_train or split != "train"):
            raise ValueError(f"{where}: the split {split!r} has no images; add some")
    trained = {record.label for record in dataset.splits.get("train", ())}
    idle = [name for i, name in enumerate(dataset.class_names) if i not in trained]
    if idle and needs_train:
        raise ValueError(
            f"{where}: {len(idle)} classes have no training image: {some(idle)}; add"
            " some, or remove the classes"
        )
    for what, names in {
        "class names": dataset.class_names,
        "images": [r.name for records in dataset.splits.values() for r in records],
    }.items():
        doubled = [n for n, count in collections.Counter(names).items() if count > 1]
        if doubled:
            raise ValueError(
                f"{where}: {what} listed more than once: {some(doubled)}; rename or"
                " remove them"
            )
    return dataclasses.replace(dataset, notes=(*dataset.notes, *_absent(dataset)))


def _absent(dataset: Dataset) -> list[str]:
    """Notes on classes without an image in a split that is scored."""
    notes = []
    for split, records in dataset.splits.items():
        there = {record.label for record in records}
        absent = [n for i, n in enumerate(dataset.class_names) if i not in there]
        if absent and split != "train":
            notes.append(
                f"{split!r} has no images of {len(absent)} of the"
                f" {len(dataset.class_names)} classes, which its scores leave out:"
                f" {some(absent)}"
            )
    return notes


def load_dataset(options: DataOptions, *, needs_train: bool = True) -> Dataset:
    """Lists the records of a dataset; opens no image.

    CUB-200-2011 is downloaded if no path is given; other datasets cannot be. If
    `options.val_share` is above 0, that share of the training images is the split
    "val".

    Args:
      options: of the config.
      needs_train: False allows a dataset without training images, for evaluation.

    Raises:
      ValueError: as `load`; or a share is held out, and the dataset has a split "val".
    """
    path, share = options.path, options.val_share
    if options.source == "cub" and not path:
        path = archives.cub_200_2011(image_cache.default_cache_dir(None) / "datasets")
    dataset = load(
        options.source,
        path,
        seed=options.seed,
        needs_train=needs_train,
        **options.source_options,
    )
    if not share or (not needs_train and not dataset.splits.get("train")):
        return dataset
    if "val" in dataset.splits:
        raise ValueError(
            f"data.val_share is {share}, but {dataset.root} has a validation split:"
            " set data.val_share=0"
        )
    if not 0 < share < 1:
        raise ValueError(f"data.val_share is {share}: set it to 0, or between 0 and 1")
    seed = f"val {options.seed}"
    return _hold_out(dataset, "val", share, seed, "data.val_share")


def with_classes(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """A dataset without training images, with the classes of a checkpoint.

    It is returned unchanged if it has training images, or a class of its own.

    Args:
      dataset: the dataset.
      class_names: in the order of the checkpoint's scores.
    """
    if dataset.splits.get("train") or dataset.class_names == tuple(class_names):
        return dataset
    number = {name: label for label, name in enumerate(class_names)}
    if not set(dataset.class_names) <= number.keys():
        return dataset
    labels = [number[name] for name in dataset.class_names]
    splits = {
        split: tuple(dataclasses.replace(r, label=labels[r.label]) for r in records)
        for split, records in dataset.splits.items()
    }
    found = dataclasses.replace(dataset, class_names=tuple(class_names), splits=splits)
    before = _absent(dataset)
    notes = [note for note in dataset.notes if note not in before]
    return dataclasses.replace(found, notes=(*notes, *_absent(found)))
