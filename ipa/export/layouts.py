"""Which programs can read an adapter file: some assume sizes that the file does not record."""

from __future__ import annotations

from ipa.contracts import TokenHead
from ipa.errors import UserError
from ipa.export.branches import ROWS, UNET
from ipa.export.heads import HEADS, name_of, title_of

LAYOUTS = ("diffusers", "comfyui", "ipa")
NO_IMAGE = {"zeros": "zeros", "blank": "the features of a blank image", "black": "the features of a black image"}


def check_layout(head: TokenHead, kind: str, layout: str, branches: str = UNET) -> None:
    """Raise UserError, with advice, if the readers of ``layout`` would misread such an adapter.

    The head can be on the meta device, so that this is checked before anything is loaded. ``branches`` names the base's
    row of `ipa.export.branches`.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout}: one of {', '.join(LAYOUTS)}")
    if problems := misreadings(head, kind, layout, branches):
        raise UserError(
            f"this {title_of(name_of(head))} {kind} adapter cannot be written for {layout}: {'; '.join(problems)}. "
            "Change that for a training, or write it for ipa alone: adapter.layout=ipa for a training, layout=ipa for "
            "ipa.tools.export."
        )


def misreadings(head: TokenHead, kind: str, layout: str, branches: str = UNET) -> list[str]:
    """Why the readers of ``layout`` cannot read such an adapter, in words; empty if they can."""
    if layout == "ipa":
        return []
    if kind == "simple":
        return ["no other program knows simple adapters; with diffusers, pass the tokens in prompt_embeds"]
    if branches not in ROWS:
        return ["no other program knows adapters for this base"]
    sizes = ROWS[branches].assumed(head, layout)
    if sizes is None:
        on = "" if branches == UNET else f" for {ROWS[branches].title}"
        return [f"no other program knows this head{on}"]
    return [
        f"{layout} assumes {option(name)}={size}, it is {getattr(head, name)}"
        for name, size in sizes.items()
        if getattr(head, name) != size
    ]


def other_no_image(head: TokenHead, layout: str, branches: str = UNET) -> str | None:
    """A warning if the readers of ``layout`` take something else for "no image"; they read no metadata.

    Source: ``encode_image`` of diffusers' pipelines, the negative embeddings of ComfyUI_IPAdapter_plus.
    """
    row = HEADS.get(name_of(head))
    if layout == "ipa" or row is None or branches not in ROWS:
        return None
    theirs = ROWS[branches].no_image or row.no_image
    if head.no_image == theirs:
        return None
    return (
        f'{layout} takes {NO_IMAGE[theirs]} for "no image", this adapter {NO_IMAGE[head.no_image]} '
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
    if name == "embedding_width":
        return "the encoder's width"
    return f"{'tokens' if name == 'num_tokens' else 'resampler'}.{name}"
