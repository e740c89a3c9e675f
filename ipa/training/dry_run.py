"""``python train.py … dry_run=true``: what a training would be and take, without loading a weight."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig
from torch import nn

from ipa.data.cache.datamodule import CachedDataModule
from ipa.data.cache.preparation import KEPT, cached_bytes
from ipa.errors import MissingWeights, UserError
from ipa.families.hollow import make_hollow, quantize_hollow
from ipa.families.sources import is_single_file
from ipa.model import IPAdapterModel
from ipa.training.memory import FRAGMENTED, GIB, RESERVE_GIB, estimate_peak
from ipa.training.optimizers import name_of as name_of_optimizer
from ipa.training.optimizers import state_bytes
from ipa.training.parts import check_parts, make_head_of, name_of, read_from
from ipa.types import Batch
from ipa.weights import count_parameters

CARDS_GIB = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141)
QUANTIZING = ("quantization", "text_quantization", "transformer_file")  # options of the base
FP32 = 4  # bytes; what the hub stores, and the trained weights, their average and their two moments
SMALLER_BATCH = "a smaller data.batch_size with more trainer.accumulate_grad_batches"


def dry_run(cfg: DictConfig) -> str:
    """The report, a line for each question; raises UserError for parts that cannot be trained together."""
    if Path(cfg.base.path).exists():
        check_parts(cfg)
    lines: dict[str, str] = {}
    samples = cfg.trainer.max_steps * global_batch(cfg)
    data = open_data(cfg)
    lines["data"], number = describe_data(data)
    passes = f", {samples / number:,.1f} passes over the data" if number else ""
    lines["steps"] = f"{cfg.trainer.max_steps:,} of {global_batch(cfg):,} samples: {samples:,}{passes}"
    try:
        model = hollow_model(cfg, has_states=getattr(data, "texts", None) is not None)
    except MissingWeights as error:
        lines["not known"] = f"parameters, disk, download and memory: {error}"
    else:
        lines = describe_parts(cfg, model) | lines
        lines["disk"] = describe_disk(cfg, model, number)
        lines["download"] = describe_download(cfg, model)
        lines["memory"] = describe_memory(cfg, model)
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def hollow_model(cfg: DictConfig, has_states: bool = False) -> IPAdapterModel:
    """All parts of a step on the meta device; with ``has_states`` of the texts in the data, without text encoders."""
    family_class: Any = get_class(cfg.base._target_.rpartition(".")[0])
    with torch.device("meta"):
        family = make_hollow(family_class, **instantiate({**cfg.base, "_target_": "builtins.dict"}))
        encoder = read_from(cfg.encoder, "make_hollow")
        head = make_head_of(cfg, encoder.widths, family.widths)
        adapter = instantiate(cfg.adapter.make)(family.hosts())
        model = IPAdapterModel(family, encoder, head, adapter, cfg.min_snr_gamma, cfg.data.reference_fit)
        model.trainable.float()
    if has_states:
        leave_out_text(family)
    return model


def leave_out_text(family: Any) -> None:
    """Text states of the right shapes in place of the text encoders."""
    states = family.text_states(family.prepare_text([""]))
    family.known_texts = {"": {name: torch.zeros(x.shape[1:], dtype=x.dtype) for name, x in states.items()}}
    for name in family.part_names:
        if name.startswith("text_encoder"):
            setattr(family, name, None)


def global_batch(cfg: DictConfig) -> int:
    if cfg.data.batch_size is None:
        return cfg.global_batch_size
    return cfg.data.batch_size * processes(cfg) * cfg.trainer.accumulate_grad_batches


def processes(cfg: DictConfig) -> int:
    """As the options say; "auto" is the GPUs of this machine, or one."""
    devices = cfg.trainer.devices
    per_node = devices if isinstance(devices, int) else max(1, torch.cuda.device_count())
    return per_node * cfg.trainer.num_nodes


def describe_parts(cfg: DictConfig, model: IPAdapterModel) -> dict[str, str]:
    family: Any = model.family
    head, trained = count_parameters(model.head), count_parameters(model.trainable)
    modules = {name: getattr(family, name) for name in family.part_names}
    parts = [f"{name} {in_millions(part)}" for name, part in modules.items() if isinstance(part, nn.Module)]
    return {
        "trained": f"{trained:,} parameters ({head:,} in the head, {trained - head:,} in the layers), "
        f"{model.head.num_tokens} image tokens",
        "base": f"{cfg.base.path}: {', '.join(parts)}; {cfg.base.dtype}",
        "encoder": f"{name_of(cfg.encoder)}: {in_millions(model.encoder)}; "
        f"{cfg.encoder.dtype}, {model.encoder.image_size_px} px",
        "image size": f"{image_size_px(cfg, model)} px",
    }


def image_size_px(cfg: DictConfig, model: IPAdapterModel) -> int:
    return cfg.image_size_px or model.family.image_size_px


def in_millions(module: nn.Module) -> str:
    return f"{count_parameters(module) / 1e6:,.1f} M"


def open_data(cfg: DictConfig) -> Any:
    """The datamodule, or in words why there is none."""
    try:
        return instantiate(cfg.data)
    except (UserError, InstantiationException) as error:
        if not isinstance(reason := error.__cause__ or error, UserError):
            raise
        return f"unknown: {reason}"


def describe_data(data: Any) -> tuple[str, int | None]:
    """A description, and the number of samples if every shard has a statistics file."""
    if isinstance(data, str):
        return data, None
    shards = [Path(shard) for source in data.train_order.sources for shard in source.shards]
    if isinstance(data, CachedDataModule):
        return f"{len(shards):,} shards of features" + ", with text states" * (data.texts is not None), None
    number = samples_in(shards)
    if number is None:
        return f"{len(shards):,} shards; python -m ipa.tools.inspect counts the samples", None
    return f"{number:,} samples in {len(shards):,} shards", number


def samples_in(shards: Sequence[Path]) -> int | None:
    """What img2dataset and `ipa.tools.pack` wrote next to the shards; None if one has no statistics."""
    try:
        stats = (shard.with_name(f"{shard.stem}_stats.json").read_text() for shard in shards)
        return sum(int(json.loads(each)["successes"]) for each in stats)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def describe_disk(cfg: DictConfig, model: IPAdapterModel, samples: int | None) -> str:
    trained = count_parameters(model.trainable)
    has_average = cfg.ema.decay is not None or name_of_optimizer(cfg.optimizer) == "schedule_free"
    checkpoint = trained * (FP32 + state_bytes(cfg.optimizer) + FP32 * has_average)
    kept = cfg.checkpoint.keep_last + 1
    adapter = f"{'two adapter files of' if has_average else 'the adapter'} {size(2 * trained)}"
    text = f"{kept} checkpoints of {size(checkpoint)}, {adapter}"
    if samples and cfg.data._target_.endswith("ShardDataModule"):
        latent_shape = model.family.latent_shape(image_size_px(cfg, model))
        each = cached_bytes(latent_shape, model.encoder.widths, [KEPT[model.head.uses]])
        text += f"; a feature cache of these samples would take {size(samples * each)}"
    return text


def describe_download(cfg: DictConfig, model: IPAdapterModel) -> str:
    wanted = dict(downloads(cfg, model))
    if not wanted:
        return "nothing"
    return f"about {size(sum(wanted.values()))}: " + ", ".join(f"{name} {size(each)}" for name, each in wanted.items())


def downloads(cfg: DictConfig, model: IPAdapterModel) -> Iterator[tuple[str, int]]:
    """Names and bytes of weights that are neither files here nor in the hub's cache, in the hub's dtypes."""
    path, family = str(cfg.base.path), cast(Any, model.family)
    if not (Path(path).exists() or is_single_file(path) or is_downloaded(path)):
        yield path, family.published_bytes * count_parameters(family)
    for part in (cfg.encoder, cfg.judge):
        name = part and (part.get("name") or part.get("path"))
        if name and not name.startswith("local-dir:") and not Path(name).exists() and not has_weights(part):
            yield name, FP32 * (clip_parameters(name) if part.get("name") else count_parameters(model.encoder))


def has_weights(part: DictConfig) -> bool:
    """Whether the weights of an image encoder or judge are a file, or in the hub's cache."""
    import open_clip

    if not part.get("name"):
        return is_downloaded("/".join(str(part.path).split("/")[:2]))
    tag = open_clip.get_pretrained_cfg(part.name, part.get("pretrained") or "") or {}
    return Path(str(part.get("pretrained"))).is_file() or is_downloaded(str(tag.get("hf_hub", "")).rstrip("/"))


def is_downloaded(repository: str) -> bool:
    from huggingface_hub.constants import HF_HUB_CACHE

    return bool(repository) and (Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "snapshots").is_dir()


def clip_parameters(name: str) -> int:
    """Of a whole CLIP, which open_clip downloads even for its image tower."""
    import open_clip

    config: Any = {key: value for key, value in open_clip.get_model_config(name).items() if key != "custom_text"}
    with torch.device("meta"):
        return count_parameters(
            (open_clip.CustomTextCLIP if "hf_model_name" in config["text_cfg"] else open_clip.CLIP)(**config)
        )


def describe_memory(cfg: DictConfig, model: IPAdapterModel) -> str:
    """Estimated for one process; the last line, since the estimate gives the model fake weights."""
    batch = cfg.data.batch_size or -(-cfg.global_batch_size // (processes(cfg) * cfg.trainer.accumulate_grad_batches))
    cached = cfg.data._target_.endswith(CachedDataModule.__name__)
    average = FP32 * count_parameters(model.trainable) * (cfg.ema.decay is not None)
    quantize_hollow(model.family, **{name: cfg.base.get(name) for name in QUANTIZING})
    size_px, kept = image_size_px(cfg, model), state_bytes(cfg.optimizer)
    peak = average + estimate_peak(model, step_maker(cfg), batch, size_px, cached, kept)
    where = "in one process" if processes(cfg) == 1 else f"in each of {processes(cfg)} processes"
    text = f"about {size(peak)} for a step of {batch} samples {where} (estimated)"
    if cfg.trainer.accelerator == "cpu":
        return text
    saving = SMALLER_BATCH if cfg.gradient_checkpointing else f"gradient_checkpointing=true, or {SMALLER_BATCH}"
    return f"{text}: {smallest_card(peak)}. Less with {saving}"


def smallest_card(peak: float) -> str:
    """The smallest GPU that has ``peak`` bytes to spare, in words."""
    card = next((card for card in CARDS_GIB if peak <= (card - RESERVE_GIB) * (1 - FRAGMENTED) * GIB), None)
    return "no card has that much" if card is None else f"a card of {card} GB"


def step_maker(cfg: DictConfig) -> Callable[[IPAdapterModel], Callable[[Batch], object]]:
    def make(model: IPAdapterModel) -> Callable[[Batch], object]:
        if cfg.gradient_checkpointing:
            model.checkpoint_gradients()
        model.adapter.install()

        def step(batch: Batch) -> None:
            with torch.autocast(model.device.type, torch.bfloat16, enabled="mixed" in str(cfg.trainer.precision)):
                loss = model.errors(batch).loss
            loss.backward()

        return step

    return make


def size(number: float) -> str:
    """Bytes in words."""
    units = {"GiB": GIB, "MiB": 1 << 20, "KiB": 1 << 10}
    name = next((name for name, unit in units.items() if number >= unit), "KiB")
    return f"{number / units[name]:,.1f} {name}"
