"""Image files with metadata that is large, damaged or endless."""

import io
import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from cra_jax.input import decoding

SIDE = 32
RED = Image.new("RGB", (SIDE, SIDE), (200, 10, 10))


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png_with(*chunks: bytes) -> bytes:
    png = encoded(RED, "PNG")
    place = png.index(b"IDAT") - 4
    return png[:place] + b"".join(chunks) + png[place:]


def png_with_texts() -> bytes:
    bomb = zlib.compress(bytes(30_000_000))
    return png_with(
        chunk(b"iCCP", b"profile\0\0" + bomb),
        chunk(b"zTXt", b"Comment\0\0" + bomb),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb),
        chunk(b"tEXt", b"damaged")[:-1] + b"?",
    )


def png_with_xmp() -> bytes:
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "<x>" + "a" * 3_000_000 + "</x>", zip=True)
    return encoded(RED, "PNG", pnginfo=info)


def tiff_with_tags(count: int, size: int) -> bytes:
    """Makes a grey TIFF with tags that all have the same bytes."""
    own: dict = {256: (4, 1, SIDE), 257: (4, 1, SIDE), 258: (3, 1, 8), 259: (3, 1, 1)}
    own |= {262: (3, 1, 1), 273: (4, 1, None), 277: (3, 1, 1), 278: (4, 1, SIDE)}
    own |= {279: (4, 1, SIDE * SIDE)}
    own |= dict.fromkeys(range(1000, 1000 + count), (7, size, None))
    end = 8 + 2 + 12 * len(own) + 4
    out = b"II*\0" + struct.pack("<IH", 8, len(own))
    for tag, (kind, number, value) in sorted(own.items()):
        out += struct.pack("<HHII", tag, kind, number, end if value is None else value)
    return out + bytes(4) + b"\x80" * size


def tiff_with_a_repeated_tag() -> bytes:
    tiff = tiff_with_tags(2000, 1_000_000)
    first = 10 + 12 * 9
    tags = b"".join(
        struct.pack("<HHII", 320, 3, 500_000, len(tiff) - 1_000_000)
        for _ in range(2000)
    )
    return tiff[:first] + tags + tiff[first + len(tags) :]


def endless_tiff() -> bytes:
    tiff = bytearray(tiff_with_tags(0, SIDE * SIDE))
    struct.pack_into("<I", tiff, 10 + 12 * 9, 8)  # the next image is the first
    return bytes(tiff)


def gif(before: bytes = b"", after: bytes = b"") -> bytes:
    data = encoded(Image.new("P", (SIDE, SIDE)), "GIF")
    place = data.index(b"," + bytes(4))
    return data[:place] + before + data[place:-1] + after + b";"


def jpeg_with(*segments: tuple[int, bytes], count: int = 1) -> bytes:
    data = encoded(RED, "JPEG")
    added = b"".join(
        bytes([255, marker]) + struct.pack(">H", len(body) + 2) + body
        for marker, body in segments
    )
    return data[:2] + added * count + data[2:]


def progressive_jpeg(side: int, scans: int) -> bytes:
    """Makes a grey JPEG of a few bytes for each scan."""

    def part(marker: int, body: bytes) -> bytes:
        return bytes([255, marker]) + struct.pack(">H", len(body) + 2) + body

    def packed(bits: str) -> bytes:
        bits += "1" * (-len(bits) % 8)
        return int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\0")

    blocks = (-(-side // 8)) ** 2
    out = b"\xff\xd8" + part(0xDB, b"\0" + b"\1" * 64)
    out += part(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    out += part(0xC4, b"\x00\1" + bytes(15) + b"\0")
    out += part(0xC4, b"\x10\1" + bytes(15) + b"\xe0")
    out += part(0xDA, b"\1\1\0\0\0\0") + bytes(-(-blocks // 8))
    scan = part(0xDA, b"\1\1\0\1\x3f\1")
    scan += packed(("0" + "1" * 14) * -(-blocks // 32767))
    return out + scan * scans + b"\xff\xd9"


COSTLY = {
    "png texts": png_with_texts,
    "png of many chunks": lambda: png_with(chunk(b"tEXt", b"") * 100_000),
    "png exif": lambda: png_with(chunk(b"eXIf", tiff_with_tags(2000, 1_000_000))),
    "png xmp": png_with_xmp,
    "png profile": lambda: encoded(RED, "PNG", icc_profile=os.urandom(3_000_000)),
    "tiff tags": lambda: tiff_with_tags(2000, 1_000_000),
    "tiff repeated tag": tiff_with_a_repeated_tag,
    "tiff without an end": endless_tiff,
    "gif comments": lambda: gif(b"\x21\xfe\x01x\0" * 100_000),
    "gif junk and comments": lambda: gif(b"\0\x21\xfe\x01x\0" * 100_000),
    "gif frames": lambda: gif(after=b"\x21\xfe\x01x\0" * 100_000),
    "jpeg exif": lambda: jpeg_with((0xE1, b"Exif\0\0x"), count=15_000),
    "jpeg exif tags": lambda: jpeg_with(
        (0xE1, b"Exif\0\0" + tiff_with_tags(2000, 40_000))
    ),
    "jpeg profile": lambda: encoded(RED, "JPEG", icc_profile=os.urandom(3_000_000)),
    "jpeg of a few scans": lambda: progressive_jpeg(SIDE, 200),
    "pgm comments": lambda: b"P2\n32 32\n255\n" + b"#\n" * 400_000 + b"0 " * 1024,
    "pgm header": lambda: b"P5\n32" + b"#\n" * 100_000 + b" 32\n255\n" + bytes(1024),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", COSTLY)
def test_metadata_costs_little(case):
    data = COSTLY[case]()
    begun = time.process_time()
    image = decoding.decode(data)
    assert time.process_time() - begun < 3
    assert image.shape == (SIDE, SIDE, 3)

    tracemalloc.start()
    try:
        assert decoding.read_header(data)[:2] == (SIDE, SIDE)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(data) + 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (progressive_jpeg(4096, 60), "more than 32 scans"),
        (jpeg_with((0xE1, b"Exif\0\0x"), count=25_000), "more than 20,000 segments"),
    ],
)
def test_costly_pixels_are_refused(data, message):
    with pytest.raises(decoding.ImageError, match=f"{message}; save it again"):
        decoding.decode(data)


def test_pixels_do_not_depend_on_metadata():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x010E] = "a bird"
    plain: dict = {"dpi": (72, 72)}
    much = plain | {"exif": exif.tobytes(), "icc_profile": os.urandom(90_000)}
    for file_format in ("JPEG", "PNG", "TIFF"):
        without = decoding.decode(encoded(image, file_format, **plain))
        found = decoding.decode(encoded(image, file_format, **much))
        assert np.array_equal(found, without)


@pytest.mark.parametrize("place", ["before", "after"])
def test_exif_before_and_after_the_pixels_of_a_png_turns_image_and_header(place):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = encoded(Image.new("RGB", (30, 20)), "PNG")
    at = wide.index(b"IDAT" if place == "before" else b"IEND") - 4
    data = wide[:at] + chunk(b"eXIf", exif.tobytes()[6:]) + wide[at:]
    assert decoding.decode(data).shape == (30, 20, 3)
    assert decoding.read_header(data).orientation == 6


@pytest.mark.parametrize("compressed", [False, True])
def test_orientation_in_xmp_of_a_png_is_applied(compressed):
    info = PngInfo()
    xmp = '<x tiff:Orientation="8"/>'
    info.add_itxt("XML:com.adobe.xmp", xmp, zip=compressed)
    data = encoded(Image.new("RGB", (30, 20)), "PNG", pnginfo=info)
    assert decoding.decode(data).shape == (30, 20, 3)
    assert decoding.read_header(data).orientation == 8


def test_transparency_of_a_gif_stays():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([200, 0, 0, 0, 0, 200])
    data = encoded(image, "GIF", transparency=1, comment=b"x" * 999)
    assert (decoding.decode(data) == 255).all()


@pytest.mark.parametrize("header", [b"P5#a\n2#b\n 1\n#c\n255\n", b"P5\n2 1\n255 "])
def test_comments_in_the_header_of_a_pnm(header):
    assert decoding.decode(header + b"#\n")[0, :, 0].tolist() == [35, 10]


def test_files_that_are_no_images_are_not_read(tmp_path):
    large = tmp_path / "large.jpg"
    large.write_bytes(encoded(RED, "JPEG"))
    os.truncate(large, 1 << 40)  # sparse
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name, message in (
        ("large.jpg", "more than an image of at most"),
        ("pipe.png", "no regular file"),
        ("zero.png", "no regular file"),
    ):
        for function in (decoding.decode, decoding.read_header):
            with pytest.raises(decoding.ImageError, match=message):
                function(tmp_path / name)
