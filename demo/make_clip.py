"""Train the demo world's two contrastive models: the adapter's image encoder, and the judge that only scores.

    python demo/make_clip.py encoder               # demo/encoder/ (open_clip), demo/image_encoder/ (transformers)
    python demo/make_clip.py judge                 # demo/judge/ (open_clip)
    python demo/make_clip.py encoder --export      # write what the checkpoint holds so far
    python demo/make_clip.py encoder --out FOLDER  # write FOLDER/encoder/ and so on instead of demo/encoder/
    python demo/make_clip.py judge --start FOLDER  # a new training goes on from FOLDER's finished weights

Both resume from ``demo/build/clip/``. Captions name concept, style and background, in full or in part: a contrastive
model forgets what its captions never say (Radford et al. 2021 for the loss). Hardly a batch of random pictures asks for
the style, since the thing alone tells the captions apart. So a batch holds things in three of their styles, and the
pooled embedding is also asked for the style through a linear map that is thrown away; the encoder's also for the
picture's 8 × 8 thumbnail, so that the layout of the colours stays. Each of the encoder's patches before the last layer,
which is what fine-grained heads read, is asked for its own principal components: what is where. The judge has another
architecture, seed and augmentation, neither of these losses, and has also seen the held-out concepts.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from make_base import (
    LATENT_CHANNELS,
    Progress,
    autocast,
    load_pca,
    load_state,
    make_tokenizer,
    save_state,
    set_learning_rate,
    taken,
)
from open_clip import CLIP
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPImageProcessor, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection
from world import (
    BOS,
    DEVICE,
    HERE,
    MORE_STYLE_WORDS,
    SIZE_PX,
    STYLE_WORDS,
    TEXT_LENGTH,
    Clock,
    World,
    compose,
    describe,
    draw_backgrounds,
    positive_float,
    positive_int,
    read_world,
    save_tokenizer,
)

# the normalisation that diffusers assumes of an image encoder when nobody tells it another
MEAN, STD = OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
STYLE_NAMES = [*STYLE_WORDS, *MORE_STYLE_WORDS]
STYLES_PER_THING = 3
TRAIN, BUILT = HERE / "data" / "train", HERE / "build" / "data"
WEIGHTS = "open_clip_model.safetensors"
# what the committed weights took, one thread each
MINUTES = {"encoder": 137, "judge": 42}


@dataclass(frozen=True)
class Recipe:
    """One contrastive model: open_clip's own configuration, and how it is trained."""

    name: str
    vision: dict
    text: dict
    embed_dim: int
    folders: tuple[Path, ...]
    seed: int
    thumbnail_weight: float
    patch_weight: float
    style_weight: float
    shift_px: int
    smallest_crop: float
    colour_jitter: float

    def model_cfg(self, vocabulary: int) -> dict:
        text = {"context_length": TEXT_LENGTH, "vocab_size": vocabulary, "hf_tokenizer_name": self.name, **self.text}
        return {"embed_dim": self.embed_dim, "vision_cfg": {"image_size": SIZE_PX, **self.vision}, "text_cfg": text}


RECIPES = {
    "encoder": Recipe(
        name="encoder",
        vision={"layers": 6, "width": 128, "head_width": 32, "patch_size": 8},
        text={"width": 96, "heads": 4, "layers": 2},
        embed_dim=192,
        folders=(TRAIN, BUILT / "styles"),
        seed=1,
        thumbnail_weight=2.0,
        patch_weight=1.0,
        style_weight=2.0,
        shift_px=2,
        smallest_crop=0.85,
        colour_jitter=0.0,
    ),
    "judge": Recipe(
        name="judge",
        vision={"layers": (2, 2, 2, 2), "width": 14},
        text={"width": 96, "heads": 3, "layers": 1},
        embed_dim=128,
        folders=(TRAIN, BUILT / "judge"),
        seed=2,
        thumbnail_weight=0.0,
        patch_weight=0.0,
        style_weight=2.0,
        shift_px=4,
        smallest_crop=0.75,
        colour_jitter=0.05,
    ),
}


def make_model(recipe: Recipe, tokenizer: CLIPTokenizer) -> CLIP:
    config = recipe.model_cfg(len(tokenizer))
    return CLIP(config["embed_dim"], config["vision_cfg"], {**config["text_cfg"], "hf_tokenizer_name": None})


def rows_by_concept(world: World) -> list[list[int]]:
    """Where each concept's pictures stand, one in each style in which it is drawn."""
    rows: dict[str, list[int]] = {}
    for i, concept in enumerate(world.concepts):
        rows.setdefault(concept, []).append(i)
    return list(rows.values())


def caption(concept: str, style: str, background: int, generator: torch.Generator) -> str:
    """Say all of it half of the time, else leave out the style, the background, or both."""
    say = torch.randint(6, (), generator=generator)
    return describe(concept, style if say not in (0, 1) else "", background if say not in (0, 2) else None)


def choose_styles(rows: list[int], generator: torch.Generator) -> Tensor:
    """``STYLES_PER_THING`` of a thing's pictures at random."""
    return torch.tensor(rows)[torch.randperm(len(rows), generator=generator)[:STYLES_PER_THING]]


def augment(pixels_B3HW: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """One random affine map and colour change a picture; edges are repeated, so that backgrounds stay plain."""
    B = len(pixels_B3HW)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, generator=generator)

    zoom = uniform(recipe.smallest_crop, 2 - recipe.smallest_crop)
    mirror = torch.where(torch.rand(B, generator=generator) < 0.5, -1.0, 1.0)
    reach = 2 * recipe.shift_px / SIZE_PX
    theta = torch.zeros(B, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = zoom * mirror, zoom
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-reach, reach), uniform(-reach, reach)
    grid = F.affine_grid(theta, list(pixels_B3HW.shape), align_corners=False)
    device = pixels_B3HW.device
    moved = F.grid_sample(pixels_B3HW, grid.to(device), padding_mode="border", align_corners=False)
    jitter = recipe.colour_jitter * torch.randn(B, 3, 1, 1, generator=generator)
    return (moved + jitter.to(device)).clamp(-1, 1)


def normalize(pixels_B3HW: Tensor) -> Tensor:
    """Pixels in [-1, 1] → what the image tower reads."""
    mean, std = (torch.tensor(values, device=pixels_B3HW.device)[:, None, None] for values in (MEAN, STD))
    return ((pixels_B3HW + 1) / 2 - mean) / std


def contrastive_loss(image_BE: Tensor, text_BE: Tensor, logit_scale: Tensor, texts: list[str]) -> Tensor:
    """Symmetric cross-entropy; equal captions in a batch are all counted as right answers."""
    logits = logit_scale * F.normalize(image_BE, dim=-1) @ F.normalize(text_BE, dim=-1).T
    same = torch.tensor([[float(a == b) for b in texts] for a in texts], device=logits.device)
    target = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train(recipe: Recipe, options: argparse.Namespace) -> None:
    torch.manual_seed(recipe.seed)
    world: World = read_world(*recipe.folders).to(DEVICE)
    tokenizer = clip_tokenizer()
    rows = rows_by_concept(world)
    styles_N = torch.tensor([STYLE_NAMES.index(style) for style in world.styles], device=DEVICE)
    thumbnail, style = nn.Linear(recipe.embed_dim, 3 * 8 * 8), nn.Linear(recipe.embed_dim, len(STYLE_NAMES))
    clip = make_model(recipe, tokenizer)
    if options.start:
        clip.load_state_dict(load_file(options.start / WEIGHTS))
    parts = nn.ModuleDict({"clip": clip, "thumbnail": thumbnail, "style": style})
    if recipe.patch_weight:
        width = recipe.vision["width"]
        parts["patch"] = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, LATENT_CHANNELS))
        patches: list[Tensor] = []
        clip.visual.transformer.resblocks[-2].register_forward_hook(lambda _, __, out_BLD: patches.append(out_BLD))
        pca = load_pca(DEVICE)
    parts.to(DEVICE)
    count = sum(p.numel() for p in clip.parameters())
    print(f"{count:,} parameters")
    optimizer = torch.optim.AdamW(parts.parameters(), weight_decay=0.1, betas=(0.9, 0.98), fused=True)
    average = AveragedModel(parts, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    path = checkpoint_path(recipe)
    state = load_state(path, parts=parts, optimizer=optimizer, average=average)
    step, clock = state["step"], Clock(options.minutes, state["spent_s"])
    progress = Progress(path.with_suffix(".csv"), clock)
    generator = torch.Generator().manual_seed(1000 * recipe.seed + step)
    while clock.share < 1:
        set_learning_rate(optimizer, options.lr, step, clock.share)
        concepts = torch.randint(len(rows), (options.batch // STYLES_PER_THING,), generator=generator)
        chosen = torch.cat([choose_styles(rows[concept], generator) for concept in concepts])
        backgrounds = draw_backgrounds(len(chosen), generator)
        pixels = augment(compose(world.rgba[chosen], backgrounds), recipe, generator)
        texts = [
            caption(world.captions[i], world.styles[i], int(b), generator)
            for i, b in zip(chosen.tolist(), backgrounds.tolist(), strict=True)
        ]
        ids = tokenizer(
            texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids.to(DEVICE)
        # 65 tokens are too few for the CPU's flash attention: the plain one made the encoder's step 27 % faster
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            image, text = clip.encode_image(normalize(pixels)), clip.encode_text(ids)
        image, text = image.float(), text.float()
        contrast = contrastive_loss(image, text, clip.logit_scale.exp(), texts)
        small = F.avg_pool2d(pixels, SIZE_PX // 8).flatten(1)
        layout = F.mse_loss(thumbnail(image), small)
        manner = F.cross_entropy(style(image), styles_N[chosen])
        losses = {"contrast": contrast, "layout": layout, "style": manner}
        total = contrast + recipe.thumbnail_weight * layout + recipe.style_weight * manner
        if recipe.patch_weight:
            # without the class token; both are ordered row by row
            predicted = parts["patch"](patches.pop()[:, 1:].float())
            losses["patch"] = F.mse_loss(predicted, pca.encode(pixels).flatten(2).transpose(1, 2))
            total = total + recipe.patch_weight * losses["patch"]
        total.backward()
        nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, 4.6052)
        average.update_parameters(parts)
        step += 1
        progress.log(step, **losses)
        if clock.time_to_save() or clock.share >= 1:
            save_state(path, step, clock, parts=parts, optimizer=optimizer, average=average)


def checkpoint_path(recipe: Recipe) -> Path:
    return HERE / "build" / "clip" / f"{recipe.name}.pt"


def clip_tokenizer() -> CLIPTokenizer:
    """The shared vocabulary, padded with another token than end-of-text, where open_clip's argmax looks for the end."""
    tokenizer = make_tokenizer(HERE / "build" / "tokenizer")
    tokenizer.pad_token = BOS
    return tokenizer


def export(recipe: Recipe, folder: Path) -> None:
    """Write the averaged weights in fp16: open_clip's folder, and for the encoder the same weights for transformers."""
    tokenizer = clip_tokenizer()
    averaged = torch.load(checkpoint_path(recipe), weights_only=True, map_location="cpu")["average"]
    weights = {k: v.half().contiguous() for k, v in taken(averaged, "module.clip.").items()}
    out = folder / recipe.name
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    preprocess = {
        "size": SIZE_PX,
        "mode": "RGB",
        "mean": MEAN,
        "std": STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    config = {"model_cfg": recipe.model_cfg(len(tokenizer)), "preprocess_cfg": preprocess}
    (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, out / WEIGHTS)
    save_tokenizer(tokenizer, out)
    print(f"wrote {out}")
    if recipe.name == "encoder":
        export_to_transformers(recipe, weights, folder / "image_encoder")


def export_to_transformers(recipe: Recipe, weights: dict[str, Tensor], out: Path) -> None:
    """Write the image tower as ``CLIPVisionModelWithProjection``, as IP-Adapter's encoder is published."""
    width, layers = recipe.vision["width"], recipe.vision["layers"]
    model = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // recipe.vision["head_width"],
            image_size=SIZE_PX,
            patch_size=recipe.vision["patch_size"],
            projection_dim=recipe.embed_dim,
            hidden_act="gelu",
        )
    )
    model.load_state_dict(to_transformers(taken(weights, "visual."), layers), strict=False)
    shutil.rmtree(out, ignore_errors=True)
    model.half().save_pretrained(out)
    config = out / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")
    size = {"shortest_edge": SIZE_PX}
    crop = {"height": SIZE_PX, "width": SIZE_PX}
    CLIPImageProcessor(size=size, crop_size=crop, image_mean=MEAN, image_std=STD, resample=3).save_pretrained(out)
    print(f"wrote {out}")


def to_transformers(visual: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """open_clip's names of a vision transformer → transformers'; the joint query-key-value matrix is cut in three."""
    out = {
        "vision_model.embeddings.class_embedding": visual["class_embedding"],
        "vision_model.embeddings.position_embedding.weight": visual["positional_embedding"],
        "vision_model.embeddings.patch_embedding.weight": visual["conv1.weight"],
        "visual_projection.weight": visual["proj"].T.contiguous(),
    }
    pairs = {"ln_pre": "vision_model.pre_layrnorm", "ln_post": "vision_model.post_layernorm"}
    for i in range(layers):
        block, layer = f"transformer.resblocks.{i}", f"vision_model.encoder.layers.{i}"
        pairs |= {
            f"{block}.ln_1": f"{layer}.layer_norm1",
            f"{block}.ln_2": f"{layer}.layer_norm2",
            f"{block}.mlp.c_fc": f"{layer}.mlp.fc1",
            f"{block}.mlp.c_proj": f"{layer}.mlp.fc2",
            f"{block}.attn.out_proj": f"{layer}.self_attn.out_proj",
        }
        for kind in ("weight", "bias"):
            thirds = visual[f"{block}.attn.in_proj_{kind}"].chunk(3)
            for name, third in zip("qkv", thirds, strict=True):
                out[f"{layer}.self_attn.{name}_proj.{kind}"] = third.contiguous()
    for theirs, ours in pairs.items():
        for kind in ("weight", "bias"):
            out[f"{ours}.{kind}"] = visual[f"{theirs}.{kind}"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=tuple(RECIPES))
    parser.add_argument(
        "--minutes", type=positive_float, help=f"time of a training in all, over restarts (default {MINUTES})"
    )
    parser.add_argument(
        "--batch", type=positive_int, default=96, help="pictures; a third as many things, in three styles each"
    )
    parser.add_argument("--lr", type=positive_float, default=1e-3, help="peak learning rate")
    parser.add_argument(
        "--threads", type=positive_int, default=1, help="two jobs of one thread do more than one of two"
    )
    parser.add_argument("--export", action="store_true", help="write the folder from the checkpoint, without training")
    parser.add_argument("--start", type=Path, help="folder whose finished weights a training begins with")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the written folders (default: demo)")
    options = parser.parse_args()
    options.minutes = options.minutes or MINUTES[options.model]
    torch.set_num_threads(options.threads)
    recipe = RECIPES[options.model]
    if not options.export:
        train(recipe, options)
    export(recipe, options.out)


if __name__ == "__main__":
    main()
