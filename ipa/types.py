"""What crosses the borders between modules: shape letters, units and ranges, and the few data classes that carry them.

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
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Made = TypeVar("Made")
Watch = Callable[[str, Tensor, Tensor], None]  # gets a host's name, its own attention, and λ times the image's
TextInputs = dict[str, Tensor]  # see `ipa.contracts.Family.prepare_text`


@dataclass
class Features:
    """What a frozen image encoder says of a picture; a head reads one of the two and a cache holds what it reads.

    ``pooled_BE`` is the projected embedding, not normalised; ``patches_BPF`` the penultimate layer's hidden states,
    class token first, not normalised.
    """

    pooled_BE: Tensor | None = None
    patches_BPF: Tensor | None = None

    def has(self, uses: str) -> bool:
        """Whether what a head ``uses`` is there: pooled or patches."""
        return {"pooled": self.pooled_BE, "patches": self.patches_BPF}[uses] is not None

    def map(self, function: Callable[[Tensor], Tensor]) -> Features:
        """The same features with ``function`` applied to what is there."""
        return Features(*(None if x is None else function(x) for x in (self.pooled_BE, self.patches_BPF)))


@dataclass
class Posterior:
    """Diagonal normal over the latents of a picture: scaled mean and log-variance, both BCHW."""

    mean_BCHW: Tensor
    logvar_BCHW: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Posterior:
        return Posterior(function(self.mean_BCHW), function(self.logvar_BCHW))

    def sample(self, noise_BCHW: Tensor) -> Tensor:
        """z = mean + exp(logvar / 2) · noise, already in the scale that the denoiser expects."""
        return self.mean_BCHW + torch.exp(0.5 * self.logvar_BCHW) * noise_BCHW


@dataclass
class TextCondition:
    """Encoded text: the states that cross-attention reads, and what SDXL wants besides.

    ``pooled_BE`` is the pooled text; ``size_B6`` the picture's original height and width, the top and left of its crop,
    and its height and width now, all in pixels (Podell et al. 2023, section 2.2). ``mask_BL`` is 1 for the text tokens
    that the denoiser may read; None is all of them.
    """

    states_BLD: Tensor
    pooled_BE: Tensor | None = None
    size_B6: Tensor | None = None
    mask_BL: Tensor | None = None


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
class Draws:
    """All randomness of a batch, each row drawn by a generator with the sample's own address.

    ``time_B`` is uniform in [0, 1); the objective turns it into timesteps. ``drop_*_B`` are booleans.
    """

    posterior_noise_BCHW: Tensor
    noise_BCHW: Tensor
    time_B: Tensor
    drop_text_B: Tensor
    drop_image_B: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Draws:
        """The same draws with ``function`` applied to every tensor."""
        return Draws(**{name: function(tensor) for name, tensor in vars(self).items()})


@dataclass
class MoreReferences:
    """The references of a batch's samples beyond the first that each has, one after another, uint8 as those.

    ``row_R`` is the sample that each belongs to, ``slot_R`` its number among the sample's own, from 0 to ``slots`` - 1.
    Slots without a reference are absent: nothing attends to them.
    """

    reference_R3HW: Tensor
    row_R: Tensor
    slot_R: Tensor
    slots: int

    def map(self, function: Callable[[Tensor], Tensor]) -> MoreReferences:
        return MoreReferences(function(self.reference_R3HW), function(self.row_R), function(self.slot_R), self.slots)

    def after(self, first_BTD: Tensor, tokens_RTD: Tensor, present_R: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of the first references and of these, padded: B × ((1 + slots) T) × D, and which are present."""
        (batch, length, width), at = first_BTD.shape, (self.row_R, self.slot_R)
        others_BSTD = first_BTD.new_zeros(batch, self.slots, length, width).index_put(at, tokens_RTD.to(first_BTD))
        absent_BS = torch.zeros(batch, self.slots, dtype=torch.bool, device=first_BTD.device)
        present_BN = F.pad(absent_BS.index_put(at, present_R), (1, 0), value=True)
        return torch.cat([first_BTD, others_BSTD.flatten(1, 2)], 1), present_BN.repeat_interleave(length, 1)


class SourcePlace(NamedTuple):
    """A place in a source's endless order as one lane reads it, told by the window of records that is open there.

    In pass ``epoch`` the window begins at sample number ``record`` (good and bad ones counted) of the pass's shard
    number ``shard``; ``offset`` samples of the window lie behind.
    """

    epoch: int = 0
    shard: int = 0
    record: int = 0
    offset: int = 0


class LanePlace(NamedTuple):
    """A place in a lane: how many choices of a source lie behind, and where each source stands."""

    choices: int
    sources: tuple[SourcePlace, ...]


@dataclass
class Position:
    """A place in the training order: ``step`` batches of every rank lie behind, and each lane stands where it says.

    A batch tells of the lanes that it was made from, a checkpoint of all that were read.
    """

    step: int = 0
    lanes: dict[int, LanePlace] = field(default_factory=dict)


@dataclass
class Batch:
    """Samples as the data room delivers them.

    ``image_B3HW`` is the target and ``reference_B3HW`` the image prompt at the encoder's size, both uint8. A cache has
    in their place what frozen parts made of them, in fp16: ``posterior`` for the target, and for the reference the
    ``features`` that a head reads, or the reference still. ``text_inputs`` is the result of the family's
    ``prepare_text``, where a cache has it. ``more`` has further references, where a sample may have several.
    ``loss_mask_B1HW`` says how much of each latent cell is inside the loss mask, 255 is all of it.
    ``size_B6`` says how the target was cut (see ``TextCondition``); None is a whole picture of the target's size.
    ``keys`` are WebDataset keys, ``shards`` the files they came from. ``rejects`` counts by reason what was skipped on
    the way to this batch, ``reject_examples`` has the place and the fault of the first. ``position`` is where training
    goes on after it; validation has none.
    """

    text: list[str]
    draws: Draws
    image_B3HW: Tensor | None = None
    reference_B3HW: Tensor | None = None
    posterior: Posterior | None = None
    features: Features | None = None
    text_inputs: TextInputs | None = None
    more: MoreReferences | None = None
    loss_mask_B1HW: Tensor | None = None
    size_B6: Tensor | None = None
    keys: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    rejects: dict[str, int] = field(default_factory=dict)
    reject_examples: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    position: Position | None = None

    def __len__(self) -> int:
        return len(self.text)

    def keep_all(self) -> Batch:
        """The same batch with nothing dropped."""
        keep = torch.zeros_like(self.draws.drop_text_B)
        return replace(self, draws=replace(self.draws, drop_text_B=keep, drop_image_B=keep))

    def with_neighbours_image(self) -> Batch:
        """The same batch with each sample prompted by the picture, or pictures, of the one before it."""
        before = [(row or len(self)) - 1 for row in range(len(self))]  # roll() refuses half precision under autocast
        moved: dict[str, Any] = {
            "reference_B3HW": None if self.reference_B3HW is None else self.reference_B3HW[before],
            "features": None if self.features is None else self.features.map(lambda x: x[before]),
            "more": self.more and replace(self.more, row_R=(self.more.row_R + 1) % len(self)),
        }
        return replace(self, **moved)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with ``function`` applied to every tensor."""
        mapped: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                mapped[name] = function(value)
            elif isinstance(value, Draws | Posterior | Features | MoreReferences):
                mapped[name] = value.map(function)
        if self.text_inputs is not None:
            mapped["text_inputs"] = {name: function(tensor) for name, tensor in self.text_inputs.items()}
        return replace(self, **mapped)

    def to(self, device: torch.device | str) -> Batch:
        """On ``device``; copies from pinned memory do not wait."""
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
    """Image tokens for calls of the denoiser: tokens_BTD and λ as a tensor (a scalar, or B × 1 × 1).

    A scalar may lie on the CPU whatever the device of the tokens. What branches make of the tokens is kept as long as
    the prompt lives, so neither tokens nor branches may change between calls without gradients that see one prompt.

    ``hosts`` maps names of hosts to a factor of λ, hosts without one are left alone; None is 1 everywhere. ``mask_BHW``
    in [0, 1] limits the prompt to a region of the image, in a batch of B or 1. ``scaling`` is one of
    `ipa.presets.SCALINGS`. ``present_BT`` is False for tokens that pad the batch, to which nothing attends; None: all
    are there. ``watch`` is called in every host that can be watched. The results of the prompts ``also`` given are
    added to this one's.
    """

    tokens_BTD: Tensor
    scale: Tensor
    hosts: Mapping[str, float] | None = None
    mask_BHW: Tensor | None = None
    also: tuple[ImagePrompt, ...] = ()
    scaling: str = "V only"
    present_BT: Tensor | None = None
    watch: Watch | None = None
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` gives: made at the first call with ``key``, and at every call where gradients are recorded.

        Compiled code makes it every time, too, since what it keeps would have to be guarded.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def scale_at(self, host: str) -> Tensor:
        return self.scale if self.hosts is None else self.scale * self.hosts.get(host, 0.0)


@dataclass(frozen=True)
class ImageCondition:
    """One image prompt of a sampling: the features of its ``images``, whose tokens are concatenated, and how they act.

    ``negative`` is the image prompt of guidance's negative part, None is "no image". ``scale`` is λ; ``hosts``,
    ``mask_BHW`` and ``scaling`` are those of `ImagePrompt`. ``over_time`` gives a factor of λ for the progress of the
    denoising, from 0 (noise) to 1. A prompt that is ``reversed`` pushes away from its images: they take part in
    guidance's negative part, with weight λ (g − 1) for guidance g, and zero tokens in the positive part.
    """

    images: Sequence[Features]
    negative: Sequence[Features] | None = None
    scale: float | Tensor = 1.0
    hosts: Mapping[str, float] | None = None
    mask_BHW: Tensor | None = None
    over_time: Callable[[float], float] | None = None
    reversed: bool = False
    scaling: str = "V only"


class Channel:
    """Carries the image prompt to the branches inside a frozen model: set around a call, empty outside."""

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
    """What an adapter needs to know of a base before any weight is read.

    ``context`` is D; ``hosts`` the inner width of every host, in the order of the hosts; ``text`` the width of the text
    states, 0 if it is D; ``branches`` the name of the published layout (`ipa.contracts.Family.branches`).
    """

    context: int
    hosts: list[int]
    text: int = 0
    branches: str = ""


class EncoderWidths(NamedTuple):
    """What a head needs to know of an image encoder before any weight is read.

    E, F, P (class token included; F and P are 0 where there are no patch features), and the edge of its pictures.
    """

    pooled: int
    patch: int
    num_patches: int
    image_size_px: int
