"""The gradients of a training step are those of diffusers' own adapter modules in a step that is written out.

And a tiny transformer learns by them to tell two images by their prompts alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flow
import torch
from torch import Tensor

from ipa.export.published import to_published, write_adapter
from ipa.families.flux import image_ids
from ipa.training.monitors import compare_images
from ipa.types import Posterior, to_unit_range

NAME = "adapter.safetensors"
FLUX_NAMES = {"proj": "image_embeds", "norm": "norm"}


def stock_gradients(transformer: Any, branches: str) -> dict[str, Tensor]:
    """By canonical names; of heads only the first and the last layer."""
    found = {}
    for index, processor in enumerate(
        each for each in transformer.attn_processors.values() if hasattr(each, "to_k_ip")
    ):
        for name, parameter in processor.named_parameters():
            found[f"ip_adapter.{index}.{name.replace('_ip.0.', '_ip.')}"] = parameter.grad
    if branches == "sd3":
        head, layers = transformer.image_proj, ("proj_in", "proj_out", "norm_out", "time_embedding.linear_1")
        names = {f"{layer}.{part}": f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    else:
        head = transformer.encoder_hid_proj.image_projection_layers[0]
        names = {
            f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in FLUX_NAMES.items() for part in ("weight", "bias")
        }
    parameters = dict(head.named_parameters())
    return found | {f"image_proj.{ours}": parameters[theirs].grad for ours, theirs in names.items()}


def stock_error(family: Any, transformer: Any, corrupted: Any, text: Any, features: Any) -> Tensor:
    """Mean squared error of the velocity, weighed: diffusers' forward pass."""
    common = {"timestep": corrupted.time_B, "encoder_hidden_states": text.states_BLD}
    if family.branches == "sd3":
        kwargs = {"ip_adapter_image_embeds": features.patches_BPF.double()}
        prediction = transformer(
            corrupted.noisy, pooled_projections=text.pooled_BE, joint_attention_kwargs=kwargs, **common
        ).sample
    else:
        packed = family.pack(corrupted.noisy)
        velocity = transformer(
            packed,
            img_ids=image_ids(4, 4).double(),
            txt_ids=torch.zeros(text.states_BLD.shape[1], 3),
            joint_attention_kwargs={"ip_adapter_image_embeds": [features.pooled_BE.double()[:, None]]},
            **family.conditions(text, packed),
            **common,
        ).sample
        prediction = family.unpack(velocity, tuple(corrupted.noisy.shape[1:]))
    error_B = (prediction - corrupted.target).square().flatten(1).mean(1)
    return (corrupted.weight_B * error_B).mean()


@pytest.mark.parametrize("name", tiny_flow.MAKERS)
def test_gradients_are_those_of_a_written_out_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = tiny_flow.MAKERS[name]
    model = tiny.shake(tiny_flow.make_model(make))
    branches = model.family.branches
    write_adapter(
        tmp_path / NAME, to_published(model.trainable.state_dict(), torch.float32, branches), model.describe()
    )
    stock: Any = make().pipeline()
    option = "image_encoder_folder" if branches == "sd3" else "image_encoder_pretrained_model_name_or_path"
    stock.load_ip_adapter(str(tmp_path), subfolder="", weight_name=NAME, **{option: None})
    stock.set_ip_adapter_scale(1.0)
    transformer = stock.transformer.double().requires_grad_(True)
    for part in (model.trainable, model.family):
        part.double()
    # both errors in float64, where the training has float32
    monkeypatch.setattr("ipa.objective.squared_error", lambda x, y: (x - y).square().flatten(1).mean(1))

    batch = tiny.make_batch()
    family, draws = model.family, batch.draws.map(lambda x: x.double() if x.is_floating_point() else x)
    batch.draws = draws
    monkeypatch.setattr(model, "posterior_of", lambda batch: posterior)
    posterior = family.encode_pixels(to_unit_range(batch.image_B3HW))
    model.adapter.install()
    model.errors(batch).loss.backward()
    ours = to_published({key: p.grad for key, p in model.trainable.named_parameters()}, torch.float64, branches)

    x0 = posterior.sample(draws.posterior_noise_BCHW)
    corrupted = family.corrupt(x0, draws.noise_BCHW, draws.time_B)
    features, text = model.encode_reference(batch.reference_B3HW), family.encode_text(batch.text)
    stock_error(family, transformer, corrupted, text, features).backward()
    theirs = stock_gradients(transformer, branches)

    assert len(theirs) > 8 and theirs.keys() <= ours.keys()
    for key, expected in theirs.items():
        size = float(expected.abs().max())
        if key.endswith("to_k_ip.bias"):  # the same number added to all keys changes no softmax
            assert max(size, float(ours[key].abs().max())) < 1e-9
        else:
            assert size > 1e-6, key
            torch.testing.assert_close(ours[key], expected, rtol=1e-6, atol=1e-6 * size, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lr"), [("flux", 0.01), ("chroma", 0.01), ("sd35_medium", 0.003)])
def test_one_batch_is_overfitted_by_the_right_images(name: str, lr: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, noise and time are the same, and nearly all is noise: only the reference says which target it is.

    First both errors fall alike, as the adapter learns what the targets have in common; then they part. With 0.01
    some draws of Stable Diffusion 3 do not part in 400 steps.
    """
    model, batch = tiny_flow.make_model(tiny_flow.MAKERS[name]), tiny.make_batch(2)
    batch.text = ["cat", "cat"]
    batch.reference_B3HW[0], batch.reference_B3HW[1] = 0, 255
    batch.draws.noise_BCHW[1] = batch.draws.noise_BCHW[0]
    batch.draws.time_B[:] = 0.999
    latents = torch.randn(batch.draws.noise_BCHW.shape, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(model, "posterior_of", lambda batch: Posterior(latents, torch.full_like(latents, -20.0)))
    model.adapter.install()
    optimizer = torch.optim.AdamW(model.trainable.parameters(), lr=lr)
    start, other = compare_images(model, batch)
    assert other == pytest.approx(start, rel=0.01)

    for _ in range(250):
        model.errors(batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    own, other = compare_images(model, batch)
    assert own < start / 5 and other > 1.2 * own
