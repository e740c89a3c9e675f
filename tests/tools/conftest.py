"""Tools as commands of this process."""

from collections.abc import Callable

import pytest


@pytest.fixture
def told(command: Callable[..., str]) -> Callable[..., str]:
    """As ``command``; returns the output, or the message that ends the tool."""

    def run(main: Callable[[], None], *arguments: object, **options: object) -> str:
        try:
            return command(main, *arguments, **options)
        except SystemExit as end:
            return str(end.code)

    return run
