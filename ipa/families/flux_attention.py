"""The attention layers of FLUX and Chroma as hosts, in the two published ways.

XLabs (diffusers, x-flux): every double-stream block. The query is that of the image stream, after the base's own
RMSNorm and before the rotary embedding; λ r is added to the image stream at the block's end, without gate or output
projection:

    r = softmax(Q K′ᵀ / √d) V′,     K′ = W′_k c + b,  V′ = W′_v c + b

InstantX: all blocks, no biases, K′ normalised (RMSNorm without weights). In single-stream blocks the query is that of
all tokens, after the rotary embedding. λ r is added before the output projection.

Letters here: those of `ipa.families.attention_host`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn

from ipa.errors import UserError
from ipa.families.attention_host import AttentionBranch, AttentionHost, BranchProcessor


class FluxBranch(AttentionBranch):
    """K′ and V′ of one block; V′ = 0 changes nothing at the start, and V′ still learns in the first step."""

    def __init__(
        self, attention: FluxAttention, context_width: int, key_std: float, value_std: float, bias: bool = True
    ) -> None:
        super().__init__(attention.heads, context_width, attention.inner_dim, attention.to_q.weight.device, bias)
        for layer, std in ((self.to_k_ip, key_std), (self.to_v_ip, value_std)):
            nn.init.normal_(layer.weight, std=std)
            if bias:
                nn.init.zeros_(layer.bias)


class InstantXBranch(FluxBranch):
    """Without biases, and with K′ normalised."""

    def __init__(self, attention: FluxAttention, context_width: int, key_std: float, value_std: float) -> None:
        super().__init__(attention, context_width, key_std, value_std, bias=False)

    def project(self, tokens_BTD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key, value = super().project(tokens_BTD, dtype)
        return F.rms_norm(key, key.shape[-1:], eps=1e-5), value


class FluxProcessor(BranchProcessor):
    """XLabs' way. Returns a third output, which diffusers' blocks add to the image stream at the end."""

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **unused: Any,
    ) -> Any:
        if not self.acting():
            return self.replaced(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        projected = project(attn, hidden_states, encoder_hidden_states)
        query, key, value = rotate(projected, image_rotary_emb)
        attended_BNC = attend(query, key, value, attention_mask)
        text_length = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        return self.finish(attn, projected[0], query, attended_BNC, text_length)

    def finish(
        self, attn: FluxAttention, query_BNMd: Tensor, rotated_BNMd: Tensor, attended_BNC: Tensor, text_length: int
    ) -> Any:
        """The layer's outputs; ``rotated`` are the queries after the rotary embedding, text first."""
        image_BQC, text_BLC = project_out(attn, attended_BNC, text_length)
        return image_BQC, text_BLC, self.sum_added(image_BQC, query_BNMd[:, text_length:])

    def sum_added(self, own_BQC: Tensor, query_BQMd: Tensor) -> Tensor:
        """Σ λ r over the prompts, B × Q × (M d)."""
        query_BMQd = query_BQMd.transpose(1, 2)
        results = []
        for branch, prompt in self.acting():
            image_BQC = branch(query_BMQd, prompt.tokens_BTD, None, prompt.scale_at(self.host), prompt.once)
            results.append(self.added(prompt, own_BQC, image_BQC))
        return sum(results[1:], start=results[0])


class InstantXProcessor(FluxProcessor):
    """InstantX' way, in double- and single-stream blocks."""

    def finish(
        self, attn: FluxAttention, query_BNMd: Tensor, rotated_BNMd: Tensor, attended_BNC: Tensor, text_length: int
    ) -> Any:
        if attn.added_kv_proj_dim is None:  # single stream: its output projection belongs to the block
            if any(prompt.mask_BHW is not None for _, prompt in self.acting()):
                raise UserError("mask: single-stream blocks (base.hosts=all) treat text and image alike; omit the mask")
            return attended_BNC + self.sum_added(attended_BNC, rotated_BNMd)
        text_BLC, image_BQC = attended_BNC[:, :text_length], attended_BNC[:, text_length:]
        image_BQC = image_BQC + self.sum_added(image_BQC, query_BNMd[:, text_length:])
        return project_out(attn, torch.cat([text_BLC, image_BQC], dim=1), text_length)


class FluxHost(AttentionHost):
    """One block; ``start`` are the standard deviations of K′ and V′ at the beginning of a training."""

    processor_class = FluxProcessor
    branch_class: ClassVar[type[FluxBranch]] = FluxBranch

    def __init__(
        self, name: str, attention: FluxAttention, context_width: int, start: tuple[float, float] = (0.02, 0.0)
    ) -> None:
        super().__init__(f"{name}.attn", attention, name)
        self.context_width, self.start = context_width, start

    def make_branch(self) -> FluxBranch:
        return self.branch_class(self.attention, self.context_width, *self.start)


class InstantXHost(FluxHost):
    processor_class = InstantXProcessor
    branch_class = InstantXBranch


def project(attn: FluxAttention, image: Tensor, text: Tensor | None) -> list[Tensor]:
    """Normalised Q and K, and V, of text (first) and image: B × N × M × d each."""
    layers: list[Any] = [attn.to_q, attn.to_k, attn.to_v]
    query, key, value = (layer(image).unflatten(-1, (attn.heads, -1)) for layer in layers)
    joint = [attn.norm_q(query), attn.norm_k(key), value]
    if attn.added_kv_proj_dim is None:
        return joint
    layers = [attn.add_q_proj, attn.add_k_proj, attn.add_v_proj]
    query, key, value = (layer(text).unflatten(-1, (attn.heads, -1)) for layer in layers)
    own = [attn.norm_added_q(query), attn.norm_added_k(key), value]
    return [torch.cat(pair, dim=1) for pair in zip(own, joint, strict=True)]


def rotate(projected: list[Tensor], rotary: Any) -> list[Tensor]:
    """Q and K with the rotary embedding."""
    if rotary is None:
        return projected
    rotated: list[Any] = [apply_rotary_emb(states, rotary, sequence_dim=1) for states in projected[:2]]
    return [*rotated, projected[2]]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """B × N × M × d each → B × N × (M d)."""
    query, key, value = (states.permute(0, 2, 1, 3) for states in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).permute(0, 2, 1, 3).flatten(2)


def project_out(attn: FluxAttention, attended_BNC: Tensor, text_length: int) -> tuple[Tensor, Tensor]:
    """Image and text stream of a double-stream block."""
    image: Any = attended_BNC[:, text_length:].contiguous()
    for layer in attn.to_out:
        image = layer(image)
    return image, attn.to_add_out(attended_BNC[:, :text_length].contiguous())
