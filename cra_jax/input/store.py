"""Records -> pictures, decoded and resized once, then mapped from one file.

A store is two files under the cache folder: `<name>-<key>.pixels`, the pictures' bytes
one after another, and `<name>-<key>.json`, their shapes and checksums. The key covers
the records' names and stamps, so a changed picture or setting makes another store. The
index is renamed into place last: where it is sound and the pixels have its size, all is
there. Whether a picture is still what was stored is looked at when a process first asks
for it: that costs a third of a millisecond once, and opening a store nothing.
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

import numpy as np

from cra_jax.input.records import Record
from cra_jax.runtime import files
from cra_jax.runtime.prefetch import prefetch
from cra_jax.runtime.progress import Progress, say

FORMAT = 2
"""Part of every key: raise it when the files change, or the decoder, or the resize."""

_NAMED = 10  # how many unreadable or damaged pictures are named
_SAMPLE = 16  # how many pictures the size of a store is estimated from

Say = Callable[[str], None]


class Store:
    """Pictures mapped from disk: `len`, `[i] -> uint8 [h, w, 3]`, a read-only view.

    A picture that the disk has changed is said, and read anew from its record; the
    next start then makes the store again.

    Attributes:
        records: what is stored: `store[i]` is the picture of `records[i]`.
        skipped: name -> reason, of the records that were left out as unreadable.
        shapes: int64 `[n, 2]`, height and width of every picture.
        path: the file of the pixels.
    """

    def __init__(
        self,
        path: Path,
        records: Sequence[Record],
        skipped: dict[str, str],
        shapes: np.ndarray,
        checksums: Sequence[int],
        short_side_px: int,
    ):
        self.path = path
        self.records = tuple(records)
        self.skipped = skipped
        self.shapes = shapes
        self._checksums = checksums
        self._short_side_px = short_side_px
        self._sound = bytearray(len(self.records))  # 1 where it was looked at
        self._damaged: set[str] = set()
        self._ends = np.cumsum(3 * shapes.prod(axis=1)).tolist()
        # A plain view: slices of a memmap are slow to make.
        self._pixels = np.asarray(np.memmap(path, np.uint8, mode="r"))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.ndarray:
        height, width = self.shapes[index].tolist()
        end = self._ends[index]
        picture = self._pixels[end - 3 * height * width : end].reshape(height, width, 3)
        if not self._sound[index]:
            if zlib.crc32(picture.data) != self._checksums[index]:
                return self._read_anew(index)
            self._sound[index] = 1
        return picture

    def _read_anew(self, index: int) -> np.ndarray:
        """The picture that was stored, from its record; the store is given up."""
        record = self.records[index]
        what = f"{record.name} in {self.path} is not what was stored there"
        picture = _read(record, self._short_side_px)
        if isinstance(picture, str):
            raise ValueError(f"{what}, and cannot be read anew: {picture}")
        picture = np.ascontiguousarray(picture)
        if zlib.crc32(picture.data) != self._checksums[index]:
            raise ValueError(
                f"{what}, and its original has changed too: remove {self.path}, and "
                "the same command makes it again"
            )
        try:
            self.path.with_suffix(".json").unlink(missing_ok=True)
            then = "the next start makes the store again"
        except OSError as error:
            then = f"remove that file, which cannot be done from here ({error})"
        if record.name not in self._damaged and len(self._damaged) < _NAMED:
            say(f"warning: {what}: it is read from its original, and {then}")
        self._damaged.add(record.name)
        return picture


class Streamed:
    """The same without the disk, for sets that are too large: decodes at every access.

    It has no `.shapes`, since no size is known before the picture is decoded. An
    unreadable picture is a `ValueError` where it is met.

    Attributes:
        records: `streamed[i]` is the picture of `records[i]`.
        skipped: empty; there so that either kind is reported alike.
    """

    def __init__(self, records: Sequence[Record], short_side_px: int):
        self.records = tuple(records)
        self.skipped: dict[str, str] = {}
        self._short_side_px = _check_side(short_side_px)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> np.ndarray:
        picture = _read(self.records[index], self._short_side_px)
        if isinstance(picture, str):
            raise ValueError(f"unreadable picture: {picture}")
        return picture


def default_cache_dir(root: Path | None) -> Path:
    """Where stores go: inside the data folder, or with the user's other caches.

    Returns:
        `<root>/.cra_jax_cache` where the data folder `root` can be written to, else
        `cra_jax` under `$XDG_CACHE_HOME` or `~/.cache`. Nothing is created.
    """
    if root is not None and root.is_dir():
        # The superuser may write anywhere, and still heeds a folder marked read-only.
        marked = root.stat().st_mode & 0o222
        if marked and os.access(root, os.W_OK | os.X_OK):
            return root / ".cra_jax_cache"
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
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
) -> Store:
    """Opens the store of these records, and makes it first where it is not there.

    Safe to kill at any time (the next call starts over), and to call from several
    processes: one makes the store, the others wait for it. Pictures are decoded in
    threads, since Pillow releases the interpreter; drawn pictures gain little by it.

    Args:
        records: the pictures of one split, in order.
        short_side_px: length of the shorter side after the resize.
        cache_dir: folder of the stores, made where it is missing.
        name: start of the file names, such as `cub_train`.
        workers: threads; None for one per core.
        progress: report on stderr, by a bar or, where it is no terminal, by lines.
        skip_unreadable: leave unreadable pictures out, and name them in `skipped`.

    Raises:
        ValueError: no records, a name that is no file name, unreadable pictures (all of
            them in one message), a folder that cannot be written, or a full disk.
    """
    if not records:
        raise ValueError(f"there are no pictures to store for {name!r}")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"store name {name!r}: use letters, digits and . _ - alone")
    tell = say if progress else _mute
    key = _key(records, _check_side(short_side_px))
    stem = Path(cache_dir) / f"{name}-{key[:16]}"

    def find(tell: Say) -> Store | None:
        store = _open(stem, key, records, short_side_px, tell)
        # A store with gaps does not serve who wants all: perhaps they can be read now.
        return store if store and (skip_unreadable or not store.skipped) else None

    try:
        store = find(tell)
        if store is None:
            stem.parent.mkdir(parents=True, exist_ok=True)
            with files.locked(Path(f"{stem}.lock"), stem.name, show=progress):
                store = find(_mute)  # made by the process that we waited for
                if store is None:
                    read = functools.partial(_reading, short_side_px, workers)
                    sample = _sample(records, read)
                    _check_disk(stem, sample.values(), len(records), tell)
                    bar = Progress(len(records), name, unit="pictures", show=progress)
                    with bar, read(records, sample) as pictures:
                        _build(stem, key, records, pictures, bar, skip_unreadable)
                    store = find(_mute)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "free some space" if full else "make it a folder you can write to"
        raise ValueError(
            f"cannot store pictures in {stem.parent} ({error}): {cure}, or choose "
            "another cache folder"
        ) from error
    assert store is not None, f"{stem} changed while it was made"
    if store.skipped:
        tell(f"{name}: {_unreadable(store.skipped, len(records))}; left out")
    return store


def _key(records: Sequence[Record], short_side_px: int) -> str:
    """Hex digest of all that the pixels depend on."""
    stamps = [[record.name, record.stamp] for record in records]
    return _digest([FORMAT, short_side_px, stamps])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _open(
    stem: Path, key: str, records: Sequence[Record], short_side_px: int, tell: Say
) -> Store | None:
    """Maps a store that is there and whole; needs no right to write."""
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
        tell(f"{pixels} or its index is damaged or cut short: it is made again")
        return None
    kept = [record for record in records if record.name not in index["skipped"]]
    return Store(pixels, kept, index["skipped"], shapes, index["crc32"], short_side_px)


def _build(
    stem: Path,
    key: str,
    records: Sequence[Record],
    read: Iterable[np.ndarray | str],
    bar: Progress,
    skip_unreadable: bool,
) -> None:
    """Writes both files under other names, and renames them when they are on disk."""
    shapes: list[tuple[int, ...]] = []
    checksums: list[int] = []
    skipped: dict[str, str] = {}
    with files.written_atomically(Path(f"{stem}.pixels"), fsync=True) as file:
        for record, picture in zip(records, read, strict=True):
            if isinstance(picture, str):
                skipped[record.name] = picture
            else:
                shapes.append(picture.shape[:2])
                content = np.ascontiguousarray(picture).data
                checksums.append(zlib.crc32(content))
                file.write(content)
            bar.advance()
        if skipped and not (skip_unreadable and shapes):
            raise ValueError(
                f"{_unreadable(skipped, len(records))}\nMend or remove them"
                + (", or set data.skip_unreadable=True" if shapes else "")
            )
    index = {"key": key, "shapes": shapes, "crc32": checksums, "skipped": skipped}
    with files.written_atomically(Path(f"{stem}.json"), fsync=True) as file:
        file.write(json.dumps(index | {"checksum": _digest(index)}).encode())


def _check_disk(
    stem: Path, sample: Iterable[np.ndarray | str], count: int, tell: Say
) -> None:
    """Says how much disk the store will take, judged by a few; refuses if it lacks."""
    partial = files.partial_path(Path(f"{stem}.pixels"))
    partial.unlink(missing_ok=True)  # a killed process leaves one
    sizes = [picture.nbytes for picture in sample if not isinstance(picture, str)]
    need = sum(sizes) / max(len(sizes), 1) * count
    free = shutil.disk_usage(stem.parent).free
    figures = f"about {need / 1e9:.2f} GB of {free / 1e9:.2f} GB free in {stem.parent}"
    if need > free:
        raise ValueError(
            f"storing {count:,} pictures takes {figures}: free some space, "
            "choose another cache folder, or stream the pictures instead"
        )
    tell(f"{stem.name}: storing {count:,} pictures, {figures}")
    name = stem.name.rpartition("-")[0]
    others = set(stem.parent.glob(f"{name}-*.pixels")) - {Path(f"{stem}.pixels")}
    if others:
        taken = sum(path.stat().st_size for path in others) / 1e9
        tell(
            f"{stem.name}: {len(others)} older stores of other settings or pictures "
            f"take {taken:.2f} GB there; remove those that you no longer need"
        )


def _sample(records: Sequence[Record], read: Callable) -> dict[int, np.ndarray | str]:
    """A few pictures by their places, to judge the size of all by."""
    places = range(0, len(records), -(-len(records) // _SAMPLE))
    with read([records[i] for i in places], {}) as pictures:
        return dict(zip(places, pictures, strict=True))


def _reading(
    short_side_px: int,
    workers: int | None,
    records: Sequence[Record],
    known: Mapping[int, np.ndarray | str],
) -> contextlib.closing[Generator[np.ndarray | str, None, None]]:
    """Every picture in order, or why it cannot be read; threads end with the block.

    What is `known` by its place is not read again.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    read = prefetch(
        lambda i: known[i] if i in known else _read(records[i], short_side_px),
        0,
        len(records),
        workers=workers,
        depth=4 * workers,
    )
    return contextlib.closing(read)


def _read(record: Record, short_side_px: int) -> np.ndarray | str:
    """The picture, or why it cannot be read."""
    try:
        picture = record.read(short_side_px)
    except (ValueError, OSError) as error:
        reason = str(error) or type(error).__name__
        return reason if record.name in reason else f"{record.name}: {reason}"
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise TypeError(
            f"{record.name} was read as {picture.dtype} {list(picture.shape)}: "
            "Record.read must return uint8 [h, w, 3]"
        )
    return picture


def _unreadable(skipped: dict[str, str], count: int) -> str:
    """One message for all pictures that cannot be read; names the first few."""
    lines = [f"{len(skipped)} of {count} pictures cannot be read:"]
    lines += [f"  {reason}" for reason in list(skipped.values())[:_NAMED]]
    lines += [f"  and {len(skipped) - _NAMED} more"] * (len(skipped) > _NAMED)
    return "\n".join(lines)


def _mute(text: str) -> None:
    """Takes the place of `say` where no progress is wanted."""


def _check_side(short_side_px: int) -> int:
    if short_side_px < 1:
        raise ValueError(f"data.short_side_px is {short_side_px}: set it to 1 or more")
    return short_side_px
