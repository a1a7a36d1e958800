"""Makes batches of images, in an order that is a function of (seed, epoch, index).

Images are any object with a length whose `images[i]` is a uint8 `[h, w, 3]` array. If
it also has `.shapes`, `[n, 2]` of (height, width), no image is read only for its size.
A batch depends only on its number, not on the number of workers, prefetched batches or
devices, so training can resume at any step.

If several hosts train together, each makes its own rows of every batch: a `shard`
`(i, n)` is the i-th of n equal blocks of consecutive rows.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from cra_jax.runtime.prefetch import prefetch

Batch = dict[str, np.ndarray]


class Images(Protocol):
    """The interface of images: `len(images)` and `images[i]`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


class TrainBatches:
    """Shuffled, randomly cropped training batches, each a function of its step.

    Every epoch is a new uniformly random order of all images, divided into full
    batches. The last `dropped_per_epoch` images of the order are omitted.

    Attributes:
      steps_per_epoch: full batches in an epoch.
      dropped_per_epoch: images that an epoch omits, fewer than a batch.
    """

    def __init__(
        self,
        images: Images,
        labels: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        crop_px: int,
        seed: int,
        flip: bool = True,
        shard: tuple[int, int] = (0, 1),
    ):
        """Checks the arguments without reading an image.

        Args:
          images: the split's images.
          labels: one class number per image.
          batch_size: images in a batch, of all hosts together.
          crop_px: height and width of the crop.
          seed: of the random order, crops and flips; 0 to 2^64 - 1.
          flip: whether half of the images are marked for a horizontal flip.
          shard: which rows of each batch this host makes; by default all.

        Raises:
          ValueError: fewer images than a batch, an image smaller than the crop,
            labels that do not match the images, a seed out of range, or a batch
            that the hosts cannot share evenly.
        """
        self._images = images
        self._labels = _check(images, labels, batch_size)
        if len(images) < batch_size:
            raise ValueError(
                f"{len(images)} training images do not fill one batch of "
                f"{batch_size}: set train.batch_size to {len(images)} or less"
            )
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed is {seed}: set it between 0 and 2^64 - 1")
        _check_crop(images, crop_px)
        self._mine = _rows_of(shard, batch_size)
        self._batch_size = batch_size
        self._crop_px = crop_px
        self._seed = seed
        self._flip = flip
        self.steps_per_epoch, self.dropped_per_epoch = divmod(len(images), batch_size)

    def batch(self, step: int) -> Batch:
        """Computes the batch of one step; safe to call from several threads.

        The training step flips the images on the device, not this method.

        Args:
          step: number of the batch since the start of training, from 0.

        Returns:
          `image` uint8 `[b, crop, crop, 3]`, `flip` bool `[b]`, `label` int32 `[b]`,
          `index` int32 `[b]`, the image's position in the split; `b` rows
          of the shard.

        Raises:
          ValueError: an image is smaller than the crop, or the step is negative.
        """
        batch, draws = self._drawn(step)
        index = batch["index"]
        image = np.empty((len(index), self._crop_px, self._crop_px, 3), np.uint8)
        for row, i in enumerate(index.tolist()):
            pixels = _read_image(self._images, i)
            margin = _margin(pixels.shape, self._crop_px, i)
            top, left = _corners(draws[row], np.array(margin)).tolist()
            image[row] = _window(pixels, top, left, self._crop_px)
        return {"image": image, **batch}

    def plan(self, step: int) -> Batch:
        """The crops of `batch`, without the pixels.

        If the images have no `.shapes`, the first call reads all of them once.

        Args:
          step: number of the batch since the start of training, from 0.

        Returns:
          `flip`, `label` and `index` as in `batch`, and `corner_px` int32 `[b, 2]`,
          (top, left) of each crop in its image.

        Raises:
          ValueError: the step is negative.
        """
        batch, draws = self._drawn(step)
        margin = self._sizes[batch["index"]] - self._crop_px
        return {"corner_px": _corners(draws, margin), **batch}

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return _shapes(self._images)

    def _drawn(self, step: int) -> tuple[Batch, np.ndarray]:
        """The batch without pixels, and the random draws of its crops, `[b, 2]`."""
        if step < 0:
            raise ValueError(f"step is {step}: steps count from 0")
        epoch, place = divmod(step, self.steps_per_epoch)
        order, draws = _epoch_draws(self._seed, epoch, len(self._images))
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
    images: Images,
    labels: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    crop_px: int,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """Centre crops of all images, each exactly once, in the order of the split.

    The crop starts at `(size - crop_px) // 2`: an odd remainder goes to the right and
    to the bottom. The last batch is padded, so that all have the same shape. With a
    `shard`, only its rows of each batch are made: all hosts make as many batches.

    Returns:
      Batches of `image` uint8 `[b, crop, crop, 3]`, `label` int32 `[b]`, `index`
      int32 `[b]`, `valid` bool `[b]`. A padding row has `valid` False, a black image,
      label 0 and index -1.

    Raises:
      ValueError: no images, an image smaller than the crop, labels that do not
        match the images, or a batch that the hosts cannot share evenly.
    """
    checked = _check(images, labels, batch_size)
    _check_crop(images, crop_px)

    def cut(i: int) -> np.ndarray:
        image = _read_image(images, i)
        top, left = (r // 2 for r in _margin(image.shape, crop_px, i))
        return _window(image, top, left, crop_px)

    order = np.arange(len(images))
    plan = [
        ((crop_px, crop_px), order[start : start + batch_size])
        for start in range(0, len(order), batch_size)
    ]
    return _evaluation_batches(checked, plan, cut, _rows_of(shard, batch_size))


def full_batches(
    images: Images,
    labels: Sequence[int] | np.ndarray,
    *,
    batch_size: int,
    bucket_px: int,
    shard: tuple[int, int] = (0, 1),
) -> Batches:
    """Full images, each exactly once, in batches of one shape each.

    Images whose height and width round up to the same multiples of `bucket_px` form a
    group, padded with zeros at the right and at the bottom. With `bucket_px` 0, a group
    has images of exactly one size, and no padding. Groups are in the order of (height,
    width), images within a group in the order of the split. If `images` has no
    `.shapes`, this call reads every image once. With a `shard`, only its rows of each
    batch are made: all hosts make as many batches.

    Returns:
      Batches of `image` uint8 `[b, H, W, 3]`, `extent_px` int32 `[b, 2]`, the true
      (height, width), `label` int32 `[b]`, `index` int32 `[b]`, `valid` bool `[b]`.
      A padding row has `valid` False, a black image, label 0, index -1, and (H, W) as
      its extent, so that a mean over it does not divide by zero.

    Raises:
      ValueError: no images, a negative `bucket_px`, labels that do not match, or a
        batch that the hosts cannot share evenly.
    """
    checked = _check(images, labels, batch_size)
    if bucket_px < 0:
        raise ValueError(
            f"bucket_px is {bucket_px}: set it to 0 (exact sizes) or to 1 or more"
        )
    extents = _shapes(images)
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
    cut = functools.partial(_read_image, images)
    return _evaluation_batches(checked, plan, cut, mine, extents)


def _evaluation_batches(
    labels: np.ndarray,
    plan: Sequence[tuple[tuple[int, int], np.ndarray]],
    cut: Callable[[int], np.ndarray],
    mine: slice,
    extents: np.ndarray | None = None,
) -> Batches:
    """Batches of images, each at the top left of its array.

    Args:
      labels: `[n]`, of all images.
      plan: of each batch, (height, width) and the positions of its images in the split.
      cut: position -> the image's pixels, at most (height, width) of them.
      mine: the rows of a batch that this host makes.
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


@functools.lru_cache(maxsize=3)  # threads may work on two epochs at once
def _epoch_draws(seed: int, epoch: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """One epoch's order, int32 `[n]`, and draws, uint64 `[n, 3]`: top, left, flip.

    Only raw output is used: NumPy keeps the stream of its bit generators the same in
    all versions, but not the results of `Generator.permutation` and similar methods.
    """
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64))
    raw = philox.random_raw(4 * count).reshape(count, 4)
    # Sorting 64-bit keys is a uniform permutation except for ties, one in 2^64 pairs.
    order = np.argsort(raw[:, 3], kind="stable").astype(np.int32)
    draws = raw[:, :3].copy()
    order.flags.writeable = draws.flags.writeable = False  # shared by the cache
    return order, draws


def _corners(draws: np.ndarray, margin: np.ndarray) -> np.ndarray:
    """Corners of crops, int32, from draws and margins, all of one shape."""
    # The bias of `%` is below 2^-48 for any image.
    return (draws % (margin + 1).astype(np.uint64)).astype(np.int32)


def _rows_of(shard: tuple[int, int], batch_size: int) -> slice:
    """The rows of a batch that a host makes."""
    number, count = shard
    if not 0 <= number < count:
        raise ValueError(f"shard is {shard}: give (i, n), the i-th of n, from 0")
    if batch_size % count:
        raise ValueError(
            f"a batch of {batch_size} images cannot be shared evenly by {count} "
            f"hosts: set it to a multiple of {count}"
        )
    share = batch_size // count
    return slice(number * share, (number + 1) * share)


def _check(
    images: Images, labels: Sequence[int] | np.ndarray, batch_size: int
) -> np.ndarray:
    """Checks the arguments, and returns the labels as int32 `[n]`."""
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}: set it to 1 or more")
    if not len(images):
        raise ValueError("the split has no images: check data.source and data.path")
    array = np.asarray(labels)
    if array.shape != (len(images),) or array.dtype.kind not in "iu":
        raise ValueError(
            f"labels are {array.dtype} {list(array.shape)} for {len(images)} "
            "images: give one integer per image"
        )
    return array.astype(np.int32)


def _check_crop(images: Images, crop_px: int) -> None:
    """Checks that the crop fits into all images, if their sizes are known."""
    if crop_px < 1:
        raise ValueError(f"data.crop_px is {crop_px}: set it to 1 or more")
    shapes = getattr(images, "shapes", None)
    if shapes is not None:
        smallest = int(np.argmin(np.min(shapes, axis=1)))
        _margin(tuple(shapes[smallest]), crop_px, smallest)


def _margin(shape: tuple[int, ...], crop_px: int, index: int) -> tuple[int, int]:
    """Number of pixels that the crop can move down and to the right in an image."""
    height, width = int(shape[0]), int(shape[1])
    if min(height, width) < crop_px:
        raise ValueError(
            f"image {index} is {height} x {width} pixels (height x width), smaller "
            f"than data.crop_px = {crop_px}: set data.crop_px to {min(height, width)} "
            f"or less, or data.short_side_px to {crop_px} or more"
        )
    return height - crop_px, width - crop_px


def _read_image(images: Images, index: int) -> np.ndarray:
    """Reads one image; checks its type, which a batch would silently convert."""
    image = images[index]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"image {index} is {image.dtype} {list(image.shape)}: give uint8 [h, w, 3]"
        )
    return image


def _window(image: np.ndarray, top: int, left: int, side_px: int) -> np.ndarray:
    return image[top : top + side_px, left : left + side_px]


def _rows(members: np.ndarray, labels: np.ndarray, batch_size: int) -> Batch:
    """The label, index and valid of an evaluation batch, filled up to its size."""
    label = np.zeros(batch_size, np.int32)
    index = np.full(batch_size, -1, np.int32)
    label[: len(members)] = labels[members]
    index[: len(members)] = members
    return {"label": label, "index": index, "valid": index >= 0}


def _shapes(images: Images) -> np.ndarray:
    """Sizes of all images, `[n, 2]`; reads images only if sizes are not known."""
    shapes = getattr(images, "shapes", None)
    if shapes is None:
        sizes = prefetch(lambda i: _read_image(images, i).shape[:2], 0, len(images))
        shapes = list(sizes)
    return np.asarray(shapes, np.int32)
