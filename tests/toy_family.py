"""A base of another kind, for tests that it goes through the unchanged rooms: a toy transformer.

It differs from a UNet wherever families may differ: joint attention over text and image with tuple outputs, rectified
flow, a VAE with shift and scale, packed latents, two tokenizers of different length, guidance in two calls per step,
hosts that are blocks, branches with their own initialisation, and a head that depends on the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipa import families, objective
from ipa.adapter.heads import GlobalHead
from ipa.contracts import Family
from ipa.errors import UserError
from ipa.export.heads import HEADS, HeadRow, read_global
from ipa.types import BaseWidths, Channel, Corrupted, DenoiserCall, Posterior, TextCondition, TextInputs
from ipa.weights import fingerprint

WIDTH, CONTEXT, CHANNELS, PATCH, CELLS = 24, 20, 4, 2, 8
LENGTHS = {"short_ids": 5, "long_ids": 9}
SHIFT = 0.1


class ToyBlock(nn.Module):
    """Joint attention of the text and the image stream; returns both. A branch's result is added at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.out = (
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, 3 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.plugged: tuple[nn.Module, Channel] | None = None

    def forward(self, image_BNW: Tensor, text_BLW: Tensor, time_B1W: Tensor) -> tuple[Tensor, Tensor]:
        image_qkv = (self.image(image_BNW) + F.pad(time_B1W, (0, 2 * WIDTH))).chunk(3, -1)
        query, key, value = (
            torch.cat(pair, 1) for pair in zip(self.text(text_BLW).chunk(3, -1), image_qkv, strict=True)
        )
        mixed = self.out(F.scaled_dot_product_attention(query, key, value))
        text_length = text_BLW.shape[1]
        image_BNW = image_BNW + mixed[:, text_length:]
        if self.plugged is not None and (prompt := self.plugged[1].prompt) is not None:
            branch = self.plugged[0]
            image_BNW = image_BNW + branch(image_qkv[0], prompt.tokens_BTD, time_B1W, prompt.scale, prompt.once)
        return image_BNW, text_BLW + mixed[:, :text_length]


class ToyBranch(nn.Module):
    """K′ starts at random and V′ at zero, so that a fresh adapter changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Linear(CONTEXT, WIDTH), nn.Linear(CONTEXT, WIDTH)
        nn.init.zeros_(self.to_v_ip.weight)
        nn.init.zeros_(self.to_v_ip.bias)

    def forward(
        self, query: Tensor, tokens_BTD: Tensor, time: Tensor, scale: Tensor, once: Callable[..., Any]
    ) -> Tensor:
        key, value = once(self, lambda: (self.to_k_ip(tokens_BTD), self.to_v_ip(tokens_BTD)))
        return scale * F.scaled_dot_product_attention(query, key, value)


class ToyHost:
    def __init__(self, name: str, block: ToyBlock) -> None:
        self.name = self.block = name
        self.layer = block

    @property
    def width(self) -> int:
        return WIDTH

    def make_branch(self) -> ToyBranch:
        return ToyBranch()

    def plug(self, branch: nn.Module, channel: Channel) -> None:
        object.__setattr__(self.layer, "plugged", (branch, channel))

    def unplug(self) -> None:
        self.layer.plugged = None


class ToyTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        patch = CHANNELS * PATCH**2
        self.embed, self.unembed = nn.Linear(patch, WIDTH), nn.Linear(WIDTH, patch)
        self.text, self.time = nn.Linear(CONTEXT, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(ToyBlock() for _ in range(2))
        self.run: Callable[..., Any] = lambda block, *inputs: block(*inputs)

    def forward(self, packed_BNK: Tensor, sigma_B: Tensor, text_BLD: Tensor) -> tuple[Tensor]:
        image, text, time = self.embed(packed_BNK), self.text(text_BLD), self.time(sigma_B[:, None, None])
        for block in self.blocks:
            image, text = self.run(block, image, text, time)
        return (self.unembed(image),)


class ToyPipeline:
    """Euler steps on rectified flow; with guidance, every step calls the denoiser for both texts in turn."""

    def __init__(self, transformer: ToyTransformer) -> None:
        self.transformer = transformer

    def __call__(
        self,
        prompt_embeds: Tensor,
        latents: Tensor,
        num_inference_steps: int,
        true_cfg_scale: float,
        height: int,
        width: int,
        output_type: str,
        negative_prompt_embeds: Tensor | None = None,
    ) -> Any:
        assert output_type == "latent" and height == width
        sigmas = torch.linspace(1, 0, num_inference_steps + 1)
        for sigma, after in pairwise(sigmas):
            sigma_B = sigma.expand(len(latents))
            (velocity,) = self.transformer(latents, sigma_B, prompt_embeds)
            if negative_prompt_embeds is not None:
                (without,) = self.transformer(latents, sigma_B, negative_prompt_embeds)
                velocity = without + true_cfg_scale * (velocity - without)
            latents = latents + (after - sigma) * velocity
        return SimpleNamespace(images=latents)


class ToyFamily(Family):
    name, title, advice = "toy", "a toy transformer", "base._target_=…ToyFamily.from_pretrained"
    guidance_calls = "separate"

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.vae, self.transformer, self.letters = tiny.make_vae(), ToyTransformer(), nn.Embedding(64, CONTEXT)
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(cls, path: str, *, config: str | None = None, dtype: str = "float32", **options: Any) -> Self:
        with torch.random.fork_rng():
            torch.manual_seed(json.loads((Path(path) / "toy.json").read_text())["seed"])
            return cls(path)

    @classmethod
    def recognises(cls, path: str, key: str = "base.path") -> bool:
        return (Path(path) / "toy.json").is_file()

    @classmethod
    def read_widths(cls, path: str, config: str | None = None, **options: Any) -> BaseWidths:
        return BaseWidths(CONTEXT, [WIDTH] * 2)

    device = property(lambda self: self.letters.weight.device)
    dtype = property(lambda self: self.letters.weight.dtype)
    context_width = property(lambda self: CONTEXT)
    image_size_px = property(lambda self: 2 * CELLS)
    size_multiple_px = property(lambda self: 2 * PATCH)

    def latent_shape(self, image_size_px: int) -> tuple[int, int, int]:
        return CHANNELS, image_size_px // 2, image_size_px // 2

    @torch.no_grad()
    def encode_pixels(self, pixels_B3HW: Tensor) -> Posterior:
        found = self.vae.encode(pixels_B3HW).latent_dist
        return Posterior((found.mean - SHIFT) * 0.3, found.logvar + 2 * torch.tensor(0.3).log())

    @torch.no_grad()
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        return self.vae.decode(latents_BCHW / 0.3 + SHIFT).sample.clamp(-1, 1)

    def pack(self, latents_BCHW: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents_BCHW, PATCH).flatten(2).transpose(1, 2)

    def unpack(self, packed: Tensor, shape_CHW: tuple[int, int, int]) -> Tensor:
        rows = packed.transpose(1, 2).unflatten(2, (shape_CHW[1] // PATCH, shape_CHW[2] // PATCH))
        return F.pixel_shuffle(rows, PATCH)

    def prepare_text(self, texts: list[str]) -> TextInputs:
        def ids(text: str, length: int) -> list[int]:
            return [ord(letter) % 64 for letter in text[:length].ljust(length)]

        return {name: torch.tensor([ids(text, length) for text in texts]) for name, length in LENGTHS.items()}

    @torch.no_grad()
    def text_states(self, inputs: TextInputs) -> TextInputs:
        return {"states": torch.cat([self.letters(inputs[name].to(self.device).long()) for name in LENGTHS], dim=1)}

    def text_condition(self, states: TextInputs, size_B6: Tensor | None = None) -> TextCondition:
        return TextCondition(states["states"])

    def corrupt(
        self, x0_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor, min_snr_gamma: float | None = None
    ) -> Corrupted:
        noisy, target = objective.flow_path(x0_BCHW, noise_BCHW, u_B)
        return Corrupted(noisy, u_B, target, torch.ones_like(u_B))

    def denoise(self, noisy: Tensor, time_B: Tensor, text: TextCondition) -> Tensor:
        return self.unpack(self.transformer(self.pack(noisy), time_B, text.states_BLD)[0], tuple(noisy.shape[1:]))

    def hosts(self) -> list[Any]:
        return [ToyHost(f"blocks.{i}", block) for i, block in enumerate(self.transformer.blocks)]

    def progress(self, time_B: Tensor) -> float:
        return 1 - float(time_B[0])

    def pipeline(self, pipeline_class: Any = None, **parts: Any) -> Any:
        return ToyPipeline(self.transformer)

    def prompt_arguments(self, positive: TextCondition, negative: TextCondition | None) -> dict[str, Any]:
        given = {"prompt_embeds": positive.states_BLD}
        return given if negative is None else given | {"negative_prompt_embeds": negative.states_BLD}

    def guidance_arguments(self, guidance: float, guidance_rescale: float = 0.0) -> dict[str, Any]:
        if guidance_rescale:
            raise UserError(f"sampling.guidance_rescale={guidance_rescale}: {self.title} has none; give 0")
        return {"true_cfg_scale": guidance}

    @contextmanager
    def before_calls(self, function: Callable[[DenoiserCall], None], negative: TextCondition | None) -> Iterator[None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            is_negative = negative is not None and inputs[2] is negative.states_BLD
            function(DenoiserCall(inputs[1], "negative" if is_negative else "positive"))

        handle = self.transformer.register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def checkpoint_gradients(self, function: Callable[..., Any]) -> None:
        self.transformer.run = function

    def compile_blocks(self) -> None:
        for block in self.transformer.blocks:
            block.compile()

    def fingerprints(self) -> dict[str, str]:
        return {"vae": fingerprint(self.vae), "tokenizer": "letters"}


class TimeHead(GlobalHead):
    """The global head plus a term that depends on the time."""

    depends_on_time = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.time = nn.Linear(1, self.context_width)

    def describe(self) -> dict[str, str]:
        return {"head": "time"}

    def forward(self, features: Any, t_B: Tensor | None = None) -> Tensor:
        assert t_B is not None, "this head reads the time"
        return super().forward(features) + self.time(t_B.float()[:, None, None])


@contextmanager
def installed(folder: Path) -> Iterator[list[str]]:
    """The family and its head known to ipa; gives the overrides that put them into the tiny world."""
    (folder / "toy.json").write_text('{"seed": 0}')
    families.EXTRA.append(ToyFamily)
    HEADS["time"] = HeadRow(TimeHead, "time-dependent", read_global)
    yield [
        f"base._target_={__name__}.ToyFamily.from_pretrained",
        f"base.path={folder}",
        f"tokens._target_={__name__}.TimeHead.fitting",
        "adapter.layout=ipa",
        "data.background=null",
        "sampling.guidance_rescale=0",
    ]
    families.EXTRA.remove(ToyFamily)
    del HEADS["time"]
