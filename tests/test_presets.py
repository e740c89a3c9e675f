"""Presets against the definitions in words, on the blocks of the real denoisers (built without weights)."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from ipa.errors import UserError
from ipa.families.cross_attention import blocks_of
from ipa.presets import own_presets, preset_names, read_blocks

SD = [
    *(f"down_blocks.{block}.attentions.{stack}" for block in range(3) for stack in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{block}.attentions.{stack}" for block in range(1, 4) for stack in range(3)),
]
SDXL = [
    *(f"down_blocks.{block}.attentions.{stack}" for block in (1, 2) for stack in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.{block}.attentions.{stack}" for block in range(2) for stack in range(3)),
]


def test_blocks_of_the_real_denoisers() -> None:
    with torch.device("meta"):
        sd = UNet2DConditionModel(cross_attention_dim=768)
        sdxl = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2, 10],
            cross_attention_dim=2048,
        )
    assert blocks_of(sd) == SD and len(SD) == 16
    assert blocks_of(sdxl) == SDXL and len(SDXL) == 11


def test_style_and_composition_of_sdxl_are_instantstyles_layers() -> None:
    assert read_blocks("style", SDXL).shown == {"up_blocks.0.attentions.1": 1.0}
    assert read_blocks("composition", SDXL).shown == {"down_blocks.2.attentions.1": 1.0}
    precise = read_blocks("style precise", SDXL)
    assert (precise.shown, precise.pushed) == (read_blocks("style", SDXL).shown, {"down_blocks.2.attentions.1": 1.0})


@pytest.mark.parametrize(
    ("preset", "first", "middle", "last"),
    [
        ("linear", 1, 1, 1),
        ("ease in", 1, 0.05 + 0.95 * 10 / 16, 0.05 + 0.95 / 16),
        ("ease out", 0.05, 0.05 + 0.95 * 6 / 16, 0.05 + 0.95 * 15 / 16),
        ("ease in-out", 0.05, 0.05 + 0.95 * 6 / 8, 0.05 + 0.95 / 8),
        ("reverse in-out", 1, 0.05 + 0.95 * 2 / 8, 0.05 + 0.95 * 7 / 8),
        ("weak input", 0.2, 1, 1),
        ("weak output", 1, 1, 0.2),
        ("strong middle", 0.2, 1, 0.2),
        ("style", 1, 0, 1),
        ("composition", 0, 0, 0),
    ],
)
def test_presets_of_stable_diffusion(preset: str, first: float, middle: float, last: float) -> None:
    weights = read_blocks(preset, SD).shown

    assert [weights.get(SD[t], 0) for t in (0, 6, 15)] == pytest.approx([first, middle, last])


def test_mappings_name_blocks_by_their_beginning() -> None:
    weights = read_blocks({"up_blocks.1": 0.5, "mid": 1, "down_blocks.0.attentions.1": 2}, SD).shown

    assert {name: factor for name, factor in weights.items() if factor} == {
        "down_blocks.0.attentions.1": 2.0,
        "mid_block.attentions.0": 1.0,
        **{f"up_blocks.1.attentions.{stack}": 0.5 for stack in range(3)},
    }
    assert read_blocks({}, SD).shown == dict.fromkeys(SD, 0.0)


def test_the_folder_of_a_base_has_presets_of_its_own(tmp_path: Path) -> None:
    assert own_presets(str(tmp_path)) == own_presets("owner/name") == {}
    (tmp_path / "presets.yaml").write_text("style: {up_blocks: 1.0}\nmine: {mid: 0.5}\n")
    own = own_presets(str(tmp_path))

    assert read_blocks("mine", SD, own) == read_blocks({"mid": 0.5}, SD)
    assert read_blocks("style", SD, own) == read_blocks({"up_blocks": 1.0}, SD) != read_blocks("style", SD)
    assert preset_names(SD, own)[:3] == ["style", "mine", "linear"] and preset_names(SD, own).count("style") == 1
    for broken in ("style: 1", "- style", "{"):
        (tmp_path / "presets.yaml").write_text(broken)
        with pytest.raises(UserError, match=r"presets\.yaml"):
            own_presets(str(tmp_path))


def test_what_a_base_lacks_is_refused_with_what_it_has() -> None:
    with pytest.raises(UserError, match=r"blocks=style: .*ease in.*mid_block"):
        read_blocks("style", ["down_blocks.0.attentions.0", "mid_block.attentions.0"])
    with pytest.raises(UserError, match=r"up_block\.1 is none of"):
        read_blocks({"up_block.1": 1.0}, SD)
    assert "composition precise" in preset_names(SDXL)
    for number in (11, 16):  # other denoisers of as many blocks
        assert "style" not in preset_names([f"transformer_blocks.{block}" for block in range(number)])
        assert "style" not in preset_names([f"up_blocks.{block}" for block in range(number)])
