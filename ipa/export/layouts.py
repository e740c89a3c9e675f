"""Which programs can read an adapter file: some assume sizes that the file does not record."""

from __future__ import annotations

from ipa.contracts import TokenHead
from ipa.errors import UserError
from ipa.export.adapter_file import UNET_FAMILIES
from ipa.export.heads import HEADS, name_of, title_of

LAYOUTS = ("diffusers", "comfyui", "ipa")
NO_IMAGE = {"zeros": "zeros", "blank": "the features of a blank image"}


def check_layout(head: TokenHead, kind: str, layout: str, family: str = "") -> None:
    """Raise UserError, with advice, if the readers of ``layout`` would misread such an adapter.

    The head can be on the meta device, so that this is checked before anything is loaded. ``family`` is the base's,
    empty for published files.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout}: one of {', '.join(LAYOUTS)}")
    problems = misreadings(head, kind, layout, family)
    if problems:
        raise UserError(
            f"this {title_of(name_of(head))} {kind} adapter cannot be written for {layout}: {'; '.join(problems)}. "
            "Change that for a training, or write it for ipa alone: adapter.layout=ipa for a training, layout=ipa for "
            "ipa.tools.export."
        )


def misreadings(head: TokenHead, kind: str, layout: str, family: str = "") -> list[str]:
    """Why the readers of ``layout`` cannot read such an adapter, in words; empty if they can."""
    if layout == "ipa":
        return []
    if family not in UNET_FAMILIES:
        return [f"only adapters for UNets have a public layout, not those for {family}"]
    if kind == "simple":
        return ["no other program knows simple adapters; with diffusers, pass the tokens in prompt_embeds"]
    row = HEADS.get(name_of(head))
    if row is None or row.assumed is None:
        return ["no other program knows this head"]
    return [
        f"{layout} assumes {option(name)}={size}, it is {getattr(head, name)}"
        for name, size in row.assumed(head, layout).items()
        if getattr(head, name) != size
    ]


def other_no_image(head: TokenHead, layout: str) -> str | None:
    """A warning if the readers of ``layout`` take something else for "no image"; they read no metadata.

    Source: ``encode_image`` of diffusers' pipelines, the negative embeddings of ComfyUI_IPAdapter_plus.
    """
    row = HEADS.get(name_of(head))
    if layout == "ipa" or row is None or head.no_image == row.no_image:
        return None
    return (
        f'{layout} takes {NO_IMAGE[row.no_image]} for "no image", this adapter {NO_IMAGE[head.no_image]} '
        f"(tokens.no_image={head.no_image}): under guidance its images differ. They agree in diffusers with "
        "ip_adapter_image_embeds=[torch.stack([negative, positive])], see docs/diffusers.md"
    )


def check_same_sizes(file_head: TokenHead, file_kind: str, head: TokenHead, kind: str, source: str) -> None:
    """Raise UserError if a training of ``head`` and ``kind`` cannot start from the weights of a file."""
    given, wanted = name_of(file_head), name_of(head)
    if (given, file_kind) != (wanted, kind):
        problems = [f"it is {file_kind} and {title_of(given)}, the training {kind} and {title_of(wanted)}"]
    else:
        problems = [
            f"it has {option(name)}={getattr(file_head, name)}, the training {getattr(head, name)}"
            for name in HEADS[given].shared
            if getattr(file_head, name) != getattr(head, name)
        ]
    if problems:
        raise UserError(
            f"{source}: {'; '.join(problems)}. Choose the experiment and the sizes of the file, or another file."
        )


def option(name: str) -> str:
    """The configuration's name of a head's size."""
    return f"{'tokens' if name == 'num_tokens' else 'resampler'}.{name}"
