"""The systems of the paper's Table 1 at this world's size: the same ideas, trained from demo/base by ``train_system``.

    variations   UNet fine-tuned, one projected CLIP embedding in place of the text (SD Image Variations)
    unclip       UNet fine-tuned, the noised embedding as class embedding next to the text (SD unCLIP)
    shuffle      a ControlNet with pooled residuals that sees the warped image (ControlNet Shuffle)
    style        eight tokens of a small transformer after the text (T2I-Adapter, style)
    reference    reference-only: nothing is trained

A fine-tuned UNet is stored as its difference to demo/base, which is added to the weights of a custom base.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import ControlNetModel, DDPMScheduler
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from safetensors.torch import load_file
from torch import Tensor, nn

from demo.paper.plan import BASE, NEW_LR
from ipa.encoders.vision_model import VisionModelEncoder
from ipa.evaluation.methods.controlnet_shuffle import ControlNetShuffle, shuffle
from ipa.evaluation.methods.method import Method, Prompt
from ipa.evaluation.methods.prompt_tokens import StableDiffusionMethod, Start, cut_squares
from ipa.evaluation.methods.reference_only import ReferenceOnly
from ipa.evaluation.methods.t2i_style import StyleAdapter, T2IStyle
from ipa.evaluation.methods.weights import load_base, load_image_encoder
from ipa.families.stable_diffusion import StableDiffusion
from ipa.objective import replace_rows
from ipa.sampling import SamplingOptions
from ipa.types import Batch, to_unit_range
from ipa.weights import count_parameters

IMAGE_ENCODER = "demo/image_encoder"
CELL_PX = 32  # of the warp: half of the image's edge, as 256 of 512 px
TUNED_LR = 5e-4  # of fine-tuned layers
UNET = "unet."


class Trained(ABC):
    """What a system adds for training: its parts and their learning rates, and its prediction."""

    name: ClassVar[str]
    family: StableDiffusion
    encoder: VisionModelEncoder

    @abstractmethod
    def parts(self) -> dict[str, tuple[nn.Module, float]]:
        """Name → module and learning rate. A part named ``unet`` is fine-tuned from the base's."""

    @abstractmethod
    def predict(self, noisy_BCHW: Tensor, t_B: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """The denoiser's output, with text and image dropped as the batch says."""

    @property
    def trained(self) -> int:
        return sum(count_parameters(part) for part, _ in self.parts().values())

    def text_of(self, batch: Batch) -> Tensor:
        """states_BLD, of the empty text where it is dropped."""
        pairs = zip(batch.text, batch.draws.drop_text_B.tolist(), strict=True)
        return self.family.encode_text(["" if dropped else text for text, dropped in pairs]).states_BLD

    def pooled(self, image_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] → pooled_BE with about unit variance."""
        pooled_BE = self.encoder.encode(image_B3HW).pooled_BE
        assert pooled_BE is not None
        return pooled_BE / pooled_BE.square().mean(1, keepdim=True).sqrt()

    def pooled_of(self, prompts: Sequence[Prompt]) -> Tensor:
        return self.pooled(cut_squares(prompts, self.encoder.image_size_px))

    def reference_of(self, batch: Batch) -> Tensor:
        assert batch.reference_B3HW is not None
        return to_unit_range(batch.reference_B3HW)


class Variations(Trained, StableDiffusionMethod):
    """The projected embedding is the whole context, a single token; "no image" is zeros."""

    name = "variations"
    uses_text = False

    def __init__(self, family: StableDiffusion, encoder: VisionModelEncoder) -> None:
        project = nn.Linear(encoder.widths.pooled, family.context_width)
        super().__init__("", family=family, encoder=encoder, project=project)

    def parts(self) -> dict[str, tuple[nn.Module, float]]:
        return {"unet": (self.family.unet, TUNED_LR), "project": (self.project, NEW_LR)}

    def context(self, pooled_BE: Tensor) -> Tensor:
        return self.project(pooled_BE)[:, None]

    def predict(self, noisy_BCHW: Tensor, t_B: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        states_B1D = self.context(self.pooled(self.reference_of(batch)))
        kept = replace_rows(states_B1D, batch.draws.drop_image_B, torch.zeros_like(states_B1D[:1]))
        return self.family.unet(noisy_BCHW, t_B, kept).sample

    def sample_latents(self, prompts: Sequence[Prompt], start: Start, sampling: SamplingOptions) -> Tensor:
        states_B1D = self.context(self.pooled_of(prompts))
        return self.call(self.family.pipeline(), (states_B1D, torch.zeros_like(states_B1D)), start, sampling)


class UnCLIP(Trained, StableDiffusionMethod):
    """The embedding e at noise level n, √ᾱ_n e + √(1 − ᾱ_n) ε, and n itself, added to the time embedding.

    n is random in training and 0 in use; "no image" is zeros. The last layer starts at zero, so at first the base does
    not change.
    """

    name = "unclip"
    uses_text = True

    def __init__(self, family: StableDiffusion, encoder: VisionModelEncoder) -> None:
        width = family.unet.time_embedding.linear_2.out_features
        embedding = TimestepEmbedding(2 * encoder.widths.pooled, width)
        nn.init.zeros_(embedding.linear_2.weight)
        nn.init.zeros_(embedding.linear_2.bias)
        family.unet.class_embedding = embedding
        super().__init__("", family=family, encoder=encoder)
        self.alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod

    def parts(self) -> dict[str, tuple[nn.Module, float]]:
        return {"unet": (self.family.unet, TUNED_LR)}

    def label(self, pooled_BE: Tensor, level_B: Tensor, noise_BE: Tensor) -> Tensor:
        alpha_B1 = self.alphas[level_B][:, None]
        noised_BE = alpha_B1.sqrt() * pooled_BE + (1 - alpha_B1).sqrt() * noise_BE
        return torch.cat([noised_BE, get_timestep_embedding(level_B, pooled_BE.shape[1])], 1)

    def predict(self, noisy_BCHW: Tensor, t_B: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        pooled_BE = self.pooled(self.reference_of(batch))
        level_B = torch.randint(len(self.alphas), (len(pooled_BE),), generator=generator)
        label_BE = self.label(pooled_BE, level_B, torch.randn(pooled_BE.shape, generator=generator))
        kept = replace_rows(label_BE, batch.draws.drop_image_B, torch.zeros_like(label_BE[:1]))
        return self.family.unet(noisy_BCHW, t_B, self.text_of(batch), class_labels=kept).sample

    def sample_latents(self, prompts: Sequence[Prompt], start: Start, sampling: SamplingOptions) -> Tensor:
        pooled_BE = self.pooled_of(prompts)
        label_BE = self.label(pooled_BE, torch.zeros(len(prompts), dtype=torch.long), torch.zeros_like(pooled_BE))
        both = torch.cat([torch.zeros_like(label_BE), label_BE]) if sampling.guidance > 1 else label_BE
        with added_arguments(self.family.unet, lambda inputs, given: {"class_labels": both}):
            return self.call(self.family.pipeline(), self.text_states(prompts), start, sampling)


class Shuffle(Trained, ControlNetShuffle):
    """A copy of the UNet's encoder; its residuals are pooled over space."""

    name = "shuffle"

    def __init__(self, family: StableDiffusion, encoder: VisionModelEncoder) -> None:
        control: Any = ControlNetModel.from_unet(family.unet)
        control.register_to_config(global_pool_conditions=True)
        super().__init__(family, control, cell_px=CELL_PX)
        self.add_module("encoder", encoder)  # which it does not read

    def parts(self) -> dict[str, tuple[nn.Module, float]]:
        return {"controlnet": (self.controlnet, 1e-3)}

    def predict(self, noisy_BCHW: Tensor, t_B: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        assert batch.image_B3HW is not None
        edge = batch.image_B3HW.shape[-1]
        warped = torch.stack([shuffle(image, edge, generator, CELL_PX) for image in batch.image_B3HW])
        text_BLD, kept_B111 = self.text_of(batch), (~batch.draws.drop_image_B).float()[:, None, None, None]
        down, mid = self.controlnet(noisy_BCHW, t_B, text_BLD, warped, return_dict=False)
        residuals = {
            "down_block_additional_residuals": [kept_B111 * each for each in down],
            "mid_block_additional_residual": kept_B111 * mid,
        }
        return self.family.unet(noisy_BCHW, t_B, text_BLD, **residuals).sample


class Style(Trained, T2IStyle):
    name = "style"

    def __init__(self, family: StableDiffusion, encoder: VisionModelEncoder) -> None:
        super().__init__(family, encoder, StyleAdapter(encoder.widths.patch, family.context_width))

    def parts(self) -> dict[str, tuple[nn.Module, float]]:
        return {"adapter": (self.adapter, NEW_LR)}

    def predict(self, noisy_BCHW: Tensor, t_B: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            hidden_BPE = self.hidden_states(self.reference_of(batch))
            empty_BLD = self.family.encode_text([""]).states_BLD
        tokens_BTD = self.adapter(hidden_BPE)
        kept = replace_rows(tokens_BTD, batch.draws.drop_image_B, empty_BLD[:, -self.adapter.num_tokens :])
        return self.family.unet(noisy_BCHW, t_B, torch.cat([self.text_of(batch), kept], 1)).sample


SYSTEMS: dict[str, Any] = {kind.name: kind for kind in (Variations, UnCLIP, Shuffle, Style)}


@contextmanager
def added_arguments(unet: nn.Module, make: Any) -> Iterator[None]:
    """While inside, calls of the UNet also get what ``make(inputs, given arguments)`` returns."""
    hook = unet.register_forward_pre_hook(
        lambda _, inputs, given: (inputs, {**given, **make(inputs, given)}), with_kwargs=True
    )
    try:
        yield
    finally:
        hook.remove()


def new_system(name: str, base: str = BASE) -> Any:
    """Untrained, on a base."""
    return SYSTEMS[name](load_base(base, "float32"), load_image_encoder(IMAGE_ENCODER, "float32"))


def trained_state(system: Trained) -> dict[str, Tensor]:
    """The trained tensors, those of a fine-tuned UNet as differences to demo/base."""
    before = load_base(BASE, "float32").unet.state_dict() if "unet" in system.parts() else {}
    state = {f"{n}.{key}": x for n, (part, _) in system.parts().items() for key, x in part.state_dict().items()}
    return {
        name: x - before.get(name.removeprefix(UNET), 0) if name.startswith(UNET) else x for name, x in state.items()
    }


def load_system(name: str, file: Path | None, base: str = BASE) -> Method:
    """A trained system, on demo/base or on a custom base."""
    if name == "reference":
        return ReferenceOnly(load_base(base, "float32"))
    system = new_system(name, base)
    state = load_file(file)
    for part_name, (part, _) in system.parts().items():
        own = part.state_dict()
        found = {key: state[f"{part_name}.{key}"] for key in own}
        if part_name == "unet":
            found = {
                key: value + own[key] if not key.startswith("class_embedding.") else value
                for key, value in found.items()
            }
        part.load_state_dict(found)
    return system.eval()
