"""Adapters on a base, ready to use: images and text in, images out; docs/use.md has examples.

Several prompts of one adapter, or of several, add up to (Ye et al. 2023, equation 5, one term per prompt i)

    Z = Attention(Q, K, V) + Σ_i λ_i m_i ⊙ Attention(Q, K′_i, V′_i)

with λ_i of the block and the time, and mask m_i. Images of one prompt share one softmax.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from ipa.contracts import Family
from ipa.errors import UserError
from ipa.export.loading import load_model
from ipa.export.reading import read_adapter
from ipa.model import IPAdapterModel
from ipa.presets import own_presets, read_blocks
from ipa.references import (
    Item,
    Pictures,
    Reference,
    as_list,
    columns,
    content_of,
    encode,
    images_to_references,
    read_mask,
    regions,
)
from ipa.sampling import SamplingOptions, latent_shape, prompt_arguments, recorded_options, run_pipeline
from ipa.types import ImageCondition, first_not_finite, to_uint8
from ipa.weights import choose_device

log = logging.getLogger(__name__)

AFTER_STEP = "callback_on_step_end"  # diffusers calls it with the pipeline, step, time and state


@dataclass(frozen=True)
class Call:
    """How the pipeline is called; ``size`` is the width and height of the images."""

    size: tuple[int, int]
    sampling: SamplingOptions
    pipeline: Any
    arguments: Mapping[str, Any]

    def after_step(self, function: Callable[..., dict[str, Any]]) -> Call:
        return replace(self, arguments={**self.arguments, AFTER_STEP: function})


@dataclass
class Prompter:
    """``models`` share one family; each has its own encoder, head and adapter, installed.

    ``defaults`` are sampling options: how the training sampled, or what is usual for the base.
    """

    models: list[IPAdapterModel]
    defaults: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, adapter: str | Path | Sequence[str | Path], device: str | None = None, **options: Any) -> Self:
        """Load adapter files onto the base of the first; ``options`` are those of `ipa.export.loading.load_model`.

        ``device`` is by default a GPU if there is one. Raises UserError for adapters that do not fit the base.
        """
        first, *others = as_list(adapter)
        models = [load_model(Path(first), **options)]
        shared = {name: options[name] for name in ("encoder", "encoder_weights", "dtype") if name in options}
        models += [load_model(Path(each), family=models[0].family, **shared) for each in others]
        metadata = read_adapter(Path(first)).metadata
        defaults = {"guidance": models[0].family.guidance, "batch_size": 8} | recorded_options(metadata)
        return cls([model.to(choose_device(device)) for model in models], defaults)

    @property
    def family(self) -> Family:
        return self.models[0].family

    def pipeline(self, pipeline_class: Any = None, **parts: Any) -> Any:
        """A public diffusers pipeline around the base; call it inside ``prompted``."""
        return self.family.pipeline(pipeline_class, **parts)

    def __call__(
        self,
        images: Pictures | Reference | Sequence[Reference] = (),
        text: str = "",
        *,
        negative_text: str = "",
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> list[Image.Image]:
        """One image per ``seed``. ``options`` are fields of `Reference`, and those of ``generate``."""
        own = {each.name: options.pop(each.name) for each in fields(Reference) if each.name in options}
        references = images_to_references(images, own)
        return self.generate([Item(references, text, negative_text, each) for each in as_list(seed)], **options)

    @torch.no_grad()
    def generate(
        self,
        items: Sequence[Item],
        *,
        width: int | None = None,
        height: int | None = None,
        pipeline: Any = None,
        arguments: Mapping[str, Any] | None = None,
        keep_outside: bool = False,
        **options: Any,
    ) -> list[Image.Image]:
        """One image per item, each from its own seed. Neighbours of one form make a batch together.

        ``pipeline`` is a public pipeline from ``self.pipeline(…)``, by default text to image; ``arguments`` are further
        ones of its call. ``options`` are ``num_steps``, ``guidance``, ``guidance_rescale`` and ``batch_size`` of
        `ipa.sampling.SamplingOptions`, by default those of the training's previews. If a pipeline has no rescaled
        guidance, that of the previews is left out, with a warning; given as an option, it is refused.

        With ``keep_outside`` an item's image stays the base's outside the masks of its prompts, in twice the time:
        after every step the latents there are those without the prompts (Avrahami et al. 2022, blended diffusion).
        """
        pipe = pipeline or self.pipeline()
        sampling = SamplingOptions(**{**self.defaults_for(pipe, options), **options})
        edge = sampling.image_size_px or self.family.image_size_px
        size = self.family.check_size(width or edge, "width"), self.family.check_size(height or edge, "height")
        made: list[Image.Image] = []
        for batch in batches([item.tiled(size) for item in items], sampling.batch_size):
            call = Call(size, sampling, pipe, arguments or {})
            made += self.run(batch, self.keep_outside(batch, call) if keep_outside else call)
        return made

    def defaults_for(self, pipeline: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """``self.defaults``, without a rescaling of guidance that the pipeline does not have."""
        rescale = 0 if "guidance_rescale" in options else self.defaults.get("guidance_rescale", 0)
        if not rescale or "guidance_rescale" in inspect.signature(pipeline.__call__).parameters:
            return self.defaults
        log.warning("%s has no guidance_rescale: the previews' %g is left out", type(pipeline).__name__, rescale)
        return {**self.defaults, "guidance_rescale": 0}

    def keep_outside(self, items: Sequence[Item], call: Call) -> Call:
        """The call with an argument that keeps the base's latents outside the items' masks."""
        if AFTER_STEP not in inspect.signature(call.pipeline.__call__).parameters:
            raise UserError(
                f"keep_outside: {type(call.pipeline).__name__} has no {AFTER_STEP} to change its latents with"
            )
        if AFTER_STEP in call.arguments:
            raise UserError(f"keep_outside uses {AFTER_STEP} itself: leave it out of the arguments")
        steps: list[Tensor] = []

        def record(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
            steps.append(state["latents"])
            return state

        plain = [replace(each, references=()) for each in items]
        self.run(plain, call.after_step(record))
        shape = latent_shape(self.family, call.size)
        inside_B1hw = adaptive_max_pool2d(regions(items, call.size), shape[1:]).to(steps[0].device) > 0

        def blend(pipe: Any, step: int, time: Any, state: dict[str, Any]) -> dict[str, Any]:
            own, base = (self.family.unpack(each, shape) for each in (state["latents"], steps[step]))
            return {**state, "latents": self.family.pack(torch.where(inside_B1hw, own, base))}

        return call.after_step(blend)

    def run(self, items: Sequence[Item], call: Call) -> list[Image.Image]:
        seeds = [item.seed for item in items]
        with self.prompted(items, call.size, call.sampling.guidance > 1) as prompts:
            given = {**prompts, **call.arguments}
            pixels_B3HW = run_pipeline(self.family, call.pipeline, given, seeds, call.size, call.sampling)
        if first_not_finite({"": pixels_B3HW}):
            raise UserError("the images are not finite: if dtype= is float16, give dtype=float32 or bfloat16")
        return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in to_uint8(pixels_B3HW)]

    @contextmanager
    def prompted(
        self, items: Sequence[Item], size: tuple[int, int] | None = None, guided: bool = True
    ) -> Iterator[dict[str, Any]]:
        """While inside, pipelines of this base see the items' image prompts; yields the arguments to call them with.

        ``size`` is the width and height of the images; ``guided`` is whether the pipeline is called with guidance.
        All items must have one form. Raises UserError.
        """
        for text in {item.text for item in items} | {item.negative_text for item in items}:
            if rest := self.family.cut_off(text):
                log.warning("the text is too long for this base, which does not read its end: … %s", rest)
        width, height = size or (self.family.image_size_px,) * 2
        items = [item.tiled((width, height)) for item in items]
        prompts = list(zip(self.models, self.conditions(items, (width, height), guided), strict=True))
        texts, negatives = [item.text for item in items], [item.negative_text for item in items]
        with prompt_arguments(prompts, texts, (width, height), guided, negatives) as arguments:
            yield arguments

    def conditions(self, items: Sequence[Item], size: tuple[int, int], guided: bool) -> list[list[ImageCondition]]:
        """The image prompts of each adapter; row i of each belongs to item i."""
        found: list[list[ImageCondition]] = [[] for _ in self.models]
        for references in zip(*(item.references for item in items), strict=True):
            number = references[0].adapter
            if not 0 <= number < len(self.models):
                raise UserError(f"adapter={number}: there are {len(self.models)} adapters, numbered from 0")
            found[number] += self.condition(self.models[number], references, size, guided)
        return found

    def condition(
        self, model: IPAdapterModel, references: Sequence[Reference], size: tuple[int, int], guided: bool
    ) -> list[ImageCondition]:
        first = references[0]
        without = content_of(model, first)
        images = columns(
            [encode(model, as_list(each.images), each.weights, each.combine, without) for each in references]
        )
        negative = None
        if first.negative is not None:
            negative = columns([encode(model, as_list(each.negative)) for each in references])
        if negative is not None and len(negative) != len(images):
            raise UserError(f"negative: give as many images as the prompt has ({len(images)})")
        masks = [read_mask(each.mask, size).to(model.device) for each in references if each.mask is not None]
        scales = torch.tensor([each.scale for each in references]).view(-1, 1, 1).to(model.device)
        scale = first.scale if len({each.scale for each in references}) == 1 else scales
        mask_BHW = torch.cat(masks) if masks else None
        if first.embeds_scaling not in self.family.scalings:
            known = ", ".join(self.family.scalings)
            raise UserError(f"embeds_scaling={first.embeds_scaling}: branches of {self.family.title} know {known}")
        plain = ImageCondition(images, negative, scale, None, mask_BHW, first.over_time(), scaling=first.embeds_scaling)
        if first.blocks is None:
            return [plain]
        weights = read_blocks(first.blocks, self.family.blocks(), own_presets(self.family.source))
        if weights.pushed and not guided:
            raise UserError("this preset pushes away from what is not wanted, which needs guidance above 1")
        shown, pushed = (hosts_of(each, self.family) for each in (weights.shown, weights.pushed))
        pushing = replace(plain, negative=None, hosts=pushed, reversed=True)
        return [replace(plain, hosts=shown), *([pushing] if weights.pushed else [])]


def hosts_of(weights: dict[str, float], family: Family) -> dict[str, float]:
    return {host.name: weights.get(host.block, 0.0) for host in family.hosts()}


def batches(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    """Neighbours of one form, at most ``size`` together."""
    for _, group in groupby(items, Item.form):
        each = list(group)
        for first in range(0, len(each), size):
            yield each[first : first + size]
