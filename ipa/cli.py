"""Hydra commands with better error messages.

    @command("train")
    def main(cfg: DictConfig) -> None: ...

is ``hydra.main``, except for what it prints when something goes wrong:

- a misspelled option: Hydra's message and the nearest names, for all of them at once, before a folder is created;
- an error that the user can fix (`explain_failure`): only its message;
- anything else is a bug: its traceback, without Hydra's frames.

Tracebacks always go to the run's log file. ``HYDRA_FULL_ERROR=1`` or ``debug=default`` prints complete tracebacks.

Imports only Hydra and the standard library, so that help and error messages appear at once.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import shlex
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from ipa.errors import UserError, brief, explain
from ipa.identity import run_folder
from ipa.launcher import ProcessLauncher, environment, register, this_script
from ipa.ranges import check
from ipa.secrets import guard_logs, hide
from ipa.slurm import SlurmLauncher

VERSION_BASE = "1.3"
CONF = (Path(__file__).parent / "conf").resolve()  # a link in a checkout, a copy in a wheel
FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130  # exit codes
HELP_WIDTH = 100
REFUSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, UserError)  # raised for a wrong command line

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
            complaints = complaints_about(sys.argv[1:], self.config_dir, self.config_name)
            if complaints:
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
        message = _hydra_message(error) if isinstance(error, REFUSED) else explain(error, self.named)
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


def check_expanded(arguments: Sequence[str]) -> None:
    """Raise UserError where the shell expanded braces: the last of the values would count, silently."""
    for one, other in pairwise(arguments):
        key, _, value = one.partition("=")
        if key.startswith("data.") and other.startswith(f"{key}=") and other != one:
            raise UserError(
                f"{key} is given twice, {value} and {other.partition('=')[2]}. If these were braces, quote them for "
                f"shell and Hydra: '{key}=\"/data/{{00000..00099}}.tar\"'"
            )


def refused_folder(error: Exception) -> UserError | None:
    """What `run_folder` raised, or an error of the system in what Hydra writes before the task starts."""
    if isinstance(error, InterpolationResolutionError):
        chain: BaseException | None = error
        while chain is not None and not isinstance(chain, UserError):
            chain = chain.__cause__ or chain.__context__
        return chain
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

    These are the errors of `ipa.errors.explain`, and a configuration that cannot be used: a value is missing or refers
    to nothing, or a library's class refuses the arguments that the configuration gives it.
    """
    cause: BaseException = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, MissingMandatoryValue | InterpolationResolutionError):
        return str(cause)
    message = explain(cause, named)
    if message is None and isinstance(error, InstantiationException) and _refused_by_library(cause):
        return str(error)
    return message


def _refused_by_library(cause: BaseException) -> bool:
    """Whether an argument is unknown, or a library's class raised an error of value for it."""
    raised_in = _innermost_package(cause.__traceback__)
    refused = isinstance(cause, ValueError) or type(cause).__name__ == "MisconfigurationException"
    return raised_in == "hydra" or (refused and raised_in != "ipa")


def _innermost_package(trace: TracebackType | None) -> str | None:
    frames = list(traceback.walk_tb(trace))
    return str(frames[-1][0].f_globals.get("__name__")).partition(".")[0] if frames else None


def complaints_about(argv: list[str], config_dir: str, config_name: str) -> list[str]:
    """Hydra's message and the nearest names for every override that does not fit, and every such value of a sweep.

    Hydra stops at the first wrong override, so this tries them one by one. Choices of groups come first, because they
    determine the keys.
    """
    args = get_args_parser().parse_args(argv)
    config_name = args.config_name or config_name
    complaints: list[str] = []
    own = f"file://{os.path.abspath(args.config_dir)}" if args.config_dir else None
    accepted = [f"hydra.searchpath=[{quote_value(own)}]"] if own else []
    with hydra.initialize_config_dir(os.path.abspath(args.config_path or config_dir), version_base=VERSION_BASE):
        for override in sorted(args.overrides, key=lambda override: not _options(_key(override))):
            fitting = []
            for single in _each_value(override) if args.multirun else [override]:
                try:
                    hydra.compose(config_name, [*accepted, single])
                    fitting.append(single)
                except REFUSED as error:
                    complaints.append(
                        _quoting(single) or _hydra_message(error) + _question(single, config_name, accepted)
                    )
            accepted += fitting[:1]
    return complaints


def _quoting(override: str) -> str | None:
    """What to type for a value with characters of Hydra's grammar; None if that is not what is wrong."""
    key, equals, value = override.partition("=")
    quoted = f"{key}={quote_value(value)}"
    if not equals or _parses(override) or not _parses(quoted):
        return None
    return f"{override}: Hydra reads some of these characters as its grammar. Quote the value: {shlex.quote(quoted)}"


def _parses(override: str) -> bool:
    try:
        OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([override])
        return True
    except HydraException:
        return False


def quote_value(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _question(override: str, config_name: str, accepted: list[str]) -> str:
    near = _nearest_overrides(override, config_name, accepted)
    return f"\nDid you mean {' or '.join(near)}?" if near and override not in near else ""


def _hydra_message(error: Exception) -> str:
    message = str(error).split("\nConfig search path:")[0]  # Hydra's own paths
    if isinstance(error.__cause__, OmegaConfBaseException):
        message = f"{message}\n{str(error.__cause__).splitlines()[0]}"
    if isinstance(error, InterpolationResolutionError):  # the message of our resolver, without OmegaConf's frame
        message = message.partition(" raised while resolving interpolation: ")[2].split("\n    full_key:")[0] or message
    return message.strip()


def _key(override: str) -> str:
    """The group or the key that an override sets: ``+data@x=y`` → ``data``."""
    return override.partition("=")[0].lstrip("+~").partition("@")[0]


def folder_name(folder: str, limit: int | None = None, num_seeds: int | None = None) -> str:
    """A name for what is evaluated on a folder of images: ``pictures-limit20-seeds4``."""
    parts = {"limit": limit, "seeds": num_seeds}
    return "-".join([Path(str(folder)).resolve().name, *(f"{name}{value}" for name, value in parts.items() if value)])


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def _options(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group)


def list_choices(group: str) -> str:
    """The choices of a group for the help: ``${choices:recipe}`` → "recipe: demo, sd15, …", wrapped."""
    words = f"{group}: {', '.join(_options(group))}"
    return textwrap.fill(words, HELP_WIDTH, subsequent_indent=" " * 8)


def _run_folder(parent: str, name: Any, *, _root_: DictConfig) -> str:
    """For ``hydra.run.dir``, which Hydra reads before it writes anything; chosen once per process."""
    if OmegaConf.select(_root_, "paths.runs") is None:
        raise UserError("paths.runs=null: give a folder for the runs")
    key = (parent, repr(name))
    if key not in _CHOSEN:
        _CHOSEN[key] = str(run_folder(parent, name, _root_.hydra.overrides.task))
    return _CHOSEN[key]


_CHOSEN: dict[tuple[str, str], str] = {}


OmegaConf.register_new_resolver("choices", list_choices, replace=True)
OmegaConf.register_new_resolver("run_folder", _run_folder, replace=True)


def _each_value(override: str) -> list[str]:
    """``lr=1,2`` → ``lr=1`` and ``lr=2``; nothing for a sweep that a plug-in expands; any other override unchanged."""
    try:
        (parsed,) = OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides([override])
    except HydraException:
        return [override]
    if not parsed.is_sweep_override():
        return [override]
    if not (parsed.is_choice_sweep() or parsed.is_range_sweep()):
        return []
    return [f"{parsed.get_key_element()}={value}" for value in parsed.sweep_string_iterator()]


def _nearest_overrides(override: str, config_name: str, accepted: list[str]) -> list[str]:
    """The override with existing names in place of the misspelled one, best first."""
    key, equals, value = override.partition("=")
    prefix, key = key[: len(key) - len(key.lstrip("+~"))], key.lstrip("+~")
    if options := _options(_key(override)):
        return [f"{prefix}{key}={name}" for name in nearest(value, options)]
    cfg = hydra.compose(config_name, accepted, return_hydra_config=key.startswith("hydra"))
    names = _keys(OmegaConf.to_container(cfg, resolve=False))
    if "." not in key:
        names += GlobalHydra.instance().config_loader().list_groups("")
    return [f"{prefix}{name}{equals}{value}" for name in nearest(key, names)]


def _keys(node: Any, path: str = "") -> list[str]:
    """Dotted names of all values: ``optimizer.lr`` …"""
    if not (isinstance(node, dict) and node):
        return [path]
    inside = {f"{path}.{key}".lstrip("."): value for key, value in node.items() if key != "_target_"}
    return [name for key, value in inside.items() for name in _keys(value, key)]


def nearest(name: str, names: Sequence[str], count: int = 3) -> list[str]:
    """Names whose last part is similar to that of ``name``, those with the most similar path first."""

    def likeness(other: str) -> tuple[float, float]:
        pairs = zip(name.rpartition(".")[::2], other.rpartition(".")[::2], strict=True)
        path, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return last, path

    close = {other: score for other in names if (score := likeness(other))[0] >= 0.6}
    return sorted(close, key=lambda other: -sum(close[other]))[:count]


# advice to authors of training loops, and deprecations between libraries; `ipa` can act on neither
NOISE = (
    "does not have many workers",
    "have no `validation_step`",
    r"Found \d+ module\(s\) in eval mode",
    "LeafSpec",
    "The `srun` command is available on your system but is not used",
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
