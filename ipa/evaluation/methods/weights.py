"""How a system's weights are found and read: bases, image encoders, ControlNets, and single files of adapters."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel
from torch import Tensor, nn

from ipa.contracts import Family
from ipa.encoders.vision_model import VisionModelEncoder
from ipa.errors import MissingWeights, UserError, brief
from ipa.families.stable_diffusion import StableDiffusion
from ipa.files import is_hub_id
from ipa.metrics.networks import find_file
from ipa.weights import read_dtype

Built = TypeVar("Built", bound=nn.Module)


class Source(NamedTuple):
    """A folder or hub id, the option that it was given with, and a revision on the hub."""

    path: str
    key: str = "method.path"
    revision: str | None = None

    def missing(self, reason: str) -> MissingWeights:
        """The error that says what is wrong with the source, and how to download it."""
        return MissingWeights(f"{self.key}={self.path} {reason}. {self.advice}")

    @property
    def advice(self) -> str:
        revision = f" --revision {self.revision}" if self.revision else ""
        repository = "/".join(self.path.split("/")[:2])
        repository = repository + revision if is_hub_id(repository) else "OWNER/NAME"
        return (
            f"Download it where there is a network, `hf download {repository} --local-dir FOLDER`, and give "
            f"{self.key}=FOLDER"
        )


@contextmanager
def options_renamed(names: Mapping[str, str], advice: str = "") -> Iterator[None]:
    """Give errors of families and encoders the names of our options; ``advice`` is for missing weights."""
    try:
        yield
    except (UserError, OSError) as error:
        message = str(error) if isinstance(error, UserError) else brief(error)
        for theirs, ours in names.items():
            message = message.replace(theirs, ours)
        if isinstance(error, MissingWeights | OSError):
            raise MissingWeights(f"{message.rstrip('.')}. {advice}".strip()) from error
        raise UserError(message) from error


def load_base(path: str, dtype: str) -> StableDiffusion:
    """Stable Diffusion 1.x or 2.x. Raises MissingWeights, and UserError for a base of another kind."""
    source = Source(path, "method.base")
    with options_renamed({"base.path": source.key, "base.dtype": "method.dtype"}, source.advice):
        return StableDiffusion.from_pretrained(path, dtype=dtype)


def load_image_encoder(path: str, dtype: str) -> VisionModelEncoder:
    """A CLIP image encoder in transformers' layout. Raises MissingWeights, and UserError for anything else."""
    source = Source(path, "method.image_encoder")
    with options_renamed({"encoder.path": source.key, "encoder.dtype": "method.dtype"}, source.advice):
        return VisionModelEncoder.from_pretrained(path, dtype=dtype)


def load_controlnet(path: str, dtype: str) -> ControlNetModel:
    """Raises MissingWeights, and UserError for one that lacks weights."""
    source, torch_dtype = Source(path, "method.controlnet"), read_dtype(dtype, "method.dtype")
    try:
        controlnet, info = ControlNetModel.from_pretrained(path, dtype=torch_dtype, output_loading_info=True)
    except OSError as error:
        raise source.missing(f"cannot be loaded ({brief(error)})") from error
    except Exception as error:  # diffusers passes on whatever breaks in a file
        raise UserError(f"method.controlnet={path} is not a ControlNet: {brief(error)}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"method.controlnet={path}: {len(missing)} weights are missing, {missing[0]} among them")
    return controlnet


def controlnet_pipeline(family: Family, controlnet: ControlNetModel) -> Any:
    """The pipeline of diffusers with a ControlNet (Zhang et al. 2023) around a family's parts."""
    pipeline: Any = AutoPipelineForText2Image.from_pipe(family.pipeline(), controlnet=controlnet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_module(
    make: Callable[[], Built],
    path: str,
    what: str,
    prefix: str = "",
    key: str = "method.adapter",
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Built:
    """A module with exactly the weights that a file holds under ``prefix``, after ``rename``.

    ``what`` names it in messages. Raises MissingWeights without such a file, UserError for something else.
    """
    file = find_file(path, key)
    try:
        state = rename(read_state(file, prefix))
        with torch.device("meta"):  # its own weights are never used
            module = make()
        expected, found = ({(n, each.shape) for n, each in own.items()} for own in (module.state_dict(), state))
    except Exception as error:  # pickle's, safetensors' and torch's errors have no common class
        raise UserError(f"{key}={path} is not {what}: {brief(error)}") from error
    if differ := sorted(name for name, _ in expected ^ found):
        raise UserError(f"{key}={path} is not {what}: {prefix}{differ[0]} is missing, unknown or of another shape")
    module.load_state_dict(state, assign=True)
    return module


def read_state(file: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, without it; only these are read from a safetensors file."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name[len(prefix) :]: opened.get_tensor(name) for name in names}
    # torch maps only its newer format, a zip archive
    state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    whole = state.get("state_dict", state)
    return {name[len(prefix) :]: tensor for name, tensor in whole.items() if name.startswith(prefix)}
