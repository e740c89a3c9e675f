"""Hydra commands with better error messages: `command` is ``hydra.main``, except for what it prints on an error.

- a misspelled option: Hydra's message and the nearest names, for all of them at once, before a folder is created;
- an error that the user can fix (`explain_failure`): only its message;
- anything else is a bug: its traceback, without Hydra's frames.

Imports only Hydra and the standard library, so that help and error messages appear at once.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from ipa.errors import UserError, brief, causes, explain
from ipa.identity import run_folder
from ipa.launcher import ProcessLauncher, environment, register, this_script
from ipa.overrides import (
    REFUSED,
    VERSION_BASE,
    as_typed,
    check_expanded,
    complaints_about,
    group_options,
    hydra_message,
)
from ipa.ranges import check
from ipa.secrets import guard_logs, hide
from ipa.slurm import SlurmLauncher

CONF = (Path(__file__).parent / "conf").resolve()  # a link in a checkout, a copy in a wheel
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130  # exit codes
HELP_WIDTH = 100
SHOWING = ("--cfg", "-c", "--info", "-i", "dry_run")  # without training

log = logging.getLogger(__name__)

Task = Callable[[DictConfig], Any]


def command(config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Make a function a Hydra command with this configuration of ``conf/``."""

    def decorate(task: Task) -> Callable[[], None]:
        @functools.wraps(task)
        def run() -> None:
            _Command(task, str(CONF), config_name).run()

        return run

    return decorate


class _Command:
    """One run of a command. The meaning of an exception depends on whether the task had started."""

    def __init__(self, task: Task, config_dir: str, config_name: str) -> None:
        self.task = task
        self.config_dir = config_dir
        self.config_name = config_name
        self.show_everything = os.environ.get("HYDRA_FULL_ERROR") == "1"
        self.reached_task = False
        self.failure: Exception | None = None
        self.named: Any = typed_values(sys.argv[1:])

    def run(self) -> None:
        refuse_pickles()
        self.variables = dict(os.environ)
        sweep = register(self.variables, ProcessLauncher, SlurmLauncher)
        with environment({**self.variables, "HYDRA_FULL_ERROR": "1"}):  # Hydra raises exceptions instead of printing
            try:
                check_expanded(sys.argv[1:])
                self._check_sweep()
                hydra.main(self.config_dir, self.config_name, VERSION_BASE)(self._as_hydra_task())()
                if self.failure is not None:
                    raise self.failure
            except Exception as error:
                if self.show_everything:
                    raise
                refusal = None if self.reached_task else refused_folder(error)
                self.reached_task |= refusal is not None
                self._report(refusal or error)
                sys.exit(FAILED if self.reached_task else WRONG_USAGE)
            except KeyboardInterrupt:  # while imports last; later the task has its own handler
                sys.exit(INTERRUPTED)
        sweep.report()
        if sweep.failed:
            sys.exit(FAILED)

    def _check_sweep(self) -> None:
        """Check the overrides of a sweep before Hydra creates its folder."""
        if {"-m", "--multirun"} & set(sys.argv):
            if any(word.partition("=")[0] in SHOWING for word in sys.argv):
                raise UserError("--cfg, --info and dry_run show one run: give one value for each option, and no -m")
            if complaints := complaints_about(sys.argv[1:], self.config_dir, self.config_name, check):
                raise UserError("\n\n".join(complaints))

    def _as_hydra_task(self) -> Task:
        @functools.wraps(self.task)  # Hydra names the job after the file of the wrapped function
        def task(cfg: DictConfig) -> Any:
            self.reached_task = True
            self.named = [self.named, plain(cfg)]
            guard_logs()
            self.show_everything |= HydraConfig.get().runtime.choices.get("debug") is not None
            try:
                check(cfg)
                with environment(self.variables):
                    return self.task(cfg)
            except Exception as error:
                if self.show_everything or HydraConfig.get().mode == RunMode.MULTIRUN:  # one error ends such a sweep
                    raise
                self.failure = error  # Hydra would announce it with all overrides
                return None

        return task

    def _report(self, error: Exception) -> None:
        log.debug("Traceback of the error on the console:", exc_info=error)
        message = explain_failure(error, self.named) if self.reached_task else self._explain_usage(error)
        if message is None:
            trace = self._below_task(error.__traceback__)
            print(hide("".join(traceback.format_exception(error.with_traceback(trace)))), file=sys.stderr, end="")
            print("\nHYDRA_FULL_ERROR=1 shows Hydra's frames as well.", file=sys.stderr)
        else:
            print(f"\n{hide(message)}", file=sys.stderr)

    def _explain_usage(self, error: Exception) -> str | None:
        message = hydra_message(error) if isinstance(error, REFUSED) else explain(error, self.named)
        if message is None:
            return None
        if not isinstance(error, UserError):
            message = "\n\n".join(complaints_about(sys.argv[1:], self.config_dir, self.config_name)) or message
        command = " ".join(["python", *this_script()])
        return f"{message}\n\n`{command} --help` explains the options, `{command} --cfg job` shows all values."

    def _below_task(self, trace: TracebackType | None) -> TracebackType | None:
        """The part of a traceback that starts in the task, without Hydra's frames; all of it if that is missing."""
        part = trace
        while part is not None and part.tb_frame.f_code is not self.task.__code__:
            part = part.tb_next
        return part or trace


def refused_folder(error: Exception) -> UserError | None:
    """What `run_folder` raised, or an error of the system in what Hydra writes before the task starts."""
    if isinstance(error, InterpolationResolutionError):
        return next((cause for cause in causes(error) if isinstance(cause, UserError)), None)
    cause = error.__cause__ if isinstance(error, ValueError) else error  # logging cannot open its file
    if isinstance(cause, OSError) and not isinstance(cause, HydraException):
        return UserError(f"the run's folder cannot be written ({brief(cause)}): give another one")
    return None


def refuse_pickles() -> None:
    """Make torch load only tensors and plain containers, even for libraries that ask for more."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


def typed_values(arguments: Sequence[str]) -> list[str]:
    return [argument.partition("=")[2] or argument for argument in arguments]


def plain(cfg: Any) -> Any:
    """The values of a configuration, resolved if possible."""
    try:
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:
        return OmegaConf.to_container(cfg)


def explain_failure(error: Exception, named: Any = ()) -> str | None:
    """The message for an error that the user can fix; None for a bug, whose traceback is needed.

    Besides `ipa.errors.explain`: a value is missing, refers to nothing, or is refused by a library's class.
    """
    cause: BaseException = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, MissingMandatoryValue | InterpolationResolutionError):
        return str(cause)
    message = explain(cause, named)
    if message is not None or not isinstance(error, InstantiationException):
        return message
    frames = list(traceback.walk_tb(cause.__traceback__))
    package = str(frames[-1][0].f_globals.get("__name__")).partition(".")[0] if frames else None
    refused = isinstance(cause, ValueError) or type(cause).__name__ == "MisconfigurationException"
    # an argument is unknown, or a library's class raised an error of value for it
    return str(error) if package == "hydra" or (refused and package != "ipa") else None


def folder_name(folder: str, limit: int | None = None, num_seeds: int | None = None) -> str:
    """A name for what is evaluated on a folder of images: ``pictures-limit20-seeds4``."""
    parts = {"limit": limit, "seeds": num_seeds}
    return "-".join([Path(str(folder)).resolve().name, *(f"{name}{value}" for name, value in parts.items() if value)])


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def list_choices(group: str) -> str:
    """The choices of a group for the help: ``${choices:recipe}`` → "recipe: demo, sd15, …", wrapped."""
    return _choices_in(group, str(GlobalHydra.instance().config_loader().get_search_path()))


@functools.cache  # Hydra resolves the help in every merge, which took a quarter of composing a configuration
def _choices_in(group: str, search_path: str) -> str:
    """``search_path`` is where Hydra finds the group."""
    words = f"{group}: {', '.join(group_options(group))}"
    return textwrap.fill(words, HELP_WIDTH, subsequent_indent=" " * 8)


def _run_folder(parent: str, name: Any, *, _root_: DictConfig) -> str:
    """For ``hydra.run.dir``, which Hydra reads before it writes anything; chosen once per process."""
    if OmegaConf.select(_root_, "paths.runs") is None:
        raise UserError("paths.runs=null: give a folder for the runs")
    key = (parent, repr(name))
    if key not in _CHOSEN and OmegaConf.select(_root_, "dry_run"):  # Hydra needs a folder, nobody else does
        _CHOSEN[key] = tempfile.mkdtemp(prefix="ipa-dry-run-")
        atexit.register(shutil.rmtree, _CHOSEN[key], ignore_errors=True)
    elif key not in _CHOSEN:
        _CHOSEN[key] = str(run_folder(parent, name, as_typed(_root_.hydra.overrides.task)))
    return _CHOSEN[key]


_CHOSEN: dict[tuple[str, str], str] = {}


OmegaConf.register_new_resolver("choices", list_choices, replace=True)
OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)


# advice to authors of training loops, and deprecations between libraries; `ipa` can act on neither
NOISE = (
    "does not have many workers",
    "have no `validation_step`",
    r"Found \d+ module\(s\) in eval mode",
    "LeafSpec",
    "The `srun` command is available on your system but is not used",
    "`FluxPosEmbed` is deprecated",
)


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars and the warnings in ``NOISE``."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=f".*{message}")
