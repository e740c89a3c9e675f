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
        self._installed = False

    def install(self) -> Self:
        for host, branch in zip(self._hosts, self.branches, strict=True):
            host.plug(branch, self._channel)
        self._installed = True
        return self

    def remove(self) -> Self:
        for host in self._hosts:
            host.unplug()
        self._installed = False
        return self

    @contextmanager
    def condition(self, text: TextCondition, prompt: ImagePrompt | None) -> Iterator[TextCondition]:
        """While inside, calls of the denoiser see the prompt; yields the text to give it.

        Raises RuntimeError for a prompt that nothing would hear, because the adapter is not installed.
        """
        if prompt is not None and not self._installed:
            raise RuntimeError(
                "the adapter is not installed, so the image prompt would be ignored: call install() first"
            )
        with self._channel.carrying(prompt):
            yield text
