"""A command run in a fork of the test process, which saves the seconds that a new process takes for its imports."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from ipa import cli

ROOT = Path(__file__).resolve().parents[1]


def run(script: Path, *arguments: str, cwd: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """``python script arguments``, with its exit code, stdout and stderr."""
    outputs = [cwd.with_name(f"{cwd.name}.{name}") for name in ("stdout", "stderr")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the threads of torch are idle
        child = os.fork()
    if child == 0:
        _become(script, arguments, cwd, environment, outputs)
    _, status = os.waitpid(child, 0)
    texts = [path.read_text() for path in outputs]
    return subprocess.CompletedProcess([str(script), *arguments], os.waitstatus_to_exitcode(status), *texts)


def _become(
    script: Path, arguments: tuple[str, ...], cwd: Path, environment: Mapping[str, str], outputs: list[Path]
) -> NoReturn:
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    os.environ.clear()
    os.environ.update({"PYTHONPATH": str(ROOT), **environment})
    os.chdir(cwd)
    sys.argv = [str(script), *arguments]
    warnings.resetwarnings()
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    cli._CHOSEN.clear()  # folders of the test's own commands
    code: object = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)
