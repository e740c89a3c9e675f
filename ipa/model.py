"""Family, encoder, head, adapter and objective together: the only place where they meet.

L = E ‖ prediction(x_t, t, c_text, c_image) − target ‖²,   with c_text and c_image dropped now and then
(Ye et al. 2023, equations 6 and 7)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from ipa import objective
from ipa.data.images.transforms import fit_named
from ipa.types import Batch, Features, ImagePrompt, Posterior, TextCondition, to_unit_range

HASHING_THREADS = 4
MOST_SHAPES = 64  # of the compiled blocks' inputs: widths × resolutions × aspect ratios


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
    ``min_snr_gamma`` weighs the loss over time (see ``objective``), None does not. ``reference_fit`` says how its
    references are cut (see ``transforms.FITS``), for those who make them and for the metadata.
    """

    def __init__(
        self,
        family: Any,
        encoder: Any,
        head: Any,
        adapter: Any,
        min_snr_gamma: float | None = None,
        reference_fit: str = "crop",
    ) -> None:
        super().__init__()
        self.reference_fit, self.preprocessing = reference_fit, fit_named(reference_fit).words
        self.family, self.encoder, self.min_snr_gamma = family, encoder, min_snr_gamma
        self.is_compiled = False
        self.recomputes = True  # blocks on the way back, where they are asked to
        # names the parts of a step, for a trace or for a clock
        self.part: Callable[[str], AbstractContextManager[Any]] = torch.profiler.record_function
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
            if not self.recomputes:
                return module(*inputs)
            contexts = lambda: (nullcontext(), self.adapter.again())  # noqa: E731
            return checkpoint(module, *inputs, use_reentrant=False, context_fn=contexts)

        self.family.checkpoint_gradients(run_again)

    def compile_blocks(self) -> None:
        """Let torch compile the denoiser's blocks at their first call, for every shape that they get.

        More shapes than torch keeps are an error and not run uncompiled; see ``eagerly`` for those that come seldom.
        """
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_SHAPES)
        self.family.compile_blocks()
        self.is_compiled = True

    def eagerly(self) -> AbstractContextManager[Any]:
        """While inside, the blocks run as they were written: pictures have other shapes than steps, no gradients."""
        return torch.compiler.set_stance("force_eager") if self.is_compiled else nullcontext()

    def count_trainable(self) -> int:
        return sum(parameter.numel() for parameter in self.trainable.parameters())

    def frozen_hash(self) -> str:
        """SHA-256 over every frozen weight and buffer, to show that training left them alone."""
        return hash_weights(self.family) + hash_weights(self.encoder)

    def fingerprints(self) -> dict[str, str]:
        return fingerprints(self.family, self.encoder)

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
            "preprocessing": self.preprocessing,
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
        with self.part("VAE"):
            x0_BCHW = self.posterior_of(batch).sample(draws.posterior_noise_BCHW)
        tokens_BTD = self._training_tokens(batch)
        with self.part("text encoder"):
            text = self.text_of(batch)
        kind, alphas = self.family.prediction_type, self.family.alphas_cumprod
        t_B = objective.to_timesteps(draws.time_B, len(alphas))
        noisy = objective.add_noise(x0_BCHW, draws.noise_BCHW, alphas, t_B)
        target = objective.make_target(kind, x0_BCHW, draws.noise_BCHW, alphas, t_B)
        with self.part("denoiser"):
            prediction = self.predict(noisy, t_B, text, tokens_BTD, scale=1.0)
        error_B = objective.squared_error(prediction, target)
        weight_B = objective.loss_weight(kind, alphas, t_B, self.min_snr_gamma)
        return Errors(error_B, weight_B, draws.time_B)

    def posterior_of(self, batch: Batch) -> Posterior:
        """The target's, from the cache or from the VAE."""
        if batch.posterior is not None:
            return batch.posterior.map(Tensor.float)
        assert batch.image_B3HW is not None, "a batch has its targets as pixels or as posterior"
        return self.family.encode_pixels(to_unit_range(batch.image_B3HW))

    def features_of(self, batch: Batch) -> Features:
        """The reference's, from the cache or from the encoder; of several the head says which it uses."""
        if batch.features is not None and batch.features.has(self.head.uses):
            return batch.features
        assert batch.reference_B3HW is not None, f"a batch has references, or {self.head.uses} features of them"
        return self.encode_reference(batch.reference_B3HW)

    def text_of(self, batch: Batch) -> TextCondition:
        """The encoded text, the empty one where the text is dropped."""
        empty_1NL = self.family.tokenize([""]).to(self.device)
        if batch.text_inputs is None:
            ids_BNL = self.family.tokenize(batch.text)
        else:
            ids_BNL = batch.text_inputs["ids"].unflatten(1, empty_1NL.shape[1:])
        drop_B = batch.draws.drop_text_B.to(self.device)
        return self.family.encode_ids(objective.replace_rows(ids_BNL.to(self.device), drop_B, empty_1NL), batch.size_B6)

    def _training_tokens(self, batch: Batch) -> Tensor:
        with self.part("image encoder"):
            features, empty, drop_B = self.features_of(batch), self.no_image(1), batch.draws.drop_image_B
        with self.part("image tokens"):
            kept = Features(
                replace(features.pooled_BE, drop_B, empty.pooled_BE),
                replace(features.patches_BPF, drop_B, empty.patches_BPF),
            )
            return self.image_tokens(kept)


def replace(states: Tensor | None, drop_B: Tensor, empty: Tensor | None) -> Tensor | None:
    return None if states is None or empty is None else objective.replace_rows(states, drop_B, empty)


def fingerprints(family: Any, encoder: Any) -> dict[str, str]:
    """What tells apart the frozen parts whose work can be kept: type of the numbers, then a hash of all of them."""
    vae = f"{name_of(family.vae.dtype)} {hash_weights(family.vae)[:32]} × {family.vae.config.scaling_factor:g}"
    visual = f"{name_of(next(encoder.parameters()).dtype)} {hash_weights(encoder)[:32]}"
    return {"vae": vae, "encoder": visual, "tokenizer": family.tokenizer_hash()[:32]}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hash_weights(module: nn.Module) -> str:
    """SHA-256 over names, weights and buffers, those too that no file holds; the tensors are read side by side."""
    tensors = sorted([*module.named_parameters(), *module.named_buffers()], key=lambda pair: pair[0])
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = threads.map(hash_tensor, (tensor for _, tensor in tensors))
        whole = hashlib.sha256()
        for (name, _), digest in zip(tensors, digests, strict=True):
            whole.update(name.encode() + digest)
    return whole.hexdigest()


def hash_tensor(tensor: Tensor) -> bytes:
    """Of a tensor that is shared out among ranks, this rank's part."""
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    numbers: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(numbers).digest()
