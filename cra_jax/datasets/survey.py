"""Describes a dataset: counts, sizes, boxes, duplicates, unreadable images.

Every stored image is decoded once. Two images are duplicates if their upright pixels
are equal, regardless of the rest of their files.
"""

import collections
import hashlib
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from cra_jax.datasets.listing import some
from cra_jax.input import decoding
from cra_jax.input.records import Dataset, Record
from cra_jax.runtime import files, fonts
from cra_jax.runtime.prefetch import prefetch
from cra_jax.runtime.progress import Progress

_NAMED = 10  # maximum number of names in a list

# The contact sheet: one row per class.
_ROWS, _COLUMNS = 24, 8
_SIDE_PX, _GAP_PX, _NAME_PX, _TEXT_PX = 112, 4, 208, 13
_PAPER, _INK, _FRAME = (255, 255, 255), (0, 0, 0), (255, 64, 0)
_EMPTY = (128, 128, 128)


class _Examined(NamedTuple):
    """Properties of one image, or why it cannot be read."""

    split: str
    record: Record
    problem: str = ""
    size_px: tuple[int, int] = (0, 0)
    """Width and height, upright, as stored."""
    kind: str = ""
    """Format and colours, such as "JPEG RGB"."""
    is_turned: bool = False
    """By its EXIF data."""
    pixels: bytes = b""
    """Digest of the upright RGB pixels."""
    is_dark: bool = False
    box_share: float | None = None
    """Of the image's area; None where no box is known."""
    box_problem: str = ""


def describe(
    dataset: Dataset,
    *,
    sheet: Path | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> str:
    """Describes a dataset in text.

    Args:
      dataset: of `sources.load`.
      sheet: path of a PNG with some training images of up to 24 classes, and their
        boxes; None for none.
      workers: number of decoding threads; None for one per core.
      progress: report on standard error.

    Returns:
      Lines of text: classes and counts, notes of loading, sizes, colours, rotations,
      boxes, duplicates within and between the splits, unreadable images by name.

    Raises:
      ValueError: the sheet cannot be written, or `workers` is below 1.
    """
    workers = os.cpu_count() or 1 if workers is None else workers
    where = f" in {dataset.root}" if dataset.root else ""
    lines = [f"{dataset.name}: {len(dataset.class_names)} classes{where}"]
    for split, records in dataset.splits.items():
        lines += _counts(split, records, dataset.class_names)
    lines += [f"note: {note}" for note in dataset.notes]

    stored = [
        (split, record)
        for split, records in dataset.splits.items()
        for record in records
        if record.content
    ]
    examined = list(_each(_examine, stored, "examining", workers, progress))
    bad = {look.record.name for look in examined if look.problem}
    if examined:
        readable = [look for look in examined if not look.problem]
        if readable:
            lines += [*_sizes(readable), *_color_modes(readable), *_boxes(readable)]
            lines += _duplicates(readable, dataset.class_names)
        lines.append(f"unreadable: {len(bad) or 'none'}")
        lines += [f"  {look.problem}" for look in examined if look.problem]
    else:
        lines.append("no image is stored: images are drawn when they are read")
    if sheet is not None:
        lines.append(_write_sheet(dataset, bad, Path(sheet), workers, progress))
    return "\n".join(lines)


def _each(
    make: Callable, items: Sequence, title: str, workers: int, progress: bool
) -> Generator[Any, None, None]:
    """Results in order, computed in threads, with a progress bar."""
    results = prefetch(
        lambda i: make(items[i]), 0, len(items), workers=workers, depth=4 * workers
    )
    with (
        closing(results),
        Progress(len(items), title, unit="images", show=progress) as bar,
    ):
        for result in results:
            bar.advance()
            yield result


def _examine(item: tuple[str, Record]) -> _Examined:
    split, record = item
    assert record.content is not None, "only stored images are examined"
    try:
        content = record.content()
        pixels = decoding.decode(content, name=record.name)
        header = decoding.read_header(content)
    except (ValueError, OSError) as error:
        reason = str(error)
        if record.name not in reason:
            reason = f"{record.name}: {reason}"
        return _Examined(split, record, reason)
    share, box_problem = None, ""
    try:
        if box := record.box:
            share = (box[2] - box[0]) * (box[3] - box[1])
    except (ValueError, OSError) as error:
        box_problem = f"{record.name}: {error}"
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(f"{width} ".encode())  # 2 x 3 is not 3 x 2
    digest.update(pixels.data)
    return _Examined(
        split,
        record,
        "",
        (width, height),
        header.kind,
        header.orientation != 1,
        digest.digest(),
        bool(pixels.max() <= decoding.DARK),
        share,
        box_problem,
    )


def _counts(
    split: str, records: Sequence[Record], class_names: Sequence[str]
) -> list[str]:
    counter = collections.Counter(record.label for record in records)
    counts = list(counter.values())
    shown = f"{split}: {len(records):,} images of {len(counts)} classes"
    least, most = min(counts), max(counts)
    if least == most:
        lines = [f"{shown}, {least} each"]
    else:
        median = f"{np.median(counts):g}"
        lines = [f"{shown}; of a class {least} to {most}, median {median}"]
        for word, count in (("fewest", least), ("most", most)):
            names = [n for i, n in enumerate(class_names) if counter[i] == count]
            lines.append(f"  {word}, {count}: {some(names)}")
    absent = [name for i, name in enumerate(class_names) if not counter[i]]
    if absent:
        lines.append(f"  classes without an image: {_list(absent)}")
    return lines


def _sizes(examined: Sequence[_Examined]) -> list[str]:
    short = np.array([min(look.size_px) for look in examined])
    middle = "{:g} x {:g}".format(
        *np.median([look.size_px for look in examined], axis=0)
    )
    by_area = sorted(examined, key=lambda look: look.size_px[0] * look.size_px[1])
    first, last = (
        "{} ({} x {})".format(look.record.name, *look.size_px)
        for look in (by_area[0], by_area[-1])
    )
    lines = [
        f"sizes: median {middle} pixels; shorter side {short.min()} to {short.max()},"
        f" median {np.median(short):g}",
        f"  smallest {first}, largest {last}",
    ]
    bound = decoding.MAX_ASPECT
    long = [
        look.record.name
        for look in examined
        if max(look.size_px) > bound * min(look.size_px)
    ]
    if long:
        lines.append(f"  longer than {bound:g} to 1, ends are cropped: {_list(long)}")
    return lines


def _color_modes(examined: Sequence[_Examined]) -> list[str]:
    kinds = collections.Counter(look.kind for look in examined)
    shown = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    turned = [look.record.name for look in examined if look.is_turned]
    lines = [f"kinds: {shown}", f"rotated by EXIF: {_list(turned)}"]
    dark = [look.record.name for look in examined if look.is_dark]
    if dark:
        lines.append(
            f"dark, no value above {decoding.DARK} of 255 (if 12 bits are stored in 16,"
            f" scale the values to 65535): {_list(dark)}"
        )
    return lines


def _boxes(examined: Sequence[_Examined]) -> list[str]:
    shares = [look.box_share for look in examined if look.box_share is not None]
    problems = [look.box_problem for look in examined if look.box_problem]
    if not shares and not problems:
        return ["boxes: none"]
    lines = [f"boxes: of {len(shares):,} images"]
    if shares:
        least, median, most = np.percentile(shares, (0, 50, 100))
        lines[0] += f"; {least:.0%} to {most:.0%} of the area, median {median:.0%}"
    return lines + [f"  {problem}" for problem in problems]


def _duplicates(examined: Sequence[_Examined], class_names: Sequence[str]) -> list[str]:
    """Groups of the same pixels: within each split, then across the splits."""
    groups: dict[bytes, list[_Examined]] = collections.defaultdict(list)
    for look in examined:
        groups[look.pixels].append(look)
    found: dict[str, list[str]] = {}
    for split in dict.fromkeys(look.split for look in examined):
        found[f"within {split}"] = []
    found["between the splits"] = []
    for group in groups.values():
        splits = collections.Counter(look.split for look in group)
        labels = dict.fromkeys(look.record.label for look in group)
        shown = " = ".join(f"{look.record.name} ({look.split})" for look in group)
        if len(labels) > 1:
            shown += f"; LABELS DIFFER: {' / '.join(class_names[i] for i in labels)}"
        for split, count in splits.items():
            if count > 1:
                found[f"within {split}"].append(shown)
        if len(splits) > 1:
            found["between the splits"].append(shown)
    lines = []
    for place, shown in found.items():
        lines.append(f"duplicates {place}: {len(shown) or 'none'}")
        lines += [f"  {line}" for line in shown]
    return lines


def _list(names: Sequence[str]) -> str:
    """A count and the first names, or "none"."""
    if not names:
        return "none"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names):,}: {', '.join(names[:_NAMED])}{more}"


def _write_sheet(
    dataset: Dataset, bad: set[str], file: Path, workers: int, progress: bool
) -> str:
    by_class: dict[int, list[Record]] = collections.defaultdict(list)
    for record in dataset.splits["train"]:
        if record.name not in bad:
            by_class[record.label].append(record)
    rows = [
        (label, _evenly_spaced(by_class[label], _COLUMNS))
        for label in _evenly_spaced(sorted(by_class), _ROWS)
    ]
    shown = [record for _, records in rows for record in records]
    thumbnails = _each(_thumbnail, shown, "contact sheet", workers, progress)

    step = _SIDE_PX + _GAP_PX
    size = _NAME_PX + _COLUMNS * step, max(len(rows), 1) * step
    paper = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(paper)
    with closing(thumbnails):
        for row, (label, records) in enumerate(rows):
            name = dataset.class_names[label]
            name, font = fonts.fit(name, draw, _TEXT_PX, _NAME_PX - 2 * _GAP_PX)
            draw.text((_GAP_PX, row * step + _SIDE_PX // 2), name, _INK, font)
            for column in range(len(records)):
                place = _NAME_PX + column * step, row * step
                paper.paste(next(thumbnails), place)
        next(thumbnails, None)  # so that the progress bar is closed in time
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.written_atomically(file) as written:
            paper.save(written, "PNG")
    except OSError as error:
        raise ValueError(
            f"cannot write the contact sheet {file} ({error}): choose another path"
        ) from error
    return f"contact sheet of {len(rows)} of {len(dataset.class_names)} classes: {file}"


def _thumbnail(record: Record) -> Image.Image:
    """The central square, with the box; grey where it cannot be read."""
    try:
        image = Image.fromarray(record.read(_SIDE_PX))
    except (ValueError, OSError):
        return Image.new("RGB", (_SIDE_PX, _SIDE_PX), _EMPTY)
    try:
        box = record.box
    except (ValueError, OSError):  # `describe` lists it
        box = None
    if box:
        right, bottom = image.width - 1, image.height - 1
        corners = [
            side * end for side, end in zip(box, 2 * (right, bottom), strict=True)
        ]
        ImageDraw.Draw(image).rectangle(corners, outline=_FRAME, width=2)
    left, top = (image.width - _SIDE_PX) // 2, (image.height - _SIDE_PX) // 2
    return image.crop((left, top, left + _SIDE_PX, top + _SIDE_PX))


def _evenly_spaced(items: Sequence, count: int) -> list:
    """Up to `count` evenly spaced items, including the first."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
