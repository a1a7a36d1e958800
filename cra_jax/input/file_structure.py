"""Reduces image files to what decoding needs, before Pillow reads them.

Pillow keeps all metadata of a file, some of it in copies that grow quadratically: a
small file can then take gigabytes or hours. Metadata has no effect on pixels, except
for the orientation, so JPEG, PNG, GIF, TIFF and PNM files are passed on without it. A
large colour profile or a damaged comment then cannot make an image unreadable, either.
Time and memory are proportional to the size of the file.
"""

import io
import re
import struct
import zlib
from typing import IO

_LONGEST_XMP = 1 << 20  # bytes in which an orientation is looked for
_MOST_SEGMENTS = 20_000  # of a JPEG; those of profiles and previews are hundreds
_MOST_SCANS = 32  # of a large JPEG; progressive ones have about 10
_MOST_SCANNED_PIXELS = 1 << 29  # over all scans, if there are more than `_MOST_SCANS`

_JPEG_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_JPEG_SIZES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_KEPT = _JPEG_SIZES | {0xC4, 0xCC, 0xDB, 0xDD, 0xE0, 0xEE}  # tables, JFIF, Adobe
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IEND")
_GIF_BLOCK = re.compile(rb"[!,;]")
_PNM_COMMENTS = re.compile(rb"(?:#[^\r\n]*+\s*+)++")
_PNM_TOKEN = re.compile(rb"\s*([^\s#]+)")
_ORIENTATION_TAG = 0x0112
# The tags that say where the pixels of a TIFF are and how they are encoded.
_TIFF_KEPT = frozenset(
    {*range(256, 260), 262, 266, 273, _ORIENTATION_TAG, 277, 278, 279, 284, 292}
    | {293, 317, 320, 322, 323, 324, 325, 332, 338, 339, 347, *range(529, 533)}
)


class TooManyParts(ValueError):
    """A file that takes far more time than its pixels need."""


def reduce(file: IO[bytes], *, pixels: bool = True) -> tuple[IO[bytes], int | None]:
    """A file without metadata, and the orientation that its metadata has.

    Args:
      file: an image file of any format, at its start.
      pixels: whether the pixels are needed; otherwise only the header is.

    Returns:
      The reduced file, or `file` itself if its format is another one, at its start; the
      orientation in EXIF or XMP data, 1 to 8, or None if the caller is to find it.

    Raises:
      TooManyParts: a JPEG has far more segments or scans than its pixels need.
    """
    start = file.read(16)
    file.seek(0)
    if start.startswith(b"\xff\xd8\xff"):
        return _reduce_jpeg(file, pixels)
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return _reduce_png(file, pixels)
    if start[:6] in (b"GIF87a", b"GIF89a"):
        return _reduce_gif(file.read()), 1
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _reduce_tiff(bytearray(file.read())), None
    if re.match(rb"P[1-6][\s#]", start):
        return _reduce_pnm(file), 1
    return file, None


def orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """The orientation in EXIF data, else in XMP data, 1 to 8; 1 if there is none."""
    value = _exif_orientation((exif or b"").removeprefix(b"Exif\0\0"))
    if value is None and xmp:
        pattern = rb"tiff:Orientation(?:=[\"']|>)([0-9])"
        found = re.search(pattern, xmp[:_LONGEST_XMP])
        value = int(found[1]) if found else 1
    return value if value is not None and 1 <= value <= 8 else 1


def _exif_orientation(exif: bytes) -> int | None:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return None
    (place,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack(f"{order}H", exif[place : place + 2].ljust(2, b"\0"))
    first = place + 2
    for at in range(first, min(first + 12 * count, len(exif) - 11), 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", exif, at)
        if tag == _ORIENTATION_TAG and kind in (3, 4) and number == 1:
            return struct.unpack_from(
                order + ("H" if kind == 3 else "I"), exif, at + 8
            )[0]
    return None


def _reduce_jpeg(file: IO[bytes], pixels: bool) -> tuple[IO[bytes], int]:
    """Keeps tables, sizes, and all from the first scan on."""
    data = file.read() if pixels else file.read(1 << 18)
    kept, exif, xmp = [b"\xff\xd8"], None, None
    place, scans, area = 2, 0, 0
    for _ in range(_MOST_SEGMENTS):
        found = _JPEG_MARKER.search(data, place)
        if found is None and not pixels and not scans:
            data += file.read()  # the header is longer than what was read
            pixels = True
            found = _JPEG_MARKER.search(data, place)
        if found is None or found[1] == b"\xd9":
            break
        marker, place = found[1][0], found.end()
        if marker in (0x01, 0xD8):  # without a length
            continue
        length = int.from_bytes(data[place : place + 2])
        segment = data[place + 2 : place + length]
        if marker == 0xDA:
            if not scans:
                kept.append(data[found.start() :])
            scans += 1
            if not pixels:
                break
            if scans > _MOST_SCANS and scans * area > _MOST_SCANNED_PIXELS:
                raise TooManyParts(f"it has more than {_MOST_SCANS} scans")
        elif scans:
            pass  # what comes between scans stays
        elif marker in _JPEG_KEPT:
            kept.append(b"\xff" + data[found.end() - 1 : place + length])
            if marker in _JPEG_SIZES and len(segment) >= 5:
                height, width = struct.unpack_from(">HH", segment, 1)
                area = height * width
        elif marker == 0xE1 and segment.startswith(b"Exif\0"):
            exif = exif or segment
        elif marker == 0xE1 and segment.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = xmp or segment
        place += length
    else:
        raise TooManyParts(f"it has more than {_MOST_SEGMENTS:,} segments")
    return io.BytesIO(b"".join(kept)), orientation(exif, xmp)


def _reduce_png(file: IO[bytes], pixels: bool) -> tuple[IO[bytes], int]:
    """Keeps header, palette, transparency and pixels; EXIF data may follow those."""
    kept, exif, xmp = [file.read(8)], None, None
    size = file.seek(0, io.SEEK_END)
    file.seek(8)
    has_pixels = False
    while len(head := file.read(8)) == 8:
        kind, end = head[4:], file.tell() + int.from_bytes(head[:4]) + 4
        length = min(end, size) - file.tell()
        if kind in _PNG_KEPT or (kind == b"IDAT" and pixels):
            kept += [head, file.read(length)]
        elif kind == b"IDAT" and not has_pixels:
            kept.append(head)
        elif kind == b"eXIf" and exif is None:
            exif = file.read(min(length, _LONGEST_XMP))
        elif kind == b"iTXt" and xmp is None:
            xmp = _xmp_of(file.read(min(length, _LONGEST_XMP)))
        has_pixels = has_pixels or kind == b"IDAT"
        if kind == b"IEND" or end > size:
            break
        file.seek(end)
    return io.BytesIO(b"".join(kept)), orientation(exif, xmp)


def _xmp_of(text: bytes) -> bytes | None:
    """The XMP data of a PNG's iTXt chunk; None if it is another text."""
    keyword, _, rest = text.partition(b"\0")
    if keyword != b"XML:com.adobe.xmp":
        return None
    body = rest[2:].split(b"\0", 2)[-1]
    if not rest.startswith(b"\1"):
        return body
    try:
        return zlib.decompressobj().decompress(body, _LONGEST_XMP)
    except zlib.error:
        return b""


def _reduce_gif(data: bytes) -> IO[bytes]:
    """Removes comments and other extensions before the first frame."""
    place = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 128 else 0)
    head, control = data[:place], b""
    while (found := _GIF_BLOCK.search(data, place)) and found[0] == b"!":
        end = found.end() + 1
        while end < len(data) and data[end]:
            end += data[end] + 1
        if data[found.end() : found.end() + 1] == b"\xf9":  # time and transparency
            control = data[found.start() : end + 1]
        place = end + 1
    return io.BytesIO(head + control + data[found.start() if found else place :])


def _reduce_tiff(data: bytearray) -> IO[bytes]:
    """Keeps the tags of the first image that pixels depend on, each once."""
    order = "<" if data[:1] == b"I" else ">"
    is_big = b"+" in data[2:4]
    entry, head, offset = (20, "Q", "Q") if is_big else (12, "H", "I")
    start = 8 if is_big else 4
    try:
        (place,) = struct.unpack_from(order + offset, data, start)
        (count,) = struct.unpack_from(order + head, data, place)
    except (struct.error, OverflowError):
        return io.BytesIO(data)  # damaged: Pillow says so
    first = place + struct.calcsize(order + head)
    tags: dict[int, bytes] = {}
    for at in range(first, min(first + count * entry, len(data) - entry + 1), entry):
        (tag,) = struct.unpack_from(f"{order}H", data, at)
        if tag in _TIFF_KEPT:
            tags.setdefault(tag, bytes(data[at : at + entry]))
    struct.pack_into(order + head, data, place, len(tags))
    following = struct.pack(order + offset, 0)  # no second image
    body = b"".join(tags.values()) + following
    data[first : first + len(body)] = body
    return io.BytesIO(data)


def _reduce_pnm(file: IO[bytes]) -> IO[bytes]:
    """Removes comments: before the pixels, or everywhere if those are text too."""
    data = file.read()
    if data[1:2] in b"123":
        return io.BytesIO(_PNM_COMMENTS.sub(b"\n", data))
    place, tokens = 0, []
    while len(tokens) < (3 if data[1:2] == b"4" else 4):
        if token := _PNM_TOKEN.match(data, place):
            tokens.append(token[1])
            place = token.end()
        elif comments := re.compile(rb"\s*#[^\r\n]*").match(data, place):
            place = comments.end()
        else:
            break
    return io.BytesIO(b"\n".join(tokens) + data[place:])
