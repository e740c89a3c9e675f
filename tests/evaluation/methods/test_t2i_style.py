from pathlib import Path

import pytest
import tiny
import tiny_prompt_tokens as parts
import torch

from ipa.evaluation.methods.method import count_parameters
from ipa.evaluation.methods.t2i_style import StyleAdapter, T2IStyle


def make_adapter() -> StyleAdapter:
    return StyleAdapter(parts.VISION_WIDTH, tiny.CONTEXT_WIDTH)


@pytest.fixture
def method() -> T2IStyle:
    return T2IStyle(tiny.make_family(), parts.make_image_encoder(), parts.loud(make_adapter()))


def test_it_keeps_what_every_method_promises(method: T2IStyle) -> None:
    parts.check_promises(method)
    parts.check_without_guidance(method)


def test_the_adapter_is_as_large_as_in_the_paper() -> None:
    with torch.device("meta"):
        adapter = StyleAdapter()
    assert count_parameters(adapter) == 38_587_392  # 39 M
    assert adapter(torch.zeros(2, 257, 1024, device="meta")).shape == (2, 8, 768)


def test_its_weights_have_the_published_names() -> None:
    layer = ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"]
    layer += [f"{part}.{kind}" for part in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")]
    names = {f"transformer_layes.{i}.{name}" for i in range(3) for name in layer}
    names |= {f"{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")}
    assert make_adapter().state_dict().keys() == names | {"style_embedding", "proj"}


def test_a_layer_is_that_of_clip() -> None:
    """transformers' CLIP layer with the same weights: pre-norm, QuickGELU, eight heads."""
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    width = 24
    config = CLIPVisionConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=8)
    theirs, ours = CLIPEncoderLayer(config).eval(), make_adapter().transformer_layes[0].eval()
    q, k, v = ours.attn.in_proj_weight.chunk(3)
    state = {f"self_attn.{name}_proj.weight": weight for name, weight in zip("qkv", (q, k, v), strict=True)}
    state |= {f"self_attn.{name}_proj.bias": torch.zeros(width) for name in "qkv"}
    for old, new in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
        state |= {f"{new}.{kind}": ours.state_dict()[f"{old}.{kind}"] for kind in ("weight", "bias")}
    for old, new in (("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
        state |= {f"{new}.{kind}": ours.state_dict()[f"{old}.{kind}"] for kind in ("weight", "bias")}
    theirs.load_state_dict(state)

    x_BPE = torch.randn(2, 5, width)
    result = theirs(x_BPE, attention_mask=None)
    torch.testing.assert_close(result[0] if isinstance(result, tuple) else result, ours(x_BPE))


def test_tokens_stand_behind_the_text_and_no_image_repeats_the_texts_end(method: T2IStyle) -> None:
    prompts = parts.make_prompts()
    positive, negative = method.states(prompts, scale=0.5)
    text, empty = method.text_states(prompts)

    assert torch.equal(positive[:, : tiny.TEXT_LENGTH], text)
    assert torch.equal(negative, torch.cat([empty, empty[:, -8:]], 1))
    doubled, _ = method.states(prompts, scale=1.0)
    torch.testing.assert_close(doubled[:, tiny.TEXT_LENGTH :], 2 * positive[:, tiny.TEXT_LENGTH :])


def test_it_reads_the_states_before_the_last_norm(method: T2IStyle) -> None:
    """Their class token, normed, is what the encoder pools."""
    image_B3HW = method.squares(parts.make_prompts())
    states, visual = method.hidden_states(image_B3HW), method.encoder.visual
    pooled = visual.visual_projection(visual.vision_model.post_layernorm(states[:, 0]))
    torch.testing.assert_close(pooled, method.encoder.encode(image_B3HW).pooled_BE)


def test_a_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(T2IStyle, "make_adapter", make_adapter)
    made, file = make_adapter(), tmp_path / "style.pth"
    torch.save(made.state_dict(), file)
    loaded = T2IStyle.load_adapter(str(file)).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in made.state_dict().items())
