"""Self-contained HTML pages: templates, embedded images, axes, number formats."""

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
# Distances between ticks.
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


class Axis(NamedTuple):
    """Axis of a plot of fractions, labelled in percent.

    Attributes:
      low: value at the left end.
      high: value at the right end.
      ticks: values that are labelled.
    """

    low: float
    high: float
    ticks: tuple[float, ...]

    def position(self, value: float) -> str:
        """Distance of a value from the left end, as an SVG length: "12.50%"."""
        share = (value - self.low) / (self.high - self.low)
        return f"{100 * min(max(share, 0), 1):.2f}%"


def axis(values: Iterable[float]) -> Axis:
    """An axis with at most 5 ticks that covers the values and ends at ticks.

    Args:
      values: fractions, such as the ends of intervals; non-finite ones are ignored.
    """
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = max(min(finite), 0.0), min(max(finite), 1.0)
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
    """A fraction in percent: "84.2"; with a sign "+0.5"; None gives a dash."""
    if fraction is None:
        return "\N{EN DASH}"
    text = f"{100 * fraction:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", MINUS)


def p_value(p: float) -> str:
    """A p-value: "0.032" or "< 0.001"."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def duration(seconds: float) -> str:
    """A duration: "2 min 43 s", "3 h 05 min", "2 d 4 h"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    if hours:
        return f"{hours} h {m:02} min"
    return f"{minutes} min {s:02} s" if minutes else f"{s} s"


def data_uri(path: Path) -> str:
    """A file as a data URI."""
    mime_type = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{mime_type};base64,{base64.b64encode(path.read_bytes()).decode()}"


def format_value(value: Any) -> str:
    """The value of a config key: "resnet50", "(0, 0, 0.5, 0)"."""
    if isinstance(value, str):
        return value or '""'
    if isinstance(value, tuple | list):
        return f"({', '.join(map(format_value, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def readable_class_name(name: str) -> str:
    """A class name without its number and underscores: "001.Red_bird" is "Red bird"."""
    return re.sub(r"^\d+\.", "", name).replace("_", " ").strip() or name


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns line up in a terminal."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [x.ljust(width) for x, width in zip(cells, widths, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def breakable(name: str) -> markupsafe.Markup:
    """A config key or path that may wrap after dots, slashes, dashes, underscores."""
    escaped = str(markupsafe.escape(name))
    return markupsafe.Markup(re.sub(r"([._/-])(?=\w)", r"\1<wbr>", escaped))


def render(template: str, **values: Any) -> str:
    """Renders a template of this package; all values are escaped.

    Args:
      template: "report" or "compare".
      **values: values of the names in the template.

    Raises:
      jinja2.UndefinedError: a name in the template has no value.
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
        "format_value": format_value,
        "breakable": breakable,
    }
    return environment.get_template(f"{template}.html.jinja").render(values)
