"""Hooks of the site: equations become MathML, and nothing external is loaded.

Browsers render MathML themselves, so that a page needs no script and no network.
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex writes for $...$ and $$...$$ in its generic mode.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
_BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)

_TAG = re.compile(r"\\tag\{(.*?)\}")

_LOADED = re.compile(
    r'<(?:script|img|iframe)\b[^>]*\bsrc="https?://[^"]*"'
    r'|<link\b(?![^>]*rel="canonical")[^>]*\bhref="https?://[^"]*"'
)


def on_page_content(content: str, **_: Any) -> str:
    """Replaces the TeX of a page by MathML."""
    content = _INLINE.sub(lambda found: _mathml(found[1], "inline"), content)
    return _BLOCK.sub(lambda found: _equation(found[1]), content)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """Checks that a page loads nothing from another address.

    Raises:
      PluginError: it would; the message has the element.
    """
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} loads an external file: {found[0]}")
    return output


def _equation(tex: str) -> str:
    """An equation on its own line, with the number of its `tag` at the right."""
    tag = _TAG.search(tex)
    number = f"<span>({tag[1]})</span>" if tag else ""
    equation = _mathml(_TAG.sub("", tex), "block")
    return f'<div class="equation"><div>{equation}</div>{number}</div>'


def _mathml(tex: str, display: str) -> str:
    return convert(html.unescape(tex).strip(), display=display)
