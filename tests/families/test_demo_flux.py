"""The demo's FLUX-class base: stock diffusers draws with its adapter file what we draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from ipa.prompter import Prompter

DEMO = Path(__file__).resolve().parents[2] / "demo"
BASE, FOLDER, NAME, ENCODER = DEMO / "base_flux", DEMO / "adapters", "flux.safetensors", DEMO / "image_encoder"


def test_the_stock_pipeline_draws_the_same() -> None:
    picture = Image.new("RGB", (64, 64), "teal")
    picture.paste("gold", (16, 8, 40, 50))
    prompter = Prompter.load(FOLDER / NAME, base=str(BASE), device="cpu")
    (ours,) = prompter(picture, "red apple", seed=3, num_steps=4, guidance=3.0)

    stock: Any = FluxPipeline.from_pretrained(BASE)
    stock.set_progress_bar_config(disable=True)
    stock.load_ip_adapter(
        str(FOLDER), subfolder="", weight_name=NAME, image_encoder_pretrained_model_name_or_path=str(ENCODER)
    )
    prompts = {"ip_adapter_image": picture, "negative_ip_adapter_image": Image.new("RGB", (64, 64))}
    sizes = {"width": 64, "height": 64, "max_sequence_length": 16}
    theirs = []
    for scale in (1.0, 0.0):
        stock.set_ip_adapter_scale(scale)
        noise = torch.Generator().manual_seed(3)
        options = {"negative_prompt": "", "true_cfg_scale": 3.0, "num_inference_steps": 4, "generator": noise}
        theirs.append(np.asarray(stock("red apple", **prompts, **sizes, **options).images[0], int))

    assert np.abs(theirs[0] - np.asarray(ours, int)).max() <= 1
    assert np.abs(theirs[1] - theirs[0]).mean() > 5
