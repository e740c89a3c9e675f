"""Secrets of the environment are in no file of a run and not on the console."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import Command, World, write_shard

from ipa.secrets import HIDDEN, HidesSecrets, hide, unresolved_where_secret, without_secrets

TOKENS = {
    "DATA_TOKEN": "canary-of-the-data-1234",
    "HF_TOKEN": "hf_canaryOfTheHub5678",
    "WANDB_API_KEY": "c0ffee" * 6 + "c0ff",
    "AWS_ACCESS_KEY_ID": "AKIACANARY9012",
    "AWS_SECRET_ACCESS_KEY": "canary/of+the/bucket3456",
}


def leaks(folder: Path) -> list[str]:
    """Every place in the files of a folder that holds a secret."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            found += [f"{path}: {name}" for name, value in TOKENS.items() if value.encode() in content]
    return found


@pytest.fixture
def addresses(world: World, tmp_path: Path) -> str:
    """Shards whose addresses have a token in them; the last is broken, which the log tells."""
    broken = write_shard(tmp_path / "data" / "broken.tar", [("a.txt", b"a")])
    broken.write_bytes(broken.read_bytes()[:700])
    shards = [*sorted(Path(world.train).glob("*.tar")), broken]
    return ",".join(f"'file://{shard}?token=${{oc.env:DATA_TOKEN}}'" for shard in shards)


@pytest.mark.slow
def test_no_file_of_a_run_holds_a_secret_and_the_run_goes_on(start: Command, tmp_path: Path, addresses: str) -> None:
    folder = tmp_path / "runs/decoupled_global/x"
    for steps in (2, 3):
        asked = [f"data.train=[{addresses}]", f"trainer.max_steps={steps}", "scoring=null", "preview.num_prompts=1"]
        process = start(*asked, WANDB_MODE="offline", **TOKENS)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert [name for name, value in TOKENS.items() if value in output] == []
        assert " stays " not in output

    assert f"broken.tar?token={HIDDEN}" in output
    assert leaks(tmp_path / "runs") == []
    assert "?token=${oc.env:DATA_TOKEN}" in (folder / "config.yaml").read_text()
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))


def test_what_is_hidden_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "0123456789")
    for text, shown in {
        "https://me:word@host/0.tar": "https://…@host/0.tar",
        "https://host/0.tar?a=1&sig=abc&b=2": "https://host/0.tar?a=1&sig=…&b=2",
        "it holds 0123456789": "it holds …",
        "pipe:curl -H 'Authorization: Bearer abc' https://host": "pipe:curl -H 'Authorization: Bearer …' https://host",
        "s3://bucket/a@b.tar": "s3://bucket/a@b.tar",
        "sftp://me@host/0.tar": "sftp://me@host/0.tar",
        "tokens=global key=json.a": "tokens=global key=json.a",
    }.items():
        assert hide(text) == shown
    for text in ("-" * 100_000, "?" + "a-" * 50_000, "&a.b" * 30_000):  # a long line is searched at once
        assert hide(text) == text and hide(f"{text}?token=abc") == f"{text}?token={HIDDEN}"


def test_only_a_secret_stays_an_expression(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K_TOKEN", "0123456789")
    pairs: dict[str, tuple[Any, Any]] = {  # as written, as resolved
        "a": ("${oc.env:HOME}", "/home/me"),
        "key": ("json.x", "json.x"),
        "train": (["https://h/0.tar?part=${oc.env:T_SECRET,x}"], ["https://h/0.tar?part=short"]),
        "address": ("${b}?token=abc", "https://h/0.tar?token=abc"),
        "key_by_reference": ("${k}", "0123456789"),
        "api_key": ("${short}", "123"),
    }
    written, resolved = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))

    assert unresolved_where_secret(resolved, written) == {**written, "a": "/home/me"}
    assert without_secrets(resolved)["key_by_reference"] == HIDDEN


def test_a_traceback_in_the_log_hides_them_too(caplog: pytest.LogCaptureFixture) -> None:
    record = logging.LogRecord("ipa", logging.ERROR, "x.py", 1, "lost %s", ("https://a:b@host",), None)
    try:
        raise ValueError("https://host?token=abc")
    except ValueError as error:
        record.exc_info = (ValueError, error, error.__traceback__)
    assert HidesSecrets().filter(record)
    assert "token=…" in str(record.exc_text) and logging.Formatter().format(record).count(HIDDEN) >= 2
    assert "abc" not in logging.Formatter().format(record) and "a:b" not in logging.Formatter().format(record)
