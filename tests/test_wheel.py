"""The package as others install it: a wheel, in another folder, without the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_commands_work_from_a_wheel(tmp_path: Path) -> None:
    subprocess.run(["uv", "build", "--wheel", "--out-dir", tmp_path, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        scripts = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt"))
    entries = [line.partition(" = ")[2].partition(":")[0] for line in scripts.splitlines() if " = " in line]
    here = tmp_path / "elsewhere"
    here.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}

    assert {"ipa.tools.train", "ipa.tools.sample"} <= set(entries)
    for module in entries:
        done = subprocess.run(
            [sys.executable, "-m", module.removesuffix(".__main__"), "--help"],
            cwd=here,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "=" in done.stdout
    assert not list(here.iterdir())
