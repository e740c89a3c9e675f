"""Kinds of adapter: how image tokens reach the frozen denoiser. See `ipa.contracts.AdapterKind`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from ipa.contracts import AdapterKind, Host
from ipa.errors import UserError
from ipa.types import BaseWidths, ImagePrompt, TextCondition


class DecoupledAdapter(AdapterKind):
    """A separate branch in every host; the text is unchanged (Ye et al. 2023, section 3.2.2)."""

    name = "decoupled"

    def __init__(self, hosts: Sequence[Host]) -> None:
        super().__init__()
        if not hosts:
            raise UserError("the base has no cross-attention layers for the branches")
        self.branches = nn.ModuleList(host.make_branch() for host in hosts)
        self._hosts = list(hosts)

    def install(self) -> Self:
        for host, branch in zip(self._hosts, self.branches, strict=True):
            host.plug(branch, self.channel)
        return self

    def remove(self) -> Self:
        for host in self._hosts:
            host.unplug()
        return self


class SimpleAdapter(AdapterKind):
    """The image tokens, times λ, follow the text tokens through the frozen K and V; only the head is trained.

    This is the paper's "simple adapter" (Ye et al. 2023, section 4.4.1), without weights of its own. λ = 0 drops the
    tokens, since zero tokens would still take their share of the softmax: the output is discontinuous at 0.
    """

    name = "simple"

    @classmethod
    def token_width(cls, widths: BaseWidths) -> int:
        return widths.text or widths.context

    def __init__(self, hosts: Sequence[Host] = ()) -> None:
        super().__init__()

    def install(self) -> Self:
        return self

    def remove(self) -> Self:
        return self

    def extend(self, text: TextCondition, prompt: ImagePrompt | None) -> TextCondition:
        """Raises UserError if λ is 0 for only a part of the batch."""
        prompts = [] if prompt is None else [each for each in (prompt, *prompt.also) if nonzero(each.scale)]
        if not prompts:
            return text
        tokens = [(each.scale * each.tokens_BTD).to(text.states_BLD.dtype) for each in prompts]
        states_BLD = torch.cat([text.states_BLD, *tokens], dim=1)
        mask_BL = text.mask_BL
        if mask_BL is not None:
            mask_BL = torch.nn.functional.pad(mask_BL, (0, states_BLD.shape[1] - mask_BL.shape[1]), value=True)
        return replace(text, states_BLD=states_BLD, mask_BL=mask_BL)


def nonzero(scale: Tensor) -> bool:
    """Whether λ is not 0; a plain number stays on the CPU, so this does not synchronise with the device."""
    if bool((scale == 0).all()):
        return False
    if bool((scale == 0).any()):
        raise UserError("a simple adapter drops its tokens at scale 0, so the scale cannot be 0 for a part of a batch")
    return True
