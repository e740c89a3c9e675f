"""The model card of a run: what it says, and how it says that something is missing."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import yaml
from PIL import Image

from ipa.files import hash_file, write_json
from ipa.tools.card import main

CONFIG = {
    "group": "decoupled_global",
    "global_batch_size": 16,
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.001},
    "data": {"train": "/data/private/laion", "drops": {"text": 0.05, "image": 0.05, "both": 0.05}},
    "scoring": {"num_prompts": 7},
    "trainer": {"precision": "32-true"},
}
SCORES = {
    "scale 0": {"clip_i": 0.1, "clip_t": 0.2, "retrieval_at_1": 0.0},
    "scale 1": {"clip_i": 0.62345, "clip_t": 0.2, "retrieval_at_1": 0.5},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    named = {"base": "owner/base", "encoder": "ViT-H-14", "encoder_weights": "laion2b_s32b_b79k", "licence": "mit"}
    sampled = {"sampling_guidance": "4.0", "sampling_guidance_rescale": "0.7"}
    tiny.write_adapter(folder / "adapter.safetensors", named | sampled)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    write_json(folder / "summary.json", {"parameters trained": 1234, "steps": 20, "scores": SCORES})
    (folder / "previews").mkdir()
    for step in (10, 20):
        Image.new("RGB", (4, 4), (step, 0, 0)).save(folder / "previews" / f"step_{step:06d}.png")
    return folder


def test_the_card_says_what_was_trained_and_how_to_load_it(run: Path, command: Callable[..., str]) -> None:
    command(main, run=run)
    card = run / "card"
    _, header, body = (card / "README.md").read_text().split("---\n", 2)

    assert yaml.safe_load(header) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "owner/base",
        "license": "mit",
        "tags": ["ip-adapter", "image-prompt", "text-to-image", "diffusers"],
    }
    for words in (
        "| scale 1 | 0.623 | 0.200 | 0.500 |",
        '"h94/IP-Adapter", subfolder="models/image_encoder"',
        "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors",
        "| data | laion |",
        "| trained parameters | 1,234 |",
        "guidance_scale=4.0, guidance_rescale=0.7).images[0]",
    ):
        assert words in body
    assert "/data/private" not in body
    assert hash_file(card / "adapter.safetensors") == hash_file(run / "adapter.safetensors")
    with Image.open(card / "preview.png") as preview:
        assert preview.getpixel((0, 0)) == (20, 0, 0)


def test_an_encoder_that_is_not_public_is_not_promised_to_other_programs(
    run: Path, command: Callable[..., str]
) -> None:
    tiny.write_adapter(run / "adapter.safetensors", {"encoder": "local-dir:mine"})
    command(main, run=run)
    page = (run / "card" / "README.md").read_text()
    assert "# FOLDER: the image encoder (mine" in page
    assert "only if *Load CLIP Vision* can load that encoder" in page


@pytest.mark.parametrize(
    ("missing", "options", "words"),
    [
        ("adapter.safetensors", {}, "no adapter.safetensors"),
        ("summary.json", {}, "not finished"),
        ("config.yaml", {}, "config.yaml"),
        (None, {"push": "a b/c"}, "push=a b/c"),
        (None, {"push": "owner/name"}, "log in first"),
        (None, {"evaluation": "nowhere"}, "nowhere"),
    ],
)
def test_what_is_missing_is_named(
    run: Path,
    command: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str | None,
    options: dict[str, str],
    words: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    if missing:
        (run / missing).unlink()
    with pytest.raises(SystemExit, match=words):
        command(main, run=run, **options)
    assert not (run / "card").exists()
