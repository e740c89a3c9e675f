"""Image tokens after the text, of Uni-ControlNet and T2I's style adapter, and how their files are read."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_prompt_tokens as parts
import torch
from safetensors.torch import save_file
from torch import nn

from ipa.errors import MissingWeights, UserError
from ipa.evaluation.methods.method import Prompt
from ipa.evaluation.methods.prompt_tokens import cut_squares
from ipa.evaluation.methods.t2i_style import StyleAdapter, T2IStyle
from ipa.evaluation.methods.uni_controlnet import GlobalAdapter, UniControlNet
from ipa.evaluation.methods.weights import find_file, load_base, load_image_encoder, load_module
from ipa.weights import count_parameters

SYSTEMS = {
    UniControlNet: lambda: GlobalAdapter(tiny.CONTEXT_WIDTH),
    T2IStyle: lambda: StyleAdapter(parts.VISION_WIDTH, tiny.CONTEXT_WIDTH),
}
FIRST_BIAS = {UniControlNet: "global_adapter.ff1", T2IStyle: "ln_post"}


@pytest.fixture(params=SYSTEMS, ids=lambda system: system.name)
def method(request: pytest.FixtureRequest) -> Any:
    adapter = parts.loud(SYSTEMS[request.param]())
    return request.param(tiny.make_family(), parts.make_image_encoder(), adapter)


def test_they_keep_what_every_method_promises(method: Any) -> None:
    parts.check_promises(method)


@pytest.mark.parametrize(
    ("kind", "count", "shape", "num_tokens"),
    [(GlobalAdapter, 47_213_568, (2, 768), 4), (StyleAdapter, 38_587_392, (2, 257, 1024), 8)],
)
def test_they_are_as_large_as_in_the_paper(kind: Any, count: int, shape: tuple[int, ...], num_tokens: int) -> None:
    with torch.device("meta"):
        adapter = kind()
    assert count_parameters(adapter) == count
    assert adapter(torch.zeros(shape, device="meta")).shape == (2, num_tokens, 768)


def both(*names: str) -> set[str]:
    return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def test_their_weights_have_the_published_names() -> None:
    style = {"style_embedding", "proj", *both("ln_pre", "ln_post")}
    for layer in (f"transformer_layes.{i}" for i in range(3)):
        style |= {f"{layer}.attn.in_proj_weight", f"{layer}.attn.in_proj_bias"}
        style |= both(*(f"{layer}.{part}" for part in ("attn.out_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")))
    assert SYSTEMS[T2IStyle]().state_dict().keys() == style
    uni = both("norm1", "norm2", *(f"{ff}.net.{part}" for ff in ("ff1", "ff2") for part in ("0.proj", "2")))
    assert SYSTEMS[UniControlNet]().state_dict().keys() == uni


def test_a_layer_of_the_style_adapter_is_that_of_clip() -> None:
    """transformers' CLIP layer with the same weights: pre-norm, QuickGELU, eight heads."""
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    width = parts.VISION_WIDTH
    config = CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=8)
    theirs, ours = CLIPEncoderLayer(config).eval(), SYSTEMS[T2IStyle]().transformer_layes[0].eval()
    q, k, v = ours.attn.in_proj_weight.chunk(3)
    state = {f"self_attn.{name}_proj.weight": weight for name, weight in zip("qkv", (q, k, v), strict=True)}
    state |= {f"self_attn.{name}_proj.bias": torch.zeros(width) for name in "qkv"}
    pairs = {"attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for old, new in {**pairs, "ln_1": "layer_norm1", "ln_2": "layer_norm2"}.items():
        state |= {f"{new}.{kind}": ours.state_dict()[f"{old}.{kind}"] for kind in ("weight", "bias")}
    theirs.load_state_dict(state)

    x_BPE = torch.randn(2, 5, width)
    result = theirs(x_BPE, attention_mask=None)
    torch.testing.assert_close(result[0] if isinstance(result, tuple) else result, ours(x_BPE))


def test_tokens_stand_behind_the_text(method: Any) -> None:
    """ "No image" is the adapter of a zero embedding, or repeats the text's end; λ weights the tokens."""
    prompts = parts.make_prompts()
    positive, negative = method.states(prompts, scale=0.5)
    text, empty = method.text_states(prompts)

    assert torch.equal(positive[:, : tiny.TEXT_LENGTH], text) and torch.equal(negative[:, : tiny.TEXT_LENGTH], empty)
    no_image = empty[:, -8:]
    if isinstance(method, UniControlNet):
        no_image = 0.5 * method.adapter(torch.zeros(1, tiny.CONTEXT_WIDTH)).expand(3, -1, -1)
    torch.testing.assert_close(negative[:, tiny.TEXT_LENGTH :], no_image)
    doubled, _ = method.states(prompts, scale=1.0)
    torch.testing.assert_close(doubled[:, tiny.TEXT_LENGTH :], 2 * positive[:, tiny.TEXT_LENGTH :])


def test_the_style_adapter_reads_the_states_before_the_last_norm() -> None:
    """Their class token, normed, is what the encoder pools."""
    method = T2IStyle(tiny.make_family(), parts.make_image_encoder(), SYSTEMS[T2IStyle]())
    image_B3HW = method.squares(parts.make_prompts())
    states, visual = method.hidden_states(image_B3HW), method.encoder.visual
    pooled = visual.visual_projection(visual.vision_model.post_layernorm(states[:, 0]))
    torch.testing.assert_close(pooled, method.encoder.encode(image_B3HW).pooled_BE)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a tiny Uni-ControlNet, which also has local adapters."""
    monkeypatch.setattr(UniControlNet, "make_adapter", SYSTEMS[UniControlNet])
    state = {f"global_adapter.{name}": weight for name, weight in SYSTEMS[UniControlNet]().state_dict().items()}
    torch.save({**state, "local_adapter.other.weight": torch.zeros(2)}, tmp_path / "uni.ckpt")
    return tmp_path / "uni.ckpt"


@pytest.mark.parametrize("kind", ["lightning", "plain", "old", "safetensors"])
def test_a_checkpoint_is_read_in_every_form(kind: str, file: Path) -> None:
    state = torch.load(file)
    if kind == "safetensors":
        file = file.with_suffix(".safetensors")
        save_file(state, file)
    else:
        content = {"state_dict": state} if kind == "lightning" else state
        torch.save(content, file, _use_new_zipfile_serialization=kind != "old")

    loaded = UniControlNet.load_adapter(str(file)).state_dict()
    assert loaded.keys() == SYSTEMS[UniControlNet]().state_dict().keys()
    assert all(torch.equal(weight, state[f"global_adapter.{name}"]) for name, weight in loaded.items())


def test_folders_are_read(file: Path, base_folder: Path, tmp_path: Path) -> None:
    given = {"adapter": str(file), "base": "owner/base", "image_encoder": "owner/clip"}
    told = parts.check_missing(UniControlNet.from_pretrained, "base", **given)
    assert "hf download owner/base --local-dir FOLDER" in told
    given["base"] = str(base_folder)
    told = parts.check_missing(UniControlNet.from_pretrained, "image_encoder", **given)
    assert "hf download owner/clip" in told

    given["image_encoder"] = str(tmp_path / "encoder")
    parts.make_vision().save_pretrained(tmp_path / "encoder")
    method = UniControlNet.from_pretrained(**given, dtype="float32")
    assert method.trained == count_parameters(SYSTEMS[UniControlNet]()) and method.source == f"{file} on {base_folder}"
    assert method.generate(parts.make_prompts(), parts.FAST).isfinite().all()


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_file_of_something_else_is_named(system: Any, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "make_adapter", SYSTEMS[system])
    torch.save({"model.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match=rf"method\.adapter=.*is not a .*{FIRST_BIAS[system]}.* is missing"):
        system.load_adapter(str(file))
    file.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"method\.adapter=.*uni\.ckpt is not a "):
        system.load_adapter(str(file))


def test_pictures_of_all_sizes_are_cut_to_squares() -> None:
    black, white = torch.zeros(3, 20, 50, dtype=torch.uint8), torch.full((3, 9, 7), 255, dtype=torch.uint8)
    black[:, :, :10] = black[:, :, -10:] = 255  # cut off with the sides
    image_B3HW = cut_squares([Prompt(black, "", 0), Prompt(white, "", 0)], 8)
    assert image_B3HW.shape == (2, 3, 8, 8)
    torch.testing.assert_close(image_B3HW.mean((1, 2, 3)), torch.tensor([-1.0, 1.0]))


def test_a_file_that_is_not_there_is_not_asked_of_the_hub() -> None:
    for path in ("nowhere.ckpt", "owner/name", "./a/b/c.ckpt", "/no/such/file.ckpt", "~/a/b.ckpt"):
        with pytest.raises(MissingWeights, match=rf"^method\.adapter={path}: no such file\. Give a file"):
            find_file(path, "method.adapter")


def test_wrong_folders_and_precisions_are_told_with_our_key(base_folder: Path, tmp_path: Path) -> None:
    for load in (load_base, load_image_encoder):
        for path in (str(tmp_path), "/no/such/folder"):
            with pytest.raises(MissingWeights, match=rf"^method\.\w+={path}\b.*give method") as caught:
                load(path, "float32")
            assert "base.path" not in str(caught.value) and "encoder.path" not in str(caught.value)
        with pytest.raises(UserError, match=r"^method\.dtype=float12: "):
            load(str(base_folder), "float12")


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """In the format of now and in that of old."""
    file, trace = tmp_path / "wicked.pth", tmp_path / "trace"
    for old in (False, True):
        torch.save({"weight": tiny.Harmful(trace)}, file, _use_new_zipfile_serialization=not old)
        with pytest.raises(UserError, match=r"^method\.adapter=.*wicked\.pth is not a line"):
            load_module(lambda: nn.Linear(1, 1), str(file), "a line")
    assert not trace.exists()
