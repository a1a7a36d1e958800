"""Reads MATLAB files (versions 5 to 7.2) into plain Python values.

The files are untrusted, and `scipy.io.loadmat`, in C, crashes the process for some
damaged files. This module checks every length before use.
"""

import math
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cra_jax.datasets import listing

_COMPRESSED, _MATRIX = 15, 14
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
_NUMBERS |= {12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 16: "utf-8", 4: "utf-16", 17: "utf-16"}
_TEXTS |= {18: "utf-32"}
_CELLS, _STRUCTS, _CHARS, _NUMERIC = 1, 2, 4, range(6, 16)
_LARGEST = 1 << 28
_DEEPEST = 8


class _Element(NamedTuple):
    kind: int
    content: memoryview
    end: int
    """Offset of the next element."""


def read(path: Path) -> dict[str, Any]:
    """The variables of a file by name.

    Numbers are 1-D arrays in MATLAB's column-major order; texts are `str`; cells are
    lists; structs are lists of dicts. Shapes are omitted.

    Raises:
      ValueError: it is no such file, is damaged, would take more than 256 MB, or holds
        unsupported types (functions, objects, sparse arrays).
      OSError: it cannot be read.
    """
    listing.regular(path)
    data = memoryview(path.read_bytes())
    order = {b"IM": "<", b"MI": ">"}.get(bytes(data[126:128]))
    if order is None:
        raise ValueError("it is no .mat file of version 5 to 7.2; save it with -v7")
    try:
        return _variables(data[128:], order)
    except (struct.error, zlib.error) as error:
        raise ValueError(f"it is damaged or truncated ({error})") from error


def read_variable(file: Path, variable: str, kind: type) -> Any:
    """A variable of a file, which must be of type `kind`.

    Raises:
      ValueError: the file cannot be read, or holds no such variable.
    """
    try:
        found = read(file)
        if not isinstance(found.get(variable), kind):
            names = ", ".join(map(repr, found)) or "nothing"
            raise ValueError(f"it holds {names}")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file}: no {variable!r} can be read from it ({error}); get the file again"
        ) from error
    return found[variable]


def _variables(data: memoryview, order: str) -> dict[str, Any]:
    found, at, remaining = {}, 0, _LARGEST
    while at < len(data):
        kind, content, _ = _element(data, at, order)
        at += 8 + len(content)  # at the top level nothing is padded
        if kind == _COMPRESSED:
            decompressor = zlib.decompressobj()
            content = memoryview(decompressor.decompress(content, remaining))
            if not decompressor.eof:
                raise ValueError("it is truncated, or decompresses to more than 256 MB")
            remaining -= len(content)
            kind, content, _ = _element(content, 0, order)
        if kind == _MATRIX:
            name, value = _matrix(content, order, _DEEPEST)
            found[name] = value
    return found


def _element(data: memoryview, at: int, order: str) -> _Element:
    first, size = struct.unpack_from(f"{order}II", data, at)
    begin, end = at + 8, at + 8 + -(-size // 8) * 8
    if first >> 16:  # a small element has its content in its own 8 bytes
        first, size, begin, end = first & 0xFFFF, first >> 16, at + 4, at + 8
    content = data[begin : begin + size]
    if len(content) < size or (end == at + 8 and size > 4):
        raise ValueError("it is damaged or truncated")
    return _Element(first, content, end)


def _matrix(data: memoryview, order: str, depth: int) -> tuple[str, Any]:
    """A variable's name and value; `depth` is the maximum nesting depth."""
    if not len(data):
        return "", np.empty(0)
    if not depth:
        raise ValueError(f"cells or structs are nested more than {_DEEPEST} deep")
    flags, at = _next(data, 0, order)
    kind = int(_numbers(flags, order)[0]) & 0xFF
    lengths, at = _next(data, at, order)
    count = math.prod(map(int, _numbers(lengths, order)))
    name, at = _next(data, at, order)
    if not 0 <= count <= len(data):
        raise ValueError("it declares more elements than it has bytes")

    def values(number: int) -> list[Any]:
        nonlocal at
        each = []
        for _ in range(number):
            element, at = _next(data, at, order)
            if element.kind != _MATRIX:
                raise ValueError(f"an element of type {element.kind} is no variable")
            each.append(_matrix(element.content, order, depth - 1)[1])
        return each

    if kind == _CELLS:
        value = values(count)
    elif kind == _STRUCTS:
        length, at = _next(data, at, order)
        fields, at = _next(data, at, order)
        width = int(_numbers(length, order)[0])
        if width < 1:
            raise ValueError(f"its field names have {width} letters")
        keys = [
            bytes(fields.content[i : i + width]).partition(b"\0")[0].decode()
            for i in range(0, len(fields.content), width)
        ]
        value = [dict(zip(keys, values(len(keys)), strict=True)) for _ in range(count)]
    elif kind == _CHARS:
        value = _text(_next(data, at, order)[0], order) if count else ""
    elif kind in _NUMERIC:
        value = _numbers(_next(data, at, order)[0], order) if count else np.empty(0)
        if len(value) != count:
            raise ValueError(f"it has {len(value)} numbers instead of {count}")
    else:
        raise ValueError(f"a variable of MATLAB's class {kind} is not supported")
    return bytes(name.content).decode(), value


def _next(data: memoryview, at: int, order: str) -> tuple[_Element, int]:
    element = _element(data, at, order)
    return element, element.end


def _numbers(element: _Element, order: str) -> np.ndarray:
    if element.kind not in _NUMBERS or not len(element.content):
        raise ValueError(f"an element of type {element.kind} holds no numbers")
    return np.frombuffer(element.content, order + _NUMBERS[element.kind])


def _text(element: _Element, order: str) -> str:
    if element.kind not in _TEXTS:
        raise ValueError(f"an element of type {element.kind} holds no text")
    coding = _TEXTS[element.kind]
    if coding in ("utf-16", "utf-32"):
        coding += "-le" if order == "<" else "-be"
    return bytes(element.content).decode(coding)
