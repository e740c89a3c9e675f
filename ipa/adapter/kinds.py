"""Kinds of adapter: how image tokens reach the frozen denoiser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from torch import nn

from ipa.types import Channel, Host, ImagePrompt, TextCondition


class DecoupledAdapter(nn.Module):
    """A branch of its own in every host; the text is left alone (Ye et al. 2023, section 3.2.2).

    Making one changes nothing in the base. ``install`` plugs the branches in, ``remove`` puts everything back; without
    a prompt, and with λ = 0, an installed base gives exactly what it gave before.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        super().__init__()
        if not hosts:
            raise ValueError("the base has no cross-attention to plug a branch into")
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
