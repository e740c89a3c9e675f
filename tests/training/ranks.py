"""Several processes of one group, as torchrun would start them; what they run stands here, since they import it."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import tiny
import tiny_sdxl
import torch
from torch import distributed, multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.tensor import DTensor

from ipa.encoders.vision_model import VisionModelEncoder
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions
from ipa.training.previews import Column, HeldOutPrompts, generate_columns
from ipa.training.strategies import shard, total_norm, whole

WORLD = 2

Job = tuple[Path, Sequence[str]]


def together(function: Callable[..., None], *args: Any) -> None:
    """Call ``function(rank, *args)`` in every rank; raises if one does. Forked, so that nothing is imported again."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(begin, (port, function, args), nprocs=WORLD, start_method="fork")  # type: ignore[no-untyped-call]


def begin(rank: int, port: int, function: Callable[..., None], args: Sequence[Any]) -> None:
    here = Path(__file__).parent
    sys.path[:0] = [str(here), str(here.parent), str(here.parents[1] / "demo")]  # several folders have a conftest
    torch.set_num_threads(1)
    os.environ |= {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(WORLD) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    function(rank, *args)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def train_all(rank: int, jobs: Sequence[Job]) -> None:
    """The real training, once for each job, all in one group."""
    from conftest import run_training

    for folder, overrides in jobs:
        run_training(folder, *overrides)


class Spy(L.Callback):
    """Writes what travels in a training: the bytes of every bucket that DDP reduces, and what it is blind to."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.seen: dict[str, Any] = {"bytes": []}

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        ddp: Any = trainer.strategy.model
        ddp.register_comm_hook(None, self.reduce)
        self.seen["ignored"] = sorted(ddp.parameters_to_ignore)
        self.seen["static"] = ddp.static_graph
        self.seen["trained"] = [name for name, p in pl_module.named_parameters() if p.requires_grad]
        self.seen["frozen"] = [name for name, p in pl_module.named_parameters() if not p.requires_grad]
        self.seen["frozen"] += [name for name, _ in pl_module.named_buffers()]
        self.seen["trained_bytes"] = sum(p.nbytes for p in pl_module.parameters() if p.requires_grad)

    def reduce(self, state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
        self.seen["bytes"].append(bucket.buffer().nbytes)
        return default_hooks.allreduce_hook(distributed.group.WORLD, bucket)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.path.write_text(json.dumps(self.seen))


def draw_pictures(rank: int, folder: Path) -> None:
    """The pictures of ``make_columns`` from the tiny model, its weights whole and then shared out."""
    distributed.init_process_group("gloo")
    model = moved_model()
    save_pictures(generate_columns(model, make_columns()), rank, folder / "whole.pt")
    shard(model, distributed.init_device_mesh("cpu", (WORLD,)))
    save_pictures(generate_columns(model, make_columns()), rank, folder / "shared.pt")


def compare_all_gradients(rank: int, path: Path) -> None:
    distributed.init_process_group("gloo")
    mesh = distributed.init_device_mesh("cpu", (WORLD,))
    measured = {name: compare_gradients(make(), mesh) for name, make in MODELS.items()}
    if rank == 0:
        path.write_text(json.dumps(measured))


def compare_gradients(model: IPAdapterModel, mesh: Any) -> dict[str, float]:
    """The loss of one batch and its gradient, before and after ``shard``."""
    batch = tiny.make_batch()
    model.family.to(
        memory_format=torch.contiguous_format
    )  # as ``shard`` lays it out: each layout rounds in its own way
    model.adapter.install()
    model.checkpoint_gradients()
    trained = dict(model.trainable.named_parameters())
    one = model.errors(batch).loss
    one.backward()
    expected = {name: parameter.grad for name, parameter in trained.items()}
    norm = total_norm([parameter.grad for parameter in trained.values()])
    model.zero_grad()
    shard(model, mesh)
    other = model.errors(batch).loss
    other.backward()
    shared = {name: parameter.grad for name, parameter in model.trainable.named_parameters()}
    frozen = [*model.family.parameters(), *model.encoder.parameters()]
    return {
        "loss": float((one - other).detach()),
        "gradient": max(float((whole(shared[name]) - value).abs().max()) for name, value in expected.items()),
        "norm": float(total_norm([*shared.values()]) - norm),
        "shared": sum(p.numel() for p in frozen if isinstance(p, DTensor)) / sum(p.numel() for p in frozen),
    }


def with_clip_vision() -> IPAdapterModel:
    model = tiny.make_model(head="fine_grained")
    model.encoder = VisionModelEncoder(tiny.make_vision(model.encoder))
    return model


MODELS: dict[str, Callable[[], IPAdapterModel]] = {
    "global": tiny.make_model,
    "fine-grained": lambda: tiny.make_model(head="fine_grained"),
    "simple": lambda: tiny.make_model(kind="simple"),
    "transformers' encoder": with_clip_vision,
    "sdxl": lambda: tiny.make_model(family=tiny_sdxl.make_family()),
}


def save_pictures(pictures: list[torch.Tensor], rank: int, path: Path) -> None:
    assert (rank == 0) == bool(pictures)
    if rank == 0:
        torch.save(pictures, path)


def moved_model() -> IPAdapterModel:
    model = tiny.shake(tiny.make_model())
    model.adapter.install()
    return model


def make_columns() -> list[Column]:
    """Three batches, three, and one: odd, so that one rank has less to do."""
    draw = torch.Generator().manual_seed(1)
    images, references = (
        torch.randint(0, 256, (5, 3, size, size), generator=draw, dtype=torch.uint8)
        for size in (tiny.IMAGE_PX, tiny.REFERENCE_PX)
    )
    prompts, options = HeldOutPrompts(images, references, [""] * 5), SamplingOptions(num_steps=2, batch_size=2)
    return [
        Column(prompts, options.with_scale(0), seed=7),
        Column(prompts, options, seed=7, text="red thing"),
        Column(prompts.head(1), options, seed=3),
    ]
