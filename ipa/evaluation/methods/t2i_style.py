"""T2I-Adapter's style adapter: eight tokens that a small transformer makes of CLIP's patches, after the text.

    h = transformer(LN([x; q])),   tokens = LN(h at the positions of q) W

x are CLIP-L's 257 last hidden states before its final norm, q learned queries. λ weights the tokens. The unconditional
half has no "no image": as in the authors' sampler, its text is padded to the same length with its own last eight
tokens. Mou et al. 2023, "T2I-Adapter"; weights in TencentARC/T2I-Adapter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.prompt_tokens import ClipPromptTokens

HEADS = 8


class StyleAdapter(nn.Module):
    """Hidden states_BPE → tokens_BTD. Parameters have the published names, misspelling included."""

    def __init__(self, width: int = 1024, context_width: int = 768, num_tokens: int = 8, num_layers: int = 3) -> None:
        super().__init__()
        self.style_embedding = nn.Parameter(torch.randn(1, num_tokens, width) * width**-0.5)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = (ResidualAttentionBlock(width, HEADS, act_layer=QuickGELU) for _ in range(num_layers))
        self.transformer_layes = nn.Sequential(*layers)
        self.proj = nn.Parameter(torch.randn(width, context_width) * width**-0.5)

    @property
    def num_tokens(self) -> int:
        return self.style_embedding.shape[1]

    def forward(self, states_BPE: Tensor) -> Tensor:
        queries_BTE = self.style_embedding.expand(len(states_BPE), -1, -1)
        hidden = self.transformer_layes(self.ln_pre(torch.cat([states_BPE, queries_BTE], 1)))
        return self.ln_post(hidden[:, -self.num_tokens :]) @ self.proj


class T2IStyle(ClipPromptTokens):
    """T2I-Adapter with only its style adapter."""

    name = "t2i_style"
    adapter: StyleAdapter
    make_adapter = StyleAdapter
    published = ("a style adapter of T2I-Adapter", "")

    def encode(self, prompts: Sequence[Prompt], scale: float) -> tuple[Tensor, Tensor]:
        tokens_BTD = scale * self.adapter(self.hidden_states(self.squares(prompts)))
        empty_BLD = self.family.encode_text([""]).states_BLD
        return tokens_BTD, empty_BLD[:, -self.adapter.num_tokens :].expand_as(tokens_BTD)

    def hidden_states(self, image_B3HW: Tensor) -> Tensor:
        """The last layer's states_BPE with the class token, before CLIP's final norm."""
        normalized = ((image_B3HW + 1) / 2 - self.encoder.mean) / self.encoder.std
        visual = self.encoder.visual
        return visual.vision_model(normalized.to(visual.dtype)).last_hidden_state
