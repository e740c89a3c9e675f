"""Pretrain the demo world's base model: VAE, text encoder and UNet, saved as a diffusers pipeline folder.

    python demo/make_base.py unet                  # text encoder and UNet, together
    python demo/make_base.py vae                   # may run at the same time
    python demo/make_base.py export                # writes demo/base/
    python demo/make_base.py unet --start FOLDER   # goes on from finished weights; `export` takes the rest from there
    python demo/make_base.py vae --start FOLDER    # its decoder only, for squared errors: the latents stay as they are

A custom model, demo/base fine-tuned on one style (docs/reuse.md):

    python demo/make_base.py unet --start demo/base --style fluent --build demo/build/fluent --minutes 8 --lr 3e-4
    python demo/make_base.py export --start demo/base --build demo/build/fluent --out demo/build/fluent/base

Both trainings resume from ``demo/build/base/`` when called again, and share one latent space, known in advance: the
principal components of 8 × 8 pixel patches, so that the UNet need not wait for the VAE. The VAE's encoder learns that
projection; its decoder, which sees the neighbours of a patch, learns to undo it.

Objective of the UNet: v-prediction (Salimans & Ho 2022), v = α_t ε − σ_t x_0, on a schedule rescaled to zero terminal
signal (Lin et al. 2023), without which plain backgrounds drift to grey.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from world import (
    BACKGROUNDS,
    DEVICE,
    HERE,
    SIZE_PX,
    STYLE_WORDS,
    TEXT_LENGTH,
    Clock,
    build_tokenizer,
    compose,
    describe,
    draw_backgrounds,
    positive_float,
    positive_int,
    read_world,
    save_atomically,
    save_tokenizer,
)

PATCH_PX = 8
LATENT_CHANNELS = 32
# how far the components' spread is evened out: 0 keeps it, 1 makes all alike
WHITENING = 0.6
POSTERIOR_STD = 0.05
# how often the UNet's captions name the thing, the style, the background; each by itself
SAID = (0.95, 0.5, 0.4)
# of the text encoder's learning rate to the UNet's: with equal rates (4e-4), words that came late, beside a thing in
# 95 % of the captions, were unheard still after 4,700 steps
TEXT_LR = 3.0
ALIGN_WEIGHT = 0.1
# what the committed weights took, the UNet's partly with two threads on a busy machine (demo/README.md);
# the VAE's without the second training of its decoder (Makefile)
MINUTES = {"unet": 661, "vae": 33}


@dataclass
class PatchPCA:
    """Linear latents: z = Vᵀ(patch − mean) / scale, per 8 × 8 patch; about unit variance over all channels."""

    mean: Tensor
    vectors: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, pixels_N3HW: Tensor) -> PatchPCA:
        patches = unfold(pixels_N3HW).transpose(1, 2).reshape(-1, 3 * PATCH_PX**2)
        mean = patches.mean(0)
        variances, vectors = torch.linalg.eigh(torch.cov((patches - mean).T))
        vectors = vectors.flip(1)[:, :LATENT_CHANNELS]
        # eigenvectors come with either sign; make the largest entry positive so that two machines agree
        signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
        std = variances.flip(0)[:LATENT_CHANNELS].sqrt()
        scale = std**WHITENING
        return cls(mean, vectors * signs, scale * (std / scale).square().mean().sqrt())

    def encode(self, pixels_B3HW: Tensor) -> Tensor:
        """pixels_B3HW in [-1, 1] → latents_BChw."""
        edge = pixels_B3HW.shape[-1] // PATCH_PX
        centred = unfold(pixels_B3HW) - self.mean[:, None]
        return ((self.vectors.T @ centred) / self.scale[:, None]).unflatten(-1, (edge, edge))

    def decode(self, latents_BChw: Tensor) -> Tensor:
        edge = latents_BChw.shape[-1] * PATCH_PX
        patches = self.vectors @ (latents_BChw.flatten(2) * self.scale[:, None]) + self.mean[:, None]
        return F.fold(patches, edge, PATCH_PX, stride=PATCH_PX)


def unfold(pixels_B3HW: Tensor) -> Tensor:
    return F.unfold(pixels_B3HW, PATCH_PX, stride=PATCH_PX)


def load_pca(device: torch.device | str = "cpu") -> PatchPCA:
    """The latent space, fitted once on the training pictures and then kept, since VAE and UNet must mean the same."""
    path = HERE / "build" / "base" / "pca.pt"
    if not path.exists():
        world = read_world(HERE / "data" / "train")
        generator = torch.Generator().manual_seed(0)
        pca = PatchPCA.fit(compose(world.rgba, draw_backgrounds(len(world), generator)))
        save_atomically(vars(pca), path)
    return PatchPCA(**torch.load(path, weights_only=True, map_location=device))


def make_encoder(start: Path | None) -> Callable[[Tensor], Tensor]:
    """pixels_B3HW in [-1, 1] → latents_BChw: the principal components, or what the finished VAE made of them."""
    if start is None:
        return load_pca(DEVICE).encode
    vae = (
        AutoencoderKL.from_pretrained(start, subfolder="vae", torch_dtype=torch.float32)
        .requires_grad_(False)
        .to(DEVICE)
    )
    return lambda pixels_B3HW: vae.encode(pixels_B3HW).latent_dist.mean


def shifted(pixels_B3HW: Tensor, reach_px: int, generator: torch.Generator) -> Tensor:
    """Each picture moved by whole pixels, which blur nothing; what wraps around is its plain margin of 4 px."""
    moves = torch.randint(-reach_px, reach_px + 1, (len(pixels_B3HW), 2), generator=generator).tolist()
    return torch.stack([each.roll(move, (1, 2)) for each, move in zip(pixels_B3HW, moves, strict=True)])


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE_PX,
        scaling_factor=1.0,
    )


def make_unet(width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE_PX // PATCH_PX,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(width, 2 * width),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # the number of heads, whatever diffusers calls it
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=0,
    )


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """One vocabulary for base, encoder and judge: all captions, style and background words."""
    if not (folder / "tokenizer.json").exists():
        world = read_world(HERE / "build" / "data" / "all", HERE / "build" / "data" / "judge")
        words = [
            f"a picture of in on a background {style} {colour}"
            for style in STYLE_WORDS.values()
            for colour in BACKGROUNDS
        ]
        build_tokenizer(folder, world.captions + words)
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """ids_BL, padded and cut to ``TEXT_LENGTH``."""
    return tokenizer(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


class Progress:
    """Loss per interval: a progress bar for the eye, a CSV for the curve."""

    def __init__(self, path: Path, clock: Clock, every: int = 100) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.clock, self.every = path, clock, every
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.bar = tqdm(
            total=round(clock.limit_s), initial=round(clock.spent_s), unit="s", desc=path.stem, mininterval=30
        )

    def log(self, step: int, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.count += 1
        if step % self.every:
            return
        row = {"step": step, "minutes": round(self.clock.spent_s / 60, 2)}
        row |= {name: round(float(total) / self.count, 5) for name, total in self.sums.items()}
        self.sums.clear()
        self.count = 0
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.bar.set_postfix(row)
        self.bar.update(round(self.clock.spent_s) - self.bar.n)


def set_learning_rate(
    optimizer: torch.optim.Optimizer, peak: float, step: int, share: float, warmup_steps: int = 300
) -> None:
    """Linear warm-up by steps, then cosine decay to 2 % by the share of the time used, times the group's own factor."""
    rate = peak * min(1.0, (step + 1) / warmup_steps) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_factor", 1.0)


def train_vae(options: argparse.Namespace) -> None:
    world = read_world(HERE / "build" / "data" / "all").to(DEVICE)
    encode = make_encoder(options.start)
    folder = options.build
    vae = make_vae()
    if options.start:
        vae.load_state_dict(load_file(options.start / "vae" / "diffusion_pytorch_model.safetensors"))
        for encodes in (vae.encoder, vae.quant_conv):
            encodes.requires_grad_(False)
    vae.to(DEVICE)
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=1e-3, fused=True)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    state = load_state(folder / "vae.pt", vae=vae, optimizer=optimizer, average=average)
    step, clock = state["step"], Clock(options.minutes, state["spent_s"])
    progress = Progress(folder / "vae.csv", clock)
    generator = torch.Generator().manual_seed(step)
    while clock.share < 1:
        set_learning_rate(optimizer, options.lr or 2e-3, step, clock.share)
        chosen = torch.randint(len(world), (options.batch,), generator=generator)
        pixels = compose(world.rgba[chosen], draw_backgrounds(options.batch, generator))
        if torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        target = encode(pixels)
        noisy = target + POSTERIOR_STD * torch.randn(target.shape, generator=generator).to(DEVICE)
        with autocast():
            decoded = vae.decode(noisy).sample
        colour = (decoded.float() - pixels).abs().mean()
        edges = sum((difference(decoded.float(), d) - difference(pixels, d)).abs().mean() for d in (-1, -2))
        if options.start:
            squared = (decoded.float() - pixels).square().mean()
            losses = {"pixel_mse": 20 * squared, "colour_l1": colour, "edge_l1": edges}
        else:
            with autocast():
                latents = vae.encode(pixels).latent_dist.mean
            losses = {"latent_mse": (latents.float() - target).square().mean(), "colour_l1": colour, "edge_l1": edges}
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(vae)
        step += 1
        progress.log(step, **losses)
        if clock.time_to_save() or clock.share >= 1:
            save_state(folder / "vae.pt", step, clock, vae=vae, optimizer=optimizer, average=average)


def difference(pixels: Tensor, dim: int) -> Tensor:
    return pixels.diff(dim=dim)


def pretraining_caption(
    caption: str, style: str, background: int, said: Sequence[float], generator: torch.Generator
) -> str:
    """The caption with or without style and background, as web captions sometimes name them; a few say nothing.

    What no caption ever names, cross-attention never learns to steer, and an adapter has nothing but cross-attention.
    """
    thing, manner, ground = (torch.rand(3, generator=generator) < torch.tensor(said)).tolist()
    return describe(caption if thing else "", style if manner else "", background if ground else None)


class Alignment(nn.Module):
    """InfoNCE between the text's states and a linear map of a frozen encoder's embedding of the same picture.

    Stable Diffusion's text encoder is one half of a CLIP, so images and texts have one geometry there, and an image
    prompt is nearly a linear map away from what cross-attention has learned to read.
    """

    def __init__(self, encoder: Path, text_width: int) -> None:
        super().__init__()
        clip: Any = open_clip.create_model(f"local-dir:{encoder}")
        self.encoder = [clip.visual.eval().requires_grad_(False).to(DEVICE)]  # in a list: not one of the parts
        mean, std = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
        self.mean, self.std = (torch.tensor(each, device=DEVICE)[:, None, None] for each in (mean, std))
        self.project = nn.Linear(clip.visual.output_dim, text_width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, pixels_B3HW: Tensor, text_BLD: Tensor, ends_BL: Tensor, told_B: Tensor) -> Tensor:
        """pixels_B3HW in [-1, 1] and text_BLD → loss, a scalar, over the samples of ``told_B``, which have a text.

        ``ends_BL`` marks end-of-text and the padding behind it, which have seen all words.
        """
        with torch.no_grad(), autocast(), sdpa_kernel(SDPBackend.MATH):
            image_BE = self.encoder[0](((pixels_B3HW + 1) / 2 - self.mean) / self.std)
        ends_BL1 = ends_BL[:, :, None].float()
        text_BD = (text_BLD * ends_BL1).sum(1) / ends_BL1.sum(1)
        image_ND, text_ND = (F.normalize(each[told_B], dim=-1) for each in (self.project(image_BE.float()), text_BD))
        logits = self.logit_scale.exp().clamp(max=100) * image_ND @ text_ND.T
        right = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def train_unet(options: argparse.Namespace) -> None:
    world = read_world(*options.data).of_style(options.style).to(DEVICE)
    encode = make_encoder(options.start)
    folder = options.build
    tokenizer = make_tokenizer(options.start / "tokenizer" if options.start else HERE / "build" / "tokenizer")
    parts = nn.ModuleDict({"text": make_text_encoder(tokenizer), "unet": make_unet(options.width)})
    if options.align:
        parts["align"] = Alignment(options.align, parts["text"].config.hidden_size)
    if options.start:
        parts["text"].load_state_dict(load_file(options.start / "text_encoder" / "model.safetensors"))
        parts["unet"].load_state_dict(load_file(options.start / "unet" / "diffusion_pytorch_model.safetensors"))
    parts.to(DEVICE)
    groups = [
        {"params": parts["text"].parameters(), "lr_factor": TEXT_LR},
        *({"params": part.parameters()} for name, part in parts.items() if name != "text"),
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    average = AveragedModel(parts, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / options.horizon))
    state = load_state(folder / "unet.pt", parts=parts, optimizer=optimizer, average=average)
    step, clock = state["step"], Clock(options.minutes, state["spent_s"])
    progress = Progress(folder / "unet.csv", clock)
    empty = tokenize(tokenizer, [""]).to(DEVICE)
    alphas = make_scheduler().alphas_cumprod.to(DEVICE)
    generator = torch.Generator().manual_seed(step)
    while clock.share < 1:
        set_learning_rate(optimizer, options.lr or 6e-4, step, clock.share, options.warmup)
        chosen = torch.randint(len(world), (options.batch,), generator=generator)
        backgrounds = draw_backgrounds(options.batch, generator)
        pixels = shifted(compose(world.rgba[chosen], backgrounds), options.shift, generator)
        with autocast():
            latents = encode(pixels).float()
        captions = [
            pretraining_caption(world.captions[i], world.styles[i], int(b), options.said, generator)
            for i, b in zip(chosen.tolist(), backgrounds, strict=True)
        ]
        dropped = (torch.rand(options.batch, generator=generator) < 0.1).to(DEVICE)
        ids_BL = torch.where(dropped[:, None], empty, tokenize(tokenizer, captions).to(DEVICE))
        t_B = torch.randint(len(alphas), (options.batch,), generator=generator).to(DEVICE)
        noise = torch.randn(latents.shape, generator=generator).to(DEVICE)
        alpha = alphas[t_B].sqrt()[:, None, None, None]
        sigma = (1 - alphas[t_B]).sqrt()[:, None, None, None]
        # 64 tokens are too few for the CPU's flash attention: the plain one is faster
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            text_BLD = parts["text"](ids_BL).last_hidden_state
            predicted = parts["unet"](alpha * latents + sigma * noise, t_B, text_BLD).sample
        loss = F.mse_loss(predicted.float(), alpha * noise - sigma * latents)
        losses = {"loss": loss}
        if options.align:
            losses["align"] = parts["align"](pixels, text_BLD.float(), ids_BL == tokenizer.eos_token_id, ~dropped)
            loss = loss + ALIGN_WEIGHT * losses["align"]
        loss.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(parts)
        step += 1
        progress.log(step, **losses)
        if clock.time_to_save() or clock.share >= 1:
            save_state(folder / "unet.pt", step, clock, parts=parts, optimizer=optimizer, average=average)


def autocast() -> torch.autocast:
    """bf16 where the processor multiplies it natively; elsewhere it is several times slower than fp32."""
    native = DEVICE.type == "cuda" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=native)


def save_state(path: Path, step: int, clock: Clock, **parts) -> None:
    save_atomically({"step": step, "spent_s": clock.spent_s} | {n: p.state_dict() for n, p in parts.items()}, path)


def load_state(path: Path, **parts) -> dict:
    if not path.exists():
        return {"step": 0, "spent_s": 0.0}
    state = torch.load(path, weights_only=True, map_location=DEVICE)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state


def export(options: argparse.Namespace) -> None:
    """Write the averaged weights in fp16 as a diffusers folder that loads without a dtype argument."""
    build, out = options.build, options.out
    tokenizer = make_tokenizer(options.start / "tokenizer" if options.start else HERE / "build" / "tokenizer")
    text_encoder, unet, vae = make_text_encoder(tokenizer), make_unet(options.width), make_vae()
    if options.start and not (build / "unet.pt").exists():
        text_encoder.load_state_dict(load_file(options.start / "text_encoder" / "model.safetensors"))
        unet.load_state_dict(load_file(options.start / "unet" / "diffusion_pytorch_model.safetensors"))
    else:
        averaged = torch.load(build / "unet.pt", weights_only=True, map_location="cpu")["average"]
        text_encoder.load_state_dict(taken(averaged, "module.text."))
        unet.load_state_dict(taken(averaged, "module.unet."))
    if options.start and not (build / "vae.pt").exists():
        vae.load_state_dict(load_file(options.start / "vae" / "diffusion_pytorch_model.safetensors"))
    else:
        vae.load_state_dict(
            taken(torch.load(build / "vae.pt", weights_only=True, map_location="cpu")["average"], "module.")
        )
        fix_posterior(vae)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16)
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.save_pretrained(beside, safe_serialization=True)
    save_tokenizer(tokenizer, beside / "tokenizer")
    config = beside / "text_encoder" / "config.json"
    # transformers takes the stored type, diffusers fp32: without this line the two do not fit together
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    if (out / "presets.yaml").exists():  # to be measured anew: demo/combine.py blocks
        shutil.copy(out / "presets.yaml", beside)
    shutil.rmtree(out, ignore_errors=True)
    beside.rename(out)
    print(f"wrote {out}")


def taken(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@torch.no_grad()
def fix_posterior(vae: AutoencoderKL) -> None:
    """Give the posterior one spread everywhere: the one that the decoder was trained to bear."""
    vae.quant_conv.weight[LATENT_CHANNELS:] = 0
    vae.quant_conv.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_STD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vae", "unet", "export"))
    parser.add_argument(
        "--minutes", type=positive_float, help=f"time of a training in all, over restarts (default {MINUTES})"
    )
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        default=[HERE / "data" / "train"],
        help="what the UNet learns (default: demo/data/train)",
    )
    parser.add_argument("--batch", type=positive_int, default=16)
    parser.add_argument("--lr", type=positive_float, default=None, help="peak learning rate")
    parser.add_argument(
        "--width", type=positive_int, default=80, help="channels of the UNet's first level; the second has twice"
    )
    parser.add_argument(
        "--said",
        type=float,
        nargs=3,
        default=SAID,
        metavar=("THING", "STYLE", "BACKGROUND"),
        help=f"how often the UNet's captions name each, in [0, 1] (default {SAID})",
    )
    parser.add_argument(
        "--horizon", type=positive_int, default=2000, help="steps that the UNet's moving average covers"
    )
    parser.add_argument(
        "--warmup", type=positive_int, default=300, help="steps in which the UNet's learning rate rises"
    )
    parser.add_argument(
        "--shift", type=int, choices=range(5), default=0, help="most pixels by which the UNet's pictures move"
    )
    parser.add_argument("--align", type=Path, help="open_clip folder with whose image embeddings texts are aligned")
    parser.add_argument(
        "--threads", type=positive_int, default=1, help="two jobs of one thread do more than one of two"
    )
    parser.add_argument("--start", type=Path, help="pipeline folder with the weights to go on from")
    parser.add_argument("--style", choices=tuple(STYLE_WORDS), help="train on one drawing style only: a custom model")
    parser.add_argument("--build", type=Path, default=HERE / "build" / "base", help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, default=HERE / "base")
    options = parser.parse_args()
    options.minutes = options.minutes or MINUTES.get(options.part)
    torch.set_num_threads(options.threads)
    {"vae": train_vae, "unet": train_unet, "export": export}[options.part](options)


if __name__ == "__main__":
    main()
