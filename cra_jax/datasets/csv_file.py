"""A CSV file -> image files, classes, splits and boxes.

    path,label,split,x_min,y_min,x_max,y_max
    photos/1.jpg,Wren,train,10,5,60,25
    photos/2.jpg,Tit,test,,,,

The header names the columns, in any order. `path` and `label` are required. `split` and
the box, in pixels of the image, are optional; a box may be empty. No image is opened.
"""

import csv
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from cra_jax.datasets import class_folders
from cra_jax.datasets.listing import Corners, Entry, Listing, Splits, natural_key, some

LAYOUT = (
    "expected a CSV file whose header has the columns path and label and, optionally,"
    " split (train, test, val), x_min, y_min, x_max, y_max"
)
"""What is expected on disk; ends messages."""

_SPLITS = {"train": "train", "test": "test", "val": "val"}
_SPLITS |= {"training": "train", "testing": "test", "valid": "val", "validation": "val"}
_SIDES = ("x_min", "y_min", "x_max", "y_max")
_COLUMNS = ("path", "label", "split", *_SIDES)

_Row = dict[str, str]


def csv_list(file: Path, *, seed: int = 0, test_share: float = 0.2) -> Listing:
    """Lists the pictures that a CSV file names.

    Paths start from the CSV's folder and stay in it; links are followed. Labels are
    names, or numbers. Without a split column, a share of each class is drawn for
    testing, as from folders of classes. Rows of "val" serve where none is "test".

    Args:
        file: commas, semicolons or tabs between the columns, in UTF-8.
        seed: of the share that is drawn.
        test_share: of each class, where there is no split column.

    Raises:
        ValueError: names the line, or lines, and what is wrong there.
    """
    rows = list(_rows(file))
    if not rows:
        raise ValueError(f"{file}: there are no rows below the header; add pictures")
    root = file.parent
    seen: dict[Path, int] = {}
    missing = []
    labels, entries, splits = [], [], []
    for line, row in rows:
        fail = _failure(file, line)
        picture = root / _relative(row["path"], fail)
        if picture in seen:
            raise fail(
                f"{row['path']!r} is on line {seen[picture]} already; remove one"
            )
        seen[picture] = line
        if not picture.is_file():
            missing.append(f"line {line}: {row['path']}")
        labels.append(_label(row["label"], fail))
        splits.append(_split(row["split"], fail) if "split" in row else "")
        entries.append(Entry(picture, 0, _corners(row, fail)))
    if missing:
        raise ValueError(
            f"{file}: {len(missing)} of {len(rows)} pictures are not there:"
            f" {some(missing)}; paths start from {root}"
        )
    if all(label.isdecimal() for label in labels):
        labels = [str(int(label)) for label in labels]  # 01 and 1 are one class
    names = sorted(set(labels), key=natural_key)
    position = {name: i for i, name in enumerate(names)}
    entries = [
        entry._replace(label=position[label])
        for entry, label in zip(entries, labels, strict=True)
    ]
    if any(splits):
        divided, notes = _divide(entries, splits)
    else:
        divided = class_folders.draw_test(
            root, entries, seed=seed, test_share=test_share
        )
        notes = [
            f"no split column in {file}: {len(divided['test'])} of {len(entries)}"
            " pictures were drawn for testing"
        ]
    unused = [column for column in rows[0][1] if column not in _COLUMNS]
    if unused:
        notes.append(f"columns of {file} that are not used: {some(unused)}")
    return Listing(root, tuple(names), divided, tuple(notes))


def _divide(entries: list[Entry], splits: list[str]) -> tuple[Splits, list[str]]:
    groups: Splits = {"train": [], "val": [], "test": []}
    for entry, split in zip(entries, splits, strict=True):
        groups[split].append(entry)
    val, test = groups["val"], groups["test"]
    notes = [f"{len(val)} rows of the split 'val' are not used"] if val and test else []
    return {"train": groups["train"], "test": test or val}, notes


def _failure(file: Path, line: int) -> Callable[[str], ValueError]:
    return lambda message: ValueError(f"{file}, line {line}: {message}")


def _rows(file: Path) -> Iterator[tuple[int, _Row]]:
    """The rows that are not empty, and the numbers of their lines."""
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
                        f" names {len(header)} columns; put texts that hold a"
                        f" {separator!r} into double quotes"
                    )
                yield line, dict(zip(header, map(str.strip, values), strict=True))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: {error}; save the file as UTF-8") from error
    except csv.Error as error:
        raise ValueError(
            f"{file}, after line {line}: {error}; save the file as CSV anew"
        ) from error


def _separator(header: str) -> str:
    """Spreadsheets write semicolons where the comma is the decimal sign."""
    return max(",;\t", key=header.count)


def _check_header(file: Path, header: list[str]) -> None:
    box = [side for side in _SIDES if side in header]
    missing = [name for name in ("path", "label") if name not in header]
    missing += [side for side in _SIDES if side not in box] if box else []
    doubled = [name for name, count in Counter(header).items() if count > 1]
    if missing or doubled:
        problem = f"lacks {some(missing)}" if missing else f"doubles {some(doubled)}"
        raise ValueError(f"{file}: its header {header} {problem}; {LAYOUT}")


def _relative(text: str, fail: Callable[[str], ValueError]) -> PurePosixPath:
    path = PurePosixPath(text.replace("\\", "/"))  # Windows writes those
    if not path.name:
        raise fail(f"the path is {text!r}; name a picture")
    if path.is_absolute() or ".." in path.parts or path.parts[0].endswith(":"):
        raise fail(
            f"{text!r} leaves the CSV's folder; give the path from that folder, and"
            " move the CSV above its pictures where they are elsewhere"
        )
    return path


def _label(text: str, fail: Callable[[str], ValueError]) -> str:
    if not text:
        raise fail("the label is empty; name the class")
    return unicodedata.normalize("NFC", text)


def _split(text: str, fail: Callable[[str], ValueError]) -> str:
    if text.lower() not in _SPLITS:
        raise fail(f"the split is {text!r}; use train, test or val")
    return _SPLITS[text.lower()]


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
    return left, top, right, bottom
