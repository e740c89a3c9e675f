"""Errors that a user can fix. Everything else is a bug and keeps its traceback.

Imports only the standard library.
"""

from __future__ import annotations

MAX_MESSAGE_LENGTH = 300


class UserError(ValueError):
    """Raised on purpose for what the user can fix; the message says what was given, what is possible, what to do.

    Every command prints the message without a traceback. Nothing else is reported that way, except an ``OSError`` at a
    file that the user named.
    """


class MissingWeights(UserError):
    """Weights, or a package, that are neither here nor downloadable; the message says what to get and where to put it.

    An evaluation goes on without them: it marks the system as skipped or the metric as missing.
    """


def brief(error: BaseException) -> str:
    """A library's error in one line: its type and the first sentence, shortened (torch's messages can fill a page)."""
    first = next(iter(str(error).splitlines()), "").partition(". ")[0]
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= MAX_MESSAGE_LENGTH else f"{text[:MAX_MESSAGE_LENGTH]} …"
