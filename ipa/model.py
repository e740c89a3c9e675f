"""Combines family, encoder, head, adapter and objective; the only module where they meet.

L = E w ‖ prediction(x_t, t, c_text, c_image) − target ‖²,   with c_text and c_image dropped at random
(Ye et al. 2023, equations 6 and 7; the family defines x_t, target and weight w)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ipa import objective
from ipa.contracts import AdapterKind, Family, ImageEncoder, TokenHead
from ipa.data.images.transforms import fit_named
from ipa.errors import UserError
from ipa.files import public_source
from ipa.types import (
    Batch,
    DenoiserCall,
    Features,
    ImageCondition,
    ImagePrompt,
    Posterior,
    TextCondition,
    TextInputs,
    Watch,
    to_unit_range,
)
from ipa.weights import hash_weights

MAX_COMPILED_SHAPES = 64  # of a block's inputs: widths × resolutions × aspect ratios


@dataclass
class Errors:
    """Squared error of each sample, its weight in the loss, and its position on the noise path (0 clean … 1 noise)."""

    error_B: Tensor
    weight_B: Tensor
    time_B: Tensor

    @property
    def loss(self) -> Tensor:
        return (self.weight_B * self.error_B).mean()


class IPAdapterModel(nn.Module):
    """A frozen base and image encoder with a trainable head and adapter.

    ``trainable`` declares what is trained, for optimizer, checkpoint, export and parameter count alike.
    ``min_snr_gamma`` weights the loss over time (see `ipa.objective`); None means no weights. ``reference_fit`` says
    how references are cropped to the encoder's square (see ``transforms.FITS``) and is recorded in the metadata.
    ``masked_loss`` is for batches with a mask. Raises UserError for parts that do not work together.
    """

    def __init__(
        self,
        family: Family,
        encoder: ImageEncoder,
        head: TokenHead,
        adapter: AdapterKind,
        min_snr_gamma: float | None = None,
        reference_fit: str = "crop",
        masked_loss: objective.MaskedLoss = objective.MaskedLoss(),  # noqa: B008 (it is frozen)
    ) -> None:
        super().__init__()
        check_head(head, adapter.name, family.branches)
        family.check_options(min_snr_gamma)
        self.reference_fit, self.preprocessing = reference_fit, fit_named(reference_fit).words
        self.family, self.encoder, self.min_snr_gamma = family, encoder, min_snr_gamma
        self.train_scale = 1.0  # λ in `errors`
        self.masked_loss = masked_loss
        self.is_compiled = False
        self.recomputes = True  # blocks in the backward pass, after checkpoint_gradients
        # marks the parts of a step for a profiler or a timer
        self.part: Callable[[str], AbstractContextManager[Any]] = torch.profiler.record_function
        self.watch: Watch | None = None  # sees the attention in the hosts, in training and ``predict``
        self._blank: Features | None = None
        self._no_text: TextInputs | None = None
        self.trainable = nn.ModuleDict({"image_proj": head, "ip_adapter": adapter})

    @property
    def head(self) -> TokenHead:
        return cast(TokenHead, self.trainable["image_proj"])

    @property
    def adapter(self) -> AdapterKind:
        return cast(AdapterKind, self.trainable["ip_adapter"])

    @property
    def device(self) -> torch.device:
        return next(self.trainable.parameters()).device

    def checkpoint_gradients(self) -> None:
        """To save memory, keep only the inputs of the denoiser's blocks and recompute them in the backward pass."""

        def run_again(module: nn.Module, *inputs: Any) -> Any:
            if not self.recomputes:
                return module(*inputs)
            channel = self.adapter.channel
            again = channel.carrying(channel.prompt)  # entered later
            return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), again))

        self.family.checkpoint_gradients(run_again)

    def compile_blocks(self) -> None:
        """Let torch compile the denoiser's blocks at their first call, once per shape; run rare shapes ``eagerly``."""
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_COMPILED_SHAPES)
        self.family.compile_blocks()
        self.is_compiled = True

    def eagerly(self) -> AbstractContextManager[Any]:
        """While inside, blocks run uncompiled: sampling has other shapes than training, and no gradients."""
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()

    def freeze(self, part: str) -> None:
        """Do not train ``head`` or ``branches``; the adapter's files still contain them."""
        {"head": self.head, "branches": self.adapter}[part].requires_grad_(False)

    def trained(self) -> list[nn.Parameter]:
        """The parameters of ``trainable`` that are not frozen."""
        return [parameter for parameter in self.trainable.parameters() if parameter.requires_grad]

    def frozen_hash(self) -> dict[str, str]:
        """SHA-256 over every frozen weight and buffer of the two parts; training leaves them unchanged."""
        return {"base": hash_weights(self.family), "encoder": hash_weights(self.encoder)}

    def fingerprints(self) -> dict[str, str]:
        """What a feature cache depends on: precision and hash of the weights of each frozen part."""
        return self.family.fingerprints() | {"encoder": self.encoder.fingerprint()}

    def encode_reference(self, reference_B3HW: Tensor) -> Features:
        """uint8 reference images at the encoder's size → the features that the head reads."""
        return self.encoder.encode(to_unit_range(reference_B3HW), uses=self.head.uses)

    def no_image(self, batch: int) -> Features:
        """What the head reads without an image: zeros, or the features of the encoder's blank or of a black image."""
        if self._blank is None:  # one row, computed once
            edge, uses = self.encoder.image_size_px, self.head.uses
            black = self.head.no_image == "black"
            pixels = torch.full((1, 3, edge, edge), -1.0, device=self.device)
            self._blank = self.encoder.encode(pixels, uses) if black else self.encoder.blank(1, uses)
        empty = self._blank if self.head.no_image != "zeros" else self._blank.map(torch.zeros_like)
        return empty.map(lambda x: x.to(self.device).expand(batch, *x.shape[1:]))

    def describe(self) -> dict[str, str]:
        """Metadata of an adapter file: the parts that it was trained with."""
        return {
            "base_family": self.family.name,
            "branches": self.family.branches,
            "kind": self.adapter.name,
            "base": public_source(self.family.source),
            "encoder": public_source(self.encoder.source),
            "encoder_weights": public_source(self.encoder.weights or ""),
            "image_size_px": str(self.encoder.image_size_px),
            "preprocessing": self.preprocessing,
            "features": self.head.uses,
            "layer": self.encoder.layer_name(self.head.uses),
            "no_image": self.head.no_image,
            "num_tokens": str(self.head.num_tokens),
            **self.family.describe(),
            **self.head.describe(),
        }

    def image_tokens(self, *images: Features, t_B: Tensor | None = None) -> Tensor:
        """tokens_BTD of one image prompt per sample, or of several, concatenated: B × (N T) × D."""
        return torch.cat([self.head(features, t_B) for features in images], dim=1)

    @contextmanager
    def prompted(
        self, text: TextCondition, tokens_BTD: Tensor | None, scale: float | Tensor, present_BT: Tensor | None = None
    ) -> Iterator[TextCondition]:
        """While inside, the denoiser sees the image tokens with weight λ = ``scale``; yields the text to give it."""
        if tokens_BTD is None:
            yield text
            return
        prompt = ImagePrompt(tokens_BTD, as_weight(scale), present_BT=present_BT, watch=self.watch)
        with self.adapter.channel.carrying(prompt):
            yield self.adapter.extend(text, prompt)

    @contextmanager
    def guided(
        self, positive: TextCondition, negative: TextCondition | None, conditions: Sequence[ImageCondition]
    ) -> Iterator[tuple[TextCondition, TextCondition | None]]:
        """While inside, a pipeline around ``family`` sees the image prompts; yields the two texts to give it.

        The negative part of guidance gets the "no image" tokens at the same λ, unless a condition says otherwise.
        Tokens are computed once, or before every call of the denoiser for a head that depends on the time.
        """
        negatives, channel = None if negative is None else len(negative.states_BLD), self.adapter.channel
        prompts = GuidedPrompts(self, conditions, negatives)
        texts = (positive, negative) if prompts.change else prompts.extended(positive, negative)
        if not prompts.change and (negative is None or self.family.guidance_calls == "joint"):
            with channel.carrying(prompts.at(None, "positive" if negative is None else "joint")):
                yield texts
            return

        def refill(call: DenoiserCall) -> None:
            channel.prompt = prompts.at(call.time_B, call.part)

        with channel.carrying(None), self.family.before_calls(refill, texts[1]):
            yield texts

    def predict(
        self,
        noisy: Tensor,
        t_B: Tensor,
        text: TextCondition,
        tokens_BTD: Tensor | None,
        scale: float | Tensor,
        present_BT: Tensor | None = None,
    ) -> Tensor:
        with self.prompted(text, tokens_BTD, scale, present_BT) as conditioned:
            return self.family.denoise(noisy, t_B, conditioned)

    def errors(self, batch: Batch) -> Errors:
        """Squared error of each sample under the drops, noise and times that the batch carries."""
        draws = batch.draws
        with self.part("VAE"):
            x0_BCHW = self.posterior_of(batch).sample(draws.posterior_noise_BCHW)
        corrupted = self.family.corrupt(x0_BCHW, draws.noise_BCHW, draws.time_B, self.min_snr_gamma)
        tokens_BTD, present_BT = self._training_tokens(batch, corrupted.time_B)
        with self.part("text encoder"):
            text = self.text_of(batch)
        with self.part("denoiser"):
            prediction = self.predict(corrupted.noisy, corrupted.time_B, text, tokens_BTD, self.train_scale, present_BT)
        if batch.loss_mask_B1HW is None:
            error_B = objective.squared_error(prediction, corrupted.target)
        else:
            inside = (batch.loss_mask_B1HW.float() / 255).expand_as(x0_BCHW)
            base = None
            if self.masked_loss.prior:
                with torch.no_grad(), self.part("denoiser"):
                    base = self.predict(corrupted.noisy, corrupted.time_B, text, None, 0.0)
            error_B = self.masked_loss.error(inside, prediction, corrupted.target, base)
        return Errors(error_B, corrupted.weight_B, draws.time_B)

    def posterior_of(self, batch: Batch) -> Posterior:
        """The target's posterior, from the cache or from the VAE."""
        if batch.posterior is not None:
            return batch.posterior.map(Tensor.float)
        assert batch.image_B3HW is not None, "a batch has its targets as pixels or as posterior"
        return self.family.encode_pixels(to_unit_range(batch.image_B3HW))

    def features_of(self, batch: Batch) -> Features:
        """The reference's features, from the cache or from the encoder."""
        if batch.features is not None and batch.features.has(self.head.uses):
            return batch.features
        assert batch.reference_B3HW is not None, f"a batch has references, or {self.head.uses} features of them"
        return self.encode_reference(batch.reference_B3HW)

    def text_of(self, batch: Batch) -> TextCondition:
        """The encoded text; where the text is dropped, that of the empty text."""
        family, drop_B = self.family, batch.draws.drop_text_B
        if family.known_texts is not None:
            states = family.states_of(batch.text) if batch.text_states is None else batch.text_states
            self._no_text = family.place_states(self._no_text or family.states_of([""]))  # stays on the device
            kept = objective.drop_rows(family.place_states(states), self._no_text, drop_B, self.device)
            return family.text_condition(kept, batch.size_B6)
        inputs = family.prepare_text(batch.text) if batch.text_inputs is None else batch.text_inputs
        kept = objective.drop_rows(inputs, family.prepare_text([""]), drop_B, self.device)
        return family.text_condition(family.text_states(kept), batch.size_B6)

    def _training_tokens(self, batch: Batch, time_B: Tensor) -> tuple[Tensor, Tensor | None]:
        """The tokens, and which are present (None: all); a dropped image becomes "no image" once."""
        more = batch.more
        with self.part("image encoder"):
            features, empty, drop_B = self.features_of(batch), self.no_image(1), batch.draws.drop_image_B
            further = None if more is None else self.encode_reference(more.reference_R3HW)
        with self.part("image tokens"):
            kept = Features.join(lambda pair: objective.replace_rows(pair[0], drop_B, pair[1]), [features, empty])
            tokens_BTD = self.image_tokens(kept, t_B=time_B)
            if more is None or further is None:
                return tokens_BTD, None
            tokens_RTD = self.image_tokens(further, t_B=time_B[more.row_R])
            return more.after(tokens_BTD, tokens_RTD, ~drop_B[more.row_R])


class GuidedPrompts:
    """The image prompts of a sampling, for each part of the guided batch.

    ``negatives`` is the number of rows of the negative part, None without guidance. Prompts ``change`` during the
    sampling if tokens or λ depend on the time; an adapter that extends the text has no such prompts.
    """

    def __init__(self, model: IPAdapterModel, conditions: Sequence[ImageCondition], negatives: int | None) -> None:
        self.model, self.conditions, self.negatives = model, conditions, negatives
        self.kept: dict[str, ImagePrompt] = {}
        self.change = model.head.depends_on_time or any(each.over_time for each in conditions)
        if model.adapter.name == "simple":
            check_simple(conditions)

    def extended(
        self, positive: TextCondition, negative: TextCondition | None
    ) -> tuple[TextCondition, TextCondition | None]:
        """The texts as the adapter extends them."""
        extend = self.model.adapter.extend
        extended = extend(positive, self.at(None, "positive"))
        return extended, None if negative is None else extend(negative, self.at(None, "negative"))

    def at(self, time_B: Tensor | None, part: str) -> ImagePrompt | None:
        if part not in self.kept or self.model.head.depends_on_time:
            prompts = [self.prompt(each, time_B, part) for each in self.conditions]
            if not prompts:
                return None
            self.kept[part] = dataclasses.replace(prompts[0], also=tuple(prompts[1:]))
        prompt = self.kept[part]
        if time_B is not None:
            for each, condition in zip((prompt, *prompt.also), self.conditions, strict=True):
                if condition.over_time is not None:
                    factor = condition.over_time(self.model.family.progress(time_B))
                    each.scale = self.scale(condition, part) * factor
        return prompt

    def prompt(self, condition: ImageCondition, time_B: Tensor | None, part: str) -> ImagePrompt:
        mask_BHW = condition.mask_BHW
        if mask_BHW is not None and part == "joint" and len(mask_BHW) > 1:
            mask_BHW = torch.cat([mask_BHW, mask_BHW])
        tokens_BTD = self.tokens(condition, part, time_B)
        scale = self.scale(condition, part)
        return ImagePrompt(tokens_BTD, scale, condition.hosts, mask_BHW, scaling=condition.scaling)

    def scale(self, condition: ImageCondition, part: str) -> Tensor:
        scale = as_weight(condition.scale)
        return torch.cat([scale, scale]) if part == "joint" and scale.ndim else scale

    def tokens(self, condition: ImageCondition, part: str, time_B: Tensor | None) -> Tensor:
        if part == "joint":  # negative rows first
            negative_B, positive_B = (None, None) if time_B is None else time_B.chunk(2)
            rows = [("negative", negative_B), ("positive", positive_B)]
            return torch.cat([self.tokens(condition, name, times_B) for name, times_B in rows])
        if condition.reversed:
            tokens_BTD = self.model.image_tokens(*condition.images, t_B=time_B)
            return tokens_BTD if part == "negative" else torch.zeros_like(tokens_BTD)
        if part == "positive":
            return self.model.image_tokens(*condition.images, t_B=time_B)
        assert self.negatives is not None, "a negative part without guidance"
        blanks = [self.model.no_image(self.negatives)] * len(condition.images)
        return self.model.image_tokens(*(condition.negative or blanks), t_B=time_B)


def check_simple(conditions: Sequence[ImageCondition]) -> None:
    """A simple adapter's tokens are a part of the text, the same in all layers and at all times."""
    for each in conditions:
        if (each.hosts, each.mask_BHW, each.over_time, each.scaling) != (None, None, None, "V only"):
            raise UserError(
                "a simple adapter has no λ per block, over time or inside the softmax, and no masks, since its tokens "
                "are a part of the text: use a decoupled adapter"
            )


def check_head(head: TokenHead, kind: str, branches: str) -> None:
    """Raise UserError for a head whose tokens the adapters of this kind, with these branches, cannot read."""
    if head.depends_on_time and kind == "simple":
        raise UserError(
            f"tokens: the head {type(head).__name__} depends on the time, but kind=simple gives its tokens to the text "
            "once: choose a decoupled experiment, or another head"
        )
    if head.made_for not in ("", branches):
        raise UserError(
            f"tokens: the tokens of {type(head).__name__} are for the branches of {head.made_for}, and this base has "
            "others: choose another experiment"
        )


def as_weight(scale: float | Tensor) -> Tensor:
    return torch.as_tensor(scale, dtype=torch.float32)
