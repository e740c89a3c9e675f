"""What cannot work is refused in words, and before the weights of base and encoder are read where that is possible."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flow
import tiny_sdxl
import torch
from conftest import Run, World, picture, write_shard

from ipa.cli import explain_failure
from ipa.export.published import to_published, with_metadata
from ipa.export.storage import save_adapter

FLOW = "data.background=null sampling.guidance_rescale=0"
FLUX = f"base=flux_dev base.path=PLACE/flux {FLOW} tokens.no_image=black"
TIMED = "base=sd35_medium base.path=PLACE/sd35 experiment=decoupled_time_aware base.time_width=9 adapter.layout=ipa"
TUNED = "experiment=finetune adapter.init_from=PLACE/fits.safetensors heldout_check.every_n_steps=2"
PAIR = "trainer.accelerator=cpu trainer.devices=2 trainer.precision=32-true"
MISSING = r"base\.path=PLACE/\w+: the files of its \w+ are missing"  # so the others are refused before
MULTIPLE = "data.batch_size=null global_batch_size=32 trainer.accumulate_grad_batches=3"
# options → words of the message, in this order, although no weight of base or encoder can be read
BEFORE_WEIGHTS = {
    "": MISSING,
    "tokens.num_tokens=3": r"tokens\.num_tokens=4.*adapter\.layout=ipa",
    "tokens.no_image=foo": r"tokens\.no_image=foo.*blank, zeros",
    "experiment=simple_global adapter.layout=diffusers": r"adapter\.layout=ipa",
    "base=sdxl base.path=PLACE/base": r"PLACE/base.*base=sd15",
    "base.path=PLACE/sdxl": r"PLACE/sdxl.*base=sdxl",
    "preview.images=PLACE/empty": r"preview\.images=PLACE/empty",
    "trainer.precision=abc": r"Precision 'abc' is invalid.*bf16-mixed",
    "data.schemes=5": r"data\.schemes=5: give a list of file",
    "scale_lr=cubic": r"scale_lr=cubic.*linear or sqrt",
    MULTIPLE: r"global_batch_size=32.*accumulate_grad_batches=3.*a multiple of 3.*data\.batch_size",
    f"compile=true trainer=fsdp {PAIR}": r"compile=true.*trainer=fsdp",
    f"compile=true trainer=zero2 {PAIR}": r"compile=true.*zero2",
    "callbacks.export.dtype=int8": r"callbacks\.export\.dtype=int8: give float32",
    # an adapter to start from
    "adapter.init_from=PLACE/fits.safetensors": MISSING,
    "adapter.init_from=PLACE/no.safetensors": r"PLACE/no\.safetensors",
    "adapter.init_from=PLACE/wide.safetensors": r"embedding of width 12.*adapter reads 1024.*OpenCLIP ViT-H/14",
    "adapter.init_from=PLACE/xl.safetensors": r"\(28 layers, context width 28\).*11 layers of context width 16",
    "adapter.init_from=PLACE/simple.safetensors": r"it is simple and global, the training decoupled and global",
    "adapter.init_from=PLACE/fine.safetensors": r"it is decoupled and fine-grained, the training decoupled and gl",
    # fine-tuning
    "experiment=finetune": r"starts from an adapter: give adapter\.init_from=FILE",
    "adapter.freeze=encoder": r"adapter\.freeze=encoder, of a decoupled adapter: head, branches, or null",
    "adapter.freeze=head experiment=simple_global": r"of a simple adapter: it has nothing but a head",
    "experiment=simple_global data.references.chances=[1,1] ++data.reference=[a.jpg,b.jpg]": (
        r"data\.references\.chances=\[1, 1\].*a simple adapter"
    ),
    # optimizers
    "optimizer=schedule_free ema.decay=0.9": r"ema\.decay=0\.9.*give ema\.decay=null",
    "optimizer=schedule_free schedule=cosine": r"schedule\.name=cosine.*schedule=constant",
    "optimizer=prodigy optimizer.lr=0.003": r"optimizer\.lr=0\.003: Prodigy .*optimizer\.lr=1",
    "optimizer=muon trainer.strategy.kind=fsdp": r"trainer\.strategy\.kind=fsdp .*optimizer=adamw",
    # transformers
    FLUX: MISSING,
    f"{FLUX} image_size_px=18": r"image_size_px=18: the base .* multiples of 4 px",
    f"{FLUX} tokens.num_tokens=8": r"diffusers assumes tokens\.num_tokens=4, it is 8.*adapter\.layout=ipa",
    f"{FLUX} experiment=decoupled_fine_grained": r"no other program knows this head for FLUX",
    f"{FLUX} base.hosts=all": r"no other program knows this head for FLUX.1, all blocks",
    f"{FLUX} base.quantization=int3": r"base\.quantization=int3: give fp8, int8, nf4, or null",
    f"{FLUX} base.times.timesteps=odd": r"base\.times\.timesteps=odd",
    f"{FLUX} experiment=decoupled_time_aware adapter.layout=ipa": r"tokens: the tokens of TimeResamplerHead are for",
    f"{FLUX} experiment=simple_global scale_warmup_steps=9": r"scale_warmup_steps=9: a simple adapter",
    f"{FLUX} min_snr_gamma=5": r"min_snr_gamma=5: FLUX.1 has no such loss weighting",
    f"{FLUX} sampling.guidance_rescale=0.7": r"guidance_rescale=0\.7: the pipelines of FLUX\.1 have none",
    TIMED: r"base\.time_width=9: ",
    f"{FLUX} base.transformer_file=PLACE/x.gguf trainer=fsdp {PAIR}": r"base\.transformer_file=PLACE/x\.gguf",
}
if not torch.accelerator.is_available():
    BEFORE_WEIGHTS["recipe=sd15 base.path=not/asked trainer.devices=1"] = r"torch finds no GPU"
REFUSED = {
    "data.train=PLACE/nowhere": r"no such shard: 'PLACE/nowhere'.*Give a folder",
    "data.val=PLACE/no.tar": r"no such shard: 'PLACE/no\.tar'",
    "data.train=PLACE/captionless data.num_workers=1": r"no usable sample.*2 × no caption.*data\.captions",
    "data.val=PLACE/captionless": r"no usable sample.*2 × no caption",
    "base.path=PLACE/nowhere": r"base\.path=PLACE/nowhere",
    "encoder.name=local-dir:PLACE/nowhere": r"encoder\.name=local-dir:PLACE/nowhere.*open_clip_config\.json",
    "judge.name=local-dir:PLACE/nowhere": r"local-dir:PLACE/nowhere.*open_clip_config\.json",
    "data.drops.text=2": r"data\.drops\.text=2.*at most 1",
    f"{TUNED} data.val=null": r"give data\.val=SHARDS",
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory, world: World) -> Path:
    """Bases and an encoder with their configuration files alone, adapters that fit them or not, and bad shards."""
    place = tmp_path_factory.mktemp("bare")
    (place / "empty").mkdir()
    tiny_sdxl.make_family().pipeline().save_pretrained(place / "sdxl")
    tiny_flow.save(tiny_flow.make_flux(), place / "flux")
    tiny_flow.save(tiny_flow.make_sd35_medium(), place / "sd35")
    shutil.copytree(world.base, place / "base")
    shutil.copytree(world.encoder.removeprefix("local-dir:"), place / "encoder")
    for path in place.rglob("*.safetensors"):
        path.unlink()
    save_donor(place / "fits.safetensors")
    save_donor(place / "wide.safetensors", width=1024)
    save_donor(place / "xl.safetensors", family=tiny_sdxl.make_family())
    save_donor(place / "simple.safetensors", kind="simple")
    save_donor(place / "fine.safetensors", head="fine_grained")
    write_shard(place / "captionless/00000.tar", [("a.png", picture(0)), ("b.png", picture(1))])
    return place


def save_donor(path: Path, width: int = tiny.POOLED_WIDTH, **options: Any) -> None:
    """The file of a fresh adapter, for a pooled embedding of this width."""
    tensors = to_published(tiny.make_model(**options).trainable.state_dict())
    if width != tiny.POOLED_WIDTH:
        tensors["image_proj.proj.weight"] = torch.zeros(4 * tiny.CONTEXT_WIDTH, width)
    save_adapter(path, tensors, with_metadata(tensors, {"kind": options.get("kind", "")}))


def message_of(train_in: Run, folder: Path, overrides: str, place: Path) -> str:
    """What the command prints before it exits with 1, also for errors of data workers; no message is a traceback."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the words are looked at by the caller
        train_in(folder, *overrides.replace("PLACE", str(place)).split())
    message = explain_failure(caught.value, str(place))
    assert message is not None and "Traceback" not in message, caught.value
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) in ([], ["config.yaml"])
    return message.replace(str(place), "PLACE")


@pytest.mark.parametrize("overrides", BEFORE_WEIGHTS)
def test_what_cannot_work_is_refused_before_weights_are_read(
    train_in: Run, tmp_path: Path, bare: Path, overrides: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipa.training.optimizers.find_spec", lambda package: True)
    parts = "base.path=PLACE/base encoder.name=local-dir:PLACE/encoder"
    message = message_of(train_in, tmp_path / "x", f"{parts} {overrides}", bare)

    assert re.search(BEFORE_WEIGHTS[overrides], message, re.DOTALL), message


@pytest.mark.parametrize("overrides", REFUSED)
def test_bad_input_is_refused_in_words(train_in: Run, tmp_path: Path, bare: Path, overrides: str) -> None:
    message = message_of(train_in, tmp_path / "x", overrides, bare)

    assert re.search(REFUSED[overrides], message, re.DOTALL), message
