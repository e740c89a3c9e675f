"""Section 1: how many parameters are trained, at full size and here, and whether the base stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from omegaconf import OmegaConf

from demo.paper.claims import CONTRADICTED, HOLDS
from demo.paper.plan import BASE, Settings
from demo.paper.prompts import Prompts, read_prompts
from ipa.adapter.heads import GlobalHead
from ipa.adapter.kinds import DecoupledAdapter
from ipa.encoders import read_widths
from ipa.evaluation.methods.ip_adapter import IPAdapterMethod
from ipa.evaluation.methods.method import draw_start
from ipa.export.loading import load_model
from ipa.families.cross_attention import find_hosts
from ipa.sampling import SamplingOptions
from ipa.weights import count_parameters

PAPER_MILLIONS = 22
STEPS, LR = 10, 1e-3


def find_frozen(adapter: Path, settings: Settings) -> dict[str, Any]:
    """Figures and verdict; ``adapter`` is a trained file of this world."""
    full = full_size_parameters()
    hashes = hashes_around_training(adapter)
    prompts = read_prompts("heldout", settings.items)
    options = SamplingOptions(settings.num_steps, settings.guidance, scale=0.0)
    difference = difference_at_zero(adapter, prompts, options, settings.seeds[0])
    facts = [
        {"fact": "trained parameters at full size", "value": full},
        {"fact": "SHA-256 of the base before training (first 16 digits)", "value": hashes["before"]},
        {"fact": f"SHA-256 of the base after {STEPS} steps", "value": hashes["after"]},
        {
            "fact": f"largest difference of a pixel at λ = 0 over {len(prompts)} images (of a range of 2)",
            "value": difference,
        },
    ]
    same = hashes["before"] == hashes["after"] and difference == 0 and round(full / 1e6) == PAPER_MILLIONS
    return {"facts": facts, "verdict": HOLDS if same else CONTRADICTED}


def full_size_parameters() -> int:
    """Of the global head and the branches for Stable Diffusion 1.5, built without weights."""
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(cross_attention_dim=768)  # the other defaults are Stable Diffusion 1.5
        head = GlobalHead.fitting(read_widths("ViT-H-14"), 768)
        return count_parameters(head) + count_parameters(DecoupledAdapter(find_hosts(unet)))


def hashes_around_training(adapter: Path) -> dict[str, str]:
    """SHA-256 of the base's weights before and after some steps, which do change the adapter."""
    from demo.paper.train_system import samples

    model = load_model(adapter, base=BASE)
    data = samples(OmegaConf.load(adapter.with_name("config.yaml")), model.family, model.encoder.image_size_px)
    optimizer = torch.optim.AdamW(model.trainable.parameters(), lr=LR)
    before, head = model.frozen_hash(), next(model.trainable.parameters()).detach().clone()
    for _, batch in zip(range(STEPS), data.train_dataloader(), strict=False):
        optimizer.zero_grad()
        model.errors(batch).loss.backward()
        optimizer.step()
    assert not torch.equal(head, next(model.trainable.parameters())), "the steps changed nothing"
    return {name: each["base"][:16] for name, each in (("before", before), ("after", model.frozen_hash()))}


@torch.no_grad()
def difference_at_zero(adapter: Path, prompts: Prompts, options: SamplingOptions, seed: int) -> float:
    """Between images of the model with its adapter at λ = 0, and of the same base after the adapter was removed."""
    method = IPAdapterMethod(load_model(adapter, base=BASE))
    family, given = method.model.family, prompts.given(range(len(prompts)), [""] * len(prompts), seed)
    with_adapter = method.generate(given, options)
    method.model.adapter.remove()
    noise_BCHW, _ = draw_start(given, family.latent_shape(family.image_size_px))
    pieces = [
        family.pipeline()(
            [""] * len(noise),
            latents=noise,
            num_inference_steps=options.num_steps,
            guidance_scale=options.guidance,
            output_type="latent",
        ).images
        for noise in noise_BCHW.split(options.batch_size)
    ]
    alone = torch.cat([family.decode_latents(latents) for latents in pieces])
    return float((with_adapter - alone).abs().max())
