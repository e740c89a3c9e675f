"""A base of another kind goes through the unchanged rooms: the toy transformer of ``toy_family``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Run, assert_same_run, checkpoint, rewound
from toy_family import CONTEXT, TimeHead, ToyFamily, installed

from ipa.adapter.kinds import DecoupledAdapter, SimpleAdapter
from ipa.errors import UserError
from ipa.export.loading import load_model
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, generate


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Overrides that put the toy family and its head into the tiny world."""
    with installed(tmp_path_factory.mktemp("toy")) as overrides:
        yield overrides


def make_toy(kind: Any = DecoupledAdapter, **options: Any) -> IPAdapterModel:
    encoder, family = tiny.make_encoder(), ToyFamily("toy")
    return IPAdapterModel(family, encoder, TimeHead.fitting(encoder.widths, CONTEXT), kind(family.hosts()), **options)


def test_it_trains_resumes_to_the_bit_and_writes_previews_and_adapter(
    train_in: Run, toy: list[str], tmp_path: Path
) -> None:
    whole = train_in(tmp_path / "whole", *toy, "optimizer.lr=0.01")
    assert_same_run(train_in(rewound(whole, tmp_path / "x"), *toy, "optimizer.lr=0.01"), whole)
    saved = checkpoint(whole)["state_dict"]

    assert any("time.weight" in name for name in saved)
    assert sorted(path.name for path in (whole / "previews").iterdir()) == ["step_000002.png", "step_000004.png"]
    model = load_model(whole / "adapter.safetensors")
    assert (type(model.family), type(model.head)) == (ToyFamily, TimeHead)
    for name, value in model.trainable.state_dict().items():
        assert torch.equal(value, saved[f"trainable.{name}"].half().float())


def test_guidance_in_two_calls_gives_each_its_own_tokens_at_every_step() -> None:
    model = tiny.shake(make_toy())
    model.adapter.install()
    features = model.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX))
    options = SamplingOptions(num_steps=3, guidance=4.0)
    together = generate(model, features, ["cat", "dog"], [1, 2], options)
    latents = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2)])
    texts = [model.family.encode_text(each) for each in (["cat", "dog"], ["", ""])]
    with torch.no_grad():
        for sigma, after in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
            t_B = torch.tensor([sigma] * 2)
            images = features, model.no_image(2)
            positive, negative = (
                model.predict(latents, t_B, text, model.image_tokens(image, t_B=t_B), 1.0)
                for text, image in zip(texts, images, strict=True)
            )
            latents = latents + (after - sigma) * (negative + 4 * (positive - negative))
        expected = model.family.decode_latents(latents)

    assert torch.allclose(together, expected, atol=1e-5)
    assert not torch.allclose(
        together, generate(model, features, ["cat", "dog"], [1, 2], options.with_scale(0.0)), atol=1e-3
    )


def test_a_fresh_adapter_and_scale_zero_leave_the_base_as_it_is() -> None:
    model = make_toy()
    noisy, t_B = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    text, features = (
        model.family.encode_text(["a", "b"]),
        model.encode_reference(tiny.make_pictures(2, tiny.REFERENCE_PX)),
    )
    tokens = model.image_tokens(features, t_B=t_B)
    base = model.predict(noisy, t_B, text, None, 1.0)
    model.adapter.install()
    assert torch.equal(model.predict(noisy, t_B, text, tokens, 1.0), base)
    tiny.shake(model)
    tokens = model.image_tokens(features, t_B=t_B)
    assert torch.equal(model.predict(noisy, t_B, text, tokens, 0.0), base)
    assert not torch.equal(model.predict(noisy, t_B, text, tokens, 1.0), base)
    model.adapter.remove()
    assert torch.equal(model.predict(noisy, t_B, text, tokens, 1.0), base)


def test_what_a_family_does_not_have_is_refused_by_the_option() -> None:
    model = make_toy()
    features = model.encode_reference(tiny.make_pictures(1, tiny.REFERENCE_PX))

    with pytest.raises(UserError, match=r"image_size_px=18: .* multiples of 4"):
        generate(model, features, [""], [0], SamplingOptions(num_steps=1, image_size_px=18))
    with pytest.raises(UserError, match="min_snr_gamma=5"):
        make_toy(min_snr_gamma=5.0)
    with pytest.raises(UserError, match=r"TimeHead depends on the time.*kind=simple"):
        make_toy(SimpleAdapter)
