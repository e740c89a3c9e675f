"""What the commands print before anything heavy is loaded, and how they report errors."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from ipa.cli import explain_failure
from ipa.files import write_json

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "lightning", "diffusers", "transformers", "open_clip", "webdataset", "wandb", "numpy", "PIL"}


@pytest.fixture
def train(tmp_path: Path):
    """``python train.py`` in an empty folder."""
    (tmp_path / "here").mkdir()
    return lambda *arguments, **environment: forked.run(
        ROOT / "train.py", *arguments, cwd=tmp_path / "here", environment=environment
    )


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "here"


def test_help_explains_the_options_with_their_values(train) -> None:
    result = train("--help", "optimizer.lr=0.5")

    assert result.returncode == 0, result.stderr
    for expected in ("experiment: decoupled_fine_grained, ", "recipe: demo", "optimizer.lr=0.5\n", "seed=1"):
        assert expected in result.stdout
    assert "data: cache, demo, shards\n" in result.stdout  # not the parts that these share
    assert "${" not in result.stdout and "$APP" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--cfg", "job", "seed=7"], "seed: 7\n"), (["optimzer.lr=1"], "Did you mean optimizer.lr=1?")],
    ids=["configuration", "misspelled"],
)
def test_nothing_heavy_is_loaded_to_answer(tmp_path: Path, arguments: list[str], expected: str) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / "train.py"), *arguments]
    variables = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }

    assert expected in result.stdout + result.stderr
    assert "hydra.main" in imported  # the list is read correctly
    assert not HEAVY & imported


MISSPELLED = {
    "optimizer.lrr=1": ("Key 'lrr' is not in struct", "optimizer.lr=1"),
    "lr=1": ("Could not override 'lr'", "optimizer.lr=1"),
    "experiment=decoupled_globl": ("Available options in 'experiment'", "experiment=decoupled_global"),
    "experimnt=decoupled_global": ("Could not override 'experimnt'", "experiment=decoupled_global"),
    "~encodr": ("Could not delete from config", "~encoder"),
    "hydra.run.dri=x": ("Could not override 'hydra.run.dri'", "hydra.run.dir=x"),
}


def test_misspelled_options_get_hydras_messages_and_the_nearest_names(train, here: Path) -> None:
    """All together, and nothing else: choices of groups count before keys, in whatever order they come."""
    result = train(*MISSPELLED, "hydra.job_logging.version=1", "hydra/job_logging=default", "seed=3")

    assert result.returncode == 2
    for hydra_says, suggested in MISSPELLED.values():
        assert hydra_says in result.stderr
        assert re.search(rf"Did you mean ([^?]* or )?{re.escape(suggested)}( or [^?]*)?\?", result.stderr)
    assert result.stderr.count("Did you mean") == len(MISSPELLED)
    assert "job_logging" not in result.stderr
    assert "--help" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["warp_factor=9"], "+warp_factor=9"),
        (["optimizer"], "Error parsing override 'optimizer'"),
        (["seed=1,2"], "add --multirun"),
        (["--config-name", "trian"], "trian"),
        (["data.train=/bücher/{0..9}.tar"], """Quote the value: 'data.train="/bücher/{0..9}.tar"'"""),
        (["-m", "data.train=/a(1)", "seed=1,2"], """'data.train="/a(1)"'"""),
        (["data.train=/data/0.tar", "data.train=/data/1.tar"], "data.train is given twice"),  # by the shell's braces
        (["-m", "experiment=decoupled_global,decoupled_globl", "seed=1,2"], "experiment=decoupled_global"),
        (["-m", "seed=-1,2"], "seed=-1: give an integer at least 0"),
        (["-m", "seed=1,2", "--cfg", "job"], "--cfg, --info and dry_run show one run"),
    ],
    ids=" ".join,
)
def test_other_wrong_usage_gets_hydras_message(train, here: Path, arguments: list[str], expected: str) -> None:
    result = train(*arguments)

    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert list(here.iterdir()) == []


COMMAND = """
import os, sys
from ipa.cli import command

@command("train")
def main(cfg):
    print("the task sees", os.environ.get("HYDRA_FULL_ERROR"))
    BODY

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def task(here: Path):
    """Run a command with this body of the task."""

    def run(body: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        here.mkdir(exist_ok=True)
        script = here.with_name("fail.py")
        script.write_text(COMMAND.replace("BODY", body))
        return forked.run(script, "name=x", *options, cwd=here, environment=environment)

    return run


@pytest.mark.parametrize(
    ("body", "options", "message"),
    [
        ("from ipa.errors import UserError; raise UserError('give another')", [], "give another"),
        ("open(cfg.paths.run + '/nowhere/a')", [], "FileNotFoundError: "),  # named by the configuration
    ],
)
def test_errors_that_the_user_can_fix_are_one_message(
    task, here: Path, body: str, options: list[str], message: str
) -> None:
    result = task(body, *options)

    assert result.returncode == 1
    assert result.stdout == "the task sees None\n"  # the environment is as the user left it
    assert "Error executing job" not in result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert "Traceback" in (here / "runs/decoupled_global/x/fail.log").read_text()


def test_a_bug_keeps_its_traceback_without_hydras_frames_and_secrets(task) -> None:
    result = task("raise ValueError(os.environ['MY_TOKEN'])", MY_TOKEN="0123456789")

    assert result.returncode == 1
    assert "Traceback" in result.stderr and "ValueError: …" in result.stderr
    assert "run_job" not in result.stderr and "0123456789" not in result.stdout + result.stderr


@pytest.mark.parametrize(
    "fail",
    [
        lambda: list(zip([1], [], strict=True)),
        lambda: write_json(Path("a"), {"a": {1}}),  # type: ignore[dict-item]
        lambda: os.stat("/nowhere/torch_compile/a"),  # a file that is not named
        lambda: json.loads("{"),
    ],
)
def test_what_is_no_error_of_the_user_has_no_message(fail: Callable[[], object]) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        fail()
    assert explain_failure(caught.value, ["/data/shards"]) is None


@pytest.mark.parametrize(
    ("options", "environment"), [([], {"HYDRA_FULL_ERROR": "1"}), (["debug=default"], {})], ids=["variable", "debug"]
)
def test_complete_traceback_on_demand(task, options: list[str], environment: dict[str, str]) -> None:
    result = task("raise ValueError", *options, **environment)

    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "run_job" in result.stderr


def test_ctrl_c_while_libraries_are_imported_prints_nothing(task) -> None:
    result = task("raise KeyboardInterrupt")

    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["name=../x"], "name=../x: give the name of a folder in runs/decoupled_global"),
        (["hydra.run.dir=/proc/x"], "cannot be written"),
        (["hydra.run.dir=.", "hydra.job.name=here/.."], "cannot be written"),  # the log file is a folder
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(train, options: list[str], message: str) -> None:
    result = train(*options)

    assert result.returncode == 1 and message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def refused(node: dict) -> str | None:
    with pytest.raises(InstantiationException) as caught:
        instantiate(node)
    return explain_failure(caught.value, ["nowhere.tar"])


def test_errors_in_constructors() -> None:
    message = refused({"_target_": "builtins.open", "file": "nowhere.tar"})
    assert message == "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.tar'"
    message = refused(
        {"part": {"_target_": "collections.Counter"}, "other": {"_target_": "pathlib.PurePath", "lrr": 1}}
    )
    assert message is not None and "lrr" in message and "full_key: other" in message
    assert refused({"_target_": "json.loads", "s": 3}) is None  # a bug
    with pytest.raises(MissingMandatoryValue) as missing:
        _ = OmegaConf.create({"adapter": "???"}).adapter
    assert "adapter" in str(explain_failure(missing.value))


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("data/a/0.tar", ["data"]),
        ("data/0.tar", {"data": {"train": ["data/0.tar"]}}),
        ("data/a", ["file:data"]),
        (b"data/a", [1, None, "data/../data"]),
    ],
)
def test_a_file_is_named_by_itself_or_by_a_folder_above_it(file: str | bytes, named: object) -> None:
    error = PermissionError(13, "Permission denied", file)

    assert explain_failure(error, named) == f"PermissionError: {error}"
    for others in ([], ["other"], ["."], ["/", ""], ["dat"], ["data/0.tarx"]):
        assert explain_failure(error, others) is None
    assert explain_failure(OSError("without a file"), named) is None
    assert explain_failure(OSError("no weights in data/a/vae."), ["data"]) == "OSError: no weights in data/a/vae."
