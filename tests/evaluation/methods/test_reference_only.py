from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_prompt_tokens as parts
import torch
from torch import Tensor

from ipa.evaluation.methods.reference_only import ReferenceOnly, TwoPasses, self_attentions


def make_method(style_fidelity: float = 0.5) -> ReferenceOnly:
    family = tiny.make_family()
    for attention in self_attentions(family.unet):
        parts.loud(attention)
    return ReferenceOnly(family, style_fidelity=style_fidelity)


def make_inputs(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timestep and text for calls of the UNet."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, 8, 8, generator=generator)
    return latents, torch.tensor(500), torch.randn(rows, tiny.TEXT_LENGTH, tiny.CONTEXT_WIDTH, generator=generator)


def predict(unet: Any, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    with torch.no_grad():
        return unet(latents, timestep, encoder_hidden_states=text, return_dict=False)[0]


def predict_reading(unet: Any, reference: Tensor, style_fidelity: float = 0.5) -> Tensor:
    passes = TwoPasses(lambda timestep: reference, style_fidelity)
    with passes.installed(unet):
        return predict(unet, *make_inputs())


def test_it_keeps_what_every_method_promises(base_folder: Path) -> None:
    parts.check_promises(make_method())
    assert ReferenceOnly.from_pretrained(str(base_folder), style_fidelity=1, dtype="float32").source == str(base_folder)


def test_the_unet_is_restored_also_after_an_error() -> None:
    method = make_method()
    unet, inputs = method.family.unet, make_inputs()
    before, processors = predict(unet, *inputs), unet.attn_processors
    method.generate(parts.make_prompts(), parts.FAST)

    def refuse(timestep: Tensor) -> Tensor:
        raise InterruptedError

    with pytest.raises(InterruptedError), TwoPasses(refuse, 0.5).installed(unet):
        predict(unet, *inputs)
    assert unet.attn_processors.keys() == processors.keys()
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unet.modules())
    assert torch.equal(predict(unet, *inputs), before)


def test_a_reference_that_is_the_picture_itself_changes_nothing() -> None:
    """Attention to every place twice is attention to it once."""
    unet, inputs = make_method().family.unet, make_inputs()
    torch.testing.assert_close(predict_reading(unet, inputs[0]), predict(unet, *inputs))
    assert parts.differs(predict_reading(unet, -inputs[0]), predict(unet, *inputs))


def test_style_fidelity_keeps_the_unconditional_half_its_own() -> None:
    unet, inputs = make_method().family.unet, make_inputs()
    plain, reference = predict(unet, *inputs), inputs[0][:2].flip(0)
    weak, middle, strong = (predict_reading(unet, reference, fidelity) for fidelity in (0.0, 0.5, 1.0))

    torch.testing.assert_close(strong[:2], plain[:2])
    assert parts.differs(weak[:2], middle[:2]) and parts.differs(middle[:2], strong[:2])
    assert torch.equal(weak[2:], middle[2:]) and torch.equal(middle[2:], strong[2:])
    assert parts.differs(weak[2:], plain[2:])
    unguided = inputs[0].flip(0)  # as many rows as the images: none of them is unconditional
    assert torch.equal(predict_reading(unet, unguided, 0.0), predict_reading(unet, unguided, 1.0))
