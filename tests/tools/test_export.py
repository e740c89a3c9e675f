"""`python -m ipa.tools.export`: descriptions, and conversions between formats, data types and sources."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch

from ipa.export.published import to_published
from ipa.export.storage import load_adapter, save_adapter
from ipa.tools.export import main
from ipa.training import checkpointing

Export = Callable[..., str]
# the sizes that other readers assume
PUBLIC = {"width": 20, "heads": 1, "depth": 4, "head_width": 64, "expansion": 4}


@pytest.fixture
def export(told: Callable[..., str]) -> Export:
    return partial(told, main)


def write(path: Path, head: str = "global", **options: object) -> dict[str, torch.Tensor]:
    """An adapter file in fp32, with metadata; returns its tensors."""
    tiny.write_adapter(path, {"step": "7"}, head=head, **options)
    return load_adapter(path)[0]


def test_a_file_is_described(export: Export, tmp_path: Path) -> None:
    """Another no_image than diffusers takes with the call that agrees."""
    write(tmp_path / "a.safetensors", "fine_grained", no_image="zeros", **PUBLIC)

    said = export(adapter=tmp_path / "a.safetensors")

    assert "a fine-grained IP-Adapter" in said and "16 tokens" in said and f"width {tiny.PATCH_WIDTH}" in said
    assert "float32" in said and "step: 7" in said
    assert "readable by diffusers: yes" in said
    assert "tokens.no_image=zeros" in said and "ip_adapter_image_embeds=" in said
    assert "readable by comfyui: no, comfyui assumes" in said
    assert not list(tmp_path.glob("*.bin"))


def test_type_and_licence_are_written(export: Export, tmp_path: Path) -> None:
    tensors = write(tmp_path / "a.safetensors")
    for dtype in ("float16", "bfloat16", "float32"):
        export(adapter=tmp_path / "a.safetensors", out=tmp_path / "b.safetensors", dtype=dtype, licence="CC0-1.0")
        converted, metadata = load_adapter(tmp_path / "b.safetensors")
        assert all(torch.equal(converted[name], tensors[name].to(getattr(torch, dtype))) for name in tensors)
        assert {tensor.dtype for tensor in converted.values()} == {getattr(torch, dtype)}
        assert (metadata["licence"], metadata["step"]) == ("CC0-1.0", "7")


def write_checkpoint(path: Path, averaged: bool) -> dict[str, torch.Tensor]:
    """As saved by training, with average = raw + 1; returns the raw weights under published names."""
    model = tiny.shake(tiny.make_model())
    raw = model.trainable.state_dict()
    state = {f"trainable.{name}": value for name, value in raw.items()}
    if averaged:
        state |= {f"average.{name}": value + 1 for name, value in raw.items()} | {"average.count": torch.tensor(3)}
    checkpoint = {"state_dict": state, "adapter_metadata": {**model.describe(), "step": "3"}, "optimizer_states": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpointing.write_checkpoint(path, {"global_step": 3, **checkpoint})
    return to_published(raw, torch.float32)


@pytest.mark.parametrize("averaged", [True, False])
def test_a_training_checkpoint_is_exported(export: Export, tmp_path: Path, averaged: bool) -> None:
    raw = write_checkpoint(tmp_path / "run/checkpoints/step_3.ckpt", averaged)
    write(tmp_path / "run/adapter.safetensors", "fine_grained")  # the checkpoint takes precedence
    cases = {"run": {}, "run/checkpoints/step_3.ckpt": {"weights": "raw"}}
    if averaged:
        cases["run/checkpoints"] = {"adapter": tmp_path / "run", "weights": "average"}
    for source, options in cases.items():
        given = {"adapter": tmp_path / source, "out": tmp_path / "a.safetensors", "dtype": "float32"} | options
        said = export(**given)
        assert "readable by diffusers: once it is written" in said and "readable by ipa: yes" in said
        tensors, metadata = load_adapter(tmp_path / "a.safetensors")
        above = averaged and options.get("weights") != "raw"
        assert set(tensors) == set(raw) and all(torch.equal(tensors[name], raw[name] + above) for name in raw)
        assert metadata["step"] == "3" and metadata["base_family"] == "stable_diffusion"


def test_weights_are_chosen_where_there_are_two(export: Export, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step_3.ckpt", averaged=False)
    write(tmp_path / "adapter.safetensors")

    assert "step_3.ckpt kept no average" in export(adapter=tmp_path / "step_3.ckpt", weights="average")
    assert "a global IP-Adapter" in export(adapter=tmp_path)  # a run folder without checkpoints
    assert "adapter.safetensors holds one set of weights" in export(adapter=tmp_path, weights="raw")


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"no_image": "zeros", **PUBLIC}, "no_image=zeros"),
        ({"head_width": 16}, "head_width=16"),
        ({"kind": "simple", **PUBLIC}, "kind=simple"),
    ],
    ids=str,
)
def test_a_pickle_is_refused_when_the_metadata_is_needed(
    export: Export, tmp_path: Path, options: dict[str, object], cause: str
) -> None:
    """With the cause alone."""
    write(tmp_path / "a.safetensors", "fine_grained", **options)

    message = export(adapter=tmp_path / "a.safetensors", out=tmp_path / "a.bin", layout="ipa")

    assert f"would not assume {cause}: give out=….safetensors" in message
    assert not (tmp_path / "a.bin").exists()
    assert "wrote" in export(adapter=tmp_path / "a.safetensors", out=tmp_path / "b.safetensors", layout="ipa")
    name, value = cause.split("=")
    assert load_adapter(tmp_path / "b.safetensors")[1][name] == value


def test_numbers_too_large_for_the_type_are_not_written(export: Export, tmp_path: Path) -> None:
    tensors = write(tmp_path / "a.safetensors")
    tensors["image_proj.proj.bias"][0] = 1e6
    save_adapter(tmp_path / "a.safetensors", tensors, {})

    message = export(adapter=tmp_path / "a.safetensors", out=tmp_path / "b.safetensors", dtype="float16")

    assert "dtype=float16: " in message and "image_proj.proj.bias" in message
    assert not (tmp_path / "b.safetensors").exists()
    assert "wrote" in export(adapter=tmp_path / "a.safetensors", out=tmp_path / "b.safetensors", dtype="bfloat16")


def test_a_file_that_the_reader_would_misread_is_not_written(export: Export, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", "fine_grained", **{**PUBLIC, "depth": 2})
    write(tmp_path / "s.safetensors", kind="simple")

    for source, reason in (("a", "resampler.depth=4"), ("s", "no other program knows simple adapters")):
        message = export(adapter=tmp_path / f"{source}.safetensors", out=tmp_path / "out.safetensors")
        assert reason in message and "layout=ipa" in message
        assert not (tmp_path / "out.safetensors").exists()
        written = export(
            adapter=tmp_path / f"{source}.safetensors", out=tmp_path / f"{source}2.safetensors", layout="ipa"
        )
        assert f"wrote {tmp_path}/{source}2.safetensors" in written


def test_what_is_no_adapter_is_refused_in_one_line(export: Export, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "torn.ckpt").write_bytes(b"PK")
    for options, words in (
        ({"adapter": "nowhere.safetensors"}, "adapter=nowhere.safetensors: no such file"),
        ({"adapter": "a.bin", "out": "a.pth"}, "out=a.pth"),
        ({"adapter": tmp_path / "other.ckpt"}, "other.ckpt is not an IP-Adapter"),
        ({"adapter": tmp_path / "torn.ckpt"}, "torn.ckpt cannot be read"),
    ):
        message = export(**options)
        assert message.startswith("tool: ") and words in message and "\n" not in message
