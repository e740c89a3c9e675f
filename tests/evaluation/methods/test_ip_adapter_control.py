"""An adapter with a ControlNet: the adapter's pictures at weight 0, the text alone for the ControlNet."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_prompt_tokens as parts
import tiny_sdxl
import torch
from torch import Tensor

from ipa.evaluation.methods.edges import canny
from ipa.evaluation.methods.ip_adapter import IPAdapterMethod
from ipa.evaluation.methods.ip_adapter_control import IPAdapterControl
from ipa.sampling import SamplingOptions

FAMILIES = {"sd15": tiny.make_family, "sdxl": tiny_sdxl.make_family}
FAST = replace(parts.FAST, num_steps=1)


@functools.cache
def make_method(kind: str = "decoupled", family: str = "sd15") -> IPAdapterControl:
    model = tiny.shake(tiny.make_model(kind=kind, family=FAMILIES[family]()))
    model.adapter.install()
    return IPAdapterControl(model, parts.make_controlnet(model.family))


@pytest.mark.parametrize(("kind", "family"), [("decoupled", "sd15"), ("simple", "sdxl")])
def test_it_keeps_what_every_method_promises(kind: str, family: str) -> None:
    parts.check_promises(make_method(kind, family))


@pytest.mark.parametrize(
    ("kind", "family", "guidance"),
    [("decoupled", "sd15", 3.0), ("simple", "sd15", 1.0), ("simple", "sdxl", 3.0)],
)
def test_without_weight_the_adapter_is_alone(kind: str, family: str, guidance: float, monkeypatch: Any) -> None:
    method, prompts = make_method(kind, family), parts.make_prompts()
    sampling = SamplingOptions(num_steps=2, guidance=guidance, scale=0.7)
    alone = IPAdapterMethod(method.model).generate(prompts, sampling)

    assert parts.differs(method.generate(prompts, sampling), alone)
    monkeypatch.setattr(method, "control_weight", 0.0)
    torch.testing.assert_close(method.generate(prompts, sampling), alone, atol=1e-5, rtol=0)


def test_without_scale_the_structure_is_still_told() -> None:
    method, prompts = make_method(), parts.make_prompts()
    silent = replace(FAST, scale=0.0)
    pixels = method.generate(prompts, silent)

    assert parts.differs(pixels, method.generate(prompts, FAST))
    assert parts.differs(pixels, method.generate([parts.other_image(prompt) for prompt in prompts], silent))


@pytest.mark.parametrize("kind", ["decoupled", "simple"])
def test_the_controlnet_gets_the_text_alone(kind: str) -> None:
    method, heard, read = make_method(kind), [], []

    def note(into: list[Tensor]) -> Any:
        return lambda module, arguments, given: into.append(given["encoder_hidden_states"])

    watched = ((method.controlnet.down_blocks[0].attentions[0], heard), (method.model.family.unet, read))
    hooks = [module.register_forward_pre_hook(note(into), with_kwargs=True) for module, into in watched]
    method.generate(parts.make_prompts(), FAST)
    for hook in hooks:
        hook.remove()

    behind = {"decoupled": 0, "simple": method.model.head.num_tokens}[kind]
    assert [states.shape[1] for states in heard] == [tiny.TEXT_LENGTH] * len(heard)
    assert [states.shape[1] for states in read] == [tiny.TEXT_LENGTH + behind]
    assert not method.controlnet._forward_pre_hooks


def test_the_control_is_the_edges_of_the_middle_square() -> None:
    method, prompts = make_method(), parts.make_prompts()
    controls_B3HW = method.controls(prompts, 32)

    assert controls_B3HW.shape == (3, 3, 32, 32)
    assert set(controls_B3HW.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(method.controls(prompts, 16)[2, 0], canny(prompts[2].image_3HW))


def test_controlnets_of_another_kind_are_refused() -> None:
    model = tiny.make_model()
    with pytest.raises(ValueError, match=rf"method\.controlnet: its context is {tiny_sdxl.CONTEXT_WIDTH} wide"):
        IPAdapterControl(model, parts.make_controlnet(tiny_sdxl.make_family()))
    pooled = parts.make_controlnet(model.family, pooled=True)
    with pytest.raises(ValueError, match=r"it carries no structure: give one .*control_v11p_sd15_canny"):
        IPAdapterControl(model, pooled)


def test_files_are_read(adapter: Path, tmp_path: Path) -> None:
    alone = IPAdapterMethod.from_pretrained(str(adapter))
    made = parts.make_controlnet(alone.model.family)
    made.save_pretrained(tmp_path)
    method = IPAdapterControl.from_pretrained(str(adapter), controlnet=str(tmp_path), control_weight=0.0, edge_low=50)

    loaded = method.controlnet.state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in made.state_dict().items())
    assert method.trained == alone.trained and method.to("cpu") is method
    assert method.edges.keywords == {"low": 50, "high": 200.0}
    assert (method.source, method.control_weight) == (f"{adapter} with {tmp_path}", 0.0)
