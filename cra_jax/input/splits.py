"""A split of a dataset, opened: its images, labels and boxes."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cra_jax.input import center_crop, store
from cra_jax.input.records import Box, Dataset, Record
from cra_jax.runtime.run_folder import Config


@dataclasses.dataclass(frozen=True)
class Split:
    """A split, ready to be read.

    Attributes:
      pictures: of `store`.
      labels: ``[n]``.
      records: of `sources`, one a picture.
    """

    pictures: store.Store | store.Streamed
    labels: np.ndarray
    records: tuple[Record, ...]

    @functools.cached_property
    def boxes(self) -> tuple[Box | None, ...]:
        """Where the object is in each picture, found at first use."""
        return tuple(record.box for record in self.records)

    @functools.cached_property
    def _sizes_px(self) -> list[tuple[int, int]]:
        """Width and height of each picture, found at first use."""
        pictures = self.pictures
        shapes = (
            pictures.shapes[:, :2].tolist()
            if isinstance(pictures, store.Store)
            else [picture.shape[:2] for picture in pictures]
        )
        return [(width, height) for height, width in shapes]

    def boxes_px(self, crop_px: int) -> dict[int, Box]:
        """What the centre crop shows of each object's box, in pixels of the crop.

        Returns:
          Index -> box, for the pictures that have one; a box of the whole picture says
          nothing, and is left out.
        """
        if not any(self.boxes):
            return {}
        return {
            i: center_crop.box_in_crop_px(box, self._sizes_px[i], crop_px)
            for i, box in enumerate(self.boxes)
            if box is not None and tuple(box) != (0, 0, 1, 1)
        }

    def firsts(self, count: int) -> list[int]:
        """The first picture of each of the first `count` classes, as indices."""
        return np.unique(self.labels, return_index=True)[1][:count].tolist()

    def take(self, indices: Sequence[int]) -> "Split":
        """Some of its pictures, in the order of `indices`."""
        return Split(
            [self.pictures[i] for i in indices],  # pyright: ignore[reportArgumentType]
            self.labels[list(indices)],
            tuple(self.records[i] for i in indices),
        )


def describe_data(splits: Mapping[str, Split]) -> str:
    """What splits hold, so that two hosts can see whether they read the same."""
    said = []
    for name, split in splits.items():
        listed = [(record.name, record.label) for record in split.records]
        digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        said.append(f"{name} of {len(listed)} pictures (names and labels {digest[:8]})")
    return ", ".join(said)


def check_count(config: Config, dataset: Dataset) -> None:
    """Checks that the training pictures fill a batch.

    Raises:
      ValueError: they do not.
    """
    count, batch_size = len(dataset.splits["train"]), config.train.batch_size
    if count < batch_size:
        raise ValueError(
            f"{count} training pictures do not fill one batch of {batch_size}: set "
            f"train.batch_size to {count} or less"
        )


def open_split(config: Config, dataset: Dataset, name: str) -> Split:
    """Opens a split, preparing its store where the config wants one."""
    data = config.data
    records = dataset.splits[name]
    if data.prepare:
        cache_dir = (
            Path(data.cache_dir).expanduser()
            if data.cache_dir
            else store.default_cache_dir(dataset.root)
        )
        pictures = store.prepare(
            records,
            short_side_px=data.short_side_px,
            cache_dir=cache_dir,
            name=f"{dataset.name}-{name}",
            skip_unreadable=data.skip_unreadable,
        )
    else:
        pictures = store.Streamed(records, data.short_side_px)
    labels = np.array([record.label for record in pictures.records], np.int32)
    return Split(pictures, labels, pictures.records)
