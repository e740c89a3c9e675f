"""Frozen networks that embed images of any size, and the errors for missing ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ipa.encoders.vision_model import load_network, locate, read_config
from ipa.errors import MissingWeights, UserError, brief
from ipa.metrics.image_metric import Images, fit_square, on_each_size
from ipa.types import to_uint8
from ipa.weights import Frozen

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageNetwork(Frozen):
    """A frozen network with a row of features for every image, from ``_embed``; several metrics can share it.

    Images are resized (shortest side to ``size_px``, bicubic, antialias), cropped to the centre ``crop_px``, and
    normalised with ``mean`` and ``std`` of [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, size_px: int, crop_px: int | None = None, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
    ) -> None:
        super().__init__()
        self.image_size_px, self.crop_px = size_px, crop_px or size_px
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def freeze(self) -> Self:
        """For subclasses, after the network is assigned."""
        return self.eval().requires_grad_(False)

    @torch.no_grad()
    def embed_images(self, images: Images, batch_size: int = 64) -> Tensor:
        """features_BE, on the network's device."""
        batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        return torch.cat([self._embed(on_each_size(self._prepare, batch)) for batch in batches])

    def _prepare(self, pixels_B3HW: Tensor) -> Tensor:
        fitted = fit_square(pixels_B3HW.to(self.mean.device, torch.float32), self.image_size_px, self.crop_px)
        return ((fitted + 1) / 2 - self.mean) / self.std

    def _embed(self, prepared_B3HW: Tensor) -> Tensor:
        raise NotImplementedError


class DinoNetwork(ImageNetwork):
    """Unit-length class tokens of a DINO vision transformer (Oquab et al. 2023), preprocessed as by its authors.

    None of the compared systems conditions on it.
    """

    def __init__(self, transformer: Any, size_px: int = 256, crop_px: int = 224, name: str = "") -> None:
        super().__init__(size_px, crop_px, IMAGENET_MEAN, IMAGENET_STD)
        self.transformer, self.name = transformer, name
        self.freeze()

    @classmethod
    def from_pretrained(cls, path: str, size_px: int = 256, crop_px: int = 224) -> Self:
        """``path`` is a folder or hub id. Raises MissingWeights if it is not found, UserError if it is incomplete."""
        folder = locate(path, option="network.path")
        return cls(load_network(folder, read_config(folder), unused="pooler"), size_px, crop_px, path)

    def _embed(self, prepared_B3HW: Tensor) -> Tensor:
        return F.normalize(self.transformer(prepared_B3HW).last_hidden_state[:, 0], dim=-1)


class InceptionNetwork(ImageNetwork):
    """The 2048 features of the Inception v3 that defines FID and KID, from torch-fidelity.

    Images are resized with antialias (Parmar et al. 2022: otherwise the figures depend on the library).
    """

    FILE = "weights-inception-2015-12-05-6726825d.pth"

    def __init__(self, inception: Any) -> None:
        super().__init__(inception.INPUT_IMAGE_SIZE)
        self.inception = inception
        self.freeze()

    @classmethod
    def from_pretrained(cls, path: str | None = None) -> Self:
        """``path`` is the file of weights; None: torch hub's folder, downloaded if missing. Raises MissingWeights."""
        try:
            from torch_fidelity import feature_extractor_inceptionv3 as fidelity
        except ImportError as error:
            raise MissingWeights(
                "FID and KID need the package torch-fidelity: pip install -e '.[fid]', or omit the two"
            ) from error
        file = download(fidelity.URL_INCEPTION_V3, cls.FILE) if path is None else Path(path)
        if not file.is_file():
            url = fidelity.URL_INCEPTION_V3
            raise MissingWeights(f"Inception path={path}: no such file; download {url} and give the file as path")
        torch.load(file, map_location="cpu", weights_only=True)  # the package would unpickle anything
        return cls(fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(file)))

    def _prepare(self, pixels_B3HW: Tensor) -> Tensor:
        return to_uint8(fit_square(pixels_B3HW.to(self.mean.device, torch.float32), self.image_size_px))

    def _embed(self, prepared_B3HW: Tensor) -> Tensor:
        return self.inception(prepared_B3HW)[0]


class DreamSimNetwork(ImageNetwork):
    """Unit-length embeddings trained on human similarity judgements (Fu et al. 2023), from the package dreamsim."""

    def __init__(self, dreamsim: Any, size_px: int = 224) -> None:
        super().__init__(size_px)
        self.dreamsim = dreamsim
        self.freeze()

    @classmethod
    def from_pretrained(cls, folder: str | Path, kind: str = "ensemble") -> Self:
        """``folder`` holds the unpacked weights; missing ones are downloaded there. Raises MissingWeights."""
        try:
            from dreamsim import dreamsim
            from dreamsim.config import dreamsim_weights
        except ImportError as error:
            raise MissingWeights("DreamSim needs its package: pip install dreamsim, or omit it") from error
        if kind not in dreamsim_weights:
            raise UserError(f"DreamSim kind={kind}: one of {', '.join(dreamsim_weights)}")
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        hub = torch.hub.get_dir()
        try:
            network, _ = dreamsim(device="cpu", cache_dir=str(folder), dreamsim_type=kind)
        except OSError as error:
            raise MissingWeights(
                f"DreamSim kind={kind} folder={folder}: {brief(error)}. Download and unpack "
                f"{dreamsim_weights[kind]} there"
            ) from error
        finally:
            torch.hub.set_dir(hub)  # the package changes it for the whole process
        return cls(network)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        super().to(*args, **kwargs)
        extractors: list[Any] = list(self.modules())
        for module in extractors:
            if "device" in vars(module):  # the package's extractors store their first device
                module.device = self.mean.device
        return self

    def _prepare(self, pixels_B3HW: Tensor) -> Tensor:
        """Squash the whole image into the square, as its authors do."""
        pixels_B3HW = pixels_B3HW.to(self.mean.device, torch.float32)
        sides = (self.image_size_px, self.image_size_px)
        return (F.interpolate(pixels_B3HW, sides, mode="bicubic", antialias=True).clamp(-1, 1) + 1) / 2

    def _embed(self, prepared_B3HW: Tensor) -> Tensor:
        return F.normalize(self.dreamsim.embed(prepared_B3HW), dim=-1)


def download(url: str, name: str) -> Path:
    """The file in torch hub's folder, downloaded if it is missing; raises MissingWeights if that fails."""
    file = Path(torch.hub.get_dir(), "checkpoints", name)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), progress=False)
        except OSError as error:  # including urllib's
            raise MissingWeights(
                f"{name}: {brief(error)}. Download {url} and give the file as path, or put it into {file.parent}"
            ) from error
    return file


def find_file(path: str, key: str) -> Path:
    """A local file, or one on the hub written owner/name/path; raises MissingWeights."""
    if Path(path).is_file():
        return Path(path)
    parts = path.split("/")
    if len(parts) < 3 or parts[0] in {"", ".", "..", "~"}:
        raise MissingWeights(f"{key}={path}: no such file. Give a file, or one on the hub written owner/name/path")
    return find_on_hub("/".join(parts[:2]), "/".join(parts[2:]), key)


def find_on_hub(repository: str, name: str, key: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError) as error:  # ValueError: an impossible name
        raise MissingWeights(
            f"{key}={repository}/{name} is neither a local file nor available from the hub or its cache "
            f"({brief(error).strip('.')}). Download https://huggingface.co/{repository}/resolve/main/{name} and give "
            f"{key}=FILE"
        ) from error
