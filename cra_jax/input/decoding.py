"""The one decoder: any image file -> upright RGB uint8, resized.

Training, testing and prediction all use this module, so that an image always has the
same pixels. Unusual files:

- EXIF orientation is applied; ICC profiles are not.
- Grey and palette images become RGB. 16-bit grey is scaled, not clipped.
- Transparent pixels show white.
- CMYK JPEGs are read as inverted if they have the Adobe marker, else as stored.
- The first frame of an animation is used.

JPEG draft mode (decoding at a half, a quarter, ...) is not used: on photographs shrunk
threefold it is twice as fast, but moves pixels by 2 levels on average and 100 at worst.
"""

import functools
import io
import os
from typing import NamedTuple, NoReturn

import numpy as np
from PIL import Image, ImageChops

MAX_PIXELS = 89_478_485  # Pillow warns above this, and raises an error above twice this
MAX_ASPECT = 8.0

# Listed, so that Pillow's less strict readers get no file (EPS runs Ghostscript).
_FORMATS = ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF"]

_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)

_ORIENTATION_TAG = 0x0112
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


class Header(NamedTuple):
    """Size and orientation of an image, read without decoding it."""

    width_px: int
    """As stored, before the orientation is applied."""
    height_px: int
    orientation: int
    """EXIF, 1 (upright) to 8."""


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
    name = name or _default_name(path_or_bytes)
    try:
        with _open(path_or_bytes, name) as image:
            return Header(image.width, image.height, _orientation(image))
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        _refuse(name, error)


def _decode(path_or_bytes: PathOrBytes, name: str | None, max_pixels: int):
    name = name or _default_name(path_or_bytes)
    try:
        with _open(path_or_bytes, name) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(
                    f"{name}: {image.width} x {image.height} pixels are more than the"
                    f" limit of {max_pixels:,}; shrink it or raise max_pixels"
                )
            return _upright_rgb(image, name)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # Pillow may raise any error for a damaged file
        _refuse(name, error)


def _open(path_or_bytes: PathOrBytes, name: str) -> Image.Image:
    is_bytes = isinstance(path_or_bytes, bytes)
    if not (path_or_bytes if is_bytes else os.stat(path_or_bytes).st_size):
        raise ImageError(f"{name}: the file is empty; get it again or remove it")
    source = io.BytesIO(path_or_bytes) if is_bytes else path_or_bytes
    return Image.open(source, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats of `_FORMATS` that this build of Pillow reads."""
    Image.init()
    return tuple(f for f in _FORMATS if f in Image.OPEN)


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    image.load()
    orientation = _orientation(image)  # 1 for TIFF, which Pillow has rotated
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):
        raise ImageError(
            f"{name}: its pixels are 32-bit numbers of unknown range; save it with"
            " 8 or 16 bits per channel"
        )
    if image.mode.startswith("I"):  # 16-bit grey
        values = np.asarray(image).astype(np.int32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        # Pillow has inverted an image that was not stored inverted.
        image = ImageChops.invert(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[orientation])
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF" or not ({"exif", "xmp"} & image.info.keys()):
        return 1
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # Pillow may raise any error for damaged EXIF data
        return 1
    return value if value in _UPRIGHT else 1


def _resize(image: Image.Image, short_side_px: int, max_aspect: float) -> np.ndarray:
    if short_side_px < 1:
        raise ValueError(f"short_side_px is {short_side_px}: set it to 1 or more")
    box = kept_region(image.width, image.height, max_aspect=max_aspect)
    width, height = box[2] - box[0], box[3] - box[1]
    scale = short_side_px / min(width, height)
    size = round(width * scale), round(height * scale)
    return np.array(image.resize(size, Image.Resampling.BICUBIC, box=box))


def _default_name(path_or_bytes: PathOrBytes) -> str:
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
    elif isinstance(error, _BOMBS):
        message = f"{error}; shrink the image"
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
