"""Results of the study: the file that holds them, and comparisons of rows.

Only results of the current settings of a row are counted. Rows are compared seed by
seed: runs of one seed share the order of the images, the crops and, where the shapes
agree, the initial weights.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.study import rows
from benchmarks.study.rows import BY_NAME, ROWS
from cra_jax.reports import uncertainty
from cra_jax.runtime import files

Line = dict[str, Any]
"""Results of a run, as returned by `run.line_of`."""

Found = dict[str, dict[int, Line]]
"""Row -> seed -> line."""

Key = tuple[str, str]
"""A split and a metric of that split."""


class Lines:
    """Contents of `study/results.jsonl`: a line per run, sorted by row and seed.

    Args:
      path: path of the file, which may not exist yet.

    Raises:
      ValueError: the file is damaged.
    """

    def __init__(self, path: Path):
        self._path = path
        self._lines = _read(path)

    def __iter__(self) -> Iterator[Line]:
        return iter(list(self._lines.values()))

    def get(self, key: tuple[str, int, str]) -> Line | None:
        """Returns the line of a row, a seed and a fingerprint, or None."""
        return self._lines.get(key)

    def put(self, line: Line) -> None:
        """Adds a line or replaces the line with the same key, and writes the file."""
        # The file may have changed since it was read, such as by `git pull`.
        self._lines = {**_read(self._path), _key(line): line}
        order = {row.name: place for place, row in enumerate(ROWS)}
        ordered = sorted(
            self._lines.values(),
            key=lambda x: (order.get(x["row"], len(order)), x["row"], x["seed"]),
        )
        text = "".join(json.dumps(x) + "\n" for x in ordered)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self._path, text)


def _key(line: Mapping[str, Any]) -> tuple[str, int, str]:
    return line["row"], line["seed"], line["fingerprint"]


def _read(path: Path) -> dict[tuple, Line]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = {}
    for number, one in enumerate(text.splitlines(), start=1):
        try:
            line = json.loads(one)
            lines[_key(line)] = line
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}, is not a result of a run ({error!r}): delete "
                "the line and run the study again"
            ) from error
    return lines


@dataclasses.dataclass(frozen=True)
class Difference:
    """A row minus its reference, over the seeds that both have.

    Attributes:
      spread: mean, standard deviation and interval of the differences.
      p: p-value of `sign_flip`.
      images: counts of the same images that each row classifies correctly, over all
        seeds; None if the images differ.
    """

    spread: uncertainty.Spread
    p: float
    images: uncertainty.Paired | None


def to_hex(right: Sequence[bool]) -> str:
    """Encodes a bit per image as hexadecimal digits; the first image is the highest."""
    bits = "".join("01"[bool(x)] for x in right)
    bits += "0" * (-len(bits) % 4)
    return "".join(f"{int(bits[i : i + 4], 2):x}" for i in range(0, len(bits), 4))


def from_hex(digits: str, count: int) -> np.ndarray:
    """Decodes the result of `to_hex` into ``[count]`` of bool."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in digits)
    return np.array([bit == "1" for bit in bits[:count]], bool)


def sign_flip(differences: Sequence[float]) -> float:
    """P-value of the exact two-sided sign-flip test of paired differences.

    If the rows do not differ, each difference is as likely as its negative. p is the
    share of all 2^n choices of signs whose sum is at least as far from 0 as the
    observed sum. With n pairs it is at least 2 / 2^n.

    Source: Fisher (1935), the randomisation test of paired samples.
    """
    values = np.asarray(differences, float)
    signs = np.array(list(itertools.product((1, -1), repeat=len(values))))
    sums = np.abs(signs @ values)
    return float(np.mean(sums >= abs(values.sum()) - 1e-9))


def collect(lines: Iterable[Line]) -> tuple[Found, list[Line]]:
    """Splits lines into those of the rows' current settings, and all others."""
    found: Found = {row.name: {} for row in ROWS}
    others = []
    for line in lines:
        if line["fingerprint"] == _current(line["row"]):
            found[line["row"]][line["seed"]] = line
        else:
            others.append(line)
    return {
        name: dict(sorted(by_seed.items())) for name, by_seed in found.items()
    }, others


@functools.cache
def _current(name: str) -> str | None:
    """Fingerprint of a row's settings; None if there is no such row."""
    if name not in BY_NAME:
        return None
    return rows.fingerprint(rows.settings_of(BY_NAME[name], seed=0))


def values(by_seed: Mapping[int, Line], key: Key) -> dict[int, float]:
    """Values of a metric by seed, of the runs that have it."""
    split, metric = key
    scores = {seed: line.get(split, {}) for seed, line in by_seed.items()}
    return {seed: x[metric] for seed, x in scores.items() if metric in x}


def difference(found: Found, row: str, reference: str, key: Key) -> Difference | None:
    """Compares a row with its reference; None if they have no seed in common."""
    ours, theirs = values(found[row], key), values(found[reference], key)
    common = [seed for seed in ours if seed in theirs]
    if not common:
        return None
    changes = [ours[seed] - theirs[seed] for seed in common]
    return Difference(
        uncertainty.spread(changes),
        sign_flip(changes),
        _pair_images(found, row, reference, key[0], common),
    )


def _pair_images(
    found: Found, row: str, reference: str, split: str, seeds: Sequence[int]
) -> uncertainty.Paired | None:
    """Counts correct images of both rows; None if the images differ."""
    first, second = [], []
    for seed in seeds:
        one, other = found[reference][seed][split], found[row][seed][split]
        if one["names"] != other["names"]:
            return None
        first.append(from_hex(one["right"], one["count"]))
        second.append(from_hex(other["right"], other["count"]))
    return uncertainty.mcnemar(np.concatenate(first), np.concatenate(second))
