"""What a user sees of a run, and what goes to the dashboard."""

import os
import pty
import re
import select
import socket
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Command, Run

from ipa.training.loggers import logged_in

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def listener() -> Iterator[tuple[str, list[str]]]:
    """An address on this machine, and who called there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        calls: list[str] = []

        def answer() -> None:
            while True:
                try:
                    connection, caller = server.accept()
                except OSError:
                    return
                calls.append(str(caller))
                connection.close()

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", calls
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.slow
def test_run_of_a_user_without_login(start: Command, tmp_path: Path, listener: tuple[str, list[str]]) -> None:
    """wandb works offline in the run folder and calls nobody; the console is short and says what came out."""
    address, calls = listener
    process = start(WANDB_BASE_URL=address, HTTPS_PROXY=address, HTTP_PROXY=address, NO_PROXY="")
    output, _ = process.communicate(timeout=300)
    folder = tmp_path / "runs/decoupled_global/x"

    assert process.returncode == 0, output
    assert calls == []
    assert len(list((folder / "wandb").glob("offline-run-*/run-*.wandb"))) == 1
    assert (folder / "summary.json").is_file()
    for expected in ("step 4 of 4  loss 0.", "parameters trained", "samples per second", "scale 0 ", "scale 1 "):
        assert expected in output
    assert f"adapter              {folder}/adapter.safetensors" in output
    assert f"Next: python -m ipa.tools.sample adapter={folder}/adapter.safetensors" in output
    lines = [line for line in output.splitlines() if line]
    assert len(lines) < 25 and len(lines) == len(set(lines)) and "\r" not in output, output
    assert not re.search("warn|deprecat|tip:|eval mode|v_num|it/s", output.lower()), output


def test_terminal_gets_a_bar_with_loss_and_speed_and_the_log_its_lines(
    train_in: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "ipa")
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 120))
    with open(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        train_in(tmp_path / "x", "callbacks.progress.refresh_every_n_steps=1", "data.val=null", "scoring=null")
        terminal.flush()
        shown = ""
        while select.select([reader], [], [], 0)[0]:
            shown += os.read(reader, 1 << 16).decode()
    os.close(reader)

    assert re.search(r"training: .*4/4 .*loss 0\.\d+  samples/s \d+", shown)
    assert [record.levelname for record in caplog.records if record.message.startswith("step 4 of 4")] == ["DEBUG"]


@pytest.mark.parametrize(
    ("host", "server", "expected"),
    [
        ("api.wandb.ai", None, True),
        ("example.org", None, False),
        ("wandb.example.org", "https://wandb.example.org:8080", True),
        ("api.wandb.ai", "https://wandb.example.org", False),
    ],
)
def test_netrc_is_a_login_at_its_host_and_a_key_in_the_environment_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, server: str | None, expected: bool
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    for place in (".netrc", "elsewhere"):
        netrc = tmp_path / place
        netrc.write_text(f"machine {host}\n  login user\n  password {KEY}\n")
        netrc.chmod(0o600)
        if place != ".netrc":
            monkeypatch.setenv("NETRC", str(netrc))
        assert logged_in() == expected
        netrc.write_text("machine\n")
        assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert logged_in()
