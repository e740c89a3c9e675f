"""Programs that fetch a shard: what they write is read as it comes.

    file = Program(["aws", "s3", "cp", "--quiet", "s3://bucket/00000.tar", "-"], name="s3://bucket/00000.tar")

They are started from a list of words, without a shell, so that nothing in a name is a command.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from typing import IO, Any

LEFT_IN_THE_MIDDLE = (-13, 23, 141)  # exit codes of a program, curl or a shell that nobody reads any more
WAIT_S = 60


class Program:
    """``stream`` is what it writes; ``told`` is said to it first, where others cannot see it as they can the words."""

    def __init__(self, words: Sequence[str] | str, name: str, told: str = "", shell: bool = False) -> None:
        self.name = name
        stdin = subprocess.PIPE if told else subprocess.DEVNULL
        try:
            self.process = subprocess.Popen(words, shell=shell, stdin=stdin, stdout=subprocess.PIPE)
        except FileNotFoundError as error:
            raise OSError(f"{name} needs the program {words[0]}, which is not installed") from error
        assert self.process.stdout is not None
        self.stream: IO[bytes] = self.process.stdout
        if self.process.stdin is not None:
            self.process.stdin.write(told.encode())
            self.process.stdin.close()

    def close(self) -> None:
        """Raises OSError if it failed, but not for being left in the middle."""
        if self.stream.closed:
            return
        self.stream.close()
        try:
            code = self.process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        if code not in (0, *LEFT_IN_THE_MIDDLE):
            raise OSError(f"{self.name}: what fetches it failed (exit {code})")


def curl(url: str, headers: Sequence[str] = ()) -> Program:
    """Address and headers are told, since others see a program's words. From https nothing else is gone on to."""
    assert url.isprintable(), "a line break would begin another option"
    secure = ["--proto", "=https"] if url.startswith("https:") else []
    words = ["curl", "--config", "-", "--globoff", "--fail", "--silent", "--location", *secure]
    words += ["--connect-timeout", "30", "--retry", "30", "--retry-delay", "2"]
    lines = [f"{name} = {quoted(value)}" for name, value in [("url", url), *(("header", each) for each in headers)]]
    return Program(words, url, told="\n".join(lines) + "\n")


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def hub_file(url: str) -> Program:
    """``hf://datasets/OWNER/NAME/PATH``, with the user's token if there is one; raises OSError."""
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url

    try:
        place: Any = HfFileSystem().resolve_path(url)
        where = hf_hub_url(
            place.repo_id, place.path_in_repo, repo_type=place.repo_type, revision=getattr(place, "revision", None)
        )
    except (ValueError, NotImplementedError, AttributeError) as error:  # of a bucket nothing is known here
        raise OSError(f"{url}: {error}") from error
    token = get_token()
    return curl(where, [f"Authorization: Bearer {token}"] if token else [])


# a scheme → what fetches its addresses; names are words of their own, but for a ``pipe:``, which is a shell's command
FETCHERS: dict[str, Callable[[str], Program]] = {
    **dict.fromkeys(("https", "http", "ftps", "sftp", "scp"), curl),
    "s3": lambda url: Program(["aws", "s3", "cp", "--quiet", url, "-"], url),
    "gs": lambda url: Program(["gsutil", "cat", url], url),
    "ais": lambda url: Program(["ais", "get", url, "-"], url),
    "hf": hub_file,
    "pipe": lambda command: Program(command.removeprefix("pipe:"), command, shell=True),
}
