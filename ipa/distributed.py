"""Rank, gather and reductions, with one process or several. All ranks must call them together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank_and_world() -> tuple[int, int]:
    return (distributed.get_rank(), distributed.get_world_size()) if is_distributed() else (0, 1)


def gather(value: Any, group: Any = None) -> list[Any]:
    """Every rank's (picklable) value, in rank order; a list of one without several ranks."""
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(values, value, group)
    return values


def sum_over_ranks(value: Tensor) -> Tensor:
    total = value.detach().clone()
    if is_distributed():
        distributed.all_reduce(total)
    return total


def mean_over_ranks(value: Tensor) -> Tensor:
    return sum_over_ranks(value) / rank_and_world()[1]


def max_over_ranks(flags: Tensor) -> Tensor:
    """In place; on a GPU only the stream waits for the other ranks, not the host."""
    if is_distributed():
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return flags


def send_to_first(pieces: dict[int, Tensor], lengths: list[int], device: torch.device) -> list[Tensor]:
    """Piece i (``lengths[i]`` rows) from rank i % world to rank 0, in order; other ranks return an empty list."""
    rank, world = rank_and_world()
    received = []
    for number, length in enumerate(lengths):
        owner = number % world
        if rank == owner == 0:
            received.append(pieces[number])
        elif rank == 0:
            piece = pieces[0].new_empty(length, *pieces[0].shape[1:], device=device)
            distributed.recv(piece, owner)
            received.append(piece.cpu())
        elif rank == owner:
            distributed.send(pieces[number].to(device), 0)
    return received
