"""Pages that need nothing but themselves: templates, images inside, and scales."""

import base64
import math
import mimetypes
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe

MINUS = "\N{MINUS SIGN}"
# Steps between ticks that people can count in.
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


class Axis(NamedTuple):
    """A scale for fractions, drawn in percent.

    Attributes:
      low: its left end.
      high: its right end.
      ticks: where it is labelled.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    def place(self, value: float) -> str:
        """How far to the right a value stands, as CSS and SVG have it: "12.5%"."""
        share = (value - self.low) / (self.high - self.low)
        return f"{100 * min(max(share, 0), 1):.2f}%"


def axis(values: Iterable[float]) -> Axis:
    """A scale of at most 5 ticks that holds the values and ends at ticks.

    Args:
      values: fractions, such as the ends of intervals.
    """
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = max(min(found), 0.0), min(max(found), 1.0)
    for step in _STEPS:
        first = math.floor(low / step + 1e-9)
        last = max(math.ceil(high / step - 1e-9), first + 1)
        if last - first < 5:
            break
    else:
        step, first, last = 0.25, 0, 4
    ticks = tuple(round(i * step, 6) for i in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def percent(fraction: float | None, digits: int = 1, *, sign: bool = False) -> str:
    """A fraction in percent: "84.2"; with a sign "+0.5"; None is a dash."""
    if fraction is None:
        return "\N{EN DASH}"
    text = f"{100 * fraction:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", MINUS)


def p_value(p: float) -> str:
    """A p-value: "0.032", or "< 0.001"."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def duration(seconds: float) -> str:
    """A time for people: "2 min 43 s", "3 h 05 min", "2 d 4 h"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m:02} min"
    return f"{minutes} min {s:02} s" if minutes else f"{s} s"


def data_uri(path: Path) -> str:
    """A file as an address that holds it whole."""
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def plain(value: Any) -> str:
    """A setting as a config file has it, for people: "resnet50", "(0, 0, 0.5, 0)"."""
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, tuple | list):
        return f"({', '.join(map(plain, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def class_words(name: str) -> str:
    """A class name in words: "001.Black_footed" is "Black footed"."""
    return re.sub(r"^\d+\.", "", name).replace("_", " ").strip() or name


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal, too."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [x.ljust(width) for x, width in zip(cells, widths, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def breakable(name: str) -> markupsafe.Markup:
    """A key or a path that may break after its dots, dashes and underscores."""
    escaped = str(markupsafe.escape(name))
    return markupsafe.Markup(re.sub(r"([._/-])(?=\w)", r"\1<wbr>", escaped))


def render(template: str, **values: Any) -> str:
    """Fills a template of this package; whatever is put in is escaped.

    Args:
      template: "report" or "compare".
      **values: what it names; a name that is missing is an error.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "p_value": p_value,
        "plain": plain,
        "breakable": breakable,
    }
    return environment.get_template(f"{template}.html.jinja").render(values)
