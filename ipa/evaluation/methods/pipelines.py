"""Systems that diffusers has a pipeline for: how the pipeline is loaded and called.

A pipeline is loaded part by part, each with the class that the pipeline's constructor names. The common loader of
diffusers would download what is not needed here, initialise missing weights at random, and refuse the published Karlo
and Versatile Diffusion, whose model_index.json names modules that have moved inside diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import diffusers
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ipa.errors import UserError, brief
from ipa.evaluation.methods.method import Method, Prompt, draw_start
from ipa.evaluation.methods.weights import Source
from ipa.files import read_json
from ipa.sampling import SamplingOptions
from ipa.weights import count_parameters, read_dtype

# files with a tokenizer's vocabulary; without one transformers makes a tokenizer that knows no words
VOCABULARIES = ("tokenizer.json", "vocab.json", "sentencepiece.bpe.model")
# files on the hub that hold the same weights in another precision or for another library
COPIES = ("*.fp16.*", "*.non_ema.*", "*.msgpack", "*.h5", "*.onnx*", "*.xml")


class PipelineMethod(Method):
    """A system made of public pipelines, without progress bars. ``absent`` are the parts that it runs without."""

    pipeline_class: ClassVar[Any]
    absent: ClassVar[dict[str, Any]] = {}

    def __init__(self, *pipelines: Any, source: str) -> None:
        parts = [part for pipeline in pipelines for part in pipeline.components.values()]
        super().__init__(source, parts=nn.ModuleList(part for part in parts if isinstance(part, nn.Module)))
        for pipeline in pipelines:
            pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def from_pretrained(cls, path: str, dtype: str = "float16", revision: str | None = None, **options: Any) -> Self:
        """``revision`` is the hub's, ``options`` are the constructor's. Raises MissingWeights and UserError."""
        source = Source(path, revision=revision)
        return cls(load_pipeline(cls.pipeline_class, source, dtype, **cls.absent), source=path, **options)


class LatentPipelineMethod(PipelineMethod):
    """A pipeline like Stable Diffusion's: DDIM on the checkpoint's own schedule, from the seeds' own noise."""

    unet_name: ClassVar[str] = "unet"

    def __init__(self, pipeline: Any, source: str = "") -> None:
        super().__init__(pipeline, source=source)
        self.pipeline, self.unet = pipeline, pipeline.components[self.unet_name]
        # latents exceed ±1, so clipping must be off
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)

    @property
    def trained(self) -> int:
        return count_parameters(self.unet)

    @property
    def image_size_px(self) -> int:
        """The image size that the UNet was trained for."""
        return self.unet.config.sample_size * self.pipeline.vae_scale_factor

    def call(self, prompts: Sequence[Prompt], sampling: SamplingOptions, **arguments: Any) -> Tensor:
        """Pixels from the pipeline, which draws more noise from each image's own generator."""
        size_px = sampling.image_size_px or self.image_size_px
        cells = size_px // self.pipeline.vae_scale_factor
        noise_BCHW, generators = draw_start(prompts, (self.unet.config.in_channels, cells, cells))
        images = self.pipeline(
            **arguments,
            **self.pipeline_arguments(sampling, size_px),
            latents=noise_BCHW.to(self.unet.device, self.unet.dtype),
            generator=generators,
            output_type="pt",
        ).images
        return images.float() * 2 - 1


def to_pil(prompts: Sequence[Prompt]) -> list[Image.Image]:
    return [Image.fromarray(prompt.image_3HW.permute(1, 2, 0).numpy(force=True)) for prompt in prompts]


def load_pipeline(pipeline_class: Any, source: Source, dtype: str, **absent: Any) -> Any:
    """A pipeline with all its weights in ``dtype`` (torch's name); ``absent`` replaces the parts that it runs without.

    Raises MissingWeights for what is not there, UserError for what cannot be read.
    """
    torch_dtype = read_dtype(dtype, "method.dtype")
    classes = {name: part for name, part in read_classes(pipeline_class).items() if name not in absent}
    folder = find_folder(source, list(classes))
    parts = {name: load_part(part, folder / name, source, torch_dtype) for name, part in classes.items()}
    return pipeline_class(**parts, **absent)


def read_classes(pipeline_class: Any) -> dict[str, Any]:
    """Name → class of a pipeline's parts, from its constructor; None for schedulers, which are often of any class."""
    parameters = list(inspect.signature(pipeline_class.__init__).parameters.values())[1:]
    needed = {parameter.name: parameter.annotation for parameter in parameters if parameter.default is parameter.empty}
    return {name: None if name.endswith("scheduler") else part for name, part in needed.items()}


def find_folder(source: Source, parts: Sequence[str]) -> Path:
    """A local folder with a subfolder for each of the parts; raises MissingWeights."""
    folder = Path(source.path)
    if not folder.is_dir():
        try:
            folder = download(source, parts)
        except (OSError, ValueError) as error:  # ValueError: an impossible name
            raise source.missing(
                f"is neither a local folder nor available from the hub or its cache ({brief(error)})"
            ) from error
    if absent := [part for part in parts if not (folder / part).is_dir()]:
        raise source.missing(f"has no {', '.join(f'{part}/' for part in absent)}")
    return folder


def download(source: Source, parts: Sequence[str]) -> Path:
    """The parts' files in the hub's cache; pickled weights are only fetched where there are no others."""
    from huggingface_hub import snapshot_download

    def fetch(pattern: str, names: Sequence[str], *ignored: str) -> Path:
        which: Any = {"allow_patterns": [f"{name}/{pattern}" for name in names], "ignore_patterns": [*COPIES, *ignored]}
        return Path(snapshot_download(source.path, revision=source.revision, **which))

    folder = fetch("*", parts, "*.bin")
    models = [part for part in parts if (folder / part / "config.json").is_file()]
    pickled = [part for part in models if not any((folder / part).glob("*.safetensors"))]
    return fetch("*.bin", pickled) if pickled else folder


def load_part(part_class: Any, folder: Path, source: Source, dtype: torch.dtype) -> Any:
    """One part from its folder; raises MissingWeights for what is not there, UserError for what is broken.

    Where diffusers does not distinguish the two it is MissingWeights: another download fixes both.
    """
    try:
        if part_class is None:
            return read_scheduler_class(folder, source).from_pretrained(folder)
        if issubclass(part_class, nn.Module):
            part, info = part_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
            if missing := info["missing_keys"]:  # both libraries would initialise them at random
                raise source.missing(f"lacks {len(missing)} weights of {folder.name}/, {min(missing)} among them")
            return part
        is_tokenizer = issubclass(part_class, PreTrainedTokenizerBase)
        if is_tokenizer and not any((folder / name).is_file() for name in VOCABULARIES):
            raise source.missing(f"has none of {', '.join(VOCABULARIES)} in {folder.name}/")
        return part_class.from_pretrained(folder)
    except UserError:
        raise
    except OSError as error:
        raise source.missing(f"cannot be read in {folder.name}/ ({brief(error)})") from error
    except Exception as error:  # the libraries pass on whatever breaks: pickle's, safetensors', torch's errors
        raise UserError(f"{source.key}={source.path} cannot be read in {folder.name}/: {brief(error)}") from error


def read_scheduler_class(folder: Path, source: Source) -> Any:
    """The class of diffusers that a scheduler's configuration names."""
    name = read_json(folder / "scheduler_config.json", "download it again").get("_class_name", "nothing")
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, SchedulerMixin)):
        raise UserError(f"{source.key}={source.path}: {folder.name}/ names {name}, which is no scheduler of diffusers")
    return found
