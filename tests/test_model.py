"""The training step against one written out from the equations, and what it may touch."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ipa.model import IPAdapterModel
from ipa.types import Batch, Features


class PlainDecoupledAttention:
    """Equation 5 as a diffusers processor, softmax written out."""

    def __init__(self, key_weight: Tensor, value_weight: Tensor, tokens_BTD: Tensor) -> None:
        self.key_weight, self.value_weight, self.tokens_BTD = key_weight, value_weight, tokens_BTD

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        pairs = [
            (attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)),
            (self.tokens_BTD @ self.key_weight.T, self.tokens_BTD @ self.value_weight.T),
        ]
        attended = [
            torch.softmax(query @ attn.head_to_batch_dim(key).mT * attn.scale, dim=-1) @ attn.head_to_batch_dim(value)
            for key, value in pairs
        ]
        return attn.to_out[0](attn.batch_to_head_dim(attended[0] + attended[1]))


def plain_losses(model: IPAdapterModel, batch: Batch, texts: list[str], embedding_BE: Tensor, zero_snr: bool) -> Tensor:
    """A training step from public parts: the family's networks, diffusers' scheduler, the adapter's raw weights."""
    family, head, draws = model.family, model.head, batch.draws
    kind = family.scheduler.config.prediction_type
    schedule = DDPMScheduler(**tiny.SCHEDULE, rescale_betas_zero_snr=zero_snr, prediction_type=kind)
    pixels = batch.image_B3HW.float() / 127.5 - 1
    posterior = family.vae.encode(pixels).latent_dist
    x0 = (posterior.mean + posterior.std * draws.posterior_noise_BCHW) * family.vae.config.scaling_factor
    t_B = (draws.time_B * 1000).long()
    noisy = schedule.add_noise(x0, draws.noise_BCHW, t_B)
    ids = family.tokenizer(
        texts, padding="max_length", max_length=tiny.TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    tokens = F.layer_norm(head.proj(embedding_BE).view(len(t_B), -1, tiny.CONTEXT_WIDTH), (tiny.CONTEXT_WIDTH,))
    tokens = tokens * head.norm.weight + head.norm.bias

    unet = copy.deepcopy(family.unet)
    branches = iter(model.adapter.branches)
    plain = {
        name: PlainDecoupledAttention(*next(branches).parameters(), tokens) if "attn2" in name else processor
        for name, processor in unet.attn_processors.items()
    }
    unet.set_attn_processor(plain)
    prediction = unet(noisy, t_B, family.text_encoder(ids).last_hidden_state).sample
    targets = {
        "epsilon": draws.noise_BCHW,
        "sample": x0,
        "v_prediction": schedule.get_velocity(x0, draws.noise_BCHW, t_B),
    }
    return F.mse_loss(prediction, targets[kind], reduction="none").mean(dim=(1, 2, 3))


def embed(model: IPAdapterModel, batch: Batch) -> Tensor:
    pixels = batch.reference_B3HW.float() / 255
    return model.encoder.visual((pixels - model.encoder.mean) / model.encoder.std)


@pytest.mark.parametrize(("prediction_type", "zero_snr"), tiny.KINDS)
def test_the_loss_is_that_of_a_step_written_out(prediction_type: str, zero_snr: bool) -> None:
    model, batch = tiny.shake(tiny.make_model(prediction_type, zero_snr)), tiny.make_batch()
    with torch.no_grad():
        expected = plain_losses(model, batch, batch.text, embed(model, batch), zero_snr)
        model.adapter.install()
        losses = model.losses(batch)

    assert losses.shape == (3,)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("drop_text", "drop_image"), [(True, False), (False, True), (True, True)])
def test_dropped_rows_get_the_empty_text_and_the_zero_embedding(
    model: IPAdapterModel, drop_text: bool, drop_image: bool
) -> None:
    batch = tiny.make_batch(drop_text=drop_text, drop_image=drop_image)
    batch.draws.drop_text_B[1] = batch.draws.drop_image_B[1] = False
    texts = [text if i == 1 or not drop_text else "" for i, text in enumerate(batch.text)]
    with torch.no_grad():
        embedding = embed(model, batch)
        if drop_image:
            embedding[[0, 2]] = 0
        expected = plain_losses(model, batch, texts, embedding, zero_snr=False)
        plain = plain_losses(model, batch, batch.text, embed(model, batch), zero_snr=False)
        model.adapter.install()
        losses = model.losses(batch)

    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    assert ((losses - plain).abs() > 1e-4).tolist() == [True, False, True]


@pytest.mark.parametrize("time", [0.0, 0.5, 0.99999])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_losses_and_gradients_are_finite_at_both_ends_of_a_schedule_without_signal(
    prediction_type: str, time: float
) -> None:
    model, batch = tiny.make_model(prediction_type, zero_snr=True), tiny.make_batch()
    model.adapter.install()
    batch.draws.time_B.fill_(time)
    losses = model.losses(batch)
    losses.mean().backward()

    assert losses.isfinite().all() and (losses > 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.trainable.parameters())


def test_an_unknown_prediction_type_stops_the_step() -> None:
    model = tiny.make_model()
    model.family.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match=r"'flow'.*epsilon, v_prediction, sample"):
        model.losses(tiny.make_batch())


def test_only_the_trainable_set_gets_gradients_and_all_of_it() -> None:
    model = tiny.make_model()
    model.adapter.install()
    model.losses(tiny.make_batch()).mean().backward()

    for name, parameter in model.trainable.named_parameters():
        assert parameter.requires_grad and parameter.grad.abs().max() > 0, name
    frozen = [*model.family.parameters(), *model.encoder.parameters()]
    assert frozen and all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert learning == {id(parameter) for parameter in model.trainable.parameters()}


def test_the_trainable_set_is_head_and_branches_and_nothing_else(model: IPAdapterModel) -> None:
    layers = range(len(tiny.HIDDEN))
    branches = {f"ip_adapter.branches.{i}.to_{kind}_ip.weight" for i in layers for kind in "kv"}
    head = {"image_proj.proj.weight", "image_proj.proj.bias", "image_proj.norm.weight", "image_proj.norm.bias"}

    assert set(model.trainable.state_dict()) == head | branches
    context, pooled = tiny.CONTEXT_WIDTH, tiny.POOLED_WIDTH
    assert model.count_trainable() == 2 * context * sum(tiny.HIDDEN) + 4 * context * (pooled + 1) + 2 * context


def test_training_moves_the_trainable_set_alone() -> None:
    model, batch = tiny.make_model(), tiny.make_batch()
    model.train()
    model.adapter.install()
    hashed, before = model.frozen_hash(), copy.deepcopy(model.trainable.state_dict())
    optimizer = torch.optim.AdamW(model.trainable.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.losses(batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < losses[0]
    assert model.frozen_hash() == hashed
    assert all(not torch.equal(value, before[name]) for name, value in model.trainable.state_dict().items())


@pytest.mark.parametrize(
    "place", ["family.unet.conv_in.bias", "family.vae.decoder.conv_out.weight", "encoder.visual.proj"]
)
def test_the_hash_notices_one_touched_weight(model: IPAdapterModel, place: str) -> None:
    hashed = model.frozen_hash()
    weight = model.get_parameter(place)
    kept = weight[-1].clone()
    weight[-1] += 1e-6

    assert model.frozen_hash() != hashed
    weight[-1] = kept
    assert model.frozen_hash() == hashed


def test_the_hash_reads_numbers_and_half_precision_too(model: IPAdapterModel) -> None:
    model.encoder.visual.register_buffer("num_batches_tracked", torch.tensor(3))
    model.family.to(torch.bfloat16)
    hashed = model.frozen_hash()
    model.encoder.visual.num_batches_tracked += 1

    assert model.frozen_hash() != hashed


def test_losses_draw_nothing_themselves(model: IPAdapterModel) -> None:
    model.adapter.install()
    batch = tiny.make_batch()
    with torch.no_grad():
        first = model.losses(batch)
        torch.manual_seed(7)
        assert torch.equal(model.losses(batch), first)
        other = replace(batch, draws=replace(batch.draws, noise_BCHW=-batch.draws.noise_BCHW))
        assert not torch.equal(model.losses(other), first)


def test_references_are_encoded_from_bytes(model: IPAdapterModel) -> None:
    batch = tiny.make_batch()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_reference(batch.reference_B3HW).pooled_BE, embed(model, batch))


def test_no_image_is_a_zero_embedding_or_the_blank_picture_as_the_head_says(model: IPAdapterModel) -> None:
    none = model.no_image(2)
    assert none.patches_BPF is None
    assert torch.equal(none.pooled_BE, torch.zeros(2, tiny.POOLED_WIDTH))

    model.head.no_image = "blank"
    assert torch.equal(model.no_image(2).pooled_BE, model.encoder.blank(2).pooled_BE)


def test_the_prompt_does_not_outlive_its_call(model: IPAdapterModel) -> None:
    model.adapter.install()
    latents, t_B, text, tokens = tiny.make_inputs(model)
    with torch.no_grad():
        frozen = model.predict(latents, t_B, text, None, scale=1.0)
        with model.prompted(text, tokens, 1.0) as given:
            assert given is text
        assert torch.equal(model.family.denoise(latents, t_B, text), frozen)


def test_the_scale_weighs_the_image(model: IPAdapterModel) -> None:
    model.adapter.install()
    inputs = tiny.make_inputs(model)
    with torch.no_grad():
        away = [
            (model.predict(*inputs, scale=scale) - model.predict(*inputs, scale=0)).norm() for scale in (0.1, 0.5, 1.0)
        ]
        rows = model.predict(*inputs, scale=torch.tensor([0.0, 1.0]).view(2, 1, 1))
        ends = [model.predict(*inputs, scale=scale) for scale in (0.0, 1.0)]

    assert 0 < away[0] < away[1] < away[2]
    torch.testing.assert_close(rows, torch.stack([ends[0][0], ends[1][1]]))


def test_image_tokens_come_from_the_head(model: IPAdapterModel) -> None:
    features = Features(pooled_BE=torch.randn(2, tiny.POOLED_WIDTH))

    assert torch.equal(model.image_tokens(features), model.head(features))
