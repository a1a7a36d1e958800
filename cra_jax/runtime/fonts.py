"""Finds fonts for texts in any script, among those of matplotlib and of the system."""

import functools
import unicodedata
from pathlib import Path

from PIL import ImageDraw, ImageFont

from cra_jax.runtime.progress import print_line

_reported: list[str] = []  # the first character that was missing


def drawable(text: str) -> str:
    r"""The text with characters that no font has as `\uXXXX`, on one line.

    Different texts stay different. The first time, a line on standard error says which
    font to install.
    """
    text = " ".join(text.split())
    if not (missing := _missing(text)):
        return text
    _report(sorted(missing)[0])
    shown = [
        ("" if unicodedata.category(c) in ("Cf", "Mn") else _escaped(c))
        if c in missing
        else c
        for c in text
    ]
    return "".join(shown)


def font_files(text: str) -> list[Path]:
    """Files of fonts that together have the most characters of a text, the best first.

    The first is DejaVu Sans, which comes with matplotlib, if it has all of them.
    """
    wanted = {c for c in text if not c.isspace()}
    default = _default()
    if wanted <= _characters(default):
        return [default]
    best = max(_all_fonts(), key=lambda file: len(wanted & _characters(file)))
    chosen = [best]
    left = wanted - _characters(best)
    for file in (default, *_all_fonts()):
        if left & _characters(file):
            chosen.append(file)
            left -= _characters(file)
    return chosen


def families(text: str) -> list[str]:
    """Names of the fonts of `font_files`, for matplotlib, which then knows them."""
    from matplotlib import font_manager

    names = []
    for file in font_files(text):
        known = {font.fname for font in font_manager.fontManager.ttflist}
        if str(file) not in known:
            font_manager.fontManager.addfont(file)
        names.append(font_manager.get_font(str(file)).family_name)
    return names


def fit(
    text: str, pen: ImageDraw.ImageDraw, size_px: int, width_px: float
) -> tuple[str, ImageFont.FreeTypeFont]:
    """A text without line breaks, truncated to `width_px`, and a font to draw it."""
    shown = drawable(text)
    font = ImageFont.truetype(str(font_files(shown)[0]), size_px)
    missing = set(shown) - _characters(font_files(shown)[0]) - {" "}
    shown = "".join(_escaped(c) if c in missing else c for c in shown)
    if pen.textlength(shown, font=font) <= width_px:
        return shown, font
    while shown and pen.textlength(shown + "...", font=font) > width_px:
        shown = shown[:-1]
    return shown + "...", font


def _missing(text: str) -> set[str]:
    found = {c for c in text if not c.isspace()}
    for file in font_files(text):
        found -= _characters(file)
    return found


def _escaped(character: str) -> str:
    return character.encode("ascii", "backslashreplace").decode()


def _report(character: str) -> None:
    if _reported:
        return
    _reported.append(character)
    name = unicodedata.name(character, "unknown")
    print_line(
        f"no installed font has {_escaped(character)} ({name}) of a class name, which "
        "is drawn by its code; install a font with it, such as Noto Sans CJK "
        "(fonts-noto-cjk)"
    )


@functools.cache
def _default() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def _all_fonts() -> tuple[Path, ...]:
    """Upright fonts of normal weight, sans serif first; in the same order each time."""
    from matplotlib import font_manager

    # Not matplotlib's own list, which it makes once: it lacks fonts installed since.
    found = [Path(file) for file in font_manager.findSystemFonts()]
    files = sorted(found, key=lambda file: ("sans" not in file.name.lower(), file))
    return (_default(), *(file for file in files if _is_regular(file)))


def _is_regular(file: Path) -> bool:
    from matplotlib import ft2font

    try:
        style = ft2font.FT2Font(str(file)).style_name
    except (OSError, RuntimeError, ValueError):  # no outlines, or damaged
        return False
    return style in ("Regular", "Book", "Normal", "Roman", "Medium")


@functools.cache
def _characters(file: Path) -> frozenset[str]:
    from matplotlib import ft2font

    return frozenset(map(chr, ft2font.FT2Font(str(file)).get_charmap()))
