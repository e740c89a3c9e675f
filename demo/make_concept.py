"""Teach the demo base one held-out concept from its one picture: a Textual Inversion embedding and a DreamBooth LoRA.

    python demo/make_concept.py embedding      # Gal et al. 2023: a new word's embedding; nothing else is trained
    python demo/make_concept.py lora           # Ruiz et al. 2023, Hu et al. 2022: attention, prior preservation

Both resume from ``demo/build/concept/`` when started again and write demo/concept/, files that diffusers loads
(``load_textual_inversion``, ``load_lora_weights``). The picture is shifted by some pixels and mirrored; half of its
captions name its background, so that word and background stay apart. Needs peft for the LoRA.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from make_base import load_state, make_scheduler, save_state, set_learning_rate, tokenize
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from world import DEVICE, HERE, Clock, World, compose, draw_backgrounds, positive_int, read_world

CONCEPT = 20  # the picture's number in demo/data/heldout: a jellyfish
WORD = "<jellyfish>"
RANK = 4
SHIFT_PX = 4
BUILD, OUT = HERE / "build" / "concept", HERE / "concept"
STEPS, BATCH = {"embedding": 400, "lora": 500}, 8
PEAK_LR = {"embedding": 5e-2, "lora": 2e-3}


def picture(world: World) -> tuple[Tensor, str, str | None]:
    """pixels_13HW of the concept, its caption, and its background."""
    pixels = compose(world.rgba[CONCEPT : CONCEPT + 1], torch.zeros(1, dtype=torch.long))
    return pixels, world.captions[CONCEPT], world.backgrounds[CONCEPT]


class Embedding(nn.Module):
    """The new word's vector in the text encoder's table, which is otherwise frozen; it starts as another word's."""

    def __init__(self, pipeline: Any, start: str) -> None:
        super().__init__()
        pipeline.tokenizer.add_tokens([WORD])
        pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
        table = pipeline.text_encoder.get_input_embeddings()
        first = pipeline.tokenizer(start, add_special_tokens=False).input_ids[0]
        self.row = pipeline.tokenizer.convert_tokens_to_ids(WORD)
        self.vector = nn.Parameter(table.weight[first].detach().clone())
        table.register_forward_hook(lambda module, inputs, out: self.placed(inputs[0], out))

    def placed(self, ids: Tensor, embedded: Tensor) -> Tensor:
        return torch.where((ids == self.row)[..., None], self.vector, embedded)

    def save(self, pipeline: Any) -> Path:
        OUT.mkdir(parents=True, exist_ok=True)
        save_file({WORD: self.vector.detach().cpu()}, OUT / "embedding.safetensors")
        return OUT / "embedding.safetensors"


class LoRA(nn.Module):
    """Low-rank changes of all attention projections of the UNet."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        from peft import LoraConfig

        projections = ["to_q", "to_k", "to_v", "to_out.0"]
        pipeline.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=projections))
        pairs = [(name, each) for name, each in pipeline.unet.named_parameters() if "lora_" in name]
        self.weights = nn.ParameterList(each for _, each in pairs)

    def save(self, pipeline: Any) -> Path:
        from diffusers.utils import convert_state_dict_to_diffusers
        from peft import get_peft_model_state_dict

        found = {name: value.half() for name, value in get_peft_model_state_dict(pipeline.unet).items()}
        name = "lora.safetensors"
        StableDiffusionPipeline.save_lora_weights(
            OUT, unet_lora_layers=convert_state_dict_to_diffusers(found), weight_name=name
        )
        return OUT / name


def train(what: str) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(HERE / "base", torch_dtype=torch.float32).to(DEVICE)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False)
    torch.manual_seed(0)
    concept = picture(read_world(HERE / "data" / "heldout"))
    trained = Embedding(pipeline, "octopus") if what == "embedding" else LoRA(pipeline)
    others = None if what == "embedding" else read_world(HERE / "data" / "train")
    optimizer = torch.optim.AdamW(trained.parameters(), weight_decay=0.0)
    state = load_state(BUILD / f"{what}.pt", trained=trained, optimizer=optimizer)
    clock, generator = Clock(60, state["spent_s"]), torch.Generator().manual_seed(state["step"])
    steps = range(state["step"], STEPS[what])
    for step in tqdm(steps, desc=what, initial=steps.start, total=steps.stop, mininterval=5):
        set_learning_rate(optimizer, PEAK_LR[what], step, step / steps.stop, warmup_steps=20)
        pixels, texts = draw(concept, WORD if what == "embedding" else concept[1], others, generator)
        loss = denoising_error(pipeline, pixels, texts, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if clock.time_to_save() or step + 1 == steps.stop:
            save_state(BUILD / f"{what}.pt", step + 1, clock, trained=trained, optimizer=optimizer)
    print(f"wrote {trained.save(pipeline)}")


def augment(pixels_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """The batch mirrored or not, and shifted by some pixels."""
    if torch.rand((), generator=generator) < 0.5:
        pixels_B3HW = pixels_B3HW.flip(3)
    x, y = torch.randint(2 * SHIFT_PX + 1, (2,), generator=generator).tolist()
    size = pixels_B3HW.shape[-1]
    return F.pad(pixels_B3HW, (SHIFT_PX,) * 4, mode="replicate")[:, :, y : y + size, x : x + size]


def draw(
    concept: tuple[Tensor, str, str | None], word: str, others: World | None, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """The concept's picture with the word; for the LoRA the half of the batch are other things with their captions."""
    pixels_13HW, _, background = concept
    count = BATCH if others is None else BATCH // 2
    pixels = torch.cat([augment(pixels_13HW, generator) for _ in range(count)])
    named = torch.rand(count, generator=generator) < 0.5
    texts = [f"{word} on {background} background" if each else word for each in named]
    if others is None:
        return pixels, texts
    rows = torch.randint(len(others), (BATCH - count,), generator=generator)
    kept = compose(others.rgba[rows], draw_backgrounds(len(rows), generator))
    return torch.cat([pixels, kept]), texts + [others.captions[i] for i in rows]


def denoising_error(pipeline: Any, pixels: Tensor, texts: list[str], generator: torch.Generator) -> Tensor:
    """The base's own objective (v-prediction)."""
    alphas = make_scheduler().alphas_cumprod
    t_B = torch.randint(len(alphas), (len(texts),), generator=generator)
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels.to(DEVICE)).latent_dist.mean
    noise = torch.randn(latents.shape, generator=generator).to(DEVICE)
    alpha, sigma = (each.sqrt().to(DEVICE)[:, None, None, None] for each in (alphas[t_B], 1 - alphas[t_B]))
    text_BLD = pipeline.text_encoder(tokenize(pipeline.tokenizer, texts).to(DEVICE)).last_hidden_state
    predicted = pipeline.unet(alpha * latents + sigma * noise, t_B.to(DEVICE), text_BLD).sample
    return F.mse_loss(predicted, alpha * noise - sigma * latents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(STEPS))
    parser.add_argument("--threads", type=positive_int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train(options.what)


if __name__ == "__main__":
    main()
