from pathlib import Path

import pytest
import tiny
import tiny_prompt_tokens as parts
import torch
from safetensors.torch import save_file

from ipa.evaluation.methods.method import count_parameters
from ipa.evaluation.methods.uni_controlnet import GlobalAdapter, UniControlNet


@pytest.fixture
def tiny_adapter(monkeypatch: pytest.MonkeyPatch) -> GlobalAdapter:
    monkeypatch.setattr(UniControlNet, "make_adapter", lambda: GlobalAdapter(tiny.CONTEXT_WIDTH))
    return GlobalAdapter(tiny.CONTEXT_WIDTH)


@pytest.fixture
def method() -> UniControlNet:
    adapter = parts.loud(GlobalAdapter(tiny.CONTEXT_WIDTH))
    return UniControlNet(tiny.make_family(), parts.make_image_encoder(), adapter)


def test_it_keeps_what_every_method_promises(method: UniControlNet) -> None:
    parts.check_promises(method)
    parts.check_without_guidance(method)


def test_the_adapter_is_as_large_as_in_the_paper() -> None:
    with torch.device("meta"):
        adapter = GlobalAdapter()
    assert count_parameters(adapter) == 47_213_568  # 47 M
    assert adapter(torch.zeros(2, 768, device="meta")).shape == (2, 4, 768)


def test_its_weights_have_the_published_names() -> None:
    shapes = {name: tuple(weight.shape) for name, weight in GlobalAdapter(8).state_dict().items()}
    assert shapes == {
        "norm1.weight": (8,),
        "norm1.bias": (8,),
        "ff1.net.0.proj.weight": (64, 8),
        "ff1.net.0.proj.bias": (64,),
        "ff1.net.2.weight": (16, 32),
        "ff1.net.2.bias": (16,),
        "norm2.weight": (16,),
        "norm2.bias": (16,),
        "ff2.net.0.proj.weight": (128, 16),
        "ff2.net.0.proj.bias": (128,),
        "ff2.net.2.weight": (32, 64),
        "ff2.net.2.bias": (32,),
    }


def test_tokens_stand_behind_the_text_and_no_image_is_a_zero_embedding(method: UniControlNet) -> None:
    prompts = parts.make_prompts()
    positive, negative = method.states(prompts, scale=0.5)
    text, empty = method.text_states(prompts)

    assert torch.equal(positive[:, : tiny.TEXT_LENGTH], text) and torch.equal(negative[:, : tiny.TEXT_LENGTH], empty)
    zeros = method.adapter(torch.zeros(1, tiny.CONTEXT_WIDTH))
    torch.testing.assert_close(negative[:, tiny.TEXT_LENGTH :], 0.5 * zeros.expand(3, -1, -1))
    assert positive.shape == negative.shape == (3, tiny.TEXT_LENGTH + 4, tiny.CONTEXT_WIDTH)


@pytest.mark.parametrize("kind", ["lightning", "plain", "old", "safetensors"])
def test_a_checkpoint_is_read_in_every_form(kind: str, tiny_adapter: GlobalAdapter, tmp_path: Path) -> None:
    made = tiny_adapter
    state = {f"global_adapter.{name}": weight for name, weight in made.state_dict().items()}
    state["local_adapter.other.weight"] = torch.zeros(2)
    file = tmp_path / ("uni.safetensors" if kind == "safetensors" else "uni.ckpt")
    if kind == "safetensors":
        save_file(state, file)
    else:
        content = {"state_dict": state} if kind == "lightning" else state
        torch.save(content, file, _use_new_zipfile_serialization=kind != "old")

    loaded = UniControlNet.load_adapter(str(file)).state_dict()
    assert loaded.keys() == made.state_dict().keys()
    assert all(torch.equal(weight, loaded[name]) for name, weight in made.state_dict().items())


def test_folders_are_read(tiny_adapter: GlobalAdapter, base_folder: Path, tmp_path: Path) -> None:
    made, encoder, file = tiny_adapter, tmp_path / "encoder", tmp_path / "uni.ckpt"
    torch.save({f"global_adapter.{name}": weight for name, weight in made.state_dict().items()}, file)
    parts.make_vision().save_pretrained(encoder)
    method = UniControlNet.from_pretrained(str(base_folder), str(encoder), str(file), dtype="float32")
    assert method.trained == count_parameters(made) and method.source == f"{file} on {base_folder}"
    parts.check_without_guidance(method)


def test_missing_weights_are_told(
    tiny_adapter: GlobalAdapter, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "uni.ckpt"
    torch.save({f"global_adapter.{k}": v for k, v in tiny_adapter.state_dict().items()}, file)
    given = {"adapter": str(file), "base": "owner/base", "image_encoder": "owner/clip"}
    told = parts.check_missing(UniControlNet.from_pretrained, "base", monkeypatch, **given)
    assert "hf download owner/base --local-dir FOLDER" in told
    given["base"] = str(base_folder)
    told = parts.check_missing(UniControlNet.from_pretrained, "image_encoder", monkeypatch, **given)
    assert "hf download owner/clip" in told


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    file = tmp_path / "other.ckpt"
    torch.save({"model.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"method\.adapter=.*is not a Uni-ControlNet: global_adapter.ff1"):
        UniControlNet.from_pretrained("base", "encoder", str(file))
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"method\.adapter=.*other\.ckpt is not a Uni"):
        UniControlNet.from_pretrained("base", "encoder", str(file))
