"""One adapter in every form in which the public training script and its users save it."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny
import torch
from torch import Tensor, nn

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


def public(model: IPAdapterModel, prefix: str = "") -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in PublicModel(model).state_dict().items()}


def published(model: IPAdapterModel) -> dict[str, dict[str, Tensor]]:
    return nested(to_published(model.trainable.state_dict(), torch.float32))


def deepspeed(model: IPAdapterModel) -> dict[str, Any]:
    return {"module": public(model), "ds_version": "0.14", "lr_scheduler": {"last_epoch": 3}}


def lightning(model: IPAdapterModel) -> dict[str, Any]:
    optimizer = [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4}]}]
    return {"state_dict": public(model, "model."), "global_step": 10, "optimizer_states": optimizer}


def processors_of_diffusers(model: IPAdapterModel) -> dict[str, Any]:
    unet = PublicModel(model).unet.state_dict()
    branches = {name.replace("_ip.", "_ip.0."): value for name, value in unet.items() if "_ip." in name}
    shuffled = dict(sorted(branches.items(), reverse=True))
    return {"image_proj": model.head.state_dict(), "ip_adapter": shuffled, "step": 7}


# what torch saves, and under which name
SAVED_BY_TORCH: dict[str, tuple[str, Callable[[IPAdapterModel], Any]]] = {
    "accelerate": ("pytorch_model.bin", public),
    "data_parallel": ("ddp.pth", lambda model: public(model, "module.")),
    "deepspeed": ("mp_rank_00_model_states.pt", deepspeed),
    "lightning": ("last.ckpt", lightning),
    "processors_of_diffusers": ("by_name.bin", processors_of_diffusers),
    "more_entries": ("a.pt", lambda m: published(m) | {"step": 3, "note": "mine", "extra": {"a": torch.ones(1)}}),
    "zipped_again": ("stored.bin", published),
    "flat": ("flat.bin", lambda m: to_published(m.trainable.state_dict(), torch.float32)),
}
NAMES_A_FOLDER = ("accelerate", "deepspeed", "shared_tensors")


def save(form: str, model: IPAdapterModel, folder: Path) -> Path:
    """The file, or the folder if that is what its program names."""
    name = "model.safetensors"
    if form == "shared_tensors":  # safetensors keeps one name of each shared tensor
        safetensors.torch.save_model(PublicModel(model), folder / name)
    elif form == "processor_names":  # what is left when the names that come first are kept
        left = {name: value for name, value in public(model).items() if "adapter_modules" not in name}
        safetensors.torch.save_file(left, folder / name)
    else:
        name, content = SAVED_BY_TORCH[form]
        torch.save(content(model), folder / name)
    if form == "zipped_again":  # with compression, as an archiver does
        name = "deflated.bin"
        with (
            zipfile.ZipFile(folder / "stored.bin") as stored,
            zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as deflated,
        ):
            for member in stored.namelist():
                deflated.writestr(member, stored.read(member))
    return folder if form in NAMES_A_FOLDER else folder / name


# how it is saved, and what the reader says of it
FORMS = {
    "accelerate": "other names: unet (22), image_proj_model (4), adapter_modules (22) left out: unet (496)",
    "data_parallel": "other names: unet (22), image_proj_model (4), adapter_modules (22) left out: unet (496)",
    "deepspeed": "adapter_modules (22) left out: unet (496), ds_version, lr_scheduler",
    "lightning": "adapter_modules (22) left out: unet (496), global_step, optimizer_states",
    "shared_tensors": "other names: adapter_modules (22), image_proj_model (4) left out: unet (496)",
    "processor_names": "other names: image_proj_model (4), unet (22) left out: unet (496)",
    "processors_of_diffusers": "other names: ip_adapter (22) left out: step",
    "more_entries": "left out: step, note, extra",
    "zipped_again": "",
    "flat": "",
}
