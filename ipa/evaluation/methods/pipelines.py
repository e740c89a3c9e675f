"""What the systems that diffusers has a pipeline for share: how one is loaded, and how pictures come from its own call.

A pipeline is loaded part by part, each by the class that the pipeline's constructor names. The pipelines' common loader
would fetch what is not needed here, start weights that are missing at random, and refuse the published Karlo and
Versatile Diffusion, since the modules that their model_index.json names have moved inside diffusers.

Letters: B pictures; C, H, W of pixels or latents.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import diffusers
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ipa.errors import UserError, brief
from ipa.evaluation.methods.method import MissingWeights, Prompt, Sampling
from ipa.families.latent_diffusion import to_dtype

# one of them holds a tokenizer's words; without any, transformers makes a tokenizer that knows none
VOCABULARIES = ("tokenizer.json", "vocab.json", "sentencepiece.bpe.model")
# files of the hub that hold the same weights once more, in another precision or for other libraries
COPIES = ("*.fp16.*", "*.non_ema.*", "*.msgpack", "*.h5", "*.onnx*", "*.xml")


class PipelineMethod(nn.Module, ABC):
    """A system made of public pipelines: in eval mode, without gradients and progress bars."""

    name: ClassVar[str]
    uses_text: ClassVar[bool]

    def __init__(self, *pipelines: Any, source: str) -> None:
        super().__init__()
        self.source = source
        parts = [part for pipeline in pipelines for part in pipeline.components.values()]
        self.parts = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self.eval().requires_grad_(False)
        for pipeline in pipelines:
            pipeline.set_progress_bar_config(disable=True)

    @property
    @abstractmethod
    def trained(self) -> int | None:
        """Parameters that were trained for image prompts."""

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        """Pixels in [-1, 1] up to rounding, of any float type and device."""

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Tensor:
        return self.sample(prompts, sampling).float().cpu().clamp(-1, 1)


class LatentPipelineMethod(PipelineMethod):
    """A pipeline of the Stable Diffusion kind: DDIM on the checkpoint's own schedule, from the seeds' own noise."""

    def __init__(self, pipeline: Any, unet: Any, source: str) -> None:
        super().__init__(pipeline, source=source)
        self.pipeline, self.unet = pipeline, unet
        # latents go beyond ±1, so they are never clipped
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)

    @property
    def image_size_px(self) -> int:
        """The picture size that the UNet was made for."""
        return self.unet.config.sample_size * self.pipeline.vae_scale_factor

    def call(self, prompts: Sequence[Prompt], sampling: Sampling, **arguments: Any) -> Tensor:
        """Pixels from the pipeline; each picture's generator stands behind its starting noise."""
        factor = self.pipeline.vae_scale_factor
        size_px = sampling.image_size_px or self.image_size_px
        noise_BCHW, generators = draw_start(prompts, (self.unet.config.in_channels, *[size_px // factor] * 2))
        images = self.pipeline(
            **arguments,
            latents=noise_BCHW.to(self.unet.device, self.unet.dtype),
            generator=generators,
            num_inference_steps=sampling.num_steps,
            guidance_scale=sampling.guidance,
            height=size_px,
            width=size_px,
            output_type="pt",
        ).images
        return images.float() * 2 - 1


def pictures(prompts: Sequence[Prompt]) -> list[Image.Image]:
    return [Image.fromarray(prompt.image_3HW.permute(1, 2, 0).numpy(force=True)) for prompt in prompts]


def make_generators(prompts: Sequence[Prompt]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]


def draw_start(prompts: Sequence[Prompt], shape_CHW: tuple[int, ...]) -> tuple[Tensor, list[torch.Generator]]:
    """Starting noise_BCHW, each picture's from its own seed, and the generators that it came from, for what is next."""
    generators = make_generators(prompts)
    return torch.stack([torch.randn(shape_CHW, generator=generator) for generator in generators]), generators


class Source(NamedTuple):
    """Where a pipeline is: a folder or hub id, which revision of the hub's, and the key that the user gave it with."""

    path: str
    revision: str | None = None
    key: str = "method.path"


def load_pipeline(pipeline_class: Any, source: Source, dtype: str, **absent: Any) -> Any:
    """A pipeline with all its weights in ``dtype`` (torch's name), but for parts that it is to go without.

    Raises MissingWeights for what is not there, ValueError for what cannot be read.
    """
    torch_dtype = to_dtype(dtype, "method.dtype")
    classes = {name: part for name, part in read_classes(pipeline_class).items() if name not in absent}
    folder = find_folder(source, list(classes))
    parts = {name: load_part(part, folder / name, source, torch_dtype) for name, part in classes.items()}
    return pipeline_class(**parts, **absent)


def read_classes(pipeline_class: Any) -> dict[str, Any]:
    """The parts that a pipeline needs, with their classes, from its constructor.

    Of a scheduler it often says no more than that any will do: that is None here.
    """
    parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
    needed = {parameter.name: parameter.annotation for parameter in parameters if parameter.default is parameter.empty}
    return {name: None if name.endswith("scheduler") else part for name, part in needed.items()}


def find_folder(source: Source, parts: Sequence[str]) -> Path:
    """A local folder with a subfolder for each of the parts; raises MissingWeights."""
    folder = Path(source.path)
    if not folder.is_dir():
        try:
            folder = download(source, parts)
        except (OSError, ValueError) as error:  # the hub's errors are OSErrors, ValueError is for an impossible name
            found = f"is neither a folder here nor to be had from the hub or its cache ({brief(error)})"
            raise tell_missing(source, found) from error
    absent = [part for part in parts if not (folder / part).is_dir()]
    if absent:
        raise tell_missing(source, f"has no {', '.join(f'{part}/' for part in absent)}")
    return folder


def download(source: Source, parts: Sequence[str]) -> Path:
    """The parts' files in the hub's cache; pickled weights are fetched only where there are no others."""
    from huggingface_hub import snapshot_download

    def fetch(pattern: str, names: Sequence[str], *ignored: str) -> Path:
        patterns = [f"{name}/{pattern}" for name in names]
        ignore = [*COPIES, *ignored]
        return Path(
            snapshot_download(source.path, revision=source.revision, allow_patterns=patterns, ignore_patterns=ignore)
        )

    folder = fetch("*", parts, "*.bin")
    models = [part for part in parts if (folder / part / "config.json").is_file()]
    pickled = [part for part in models if not any((folder / part).glob("*.safetensors"))]
    return fetch("*.bin", pickled) if pickled else folder


def load_part(part_class: Any, folder: Path, source: Source, dtype: torch.dtype) -> Any:
    """One part from its folder; raises MissingWeights for what is not there, ValueError for what is broken.

    Where diffusers does not tell the two apart it is MissingWeights: both are mended by another download.
    """
    try:
        if part_class is None:
            return read_scheduler_class(folder).from_pretrained(folder)
        if issubclass(part_class, nn.Module):
            part, info = part_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
            check_complete(info["missing_keys"], folder, source)
            return part
        if issubclass(part_class, PreTrainedTokenizerBase):
            check_vocabulary(folder, source)
        return part_class.from_pretrained(folder)
    except MissingWeights:
        raise
    except OSError as error:
        raise tell_missing(source, f"cannot be read in {folder.name}/ ({brief(error)})") from error
    except Exception as error:  # the libraries let through whatever breaks: pickle's, safetensors', torch's
        raise UserError(f"{source.key}={source.path} cannot be read in {folder.name}/: {brief(error)}") from error


def read_scheduler_class(folder: Path) -> Any:
    """The class of diffusers that a scheduler's configuration names."""
    name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise UserError(f"diffusers has no scheduler {name}")
    return found


def check_complete(missing: Sequence[str], folder: Path, source: Source) -> None:
    """Both libraries would start what is missing at random."""
    if missing:
        raise tell_missing(source, f"lacks {len(missing)} weights of {folder.name}/, {min(missing)} among them")


def check_vocabulary(folder: Path, source: Source) -> None:
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise tell_missing(source, f"has none of {', '.join(VOCABULARIES)} in {folder.name}/")


def tell_missing(source: Source, found: str) -> MissingWeights:
    """``found`` says what is wrong with the source; the message goes on with what to do."""
    revision = f" --revision {source.revision}" if source.revision else ""
    name = "OWNER/NAME" if Path(source.path).exists() else f"{source.path}{revision}"
    return MissingWeights(
        f"{source.key}={source.path} {found}. Download it where there is a network, `hf download {name} "
        f"--local-dir FOLDER`, and give {source.key}=FOLDER"
    )
