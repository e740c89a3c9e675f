"""Adapter files into models: for sampling and evaluation, and as the start of a training.

model = load_model(Path("runs/…/adapter.safetensors"))
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from ipa.adapter.kinds import DecoupledAdapter, SimpleAdapter
from ipa.contracts import Family
from ipa.data.images.transforms import FITS
from ipa.encoders import open_encoder, read_widths
from ipa.errors import UserError
from ipa.export.adapter_file import differences, identify_file, make_head
from ipa.export.layouts import check_same_sizes
from ipa.export.published import check_fits, from_published
from ipa.export.storage import load_adapter, read_metadata
from ipa.families import family_of
from ipa.model import IPAdapterModel

KINDS = {kind.name: kind for kind in (DecoupledAdapter, SimpleAdapter)}


def load_model(
    path: Path,
    base: str | None = None,
    encoder: str | None = None,
    encoder_weights: str | None = None,
    base_config: str | None = None,
    dtype: str = "float32",
) -> IPAdapterModel:
    """A model with the adapter of ``path``, installed; base and encoder are those of its metadata unless given.

    Raises UserError; misfits are reported before any weight is read.
    """
    file, metadata = identify_file(path), read_metadata(path)
    if encoder is None:
        encoder_weights = encoder_weights or metadata.get("encoder_weights") or None
    base, encoder = base or metadata.get("base"), encoder or metadata.get("encoder")
    if not (base and encoder):
        missing = [name for name, source in {"base": base, "encoder": encoder}.items() if not source]
        raise UserError(
            f"{path} does not say which {' and '.join(missing)} it was trained with: give "
            f"{' and '.join(f'{name}=…' for name in missing)}. It is {file.describe()}."
        )
    family_class = family_of(base, base_config)
    widths = family_class.read_widths(base, config=base_config), read_widths(encoder, encoder_weights, file.layer)
    check_fits(file, *widths, source=str(path), base=base, encoder=encoder)
    read_fit(metadata, str(path))
    family = family_class.from_pretrained(base, dtype=dtype, config=base_config)
    return load_onto(family, path, encoder, encoder_weights, dtype)


def load_onto(
    family: Family, path: Path, encoder: str | None = None, encoder_weights: str | None = None, dtype: str = "float32"
) -> IPAdapterModel:
    """A model of a loaded base with the adapter of ``path``, installed beside any others that the base has."""
    file, metadata = identify_file(path), read_metadata(path)
    fit = read_fit(metadata, str(path))
    if encoder is None:
        encoder, encoder_weights = metadata.get("encoder"), metadata.get("encoder_weights") or None
    if encoder is None:
        raise UserError(f"{path} does not say which encoder it was trained with: give encoder=…")
    widths = read_widths(encoder, encoder_weights, file.layer)
    check_fits(file, family.widths, widths, source=str(path), base=family.source, encoder=encoder)
    vision = open_encoder(encoder, encoder_weights, dtype, file.layer)
    model = IPAdapterModel(family, vision, make_head(file), KINDS[file.kind](family.hosts()), reference_fit=fit)
    load_into(model, path)
    model.adapter.install()
    return model


def read_fit(metadata: Mapping[str, str], source: str) -> str:
    """How references are cropped, as published adapters do if the metadata does not say. Raises UserError."""
    words = metadata.get("preprocessing") or FITS["crop"].words
    for name, fit in FITS.items():
        if fit.words == words:
            return name
    known = "; ".join(fit.words for fit in FITS.values())
    raise UserError(f"{source} was trained with a preprocessing that ipa does not know: {words}. Known: {known}")


def load_into(model: IPAdapterModel, path: Path) -> None:
    """Load the weights of ``path`` into the model's trainable set; raises UserError if it is for other parts."""
    file = identify_file(path)
    check_fits(
        file,
        model.family.widths,
        model.encoder.widths,
        source=str(path),
        base=model.family.source,
        encoder=model.encoder.source,
    )
    with torch.device("meta"):  # before torch loads whatever fits and then complains about the rest
        check_same_sizes(make_head(file), file.kind, model.head, model.adapter.name, str(path))
    state = from_published(load_adapter(path)[0])
    found, expected = (
        {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for tensors in (state, model.trainable.state_dict())
    )
    gaps = differences(found, expected)
    if gaps:
        raise UserError(f"{path} does not fit the branches of {model.family.name}: {'; '.join(gaps)}")
    model.trainable.load_state_dict(state)
