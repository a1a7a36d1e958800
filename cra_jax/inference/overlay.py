"""A picture with what the network looked at drawn on it, for people."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = Sequence[float]

# Anchors of matplotlib's "inferno" above its darkest: lightness rises evenly, so that
# it reads in grey and with any colour vision.
_INFERNO = np.array(
    [[87, 16, 110], [188, 55, 84], [249, 142, 9], [246, 215, 70], [252, 255, 164]],
    np.float64,
)
_OPACITY = 0.75  # of the strongest activation
_SHORT_SIDE_PX = (320, 640)  # pictures are shown within these
_INK, _PAPER, _BAR, _TRACK = (24, 24, 27), (255, 255, 255), (0, 114, 178), (228,) * 3


def heat(activation: np.ndarray) -> np.ndarray:
    """A class activation map as colours to lay over a picture.

    Args:
      activation: ``[h, w]`` of either sign.

    Returns:
      uint8 ``[h, w, 4]``, RGBA: clear where it is 0 or less, strongest at its maximum.
    """
    positive = np.maximum(np.asarray(activation, np.float64), 0)
    share = positive / max(positive.max(), 1e-12)
    place = share * (len(_INFERNO) - 1)
    anchors = np.arange(len(_INFERNO))
    colours = [np.interp(place, anchors, channel) for channel in _INFERNO.T]
    rgba = np.stack([*colours, 255 * _OPACITY * share], -1)
    return np.round(rgba).astype(np.uint8)


def draw(
    picture: np.ndarray,
    *,
    activation: np.ndarray,
    crop_box_px: Box,
    attention_px: np.ndarray | None,
    answer: Sequence[tuple[str, float]],
) -> Image.Image:
    """The picture with activation, crop and attention, the answer below it.

    Args:
      picture: uint8 ``[h, w, 3]``.
      activation: ``[crop, crop]``, at each pixel of the crop.
      crop_box_px: where the crop lies in the picture.
      attention_px: ``[4, 2]`` in the picture; None: there is none.
      answer: names and probabilities, best first.
    """
    height, width = picture.shape[:2]
    short, long = _SHORT_SIDE_PX
    scale = np.clip(min(height, width), short, long) / min(height, width)
    size = round(width * scale), round(height * scale)
    shown = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top, right, bottom = (round(x * scale) for x in crop_box_px)
    colours = Image.fromarray(heat(activation)).resize((right - left, bottom - top))
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
    """Adds a strip of names, bars and percentages."""
    text_px = max(13, round(shown.width / 30))
    font = ImageFont.load_default(text_px)
    row, margin = round(1.9 * text_px), text_px
    strip = row * len(answer) + 2 * margin
    page = Image.new("RGB", (shown.width, shown.height + strip), _PAPER)
    page.paste(shown)
    pen = ImageDraw.Draw(page)
    right = shown.width - margin
    bar = round(0.2 * shown.width)
    number = round(pen.textlength("100.0 %", font=font))
    room = right - number - bar - 2 * margin - margin
    for i, (name, probability) in enumerate(answer):
        y = shown.height + margin + row * i + row // 2
        pen.text((margin, y), _fitted(name, pen, font, room), _INK, font, anchor="lm")
        x, half = right - number - margin - bar, round(0.3 * text_px)
        pen.rectangle((x, y - half, x + bar, y + half), fill=_TRACK)
        pen.rectangle((x, y - half, x + bar * probability, y + half), fill=_BAR)
        pen.text((right, y), f"{100 * probability:.1f} %", _INK, font, anchor="rm")
    return page


def _fitted(name: str, pen: ImageDraw.ImageDraw, font, room_px: float) -> str:
    """A name, cut where it is too long; line breaks are spaces."""
    name = " ".join(name.split())
    if pen.textlength(name, font=font) <= room_px:
        return name
    while name and pen.textlength(name + "...", font=font) > room_px:
        name = name[:-1]
    return name + "..."
