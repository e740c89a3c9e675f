"""Family, encoder, head, adapter and objective together: the only place where they meet.

L = E ‖ prediction(x_t, t, c_text, c_image) − target ‖²,   with c_text and c_image dropped now and then
(Ye et al. 2023, equations 6 and 7)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ipa import objective
from ipa.types import Batch, Features, ImagePrompt, TextCondition, to_unit_range


@dataclass
class Errors:
    """Squared error of each sample, its weight in the loss, and its place in the noise schedule (0 clean … 1 noise)."""

    error_B: Tensor
    weight_B: Tensor
    time_B: Tensor

    @property
    def loss(self) -> Tensor:
        return (self.weight_B * self.error_B).mean()


class IPAdapterModel(nn.Module):
    """A frozen base and encoder with a trainable head and adapter.

    ``trainable`` is the one declaration of what is trained: optimizer, checkpoint, export and parameter count use it.
    ``min_snr_gamma`` weighs the loss over time (see ``objective``), None does not.
    """

    def __init__(self, family: Any, encoder: Any, head: Any, adapter: Any, min_snr_gamma: float | None = None) -> None:
        super().__init__()
        self.family, self.encoder, self.min_snr_gamma = family, encoder, min_snr_gamma
        self._blank: Features | None = None
        self.trainable = nn.ModuleDict({"image_proj": head, "ip_adapter": adapter})

    @property
    def head(self) -> Any:
        return self.trainable["image_proj"]

    @property
    def adapter(self) -> Any:
        return self.trainable["ip_adapter"]

    @property
    def device(self) -> torch.device:
        return next(self.trainable.parameters()).device

    def checkpoint_gradients(self) -> None:
        """Keep the borders of the denoiser's blocks only, and compute the blocks again on the way back.

        Memory for time. The prompt that the first pass saw is there again in the second, which comes long after.
        """

        def run_again(module: nn.Module, *inputs: Any) -> Any:
            contexts = lambda: (nullcontext(), self.adapter.again())  # noqa: E731
            return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)

        self.family.checkpoint_gradients(run_again)

    def count_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.trainable.parameters())

    def frozen_hash(self) -> str:
        """SHA-256 over every frozen weight and buffer, to show that training left them alone."""
        digest = hashlib.sha256()
        for part in (self.family, self.encoder):
            for name, value in sorted(part.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def encode_reference(self, reference_B3HW: Tensor) -> Features:
        """uint8 reference pictures at the encoder's size → the features that the head reads."""
        return self.encoder.encode(to_unit_range(reference_B3HW), uses=self.head.uses)

    def no_image(self, batch: int) -> Features:
        """What the head reads when there is no image: zeros, or the encoder's blank picture, as the head says."""
        if self._blank is None:  # one row, asked of the frozen encoder once
            self._blank = self.encoder.blank(1, uses=self.head.uses)
        empty = self._blank if self.head.no_image == "blank" else self._blank.map(torch.zeros_like)
        return empty.map(lambda x: x.to(self.device).expand(batch, *x.shape[1:]))

    def describe(self) -> dict[str, str]:
        """What a reader of the adapter file needs to know of the parts that it was trained with."""
        return {
            "base_family": self.family.name,
            "kind": self.adapter.name,
            "base": self.family.source,
            "encoder": self.encoder.source,
            "encoder_weights": self.encoder.weights or "",
            "image_size_px": str(self.encoder.image_size_px),
            "preprocessing": "shortest side bicubic, centre crop",
            "features": self.head.uses,
            "no_image": self.head.no_image,
            "num_tokens": str(self.head.num_tokens),
            **({"head_width": str(self.head.head_width)} if hasattr(self.head, "head_width") else {}),
        }

    def image_tokens(self, *images: Features, t_B: Tensor | None = None) -> Tensor:
        """tokens_BTD of one image prompt a sample, or the tokens of several one after the other: B × (N T) × D."""
        return torch.cat([self.head(features, t_B) for features in images], dim=1)

    @contextmanager
    def prompted(
        self, text: TextCondition, tokens_BTD: Tensor | None, scale: float | Tensor
    ) -> Iterator[TextCondition]:
        """While inside, the denoiser sees the image tokens with weight λ = ``scale``; yields the text to give it."""
        if tokens_BTD is None:
            yield text
            return
        weight = torch.as_tensor(scale, dtype=torch.float32)
        with self.adapter.condition(text, ImagePrompt(tokens_BTD, weight)) as conditioned:
            yield conditioned

    def predict(
        self, latents_BCHW: Tensor, t_B: Tensor, text: TextCondition, tokens_BTD: Tensor | None, scale: float | Tensor
    ) -> Tensor:
        with self.prompted(text, tokens_BTD, scale) as conditioned:
            return self.family.denoise(latents_BCHW, t_B, conditioned)

    def errors(self, batch: Batch) -> Errors:
        """Squared error of each sample under the drops, noise and times that the batch carries."""
        draws = batch.draws
        x0_BCHW = self.family.encode_pixels(to_unit_range(batch.image_B3HW)).sample(draws.posterior_noise_BCHW)
        tokens_BTD = self._training_tokens(batch.reference_B3HW, draws.drop_image_B)
        text = self._training_text(batch)
        kind, alphas = self.family.prediction_type, self.family.alphas_cumprod
        t_B = objective.to_timesteps(draws.time_B, len(alphas))
        noisy = objective.add_noise(x0_BCHW, draws.noise_BCHW, alphas, t_B)
        target = objective.make_target(kind, x0_BCHW, draws.noise_BCHW, alphas, t_B)
        error_B = objective.squared_error(self.predict(noisy, t_B, text, tokens_BTD, scale=1.0), target)
        weight_B = objective.loss_weight(kind, alphas, t_B, self.min_snr_gamma)
        return Errors(error_B, weight_B, draws.time_B)

    def _training_tokens(self, reference_B3HW: Tensor, drop_B: Tensor) -> Tensor:
        features, empty = self.encode_reference(reference_B3HW), self.no_image(1)
        kept = Features(
            replace(features.pooled_BE, drop_B, empty.pooled_BE),
            replace(features.patches_BPF, drop_B, empty.patches_BPF),
        )
        return self.image_tokens(kept)

    def _training_text(self, batch: Batch) -> TextCondition:
        dropped: Sequence[bool] = batch.draws.drop_text_B.tolist()
        texts = ["" if drop else text for text, drop in zip(batch.text, dropped, strict=True)]
        return self.family.encode_text(texts, batch.size_B6)


def replace(states: Tensor | None, drop_B: Tensor, empty: Tensor | None) -> Tensor | None:
    return None if states is None or empty is None else objective.replace_rows(states, drop_B, empty)
