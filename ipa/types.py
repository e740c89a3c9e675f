"""Shape letters, units and ranges, and the data classes that modules exchange.

Shape letters, used as suffixes of tensor names everywhere:

    B  batch                    N  images per sample, or tokenizers
    C  latent channels          H W  height and width (pixels or latent cells, as the name says)
    L  text tokens              T  image tokens
    D  width of the context that cross-attention reads
    P  patches, class token included           R  further references of all samples of a batch
    E  width of the pooled image embedding          F  width of a patch feature

Pixels are uint8 when they leave a data worker and float in [-1, 1] everywhere inside the model. Guidance scales are
diffusers' (1 means none). λ, the weight of the image prompt, is called ``scale``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Made = TypeVar("Made")
Watch = Callable[[str, Tensor, Tensor], None]  # gets a host's name, its own attention, and λ times the image's
Part = Literal["joint", "positive", "negative"]  # of a guided batch
TextInputs = dict[str, Tensor]  # see `ipa.contracts.Family.prepare_text`


class Tensors:
    """A data class with tensors in its fields, in dicts, or in other such data classes."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with ``function`` applied to every tensor."""
        fields: dict[str, Any] = {name: mapped(value, function) for name, value in vars(self).items()}
        return type(self)(**fields)


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: mapped(each, function) for name, each in value.items()}
    return value.map(function) if isinstance(value, Tensors) else value


@dataclass
class Features(Tensors):
    """Features of images from a frozen encoder. A head reads one of the two, and a cache stores that one.

    ``pooled_BE`` is the projected embedding; ``patches_BPF`` are the penultimate layer's hidden states, class token
    first. Neither is normalised.
    """

    pooled_BE: Tensor | None = None
    patches_BPF: Tensor | None = None

    def has(self, uses: str) -> bool:
        """Whether the features that a head ``uses``, pooled or patches, are present."""
        return {"pooled": self.pooled_BE, "patches": self.patches_BPF}[uses] is not None

    @classmethod
    def join(cls, function: Callable[[list[Tensor]], Tensor], parts: Sequence[Features]) -> Features:
        """``function`` of the pooled features of all parts, and of all their patches; None where a part has none."""
        columns: Any = [[each.pooled_BE for each in parts], [each.patches_BPF for each in parts]]
        return cls(*(None if any(x is None for x in column) else function(column) for column in columns))


@dataclass
class Posterior(Tensors):
    """Diagonal normal distribution over an image's latents: scaled mean and log-variance, both BCHW."""

    mean_BCHW: Tensor
    logvar_BCHW: Tensor

    def sample(self, noise_BCHW: Tensor) -> Tensor:
        """z = mean + exp(logvar / 2) · noise, already in the scale that the denoiser expects."""
        return self.mean_BCHW + torch.exp(0.5 * self.logvar_BCHW) * noise_BCHW


@dataclass
class TextCondition:
    """Encoded text: the states that cross-attention reads, and the other conditions of some bases.

    ``size_B6`` is the image's original height and width, the top and left of its crop, and its height and width now,
    all in pixels (Podell et al. 2023, section 2.2).
    """

    states_BLD: Tensor
    pooled_BE: Tensor | None = None
    size_B6: Tensor | None = None
    mask_BL: Tensor | None = None  # 1 for the text tokens that the denoiser may read; None: all


@dataclass
class Corrupted:
    """One training problem per sample, in the denoiser's own layout and units.

    The denoiser gets ``noisy`` and ``time_B`` and is to predict ``target``; ``weight_B`` weighs its squared error.
    """

    noisy: Tensor
    time_B: Tensor
    target: Tensor
    weight_B: Tensor


@dataclass
class Draws(Tensors):
    """All random numbers of a batch; each row comes from a generator with the sample's own address.

    ``time_B`` is uniform in [0, 1); the objective turns it into timesteps. ``drop_*_B`` are booleans.
    """

    posterior_noise_BCHW: Tensor
    noise_BCHW: Tensor
    time_B: Tensor
    drop_text_B: Tensor
    drop_image_B: Tensor


@dataclass
class MoreReferences(Tensors):
    """The references of a batch beyond the first one of each sample, concatenated; uint8.

    ``row_R`` is the sample that a reference belongs to, ``slot_R`` its number in that sample, from 0 to ``slots`` - 1.
    Slots without a reference are absent: nothing attends to them.
    """

    reference_R3HW: Tensor
    row_R: Tensor
    slot_R: Tensor
    slots: int

    def after(self, first_BTD: Tensor, tokens_RTD: Tensor, present_R: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the first references and of these, padded: B × ((1 + slots) T) × D, and which are present."""
        (batch, length, width), at = first_BTD.shape, (self.row_R, self.slot_R)
        others_BSTD = first_BTD.new_zeros(batch, self.slots, length, width).index_put(at, tokens_RTD.to(first_BTD))
        absent_BS = torch.zeros(batch, self.slots, dtype=torch.bool, device=first_BTD.device)
        present_BN = F.pad(absent_BS.index_put(at, present_R), (1, 0), value=True)
        return torch.cat([first_BTD, others_BSTD.flatten(1, 2)], 1), present_BN.repeat_interleave(length, 1)


class SourcePlace(NamedTuple):
    """A position in a source's endless order as one lane reads it: the open window of records, and how far it is read.

    In pass ``epoch`` the window begins at sample number ``record`` (good and bad ones counted) of the pass's shard
    number ``shard``; ``offset`` samples of the window have been read.
    """

    epoch: int = 0
    shard: int = 0
    record: int = 0
    offset: int = 0


class LanePlace(NamedTuple):
    """A position in a lane: how many times a source was chosen, and the position in each source."""

    choices: int
    sources: tuple[SourcePlace, ...]


@dataclass
class Position:
    """A position in the training order: every rank has read ``step`` batches, and each lane is at its own position.

    A batch has the lanes that it was made from, a checkpoint all lanes that were read.
    """

    step: int = 0
    lanes: dict[int, LanePlace] = field(default_factory=dict)


@dataclass
class Batch(Tensors):
    """Collated samples. A feature cache has fp16 results of the frozen parts in place of pixels and text."""

    text: list[str]
    draws: Draws
    image_B3HW: Tensor | None = None  # the target, uint8
    reference_B3HW: Tensor | None = None  # the image prompt at the encoder's size, uint8
    posterior: Posterior | None = None  # of the target
    features: Features | None = None  # of the reference, those that a head reads
    text_inputs: TextInputs | None = None  # result of the family's ``prepare_text``
    text_states: TextInputs | None = None  # result of its ``text_states``
    more: MoreReferences | None = None
    loss_mask_B1HW: Tensor | None = None  # how much of each latent cell is inside the loss mask; 255 is all of it
    size_B6: Tensor | None = None  # how the target was cropped (see ``TextCondition``); None: a whole image of its size
    keys: list[str] = field(default_factory=list)  # of WebDataset
    shards: list[str] = field(default_factory=list)  # the files that the samples came from
    rejects: dict[str, int] = field(default_factory=dict)  # number of samples skipped before this batch, by reason
    reject_examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # position and fault of the first
    position: Position | None = None  # where training continues after the batch; None in validation

    def __len__(self) -> int:
        return len(self.text)

    def keep_all(self) -> Batch:
        """The same batch with nothing dropped."""
        keep = torch.zeros_like(self.draws.drop_text_B)
        return replace(self, draws=replace(self.draws, drop_text_B=keep, drop_image_B=keep))

    def with_neighbours_image(self) -> Batch:
        """The same batch, each sample prompted by the image, or images, of the sample before it."""
        before = [(row or len(self)) - 1 for row in range(len(self))]  # roll() refuses half precision under autocast
        moved: dict[str, Any] = {
            "reference_B3HW": None if self.reference_B3HW is None else self.reference_B3HW[before],
            "features": None if self.features is None else self.features.map(lambda x: x[before]),
            "more": self.more and replace(self.more, row_R=(self.more.row_R + 1) % len(self)),
        }
        return replace(self, **moved)

    def to(self, device: torch.device | str) -> Batch:
        """On ``device``; copies from pinned memory are asynchronous."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self.map(Tensor.pin_memory)


def to_unit_range(image_B3HW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 pixels in 0…255 → float in [-1, 1]."""
    return image_B3HW.to(dtype) / 127.5 - 1


def to_uint8(pixels_B3HW: Tensor) -> Tensor:
    """Float pixels in [-1, 1] → uint8, rounded and clipped."""
    return ((pixels_B3HW.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def first_not_finite(tensors: Mapping[str, Tensor]) -> tuple[str, int] | None:
    """Name and row (index of the first dimension) of the first value that is infinite or NaN; None without any."""
    for name, tensor in tensors.items():
        finite = tensor.isfinite()
        if not finite.all():
            return name, int((~finite).nonzero()[0, 0]) if tensor.ndim else 0
    return None


@dataclass
class ImagePrompt:
    """Image tokens for calls of the denoiser.

    Without gradients, what branches compute from the tokens is kept as long as the prompt exists, so neither tokens nor
    branches may change between such calls.
    """

    tokens_BTD: Tensor
    scale: Tensor  # λ: a scalar, which may be on the CPU whatever the device of the tokens, or B × 1 × 1
    hosts: Mapping[str, float] | None = None  # factor of λ by name; those left out get no prompt; None: 1 everywhere
    mask_BHW: Tensor | None = None  # in [0, 1], limits the prompt to a region of the image, in a batch of B or 1
    also: tuple[ImagePrompt, ...] = ()  # their results are added to this one's
    scaling: str = "V only"  # one of `ipa.presets.SCALINGS`
    present_BT: Tensor | None = None  # False for tokens that pad the batch, to which nothing attends; None: all are
    watch: Watch | None = None  # called in every host that supports it
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The result of ``make``, computed once per ``key``, or in every call where gradients are recorded.

        Compiled code computes it in every call too, since a kept result would need guards.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def scale_at(self, host: str) -> Tensor:
        return self.scale if self.hosts is None else self.scale * self.hosts.get(host, 0.0)


class DenoiserCall(NamedTuple):
    """One call of the denoiser inside a public pipeline: its time and its part of the guided batch."""

    time_B: Tensor
    part: Part


@dataclass(frozen=True)
class ImageCondition:
    """One image prompt for sampling; ``hosts``, ``mask_BHW`` and ``scaling`` are those of `ImagePrompt`.

    A ``reversed`` prompt pushes away from its images: they are in guidance's negative part, with weight λ (g − 1) for
    guidance g, and the positive part gets zero tokens.
    """

    images: Sequence[Features]  # whose tokens are concatenated
    negative: Sequence[Features] | None = None  # of guidance's negative part; None: "no image"
    scale: float | Tensor = 1.0  # λ
    hosts: Mapping[str, float] | None = None
    mask_BHW: Tensor | None = None
    over_time: Callable[[float], float] | None = None  # progress of the denoising, 0 (noise) to 1 → factor of λ
    reversed: bool = False
    scaling: str = "V only"


class Channel:
    """Carries the image prompt to the branches inside a frozen model: set during a call, empty otherwise."""

    def __init__(self) -> None:
        self.prompt: ImagePrompt | None = None

    @contextmanager
    def carrying(self, prompt: ImagePrompt | None) -> Iterator[None]:
        before, self.prompt = self.prompt, prompt
        try:
            yield
        finally:
            self.prompt = before

    def at(self, host: str) -> list[ImagePrompt]:
        """The prompts that act on this host."""
        every = [] if self.prompt is None else [self.prompt, *self.prompt.also]
        return [each for each in every if each.hosts is None or each.hosts.get(host)]


class BaseWidths(NamedTuple):
    """Sizes of a base, known before any weight is read.

    ``context`` is D; ``hosts`` the inner width of every host, in the order of the hosts; ``text`` the width of the text
    states, 0 if it is D; ``branches`` the name of the published layout (`ipa.contracts.Family.branches`).
    """

    context: int
    hosts: list[int]
    text: int = 0
    branches: str = ""


class EncoderWidths(NamedTuple):
    """Sizes of an image encoder, known before any weight is read: E, F, P, and the edge of its images in pixels.

    P includes the class token; F and P are 0 without patch features.
    """

    pooled: int
    patch: int
    num_patches: int
    image_size_px: int
