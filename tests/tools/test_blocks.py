"""`python -m ipa.tools.blocks`: the presets of a base, and what its blocks carry."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
from PIL import Image

from ipa.evaluation.blocks import ALL, NONE, Measure, pixels_of, selections, sweep
from ipa.metrics.edges import EdgeOverlap
from ipa.prompter import Prompter
from ipa.references import Item, Reference
from ipa.tools.blocks import main

Blocks = Callable[..., str]
BLOCK = "up_blocks.1.attentions.0"


@pytest.fixture
def blocks(command: Callable[..., str]) -> Blocks:
    return partial(command, main)


@pytest.fixture
def base(base_folder: Path, tmp_path: Path) -> Path:
    """With a preset of its own."""
    folder = Path(shutil.copytree(base_folder, tmp_path / "base"))
    (folder / "presets.yaml").write_text(f"mine: {{{BLOCK}: 0.5}}\n")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "ab":
        Image.effect_noise((24, 24), 80).convert("RGB").save(folder / f"{name}.png")
    return folder


def test_blocks_and_presets_are_printed(blocks: Blocks, base: Path) -> None:
    lines = blocks(base=base).splitlines()
    names = [line.split()[1] for line in lines if line[:3].strip().isdigit()]

    assert BLOCK in names and len(names) == 11
    (mine,) = (line.split()[1:] for line in lines if line.startswith("mine"))
    assert [float(each) for each in mine] == [0.5 if name == BLOCK else 0 for name in names]


def test_each_block_is_measured_and_the_presets_given(
    blocks: Blocks, base: Path, pictures: Path, clip_name: str, tmp_path: Path
) -> None:
    parts = {"base": str(base), "encoder": clip_name, "sampling_num_steps": "1"}
    tiny.write_adapter(tmp_path / "adapter.safetensors", parts)
    given = {"adapter": tmp_path / "adapter.safetensors", "judge": clip_name, "judge_weights": "null"}
    out = blocks(**given, images=pictures, text="[cat,a dog]", presets="mine", out=tmp_path / "table.md")
    rows = [line.strip("| ").split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()]

    assert [row[0] for row in rows[2:4]] == [NONE, ALL] and rows[-1][0] == "mine" and len(rows) == 2 + 2 + 11 + 1
    assert len({len(row) for row in rows}) == 1 and rows[0][-1] == "CLIP-I to the base's image"
    assert rows[2][-1] == "1.00 ± 0.00" != rows[3][-1] and rows[0][0] in out
    with pytest.raises(SystemExit, match="blocks=yours: this base has the presets mine, linear"):
        blocks(**given, images=pictures, presets="yours")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scale": 1}, "give base="),
        ({"images": "x"}, "give adapter=…"),
        ({"adapter": "x", "images": "nowhere"}, "images=nowhere: give a folder"),
    ],
    ids=str,
)
def test_what_is_missing_is_told(blocks: Blocks, options: dict[str, object], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        blocks(**options)


def test_text_and_noise_are_those_of_the_base(tmp_path: Path) -> None:
    """An image of a row is the prompter's with the row's number as seed."""
    model = tiny.shake(tiny.make_model())
    model.adapter.install()
    prompter, picture = Prompter([model], {"num_steps": 2}), Image.effect_noise((24, 24), 80).convert("RGB")
    measure = Measure("edges", EdgeOverlap, "edges", against_base=True)
    chosen = {NONE: {}, BLOCK: {BLOCK: 1.0}}
    gain = Measure("gain", EdgeOverlap, "edges", gain=True)
    rows = dict(sweep(prompter, [picture] * 2, ["cat", "a dog"], [measure, gain], chosen))
    items = [Item([Reference(picture, 1.0, chosen[BLOCK])], text, seed=i) for i, text in enumerate(["cat", "a dog"])]
    plain = [Item(text=item.text, seed=item.seed) for item in items]
    metric = EdgeOverlap()
    metric.update(*(pixels_of(prompter.generate(each)) for each in (items, plain)))

    assert rows[NONE]["edges"].mean == 1 and rows[NONE]["gain"] == (0, 0, 0)
    assert rows[BLOCK]["edges"].mean == pytest.approx(float(metric.compute()["edges"]), abs=1e-6)
    assert list(selections(["a", "b"])) == [NONE, ALL, "a", "b"]
