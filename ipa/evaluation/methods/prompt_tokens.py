"""Stable Diffusion as the systems around it share it, and the shape that three of them have: image tokens as context.

    encode(image) → (conditional tokens, unconditional tokens)
    StableDiffusionPipeline(prompt_embeds=…, negative_prompt_embeds=…)

The tokens come behind the text's states or in their place. Letters: B pictures, T image tokens, L text tokens,
D context width; C, H, W of latents.
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ipa.data.images.transforms import Opened, fit_reference
from ipa.encoders.clip_vision import ClipVisionEncoder
from ipa.errors import UserError, brief
from ipa.evaluation.methods.method import MissingWeights, Prompt, Sampling
from ipa.families.stable_diffusion import StableDiffusion
from ipa.sampling import draw_noise
from ipa.types import TextCondition

Built = TypeVar("Built", bound=nn.Module)


class StableDiffusionMethod(nn.Module, ABC):
    """A system around Stable Diffusion: DDIM on the checkpoint's own schedule, each picture's noise from its seed."""

    name: ClassVar[str]
    uses_text: ClassVar[bool]

    def __init__(self, family: StableDiffusion, source: str) -> None:
        super().__init__()
        self.family, self.source = family, source

    @property
    @abstractmethod
    def trained(self) -> int | None:
        """Parameters that were trained for image prompts."""

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], noise_BCHW: Tensor, sampling: Sampling) -> Tensor:
        """Noise on the family's device and in its precision → latents_BCHW of pictures."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        size_px = sampling.image_size_px or self.family.image_size_px
        noise_BCHW = draw_noise(self.family.latent_shape(size_px), [prompt.seed for prompt in prompts])
        latents_BCHW = self.sample(prompts, noise_BCHW.to(self.family.device, self.family.unet.dtype), sampling)
        return self.family.decode_latents(latents_BCHW).cpu()

    def text_states(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Of the prompts' texts and of the empty text: two states_BLD."""
        texts = [prompt.text for prompt in prompts]
        return self.family.encode_text(texts).states_BLD, self.family.encode_text([""] * len(texts)).states_BLD

    def arguments(
        self, positive_BLD: Tensor, negative_BLD: Tensor, noise_BCHW: Tensor, sampling: Sampling
    ) -> dict[str, Any]:
        """What every pipeline of diffusers around this base is called with; it gives latents."""
        negative = TextCondition(negative_BLD) if sampling.guidance > 1 else None
        height, width = (cells * self.family.downsampling for cells in noise_BCHW.shape[-2:])
        return {
            **self.family.prompt_arguments(TextCondition(positive_BLD), negative),
            "latents": noise_BCHW,
            "num_inference_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance,
            "height": height,
            "width": width,
            "output_type": "latent",
        }


class PromptTokens(StableDiffusionMethod):
    """Stable Diffusion that reads tokens of the image prompt behind those of the text."""

    uses_text = True
    adapter: nn.Module

    @property
    def trained(self) -> int:
        return count_parameters(self.adapter)

    @abstractmethod
    def encode(self, images: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """uint8 image_3HW of any sizes → tokens_BTD of the pictures and of "no image", weighed with λ."""

    def states(self, prompts: Sequence[Prompt], scale: float) -> tuple[Tensor, Tensor]:
        """The whole context of the conditional and of the unconditional half."""
        tokens_BTD, no_image_BTD = self.encode([prompt.image_3HW for prompt in prompts], scale)
        text_BLD, empty_BLD = self.text_states(prompts)
        return torch.cat([text_BLD, tokens_BTD], 1), torch.cat([empty_BLD, no_image_BTD], 1)

    def sample(self, prompts: Sequence[Prompt], noise_BCHW: Tensor, sampling: Sampling) -> Tensor:
        arguments = self.arguments(*self.states(prompts, sampling.scale), noise_BCHW, sampling)
        return self.family.pipeline()(**arguments).images


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def squares(images: Sequence[Tensor], size_px: int) -> Tensor:
    """uint8 image_3HW of any sizes → image_B3HW in [-1, 1]: shortest side bicubic, centre crop, as CLIP reads them."""
    cut = []
    for image_3HW in images:
        height, width = image_3HW.shape[-2:]
        cut.append(fit_reference(Opened(image_3HW, (width, height), (width, height)), size_px))
    return torch.stack(cut).float() / 127.5 - 1


def load_base(path: str, dtype: str, key: str = "method.base") -> StableDiffusion:
    """Stable Diffusion 1.x or 2.x from a folder, a ``.safetensors`` file or the hub.

    Raises MissingWeights when it is not to be had, ValueError for a base of another kind.
    """
    try:
        return StableDiffusion.from_pretrained(path, dtype=dtype)
    except OSError as error:
        raise tell_missing(error, path, key) from error
    except ValueError as error:
        raise UserError(renamed(str(error), key)) from error


def load_image_encoder(path: str, dtype: str, key: str = "method.image_encoder") -> ClipVisionEncoder:
    """A CLIP image encoder in transformers' layout; raises MissingWeights, ValueError for what is none."""
    try:
        return ClipVisionEncoder.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
            raise tell_missing(error, path, key) from error
        raise UserError(renamed(str(error), key)) from error


def renamed(message: str, key: str) -> str:
    """What families and encoders complain of, with the keys that these options have here."""
    for theirs, ours in {"path": key, "dtype": "method.dtype"}.items():
        message = message.replace(f"base.{theirs}", ours).replace(f"encoder.{theirs}", ours)
    return message


def tell_missing(error: Exception, path: str, key: str) -> MissingWeights:
    """The message for a folder in a library's layout that is not to be had, here or from the hub."""
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    reason = renamed(brief(cause), key).removeprefix(f"{key}={path}").strip(":. ")
    if Path(path).exists() or "/" not in path or path.startswith((".", "/", "~")):
        return MissingWeights(f"{key}={path}: {reason}. Give a folder with the weights, or a hub id owner/name")
    repository = "/".join(path.split("/")[:2])
    return MissingWeights(
        f"{key}={path} is neither a folder here nor to be had from the hub or its cache ({reason}). Download it where "
        f"there is a network, `hf download {repository} --local-dir FOLDER`, and give {key}=FOLDER"
    )


def find_file(path: str, key: str) -> Path:
    """A file here, or one of the hub written owner/name/path; raises MissingWeights."""
    if Path(path).is_file():
        return Path(path)
    parts = path.split("/")
    if len(parts) < 3 or parts[0] in {"", ".", "..", "~"}:
        raise MissingWeights(f"{key}={path}: no such file. Give a file, or one of the hub written owner/name/path")
    from huggingface_hub import hf_hub_download

    repository, name = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:  # the hub's errors are OSErrors, ValueError is for an impossible name
        raise MissingWeights(
            f"{key}={path} is neither a file here nor to be had from the hub or its cache ({brief(error).strip('.')}). "
            f"Download https://huggingface.co/{repository}/resolve/main/{name} and give {key}=FILE"
        ) from error


def load_module(make: Callable[[dict[str, Tensor]], Built], path: str, key: str, what: str, prefix: str = "") -> Built:
    """A module with what a file holds under ``prefix``, all of it and nothing else; its sizes are the file's.

    ``make`` builds it from the weights' shapes, ``what`` names it in messages. Raises MissingWeights when there is no
    such file, ValueError when it holds something else.
    """
    file = find_file(path, key)
    try:
        state = read_state(file, prefix)
        module = make(state)
        module.load_state_dict(state)
        return module
    except KeyError as error:
        raise UserError(f"{key}={path} is not {what}: it has no {prefix}{error.args[0]}") from error
    except Exception as error:  # pickle's, safetensors' and torch's complaints have no common kind
        raise UserError(f"{key}={path} is not {what}: {brief(error)}") from error


def read_state(file: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it; of safetensors files no others are read."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name[len(prefix) :]: opened.get_tensor(name) for name in names}
    # torch maps only its newer format, a zip archive: the others are read as a whole
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    state = state.get("state_dict", state)
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
