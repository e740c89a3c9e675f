"""Train the demo base's structure controls on edges, each a folder of diffusers: demo/control/ and demo/t2i_adapter/.

    python demo/make_control.py                              # the ControlNet (Zhang et al. 2023)
    python demo/make_control.py --kind t2i_adapter           # the T2I-Adapter (Mou et al. 2023)
    python demo/make_control.py --start demo/control --build demo/build/more_control    # goes on from finished weights
    python demo/make_control.py --edges PICTURE edges.png    # the control image of a picture

Each resumes from demo/build/ when started again.

A full copy of the UNet's encoder would have half of its weights. This ControlNet has no attention: it starts as a copy
of the encoder's convolutions and the mid block's first, and sees edges, noise and time. Text and image prompt act in
the base. The T2I-Adapter sees nothing but the edges, and adds the same features to the UNet's encoder in every step.

Edges are those of `ipa.metrics.edges`, white on black, at the image's size.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ControlNetModel, StableDiffusionPipeline, T2IAdapter, UNet2DConditionModel
from make_base import (
    Progress,
    autocast,
    load_state,
    make_scheduler,
    pretraining_caption,
    save_state,
    set_learning_rate,
    taken,
    tokenize,
)
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from world import DEVICE, HERE, SIZE_PX, Clock, compose, draw_backgrounds, positive_float, positive_int, read_world

sys.path.insert(0, str(HERE.parent))

from ipa.data.images.transforms import cover, read_picture
from ipa.errors import UserError
from ipa.metrics.edges import find_edges
from ipa.types import to_unit_range

# half of the captions say nothing, so that the edges alone suffice, as in the paper
SAID = (0.5, 0.3, 0.3)


def make_controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Convolutions of the UNet's encoder, with zero convolutions at the end: at first it changes nothing."""
    config = unet.config
    control = ControlNetModel(
        in_channels=config.in_channels,
        block_out_channels=config.block_out_channels,
        down_block_types=("DownBlock2D",) * len(config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        norm_eps=config.norm_eps,
        conditioning_embedding_out_channels=(16, 32, 48, 64),
    )
    own = control.state_dict()
    copied = {name: value for name, value in unet.state_dict().items() if name in own}
    control.load_state_dict(own | copied)
    return control


def make_t2i_adapter(unet: UNet2DConditionModel) -> T2IAdapter:
    """Features of the widths and sizes of the UNet's down blocks, without noise, time and text."""
    return T2IAdapter(
        channels=list(unet.config.block_out_channels), downscale_factor=SIZE_PX // unet.config.sample_size
    )


# kind → its class, how one begins, and its folder
KINDS: dict[str, Any] = {
    "controlnet": (ControlNetModel, make_controlnet, "control"),
    "t2i_adapter": (T2IAdapter, make_t2i_adapter, "t2i_adapter"),
}


def residuals(
    control: ControlNetModel | T2IAdapter, noisy: Tensor, t_B: Tensor, text_BLD: Tensor, control_B3HW: Tensor
) -> dict[str, Any]:
    """What a control adds to the UNet, as arguments of its call."""
    if isinstance(control, T2IAdapter):
        return {"down_intrablock_additional_residuals": control(control_B3HW)}
    down, mid = control(noisy, t_B, text_BLD, control_B3HW, return_dict=False)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def control_image(pixels_B3HW: Tensor) -> Tensor:
    """Pixels in [-1, 1] → their edges as a ControlNet reads them, control_B3HW in {0, 1}."""
    return find_edges(pixels_B3HW)[:, None].float().expand(-1, 3, -1, -1)


def train(options: argparse.Namespace) -> ControlNetModel | T2IAdapter:
    pipeline = StableDiffusionPipeline.from_pretrained(options.base, torch_dtype=torch.float32).to(DEVICE)
    for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        part.requires_grad_(False)
    world = read_world(HERE / "data" / "train").to(DEVICE)
    torch.manual_seed(0)
    kind, make, _ = KINDS[options.kind]
    start = kind.from_pretrained(options.start).float() if options.start else make(pipeline.unet)
    control = start.to(DEVICE)
    optimizer = torch.optim.AdamW(control.parameters(), weight_decay=1e-2, betas=(0.9, 0.99), fused=True)
    average = AveragedModel(control, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    state = load_state(options.build / "control.pt", control=control, optimizer=optimizer, average=average)
    step, clock = state["step"], Clock(options.minutes, state["spent_s"])
    progress = Progress(options.build / "control.csv", clock)
    alphas = make_scheduler().alphas_cumprod.to(DEVICE)
    generator = torch.Generator().manual_seed(step)
    while clock.share < 1:
        set_learning_rate(optimizer, options.lr, step, clock.share)
        chosen = torch.randint(len(world), (options.batch,), generator=generator)
        backgrounds = draw_backgrounds(options.batch, generator)
        pixels = compose(world.rgba[chosen], backgrounds)
        if torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        texts = [
            pretraining_caption(world.captions[i], world.styles[i], int(b), SAID, generator)
            for i, b in zip(chosen.tolist(), backgrounds, strict=True)
        ]
        # the larger of two: shapes are decided where there is much noise, and edges tell most there
        t_B = torch.randint(len(alphas), (2, options.batch), generator=generator).amax(0).to(DEVICE)
        loss = denoising_error(pipeline, control, pixels, texts, t_B, alphas, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(control)
        step += 1
        progress.log(step, loss=loss)
        if clock.time_to_save() or clock.share >= 1:
            save_state(options.build / "control.pt", step, clock, control=control, optimizer=optimizer, average=average)
    control.load_state_dict(taken(average.state_dict(), "module."))
    return control


def denoising_error(
    pipeline: StableDiffusionPipeline,
    control: ControlNetModel | T2IAdapter,
    pixels: Tensor,
    texts: list[str],
    t_B: Tensor,
    alphas: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """The base's own objective (v-prediction), with the control's residuals."""
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.mean
        text_BLD = pipeline.text_encoder(tokenize(pipeline.tokenizer, texts).to(DEVICE)).last_hidden_state
    noise = torch.randn(latents.shape, generator=generator).to(DEVICE)
    alpha, sigma = (each.sqrt()[:, None, None, None] for each in (alphas[t_B], 1 - alphas[t_B]))
    noisy = alpha * latents + sigma * noise
    with autocast():
        added = residuals(control, noisy, t_B, text_BLD, control_image(pixels))
        predicted = pipeline.unet(noisy, t_B, text_BLD, **added).sample
    return F.mse_loss(predicted.float(), alpha * noise - sigma * latents)


def write_edges(picture: Path, out: Path) -> None:
    pixels = to_unit_range(cover(read_picture(picture, "--edges"), (SIZE_PX, SIZE_PX)))[None]
    Image.fromarray((find_edges(pixels)[0].numpy() * 255).astype(np.uint8)).save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=tuple(KINDS), default="controlnet")
    parser.add_argument("--edges", type=Path, nargs=2, metavar=("PICTURE", "OUT"), help="write a control image, only")
    parser.add_argument("--minutes", type=positive_float, default=35, help="time of the training in all, over restarts")
    parser.add_argument("--batch", type=positive_int, default=8)
    parser.add_argument("--lr", type=positive_float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--start", type=Path, help="folder of a control to go on from, such as another base's")
    parser.add_argument("--base", type=Path, default=HERE / "base")
    parser.add_argument("--build", type=Path, help="folder of the checkpoints (default: in demo/build)")
    parser.add_argument("--out", type=Path, help="folder of the result (default: demo/control, demo/t2i_adapter)")
    options = parser.parse_args()
    name, folder = KINDS[options.kind][0].__name__, KINDS[options.kind][2]
    options.build, options.out = options.build or HERE / "build" / folder, options.out or HERE / folder
    torch.set_num_threads(options.threads)
    try:
        if options.edges:
            write_edges(*options.edges)
            return
        if options.start and (kind := ControlNetModel.load_config(options.start)["_class_name"]) != name:
            raise UserError(f"--start {options.start}: it is a {kind}, --kind {options.kind} needs a {name}")
        train(options).half().save_pretrained(options.out)
    except UserError as error:
        sys.exit(str(error))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
