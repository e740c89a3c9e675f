"""Pretrain a small FLUX-class transformer on the demo world, saved as a diffusers pipeline folder.

    python demo/make_flux.py train                     # resumes from demo/build/flux/ when called again
    python demo/make_flux.py export                    # writes demo/base_flux/
    python demo/make_flux.py preview --out grid.png    # images of some captions from the newest checkpoint

The transformer (four double- and two single-stream blocks, no guidance embedding) and a small T5 are trained together;
VAE and CLIP text encoder are those of demo/base. The latents are 8 × 8 × 32, packed to 4 × 4 tokens of 128 channels.

Objective: rectified flow, x_σ = (1 − σ) x_0 + σ ε, target ε − x_0, with σ = sigmoid(n), n standard normal (Esser et al.
2024). Sampling is on the unshifted schedule with classifier-free guidance.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from make_base import (
    LATENT_CHANNELS,
    PATCH_PX,
    SAID,
    Progress,
    autocast,
    load_state,
    make_encoder,
    pretraining_caption,
    save_state,
    set_learning_rate,
    taken,
    tokenize,
)
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast
from world import (
    BACKGROUNDS,
    DEVICE,
    HERE,
    SIZE_PX,
    STYLE_WORDS,
    TEXT_LENGTH,
    Clock,
    World,
    compose,
    draw_backgrounds,
    positive_float,
    positive_int,
    read_world,
    save_tokenizer,
)

BASE = HERE / "base"
GRID = SIZE_PX // PATCH_PX // 2  # tokens along the edge of an image
TEXT_WIDTH = 128
WIDTH, HEADS = 192, 6
# of T5's learning rate to the transformer's
TEXT_LR = 2.0
STEPS = 30_000
PREVIEW_MINUTES = 30
PREVIEW = ("red apple", "cat", "hatching chick", "skateboard noto style", "house on blue background", "tree", "dog", "")


def make_transformer() -> FluxTransformer2DModel:
    """With gates and output at zero, from which deep transformers train best (Peebles & Xie 2023)."""
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=4,
        num_single_layers=2,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 12, 12),
    )
    for name, module in transformer.named_modules():
        if name.endswith((".norm1.linear", ".norm1_context.linear", ".norm.linear")) or name == "proj_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return transformer


def make_t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        num_heads=4,
        d_ff=256,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def make_t5_tokenizer(folder: Path) -> T5TokenizerFast:
    """A unigram vocabulary of the captions, style and background words."""
    if not (folder / "tokenizer.json").exists():
        captions = read_world(HERE / "data" / "train", HERE / "data" / "heldout").captions
        words = [f"{style} on {colour} background" for style in STYLE_WORDS.values() for colour in BACKGROUNDS]
        trained = T5TokenizerFast(extra_ids=0).train_new_from_iterator([*captions, *words], 1000)
        trained.model_max_length = TEXT_LENGTH
        save_tokenizer(trained, folder)
    return T5TokenizerFast.from_pretrained(folder)


def pack(latents_BCHW: Tensor) -> Tensor:
    return F.pixel_unshuffle(latents_BCHW, 2).flatten(2).transpose(1, 2)


def positions() -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float().to(DEVICE)


class Base:
    """The parts: T5 and the transformer are trained, CLIP's text encoder and the VAE are finished."""

    def __init__(self, build: Path) -> None:
        self.t5_tokenizer = make_t5_tokenizer(build / "t5_tokenizer")
        self.clip_tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
        clip: Any = CLIPTextModel.from_pretrained(BASE / "text_encoder", dtype=torch.float32)
        self.clip = clip.to(DEVICE).eval().requires_grad_(False)
        self.trained = nn.ModuleDict({"t5": make_t5(self.t5_tokenizer), "transformer": make_transformer()}).to(DEVICE)

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        states_BLD = self.trained["t5"](tokenize(self.t5_tokenizer, captions).to(DEVICE))[0]
        with torch.no_grad():
            pooled_BE = self.clip(tokenize(self.clip_tokenizer, captions).to(DEVICE)).pooler_output
        return {"encoder_hidden_states": states_BLD, "pooled_projections": pooled_BE}

    def predict(self, packed_BNK: Tensor, sigma_B: Tensor, captions: list[str]) -> Tensor:
        text = self.encode_text(captions)
        text_ids = torch.zeros(TEXT_LENGTH, 3, device=DEVICE)
        transformer = self.trained["transformer"]
        return transformer(packed_BNK, timestep=sigma_B, img_ids=positions(), txt_ids=text_ids, **text).sample

    def pipeline(self, weights: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> FluxPipeline:
        """The public pipeline with averaged weights."""
        t5, transformer = make_t5(self.t5_tokenizer), make_transformer()
        t5.load_state_dict(taken(weights, "module.t5."))
        transformer.load_state_dict(taken(weights, "module.transformer."))
        vae: Any = AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float32)
        vae.register_to_config(shift_factor=0.0)
        pipeline = FluxPipeline(
            vae=vae,
            text_encoder=self.clip,
            tokenizer=self.clip_tokenizer,
            text_encoder_2=t5,
            tokenizer_2=self.t5_tokenizer,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(DEVICE, dtype)


def train(options: argparse.Namespace) -> None:
    world, build = read_world(HERE / "data" / "train").to(DEVICE), options.build
    base, latents = Base(build), encode_all(world)
    parts = base.trained
    groups = [{"params": parts["t5"].parameters(), "lr_factor": TEXT_LR}, {"params": parts["transformer"].parameters()}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    average = AveragedModel(parts, multi_avg_fn=get_ema_multi_avg_fn(0.9995))
    state = load_state(build / "flux.pt", parts=parts, optimizer=optimizer, average=average)
    step, clock = state["step"], Clock(options.steps / 60, state["spent_s"])  # of the progress bar: a second per step
    progress, previewed = Progress(build / "flux.csv", clock), clock.spent_s
    generator = torch.Generator().manual_seed(step)
    while step < options.steps:
        set_learning_rate(optimizer, options.lr, step, step / options.steps)
        loss = loss_of(base, world, latents, options.batch, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(parts)
        step += 1
        progress.log(step, loss=loss)
        if clock.time_to_save() or step == options.steps:
            save_state(build / "flux.pt", step, clock, parts=parts, optimizer=optimizer, average=average)
        if clock.spent_s - previewed > 60 * PREVIEW_MINUTES:
            previewed = clock.spent_s
            preview(base, average.state_dict(), build / "previews" / f"step_{step:06d}.png")


@torch.no_grad()
def encode_all(world: World) -> Tensor:
    """Packed latents of every picture on every background, [background, picture], as the VAE of demo/base has them."""
    encode = make_encoder(BASE)

    def on(background: int) -> Tensor:
        parts = [encode(compose(part, torch.full((len(part),), background))) for part in world.rgba.split(120)]
        return pack(torch.cat(parts))

    return torch.stack([on(each) for each in trange(len(BACKGROUNDS), desc="latents", unit="background")])


def loss_of(base: Base, world: World, latents: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Squared error of the velocity; the text is dropped in a tenth of the samples."""
    chosen = torch.randint(len(world), (batch,), generator=generator)
    backgrounds = draw_backgrounds(batch, generator)
    latents = latents[backgrounds, chosen]
    captions = [
        pretraining_caption(world.captions[i], world.styles[i], int(b), SAID, generator)
        for i, b in zip(chosen.tolist(), backgrounds, strict=True)
    ]
    dropped = (torch.rand(batch, generator=generator) < 0.1).tolist()
    captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    sigma_B = torch.sigmoid(torch.randn(batch, generator=generator)).to(DEVICE)
    noise = torch.randn(latents.shape, generator=generator).to(DEVICE)
    sigma = sigma_B[:, None, None]
    with autocast():
        velocity = base.predict((1 - sigma) * latents + sigma * noise, sigma_B, captions)
    return F.mse_loss(velocity.float(), noise - latents)


@torch.no_grad()
def preview(base: Base, averaged: dict[str, Tensor], path: Path, per_caption: int = 3) -> None:
    """A row of images for each caption of ``PREVIEW``."""
    pipeline: Any = base.pipeline(averaged)
    captions = [caption for caption in PREVIEW for _ in range(per_caption)]
    images = pipeline(
        captions,
        negative_prompt=[""] * len(captions),
        true_cfg_scale=3.0,
        num_inference_steps=20,
        height=SIZE_PX,
        width=SIZE_PX,
        max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator().manual_seed(0),
    ).images
    sheet = Image.new("RGB", (per_caption * SIZE_PX, len(PREVIEW) * SIZE_PX))
    for index, image in enumerate(images):
        sheet.paste(image, (index % per_caption * SIZE_PX, index // per_caption * SIZE_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def averaged_weights(build: Path) -> dict[str, Tensor]:
    return torch.load(build / "flux.pt", weights_only=True, map_location="cpu")["average"]


def export(options: argparse.Namespace) -> None:
    """Write the averaged weights in fp16 as a diffusers folder."""
    base = Base(options.build)
    beside = options.out.with_name(options.out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    base.pipeline(averaged_weights(options.build), torch.float16).save_pretrained(beside, safe_serialization=True)
    save_tokenizer(base.clip_tokenizer, beside / "tokenizer")
    save_tokenizer(base.t5_tokenizer, beside / "tokenizer_2")
    stored = {"dtype": "float32"}  # transformers takes the stored type, diffusers fp32
    changes = {"text_encoder": stored, "text_encoder_2": stored, "vae": {"_name_or_path": "demo/base/vae"}}
    for name, change in changes.items():
        config = beside / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change, indent=2) + "\n")
    shutil.rmtree(options.out, ignore_errors=True)
    beside.rename(options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "export", "preview"))
    parser.add_argument("--build", type=Path, default=HERE / "build" / "flux", help="checkpoints, losses, previews")
    parser.add_argument(
        "--out", type=Path, default=HERE / "base_flux", help="folder of the export, file of the preview"
    )
    parser.add_argument("--steps", type=positive_int, default=STEPS, help="of training, over all calls")
    parser.add_argument("--batch", type=positive_int, default=24)
    parser.add_argument("--lr", type=positive_float, default=8e-4)
    options = parser.parse_args()
    if options.what == "preview":
        preview(Base(options.build), averaged_weights(options.build), options.out)
    else:
        {"train": train, "export": export}[options.what](options)


if __name__ == "__main__":
    main()
