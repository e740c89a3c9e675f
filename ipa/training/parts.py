"""The parts of a training from its configuration: checked for fit first, then built."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from ipa.contracts import AdapterKind, TokenHead
from ipa.errors import UserError
from ipa.export.adapter_file import make_head
from ipa.export.layouts import check_layout, check_same_sizes, other_no_image
from ipa.export.published import check_fits
from ipa.export.reading import read_adapter
from ipa.model import IPAdapterModel
from ipa.training.checkpointing import load
from ipa.training.module import AVERAGE
from ipa.types import BaseWidths, EncoderWidths

log = logging.getLogger(__name__)


def check_parts(cfg: DictConfig, donor: str | Path | None = None) -> None:
    """Raise UserError, before any weight is read, if the parts cannot be trained, initialised, or exported.

    Widths come from the configuration files and headers of base and encoder. ``donor`` is the adapter file or the other
    run's checkpoint that the run begins with.
    """
    base: BaseWidths = read_widths(cfg.base)
    check_size(cfg)
    encoder: EncoderWidths = read_widths(cfg.encoder)
    head, kind = make_head_of(cfg, encoder, base), kind_of(cfg).name
    layout: str = cfg.callbacks.export.layout
    check_layout(head, kind, layout, base.branches)
    if warning := other_no_image(head, layout, base.branches):
        log.warning("%s", warning)
    if donor:
        option = "adapter.init_from" if donor == cfg.adapter.init_from else "resume"
        file = read_adapter(Path(donor)).file
        check_fits(file, base, encoder, source=str(donor), base=cfg.base.path, encoder=name_of(cfg.encoder))
        with torch.device("meta"):
            check_same_sizes(make_head(file), file.kind, head, kind, f"{option}={donor}")


def check_size(cfg: DictConfig) -> None:
    """Refuse an image size that the base cannot take, as far as its configuration tells; raises UserError."""
    multiple = read_from(cfg.base, "read_size_multiple_px")
    if cfg.image_size_px and cfg.image_size_px % multiple:
        raise UserError(f"image_size_px={cfg.image_size_px}: the base {cfg.base.path} takes multiples of {multiple} px")


def kind_of(cfg: DictConfig) -> type[AdapterKind]:
    return get_class(cfg.adapter.make._target_)


def make_head_of(cfg: DictConfig, encoder: EncoderWidths, base: BaseWidths, device: str = "meta") -> TokenHead:
    """The head that fits an encoder and a base of these widths."""
    with torch.device(device):
        return instantiate(cfg.tokens)(encoder, kind_of(cfg).token_width(base))


def check_average(cfg: DictConfig, checkpoint: Path) -> None:
    """Raise UserError if the run keeps an average, but the checkpoint of another run has none to continue."""
    if cfg.ema.decay is not None and not any(name.startswith(AVERAGE) for name in load(checkpoint)["state_dict"]):
        raise UserError(
            f"resume={checkpoint}: it was trained without ema.decay. Give ema.decay=null, or "
            f"adapter.init_from={checkpoint} to take only the weights"
        )


def read_widths(part: DictConfig) -> Any:
    """The widths of a part as its class reads them, without loading it."""
    return read_from(part, "read_widths")


def read_from(part: DictConfig, method: str) -> Any:
    return instantiate({**part, "_target_": part._target_.replace("from_pretrained", method)})


def name_of(encoder: DictConfig) -> str:
    return str(encoder.get("name") or encoder.get("path"))


def names_of_parts(cfg: DictConfig) -> list[str]:
    judge = cfg.get("judge")
    return [name_of(cfg.base), name_of(cfg.encoder), *([f"{name_of(judge)} to score with"] if judge else [])]


def build_model(cfg: DictConfig) -> IPAdapterModel:
    """Load the frozen parts and make the trainable ones, with the widths of the loaded objects."""
    family, encoder = instantiate(cfg.base), instantiate(cfg.encoder)
    head = make_head_of(cfg, encoder.widths, family.widths, "cpu")
    adapter = instantiate(cfg.adapter.make)(family.hosts())
    model = IPAdapterModel(family, encoder, head, adapter, cfg.min_snr_gamma, cfg.data.reference_fit)
    if cfg.gradient_checkpointing:
        model.checkpoint_gradients()
    if cfg.compile:
        model.compile_blocks()
    return model
