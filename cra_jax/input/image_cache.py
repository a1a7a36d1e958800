"""The image cache: images decoded and resized once, then mapped from one file.

A cache is two files in the cache directory: `<name>-<key>.pixels`, the images' bytes
one after another, and `<name>-<key>.json`, the index, with their shapes and checksums.
The key covers the records' names and stamps, so a changed option or image makes another
cache. The index is renamed into place last: if it is undamaged and the pixels have the
size that it gives, the cache is complete. A process verifies the
checksum of an image when it first reads it, which takes a third of a millisecond;
opening a cache verifies no image.

A stamp can be that of another file: of the same size and time, in another dataset that
shares the directory, or in the place of the first. So the index also has the files'
versions and a digest of each file. If versions differ, as after a copy of the dataset,
the digests decide whether the cache is that of these files.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cra_jax.input import decoding
from cra_jax.input.records import Record
from cra_jax.runtime import files
from cra_jax.runtime.prefetch import prefetch
from cra_jax.runtime.progress import Progress, print_line

FORMAT = 3
"""Part of every key: increase it if the files, the decoder or the resize change."""

_NAMED = 10  # how many unreadable or damaged images messages list
_SAMPLE = 16  # how many images the size of a cache is estimated from

Log = Callable[[str], None]

_REMARKS = {
    "long": f"longer than {decoding.MAX_ASPECT:g} to 1: their ends are cropped",
    "dark": f"dark: no value is above {decoding.DARK} of 255; if 12 bits are stored in "
    "16, scale the values to 65535",
}
"""What users should know of images that can be read."""


class ImageCache:
    """Images mapped from disk: `len`, `[i] -> uint8 [h, w, 3]`, a read-only view.

    An image whose checksum differs is reported and read again from its record; the next
    start then makes the cache again.

    Attributes:
      records: of the cached images: `cache[i]` is the image of `records[i]`.
      skipped: name -> reason, of the records that were omitted as unreadable.
      shapes: int64 `[n, 2]`, height and width of every image.
      path: the file of the pixels.
      remarks: kind of remark -> number of images, and the name of one.
    """

    def __init__(
        self,
        path: Path,
        records: Sequence[Record],
        skipped: dict[str, str],
        shapes: np.ndarray,
        checksums: Sequence[int],
        short_side_px: int,
        remarks: Mapping[str, tuple[int, str]],
    ):
        self.path = path
        self.remarks = remarks
        self.records = tuple(records)
        self.skipped = skipped
        self.shapes = shapes
        self._checksums = checksums
        self._short_side_px = short_side_px
        self._verified = bytearray(len(self.records))  # 1 if verified
        self._damaged: set[str] = set()
        self._ends = np.cumsum(3 * shapes.prod(axis=1)).tolist()
        # A plain view: slices of a memmap are slow to make.
        self._pixels = np.asarray(np.memmap(path, np.uint8, mode="r"))

    def __len__(self) -> int:
        return len(self.records)

    def fingerprints(self) -> list[tuple[int, ...]]:
        """Height, width and checksum of every image: the same for equal pixels."""
        shapes = self.shapes.tolist()
        return [(*s, c) for s, c in zip(shapes, self._checksums, strict=True)]

    def __getitem__(self, index: int) -> np.ndarray:
        height, width = self.shapes[index].tolist()
        end = self._ends[index]
        image = self._pixels[end - 3 * height * width : end].reshape(height, width, 3)
        if not self._verified[index]:
            if zlib.crc32(image.data) != self._checksums[index]:
                return self._read_again(index)
            self._verified[index] = 1
        return image

    def _read_again(self, index: int) -> np.ndarray:
        """An image from its record; removes the index to replace the cache."""
        record = self.records[index]
        what = f"{record.name} in {self.path} is damaged"
        image = _read(record, self._short_side_px)
        if isinstance(image, str):
            raise ValueError(f"{what}, and its original cannot be read: {image}")
        image = np.ascontiguousarray(image)
        if zlib.crc32(image.data) != self._checksums[index]:
            raise ValueError(
                f"{what}, and its original has changed: remove {self.path} and run "
                "the same command again"
            )
        try:
            self.path.with_suffix(".json").unlink(missing_ok=True)
            then = "the next start makes the image cache again"
        except OSError as error:
            then = f"its index could not be removed ({error}): remove that file"
        if record.name not in self._damaged and len(self._damaged) < _NAMED:
            print_line(f"warning: {what}: it was read from its original, and {then}")
        self._damaged.add(record.name)
        return image


class StreamedImages:
    """Images decoded at every access, for datasets that are too large for a cache.

    It has no `.shapes`, since sizes are not known before decoding. Access to an
    unreadable image raises a `ValueError`.

    Attributes:
      records: `streamed[i]` is the image of `records[i]`.
      skipped: empty; for the same interface as `ImageCache`.
    """

    def __init__(self, records: Sequence[Record], short_side_px: int):
        self.records = tuple(records)
        self.skipped: dict[str, str] = {}
        self._short_side_px = _check_side(short_side_px)
        self._remarked: set[str] = set()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.ndarray:
        image = _read(self.records[index], self._short_side_px)
        if isinstance(image, str):
            raise ValueError(f"unreadable image: {image}")
        record = self.records[index]
        for kind in set(_remarks(record, image)) - self._remarked:
            self._remarked.add(kind)
            print_line(f"note: some images are {_REMARKS[kind]}; first {record.name}")
        return image


def default_cache_dir(root: Path | None) -> Path:
    """The directory of image caches: in the dataset, or among the user's caches.

    Returns:
      `<root>/.cra_jax_cache` if the dataset directory `root` is writable, else
      `cra_jax` under `$XDG_CACHE_HOME` or `~/.cache`. Nothing is created.
    """
    if root is not None and root.is_dir():
        # The superuser may write anywhere; this respects read-only directories.
        marked = root.stat().st_mode & 0o222
        if marked and os.access(root, os.W_OK | os.X_OK):
            return root / ".cra_jax_cache"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore relative paths.
    return (base if base.is_absolute() else Path.home() / ".cache") / "cra_jax"


def prepare(
    records: Sequence[Record],
    *,
    short_side_px: int,
    cache_dir: Path,
    name: str,
    workers: int | None = None,
    progress: bool = True,
    skip_unreadable: bool = False,
) -> ImageCache:
    """Opens the image cache of these records; makes it first if there is none.

    It is safe to kill at any time (the next call starts again), and to call from
    several processes: one makes the cache, the others wait. Images are decoded in
    threads, since Pillow releases the GIL; for drawn images this gains little.

    Args:
      records: the images of one split, in order.
      short_side_px: length of the shorter side after the resize.
      cache_dir: directory of the caches, created if missing.
      name: start of the file names, such as `cub_train`.
      workers: number of threads; None for one per core.
      progress: report on standard error: a bar on a terminal, else lines.
      skip_unreadable: omit unreadable images, and list them in `skipped`.

    Raises:
      ValueError: no records, an invalid file name, unreadable images (all in one
        message), a directory that is not writable, or a full disk.
    """
    if not records:
        raise ValueError(f"there are no images to cache for {name!r}")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"cache name {name!r}: use only letters, digits and . _ -")
    log = print_line if progress else _mute
    key = _key(records, _check_side(short_side_px))
    stem = Path(cache_dir) / f"{name}-{key[:16]}"

    def find(log: Log) -> ImageCache | None:
        cache = _open(stem, key, records, short_side_px, log)
        # A cache without some images is not enough without `skip_unreadable`: they may
        # be readable now.
        return cache if cache and (skip_unreadable or not cache.skipped) else None

    try:
        cache = find(log)
        if cache is None:
            stem.parent.mkdir(parents=True, exist_ok=True)
            with files.locked(Path(f"{stem}.lock"), stem.name, show=progress):
                cache = find(_mute)  # if the process that held the lock made it
                if cache is None:
                    read = functools.partial(_reading, short_side_px, workers)
                    sample = _sample(records, read)
                    _check_disk(stem, sample.values(), len(records), log)
                    bar = Progress(len(records), name, unit="images", show=progress)
                    with bar, read(records, sample) as images:
                        _build(stem, key, records, images, bar, skip_unreadable)
                    cache = find(_mute)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space" if full else "make it writable"
        raise ValueError(
            f"cannot cache images in {stem.parent} ({error}): {fix}, or choose "
            "another cache directory"
        ) from error
    assert cache is not None, f"{stem} changed while it was made"
    if cache.skipped:
        log(f"{name}: {_unreadable(cache.skipped, len(records))}; they are omitted")
    for kind, (count, first) in cache.remarks.items():
        log(
            f"{name}: {count} of {len(records)} images are {_REMARKS[kind]}; such as "
            f"{first}"
        )
    return cache


def find(
    records: Sequence[Record], *, short_side_px: int, cache_dir: Path, name: str
) -> ImageCache | None:
    """Opens the image cache of these records if it exists; see `prepare`."""
    key = _key(records, _check_side(short_side_px))
    stem = Path(cache_dir) / f"{name}-{key[:16]}"
    return _open(stem, key, records, short_side_px, _mute)


def _key(records: Sequence[Record], short_side_px: int) -> str:
    """Hex digest of everything that the pixels depend on."""
    stamps = [[record.name, record.stamp] for record in records]
    return _digest([FORMAT, short_side_px, stamps])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _open(
    stem: Path, key: str, records: Sequence[Record], short_side_px: int, log: Log
) -> ImageCache | None:
    """Maps an existing, complete cache; needs no write permission."""
    pixels = Path(f"{stem}.pixels")
    try:
        text = Path(f"{stem}.json").read_bytes()
    except FileNotFoundError:
        return None
    try:
        index = json.loads(text)
        checksum = index.pop("checksum")
        shapes = np.array(index["shapes"], np.int64)
        whole = checksum == _digest(index) and index["key"] == key
        whole = whole and pixels.stat().st_size == 3 * shapes.prod(axis=1).sum()
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        whole = False
    if not whole:
        log(f"{pixels} or its index is damaged or truncated: it is made again")
        return None
    if index["versions"] != _versions(records):
        changed = _changed(records, index["digests"])
        if changed:
            log(
                f"{pixels}: {len(changed)} of {len(records)} images are others now, "
                f"such as {changed[0]}: it is made again"
            )
            return None
        with contextlib.suppress(OSError):  # then contents are compared each time
            _write_index(stem, index | {"versions": _versions(records)})
    kept = [record for record in records if record.name not in index["skipped"]]
    return ImageCache(
        pixels,
        kept,
        index["skipped"],
        shapes,
        index["crc32"],
        short_side_px,
        index["remarks"],
    )


def _versions(records: Sequence[Record]) -> str:
    return _digest([record.version for record in records])


def _changed(records: Sequence[Record], digests: Sequence[str]) -> list[str]:
    """Names of the records whose files have other contents."""
    workers = os.cpu_count() or 1
    found = prefetch(
        lambda i: records[i].digest,
        0,
        len(records),
        workers=workers,
        depth=4 * workers,
    )
    with contextlib.closing(found):
        pairs = zip(records, found, digests, strict=True)
        return [record.name for record, new, old in pairs if new != old]


def _build(
    stem: Path,
    key: str,
    records: Sequence[Record],
    read: Iterable[tuple[str, np.ndarray | str]],
    bar: Progress,
    skip_unreadable: bool,
) -> None:
    """Writes both files under temporary names; renames them once they are on disk."""
    shapes: list[tuple[int, ...]] = []
    checksums: list[int] = []
    skipped: dict[str, str] = {}
    digests: list[str] = []
    remarks: dict[str, tuple[int, str]] = {}
    with files.written_atomically(Path(f"{stem}.pixels"), fsync=True) as file:
        for record, (digest, image) in zip(records, read, strict=True):
            digests.append(digest)
            if isinstance(image, str):
                skipped[record.name] = image
            else:
                shapes.append(image.shape[:2])
                content = np.ascontiguousarray(image).data
                checksums.append(zlib.crc32(content))
                file.write(content)
                for kind in _remarks(record, image):
                    count, first = remarks.get(kind, (0, record.name))
                    remarks[kind] = count + 1, first
            bar.advance()
        if skipped and not (skip_unreadable and shapes):
            raise ValueError(
                f"{_unreadable(skipped, len(records))}\nFix or remove them"
                + (", or set data.skip_unreadable=True" if shapes else "")
            )
    index = {"key": key, "shapes": shapes, "crc32": checksums, "skipped": skipped}
    index |= {"digests": digests, "versions": _versions(records), "remarks": remarks}
    _write_index(stem, index)


def _write_index(stem: Path, index: dict[str, Any]) -> None:
    with files.written_atomically(Path(f"{stem}.json"), fsync=True) as file:
        file.write(json.dumps(index | {"checksum": _digest(index)}).encode())


def _remarks(record: Record, image: np.ndarray) -> list[str]:
    """The keys of `_REMARKS` that are true of an image."""
    short, long = sorted(image.shape[:2])
    found = []
    if long >= int(decoding.MAX_ASPECT * short) and record.content:
        header = decoding.read_header(record.content(), name=record.name)
        short, long = sorted(header[:2])
        found += ["long"] * (long > decoding.MAX_ASPECT * short)
    return found + ["dark"] * bool(image.max() <= decoding.DARK)


def _check_disk(
    stem: Path,
    sample: Iterable[tuple[str, np.ndarray | str]],
    count: int,
    log: Log,
) -> None:
    """Logs the estimated size of the cache; raises an error if the disk lacks space."""
    partial = files.partial_path(Path(f"{stem}.pixels"))
    partial.unlink(missing_ok=True)  # from a killed process
    sizes = [image.nbytes for _, image in sample if not isinstance(image, str)]
    need = sum(sizes) / max(len(sizes), 1) * count
    free = shutil.disk_usage(stem.parent).free
    figures = f"about {need / 1e9:.2f} GB of {free / 1e9:.2f} GB free in {stem.parent}"
    if need > free:
        raise ValueError(
            f"caching {count:,} images takes {figures}: free some space, "
            "choose another cache directory, or set data.prepare=False"
        )
    log(f"{stem.name}: caching {count:,} images, {figures}")
    name = stem.name.rpartition("-")[0]
    others = set(stem.parent.glob(f"{name}-*.pixels")) - {Path(f"{stem}.pixels")}
    if others:
        taken = sum(path.stat().st_size for path in others) / 1e9
        log(
            f"{stem.name}: {len(others)} older caches of other options or images "
            f"take {taken:.2f} GB there; remove those that you no longer need"
        )


def _sample(
    records: Sequence[Record], read: Callable
) -> dict[int, tuple[str, np.ndarray | str]]:
    """A few images and digests by their positions, to estimate the size of all."""
    positions = range(0, len(records), -(-len(records) // _SAMPLE))
    with read([records[i] for i in positions], {}) as images:
        return dict(zip(positions, images, strict=True))


def _reading(
    short_side_px: int,
    workers: int | None,
    records: Sequence[Record],
    known: Mapping[int, tuple[str, np.ndarray | str]],
) -> contextlib.closing[Generator[tuple[str, np.ndarray | str], None, None]]:
    """The digest of every file in order, and the image or why it cannot be read.

    Threads end with the block.

    Images in `known`, by position, are not read again.
    """
    workers = os.cpu_count() or 1 if workers is None else workers

    def read_both(i: int) -> tuple[str, np.ndarray | str]:
        # The digest first: a file that changes in between is found out later.
        return records[i].digest, _read(records[i], short_side_px)

    read = prefetch(
        lambda i: known[i] if i in known else read_both(i),
        0,
        len(records),
        workers=workers,
        depth=4 * workers,
    )
    return contextlib.closing(read)


def _read(record: Record, short_side_px: int) -> np.ndarray | str:
    """The image, or why it cannot be read."""
    try:
        image = record.read(short_side_px)
    except (ValueError, OSError) as error:
        reason = str(error) or type(error).__name__
        return reason if record.name in reason else f"{record.name}: {reason}"
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise TypeError(
            f"{record.name} was read as {image.dtype} {list(image.shape)}: "
            "Record.read must return uint8 [h, w, 3]"
        )
    return image


def _unreadable(skipped: dict[str, str], count: int) -> str:
    """One message for all unreadable images; lists the first few."""
    lines = [f"{len(skipped)} of {count} images cannot be read:"]
    lines += [f"  {reason}" for reason in list(skipped.values())[:_NAMED]]
    lines += [f"  and {len(skipped) - _NAMED} more"] * (len(skipped) > _NAMED)
    return "\n".join(lines)


def _mute(text: str) -> None:
    """Prints nothing: used if no progress is to be reported."""


def _check_side(short_side_px: int) -> int:
    if short_side_px < 1:
        raise ValueError(f"data.short_side_px is {short_side_px}: set it to 1 or more")
    return short_side_px
