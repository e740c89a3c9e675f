"""What is nobody else's business: keys, passwords and tokens, and addresses that hold them.

They belong into the environment and come into a configuration as ``${oc.env:NAME}``. A run's folder keeps that
expression, the log and the dashboard see ``…``, and what is typed as it is, is refused.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

# names of options; caption_key and tokens are none
NAMED = re.compile(
    r"(^|_)(api_?key|passw(or)?d|secret(_key)?|credentials?|private_key|token|(access|auth)_?(key|token))$",
    re.IGNORECASE,
)
NAMES = r"(?:token|signature|credentials?|secret|passw(?:or)?d|api_?key|access_?key(?:_?id)?)"
# of addresses and commands; the group is what may not be seen
TOLD = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"://([^/@\s:]*:[^/@\s]+)@",
        r"https?://([^/@\s]+)@",
        # from where a word begins, since a long line of dashes would be begun at each of them
        rf"(?<![\w.-])(?:^|(?<=[?&;\s'\"])|[\w.]*-)[\w.-]*{NAMES}=([^&#\s'\"]+)",
        r"[?&](?:sig|key|auth)=([^&#\s'\"]+)",
        r"authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?([^\s'\"]+)",
    )
]
IN_ENVIRONMENT = re.compile(rf"{NAMES}$", re.IGNORECASE)
SHORTEST = 8  # letters of a value that is looked for as such
HIDDEN = "…"
ADVICE = "put it into an environment variable and write ${{oc.env:NAME}} in its place ('{name}=${{oc.env:NAME}}')"


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """Values of the variables that are called so, the longest first."""
    found = {value for name, value in environment.items() if IN_ENVIRONMENT.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def spans(text: str) -> list[tuple[int, int]]:
    """Where secrets stand, from the left; none overlaps another."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(match.span(1) for pattern in TOLD for match in pattern.finditer(text)):
        if found and begin < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def hide(text: str) -> str:
    """``…`` for what an address or a command tells, and for the environment's secrets."""
    for value in secrets_of(os.environ):
        text = text.replace(value, HIDDEN)
    for begin, end in reversed(spans(text)):
        text = text[:begin] + HIDDEN + text[end:]
    return text


def without_secrets(node: Any) -> Any:
    """A configuration with ``…`` in place of secrets."""
    if isinstance(node, Mapping):
        return {
            name: HIDDEN if is_named(name) and is_given(child) else without_secrets(child)
            for name, child in node.items()
        }
    if isinstance(node, list):
        return [without_secrets(child) for child in node]
    return hide(node) if isinstance(node, str) else node


def unresolved_where_secret(resolved: Any, unresolved: Any, name: Any = "") -> Any:
    """The resolved configuration, but each secret as it was written: ``${oc.env:NAME}``."""
    if isinstance(resolved, Mapping) and isinstance(unresolved, Mapping):
        return {key: unresolved_where_secret(child, unresolved[key], key) for key, child in resolved.items()}
    if isinstance(resolved, list) and isinstance(unresolved, list):
        pairs = zip(resolved, unresolved, strict=True)
        return [unresolved_where_secret(child, written, name) for child, written in pairs]
    return unresolved if without_secrets({name: resolved}) != {name: resolved} else resolved


def typed_secrets(node: Any, path: str = "", name: str = "") -> Iterator[str]:
    """Dotted names of the options that hold a secret as it is, no reference to one; ``node`` is not resolved."""
    if isinstance(node, Mapping):
        for key, child in node.items():
            yield from typed_secrets(child, f"{path}.{key}".lstrip("."), str(key))
    elif isinstance(node, list):
        for child in node:
            yield from typed_secrets(child, path, name)
    elif is_typed(name, node):
        yield path


def is_typed(name: str, value: Any) -> bool:
    text = str(value)
    if is_named(name):
        return is_given(value) and not refers(text)
    return isinstance(value, str) and any(not refers(text[begin:end]) for begin, end in spans(text))


def is_named(name: Any) -> bool:
    return NAMED.search(str(name)) is not None


def is_given(value: Any) -> bool:
    return value not in (None, "", HIDDEN, "null") and not isinstance(value, bool | Mapping | list)


def refers(text: str) -> bool:
    """Whether a text is a reference: of the configuration, or of a shell to its environment."""
    return "${" in text or text.lstrip("'\"").startswith(("$", HIDDEN))


def complain_of_typed(names: Iterator[str] | list[str]) -> str | None:
    """What to say of options that hold a secret; the secret itself is not told."""
    found = list(dict.fromkeys(names))
    if not found:
        return None
    return (
        f"{' and '.join(found)} would be written into the run's folder with the secret that it holds: "
        f"{ADVICE.format(name=found[0])}; then only this expression is kept"
    )


class HidesSecrets(logging.Filter):
    """Lets no record through that tells a secret, nor a traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide(record.getMessage()), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = hide("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return True


def guard_logs() -> None:
    """Every handler that there is by now hides secrets."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(each, HidesSecrets) for each in handler.filters):
            handler.addFilter(HidesSecrets())
