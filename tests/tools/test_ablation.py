"""`python -m ipa.tools.ablation`: the table's values, the verdicts, the page with its figure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from omegaconf import OmegaConf
from PIL import Image

from ipa.errors import UserError
from ipa.tools.ablation import Run, comparisons, draw_picture, main, read_runs, table

SCORES = {"clip_i": 0.1, "clip_t": 0.2, "retrieval_at_1": 0.3, "border_lab": 40.0}


def make_run(variant: str, seed: int, clip_i: float) -> Run:
    scores = {"scale 0": SCORES, "scale 1": {**SCORES, "clip_i": clip_i}}
    summary = {"scores": scores, "parameters trained": 1234567, "samples per second": 90.0 + seed}
    return Run(variant, seed, summary, {}, Path(variant))


def test_the_table_has_the_seeds_deviation() -> None:
    runs = [make_run("decoupled_global", seed, 0.4 + seed / 10) for seed in (0, 1, 2)]

    _, *rows = table([*runs, make_run("simple_global", 0, 0.3)])

    assert [" | ".join(row) for row in rows] == [
        "base alone (λ = 0) | 0.100 | 0.200 | 0.300 | 40.0 |  | ",
        "decoupled global | 0.500 ± 0.100 | 0.200 ± 0.000 | 0.300 ± 0.000 | 40.0 ± 0.0 | 1,234,567 | 91 ± 1",
        "simple global | 0.300 | 0.200 | 0.300 | 40.0 | 1,234,567 | 90",
    ]


def test_the_verdict_compares_the_difference_with_the_deviation() -> None:
    """A single seed has no deviation and decides nothing."""
    better = [make_run("decoupled_global", seed, 0.5) for seed in (0, 1)]
    verdicts = {"as in the paper": [0.1, 0.2], "the other way round": [0.9, 0.8], "undecided": [0.3, 0.6]}
    for verdict, values in [*verdicts.items(), ("undecided", [0.1])]:
        [_, line] = comparisons(better + [make_run("simple_global", n, value) for n, value in enumerate(values)])

        assert "decoupled above simple (global)" in line[0] and line[-1] == verdict


@pytest.fixture
def sweep(tmp_path: Path, base_folder: Path, clip_name: str) -> Path:
    """What a sweep of two runs leaves, in the tiny world."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        Image.new("RGB", (20, 20), (80 * number, 0, 0)).save(pictures / f"{number}.png")
    for kind in ("decoupled", "simple"):
        folder = tmp_path / "sweep" / kind
        folder.mkdir(parents=True)
        parts = {"base": str(base_folder), "encoder": clip_name}
        tiny.write_adapter(folder / "adapter.safetensors", parts, kind=kind)
        (folder / "summary.json").write_text(json.dumps(make_run(kind, 1, 0.4).summary))
        OmegaConf.save(configuration(base_folder, pictures), folder / "config.yaml")
    return tmp_path / "sweep"


def configuration(base: Path, pictures: Path) -> dict[str, object]:
    options = {"_target_": "ipa.sampling.SamplingOptions", "num_steps": 2, "guidance": 2.0, "guidance_rescale": 0.7}
    return {
        **{"seed": 1, "base": {"path": str(base)}, "image_size_px": None, "global_batch_size": 4},
        **{
            "trainer": {"max_steps": 6},
            "optimizer": {"_target_": "ipa.training.optimizers.MuonWithAdamW", "lr": 0.001},
            "preview": {"images": str(pictures)},
        },
        **{"sampling": options, "scoring": {"num_prompts": 3, "options": options}, "judge": {"name": "a judge"}},
        "data": {"_target_": "ipa.data.datamodule.ShardDataModule", "val": None},
    }


def test_page_figure_and_copies_are_written(sweep: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    (tmp_path / "notes.md").write_text("What we make of it.\n")
    out, adapters = tmp_path / "page.md", tmp_path / "adapters"

    command(main, sweep=sweep, out=out, notes=tmp_path / "notes.md", adapters=adapters, rows=2)

    lines = out.read_text().split("\n")
    assert lines[0] == "# The ablation" and lines[4] == "MuonWithAdamW, learning rate 0.001, seeds 1."
    assert lines[6].startswith("2 steps, guidance 2.0 rescaled by 0.7, computed with")
    first = lines.index("| variant | CLIP-I ↑ | CLIP-T ↑ | retrieval@1 ↑ | border ΔE ↓ | parameters | samples/s |")
    assert lines[first + 1 : first + 4] == [
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| base alone (λ = 0) | 0.100 | 0.200 | 0.300 | 40.0 |  |  |",
        "| decoupled global | 0.400 | 0.200 | 0.300 | 40.0 | 1,234,567 | 91 |",
    ]
    figure = "![Same prompts, same noise, one column per variant](images/page.png)"
    assert lines[-5:] == ["", figure, "", "What we make of it.", ""]
    with Image.open(tmp_path / "images" / "page.png") as picture:
        assert picture.size == (4 * 100 + 4, 2 * 100 + 22)  # prompt, base, two variants
    copies = {path.stem: path.read_bytes() for path in adapters.iterdir()}
    assert set(copies) == {"decoupled_global", "simple_global"}
    assert copies["simple_global"] == (sweep / "simple" / "adapter.safetensors").read_bytes()


def test_a_saved_configuration_builds_nothing(sweep: Path, tmp_path: Path) -> None:
    """Its classes are not instantiated, and its shards are no commands."""
    path = sweep / "simple" / "config.yaml"
    config: Any = OmegaConf.load(path)
    config.sampling._target_ = config.data._target_ = "os.mkdir"
    OmegaConf.save(config, path)
    draw_picture(read_runs(sweep)[1:], 1, tmp_path / "page.png")

    config.preview.images, config.data.val = None, f"pipe:touch {tmp_path}/made"
    OmegaConf.save(config, path)
    with pytest.raises(UserError, match="pipe"):
        draw_picture(read_runs(sweep)[1:], 1, tmp_path / "page.png")
    assert not (tmp_path / "made").exists()


def test_runs_that_cannot_be_compared_are_named(sweep: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no runs"):
        read_runs(tmp_path / "pictures")
    (sweep / "simple" / "config.yaml").write_text("seed: [")
    with pytest.raises(UserError, match=r"simple/config\.yaml"):
        read_runs(sweep)
    (sweep / "simple" / "summary.json").unlink()
    with pytest.raises(UserError, match="not finished yet: simple"):
        read_runs(sweep)
