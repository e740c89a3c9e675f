"""The parts of a training from its configuration: checked for fit first, then built."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from ipa.contracts import ADD_TEXTS, AdapterKind, TokenHead
from ipa.errors import UserError
from ipa.export.adapter_file import make_head
from ipa.export.layouts import check_layout, check_same_sizes, other_no_image
from ipa.export.published import check_fits
from ipa.export.reading import read_adapter
from ipa.model import IPAdapterModel, check_head
from ipa.objective import MaskedLoss
from ipa.training.checkpointing import load
from ipa.training.module import AVERAGE
from ipa.types import BaseWidths, EncoderWidths, TextInputs

REQUIRED = "required"  # adapter.init_from of experiments that begin with an adapter

log = logging.getLogger(__name__)


def check_parts(cfg: DictConfig, donor: str | Path | None = None) -> None:
    """Raise UserError, before any weight is read, if the parts cannot be trained, initialised, or exported.

    Widths come from the configuration files and headers of base and encoder. ``donor`` is the adapter file or the other
    run's checkpoint that the run begins with.
    """
    base: BaseWidths = read_from(cfg.base, "read_widths")
    check_size(cfg)
    encoder: EncoderWidths = read_from(cfg.encoder, "read_widths")
    head, kind = make_head_of(cfg, encoder, base), kind_of(cfg).name
    layout: str = cfg.callbacks.export.layout
    check_head(head, kind, base.branches)
    check_layout(head, kind, layout, base.branches)
    if warning := other_no_image(head, layout, base.branches):
        log.warning("%s", warning)
    check_training(cfg, kind, donor)
    if donor:
        option = "adapter.init_from" if donor == cfg.adapter.init_from else "resume"
        file = read_adapter(Path(donor)).file
        check_fits(file, base, encoder, source=str(donor), base=cfg.base.path, encoder=name_of(cfg.encoder))
        with torch.device("meta"):
            check_same_sizes(make_head(file), file.kind, head, kind, f"{option}={donor}")


def check_size(cfg: DictConfig) -> None:
    """Raise UserError for an image size that the base's configuration rules out."""
    multiple = read_from(cfg.base, "read_size_multiple_px")
    if cfg.image_size_px and cfg.image_size_px % multiple:
        raise UserError(f"image_size_px={cfg.image_size_px}: the base {cfg.base.path} takes multiples of {multiple} px")


def kind_of(cfg: DictConfig) -> type[AdapterKind]:
    return get_class(cfg.adapter.make._target_)


def make_head_of(cfg: DictConfig, encoder: EncoderWidths, base: BaseWidths, device: str = "meta") -> TokenHead:
    """The head that fits an encoder and a base of these widths."""
    with torch.device(device):
        return instantiate(cfg.tokens)(encoder, kind_of(cfg).token_width(base))


def check_training(cfg: DictConfig, kind: str, donor: str | Path | None) -> None:
    """What the parts cannot do in training; raises UserError."""
    if donor == REQUIRED:
        raise UserError(
            "this experiment starts from an adapter: give adapter.init_from=FILE, a published adapter or one of a run, "
            "and tokens= and kind= as it has them"
        )
    freeze, chances = cfg.adapter.get("freeze"), cfg.data.references.chances
    if freeze is not None and (freeze not in ("head", "branches") or kind == "simple"):
        others = "it has nothing but a head" if kind == "simple" else "head, branches, or null to train both"
        raise UserError(f"adapter.freeze={freeze}, of a {kind} adapter: {others}")
    if kind == "simple" and cfg.scale_warmup_steps:
        raise UserError(
            f"scale_warmup_steps={cfg.scale_warmup_steps}: a simple adapter has no branches whose λ could grow; give 0"
        )
    width, time_width = cfg.tokens.get("width"), cfg.base.get("time_width")
    if "time_channels" in cfg.tokens and time_width not in (None, width):
        raise UserError(f"base.time_width={time_width}: the head's time embedding is {width} wide; give the same")
    family: Any = get_class(cfg.base._target_.rpartition(".")[0])
    family.check_options(cfg.min_snr_gamma, cfg.sampling.get("guidance_rescale", 0.0))
    if sum(chance > 0 for chance in chances[1:]) and (kind == "simple" or not family.supports_absence):
        what = (
            "a simple adapter's tokens are a part of the text"
            if kind == "simple"
            else f"so far not with {cfg.base._target_}"
        )
        raise UserError(
            f"data.references.chances={list(chances)}: several references need branches that leave out absent ones, "
            f"and {what}. Give [1]"
        )


def check_average(cfg: DictConfig, checkpoint: Path) -> None:
    """Raise UserError if the run keeps an average, but the checkpoint of another run has none to continue."""
    if cfg.ema.decay is not None and not any(name.startswith(AVERAGE) for name in load(checkpoint)["state_dict"]):
        raise UserError(
            f"resume={checkpoint}: it was trained without ema.decay. Give ema.decay=null, or "
            f"adapter.init_from={checkpoint} to take only the weights"
        )


def read_from(part: DictConfig, method: str) -> Any:
    """Call another class method of a part with its options, such as ``read_widths``, which loads no weights."""
    return instantiate({**part, "_target_": part._target_.replace("from_pretrained", method)})


def name_of(encoder: DictConfig) -> str:
    return str(encoder.get("name") or encoder.get("path"))


def names_of_parts(cfg: DictConfig) -> list[str]:
    judge = cfg.get("judge")
    return [name_of(cfg.base), name_of(cfg.encoder), *([f"{name_of(judge)} to score with"] if judge else [])]


def check_texts(cfg: DictConfig, texts: Mapping[str, TextInputs] | None) -> None:
    """Raise UserError if previews need the states of a text that the data do not have."""
    if texts is not None and (cfg.preview.text or "") not in texts:
        raise UserError(f"preview.text={cfg.preview.text} is not among the texts of the feature cache: {ADD_TEXTS}")


def build_model(cfg: DictConfig, texts: Mapping[str, TextInputs] | None = None) -> IPAdapterModel:
    """Load the frozen parts, without text encoders for known ``texts``, and make the trainable ones."""
    family: Any = instantiate(cfg.base, **({} if texts is None else {"leave_out": ["text"]}))
    family.known_texts, encoder = texts, instantiate(cfg.encoder)
    head = make_head_of(cfg, encoder.widths, family.widths, "cpu")
    adapter = instantiate(cfg.adapter.make)(family.hosts())
    masked_loss = MaskedLoss(cfg.loss_mask_outside, cfg.loss_mask_prior)
    model = IPAdapterModel(family, encoder, head, adapter, cfg.min_snr_gamma, cfg.data.reference_fit, masked_loss)
    if cfg.adapter.freeze is not None:
        model.freeze(cfg.adapter.freeze)
    if cfg.gradient_checkpointing:
        model.checkpoint_gradients()
    if cfg.compile:
        model.compile_blocks()
    return model
