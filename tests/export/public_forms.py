"""One adapter in every form in which the public training script and its users save it."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny
import torch
from torch import nn

from ipa.export.published import to_published
from ipa.export.storage import nested
from ipa.model import IPAdapterModel


class Processor(nn.Module):
    """As the public script has one in every layer: with K′ and V′ for cross-attention, else without weights."""

    def __init__(self, branch: Any = None) -> None:
        super().__init__()
        if branch is not None:
            self.to_k_ip, self.to_v_ip = branch.to_k_ip, branch.to_v_ip


class PublicModel(nn.Module):
    """What the public script trains and saves: the UNet, the head, and the UNet's processors a second time."""

    def __init__(self, model: IPAdapterModel) -> None:
        super().__init__()
        branches = iter(model.adapter.branches)
        self.unet = tiny.make_unet()
        names = self.unet.attn_processors
        self.unet.set_attn_processor({name: Processor(next(branches) if "attn2" in name else None) for name in names})
        self.image_proj_model = model.head
        self.adapter_modules = nn.ModuleList(self.unet.attn_processors.values())


def accelerate(model: IPAdapterModel, folder: Path) -> Path:
    torch.save(PublicModel(model).state_dict(), folder / "pytorch_model.bin")
    return folder  # accelerate names a folder


def data_parallel(model: IPAdapterModel, folder: Path) -> Path:
    state = {f"module.{name}": value for name, value in PublicModel(model).state_dict().items()}
    torch.save(state, folder / "ddp.pth")
    return folder / "ddp.pth"


def deepspeed(model: IPAdapterModel, folder: Path) -> Path:
    content = {"module": PublicModel(model).state_dict(), "ds_version": "0.14", "lr_scheduler": {"last_epoch": 3}}
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    return folder


def lightning(model: IPAdapterModel, folder: Path) -> Path:
    state = {f"model.{name}": value for name, value in PublicModel(model).state_dict().items()}
    optimizer = [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}]
    torch.save({"state_dict": state, "global_step": 10, "optimizer_states": optimizer}, folder / "last.ckpt")
    return folder / "last.ckpt"


def shared_tensors(model: IPAdapterModel, folder: Path) -> Path:
    """safetensors keeps one name of each shared tensor."""
    safetensors.torch.save_model(PublicModel(model), folder / "model.safetensors")
    return folder


def processor_names(model: IPAdapterModel, folder: Path) -> Path:
    """What is left when the names that come first are kept."""
    state = {name: value for name, value in PublicModel(model).state_dict().items() if "adapter_modules" not in name}
    safetensors.torch.save_file(state, folder / "other.safetensors")
    return folder / "other.safetensors"


def processors_of_diffusers(model: IPAdapterModel, folder: Path) -> Path:
    unet = PublicModel(model).unet.state_dict()
    branches = {name.replace("_ip.", "_ip.0."): value for name, value in unet.items() if "_ip." in name}
    shuffled = dict(sorted(branches.items(), reverse=True))
    torch.save({"image_proj": model.head.state_dict(), "ip_adapter": shuffled, "step": 7}, folder / "by_name.bin")
    return folder / "by_name.bin"


def with_more_entries(model: IPAdapterModel, folder: Path) -> Path:
    content: dict[str, Any] = nested(to_published(model.trainable.state_dict(), torch.float32))
    torch.save(content | {"step": 3, "note": "mine", "extra": {"a": torch.ones(1)}}, folder / "adapter.pt")
    return folder / "adapter.pt"


def zipped_again(model: IPAdapterModel, folder: Path) -> Path:
    """With compression, as an archiver does."""
    torch.save(nested(to_published(model.trainable.state_dict(), torch.float32)), folder / "stored.bin")
    with (
        zipfile.ZipFile(folder / "stored.bin") as stored,
        zipfile.ZipFile(folder / "deflated.bin", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    return folder / "deflated.bin"


# how it is saved, and what the reader says of it
FORMS: dict[Callable[[IPAdapterModel, Path], Path], str] = {
    accelerate: "other names: unet (22), image_proj_model (4), adapter_modules (22) left out: unet (496)",
    data_parallel: "other names: unet (22), image_proj_model (4), adapter_modules (22) left out: unet (496)",
    deepspeed: "adapter_modules (22) left out: unet (496), ds_version, lr_scheduler",
    lightning: "adapter_modules (22) left out: unet (496), global_step, optimizer_states",
    shared_tensors: "other names: adapter_modules (22), image_proj_model (4) left out: unet (496)",
    processor_names: "other names: image_proj_model (4), unet (22) left out: unet (496)",
    processors_of_diffusers: "other names: ip_adapter (22) left out: step",
    with_more_entries: "left out: step, note, extra",
    zipped_again: "",
}
