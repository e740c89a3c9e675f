"""A base of another kind goes through the unchanged rooms: a toy transformer, defined in this file alone.

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

import pytest
import tiny
import torch
import torch.nn.functional as F
from conftest import Run, checkpoint, column
from torch import Tensor, nn

from ipa import families, objective
from ipa.adapter.heads import GlobalHead
from ipa.adapter.kinds import DecoupledAdapter, SimpleAdapter
from ipa.contracts import DenoiserCall, Family
from ipa.errors import UserError
from ipa.export.heads import HEADS, HeadRow, read_global
from ipa.export.loading import load_model
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, generate
from ipa.types import BaseWidths, Channel, Corrupted, Posterior, TextCondition, TextInputs
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
    def encode_text_inputs(self, inputs: TextInputs, size_B6: Tensor | None = None) -> TextCondition:
        return TextCondition(torch.cat([self.letters(inputs[name].to(self.device).long()) for name in LENGTHS], dim=1))

    def corrupt(
        self, x0_BCHW: Tensor, noise_BCHW: Tensor, u_B: Tensor, min_snr_gamma: float | None = None
    ) -> Corrupted:
        noisy, target = objective.flow_path(self.pack(x0_BCHW), self.pack(noise_BCHW), u_B)
        return Corrupted(noisy, u_B, target, torch.ones_like(u_B))

    def denoise(self, noisy: Tensor, time_B: Tensor, text: TextCondition) -> Tensor:
        return self.transformer(noisy, time_B, text.states_BLD)[0]

    def hosts(self) -> list[Any]:
        return [ToyHost(f"blocks.{i}", block) for i, block in enumerate(self.transformer.blocks)]

    def blocks(self) -> list[str]:
        return [host.block for host in self.hosts()]

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


@pytest.fixture(scope="module")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy.json").write_text('{"seed": 0}')
    families.EXTRA.append(ToyFamily)
    HEADS["time"] = HeadRow(TimeHead, "time-dependent", read_global)
    yield str(folder)
    families.EXTRA.remove(ToyFamily)
    del HEADS["time"]


@pytest.fixture
def toy(toy_base: str) -> list[str]:
    """Overrides that put the toy family and its head into the tiny world."""
    return [
        f"base._target_={__name__}.ToyFamily.from_pretrained",
        f"base.path={toy_base}",
        f"tokens._target_={__name__}.TimeHead.fitting",
        "adapter.layout=ipa",
        "data.background=null",
    ]


def make_toy(kind: Any = DecoupledAdapter, **options: Any) -> IPAdapterModel:
    encoder, family = tiny.make_encoder(), ToyFamily("toy")
    return IPAdapterModel(family, encoder, TimeHead.fitting(encoder.widths, CONTEXT), kind(family.hosts()), **options)


def test_it_trains_resumes_to_the_bit_and_writes_previews_and_adapter(
    train_in: Run, toy: list[str], tmp_path: Path
) -> None:
    whole = train_in(tmp_path / "whole", *toy, "optimizer.lr=0.01")
    train_in(tmp_path / "parts", *toy, "optimizer.lr=0.01", "trainer.max_steps=2")
    resumed = train_in(tmp_path / "parts", *toy, "optimizer.lr=0.01")
    one, other = (checkpoint(folder)["state_dict"] for folder in (whole, resumed))

    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any("time.weight" in name for name in one)
    assert column(whole, "train/loss") == column(resumed, "train/loss")
    assert sorted(path.name for path in (whole / "previews").iterdir()) == ["step_000002.png", "step_000004.png"]
    model = load_model(whole / "adapter.safetensors")
    assert (type(model.family), type(model.head)) == (ToyFamily, TimeHead)
    for name, value in model.trainable.state_dict().items():
        assert torch.equal(value, one[f"trainable.{name}"].half().float())


def test_guidance_in_two_calls_gives_each_its_own_tokens_at_every_step() -> None:
    model = tiny.shake(make_toy())
    model.adapter.install()
    features = model.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX))
    options = SamplingOptions(num_steps=3, guidance=4.0)
    together = generate(model, features, ["cat", "dog"], [1, 2], options)
    latents = model.family.pack(
        torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    )
    texts = [model.family.encode_text(each) for each in (["cat", "dog"], ["", ""])]
    with torch.no_grad():
        for sigma, after in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
            t_B = torch.tensor([sigma] * 2)
            images = features, model.no_image(2)
            positive, negative = (
                model.predict(latents, t_B, text, model.image_tokens(image, t_B=t_B), 1.0)
                for text, image in zip(texts, images, strict=True)
            )
            latents = latents + (after - sigma) * (negative + 4 * (positive - negative))
        expected = model.family.decode_latents(model.family.unpack(latents, (4, 8, 8)))

    assert torch.allclose(together, expected, atol=1e-5)
    assert not torch.allclose(
        together, generate(model, features, ["cat", "dog"], [1, 2], options.with_scale(0.0)), atol=1e-3
    )


def test_a_fresh_adapter_and_scale_zero_leave_the_base_as_it_is() -> None:
    model = make_toy()
    noisy, t_B = torch.randn(2, 16, 16), torch.tensor([0.3, 0.9])
    text, features = (
        model.family.encode_text(["a", "b"]),
        model.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX)),
    )
    tokens = model.image_tokens(features, t_B=t_B)
    base = model.predict(noisy, t_B, text, None, 1.0)
    model.adapter.install()
    assert torch.equal(model.predict(noisy, t_B, text, tokens, 1.0), base)
    tiny.shake(model)
    tokens = model.image_tokens(features, t_B=t_B)
    assert torch.equal(model.predict(noisy, t_B, text, tokens, 0.0), base)
    assert not torch.equal(model.predict(noisy, t_B, text, tokens, 1.0), base)
    model.adapter.remove()
    assert torch.equal(model.predict(noisy, t_B, text, tokens, 1.0), base)


def test_what_a_family_does_not_have_is_refused_by_the_option() -> None:
    model = make_toy()
    features = model.encode_reference(tiny.make_pictures(1, tiny.REFERENCE_PX))
    with pytest.raises(UserError, match=r"guidance_rescale=0\.5"):
        generate(model, features, [""], [0], SamplingOptions(num_steps=1, guidance_rescale=0.5))
    with pytest.raises(UserError, match=r"image_size_px=18: .* multiples of 4"):
        generate(model, features, [""], [0], SamplingOptions(num_steps=1, image_size_px=18))
    with pytest.raises(UserError, match="min_snr_gamma=5"):
        make_toy(min_snr_gamma=5.0)
    with pytest.raises(UserError, match=r"TimeHead depends on the time.*kind=simple"):
        make_toy(SimpleAdapter)
