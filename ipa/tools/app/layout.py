"""The components of the page, and where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ipa.references import COMBINE
from ipa.tools.app.uploads import MAX_IMAGES, MAX_STEPS

HERE = Path(__file__).parent
CANVAS_PX = 512  # the longer side of what is painted on


@dataclass(frozen=True)
class Offer:
    """What the loaded model has, and how it samples unless it is told otherwise."""

    adapters: list[tuple[str, str]]  # label, file
    presets: Sequence[str]
    edge_px: int
    multiple_px: int
    num_steps: int
    guidance: float
    guidance_rescale: float
    has_control: bool


def make_inputs(offer: Offer) -> dict[str, Any]:
    """By the names of the command's options, but for ``scales`` and ``count``, which stand for lists."""
    gallery: dict[str, Any] = {"interactive": True, "sources": ["upload", "clipboard"], "buttons": []}
    gallery |= {"columns": 4, "height": 220, "object_fit": "contain", "fit_columns": False}
    found: dict[str, Any] = {
        "image": gr.Gallery(label="Pictures", type="filepath", file_types=["image"], **gallery),
        "text": gr.Textbox(label="Text", placeholder="empty: the picture alone decides"),
        "negative_text": gr.Textbox(label="Negative text", placeholder="what should not be there"),
        "scale": gr.Slider(0, 2, 1, step=0.05, label="λ, the weight of the picture"),
    }
    with gr.Accordion("Where and when the picture acts", open=False):
        found |= make_place(offer)
    with gr.Accordion("Side by side", open=False):
        found |= make_comparison(offer)
    with gr.Accordion("Size, steps, guidance", open=False):
        found |= make_sampling(offer)
    with gr.Accordion("Start image and control", open=False):
        found |= make_control(offer.has_control)
    for name, component in found.items():
        component.elem_id = name
    return found


def make_place(offer: Offer) -> dict[str, Any]:
    blocks = gr.Dropdown(list(offer.presets), label="Preset of λ per block (several: side by side)", multiselect=True)
    found: dict[str, Any] = {"blocks": blocks}
    with gr.Row():
        found["start"] = gr.Slider(0, 1, 0, step=0.05, label="From (0: noise)", min_width=120)
        found["end"] = gr.Slider(0, 1, 1, step=0.05, label="To (1: image)", min_width=120)
    found["combine"] = gr.Dropdown(list(COMBINE), value="concat", label="Several pictures are combined by")
    found["mask"] = gr.HTML(
        "",
        html_template=(HERE / "mask.html").read_text(),
        js_on_load=(HERE / "mask.js").read_text(),
        **canvas(offer.edge_px, offer.edge_px),
        container=True,
    )
    found["keep_outside"] = gr.Checkbox(False, label="Outside the mask: as without the pictures (twice the time)")
    return found


def make_comparison(offer: Offer) -> dict[str, Any]:
    found: dict[str, Any] = {"scales": gr.Textbox(label="Several λ", placeholder="0, 0.5, 1")}
    found["adapter"] = gr.Dropdown(
        offer.adapters,
        value=[offer.adapters[0][1]],
        label="Adapter (several: side by side)",
        multiselect=True,
        visible=len(offer.adapters) > 1,
    )
    with gr.Row():
        found["seed"] = integer("Seed", 0, minimum=0)
        found["count"] = integer("Seeds in a row", 1, minimum=1, maximum=MAX_IMAGES)
    return found


def make_sampling(offer: Offer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with gr.Row():
        for name in ("width", "height"):
            found[name] = integer(f"{name.capitalize()} (px)", offer.edge_px, step=offer.multiple_px)
    with gr.Row():
        found["num_steps"] = integer("Steps", offer.num_steps, minimum=1, maximum=MAX_STEPS)
        found["guidance"] = gr.Number(offer.guidance, label="Guidance (1: none)", minimum=0, step=0.5, min_width=120)
    found["guidance_rescale"] = gr.Slider(
        0, 1, offer.guidance_rescale, step=0.05, label="Less contrast of guidance (φ)"
    )
    return found


def integer(label: str, value: int, **limits: Any) -> gr.Number:
    return gr.Number(value, label=label, precision=0, min_width=120, **limits)


def make_picture(label: str, visible: bool = True) -> gr.Image:
    """An upload, handed out as its path: gradio itself would open it, with limits and messages of its own."""
    found = gr.Image(label=label, type="filepath", sources=["upload"], height=180, visible=visible)
    found.preprocess = lambda payload: None if payload is None else payload.path  # type: ignore[method-assign]
    return found


def make_control(has_control: bool) -> dict[str, Any]:
    return {
        "start_image": make_picture("Start image"),
        "strength": gr.Slider(0, 1, 0.8, step=0.05, label="How much of it is made anew"),
        "control": make_picture("Control image, such as edges", has_control),
        "control_weight": gr.Slider(0, 2, 1, step=0.05, label="Weight of the control", visible=has_control),
    }


def make_outputs() -> SimpleNamespace:
    found = SimpleNamespace()
    with gr.Row():
        found.generate = gr.Button("Generate", variant="primary", min_width=120)
        found.cancel = gr.Button("Cancel", min_width=120)
    found.status = gr.HTML("")
    options: dict[str, Any] = {"show_label": False, "interactive": False, "buttons": ["download", "fullscreen"]}
    found.picture = gr.Image(label="Image", type="filepath", **options)
    found.show = gr.Button("Show these settings as a command and as Python", size="sm")
    code: dict[str, Any] = {"visible": False, "wrap_lines": True, "show_line_numbers": False, "buttons": ["copy"]}
    found.command = gr.Code(label="Command", language="shell", **code)
    found.python = gr.Code(label="Python", language="python", **code)
    found.files = gr.File(label="Files that they name", file_count="multiple", visible=False, interactive=False)
    for name, component in vars(found).items():
        component.elem_id = name
    return found


def canvas(width: int, height: int) -> dict[str, Any]:
    longer = max(width, height)
    return {"canvas_width": max(1, width * CANVAS_PX // longer), "canvas_height": max(1, height * CANVAS_PX // longer)}
