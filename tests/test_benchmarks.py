"""The benchmarks on tiny parts: that they compare like with like and tell what they found. Nothing is timed here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import tiny_sdxl

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import sample
import startup


@pytest.mark.parametrize("head", sample.HEADS)
@pytest.mark.parametrize("family", [tiny.make_family, tiny_sdxl.make_family])
def test_sampling_with_us_and_with_diffusers_gives_the_same_pictures(head: str, family) -> None:
    model = tiny.shake(tiny.make_model(head=head, family=family()))
    found = sample.compare(model, batch=2, image_px=tiny.IMAGE_PX, steps=2, rounds=1)
    told = sample.in_markdown({"rounds": 1, "results": [{"size": "tiny", "head": head, **found}]})

    assert {name: len(each) for name, each in found["seconds"].items()} == {sample.OURS: 1, sample.THEIRS: 1}
    assert f"| tiny, {head} | 2 | {tiny.IMAGE_PX} | 2 |" in told


def test_pictures_that_are_not_made_alike_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.shake(tiny.make_model())
    stock = sample.stock_pipeline(model)
    tiny.shake(model, seed=2)
    monkeypatch.setattr(sample, "stock_pipeline", lambda model: stock)

    with pytest.raises(AssertionError, match="the pictures differ by"):
        sample.compare(model, batch=1, image_px=tiny.IMAGE_PX, steps=2, rounds=1)


IMPORTS = """\
import time: self [us] | cumulative | imported package
import time:       100 |        100 |     scipy.stats
import time:        20 |        120 |   torchmetrics.functional
import time:         5 |          5 |       scipy.signal
import time:         7 |         12 |     torchmetrics.text
import time:        30 |        162 |   torchmetrics
import time:         1 |        163 | lightning
"""


def test_imports_are_told_by_package_and_by_who_brought_them() -> None:
    packages = startup.by_package(list(startup.read_imports(IMPORTS.splitlines())))

    assert [(each.name, each.modules, each.brought_by) for each in packages] == [
        ("scipy", 2, "torchmetrics.functional"),
        ("torchmetrics", 3, "lightning"),
        ("lightning", 1, ""),
    ]
    assert [round(each.seconds * 1e6) for each in packages] == [105, 57, 1]


def test_a_package_is_used_when_a_function_of_its_files_runs() -> None:
    files = ["/x/site-packages/torch/nn/__init__.py", "/x/site-packages/filelock.py", "/usr/lib/python3/json.py", "~"]

    assert startup.used_packages(files) == {"torch", "filelock"}


def test_startup_is_told() -> None:
    package = {"name": "scipy", "modules": 2, "seconds": 0.5, "brought_by": "torchmetrics", "used": False}
    cheap = {**package, "name": "tqdm", "seconds": 0.001, "used": True}
    found = {"imported_s": [5.0, 7.0, 6.0], "first_step_s": [2.0], "answers_s": {"help": [0.5]}}
    told = startup.in_markdown({**found, "packages": [package, cheap]})

    assert "6.00 | 5.00 – 7.00" in told and "| help | 0.50 |" in told
    assert "| scipy | 2 | 0.50 | `torchmetrics` | no |" in told and "tqdm" not in told
