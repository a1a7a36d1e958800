import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageChops

from cra_jax.datasets import listing
from cra_jax.input import decoding

# Two by three tiles of 16 px, all different, so that flips and rotations are detected.
TILES = (
    np.array(
        [
            [[220, 30, 30], [30, 200, 40], [40, 50, 210]],
            [[230, 220, 40], [20, 20, 20], [240, 240, 240]],
        ],
        np.uint8,
    )
    .repeat(16, 0)
    .repeat(16, 1)
)


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def tiles(file_format: str = "PNG", **options) -> bytes:
    return encoded(Image.fromarray(TILES), file_format, **options)


def smooth_image(height_px: int = 60, width_px: int = 90) -> np.ndarray:
    """Makes a smooth image with detail, like a photograph."""
    y, x = np.mgrid[:height_px, :width_px] / 9.0
    waves = [np.sin(x * k + y) * np.cos(y * k) for k in (1.0, 1.7, 2.3)]
    return (np.stack(waves, -1) * 100 + 128).astype(np.uint8)


def encoded_image(file_format: str) -> bytes:
    return encoded(Image.fromarray(smooth_image()), file_format)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


# --- all file formats are decoded to upright RGB ----------------------------------


# The stored pixels for each orientation, made with NumPy, not Pillow.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_orientation_is_applied(file_format, orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](TILES)))
    lossless = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    data = encoded(
        stored, file_format, exif=exif(orientation), **lossless.get(file_format, {})
    )

    image = decoding.decode(data)

    assert image.shape == TILES.shape
    assert abs(image.astype(int) - TILES).max() <= 4


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description
 xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF>
</x:xmpmeta>"""
TWICE_ROTATED_TIFF = tiles("TIFF", tiffinfo={0x0112: 6, 700: XMP})


def test_orientation_stored_twice_in_a_tiff_is_applied_once():
    upright = np.rot90(TILES, -1)
    assert np.array_equal(decoding.decode(TWICE_ROTATED_TIFF), upright)


def test_unknown_orientation_is_ignored():
    assert np.array_equal(decoding.decode(tiles(exif=exif(9))), TILES)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of the EXIF data
@pytest.mark.parametrize(
    "damaged", [b"II*\0\x08\0\0\0\x40\0\xff\xff", b"no EXIF", b"II"]
)
def test_damaged_exif_is_ignored(damaged):
    jpeg = tiles("JPEG", quality=100, subsampling=0, exif=b"Exif\0\0" + damaged)
    for data in (jpeg, tiles(exif=damaged)):
        image = decoding.decode(data)
        assert image.shape == TILES.shape
        assert abs(image.astype(int) - TILES).max() <= 4


def test_decoded_images_are_contiguous_writable_uint8_arrays(tmp_path):
    (tmp_path / "a.png").write_bytes(tiles())
    from_path = decoding.decode(tmp_path / "a.png")

    assert from_path.dtype == np.uint8
    assert from_path.flags.c_contiguous
    assert from_path.flags.writeable
    assert np.array_equal(from_path, TILES)
    assert np.array_equal(decoding.decode(tiles()), TILES)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_grey_image_is_decoded_to_three_equal_channels(mode):
    grey = Image.fromarray(TILES).convert(mode)
    image = decoding.decode(encoded(grey, "PNG"))

    expected = np.asarray(grey.convert("L"))
    assert np.array_equal(image, np.stack([expected] * 3, -1))


def test_palette_image_is_decoded_to_rgb():
    few_colours = Image.fromarray(TILES).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.array_equal(decoding.decode(encoded(few_colours, "PNG")), TILES)


def test_alpha_is_blended_with_white():
    alpha = np.zeros(TILES.shape[:2], np.uint8)
    alpha[:, 16:32], alpha[:, 32:] = 128, 255
    rgba = np.dstack([TILES, alpha])

    image = decoding.decode(encoded(Image.fromarray(rgba), "PNG")).astype(int)

    assert (image[:, :16] == 255).all()
    half = TILES[:, 16:32] * (128 / 255) + 255 * (127 / 255)
    assert abs(image[:, 16:32] - half).max() <= 1
    assert np.array_equal(image[:, 32:], TILES[:, 32:])


def test_alpha_of_grey_is_blended_with_white():
    pixels = np.full((4, 4, 2), 90, np.uint8)
    pixels[:2, :, 1] = 0
    pixels[2:, :, 1] = 255
    image = decoding.decode(encoded(Image.fromarray(pixels, "LA"), "PNG"))

    assert (image[:2] == 255).all()
    assert (image[2:] == 90).all()


def test_transparent_colour_of_palette_and_rgb_is_white():
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((0, 0), 0)
    keyed = Image.new("RGB", (4, 4), (0, 0, 200))
    keyed.putpixel((0, 0), (200, 0, 0))

    for data in (
        encoded(palette, "PNG", transparency=1),
        encoded(palette, "PNG", transparency=b"\xff\x00"),
        encoded(palette, "GIF", transparency=1),
        encoded(keyed, "PNG", transparency=(0, 0, 200)),
    ):
        image = decoding.decode(data)
        assert image[0, 0].tolist() == [200, 0, 0]
        assert image[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled(file_format):
    values = np.array([[0, 128, 129, 257 * 100, 40000, 65535]], np.uint16)
    image = decoding.decode(encoded(Image.fromarray(values), file_format))

    assert image[0, :, 0].tolist() == [0, 0, 1, 100, 156, 255]
    assert (image == image[..., :1]).all()


def test_16_bit_big_endian_tiff_is_scaled():
    grey = Image.frombytes("I;16B", (2, 1), struct.pack(">2H", 257 * 9, 65535))
    assert decoding.decode(encoded(grey, "TIFF"))[0, :, 0].tolist() == [9, 255]


def grey_tiff(bits: int, photometric: int | None, values: bytes) -> bytes:
    """Makes a TIFF of two pixels."""
    tags = [(256, 2), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8)]
    tags += [(277, 1), (278, 1), (279, len(values))]
    tags = [(tag, value) for tag, value in tags if value is not None]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    place = struct.pack("<I", 8 + len(values))
    count = struct.pack("<H", len(tags))
    return b"II*\0" + place + values + count + entries + bytes(4)


@pytest.mark.parametrize(
    ("bits", "photometric", "values", "expected"),
    [
        (8, 0, b"\0\xf0", [255, 15]),
        (16, 0, struct.pack("<2H", 0, 257 * 240), [255, 15]),
        (16, None, struct.pack("<2H", 0, 257 * 240), [255, 15]),  # as with 8 bits
        (16, 1, struct.pack("<2H", 0, 257 * 240), [0, 240]),
        (12, 1, b"\xff\xf8\x00", [255, 128]),  # 4095 and 2048
    ],
)
def test_grey_tiffs_are_scaled_by_their_bits(bits, photometric, values, expected):
    data = grey_tiff(bits, photometric, values)
    assert decoding.decode(data)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_grey_is_an_error(dtype):
    data = encoded(Image.fromarray(np.ones((4, 4), dtype)), "TIFF")
    with pytest.raises(decoding.ImageError, match=r"x\.tif.*32-bit.*8 or 16 bits"):
        decoding.decode(data, name="x.tif")


RED_CMYK = Image.new("CMYK", (32, 32), (0, 255, 255, 0))


def without_adobe_marker(jpeg: bytes) -> bytes:
    start = jpeg.index(b"\xff\xee")
    assert jpeg[start + 4 : start + 9] == b"Adobe"
    (length,) = struct.unpack(">H", jpeg[start + 2 : start + 4])
    return jpeg[:start] + jpeg[start + 2 + length :]


def test_cmyk_and_inverted_cmyk_are_both_decoded():
    inverted = encoded(RED_CMYK, "JPEG", quality=100)  # as Adobe writes it
    plain = without_adobe_marker(
        encoded(ImageChops.invert(RED_CMYK), "JPEG", quality=100)
    )
    for data in (inverted, plain, encoded(RED_CMYK, "TIFF")):
        image = decoding.decode(data).astype(int)
        assert abs(image - [255, 0, 0]).max() <= 3


def test_first_frame_of_an_animation_is_decoded():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for file_format in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        data = encoded(
            frames[0], file_format, save_all=True, append_images=frames[1:], **options
        )
        image = decoding.decode(data)
        assert image.shape == (8, 8, 3)
        assert (image == [255, 0, 0]).all(), file_format


@pytest.mark.parametrize("suffix", sorted(listing.SUFFIXES - {".heic", ".heif"}))
def test_files_of_all_image_suffixes_are_decoded(suffix, tmp_path):
    file = tmp_path / f"tiles{suffix}"
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    Image.fromarray(TILES).convert(mode).save(
        file, Image.registered_extensions().get(suffix, "JPEG")
    )

    assert decoding.decode(file).shape == TILES.shape


# --- errors -----------------------------------------------------------------------


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 6 // 10]


def png_with_wrong_size(width_px: int, height_px: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


UNREADABLE = {
    "empty": (b"", "empty"),
    "text": (b"species,count\nwren,3\n" * 9, "not an image"),
    "page": (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an im"),
    "jpeg": (truncated(encoded_image("JPEG")), "truncated"),
    "png": (truncated(encoded_image("PNG")), "truncated"),
    "gif": (truncated(encoded_image("GIF")), "truncated"),
    "webp": (
        truncated(encoded_image("WEBP")),
        "not an im|trunc",
    ),
    "heic": (b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC images are not"),
    "heif": (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic" + bytes(99), "HEIC images are not"),
    "header alone": (
        encoded_image("JPEG")[:20],
        "not an im|trunc",
    ),
    "bomb": (png_with_wrong_size(60_000, 60_000), "shrink the image"),
}


@pytest.mark.parametrize("case", UNREADABLE)
@pytest.mark.parametrize("as_path", [True, False])
def test_unreadable_files_are_errors_with_their_name(case, as_path, tmp_path):
    data, message = UNREADABLE[case]
    file = tmp_path / "bird 7.jpg"
    file.write_bytes(data)
    for function in (decoding.decode, lambda p, **kw: decoding.read(p, 32, **kw)):
        with pytest.raises(decoding.ImageError, match=message) as caught:
            function(file) if as_path else function(data, name="bird 7.jpg")
        assert "bird 7.jpg" in str(caught.value)


def test_missing_file_and_directory_are_errors(tmp_path):
    with pytest.raises(decoding.ImageError, match=r"gone\.jpg: there is no"):
        decoding.decode(tmp_path / "gone.jpg")
    with pytest.raises(decoding.ImageError, match="this is a directory"):
        decoding.decode(tmp_path)


def test_image_above_max_pixels_is_an_error():
    pixels = TILES.shape[0] * TILES.shape[1]
    assert decoding.decode(tiles(), max_pixels=pixels).shape == TILES.shape
    with pytest.raises(decoding.ImageError, match=r"48 x 32 pixels .* 1,535;"):
        decoding.decode(tiles(), max_pixels=pixels - 1)
    with pytest.raises(decoding.ImageError, match="shrink the image"):
        decoding.read(tiles(), 32, max_pixels=pixels - 1)


def test_damaged_files_give_an_image_or_an_image_error():
    formats = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")
    outcomes = {"image": 0, "refused": 0}
    for file_format in formats:
        whole = encoded(Image.fromarray(smooth_image(20, 30)), file_format)
        for seed in range(40):
            rng = random.Random(f"{file_format} {seed}")
            data = bytearray(whole)
            for _ in range(rng.randint(1, 8)):
                position = min(int(rng.expovariate(1 / 60)), len(data) - 1)
                data[position] = rng.randrange(256)
            try:
                image = decoding.decode(bytes(data), max_pixels=10**6)
            except decoding.ImageError:
                outcomes["refused"] += 1
            else:
                outcomes["image"] += 1
                assert image.dtype == np.uint8
                assert image.ndim == 3
                assert image.shape[2] == 3
    assert min(outcomes.values()) > 30, outcomes


# --- sizes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "short_side_px", "expected"),
    [
        ((60, 90), 30, (30, 45)),
        ((90, 60), 30, (45, 30)),
        ((60, 60), 30, (30, 30)),
        ((60, 91), 30, (30, 46)),  # 45.5 rounds to even
        ((60, 90), 120, (120, 180)),
        ((1, 1), 16, (16, 16)),
        ((3, 5), 448, (448, 747)),
        ((10, 2000), 40, (40, 320)),
        ((2000, 10), 40, (320, 40)),
        ((1, 300), 32, (32, 256)),
    ],
)
def test_resize_short_side_gives_the_expected_size(size, short_side_px, expected):
    image = decoding.resize_short_side(smooth_image(*size), short_side_px)

    assert image.shape == (*expected, 3)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous


def test_long_images_are_cropped_around_their_centre():
    strip = np.zeros((10, 2000, 3), np.uint8)
    strip[:, 960:1040] = 255
    image = decoding.resize_short_side(strip, 10)
    assert image.shape == (10, 80, 3)
    assert (image == 255).all()

    assert decoding.resize_short_side(strip, 10, max_aspect=200).shape == (10, 2000, 3)
    assert decoding.resize_short_side(strip, 10, max_aspect=1).shape == (10, 10, 3)
    assert decoding.kept_region(2000, 10) == (960, 0, 1040, 10)
    assert decoding.kept_region(10, 2000) == (0, 960, 10, 1040)
    assert decoding.kept_region(80, 10) == (0, 0, 80, 10)
    with pytest.raises(ValueError, match=r"max_aspect is 0\.5"):
        decoding.kept_region(10, 10, max_aspect=0.5)


def test_resize_to_the_same_size_is_a_copy():
    image = smooth_image()
    out = decoding.resize_short_side(image, 60)
    assert np.array_equal(out, image)
    assert not np.shares_memory(out, image)


def bicubic_1d(rows: np.ndarray, size: int) -> np.ndarray:
    """MATLAB's imresize along axis 0: cubic, a = -0.5, antialiased when shrinking."""
    scale = size / len(rows)
    width = max(1.0, 1 / scale)
    out = np.empty((size, *rows.shape[1:]))
    for i in range(size):
        centre = (i + 0.5) / scale - 0.5
        at = np.arange(int(np.floor(centre - 2 * width)), int(centre + 2 * width) + 2)
        at = at[(at >= 0) & (at < len(rows))]
        t = abs(at - centre) / width
        near, far = 1.5 * t**3 - 2.5 * t**2 + 1, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        weight = np.where(t <= 1, near, np.where(t < 2, far, 0))
        out[i] = np.tensordot(weight / weight.sum(), rows[at], 1)
    return out


@pytest.mark.parametrize("short_side_px", [23, 60, 100])
def test_resize_is_antialiased_bicubic(short_side_px):
    image = smooth_image(60, 75)
    resized = decoding.resize_short_side(image, short_side_px)

    wide = bicubic_1d(image.astype(float).swapaxes(0, 1), resized.shape[1])
    oracle = bicubic_1d(wide.swapaxes(0, 1), resized.shape[0]).clip(0, 255)
    assert abs(resized - oracle).max() <= 1.5  # Pillow rounds twice, once for each axis


def test_downscaled_checkerboard_is_grey():
    board = (np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8)
    image = decoding.resize_short_side(np.stack([board] * 3, -1), 100)
    assert abs(image[4:-4, 4:-4].astype(int) - 127).max() <= 8


def test_read_equals_decode_and_resize(tmp_path):
    for data in (
        tiles(exif=exif(6)),
        encoded(Image.fromarray(smooth_image(400, 600)), "JPEG"),
    ):
        (tmp_path / "a.jpg").write_bytes(data)
        image = decoding.read(tmp_path / "a.jpg", 50)
        expected = decoding.resize_short_side(decoding.decode(data), 50)
        assert np.array_equal(image, expected)
        assert image.flags.c_contiguous
        assert np.array_equal(image, decoding.read(data, 50))


def test_read_crops_a_very_long_image():
    strip = encoded(Image.new("RGB", (20_000, 10), "red"), "PNG")
    assert decoding.read(strip, 512).shape == (512, 4096, 3)
    assert decoding.read(strip, 64, max_aspect=2).shape == (64, 128, 3)


def test_wrong_arguments_are_errors():
    with pytest.raises(ValueError, match=r"short_side_px is 0"):
        decoding.resize_short_side(smooth_image(), 0)
    with pytest.raises(ValueError, match=r"short_side_px is -3"):
        decoding.read(tiles(), -3)
    for wrong in (
        smooth_image().astype(np.float32),
        smooth_image()[..., 0],
        smooth_image()[..., :2],
    ):
        with pytest.raises(ValueError, match=r"uint8 \[h, w, 3\], not"):
            decoding.resize_short_side(wrong, 32)


def test_read_header_returns_size_and_orientation(tmp_path):
    (tmp_path / "a.jpg").write_bytes(tiles("JPEG", exif=exif(6)))
    assert decoding.read_header(tmp_path / "a.jpg") == (48, 32, 6, "JPEG RGB")
    assert decoding.read_header(tiles()) == (48, 32, 1, "PNG RGB")
    assert decoding.read_header(tiles(exif=exif(9))).orientation == 1
    for data in (tiles("TIFF", exif=exif(6)), TWICE_ROTATED_TIFF):
        assert decoding.read_header(data) == (48, 32, 6, "TIFF RGB")
    for data in (b"", b"no image at all"):
        with pytest.raises(decoding.ImageError, match=r"b\.jpg"):
            decoding.read_header(data, name="b.jpg")


def test_file_without_permission_is_an_error(tmp_path, monkeypatch):
    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").write_bytes(tiles())
    monkeypatch.setattr(os, "stat", deny)  # as root, permissions have no effect
    with pytest.raises(decoding.ImageError, match=r"a\.png.*change its permissions"):
        decoding.decode(tmp_path / "a.png")
