"""Keep secrets out of files, logs and the dashboard.

The saved configuration keeps ``${oc.env:NAME}`` in place of the value of a secret variable. Logs, console and dashboard
show ``…``, also for credentials in addresses. Imports only the standard library.
"""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any

NAMES = r"(?:token|signature|credentials?|secret|passw(?:or)?d|api_?key|access_?key(?:_?id)?)"
VARIABLE = re.compile(rf"{NAMES}$", re.IGNORECASE)
REFERENCE = re.compile(rf"\$\{{oc\.env:\s*\w*{NAMES}\s*[,}}]", re.IGNORECASE)
# group 1 is shown, the rest is hidden
CREDENTIALS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(://[^/@\s:]*:)[^/@\s]+(?=@)",
        r"(https?://)[^/@\s]+(?=@)",
        rf"([?&](?:[\w.-]*{NAMES}|sig|key|auth)=)[^&#\s'\"]+",
        r"(authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)[^\s'\"]+",
    )
]
MIN_SECRET_LENGTH = 8  # shorter values of variables would match ordinary words
HIDDEN = "…"


def hide(text: str) -> str:
    """The text with ``…`` in place of the environment's secrets and of credentials in addresses."""
    values = [value for name, value in os.environ.items() if VARIABLE.search(name) and len(value) >= MIN_SECRET_LENGTH]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    for pattern in CREDENTIALS:
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text


def without_secrets(node: Any) -> Any:
    """A configuration with all secrets hidden, also texts of options with the name of a secret."""
    if isinstance(node, Mapping):
        return {
            name: HIDDEN if VARIABLE.search(str(name)) and isinstance(child, str) else without_secrets(child)
            for name, child in node.items()
        }
    if isinstance(node, list):
        return [without_secrets(child) for child in node]
    return hide(node) if isinstance(node, str) else node


def unresolved_where_secret(resolved: Any, unresolved: Any, name: Any = "") -> Any:
    """The resolved configuration, but with ``${oc.env:NAME}`` where that is a secret."""
    if isinstance(resolved, Mapping) and isinstance(unresolved, Mapping):
        return {key: unresolved_where_secret(child, unresolved[key], key) for key, child in resolved.items()}
    if isinstance(resolved, list) and isinstance(unresolved, list):
        return [unresolved_where_secret(*pair) for pair in zip(resolved, unresolved, strict=True)]
    is_secret = REFERENCE.search(str(unresolved)) or without_secrets({name: resolved}) != {name: resolved}
    return unresolved if is_secret else resolved


class HidesSecrets(logging.Filter):
    """Hides secrets in messages and tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide(record.getMessage()), None
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = hide("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return True


def guard_logs() -> None:
    """Add the filter to all existing log handlers."""
    for handler in logging.getLogger().handlers:
        if not any(isinstance(each, HidesSecrets) for each in handler.filters):
            handler.addFilter(HidesSecrets())
