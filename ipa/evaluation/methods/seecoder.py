"""SeeCoder of Prompt-Free Diffusion: an image encoder whose 148 tokens replace Stable Diffusion's text states.

    Swin-L, the maps of 1/8, 1/16, 1/32 → decoder, three maps of one width → 9 layers of queries → 4 + 144 tokens

Xu et al. 2023, "Prompt-Free Diffusion: Taking 'Text' out of Text-to-Image Diffusion Models"; weights in
shi-labs/prompt-free-diffusion. There is no text and no λ. "No image" is 148 zeros. Its authors sample with a guidance
of about 2. Letters: B images, T tokens, P positions in a map, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer  # type: ignore[import-untyped]

from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.prompt_tokens import StableDiffusionMethod, Start, cut_squares
from ipa.evaluation.methods.weights import load_base, load_module
from ipa.families.stable_diffusion import StableDiffusion
from ipa.sampling import SamplingOptions
from ipa.weights import count_parameters

LEVELS = ("res3", "res4", "res5")  # the last three stages of the backbone
HEADS = 8
GROUPS = 32
NUM_GLOBAL = 4
IMAGE_PX = 512  # its authors' demo reads images at their own sizes; squares of one size fit into one batch
PATCH_PX = 4
# names in the published file, of which the backbone's are those of its authors' detection models → names here
NAMES: dict[str, Any] = {
    r"imencoder\.patch_embed\.proj\.": "imencoder.features.0.0.",
    r"imencoder\.patch_embed\.norm\.": "imencoder.features.0.2.",
    r"imencoder\.layers\.(\d)\.blocks\.": lambda found: f"imencoder.features.{2 * int(found[1]) + 1}.",
    r"imencoder\.layers\.(\d)\.downsample\.": lambda found: f"imencoder.features.{2 * int(found[1]) + 2}.",
    r"imencoder\.norm(\d)\.": r"imencoder.norms.\1.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.3.",
    r"lateral_layers\.(\w+)\.weight": r"lateral_layers.\1.0.weight",
    r"lateral_layers\.(\w+)\.norm\.": r"lateral_layers.\1.1.",
    r"att_layers\.(\d)\.(multihead|self)_attn\.": r"att_layers.\1.attention.",
}


class SemanticContextEncoder(nn.Module):
    """image_B3HW in [0, 1], not normalised → tokens_BTD, the global ones first."""

    def __init__(self, imencoder: SwinBackbone, imdecoder: Decoder, qtransformer: QueryTransformer) -> None:
        super().__init__()
        self.imencoder, self.imdecoder, self.qtransformer = imencoder, imdecoder, qtransformer

    @classmethod
    def large(cls) -> Self:
        """The published sizes."""
        swin_l = SwinBackbone(192, depths=[2, 2, 18, 2], heads=[6, 12, 24, 48], window=12)
        return cls(swin_l, Decoder([384, 768, 1536]), QueryTransformer())

    def forward(self, image_B3HW: Tensor) -> Tensor:
        return self.qtransformer(self.imdecoder(self.imencoder(image_B3HW)[-len(LEVELS) :]))


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the published file under the names that they have here."""
    renamed = {}
    for name, weight in state.items():
        for pattern, new in NAMES.items():
            name = re.sub(pattern, new, name)
        renamed[name] = weight.flatten() if name.endswith("relative_position_index") else weight
    return renamed


class SwinBackbone(nn.Module):
    """The layers of torchvision's Swin transformer (Liu et al. 2021), with a norm for the map of each stage.

    They equal the published ones while every map is larger than a window, so for images of more than 384 px.
    """

    def __init__(self, width: int, depths: list[int], heads: list[int], window: int) -> None:
        super().__init__()
        sizes: Any = {"patch_size": [PATCH_PX] * 2, "window_size": [window] * 2, "num_classes": 1}
        swin = SwinTransformer(embed_dim=width, depths=depths, num_heads=heads, stochastic_depth_prob=0.0, **sizes)
        self.features = swin.features
        self.norms = nn.ModuleList(nn.LayerNorm(width * 2**stage) for stage in range(len(depths)))

    def forward(self, image_B3HW: Tensor) -> list[Tensor]:
        """One map_BCHW for each stage, the last one 32 times smaller than the image."""
        x_BHWC, maps = image_B3HW, []
        for norm, embed_or_merge, blocks in zip(self.norms, self.features[::2], self.features[1::2], strict=True):
            x_BHWC = blocks(embed_or_merge(x_BHWC))
            maps.append(norm(x_BHWC).permute(0, 3, 1, 2))
        return maps


class Decoder(nn.Module):
    """Maps of three sizes → as many of one width: a transformer, plus a convolution as a shortcut.

    The published code attends along the batch, not along the positions of a map. Its own inference has a batch of one,
    where each position attends to itself only; the same is done here for every batch, so images do not mix.
    """

    def __init__(self, widths: list[int], width: int = 768, inner_width: int = 1024, num_layers: int = 6) -> None:
        super().__init__()
        self.inproj_layers, self.lateral_layers = nn.ModuleDict(), nn.ModuleDict()
        for name, wide in zip(LEVELS, widths, strict=True):
            for layers, bias in ((self.inproj_layers, True), (self.lateral_layers, False)):
                layers[name] = nn.Sequential(nn.Conv2d(wide, width, 1, bias=bias), nn.GroupNorm(GROUPS, width))
        layer = nn.TransformerEncoderLayer(width, HEADS, inner_width, dropout=0.0)
        self.transformer = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.level_embed = nn.Parameter(torch.randn(len(LEVELS), width))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        made = []
        # level_embed counts from the smallest map
        for name, map_BCHW, embed_D in zip(LEVELS, maps, self.level_embed.flip(0), strict=True):
            x_BHWD = self.inproj_layers[name](map_BCHW).permute(0, 2, 3, 1) + embed_D
            alone_1PD = x_BHWD.flatten(0, 2)[None]  # a sequence of one, with every position as a sample
            decoded_BHWD = self.transformer(alone_1PD).view_as(x_BHWD)
            made.append(decoded_BHWD.permute(0, 3, 1, 2) + self.lateral_layers[name](map_BCHW))
        return made


class QueryTransformer(nn.Module):
    """Maps → tokens: the local queries read one map after the other; self-attention joins them with the global ones."""

    def __init__(
        self, width: int = 768, inner_width: int = 2048, num_queries: int = NUM_GLOBAL + 144, num_layers: int = 9
    ) -> None:
        super().__init__()
        self.transformer_crossatt_layers = nn.ModuleList(Attention(width) for _ in range(num_layers))
        self.transformer_selfatt_layers = nn.ModuleList(Attention(width) for _ in range(num_layers))
        self.transformer_feedforward_layers = nn.ModuleList(FeedForward(width, inner_width) for _ in range(num_layers))
        self.init_query = nn.Embedding(num_queries, width)
        self.query_pos_embedding = nn.Embedding(num_queries, width)
        self.level_embed = nn.Embedding(len(LEVELS), width)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [
            map_BDHW.flatten(2).transpose(1, 2) + embed
            for map_BDHW, embed in zip(maps, self.level_embed.weight, strict=True)
        ]
        query_BTD = self.init_query.weight.expand(len(levels[0]), -1, -1)
        place_TD = self.query_pos_embedding.weight
        layers = zip(
            self.transformer_crossatt_layers,
            self.transformer_selfatt_layers,
            self.transformer_feedforward_layers,
            strict=True,
        )
        for i, (look, exchange, think) in enumerate(layers):
            map_BPD = levels[i % len(levels)]
            local = look(query_BTD[:, NUM_GLOBAL:], place_TD[NUM_GLOBAL:], map_BPD, map_BPD)
            query_BTD = torch.cat([query_BTD[:, :NUM_GLOBAL], local], 1)
            query_BTD = think(exchange(query_BTD, place_TD, query_BTD + place_TD, query_BTD))
        return query_BTD


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, query_BTD: Tensor, place_TD: Tensor, key_BPD: Tensor, value_BPD: Tensor) -> Tensor:
        return self.norm(query_BTD + self.attention(query_BTD + place_TD, key_BPD, value_BPD, need_weights=False)[0])


class FeedForward(nn.Module):
    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, inner_width), nn.Linear(inner_width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.norm(x_BTD + self.linear2(self.linear1(x_BTD).relu()))


class SeeCoder(StableDiffusionMethod):
    """Stable Diffusion with SeeCoder in place of its text encoder. It reads the image's centre square."""

    name = "seecoder"
    uses_text = False
    adapter: SemanticContextEncoder

    def __init__(
        self,
        family: StableDiffusion,
        adapter: SemanticContextEncoder,
        source: str = "",
        reference_size_px: int = IMAGE_PX,
    ) -> None:
        super().__init__(source, family=family, adapter=adapter)
        self.reference_size_px = reference_size_px

    @classmethod
    def from_pretrained(cls, base: str, adapter: str, dtype: str = "float16") -> Self:
        """Raises MissingWeights, and UserError for files of something else."""
        loaded = load_module(SemanticContextEncoder.large, adapter, "a SeeCoder", "ctx.image.", rename=rename)
        family = load_base(base, dtype)
        return cls(family, loaded.to(family.dtype), f"{adapter} on {base}")

    @property
    def trained(self) -> int:
        return count_parameters(self.adapter)

    def sample_latents(self, prompts: Sequence[Prompt], start: Start, sampling: SamplingOptions) -> Tensor:
        return self.call(self.family.pipeline(), self.states(prompts), start, sampling)

    def states(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """The whole context of the conditional and of the unconditional half."""
        pictures_B3HW = (cut_squares(prompts, self.reference_size_px) + 1) / 2
        tokens_BTD = self.adapter(pictures_B3HW.to(self.family.device, self.family.dtype))
        return tokens_BTD, torch.zeros_like(tokens_BTD)
