"""`python -m ipa.tools.ablation`: the table's figures, the verdicts, the page with its picture."""

import json
import sys
from pathlib import Path

import pytest
import tiny
from omegaconf import OmegaConf
from PIL import Image

from ipa.errors import UserError
from ipa.export.published import to_published, with_metadata
from ipa.export.storage import save_adapter
from ipa.tools.ablation import Run, comparisons, main, read_runs, spread, table

SCORES = {"clip_i": 0.1, "clip_t": 0.2, "retrieval_at_1": 0.3, "border_lab": 40.0}


def make_run(variant: str, seed: int, clip_i: float, clip_t: float = 0.2) -> Run:
    scores = {"scale 0": SCORES, "scale 1": {**SCORES, "clip_i": clip_i, "clip_t": clip_t}}
    summary = {"scores": scores, "parameters trained": 1234567, "samples per second": 90.0 + seed}
    return Run(Path(variant), variant, seed, summary)


def test_spread_is_the_sample_deviation() -> None:
    assert spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert spread([0.25], 3) == "0.250"


def test_table_has_one_row_a_variant_and_the_base() -> None:
    runs = [make_run("decoupled_global", seed, 0.4 + seed / 10) for seed in (0, 1, 2)] + [
        make_run("simple_global", 0, 0.3)
    ]

    lines = table(runs).splitlines()

    assert len(lines) == 5
    assert lines[2].startswith("| base alone (λ = 0) | 0.100 | 0.200 | 0.300 | 40.0 |")
    assert lines[3] == (
        "| decoupled global | 0.500 ± 0.100 | 0.200 ± 0.000 | 0.300 ± 0.000 | 40.0 ± 0.0 | 1,234,567 | 91 ± 1 |"
    )
    assert lines[4].startswith("| simple global | 0.300 |")


@pytest.mark.parametrize(
    ("simple", "verdict"),
    [([0.1, 0.2], "as in the paper"), ([0.9, 0.8], "the other way round"), ([0.3, 0.6], "undecided")],
)
def test_verdict_compares_the_difference_with_the_seeds_deviation(simple: list[float], verdict: str) -> None:
    runs = [make_run("decoupled_global", seed, clip_i) for seed, clip_i in enumerate([0.5, 0.5])]
    runs += [make_run("simple_global", seed, clip_i) for seed, clip_i in enumerate(simple)]

    (line,) = comparisons(runs).splitlines()[2:]

    assert "decoupled above simple (global)" in line and line.endswith(f"| {verdict} |")


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
        model = tiny.shake(tiny.make_model(kind=kind))
        tensors = to_published(model.trainable.state_dict())
        metadata = with_metadata(tensors, {**model.describe(), "base": str(base_folder), "encoder": clip_name})
        save_adapter(folder / "adapter.safetensors", tensors, metadata)
        summary = make_run(kind, 1, 0.4).summary
        (folder / "summary.json").write_text(json.dumps(summary))
        OmegaConf.save(configuration(base_folder, pictures), folder / "config.yaml")
    return tmp_path / "sweep"


def configuration(base: Path, pictures: Path) -> dict[str, object]:
    options = {"_target_": "ipa.sampling.SamplingOptions", "num_steps": 2, "guidance": 2.0}
    return {
        "seed": 1,
        "base": {"path": str(base)},
        "image_size_px": None,
        "global_batch_size": 4,
        "trainer": {"max_steps": 6},
        "optimizer": {"lr": 0.001},
        "preview": {"images": str(pictures)},
        "sampling": options,
        "scoring": {"num_prompts": 3, "options": options},
        "judge": {"name": "a judge"},
        "data": {"_target_": "ipa.data.datamodule.ShardDataModule", "train": str(Path("demo/data/train").resolve())},
    }


def test_page_picture_and_copies_are_written(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.md").write_text("What we make of it.\n")
    words = [
        f"sweep={sweep}",
        f"out={tmp_path / 'page.md'}",
        f"notes={tmp_path / 'notes.md'}",
        f"adapters={tmp_path / 'a'}",
    ]
    monkeypatch.setattr(sys, "argv", ["ablation", *words, "rows=2"])

    main()

    text = (tmp_path / "page.md").read_text()
    assert "| decoupled global | 0.400 |" in text and text.endswith("What we make of it.\n")
    assert "![Same prompts, same noise, one column per variant](images/page.png)" in text
    with Image.open(tmp_path / "images" / "page.png") as picture:
        assert picture.size == (4 * 100 + 4, 2 * 100 + 22)  # prompt, base, two variants
    copies = {path.stem: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert copies["simple_global"] == (sweep / "simple" / "adapter.safetensors").read_bytes()
    assert set(copies) == {"decoupled_global", "simple_global"}


def test_unfinished_runs_are_named(sweep: Path) -> None:
    (sweep / "simple" / "summary.json").unlink()

    with pytest.raises(ValueError, match="not finished yet: simple"):
        read_runs(sweep)


def test_an_empty_folder_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no runs there"):
        read_runs(tmp_path)
