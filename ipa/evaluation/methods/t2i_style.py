"""T2I-Adapter's style adapter: eight tokens that a small transformer makes of CLIP's patches, behind the text.

    h = transformer(LN([x; q])),   tokens = LN(h at the places of q) W

x are the 257 last hidden states of CLIP-L before its final norm, q learned queries. λ weighs the tokens. The
unconditional half has no "no image": its text is made as long by repeating its own last eight tokens, as in the
authors' sampler. Mou et al. 2023, "T2I-Adapter"; weights in TencentARC/T2I-Adapter.

    method = T2IStyle.from_pretrained()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from transformers.activations import QuickGELUActivation

from ipa.encoders.vision_model import VisionModelEncoder
from ipa.evaluation.methods.prompt_tokens import PromptTokens, load_base, load_image_encoder, load_module, squares
from ipa.families.stable_diffusion import StableDiffusion

HEADS = 8


class Layer(nn.Module):
    """Self-attention and feed-forward with the norms before them, as in CLIP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELUActivation())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x_BPE: Tensor) -> Tensor:
        normed = self.ln_1(x_BPE)
        x_BPE = x_BPE + self.attn(normed, normed, normed, need_weights=False)[0]
        return x_BPE + self.mlp(self.ln_2(x_BPE))


class StyleAdapter(nn.Module):
    """Hidden states_BPE → tokens_BTD. The parameters' names are the published ones, misspelling included."""

    def __init__(self, width: int = 1024, context_width: int = 768, num_tokens: int = 8, num_layers: int = 3) -> None:
        super().__init__()
        self.style_embedding = nn.Parameter(torch.randn(1, num_tokens, width) * width**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer_layes = nn.Sequential(*(Layer(width) for _ in range(num_layers)))
        self.proj = nn.Parameter(torch.randn(width, context_width) * width**-0.5)

    @classmethod
    def like(cls, state: dict[str, Tensor]) -> Self:
        """As wide as these weights."""
        width, context_width = state["proj"].shape
        num_layers = sum(name.endswith(".ln_1.weight") for name in state)
        return cls(width, context_width, state["style_embedding"].shape[1], num_layers)

    @property
    def num_tokens(self) -> int:
        return self.style_embedding.shape[1]

    def forward(self, states_BPE: Tensor) -> Tensor:
        queries_BTE = self.style_embedding.expand(len(states_BPE), -1, -1)
        hidden = self.transformer_layes(self.ln_pre(torch.cat([states_BPE, queries_BTE], 1)))
        return self.ln_post(hidden[:, -self.num_tokens :]) @ self.proj


class T2IStyle(PromptTokens):
    """T2I-Adapter with its style adapter alone."""

    name = "t2i_style"
    adapter: StyleAdapter

    def __init__(
        self, family: StableDiffusion, encoder: VisionModelEncoder, adapter: StyleAdapter, source: str = ""
    ) -> None:
        super().__init__(family, source)
        self.encoder, self.adapter = encoder, adapter
        self.eval().requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        base: str = "CompVis/stable-diffusion-v1-4",
        image_encoder: str = "openai/clip-vit-large-patch14",
        adapter: str = "TencentARC/T2I-Adapter/models/t2iadapter_style_sd14v1.pth",
        dtype: str = "float16",
    ) -> Self:
        """Raises MissingWeights for what is neither here nor to be had."""
        made = load_module(StyleAdapter.like, adapter, "method.adapter", "a style adapter of T2I-Adapter")
        family, encoder = load_base(base, dtype), load_image_encoder(image_encoder, dtype)
        return cls(family, encoder, made.to(family.dtype), f"{adapter} on {base}")

    def encode(self, images: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
        pictures_B3HW = squares(images, self.encoder.image_size_px).to(self.family.device)
        tokens_BTD = scale * self.adapter(self.hidden_states(pictures_B3HW))
        empty_BLD = self.family.encode_text([""]).states_BLD
        return tokens_BTD, empty_BLD[:, -self.adapter.num_tokens :].expand_as(tokens_BTD)

    def hidden_states(self, image_B3HW: Tensor) -> Tensor:
        """The last layer's states_BPE, class token included, which CLIP's own final norm has not touched."""
        normalized = ((image_B3HW + 1) / 2 - self.encoder.mean) / self.encoder.std
        visual = self.encoder.visual
        return visual.vision_model(normalized.to(visual.dtype)).last_hidden_state
