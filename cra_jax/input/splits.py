"""A split of a dataset, opened: its images, labels, boxes and parts."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from cra_jax.input import center_crop, image_cache
from cra_jax.input.records import Box, Dataset, Point, Record
from cra_jax.runtime import run_directory
from cra_jax.runtime.progress import Progress, print_line

_NAMED = 10  # how many boxes or classes messages list
_SHOWN_FROM = 5000  # images whose check shows its progress; fewer take seconds


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which dataset, and how its images are read.

    The part of `config.data` that training, evaluation and prediction share.

    Attributes:
      source: one of `sources.SOURCES`.
      path: of the dataset; empty if none is needed, or if it is downloaded.
      seed: of drawn images, and of randomly chosen splits.
      val_share: share of each class's training images that is the split "val"; 0: none.
      source_options: the options of `sources.load` that the source reads.
      short_side_px: what an image's shorter side is resized to.
      crop_px: height and width of the crop.
      mean: of the channels, images in 0..1.
      std: of the channels.
      prepare: whether images are decoded once into the image cache.
      skip_unreadable: whether unreadable images are omitted, and listed.
      cache_dir: directory of the image cache; empty: in or near the dataset.
      workers: threads that make batches.

    Raises:
      ValueError: an option is out of range.
    """

    source: str
    path: str
    seed: int
    val_share: float
    source_options: Mapping[str, Any]
    short_side_px: int
    crop_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    prepare: bool
    skip_unreadable: bool
    cache_dir: str
    workers: int

    def __post_init__(self) -> None:
        if self.crop_px > self.short_side_px:
            raise ValueError(
                f"data.crop_px={self.crop_px} does not fit into images whose shorter "
                f"side is data.short_side_px={self.short_side_px}: increase the latter"
            )


@dataclasses.dataclass(frozen=True)
class Split:
    """An opened split.

    Attributes:
      images: the images, cached or decoded at each access.
      labels: ``[n]``.
      records: of `sources`, one per image.
    """

    images: image_cache.ImageCache | image_cache.StreamedImages
    labels: np.ndarray
    records: tuple[Record, ...]

    @functools.cached_property
    def boxes(self) -> tuple[Box | None, ...]:
        """The object's box in each image, computed at first use.

        Raises:
          ValueError: boxes do not fit their images; the message has the first few.
        """
        found, problems = [], []
        for record in self.records:
            try:
                found.append(record.box)
            except (ValueError, OSError) as error:
                problems.append(str(error))
        if problems:
            lines = [f"{len(problems)} of {len(self.records)} boxes cannot be used:"]
            lines += [f"  {problem}" for problem in problems[:_NAMED]]
            raise ValueError("\n".join(lines))
        return tuple(found)

    @functools.cached_property
    def _sizes_px(self) -> list[tuple[int, int]]:
        """Width and height of each image, computed at first use."""
        images = self.images
        shapes = (
            images.shapes[:, :2].tolist()
            if isinstance(images, image_cache.ImageCache)
            else [image.shape[:2] for image in images]
        )
        return [(width, height) for height, width in shapes]

    def boxes_px(self, crop_px: int) -> dict[int, Box]:
        """The part of each object's box inside the centre crop, in pixels of the crop.

        Returns:
          Index -> box, for the images that have one; boxes of the full image are
          omitted.
        """
        if not any(self.boxes):
            return {}
        return {
            i: center_crop.box_in_crop_px(box, self._sizes_px[i], crop_px)
            for i, box in enumerate(self.boxes)
            if box is not None and tuple(box) != (0, 0, 1, 1)
        }

    @functools.cached_property
    def parts(self) -> tuple[Mapping[str, Point], ...]:
        """The visible parts in each image, computed at first use."""
        return tuple(record.parts for record in self.records)

    def parts_px(self, crop_px: int) -> dict[str, dict[int, np.ndarray]]:
        """Places of parts in pixels of the centre crop; some may lie outside it.

        Returns:
          Part -> index -> ``[2]``, (x, y), for the images that show the part.
        """
        found: dict[str, dict[int, np.ndarray]] = {}
        for i, parts in enumerate(self.parts):
            for name, place in parts.items():
                found.setdefault(name, {})[i] = center_crop.in_crop_px(
                    np.array(place), self._sizes_px[i], crop_px
                )
        return found

    def first_of_each_class(self, count: int) -> list[int]:
        """The first image of each of the first `count` classes, as indices."""
        return np.unique(self.labels, return_index=True)[1][:count].tolist()

    def take(self, indices: Sequence[int]) -> "Split":
        """Some of its images, in the order of `indices`."""
        return Split(
            [self.images[i] for i in indices],  # pyright: ignore[reportArgumentType]
            self.labels[list(indices)],
            tuple(self.records[i] for i in indices),
        )


def list_images(records: Sequence[Record]) -> tuple[run_directory.ListedImage, ...]:
    """Name, label and content digest of each record; reads every file once."""
    with (
        Progress(
            len(records),
            "checking the data",
            unit="images",
            show=len(records) > _SHOWN_FROM,
        ) as progress,
        ThreadPoolExecutor() as pool,  # reading and hashing release the GIL
    ):
        listed = []
        for record, digest in zip(
            records, pool.map(lambda record: record.digest, records), strict=True
        ):
            listed.append(run_directory.ListedImage(record.name, record.label, digest))
            progress.advance()
    return tuple(listed)


def digest(listed: Iterable[run_directory.ListedImage]) -> str:
    """Hex digest of labels and contents; names and order do not matter."""
    content = sorted([image.label, image.digest] for image in listed)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def describe_changes(
    before: Mapping[str, Sequence[run_directory.ListedImage]],
    now: Mapping[str, Sequence[run_directory.ListedImage]],
) -> str:
    """The first difference of two listings and the number of all; empty: none.

    Args:
      before: the images of some splits.
      now: the images of the same splits.
    """
    old, new = (
        {image.name: (split, image) for split, images in x.items() for image in images}
        for x in (before, now)
    )
    changes = []
    for name, (split, image) in old.items():
        there, other = new.get(name, ("", image))
        if not there:
            changes.append(f"{split}: {name} is missing")
        elif there != split:
            changes.append(f"{name} moved from {split} to {there}")
        elif other.digest != image.digest:
            changes.append(f"{split}: {name} has other content")
        elif other.label != image.label:
            changes.append(
                f"{split}: {name} has label {other.label} instead of {image.label}"
            )
    changes += [f"{new[name][0]}: {name} is new" for name in new if name not in old]
    if not changes and any(tuple(before[x]) != tuple(now[x]) for x in before):
        changes.append("the order of the images")
    more = f" (and {len(changes) - 1} more differences)" if len(changes) > 1 else ""
    return f"{changes[0]}{more}" if changes else ""


def keep_split(
    dataset: Dataset, before: Mapping[str, Sequence[run_directory.ListedImage]]
) -> Dataset:
    """Puts images back into the splits that they had, for a split drawn at random.

    Images are known by their names, and renamed ones by their content. New images stay
    in the split that they were drawn for. Known images come first, in the order that
    they had.
    """
    by_name, by_digest = {}, {}
    for split, images in before.items():
        for i, image in enumerate(images):
            by_name[image.name] = by_digest[image.digest] = split, i
    records = []
    for split, split_records in dataset.splits.items():
        new = split, len(by_name)
        for record in split_records:
            place = by_name.get(record.name) or by_digest.get(record.digest, new)
            records.append((*place, record))
    return dataclasses.replace(
        dataset,
        splits={
            split: tuple(
                record
                for _, _, record in sorted(
                    (x for x in records if x[0] == split), key=lambda x: x[1]
                )
            )
            for split in dataset.splits
        },
    )


def describe_data(splits: Mapping[str, Split]) -> str:
    """Describes splits, so that hosts can check that theirs are the same."""
    texts = []
    for name, split in splits.items():
        listed = list_images(split.records)
        text = hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:8]
        texts.append(
            f"{name} of {len(listed)} images (names, labels and contents {text})"
        )
    return ", ".join(texts)


def metric_split(splits: Iterable[str]) -> str:
    """The split whose top-1 accuracy chooses the best checkpoint."""
    return "val" if "val" in splits else "test"


def warn_of_duplicates(train: Split, others: Mapping[str, Split]) -> list[str]:
    """Warnings about images of other splits that are also training images.

    Images are compared as they are in the image cache; without one, nothing is.
    """
    if not isinstance(train.images, image_cache.ImageCache):
        return []
    trained: dict[tuple[int, ...], list[int]] = {}
    for i, key in enumerate(train.images.fingerprints()):
        trained.setdefault(key, []).append(i)
    warnings = []
    for name, split in others.items():
        if not isinstance(split.images, image_cache.ImageCache):
            continue
        both = [
            f"{split.records[i].name} = {train.records[same[0]].name}"
            for i, key in enumerate(split.images.fingerprints())
            if key in trained
            and (
                same := [
                    j
                    for j in trained[key]
                    if np.array_equal(train.images[j], split.images[i])
                ]
            )
        ]
        if both:
            shown = ", ".join(both[:3]) + (", ..." if len(both) > 3 else "")
            warnings.append(
                f"warning: {len(both)} of {len(split.labels)} images of {name!r} are"
                f" duplicates of training images ({shown}), which makes its scores too"
                " high; remove them from one of the splits (--mode data lists them)"
            )
    return warnings


def check_fills_batch(dataset: Dataset, batch_size: int) -> None:
    """Checks that the training images fill a batch, before any is decoded.

    Raises:
      ValueError: they do not.
    """
    count = len(dataset.splits["train"])
    if count < batch_size:
        raise ValueError(
            f"{count} training images do not fill one batch of {batch_size}: set "
            f"train.batch_size to {count} or less"
        )


def open_split(options: DataOptions, dataset: Dataset, name: str) -> Split:
    """Opens a split, with its images in the image cache if `options.prepare` is set.

    Raises:
      ValueError: images cannot be read or cached; without those that are omitted, a
        class has no training image; or boxes of a test split do not fit their images.
    """
    records = dataset.splits[name]
    if options.skip_unreadable and not options.prepare:
        raise ValueError(
            "data.skip_unreadable=True needs the image cache, which finds unreadable "
            "images before training: set data.prepare=True, or "
            "data.skip_unreadable=False"
        )
    if options.prepare:
        images = image_cache.prepare(
            records,
            **_cache_of(options, dataset, name),
            skip_unreadable=options.skip_unreadable,
        )
    else:
        images = image_cache.StreamedImages(records, options.short_side_px)
    split = _split(images)
    lost = sorted({record.label for record in records} - set(split.labels.tolist()))
    if lost:
        names = ", ".join(dataset.class_names[label] for label in lost[:_NAMED])
        text = f"{len(lost)} classes have no readable image in {name!r}: {names}"
        if name == "train":
            raise ValueError(f"{text}; repair the images, or remove the classes")
        print_line(f"warning: {text}; they are not scored")
    if name != "train":
        split.boxes  # noqa: B018 (raises now, and not after the first epochs)
    return split


def find_split(options: DataOptions, dataset: Dataset, name: str) -> Split | None:
    """Opens a split if its image cache exists; decodes no image."""
    records = dataset.splits[name]
    images = image_cache.find(records, **_cache_of(options, dataset, name))
    return _split(images) if images else None


def _cache_of(options: DataOptions, dataset: Dataset, name: str) -> dict[str, Any]:
    return {
        "short_side_px": options.short_side_px,
        "cache_dir": Path(options.cache_dir).expanduser()
        if options.cache_dir
        else image_cache.default_cache_dir(dataset.root),
        "name": f"{dataset.name}-{name}",
    }


def _split(images: image_cache.ImageCache | image_cache.StreamedImages) -> Split:
    labels = np.array([record.label for record in images.records], np.int32)
    return Split(images, labels, images.records)
