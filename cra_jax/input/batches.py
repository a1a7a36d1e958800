"""Pictures in, batches out, in an order that is a function of (seed, epoch, index).

"Pictures" is anything with a length whose `pictures[i]` is a uint8 `[h, w, 3]` array.
Where it also has `.shapes`, `[n, 2]` of (height, width), no picture is read for its
size alone. Nothing here depends on the number of workers, of batches computed ahead, or
of devices: a batch is computed from its number alone, so training can resume anywhere.

Where several hosts train together, each makes its own rows of every batch: a `shard`
`(i, n)` is the i-th of n equal runs of consecutive rows.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from cra_jax.runtime.prefetch import prefetch

Batch = dict[str, np.ndarray]


class Pictures(Protocol):
    """What the rooms here read from: `len(pictures)` and `pictures[i]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


class TrainBatches:
    """Shuffled, randomly cropped training batches, each a function of its step.

    Every epoch is a new uniformly random order of all pictures, cut into whole batches.
    The last `dropped_per_epoch` of the order are left out: other pictures each epoch.

    Attributes:
        steps_per_epoch: whole batches in an epoch.
        dropped_per_epoch: pictures that an epoch leaves out, fewer than a batch.
    """

    def __init__(
        self,
        pictures: Pictures,
        labels: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        crop_px: int,
        seed: int,
        flip: bool = True,
        shard: tuple[int, int] = (0, 1),
    ):
        """Checks what can be checked without reading a picture.

        Args:
            pictures: the split's pictures.
            labels: one class number a picture.
            batch_size: pictures in a batch, those of all hosts together.
            crop_px: side of the square that is cut out of each picture.
            seed: names the random order, crops and flips; 0 to 2^64 - 1.
            flip: whether half of the pictures are marked to be mirrored.
            shard: which rows of each batch are made here; all of them unless told.

        Raises:
            ValueError: fewer pictures than a batch, a picture smaller than the crop,
                labels that do not match the pictures, a seed out of range, or a batch
                that the hosts cannot share evenly.
        """
        self._pictures = pictures
        self._labels = _check(pictures, labels, batch_size)
        if len(pictures) < batch_size:
            raise ValueError(
                f"{len(pictures)} training pictures do not fill one batch of "
                f"{batch_size}: set train.batch_size to {len(pictures)} or less"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: set it between 0 and 2^64 - 1")
        _check_crop(pictures, crop_px)
        self._mine = _rows_of(shard, batch_size)
        self._batch_size = batch_size
        self._crop_px = crop_px
        self._seed = seed
        self._flip = flip
        self.steps_per_epoch, self.dropped_per_epoch = divmod(len(pictures), batch_size)

    def batch(self, step: int) -> Batch:
        """Computes the batch of one step; safe to call from several threads.

        The pictures are not mirrored here: the training step does that on the device.

        Args:
            step: number of the batch since the start of training, from 0.

        Returns:
            `image` uint8 `[b, crop, crop, 3]`, `flip` bool `[b]`, `label` int32 `[b]`,
            `index` int32 `[b]`, the picture's place in the split; `b` rows of the
            shard.

        Raises:
            ValueError: a picture is smaller than the crop, or the step is negative.
        """
        batch, draws = self._drawn(step)
        index = batch["index"]
        image = np.empty((len(index), self._crop_px, self._crop_px, 3), np.uint8)
        for row, i in enumerate(index.tolist()):
            picture = _picture(self._pictures, i)
            room = _room(picture.shape, self._crop_px, i)
            top, left = _corners(draws[row], np.array(room)).tolist()
            image[row] = _window(picture, top, left, self._crop_px)
        return {"image": image, **batch}

    def plan(self, step: int) -> Batch:
        """What `batch` would cut out, without the pixels.

        Where the pictures have no `.shapes`, the first call reads all of them once.

        Args:
            step: number of the batch since the start of training, from 0.

        Returns:
            `flip`, `label` and `index` as of `batch`, and `corner_px` int32 `[b, 2]`,
            (top, left) of each crop in its picture.

        Raises:
            ValueError: the step is negative.
        """
        batch, draws = self._drawn(step)
        room = self._sizes[batch["index"]] - self._crop_px
        return {"corner_px": _corners(draws, room), **batch}

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return _shapes(self._pictures)

    def _drawn(self, step: int) -> tuple[Batch, np.ndarray]:
        """What a batch has beside pixels, and the draws of its crops, `[b, 2]`."""
        if step < 0:
            raise ValueError(f"step is {step}: steps count from 0")
        epoch, place = divmod(step, self.steps_per_epoch)
        order, draws = _epoch_draws(self._seed, epoch, len(self._pictures))
        index = order[place * self._batch_size :][: self._batch_size][self._mine]
        flip = (draws[index, 2] >> np.uint64(63)).astype(bool) & self._flip
        batch = {"flip": flip, "label": self._labels[index], "index": index}
        return batch, draws[index, :2]


class Batches(Sequence[Batch]):
    """Evaluation batches: `len`, `[i]` and iteration, the same on every pass."""

    def __init__(self, make: Callable[[int], Batch], length: int):
        self._make = make
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number):
        return self._make(range(self._length)[operator.index(number)])


def center_batches(
    pictures: Pictures,
    labels: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    crop_px: int,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """Cuts the centre out of every picture, each exactly once, in the split's order.

    The crop starts at `(size - crop_px) // 2`: an odd remainder goes to the right and
    to the bottom. The last batch is filled up, so that all have one shape. With a
    `shard`, only its rows of each batch are made: every host makes as many batches.

    Returns:
        Batches of `image` uint8 `[b, crop, crop, 3]`, `label` int32 `[b]`, `index`
        int32 `[b]`, `valid` bool `[b]`. A row that fills up has `valid` False, a black
        image, label 0 and index -1.

    Raises:
        ValueError: no pictures, a picture smaller than the crop, labels that do not
            match the pictures, or a batch that the hosts cannot share evenly.
    """
    checked = _check(pictures, labels, batch_size)
    _check_crop(pictures, crop_px)

    def cut(i: int) -> np.ndarray:
        picture = _picture(pictures, i)
        top, left = (r // 2 for r in _room(picture.shape, crop_px, i))
        return _window(picture, top, left, crop_px)

    order = np.arange(len(pictures))
    plan = [
        ((crop_px, crop_px), order[start : start + batch_size])
        for start in range(0, len(order), batch_size)
    ]
    return _evaluation_batches(checked, plan, cut, _rows_of(shard, batch_size))


def full_batches(
    pictures: Pictures,
    labels: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    bucket_px: int,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """Whole pictures, each exactly once, in batches of one shape each.

    Pictures whose height and width round up to the same multiples of `bucket_px` go
    together, filled up with zeros at the right and at the bottom. With `bucket_px` 0
    only pictures of exactly one size go together, and no pixel is added. Groups come
    in the order of (height, width), and pictures within a group in the split's order.
    Where `pictures` has no `.shapes`, this call reads every picture once. With a
    `shard`, only its rows of each batch are made: every host makes as many batches.

    Returns:
        Batches of `image` uint8 `[b, H, W, 3]`, `extent_px` int32 `[b, 2]`, the true
        (height, width), `label` int32 `[b]`, `index` int32 `[b]`, `valid` bool `[b]`.
        A row that fills up has `valid` False, a black image, label 0, index -1, and the
        whole (H, W) as its extent, so that a mean over it divides by no zero.

    Raises:
        ValueError: no pictures, a negative `bucket_px`, labels that do not match, or a
            batch that the hosts cannot share evenly.
    """
    checked = _check(pictures, labels, batch_size)
    if bucket_px < 0:
        raise ValueError(
            f"bucket_px is {bucket_px}: set it to 0 for exact sizes, or above 0"
        )
    extents = _shapes(pictures)
    step = max(bucket_px, 1)
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (height, width) in enumerate((-(-extents // step) * step).tolist()):
        groups.setdefault((height, width), []).append(i)
    plan = [
        (shape, np.array(members[start : start + batch_size]))
        for shape, members in sorted(groups.items())
        for start in range(0, len(members), batch_size)
    ]
    mine = _rows_of(shard, batch_size)
    cut = functools.partial(_picture, pictures)
    return _evaluation_batches(checked, plan, cut, mine, extents)


def _evaluation_batches(
    labels: np.ndarray,
    plan: Sequence[tuple[tuple[int, int], np.ndarray]],
    cut: Callable[[int], np.ndarray],
    mine: slice,
    extents: np.ndarray | None = None,
) -> Batches:
    """Batches of images, each at the top left of its row.

    Args:
        labels: `[n]`, of all images.
        plan: of each batch, (height, width) and the places of its images in the split.
        cut: place -> the image's pixels, at most (height, width) of them.
        mine: the rows of a batch that are made here.
        extents: `[n, 2]`, true sizes, for batches with an `extent_px`.
    """
    share = mine.stop - mine.start

    def make(number: int) -> Batch:
        shape, members = plan[number][0], plan[number][1][mine]
        batch = _rows(members, labels, share)
        if extents is not None:
            batch["extent_px"] = np.tile(np.array(shape, np.int32), (share, 1))
            batch["extent_px"][: len(members)] = extents[members]
        batch["image"] = np.zeros((share, *shape, 3), np.uint8)
        for row, i in enumerate(members.tolist()):
            pixels = cut(i)
            batch["image"][row, : len(pixels), : pixels.shape[1]] = pixels
        return batch

    return Batches(make, len(plan))


@functools.lru_cache(maxsize=3)  # threads may be at work on both sides of an epoch
def _epoch_draws(seed: int, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """One epoch's order, int32 `[n]`, and draws, uint64 `[n, 3]`: top, left, flip.

    Only raw output is used: NumPy keeps the stream of its bit generators the same in
    all versions, which it does not promise of `Generator.permutation` and its kin.
    """
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    raw = philox.random_raw(4 * count).reshape(count, 4)
    # Sorting 64-bit keys is a uniform permutation but for ties, one in 2^64 pairs.
    order = np.argsort(raw[:, 3], kind="stable").astype(np.int32)
    draws = raw[:, :3].copy()
    order.flags.writeable = draws.flags.writeable = False  # shared by the cache
    return order, draws


def _corners(draws: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Corners of crops, int32, from draws and how far each can move; same shapes."""
    # The bias of `%` is below 2^-48 for any picture.
    return (draws % (room + 1).astype(np.uint64)).astype(np.int32)


def _rows_of(shard: tuple[int, int], batch_size: int) -> slice:
    """Which rows of a batch a host makes."""
    number, count = shard
    if not 0 <= number < count:
        raise ValueError(f"shard is {shard}: give (i, n), the i-th of n, from 0")
    if batch_size % count:
        raise ValueError(
            f"a batch of {batch_size} pictures cannot be shared evenly by {count} "
            f"hosts: set it to a multiple of {count}"
        )
    share = batch_size // count
    return slice(number * share, (number + 1) * share)


def _check(
    pictures: Pictures, labels: Sequence[int] | np.ndarray, batch_size: int
) -> np.ndarray:
    """Returns the labels as int32 `[n]`, or says what is wrong with the arguments."""
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}: set it to 1 or more")
    if not len(pictures):
        raise ValueError("the split has no pictures: check data.source and data.path")
    array = np.asarray(labels)
    if array.shape != (len(pictures),) or array.dtype.kind not in "iu":
        raise ValueError(
            f"labels are {array.dtype} {list(array.shape)} for {len(pictures)} "
            "pictures: give one whole number a picture"
        )
    return array.astype(np.int32)


def _check_crop(pictures: Pictures, crop_px: int) -> None:
    """Refuses a crop that some picture cannot hold, where sizes are known for free."""
    if crop_px < 1:
        raise ValueError(f"data.crop_px is {crop_px}: set it to 1 or more")
    shapes = getattr(pictures, "shapes", None)
    if shapes is not None:
        smallest = int(np.argmin(np.min(shapes, axis=1)))
        _room(tuple(shapes[smallest]), crop_px, smallest)


def _room(shape: tuple[int, ...], crop_px: int, index: int) -> tuple[int, int]:
    """How far the crop can move down and to the right within a picture, in pixels."""
    height, width = int(shape[0]), int(shape[1])
    if min(height, width) < crop_px:
        raise ValueError(
            f"picture {index} is {height} x {width} pixels (height x width), smaller "
            f"than data.crop_px = {crop_px}: set data.crop_px to {min(height, width)} "
            f"or less, or data.short_side_px to {crop_px} or more"
        )
    return height - crop_px, width - crop_px


def _picture(pictures: Pictures, index: int) -> np.ndarray:
    """Reads one picture; assigning any other kind to a batch would cast in silence."""
    picture = pictures[index]
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(
            f"picture {index} is {picture.dtype} {list(picture.shape)}: "
            "give uint8 [h, w, 3]"
        )
    return picture


def _window(picture: np.ndarray, top: int, left: int, side_px: int) -> np.ndarray:
    return picture[top : top + side_px, left : left + side_px]


def _rows(members: np.ndarray, labels: np.ndarray, batch_size: int) -> Batch:
    """The label, index and valid of an evaluation batch, filled up to its size."""
    label = np.zeros(batch_size, np.int32)
    index = np.full(batch_size, -1, np.int32)
    label[: len(members)] = labels[members]
    index[: len(members)] = members
    return {"label": label, "index": index, "valid": index >= 0}


def _shapes(pictures: Pictures) -> np.ndarray:
    """Sizes of all pictures, `[n, 2]`; reads them only where they are not known."""
    shapes = getattr(pictures, "shapes", None)
    if shapes is None:
        sizes = prefetch(lambda i: _picture(pictures, i).shape[:2], 0, len(pictures))
        shapes = list(sizes)
    return np.asarray(shapes, np.int32)
