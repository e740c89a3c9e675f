"""The contracts of the parts: base model, image encoder, head, adapter kind, and the hosts of branches.

`ipa.model` combines one of each. A new part implements its contract in one file; no other code depends on its class.
Shape letters are those of `ipa.types`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from ipa.errors import UserError
from ipa.types import (
    BaseWidths,
    Channel,
    Corrupted,
    DenoiserCall,
    EncoderWidths,
    Features,
    ImagePrompt,
    Posterior,
    TextCondition,
    TextInputs,
)
from ipa.weights import Frozen

Uses = Literal["pooled", "patches"]
NoImage = Literal["zeros", "blank", "black"]
ADD_TEXTS = "repeat ipa.tools.precompute with this preview.text=, data.val= and heldout_check.every_n_steps="


class Host(Protocol):
    """A position in a frozen base where a branch can be plugged in: an attention layer or a whole block."""

    name: str

    @property
    def block(self) -> str:
        """Name of the block that the host belongs to; λ may differ between blocks."""

    @property
    def width(self) -> int:
        """Inner width of the branch, for checking and describing adapter files."""

    def make_branch(self) -> nn.Module:
        """Return a new trainable branch with this host's initialisation (for UNets: copies of the layer's K and V).

        The host calls the branch with (query, tokens_BTD, time embedding or None, scale, once), where ``once`` is
        `ImagePrompt.once`, which keeps what depends only on the tokens. A family that ``supports_absence`` also passes
        `ImagePrompt.present_BT`.
        """

    def plug(self, branch: nn.Module, channel: Channel) -> None:
        """Add the branch's result to the host's output whenever ``channel`` carries a prompt."""

    def unplug(self) -> None:
        """Restore the host to its original state."""


class Family(Frozen, ABC):
    """A frozen base model: VAE, text encoders, denoiser, noise path, and the public pipeline around them.

    Pixels are float in [-1, 1]. Latents are B × C × H × W as the VAE encodes
    them, scaled to about unit variance; only the pipeline and the denoiser inside ``denoise`` see a packed layout.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # for messages
    advice: ClassVar[str]  # the option that selects this family, for messages
    source: str  # path or hub id that loads the same weights again
    vae: Any  # the only module that encode_pixels and decode_latents need
    # how the pipeline applies guidance: one call per step on [negative; positive], or two calls
    guidance_calls: ClassVar[Literal["joint", "separate"]] = "joint"
    supports_min_snr: ClassVar[bool] = False
    rescales_guidance: ClassVar[bool] = False  # whether its pipelines have guidance_rescale
    scalings: ClassVar[tuple[str, ...]] = ("V only",)  # those of `ipa.presets.SCALINGS` that its branches support
    supports_absence: ClassVar[bool] = False  # whether its branches ignore tokens that are not present
    guidance: ClassVar[float] = 7.5  # the usual scale
    # replaces text encoders that are not loaded: text → its row of ``text_states``
    known_texts: Mapping[str, TextInputs] | None = None
    # diffusers' pipelines for other tasks: start_image, inpaint, control, t2i_adapter; those that there are
    task_pipelines: ClassVar[Mapping[str, Any]] = {}
    branches: str = ""  # published layout of its branches (`ipa.export.branches`); only ipa reads files without one

    @classmethod
    def check_options(cls, min_snr_gamma: float | None = None, guidance_rescale: float = 0.0) -> None:
        """Raise UserError for what the family has not; needs no weights."""
        if min_snr_gamma is not None and not cls.supports_min_snr:
            raise UserError(f"min_snr_gamma={min_snr_gamma}: {cls.title} has no such loss weighting; give null")
        if guidance_rescale and not cls.rescales_guidance:
            raise UserError(f"guidance_rescale={guidance_rescale}: the pipelines of {cls.title} have none; give 0")

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls, path: str, *, config: str | None = None, dtype: str = "float32", leave_out: Sequence[str] = ()
    ) -> Self:
        """Load a folder, hub id or file; raises UserError for a base that this family does not read.

        ``leave_out`` names parts (text, denoiser, vae) whose weights are not needed.
        """

    @classmethod
    @abstractmethod
    def recognises(cls, path: str, key: str = "base.path") -> bool:
        """Whether this family reads the base at ``path``, from configuration files and headers alone."""

    @classmethod
    @abstractmethod
    def read_widths(cls, path: str, config: str | None = None, **options: Any) -> BaseWidths:
        """The widths of what ``from_pretrained`` would load, without reading weights."""

    @classmethod
    def read_size_multiple_px(cls, path: str, config: str | None = None, **options: Any) -> int:
        """``size_multiple_px`` from configuration alone; 1 where it is not known before loading."""
        return 1

    @property
    @abstractmethod
    def device(self) -> Any: ...

    @property
    @abstractmethod
    def dtype(self) -> Any:
        """Of the denoiser's weights."""

    @property
    @abstractmethod
    def context_width(self) -> int:
        """D, the width of the image tokens."""

    @property
    def text_width(self) -> int:
        """Width of the text states, which the tokens of a simple adapter must have."""
        return self.context_width

    @property
    @abstractmethod
    def image_size_px(self) -> int:
        """The image size that the base was trained for."""

    @property
    @abstractmethod
    def size_multiple_px(self) -> int:
        """Height and width of images must be multiples of this."""

    @abstractmethod
    def latent_shape(self, image_size_px: int) -> tuple[int, int, int]:
        """C, H, W of the latents of a square image."""

    def check_size(self, image_size_px: int, option: str = "image_size_px") -> int:
        """Return a valid image size; raises UserError naming ``option``."""
        multiple = self.size_multiple_px
        if image_size_px < multiple or image_size_px % multiple:
            raise UserError(f"{option}={image_size_px}: the base {self.source} takes multiples of {multiple} px")
        return image_size_px

    @abstractmethod
    def encode_pixels(self, pixels_B3HW: Tensor) -> Posterior:
        """Posterior over the scaled latents."""

    @abstractmethod
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Scaled latents → pixels in [-1, 1], clipped."""

    def pack(self, latents_BCHW: Tensor) -> Tensor:
        """Latents → the layout that the denoiser and the pipeline use."""
        return latents_BCHW

    def unpack(self, packed: Tensor, shape_CHW: tuple[int, int, int]) -> Tensor:
        """Inverse of ``pack``."""
        return packed

    @abstractmethod
    def prepare_text(self, texts: list[str]) -> TextInputs:
        """Input of the text encoders, which a feature cache may store: named tensors with one row per text."""

    @property
    def text_encoders(self) -> list[nn.Module]:
        """What ``text_states`` runs, each on its own device; there may be none with ``known_texts``."""
        return []

    @abstractmethod
    def text_states(self, inputs: TextInputs) -> TextInputs:
        """Result of ``prepare_text`` → output of the text encoders: named tensors with one row per text.

        A feature cache may store it; tensors B × L × D without the last tokens that the condition's mask leaves out.
        """

    @abstractmethod
    def text_condition(self, states: TextInputs, size_B6: Tensor | None = None) -> TextCondition:
        """Result of ``text_states`` → what ``denoise`` takes; ``size_B6`` as in `TextCondition`."""

    def cut_off(self, text: str) -> str:
        """The end of a text that is too long for the tokenizers and so ignored."""
        return ""

    def encode_text(self, texts: list[str], size_B6: Tensor | None = None) -> TextCondition:
        return self.text_condition(self.states_of(texts), size_B6)

    def states_of(self, texts: list[str]) -> TextInputs:
        """``text_states`` of texts, from ``known_texts`` if there are any; raises UserError for an unknown text."""
        if self.known_texts is None:
            return self.text_states(self.prepare_text(texts))
        self.check_texts(texts)
        rows = [self.known_texts[text] for text in texts]
        return self.place_states({name: torch.stack([row[name] for row in rows]) for name in rows[0]})

    def check_texts(self, texts: list[str]) -> None:
        """Raise UserError for a text that cannot be encoded because the text encoders are not loaded."""
        if unknown := [text for text in texts if self.known_texts is not None and text not in self.known_texts]:
            raise UserError(f"the text {unknown[0]!r} is not among the texts of the feature cache: {ADD_TEXTS}")

    def place_states(self, states: TextInputs) -> TextInputs:
        """Stored ``text_states`` on the base's device and in its precision."""
        return {name: x.to(self.device, self.dtype if x.is_floating_point() else None) for name, x in states.items()}

    @abstractmethod
    def corrupt(
        self, x0_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor, min_snr_gamma: float | None = None
    ) -> Corrupted:
        """Noisy latents, times, targets and loss weights for uniform draws ``u_B`` in [0, 1).

        ``min_snr_gamma`` is only given to families with ``supports_min_snr``.
        """

    @abstractmethod
    def denoise(self, noisy: Tensor, time_B: Tensor, text: TextCondition) -> Tensor:
        """The denoiser's prediction of ``Corrupted.target``, for ``Corrupted.noisy`` and its ``time_B``."""

    @abstractmethod
    def hosts(self) -> list[Any]:
        """All `Host`s in the published order, enumerated from the modules."""

    def blocks(self) -> list[str]:
        """Names of the blocks that have hosts, in the denoiser's order."""
        return list(dict.fromkeys(host.block for host in self.hosts()))

    @classmethod
    def read_blocks(cls, path: str) -> list[str]:
        """``blocks`` of what ``from_pretrained`` would load, from its configuration."""
        raise UserError(f"base={path}: {cls.title} does not list its blocks before it is loaded")

    @property
    def widths(self) -> BaseWidths:
        return BaseWidths(self.context_width, [host.width for host in self.hosts()], self.text_width, self.branches)

    def describe(self) -> dict[str, str]:
        """This family's options that an adapter file's metadata must record."""
        return {}

    @abstractmethod
    def pipeline(self, pipeline_class: Any = None, **parts: Any) -> Any:
        """A public pipeline around these very parts.

        ``pipeline_class`` replaces the text-to-image one, ``parts`` are further or other components (a ControlNet).
        """

    @abstractmethod
    def prompt_arguments(self, positive: TextCondition, negative: TextCondition | None) -> dict[str, Any]:
        """Encoded text as keyword arguments of the pipeline, those of ``negative`` only if it is given."""

    @abstractmethod
    def guidance_arguments(self, guidance: float, guidance_rescale: float = 0.0) -> dict[str, Any]:
        """Guidance (1: none) as keyword arguments; raises UserError for what the pipeline does not have."""

    @abstractmethod
    def progress(self, time_B: Tensor) -> float:
        """The fraction of the training's noise schedule that is denoised at this time, 0 to 1."""

    @abstractmethod
    def before_calls(
        self, function: Callable[[DenoiserCall], None], negative: TextCondition | None
    ) -> AbstractContextManager[None]:
        """While inside, ``function`` is called before every call of the denoiser, including those of a pipeline.

        ``negative`` is the negative text given to the pipeline; None without guidance.
        """

    @abstractmethod
    def checkpoint_gradients(self, function: Callable[..., Any]) -> None:
        """Run the denoiser's blocks through ``function(module, *inputs)``, which recomputes them for the gradients."""

    @abstractmethod
    def compile_blocks(self) -> None:
        """Compile the denoiser's repeated blocks at their first call."""

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """Precision and hash of what a feature cache depends on: ``vae``, and ``tokenizer`` for the text."""


class ImageEncoder(Frozen, ABC):
    """A frozen image encoder; ``source`` and ``weights`` load it again (`ipa.encoders.open_encoder`)."""

    source: str
    weights: str | None
    widths: EncoderWidths

    @property
    def image_size_px(self) -> int:
        """Edge of the square images that it reads."""
        return self.widths.image_size_px

    @abstractmethod
    def encode(self, image_B3HW: Tensor, uses: Uses = "pooled") -> Features:
        """Pixels in [-1, 1] at ``image_size_px`` → the features that a head ``uses``, in the weights' precision."""

    @abstractmethod
    def blank(self, batch: int, uses: Uses = "pooled") -> Features:
        """Features of a blank image, which some heads use as "no image"."""

    def embed_text(self, text: str) -> Tensor:
        """Text in the space of ``pooled_BE``, not normalised: embedding_1E. Raises UserError without a text tower."""
        raise UserError(f"the encoder {self.source} has no text tower: give an open_clip model or a whole CLIP")

    @abstractmethod
    def layer_name(self, uses: Uses) -> str:
        """Which layer the features come from, for an adapter file's metadata."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies what a feature cache depends on: precision, hash of the weights, layer."""


class TokenHead(nn.Module, ABC):
    """Trainable: image features → image tokens.

    ``uses`` says which features it reads, ``no_image`` what replaces them when the image is dropped: ``zeros``, or the
    features of the encoder's ``blank`` image or of a ``black`` one. The tokens of a head that ``depends_on_time`` are
    computed at every denoising step; those of other heads, with their K′ and V′, once per prompt. ``made_for`` is the
    only layout of branches (`Family.branches`) that reads its tokens; empty: all do.
    """

    uses: Uses
    no_image: NoImage
    num_tokens: int
    context_width: int
    depends_on_time: ClassVar[bool] = False
    made_for: ClassVar[str] = ""

    @abstractmethod
    def forward(self, features: Features, t_B: Tensor | None = None) -> Tensor:
        """Return tokens_BTD; ``t_B`` are the denoiser's times, which only some heads read."""

    def describe(self) -> dict[str, str]:
        """Sizes that an adapter file's metadata must record because its tensors do not show them."""
        return {}


class AdapterKind(nn.Module, ABC):
    """Trainable: brings image tokens to the frozen denoiser. The constructor leaves the base unchanged.

    Installed branches see the prompt that ``channel`` carries.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.channel = Channel()

    @classmethod
    def token_width(cls, widths: BaseWidths) -> int:
        """The width of the image tokens on a base of these widths."""
        return widths.context

    @abstractmethod
    def install(self) -> Self:
        """Plug the branches in. Without a prompt, or with λ = 0, the base's output stays bit-identical."""

    @abstractmethod
    def remove(self) -> Self:
        """Undo ``install``."""

    def extend(self, text: TextCondition, prompt: ImagePrompt | None) -> TextCondition:
        """The text that the denoiser reads: unchanged, or followed by the image tokens."""
        return text
