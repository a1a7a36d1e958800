"""Reads a CSV file: image files, classes, splits and boxes.

    path,label,split,x_min,y_min,x_max,y_max
    photos/1.jpg,Wren,train,10,5,60,25
    photos/2.jpg,Tit,test,,,,

The header names the columns, in any order. `path` and `label` are required. `split` and
the box, in pixels of the image, are optional; a box may be empty. No image is opened.
"""

import csv
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from cra_jax.datasets import class_folders, listing
from cra_jax.datasets.listing import Corners, Entry, Listing, Splits, natural_key, some

LAYOUT = (
    "expected a CSV file whose header has the columns path and label and, optionally,"
    " split (train, test, val), x_min, y_min, x_max, y_max"
)
"""Expected file; for messages."""

MISSING = frozenset(
    {"nan", "<na>", "nat", "null", "#n/a", "n/a", "#ref!", "#value!", "#name?"}
    | {"#div/0!", "#null!", "#num!"}
)
"""What spreadsheets and pandas write for a missing value, in lower case."""

_LONGEST_LABEL = 255
_SIDES = ("x_min", "y_min", "x_max", "y_max")
_COLUMNS = ("path", "label", "split", *_SIDES)

_NUMBER = re.compile(r"\d+(\.0*)?")

_Row = dict[str, str]


def csv_list(file: Path, *, seed: int = 0, test_share: float = 0.2) -> Listing:
    """Lists the images of a CSV file.

    Paths are relative to the folder of the CSV, and inside it; links are followed.
    Labels are names or numbers. Without a split column, a random share of each class is
    used for testing, as for class folders. Rows of "val" are "test" if none is "test".

    Args:
      file: with commas, semicolons or tabs between the columns, in UTF-8.
      seed: of the random test split.
      test_share: of each class, if there is no split column.

    Raises:
      ValueError: the file has errors; the message lists the lines.
    """
    rows = list(_rows(file))
    if not rows:
        raise ValueError(f"{file}: there are no rows after the header; add images")
    root = file.parent
    seen: dict[Path, int] = {}
    missing = []
    labels, entries, splits = [], [], []
    for line, row in rows:
        fail = _failure(file, line)
        image = root / _relative(row["path"], fail)
        if image in seen:
            raise fail(f"{row['path']!r} is also on line {seen[image]}; remove one")
        seen[image] = line
        if not _is_file(image):
            missing.append(f"line {line}: {row['path']}")
        labels.append(_label(row["label"], fail))
        splits.append(_split(row["split"], fail) if "split" in row else "")
        entries.append(Entry(image, 0, _corners(row, fail)))
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of {len(rows)} images do not exist:"
            f" {some(missing)}; give paths relative to {root}"
        )
    if all(_NUMBER.fullmatch(label) for label in labels):
        labels = [  # 01, 1 and 1.0 are one class
            listing.plain_number(label.partition(".")[0]) for label in labels
        ]
    listing.check_differ(labels, str(file))
    names = sorted(set(labels), key=natural_key)
    position = {name: i for i, name in enumerate(names)}
    entries = [
        entry._replace(label=position[label])
        for entry, label in zip(entries, labels, strict=True)
    ]
    if any(splits):
        divided, notes = _divide(file, entries, splits)
    else:
        divided = class_folders.draw_test(
            root, entries, seed=seed, test_share=test_share
        )
        notes = [
            f"no split column in {file}: {len(divided['test'])} of {len(entries)}"
            " images were drawn for testing (with data.test_share=1, --mode eval scores"
            " all of them)"
        ]
    unused = [column for column in rows[0][1] if column not in _COLUMNS]
    if unused:
        notes.append(f"columns of {file} that are ignored: {some(unused)}")
    drawn = not any(splits)
    return Listing(root, tuple(names), divided, tuple(notes), drawn=drawn)


def _divide(
    file: Path, entries: list[Entry], splits: list[str]
) -> tuple[Splits, list[str]]:
    groups: Splits = {"train": [], "test": [], "val": []}
    for entry, split in zip(entries, splits, strict=True):
        groups[split].append(entry)
    there = {split: found for split, found in groups.items() if found}
    return listing.test_split(there, str(file))


def _is_file(image: Path) -> bool:
    try:
        return image.is_file()
    except OSError:  # such as a name that is too long
        return False


def _failure(file: Path, line: int) -> Callable[[str], ValueError]:
    return lambda message: ValueError(f"{file}, line {line}: {message}")


def _rows(file: Path) -> Iterator[tuple[int, _Row]]:
    """Line numbers and values of the rows that are not empty."""
    line = 1
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            separator = _separator(lines.readline())
            lines.seek(0)
            reader = csv.reader(lines, delimiter=separator, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            _check_header(file, header)
            for values in reader:
                line = reader.line_num
                if not any(value.strip() for value in values):
                    continue
                if len(values) != len(header):
                    raise ValueError(
                        f"{file}, line {line}: {len(values)} values, but the header"
                        f" has {len(header)} columns; put texts that contain"
                        f" {separator!r} into double quotes"
                    )
                yield line, dict(zip(header, map(str.strip, values), strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {error}; save the file as UTF-8") from error
    except csv.Error as error:
        raise ValueError(
            f"{file}, after line {line}: {error}; save the file as CSV again"
        ) from error


def _separator(header: str) -> str:
    """The separator; spreadsheets use semicolons if the decimal sign is a comma."""
    return max(",;\t", key=header.count)


def _check_header(file: Path, header: list[str]) -> None:
    box = [side for side in _SIDES if side in header]
    missing = [name for name in ("path", "label") if name not in header]
    missing += [side for side in _SIDES if side not in box] if box else []
    doubled = [name for name, count in Counter(header).items() if count > 1]
    if missing or doubled:
        problem = f"lacks {some(missing)}" if missing else f"repeats {some(doubled)}"
        raise ValueError(f"{file}: its header {header} {problem}; {LAYOUT}")


def _relative(text: str, fail: Callable[[str], ValueError]) -> PurePosixPath:
    path = PurePosixPath(text.replace("\\", "/"))  # from Windows
    if not path.name:
        raise fail(f"the path is {text!r}; give the path of an image")
    if path.is_absolute() or ".." in path.parts or path.parts[0].endswith(":"):
        raise fail(
            f"{text!r} is outside the CSV's folder; give a path relative to that"
            " folder, and move the CSV to a folder that contains all images"
        )
    return path


def _label(text: str, fail: Callable[[str], ValueError]) -> str:
    if not text:
        raise fail("the label is empty; give the class")
    if text.casefold() in MISSING:
        raise fail(
            f"the label is {text!r}, which stands for a missing value; give the class,"
            " or remove the row"
        )
    if len(text) > _LONGEST_LABEL:
        raise fail(
            f"the label has {len(text):,} characters ({text[:20]}...); give a class of"
            f" at most {_LONGEST_LABEL} characters"
        )
    return unicodedata.normalize("NFC", text)


def _split(text: str, fail: Callable[[str], ValueError]) -> str:
    if text.casefold() not in listing.SPLIT_WORDS:
        raise fail(f"the split is {text[:20]!r}; use train, test or val")
    return listing.SPLIT_WORDS[text.casefold()]


def _corners(row: _Row, fail: Callable[[str], ValueError]) -> Corners | None:
    texts = [row.get(side, "") for side in _SIDES]
    if not any(texts):
        return None
    try:
        left, top, right, bottom = corners = tuple(map(float, texts))
    except ValueError:
        left, top, right, bottom = corners = (math.nan,) * 4
    if not (all(map(math.isfinite, corners)) and left < right and top < bottom):
        raise fail(
            f"the box is {', '.join(texts)}; give x_min < x_max and y_min < y_max in"
            " pixels, or leave all four empty"
        )
    if right <= 1 and bottom <= 1:
        raise fail(
            f"the box is {', '.join(texts)}, within one pixel; give pixels instead of"
            " fractions: multiply by the width and the height of the image"
        )
    return left, top, right, bottom
