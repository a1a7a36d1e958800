"""The one decoder: any image file -> upright RGB uint8, resized.

Training, testing and prediction all use this module, so that an image always has the
same pixels. Unusual files:

- EXIF orientation is applied; ICC profiles are not.
- Grey and palette images become RGB. 16-bit grey is scaled, not clipped, by the number
  of bits that the file states: 12 bits in a file of 16 stay dark.
- Metadata is not read, except for the orientation; see `file_structure`.
- Transparent pixels show white.
- CMYK JPEGs are read as inverted if they have the Adobe marker, else as stored.
- The first frame of an animation is used.

JPEG draft mode (decoding at a half, a quarter, ...) is not used: on photographs shrunk
threefold it is twice as fast, but moves pixels by 2 levels on average and 100 at worst.
"""

import contextlib
import functools
import io
import os
import stat
import struct
from collections.abc import Iterator
from typing import IO, NamedTuple, NoReturn

import numpy as np
from PIL import Image, ImageChops, ImageFile

from cra_jax.input import file_structure

MAX_PIXELS = 250_000_000
"""Default limit of an image's pixels: 750 MB as RGB."""
MAX_ASPECT = 8.0
DARK = 64
"""An image whose values are at most this is probably not scaled, such as 12 bits in 16.
"""

_MOST_BYTES_PER_PIXEL = 8  # of an uncompressed file
_MOST_OTHER_BYTES = 1 << 28  # of a file: metadata, previews, further frames

# Listed, so that Pillow's less strict readers get no file (EPS runs Ghostscript).
_FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF"]

_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")  # brands of files

_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG = 0x0112, 258, 262
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

PathOrBytes = str | os.PathLike[str] | bytes


class ImageError(ValueError):
    """An image that cannot be used; the message has its name and what to do."""


class _HeicError(ValueError):
    """An image that Pillow has no decoder for."""


class Header(NamedTuple):
    """Size and orientation of an image, read without decoding it."""

    width_px: int
    """As stored, before the orientation is applied."""
    height_px: int
    orientation: int
    """EXIF, 1 (upright) to 8."""
    kind: str
    """Format and colours, such as "JPEG RGB"."""


def decode(
    path_or_bytes: PathOrBytes, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decodes one image.

    Args:
      path_or_bytes: a file's path, or a file's content.
      name: of the image in messages; by default its path.
      max_pixels: larger images are errors.

    Returns:
      uint8 `[h, w, 3]`, RGB, upright, C-contiguous, writable.

    Raises:
      ImageError: missing, empty, truncated, too large or not an image.
    """
    return np.array(_decode(path_or_bytes, name, max_pixels))


def read(
    path_or_bytes: PathOrBytes,
    short_side_px: int,
    *,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_aspect: float = MAX_ASPECT,
) -> np.ndarray:
    """Decodes one image and resizes it as `resize_short_side` does.

    Returns:
      uint8 `[h, w, 3]`, RGB, upright, C-contiguous; min(h, w) is `short_side_px`.

    Raises:
      ImageError: missing, empty, truncated, too large or not an image.
    """
    image = _decode(path_or_bytes, name, max_pixels)
    return _resize(image, short_side_px, max_aspect)


def resize_short_side(
    image: np.ndarray, short_side_px: int, *, max_aspect: float = MAX_ASPECT
) -> np.ndarray:
    """Resizes an image so that its shorter side is `short_side_px`.

    The aspect is kept, up to rounding. An image longer than `max_aspect` to 1 is
    first cropped at both ends: otherwise 20,000 x 10 pixels would become 1,024,000 x
    512.

    Args:
      image: uint8 `[h, w, 3]`.
      short_side_px: length of the shorter side of the result.
      max_aspect: largest ratio of the longer side to the shorter.

    Returns:
      uint8 `[h', w', 3]`, C-contiguous, never a view of `image`.

    Differs: the paper names no filter; this is antialiased bicubic (a = -0.5), the
    default of the MATLAB code that the authors released.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"an image is uint8 [h, w, 3], not {image.dtype} {list(image.shape)}"
        )
    return _resize(Image.fromarray(image), short_side_px, max_aspect)


def cut_bottom(image: np.ndarray, rows_px: int, *, name: str) -> np.ndarray:
    """An image `[h, w, 3]` without its lowest rows, such as a banner.

    Raises:
      ImageError: nothing would be left.
    """
    if len(image) <= rows_px:
        raise ImageError(
            f"{name}: {len(image)} rows, of which the lowest {rows_px} are a banner;"
            " get it again"
        )
    return image[: len(image) - rows_px]


def kept_region(
    width_px: int, height_px: int, *, max_aspect: float = MAX_ASPECT
) -> tuple[float, float, float, float]:
    """The region of an upright image that `read` and `resize_short_side` keep.

    Returns:
      (x_min, y_min, x_max, y_max) in pixels: the full image up to `max_aspect`, else
      its centre.
    """
    if max_aspect < 1:
        raise ValueError(f"max_aspect is {max_aspect}: set it to 1 or more")
    width = min(width_px, height_px * max_aspect)
    height = min(height_px, width_px * max_aspect)
    left, top = (width_px - width) / 2, (height_px - height) / 2
    return left, top, left + width, top + height


def read_header(path_or_bytes: PathOrBytes, *, name: str | None = None) -> Header:
    """Size and orientation of an image, without decoding it (about 0.2 ms).

    Raises:
      ImageError: missing, empty or not an image.
    """
    name = name or default_name(path_or_bytes)
    with _open(path_or_bytes, name, pixels=False) as (image, orientation):
        width, height = image.size
        if image.format == "TIFF" and orientation >= 5:  # Pillow's size is upright
            width, height = height, width
        return Header(width, height, orientation, f"{image.format} {image.mode}")


def _decode(path_or_bytes: PathOrBytes, name: str | None, max_pixels: int):
    name = name or default_name(path_or_bytes)
    with _open(path_or_bytes, name, max_pixels=max_pixels) as (image, orientation):
        if image.width * image.height > max_pixels:
            raise ImageError(
                f"{name}: {image.width} x {image.height} pixels are more than the"
                f" limit of {max_pixels:,}; shrink the image"
            )
        return _upright_rgb(image, orientation, name)


@contextlib.contextmanager
def _open(
    path_or_bytes: PathOrBytes,
    name: str,
    *,
    pixels: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[tuple[ImageFile.ImageFile, int]]:
    """The image, not yet decoded, and its orientation.

    Raises:
      ImageError: for any error of Pillow or of the file system, in the block too.
    """
    try:
        with contextlib.ExitStack() as stack:
            if isinstance(path_or_bytes, bytes):
                size, file = len(path_or_bytes), io.BytesIO(path_or_bytes)
            else:
                status = os.stat(path_or_bytes)
                if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                    raise ImageError(f"{name}: this is no regular file; remove it")
                size = status.st_size
                file = stack.enter_context(open(path_or_bytes, "rb"))
            if not size:
                raise ImageError(
                    f"{name}: the file is empty; get it again or remove it"
                )
            if size > _MOST_BYTES_PER_PIXEL * max_pixels + _MOST_OTHER_BYTES:
                raise ImageError(
                    f"{name}: {size:,} bytes are more than an image of at most"
                    f" {max_pixels:,} pixels has; get it again, or shrink the image"
                )
            reduced, orientation = file_structure.reduce(file, pixels=pixels)
            image = _identify(reduced)
            if orientation is None and image.format == "TIFF":
                orientation = image.tag_v2.get(_ORIENTATION_TAG, 1)  # pyright: ignore[reportAttributeAccessIssue]
            elif orientation is None:
                info = image.info
                orientation = file_structure.orientation(
                    info.get("exif"), info.get("xmp")
                )
            yield image, orientation if orientation in _UPRIGHT else 1
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow may raise any error for a damaged file
        _refuse(name, error)


def _identify(file: IO[bytes]) -> ImageFile.ImageFile:
    """Opens a file as `Image.open` does, but leaves limits of size to the caller.

    Raises:
      _HeicError: the file is HEIC.
      UnidentifiedImageError: it is no image, or in another unsupported format.
    """
    start = file.read(64)
    if start[4:8] == b"ftyp" and any(brand in start[8:] for brand in _HEIC):
        raise _HeicError
    for file_format in _formats():
        factory, accept = Image.OPEN[file_format]
        file.seek(0)
        with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
            if accept is None or accept(start) is True:  # a text: not in this build
                return factory(file, "")  # pyright: ignore[reportReturnType]
    raise Image.UnidentifiedImageError


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats of `_FORMATS` that this build of Pillow reads."""
    Image.init()
    return tuple(f for f in _FORMATS if f in Image.OPEN)


def _upright_rgb(image: Image.Image, orientation: int, name: str) -> Image.Image:
    image.load()
    is_tiff = image.format == "TIFF"
    tags = image.tag_v2 if is_tiff else {}  # pyright: ignore[reportAttributeAccessIssue]
    if image.mode == "F" or (image.mode == "I" and is_tiff):
        raise ImageError(
            f"{name}: its pixels are 32-bit numbers of unknown range; save it with"
            " 8 or 16 bits per channel"
        )
    if image.mode.startswith("I"):  # 16-bit grey
        (bits,) = tags.get(_BITS_TAG, (16,))
        values, most = np.asarray(image).astype(np.int32), 2**bits - 1
        if is_tiff and tags.get(_PHOTOMETRIC_TAG, 0) == 0:  # 0 is white
            values = most - values
        image = Image.fromarray(((values * 255 + most // 2) // most).astype(np.uint8))
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow has inverted an image that was not stored inverted.
        image = ImageChops.invert(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if orientation in _UPRIGHT and not is_tiff:  # Pillow rotates TIFF itself
        image = image.transpose(_UPRIGHT[orientation])
    return image.convert("RGB")


def _resize(image: Image.Image, short_side_px: int, max_aspect: float) -> np.ndarray:
    if short_side_px < 1:
        raise ValueError(f"short_side_px is {short_side_px}: set it to 1 or more")
    box = kept_region(image.width, image.height, max_aspect=max_aspect)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = short_side_px / min(width, height)
    size = round(width * scale), round(height * scale)
    return np.array(image.resize(size, Image.Resampling.BICUBIC, box=box))


def default_name(path_or_bytes: PathOrBytes) -> str:
    """Name of an image in messages."""
    if isinstance(path_or_bytes, bytes):
        return f"image of {len(path_or_bytes)} bytes"
    return os.fspath(path_or_bytes)


def _refuse(name: str, error: Exception) -> NoReturn:
    """Raises a `ImageError` for an error of Pillow or of the file system."""
    if isinstance(error, FileNotFoundError):
        message = "there is no such file; check the path"
    elif isinstance(error, IsADirectoryError):
        message = "this is a directory; name an image in it"
    elif isinstance(error, PermissionError):
        message = "the file is not readable; change its permissions"
    elif isinstance(error, _HeicError):
        message = "HEIC images are not supported; save it as JPEG or PNG"
    elif isinstance(error, file_structure.TooManyParts):
        message = f"{error}; save it again as JPEG or PNG"
    elif isinstance(error, Image.UnidentifiedImageError):
        message = (
            "not an image, or in an unsupported format (perhaps a web page or an"
            " unfinished download); get it again, or save it as JPEG or PNG"
        )
    else:
        message = (
            f"damaged or truncated ({type(error).__name__}: {error}); get it again,"
            " or save it again as JPEG or PNG"
        )
    raise ImageError(f"{name}: {message}") from error
