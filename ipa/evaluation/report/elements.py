"""HTML from Python: text is escaped unless it is ``Html`` already.

element("td", "a < b", class_="number")     # <td class="number">a &lt; b</td>
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

ALONE = ("img", "meta", "br", "input")  # have no content and no end


class Html(str):
    """Text that is HTML."""

    __slots__ = ()


def element(name: str, /, *content: str, **attributes: object) -> Html:
    """``_`` in an attribute's name is -, one at its end is dropped; a value that is None or False leaves it out."""
    told = "".join(attribute(key, value) for key, value in attributes.items())
    inside = join(content)
    return Html(f"<{name}{told}>" if name in ALONE else f"<{name}{told}>{inside}</{name}>")


def attribute(key: str, value: object) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def join(parts: Iterable[str]) -> Html:
    return Html("".join(part if isinstance(part, Html) else escape(part, quote=False) for part in parts))
