"""What docs/combine.md says of the demo world, on a few of its hundred items (`demo/combine.py` has all)."""

from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from ipa.evaluation.blocks import pixels_of
from ipa.families.stable_diffusion import StableDiffusion
from ipa.metrics.edges import edge_overlap, edges_at_one_size
from ipa.presets import own_presets, read_blocks
from ipa.prompter import Prompter
from ipa.references import Item, Reference

DEMO = Path(__file__).resolve().parents[1] / "demo"
ADAPTER = DEMO / "adapters" / "decoupled_global.safetensors"
PX, STEPS, COUNT = 64, 10, 8


def test_the_demo_bases_presets_name_its_blocks() -> None:
    blocks = StableDiffusion.read_blocks(str(DEMO / "base"))
    own = own_presets(str(DEMO / "base"))
    chosen = {name: read_blocks(name, blocks, own).shown for name in own}

    assert set(own) == {"style", "composition"}
    assert not {b for b, f in chosen["style"].items() if f} & {b for b, f in chosen["composition"].items() if f}


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    return Prompter.load(ADAPTER, base=str(DEMO / "base"), encoder=f"local-dir:{DEMO / 'encoder'}", device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    from combine import heldout

    return heldout()[0][10 : 10 + COUNT]


@pytest.mark.slow
def test_edges_of_one_picture_and_look_of_another(prompter: Prompter, pictures: list[Image.Image]) -> None:
    from combine import edge_picture

    shapes, looks = pictures[: COUNT // 2], pictures[COUNT // 2 :]
    controlnet = ControlNetModel.from_pretrained(DEMO / "control")
    pipeline = prompter.pipeline(StableDiffusionControlNetPipeline, controlnet=controlnet)
    controls = {"image": [edge_picture(each) for each in shapes]}
    items = [Item([Reference(look)], seed=seed) for seed, look in enumerate(looks)]
    both = prompter.generate(items, num_steps=STEPS, pipeline=pipeline, arguments=controls)
    alone = prompter.generate(items, num_steps=STEPS)
    asked, with_edges, without = (edges_at_one_size(torch.stack(pixels_of(each))) for each in (shapes, both, alone))

    assert edge_overlap(with_edges, asked).mean() > edge_overlap(without, asked).mean() + 0.05
