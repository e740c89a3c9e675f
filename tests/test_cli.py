"""What `python train.py` answers before anything heavy is loaded, and how it tells errors.

The commands run as a user runs them, in a process of their own, from another folder than the repository's.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue

from ipa.cli import explain_failure, nearest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "lightning", "diffusers", "transformers", "open_clip", "webdataset", "wandb", "numpy", "PIL"}


@pytest.fixture
def python(tmp_path: Path):
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        variables = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", **environment}
        return subprocess.run(
            command, cwd=tmp_path, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )

    return run


@pytest.fixture
def train(python):
    return lambda *arguments, **environment: python(str(ROOT / "train.py"), *arguments, **environment)


def test_help_reads_like_documentation(train) -> None:
    result = train("--help")

    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Train an IP-Adapter")
    for expected in (
        "python train.py experiment=decoupled_global\n",
        "experiment: decoupled_fine_grained, decoupled_global, simple_fine_grained, simple_global",
        "recipe: demo",
        "optimizer.lr=",
        "seed=1",
        "runs/<experiment>/<name>/",
    ):
        assert expected in result.stdout
    assert "${" not in result.stdout
    assert "$APP" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_help_tells_the_values_of_this_command_line(train) -> None:
    assert "optimizer.lr=0.5\n" in train("optimizer.lr=0.5", "--help").stdout


def test_cfg_job_shows_the_configuration(train) -> None:
    result = train("--cfg", "job", "seed=7")

    assert result.returncode == 0, result.stderr
    assert "seed: 7\n" in result.stdout
    assert "optimizer:\n" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["optimzer.lr=1"]], ids=" ".join)
def test_answers_load_nothing_heavy(python, arguments: list[str]) -> None:
    result = python("-X", "importtime", str(ROOT / "train.py"), *arguments)
    imported = {
        line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")
    }

    assert "hydra.main" in imported  # the list is read correctly
    assert not HEAVY & imported


@pytest.mark.parametrize(
    ("misspelt", "hydra_says", "suggested"),
    [
        ("optimzer.lr=1", "Could not override 'optimzer.lr'", "optimizer.lr=1"),
        ("optimizer.lrr=1", "Key 'lrr' is not in struct", "optimizer.lr=1"),
        ("lr=1", "Could not override 'lr'", "optimizer.lr=1"),
        ("sed=1", "Could not override 'sed'", "seed=1"),
        ("experiment=decoupled_globl", "Available options in 'experiment'", "experiment=decoupled_global"),
        ("experimnt=decoupled_global", "Could not override 'experimnt'", "experiment=decoupled_global"),
        ("tokns=global", "Could not override 'tokns'", "tokens=global"),
        ("~encodr", "Could not delete from config", "~encoder"),
        ("hydra.run.dri=x", "Could not override 'hydra.run.dri'", "hydra.run.dir=x"),
    ],
)
def test_misspelt_option_gets_hydras_message_and_the_nearest_name(
    train, tmp_path: Path, misspelt: str, hydra_says: str, suggested: str
) -> None:
    result = train(misspelt)

    assert result.returncode == 2
    assert hydra_says in result.stderr
    assert re.search(rf"Did you mean ([^?]* or )?{re.escape(suggested)}( or [^?]*)?\?", result.stderr)
    assert "--help" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["warp_factor=9"], "+warp_factor=9"),
        (["optimizer"], "Error parsing override 'optimizer'"),
        (["seed=1,2"], "add --multirun"),
        (["--config-name", "trian"], "trian"),
    ],
    ids=" ".join,
)
def test_other_wrong_usage_gets_hydras_message(train, tmp_path: Path, arguments: list[str], expected: str) -> None:
    result = train(*arguments)

    assert result.returncode == 2
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_all_misspelt_options_are_told_together(train) -> None:
    result = train("optimzer.lr=1", "seed=3", "optimizer.wieght_decay=0")

    assert "Did you mean optimizer.lr=1" in result.stderr
    assert "Did you mean optimizer.weight_decay=0" in result.stderr
    assert "'seed'" not in result.stderr


def test_choice_of_a_group_counts_before_its_keys(train) -> None:
    """Only what is really wrong is told, in whatever order the options come."""
    result = train("hydra.job_logging.version=1", "hydra/job_logging=default", "optimzer.lr=1")

    assert result.stderr.count("Could not override") == 1


def test_sweep_with_a_misspelt_value_leaves_no_folder(train, tmp_path: Path) -> None:
    result = train("-m", "experiment=decoupled_global,decoupled_globl", "seed=1,2")

    assert result.returncode == 2
    assert "Did you mean experiment=decoupled_global" in result.stderr
    assert list(tmp_path.iterdir()) == []


COMMAND = """
from ipa.cli import command

@command(config_path={conf!r}, config_name="train")
def main(cfg):
    import os
    from {module} import {function}
    print("the task sees", os.environ.get("HYDRA_FULL_ERROR"))
    {function}({argument})

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def failing(python, tmp_path: Path):
    """A command whose task calls a function of the standard library."""

    def run(module: str, function: str, argument: str, *options: str, **environment: str):
        script = tmp_path / "fail.py"
        script.write_text(COMMAND.format(conf=str(ROOT / "conf"), module=module, function=function, argument=argument))
        return python(str(script), "name=x", *options, **environment)

    return run


def test_missing_file_is_told_without_traceback(failing, tmp_path: Path) -> None:
    result = failing("builtins", "open", "'nowhere.tar'")

    assert result.returncode == 1
    assert "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.tar'" in result.stderr
    assert "Traceback" not in result.stderr
    log_file = tmp_path / "runs/decoupled_global/x/fail.log"
    assert "Traceback" in log_file.read_text()


def test_bug_keeps_its_traceback_without_hydras_frames(failing) -> None:
    result = failing("json", "loads", "'{'")  # a ValueError too, but not one that our code raised

    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "JSONDecodeError" in result.stderr
    assert "run_job" not in result.stderr


@pytest.mark.parametrize(
    ("options", "environment"), [([], {"HYDRA_FULL_ERROR": "1"}), (["debug=default"], {})], ids=["variable", "debug"]
)
def test_whole_traceback_on_demand(failing, options: list[str], environment: dict[str, str]) -> None:
    result = failing("builtins", "open", "'nowhere.tar'", *options, **environment)

    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "run_job" in result.stderr


def test_task_sees_the_environment_as_the_user_left_it(failing) -> None:
    assert "the task sees None\n" in failing("builtins", "int", "'1'").stdout


def raised_in(module: str, error: Exception) -> Exception:
    """The error as it comes out of a function of this module."""
    namespace = {"__name__": module, "error": error}
    exec("def refuse():\n    raise error", namespace)
    with pytest.raises(type(error)) as caught:
        namespace["refuse"]()
    return caught.value


def test_value_error_is_the_users_only_when_our_code_raised_it() -> None:
    assert explain_failure(raised_in("ipa.data.shards", ValueError("no shards in x"))) == "no shards in x"
    assert explain_failure(raised_in("torch.nn", ValueError("internal"))) is None
    assert explain_failure(raised_in("ipadic", ValueError("internal"))) is None
    assert explain_failure(raised_in("ipa.model", TypeError("a bug"))) is None


def test_error_inside_a_constructor_is_told_in_its_own_words() -> None:
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "builtins.open", "file": "nowhere.tar"})

    assert explain_failure(caught.value) == "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.tar'"


def test_argument_that_a_constructor_does_not_take_is_told_with_its_key() -> None:
    with pytest.raises(InstantiationException) as caught:
        instantiate({"part": {"_target_": "collections.Counter"}, "other": {"_target_": "pathlib.PurePath", "lrr": 1}})

    assert "lrr" in explain_failure(caught.value)
    assert "full_key: other" in explain_failure(caught.value)


def test_bug_inside_a_constructor_keeps_its_traceback() -> None:
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "json.loads", "s": 3})

    assert explain_failure(caught.value) is None


def test_missing_value_is_the_users() -> None:
    with pytest.raises(MissingMandatoryValue) as caught:
        _ = OmegaConf.create({"adapter": "???"}).adapter

    assert "adapter" in explain_failure(caught.value)


def test_nearest() -> None:
    names = ["optimizer.lr", "optimizer.eps", "trainer.max_steps", "data.batch_size", "seed"]

    assert nearest("optimizer.lrr", names) == ["optimizer.lr"]
    assert nearest("batch_size", names) == ["data.batch_size"]
    assert nearest("trainer.batchsize", names)[0] == "data.batch_size"
    assert nearest("warp_factor", names) == []
