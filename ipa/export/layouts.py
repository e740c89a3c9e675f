"""Who can read an adapter file: other programs take sizes for granted that the file does not say.

Sources: diffusers' ``_convert_ip_adapter_image_proj_to_diffusers``; ComfyUI_IPAdapter_plus' ``IPAdapter`` class.
"""

from __future__ import annotations

from ipa.adapter.heads import Head
from ipa.contracts import TokenHead
from ipa.errors import UserError
from ipa.export.adapter_file import HEADS, SIZES, WORDS

LAYOUTS = ("diffusers", "comfyui", "ipa")


def check_layout(head: Head, kind: str, layout: str) -> None:
    """Raise UserError, with the way out, when the readers of ``layout`` would misread such an adapter.

    The head may be one on the meta device, so that it is told before anything is loaded.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout}: one of {', '.join(LAYOUTS)}")
    problems = misreadings(head, kind, layout)
    if problems:
        raise UserError(
            f"this {WORDS[head_name(head)]} {kind} adapter cannot be written for {layout}: {'; '.join(problems)}. "
            "Change that for a training, or keep the adapter to ipa: adapter.layout=ipa for a training, layout=ipa for "
            "ipa.tools.export."
        )


def misreadings(head: Head, kind: str, layout: str) -> list[str]:
    """Why the readers of ``layout`` cannot read such an adapter, in words; empty if they can."""
    if layout == "ipa":
        return []
    if kind == "simple":
        return ["no other program knows simple adapters; diffusers is served through prompt_embeds"]
    sizes = taken_for_granted(head, layout)
    return [
        f"{layout} takes {option(name)}={size} for granted, it is {getattr(head, name)}"
        for name, size in sizes.items()
        if getattr(head, name) != size
    ]


def taken_for_granted(head: Head, layout: str) -> dict[str, int]:
    """Sizes, by the names of the head's attributes, that the readers of ``layout`` do not look for in the file."""
    name = head_name(head)
    if name == "global":
        return {"num_tokens": 4}
    if name == "full":
        return {}
    sizes = {"depth": 4, "head_width": 64, "expansion": 4}
    if layout == "diffusers":
        return sizes
    sdxl = head.context_width == 2048
    return sizes | {"num_tokens": 16, "heads": 20 if sdxl else 12, "width": 1280 if sdxl else head.context_width}


def check_same_sizes(file_head: TokenHead, file_kind: str, head: TokenHead, kind: str, source: str) -> None:
    """Raise UserError when a training of ``head`` and ``kind`` cannot start from the weights of a file."""
    given, wanted = (head_name(file_head), file_kind), (head_name(head), kind)
    problems = []
    if given != wanted:
        problems.append(f"it is {given[1]} and {WORDS[given[0]]}, the training {wanted[1]} and {WORDS[wanted[0]]}")
    else:
        problems += [
            f"it has {option(name)}={getattr(file_head, name)}, the training {getattr(head, name)}"
            for name in SIZES[wanted[0]]
            if getattr(file_head, name) != getattr(head, name)
        ]
    if problems:
        raise UserError(
            f"adapter.init_from={source}: {'; '.join(problems)}. Choose the experiment and the sizes of the file, or "
            "another file."
        )


def head_name(head: TokenHead) -> str:
    return next(name for name, cls in HEADS.items() if type(head) is cls)


def option(name: str) -> str:
    """What the configuration calls a size of a head."""
    return f"{'tokens' if name == 'num_tokens' else 'resampler'}.{name}"
