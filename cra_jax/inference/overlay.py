"""Draws class activation, crop, attention and prediction on an image."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cra_jax.runtime import fonts

Box = Sequence[float]

_OPACITY = 0.75  # at the strongest activation
_SHORT_SIDE_PX = (320, 640)  # range of the short side of drawn images
_INK, _PAPER, _BAR, _TRACK = (24, 24, 27), (255, 255, 255), (0, 114, 178), (228,) * 3


def activation_colors(activation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colors of a class activation map.

    The colormap is inferno without its darkest colors. Its lightness rises uniformly,
    so that the map is readable in grey and with any color vision.

    Args:
      activation: ``[h, w]`` of either sign.

    Returns:
      RGB ``[h, w, 3]`` from 0 to 255, and the share ``[h, w]`` of the maximum, which is
      0 where the activation is 0 or less.
    """
    import matplotlib  # here, because predictions without overlays do not need it

    positive = np.maximum(activation, 0)
    share = positive / max(float(positive.max()), 1e-12)
    rgb = matplotlib.colormaps["inferno"](0.1 + 0.9 * share)[..., :3] * 255
    return rgb, share


def color_activation(activation: np.ndarray) -> np.ndarray:
    """Colors a class activation map for an overlay.

    Args:
      activation: ``[h, w]`` of either sign.

    Returns:
      uint8 ``[h, w, 4]``, RGBA: transparent where the activation is 0 or less, most
      opaque at its maximum.
    """
    rgb, share = activation_colors(activation)
    rgba = np.dstack([rgb, 255 * _OPACITY * share])
    return np.round(rgba).astype(np.uint8)


def draw(
    image: np.ndarray,
    *,
    activation: np.ndarray,
    crop_box_px: Box,
    attention_px: np.ndarray | None,
    answer: Sequence[tuple[str, float]],
) -> Image.Image:
    """Draws activation, crop and attention on an image, and the prediction below it.

    Args:
      image: uint8 ``[h, w, 3]``, the image.
      activation: ``[crop, crop]``, at each pixel of the crop.
      crop_box_px: box of the crop in the image.
      attention_px: ``[4, 2]``, corners of the attention in the image; None: no
        attention.
      answer: class names and probabilities, best first.
    """
    height, width = image.shape[:2]
    short, long = _SHORT_SIDE_PX
    scale = np.clip(min(height, width), short, long) / min(height, width)
    size = round(width * scale), round(height * scale)
    shown = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    left, top, right, bottom = (round(x * scale) for x in crop_box_px)
    colours = Image.fromarray(color_activation(activation)).resize(
        (right - left, bottom - top)
    )
    shown.paste(colours, (left, top), colours)
    pen = ImageDraw.Draw(shown)
    line = max(2, round(min(size) / 160))
    if (left, top, right, bottom) != (0, 0, *size):
        pen.rectangle((left, top, right - 1, bottom - 1), outline=_PAPER)
    if attention_px is not None:
        points = [tuple(p) for p in (np.asarray(attention_px) * scale).tolist()]
        ring = [*points, *points[:2]]
        pen.line(ring, fill=_INK, width=3 * line, joint="curve")
        pen.line(ring, fill=_PAPER, width=line, joint="curve")
    return _with_answer(shown, answer)


def _with_answer(shown: Image.Image, answer: Sequence[tuple[str, float]]):
    """Adds a strip with class names, bars and percentages."""
    text_px = max(13, round(shown.width / 30))
    font = ImageFont.truetype(str(fonts.font_files("")[0]), text_px)
    row, margin = round(1.9 * text_px), text_px
    strip = row * len(answer) + 2 * margin
    page = Image.new("RGB", (shown.width, shown.height + strip), _PAPER)
    page.paste(shown)
    pen = ImageDraw.Draw(page)
    right = shown.width - margin
    bar = round(0.2 * shown.width)
    number = round(pen.textlength("100.0 %", font=font))
    name_px = right - number - bar - 2 * margin - margin
    for i, (name, probability) in enumerate(answer):
        y = shown.height + margin + row * i + row // 2
        fitted, name_font = fonts.fit(name, pen, text_px, name_px)
        pen.text((margin, y), fitted, _INK, name_font, anchor="lm")
        x, half = right - number - margin - bar, round(0.3 * text_px)
        pen.rectangle((x, y - half, x + bar, y + half), fill=_TRACK)
        pen.rectangle((x, y - half, x + bar * probability, y + half), fill=_BAR)
        pen.text((right, y), f"{100 * probability:.1f} %", _INK, font, anchor="rm")
    return page
