"""A shard's name → an open stream of bytes, by ``webdataset.gopen``.

Local files and ``file:``, ``gs:``, ``ais:`` and ``pipe:`` are opened as WebDataset does. Three openers are registered
here: ``s3:``, which WebDataset lacks; ``hf:``, whose own opener needs a token even for public data; and curl, to which
WebDataset passes the URL as an argument, so other users could read a token in the process list, and curl would expand
brackets. Only ``pipe:`` runs a shell.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from typing import IO, Any, cast
from urllib.parse import urlparse
from urllib.request import url2pathname

from webdataset.gopen import Pipe, gopen, gopen_schemes

from ipa.data.shards.names import REMOTE

READER_LEFT = [-13, 23, 141]  # exit codes of a program, curl and a shell after their reader closed the pipe
EXIT_TIMEOUT_S = 60


def open_shard(shard: str) -> IO[bytes]:
    """Raises OSError. Close it with ``close_shard``."""
    try:
        if not REMOTE.match(shard) or shard.startswith("file:"):
            shard = url2pathname(urlparse(shard).path) if REMOTE.match(shard) else os.path.abspath(shard)
            if os.path.exists(shard) and not os.path.isfile(shard):
                raise OSError("it is no regular file")  # reading a named pipe may never end
        return cast(IO[bytes], gopen(shard))
    except ValueError as error:
        raise OSError(f"{error}") from error


def bytes_of(file: IO[bytes]) -> IO[bytes]:
    """The program's own output: the ``read`` of WebDataset's pipe drops what a program wrote before it failed."""
    return getattr(file, "stream", file)


def close_shard(file: IO[bytes] | None) -> None:
    """Raises OSError if the program that fetched the shard failed; not if it was left before its end."""
    if not isinstance(file, Pipe):
        return file.close() if file is not None else None
    file.timeout, file.ignore_status = EXIT_TIMEOUT_S, [0, *READER_LEFT]
    try:
        file.close()
    except subprocess.TimeoutExpired as error:
        file.proc.kill()
        raise OSError(f"{error.cmd} does not end") from error


def open_program(words: Sequence[str], bufsize: int, standard_input: str = "") -> Pipe:
    """A program's output; it reads ``standard_input``, which is not in the process list."""
    pipe = Pipe(words, mode="rb", bufsize=bufsize, stdin=subprocess.PIPE)
    pipe.proc.stdin.write(standard_input.encode())
    pipe.proc.stdin.close()
    return pipe


def open_curl(url: str, mode: str, bufsize: int, headers: Sequence[str] = ()) -> Pipe:
    """An https URL is redirected to https only."""
    assert url.isprintable(), "a line break would begin another option"
    secure = ["--proto", "=https"] if url.startswith("https:") else []
    words = ["curl", "--config", "-", "--globoff", "--fail", "--silent", "--location", *secure]
    words += ["--connect-timeout", "30", "--retry", "30", "--retry-delay", "2"]
    values = [("url", url), *(("header", header) for header in headers)]
    escaped = [(name, value.replace("\\", "\\\\").replace('"', '\\"')) for name, value in values]
    return open_program(words, bufsize, "".join(f'{name} = "{value}"\n' for name, value in escaped))


def open_hf(url: str, mode: str, bufsize: int) -> Pipe:
    """``hf://datasets/OWNER/NAME/PATH``, with the user's token if there is one; raises OSError."""
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url

    try:
        found: Any = HfFileSystem().resolve_path(url)
        revision = getattr(found, "revision", None)
        where = hf_hub_url(found.repo_id, found.path_in_repo, repo_type=found.repo_type, revision=revision)
    except (ValueError, NotImplementedError, AttributeError) as error:  # a bucket has no repository
        raise OSError(f"{url}: {error}") from error
    token = get_token()
    return open_curl(where, mode, bufsize, [f"Authorization: Bearer {token}"] if token else [])


gopen_schemes.update(dict.fromkeys(("https", "http", "ftps", "sftp", "scp"), open_curl), hf=open_hf)
gopen_schemes["s3"] = lambda url, mode, bufsize: open_program(["aws", "s3", "cp", "--quiet", url, "-"], bufsize)
