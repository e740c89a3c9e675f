"""Kinds of adapter: how image tokens reach the frozen denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from ipa.errors import UserError
from ipa.types import Channel, Host, ImagePrompt, TextCondition


class DecoupledAdapter(nn.Module):
    """A branch of its own in every host; the text is left alone (Ye et al. 2023, section 3.2.2).

    Making one changes nothing in the base. ``install`` plugs the branches in, ``remove`` puts everything back; without
    a prompt, and with λ = 0, an installed base gives exactly what it gave before.
    """

    name = "decoupled"

    def __init__(self, hosts: Sequence[Host]) -> None:
        super().__init__()
        if not hosts:
            raise UserError("the base has no cross-attention to plug a branch into")
        self.branches = nn.ModuleList(host.make_branch() for host in hosts)
        self._hosts = list(hosts)
        self._channel = Channel()

    def install(self) -> Self:
        for host, branch in zip(self._hosts, self.branches, strict=True):
            host.plug(branch, self._channel)
        return self

    def remove(self) -> Self:
        for host in self._hosts:
            host.unplug()
        return self

    @contextmanager
    def condition(self, text: TextCondition, prompt: ImagePrompt | None) -> Iterator[TextCondition]:
        """While inside, calls of an installed denoiser see the prompt; yields the text to give it."""
        with self._channel.carrying(prompt):
            yield text

    def again(self) -> AbstractContextManager[None]:
        """A context, to be entered later, in which calls see the prompt of now: what recomputing a layer needs."""
        return self._channel.carrying(self._channel.prompt)


class SimpleAdapter(nn.Module):
    """The image tokens, times λ, follow the text tokens through the frozen K and V; only the head is trained.

    It is the paper's "simple adapter" (Ye et al. 2023, section 4.4.1), and has no weights of its own. λ = 0 drops the
    tokens, since zeroed ones would still take their share of the softmax: so the output jumps at 0.
    """

    name = "simple"

    def __init__(self, hosts: Sequence[Host] = ()) -> None:
        super().__init__()

    def install(self) -> Self:
        return self

    def remove(self) -> Self:
        return self

    @contextmanager
    def condition(self, text: TextCondition, prompt: ImagePrompt | None) -> Iterator[TextCondition]:
        """Yield the text followed by the image tokens; raises UserError if λ is 0 for a part of the batch only."""
        yield text if prompt is None or not nonzero(prompt.scale) else replace(text, states_BLD=follow(text, prompt))

    def again(self) -> AbstractContextManager[None]:
        return nullcontext()


def follow(text: TextCondition, prompt: ImagePrompt) -> Tensor:
    tokens_BTD = (prompt.scale * prompt.tokens_BTD).to(text.states_BLD.dtype)
    return torch.cat([text.states_BLD, tokens_BTD], dim=1)


def nonzero(scale: Tensor) -> bool:
    """Whether λ is unlike 0; a plain number lies on the CPU, so that asking waits for no other device."""
    if bool((scale == 0).all()):
        return False
    if bool((scale == 0).any()):
        raise UserError("a simple adapter drops its tokens at scale 0, so it cannot be 0 for a part of a batch only")
    return True
