"""Loads adapter files into models: for sampling and evaluation, and as the start of a training.

model = load_model(Path("runs/…/adapter.safetensors"))
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from ipa.adapter.kinds import DecoupledAdapter, SimpleAdapter
from ipa.contracts import Family
from ipa.data.images.transforms import FITS
from ipa.encoders import open_encoder, read_widths
from ipa.errors import MissingWeights, UserError
from ipa.export.adapter_file import differences, make_head
from ipa.export.layouts import check_same_sizes
from ipa.export.published import check_fits, from_published
from ipa.export.reading import Adapter, read_adapter
from ipa.families import family_of
from ipa.files import public_source
from ipa.model import IPAdapterModel

log = logging.getLogger(__name__)

KINDS = {kind.name: kind for kind in (DecoupledAdapter, SimpleAdapter)}


def load_model(
    path: Path,
    base: str | None = None,
    encoder: str | None = None,
    encoder_weights: str | None = None,
    base_config: str | None = None,
    dtype: str = "float32",
    family: Family | None = None,
) -> IPAdapterModel:
    """A model with the adapter of ``path`` (see `reading.read_adapter`), installed.

    ``family`` is a loaded base, which may have other adapters. Otherwise base, like encoder, is that of the metadata
    unless it is given; paths that the metadata shorten are taken from the configuration of the run that the file is in.
    Raises UserError; misfits are reported before the weights of base and encoder are read.
    """
    adapter = read_adapter(path)
    fit, layer = read_fit(adapter.metadata, str(path)), adapter.file.layer
    known = known_sources(adapter.metadata, path)
    if encoder is None:
        encoder, encoder_weights = known.get("encoder"), encoder_weights or known.get("encoder_weights")
    if family is not None:
        base = family.source
    elif base is None:
        base, base_config = known.get("base"), base_config or known.get("base_config")
    if not (base and encoder):
        missing = [name for name, source in {"base": base, "encoder": encoder}.items() if not source]
        raise UserError(
            f"{path} does not say which {' and '.join(missing)} it was trained with: give "
            f"{' and '.join(f'{name}=…' for name in missing)}. It is {adapter.file.describe()}."
        )
    try:
        family_class = type(family) if family else family_of(base, base_config)
        options = {"config": base_config, **adapter.file.base_options}
        widths = family.widths if family else family_class.read_widths(base, **options)
        vision_widths = read_widths(encoder, encoder_weights, layer)
        check_fits(adapter.file, widths, vision_widths, source=str(path), base=base, encoder=encoder)
        family = family or family_class.from_pretrained(base, dtype=dtype, **options)
        vision = open_encoder(encoder, encoder_weights, dtype, layer)
    except MissingWeights as error:
        raise MissingWeights(
            f"{error} {path} was trained with the base {base} and the encoder {encoder}; if they are elsewhere, give "
            "base=… or encoder=…"
        ) from error
    kind = KINDS[adapter.file.kind](family.hosts())
    model = IPAdapterModel(family, vision, make_head(adapter.file), kind, reference_fit=fit)
    fill(model, adapter, str(path))
    model.adapter.install()
    return model


def known_sources(metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    """``base``, ``base_config``, ``encoder`` and ``encoder_weights`` as far as they are known.

    The metadata have names fit for publishing (`ipa.files.public_source`); their paths are in the run's
    ``config.yaml``, if the file is still there.
    """
    known = {name: metadata[name] for name in ("base", "encoder", "encoder_weights") if metadata.get(name)}
    for folder in (path, path.parent, path.parent.parent):
        config = read_config(folder / "config.yaml")
        base, encoder = config["base"], config["encoder"]
        paths = {"base": base.get("path"), "encoder": encoder.get("name") or encoder.get("path")}
        if encoder.get("subfolder"):
            paths["encoder"] = f"{paths['encoder']}/{encoder['subfolder']}"
        if all(isinstance(source, str) and public_source(source) == known.get(name) for name, source in paths.items()):
            paths |= {"base_config": base.get("config"), "encoder_weights": encoder.get("pretrained")}
            return {name: source for name, source in paths.items() if isinstance(source, str)}
    return known


def read_config(path: Path) -> dict[str, dict[str, Any]]:
    """``base`` and ``encoder`` of a run's configuration as plain, unresolved data; empty without one."""
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError):
        content = None
    parts = content if isinstance(content, dict) else {}
    return {name: parts[name] if isinstance(parts.get(name), dict) else {} for name in ("base", "encoder")}


def read_fit(metadata: Mapping[str, str], source: str) -> str:
    """How references are cropped: as for published adapters, unless the metadata say otherwise. Raises UserError."""
    words = metadata.get("preprocessing") or FITS["crop"].words
    for name, fit in FITS.items():
        if fit.words == words:
            return name
    known = "; ".join(fit.words for fit in FITS.values())
    raise UserError(f"{source} was trained with a preprocessing that ipa does not know: {words}. Known: {known}")


def load_into(model: IPAdapterModel, path: Path) -> None:
    """Load the weights of ``path`` into the model's trainable set; raises UserError if it is for other parts."""
    adapter = read_adapter(path)
    check_fits(
        adapter.file,
        model.family.widths,
        model.encoder.widths,
        source=str(path),
        base=model.family.source,
        encoder=model.encoder.source,
    )
    with torch.device("meta"):  # before torch loads whatever fits and then complains about the rest
        check_same_sizes(make_head(adapter.file), adapter.file.kind, model.head, model.adapter.name, str(path))
    fill(model, adapter, str(path))


def fill(model: IPAdapterModel, adapter: Adapter, source: str) -> None:
    """Load the weights into a trainable set of the same sizes, and log how they were read."""
    state = from_published(adapter.tensors, branches=adapter.file.branches)
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (state, model.trainable.state_dict())
    )
    if gaps := differences(found, expected):
        raise UserError(f"{source} does not fit the branches of {model.family.name}: {'; '.join(gaps)}")
    model.trainable.load_state_dict(state)
    for remark in adapter.remarks:
        log.warning("%s: %s", source, remark)
