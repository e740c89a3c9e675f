"""What a command answers when something was mistyped or cannot be done: one clear message, no traceback.

    @command(config_path="conf", config_name="train")
    def main(cfg: DictConfig) -> None: ...

is ``hydra.main`` with better answers. A misspelt option gets Hydra's own message and the nearest names. An error that
is the user's to mend (a file that is not there, a value that our code refuses) is told in its own words. All else is a
bug and keeps its traceback. Either traceback goes to the log file of the run; ``HYDRA_FULL_ERROR=1`` or
``debug=default`` shows all. A sweep's jobs run in processes of their own (`ipa.launcher`).

Imports only Hydra and the standard library, so that help and answers come at once.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from ipa import launcher
from ipa.errors import UserError
from ipa.identity import run_name
from ipa.secrets import complain_of_typed, guard_logs, hide, typed_secrets

VERSION_BASE = "1.3"
FAILED, WRONG_USAGE = 1, 2  # exit codes
MOST_BYTES, MOST_NODES = 1 << 20, 100_000  # of a configuration file
HELP_WIDTH = 100

log = logging.getLogger(__name__)

Task = Callable[[DictConfig], Any]


def command(config_path: str, config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Make a Hydra command of a function; ``config_path`` counts from the file that the function stands in."""

    def decorate(task: Task) -> Callable[[], None]:
        config_dir = (Path(task.__code__.co_filename).parent / config_path).resolve()

        @functools.wraps(task)
        def run() -> None:
            _Command(task, str(config_dir), config_name).run()

        return run

    return decorate


class _WrongUsage(Exception):
    """What was found wrong with a command line, in words."""


class _Command:
    """One run of a command. It knows whether the task was reached, which decides what an exception means."""

    def __init__(self, task: Task, config_dir: str, config_name: str) -> None:
        self.task = task
        self.config_dir = config_dir
        self.config_name = config_name
        self.full_error = os.environ.get("HYDRA_FULL_ERROR")
        self.show_everything = self.full_error == "1"
        self.reached_task = False

    def run(self) -> None:
        sweep = launcher.register(dict(os.environ))
        refuse_pickles()
        with _full_error("1"):  # Hydra passes exceptions on instead of printing them
            try:
                self._refuse_typed_secrets()
                self._refuse_bad_sweep()
                hydra.main(self.config_dir, self.config_name, VERSION_BASE)(self._as_hydra_task())()
            except Exception as error:
                if self.show_everything:
                    raise
                self._report(error)
                sys.exit(FAILED if self.reached_task else WRONG_USAGE)
        sweep.tell()
        if sweep.failed:
            sys.exit(FAILED)

    def _refuse_typed_secrets(self) -> None:
        """Before Hydra makes the folder of the run, and writes the options into it as they were typed."""
        args = get_args_parser().parse_args(sys.argv[1:])
        for folder in filter(None, (args.config_dir, args.config_path)):
            check_configurations(Path(folder))
        names = [name for override in args.overrides for name in _typed_in(override)]
        names += typed_secrets(_composed(args, self.config_dir, self.config_name))
        if complaint := complain_of_typed(names):
            raise _WrongUsage(complaint)

    def _refuse_bad_sweep(self) -> None:
        """Look at the overrides before Hydra does, which makes the folder of a sweep first."""
        if {"-m", "--multirun"} & set(sys.argv):
            complaints = complaints_about(sys.argv[1:], self.config_dir, self.config_name)
            if complaints:
                raise _WrongUsage("\n\n".join(complaints))

    def _as_hydra_task(self) -> Task:
        @functools.wraps(self.task)  # Hydra names the job after the file of the wrapped function
        def task(cfg: DictConfig) -> Any:
            self.reached_task = True
            guard_logs()
            self.show_everything |= HydraConfig.get().runtime.choices.get("debug") is not None
            with _full_error(self.full_error):  # as the user left it, also for child processes
                return self.task(cfg)

        return task

    def _report(self, error: Exception) -> None:
        log.debug("Where the error on the console came from:", exc_info=error)
        message = explain_failure(error) if self.reached_task else self._explain_usage(error)
        if message is None:
            trace = self._below_task(error.__traceback__)
            print(hide("".join(traceback.format_exception(error.with_traceback(trace)))), file=sys.stderr, end="")
            print("\nHYDRA_FULL_ERROR=1 shows Hydra's frames as well.", file=sys.stderr)
        else:
            print(f"\n{hide(message)}", file=sys.stderr)

    def _explain_usage(self, error: Exception) -> str | None:
        if isinstance(error, _WrongUsage):
            complaints = [str(error)]
        elif isinstance(error, HydraException | OmegaConfBaseException | ValueError | yaml.YAMLError):
            complaints = complaints_about(sys.argv[1:], self.config_dir, self.config_name) or [_hydra_message(error)]
        else:
            return None
        command = f"python {_how_it_was_started()}"
        hint = f"`{command} --help` explains the options, `{command} --cfg job` shows every one with its value."
        return "\n\n".join([*complaints, hint])

    def _below_task(self, trace: TracebackType | None) -> TracebackType | None:
        """The part of a traceback that starts in the task, without Hydra's frames; all of it if that is not there."""
        part = trace
        while part is not None and part.tb_frame.f_code is not self.task.__code__:
            part = part.tb_next
        return part or trace


def refuse_pickles() -> None:
    """Have torch read tensors and plain containers alone, whatever a library asks it for: no pickled code runs."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)


def _typed_in(override: str) -> list[str]:
    """The option of an override that holds a secret as it is, also in what Hydra would not understand."""
    name, _, value = override.partition("=")
    return [name] if list(typed_secrets(value, name, name.rpartition(".")[2])) else []


def _composed(args: Any, config_dir: str, config_name: str) -> Any:
    """The configuration of one run, not resolved; empty where Hydra will have to say why there is none."""
    config_dir = os.path.abspath(args.config_path or config_dir)
    with hydra.initialize_config_dir(config_dir, version_base=VERSION_BASE):
        overrides = [value for each in args.overrides for value in (_each_value(each)[:1] if args.multirun else [each])]
        if args.config_dir:
            overrides.append(f"hydra.searchpath=[{os.path.abspath(args.config_dir)}]")
        try:
            return OmegaConf.to_container(hydra.compose(args.config_name or config_name, overrides), resolve=False)
        except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError):
            return {}


def check_configurations(folder: Path) -> None:
    """Refuse files that a few lines make grow beyond all bounds, as aliases of aliases do; raises _WrongUsage."""
    for path in sorted(folder.rglob("*.yaml")):
        text = path.read_bytes()
        if len(text) > MOST_BYTES or expanded(text) > MOST_NODES:
            raise _WrongUsage(f"{path} is no configuration: it would grow to more than {MOST_NODES:,} values")


def expanded(text: bytes) -> int:
    """How many values the aliases of a YAML file make of it; 0 for what is none, of which Hydra tells."""
    counted: dict[int, int] = {}

    def count(node: Any) -> int:
        if id(node) not in counted:
            counted[id(node)] = MOST_NODES + 1  # while it is counted: what holds itself has no end
            inside = node.value if isinstance(node, yaml.CollectionNode) else []
            counted[id(node)] = 1 + sum(count(each) for child in inside for each in _nodes(child))
        return counted[id(node)]

    try:
        root = yaml.compose(text, yaml.SafeLoader)
        return count(root) if root is not None else 0
    except RecursionError:
        return MOST_NODES + 1
    except (yaml.YAMLError, ValueError):
        return 0


def _nodes(child: Any) -> tuple[Any, ...]:
    return child if isinstance(child, tuple) else (child,)


def _how_it_was_started() -> str:
    """The words after ``python``: a file, or -m and a module's name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.origin == os.path.abspath(sys.argv[0]):
        return f"-m {spec.name.removesuffix('.__main__')}"
    return os.path.relpath(sys.argv[0])


@contextmanager
def _full_error(value: str | None) -> Iterator[None]:
    before = os.environ.pop("HYDRA_FULL_ERROR", None)
    if value is not None:
        os.environ["HYDRA_FULL_ERROR"] = value
    try:
        yield
    finally:
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def explain_failure(error: Exception) -> str | None:
    """The message for an error that the user can fix; None for a bug, whose traceback is wanted.

    Those are ``UserError``, an ``OSError`` at a file that the user named, a value that is missing or refers to nothing,
    and arguments that a class named in the configuration does not take or refuses.
    """
    cause: BaseException = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, UserError | MissingMandatoryValue | InterpolationResolutionError):
        return str(cause)
    if isinstance(cause, OSError) and cause.filename is not None:
        return f"{type(cause).__name__}: {cause}"
    if isinstance(error, InstantiationException) and refused_by_library(cause):
        return str(error)
    return None


def refused_by_library(cause: BaseException) -> bool:
    """Whether a class of a library refused what the configuration gave it."""
    if _raised_in(cause.__traceback__, "hydra"):
        return True
    refused = isinstance(cause, ValueError) or type(cause).__name__ == "MisconfigurationException"
    return refused and not _raised_in(cause.__traceback__, "ipa")


def _raised_in(trace: TracebackType | None, package: str) -> bool:
    """Whether the innermost frame is in this package."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__spec__") or trace.tb_frame.f_globals.get("__name__")
    return str(getattr(name, "name", name)).split(".")[0] == package


def complaints_about(argv: list[str], config_dir: str, config_name: str) -> list[str]:
    """Hydra's message and the nearest names for every override, or value of a sweep, that does not fit the others.

    They are tried one after the other, since Hydra itself stops at the first bad one. Choices of groups come first,
    since they decide which keys there are.
    """
    args = get_args_parser().parse_args(argv)
    config_name = args.config_name or config_name
    complaints: list[str] = []
    accepted: list[str] = []
    with hydra.initialize_config_dir(os.path.abspath(args.config_path or config_dir), version_base=VERSION_BASE):
        for override in sorted(args.overrides, key=_names_no_group):
            fitting = []
            for single in _each_value(override) if args.multirun else [override]:
                try:
                    hydra.compose(config_name, [*accepted, single])
                    fitting.append(single)
                except (HydraException, OmegaConfBaseException, ValueError, yaml.YAMLError) as error:
                    near = _nearest_overrides(single, config_name, accepted)
                    question = f"\nDid you mean {' or '.join(near)}?" if near else ""
                    complaints.append(_hydra_message(error) + question)
            accepted += fitting[:1]
    return complaints


def _hydra_message(error: Exception) -> str:
    message = str(error).split("\nConfig search path:")[0]  # paths of Hydra's own, no help here
    if isinstance(error.__cause__, OmegaConfBaseException):
        message = f"{message}\n{str(error.__cause__).splitlines()[0]}"
    if isinstance(error, InterpolationResolutionError):  # what our own resolver said, without OmegaConf's frame
        message = message.partition(" raised while resolving interpolation: ")[2].split("\n    full_key:")[0] or message
    return message.strip()


def _names_no_group(override: str) -> bool:
    """Sort key: choices of groups first, since they decide which keys there are."""
    key = override.partition("=")[0]
    return not _options(key.lstrip("+~").partition("@")[0])


def _options(group: str) -> list[str]:
    return GlobalHydra.instance().config_loader().get_group_options(group)


def list_choices(group: str) -> str:
    """What a group offers, for the help: ``${choices:recipe}`` → "recipe: demo, sd15, …", wrapped."""
    words = f"{group}: {', '.join(_options(group))}"
    return textwrap.fill(words, HELP_WIDTH, subsequent_indent=" " * 8)


OmegaConf.register_new_resolver("choices", list_choices, replace=True)
OmegaConf.register_new_resolver("run_name", lambda: run_name(os.environ, datetime.now()), use_cache=True, replace=True)


def _each_value(override: str) -> list[str]:
    """``lr=1,2`` → ``lr=1`` and ``lr=2``; no value of a sweep that a plug-in expands; anything else as it is."""
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
    """The override written with existing names in place of the misspelt one, best first."""
    key, equals, value = override.partition("=")
    prefix, key = key[: len(key) - len(key.lstrip("+~"))], key.lstrip("+~")
    options = _options(key.partition("@")[0])
    if options:
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
    inside = {f"{path}.{key}" if path else str(key): value for key, value in node.items() if key != "_target_"}
    return [name for key, value in inside.items() for name in _keys(value, key)]


def nearest(name: str, names: list[str], count: int = 3) -> list[str]:
    """Existing names whose last part resembles that of ``name``, those in the most similar place first."""

    def likeness(other: str) -> tuple[float, float]:
        pairs = zip(name.rpartition(".")[::2], other.rpartition(".")[::2], strict=True)
        place, last = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return last, place

    close = {other: score for other in names if (score := likeness(other))[0] >= 0.6}
    return sorted(close, key=lambda other: -sum(close[other]))[:count]


# advice for the authors of a training loop, and what libraries deprecate in each other; `ipa` can act on none of it
NOISE = (
    "does not have many workers",
    "have no `validation_step`",
    r"Found \d+ module\(s\) in eval mode",
    "LeafSpec",
    "The `srun` command is available on your system but is not used",
)


def quiet_libraries() -> None:
    """Silence the libraries' loading bars and just these messages in a user's console."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=f".*{message}")
