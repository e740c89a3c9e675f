"""The training step against one written out from the equations, and what it may touch."""

import copy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import tiny
import tiny_sdxl
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ipa.model import IPAdapterModel
from ipa.types import Batch, Features, to_unit_range
from ipa.weights import count_parameters

SIZES = torch.tensor([[300, 451, 7, 0, 16, 16], [16, 16, 0, 0, 16, 16], [90, 20, 0, 28, 16, 16]])


class PlainDecoupledAttention:
    """Equation 5 as a diffusers processor, softmax written out."""

    def __init__(self, key_weight: Tensor, value_weight: Tensor, tokens_BTD: Tensor) -> None:
        self.key_weight, self.value_weight, self.tokens_BTD = key_weight, value_weight, tokens_BTD

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        query, text, image = attn.to_q(hidden_states), encoder_hidden_states, self.tokens_BTD
        attended = tiny.plain_attention(query, attn.to_k(text), attn.to_v(text), attn.heads)
        attended = attended + tiny.plain_attention(
            query, image @ self.key_weight.T, image @ self.value_weight.T, attn.heads
        )
        return attn.to_out[0](attended)


def plain_tokens(head: Any, features: Tensor) -> Tensor:
    """The equations of the global and of the fine-grained head, on the head's own weights."""
    if head.uses == "pooled":
        width = head.norm.weight.shape
        rows = (features @ head.proj.weight.T + head.proj.bias).view(len(features), -1, *width)
        return F.layer_norm(rows, width, head.norm.weight, head.norm.bias)
    states, queries = head.proj_in(features), head.latents.repeat(len(features), 1, 1)
    for attention, feed_forward in head.layers:
        normed = attention.norm2(queries)
        key, value = attention.to_kv(torch.cat([attention.norm1(states), normed], dim=1)).chunk(2, dim=-1)
        queries = queries + attention.to_out(tiny.plain_attention(attention.to_q(normed), key, value, attention.heads))
        norm, first, _, second = feed_forward
        queries = queries + F.gelu(norm(queries) @ first.weight.T) @ second.weight.T
    return head.norm_out(head.proj_out(queries))


def plain_text(family: Any, texts: list[str], size_B6: Tensor | None) -> tuple[Tensor, dict[str, Tensor] | None]:
    """Encoded by the public pipeline: the states, and what SDXL's UNet wants besides."""
    encoded = family.pipeline().encode_prompt(
        texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return encoded[0], {"text_embeds": encoded[2], "time_ids": size_B6} if family.name == "sdxl" else None


def plain_losses(model: IPAdapterModel, batch: Batch, texts: list[str], features: Tensor) -> Tensor:
    """A training step from public parts: the family's networks, diffusers' scheduler, the adapter's raw weights."""
    family, draws = model.family, batch.draws
    schedule = DDPMScheduler.from_config(family.scheduler.config)
    posterior = family.vae.encode((batch.image_B3HW.float() / 127.5 - 1).to(family.vae.dtype)).latent_dist
    x0 = (posterior.mean + posterior.std * draws.posterior_noise_BCHW) * family.vae.config.scaling_factor
    t_B = (draws.time_B * 1000).long()
    noisy = schedule.add_noise(x0, draws.noise_BCHW, t_B)
    states, added = plain_text(family, texts, batch.size_B6)
    tokens = plain_tokens(model.head, features)

    unet = copy.deepcopy(family.unet)
    if model.adapter.name == "simple":
        states = torch.cat([states, tokens], dim=1)
    else:
        branches = iter(model.adapter.branches)
        plain = {
            name: PlainDecoupledAttention(*next(branches).parameters(), tokens) if "attn2" in name else processor
            for name, processor in unet.attn_processors.items()
        }
        unet.set_attn_processor(plain)
    prediction = unet(noisy.to(unet.dtype), t_B, states, added_cond_kwargs=added).sample
    targets = {
        "epsilon": draws.noise_BCHW,
        "sample": x0,
        "v_prediction": schedule.get_velocity(x0, draws.noise_BCHW, t_B),
    }
    return F.mse_loss(prediction, targets[family.prediction_type], reduction="none").mean(dim=(1, 2, 3))


def embed(model: IPAdapterModel, batch: Batch) -> Tensor:
    """What the head reads of the references, from transformers' network with the encoder's weights."""
    pixels = (batch.reference_B3HW.float() / 255 - model.encoder.mean) / model.encoder.std
    return read(model, pixels.to(model.encoder.visual.proj.dtype))


def read(model: IPAdapterModel, normalized_B3HW: Tensor) -> Tensor:
    vision = tiny.make_vision(model.encoder).to(normalized_B3HW.dtype)
    out = vision(normalized_B3HW, output_hidden_states=True)
    return out.image_embeds if model.head.uses == "pooled" else out.hidden_states[-2]


def gradients(loss: Tensor, model: IPAdapterModel) -> dict[str, Tensor]:
    names, weights = zip(*model.trainable.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, weights), strict=True))


KINDS = {" ".join([kind, *["zero snr"] * zero]): partial(tiny.make_family, kind, zero) for kind, zero in tiny.KINDS}
STEPS = [
    *(("global", "decoupled", family) for family in (*KINDS, "sd21", "sdxl")),
    *(("fine_grained", "decoupled", family) for family in ("epsilon", "sdxl")),
    ("global", "simple", "sdxl"),
    ("fine_grained", "simple", "sd21"),
]


@pytest.mark.parametrize(("head", "kind", "family"), STEPS)
def test_loss_and_gradient_are_those_of_a_step_written_out(head: str, kind: str, family: str) -> None:
    """And no prompt outlives its call."""
    families = KINDS | tiny_sdxl.FAMILIES
    model = tiny.shake(tiny.make_model(head=head, kind=kind, family=families[family]())).double()
    batch = replace(tiny.make_batch(), size_B6=SIZES)
    plain_B = plain_losses(model, batch, batch.text, embed(model, batch))
    expected = gradients(plain_B.mean(), model)
    model.adapter.install()
    with model.prompted(*tiny.make_inputs(model)[2:], 1.0):
        pass
    step = model.errors(batch)

    assert step.error_B.shape == (3,)
    torch.testing.assert_close(step.error_B.double(), plain_B.double(), rtol=1e-6, atol=0)
    for name, gradient in gradients(step.loss, model).items():
        assert (gradient - expected[name]).norm() < 1e-6 * expected[name].norm(), name


@pytest.mark.parametrize(
    ("head", "no_image", "kind", "family"),
    [
        ("global", "zeros", "decoupled", "sd15"),
        ("global", "blank", "simple", "sdxl"),
        ("fine_grained", "blank", "decoupled", "sdxl"),
        ("fine_grained", "zeros", "simple", "sd21"),
    ],
)
def test_dropped_rows_get_the_empty_text_and_no_image(head: str, no_image: str, kind: str, family: str) -> None:
    """Of four rows the first loses its text, the second nothing, the third its image, the last both."""
    model = tiny.shake(tiny.make_model(head=head, kind=kind, family=tiny_sdxl.FAMILIES[family](), no_image=no_image))
    batch = replace(tiny.make_batch(4), size_B6=torch.cat([SIZES, SIZES[:1]]))
    batch.draws.drop_text_B[[0, 3]] = batch.draws.drop_image_B[[2, 3]] = True
    texts = ["", *batch.text[1:3], ""]
    with torch.no_grad():
        features = embed(model, batch)
        plain = plain_losses(model, batch, batch.text, features)
        edge = tiny.REFERENCE_PX
        features[2:] = read(model, torch.zeros(1, 3, edge, edge)) if no_image == "blank" else torch.zeros(())
        expected = plain_losses(model, batch, texts, features)
        model.adapter.install()
        losses = model.errors(batch).error_B
        kept = model.errors(batch.keep_all()).error_B

    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(kept, plain, rtol=1e-5, atol=0)
    assert ((losses - plain).abs() > 1e-4).tolist() == [True, False, True, True]


def as_cached(model: IPAdapterModel, batch: Batch, keep: str, dtype: torch.dtype = torch.float16) -> Batch:
    """The batch as a cache has it, which keeps the pooled embedding or the reference."""
    features = model.encode_reference(batch.reference_B3HW).map(lambda x: x.to(dtype))
    return replace(
        batch,
        text=["not read"] * len(batch),
        image_B3HW=None,
        reference_B3HW=batch.reference_B3HW if keep == "reference" else None,
        posterior=model.family.encode_pixels(to_unit_range(batch.image_B3HW)).map(lambda x: x.to(dtype)),
        features=features if keep == "pooled" else None,
        text_inputs=model.family.prepare_text(batch.text),
    )


CACHED = [
    ("global", "pooled", "epsilon", tiny.make_family),
    ("global", "reference", "v_prediction", tiny.make_family),
    ("fine_grained", "reference", "epsilon", tiny.make_family),
    ("global", "pooled", "v_prediction", lambda _: tiny_sdxl.make_family_2_1()),
    ("global", "pooled", "epsilon", tiny_sdxl.make_family),
    ("fine_grained", "reference", "v_prediction", tiny_sdxl.make_family),
]


@pytest.mark.parametrize(("head", "keep", "prediction_type", "family"), CACHED)
def test_the_cached_loss_is_the_online_one_up_to_the_rounding_of_fp16(
    head: str, keep: str, prediction_type: str, family: Any
) -> None:
    model = tiny.shake(tiny.make_model(head=head, family=family(prediction_type)))
    model.adapter.install()
    batch = replace(tiny.make_batch(4, drop_text=True, drop_image=True), size_B6=torch.cat([SIZES, SIZES[:1]]))
    batch.draws.drop_text_B[:2] = batch.draws.drop_image_B[1:3] = False
    with torch.no_grad():
        online = model.errors(batch)
        same = model.errors(as_cached(model, batch, keep, torch.float32))
        rounded = model.errors(as_cached(model, batch, keep))

    assert torch.equal(same.error_B, online.error_B)
    torch.testing.assert_close(rounded.error_B, online.error_B, rtol=2e-3, atol=0)


def test_a_head_that_reads_patches_is_not_given_the_pooled_embedding() -> None:
    model, batch = tiny.make_model(head="fine_grained"), tiny.make_batch()
    pooled = model.encoder.encode(to_unit_range(batch.reference_B3HW), "pooled")
    with torch.no_grad():
        found = model.features_of(replace(batch, features=pooled))
        assert torch.equal(found.patches_BPF, model.features_of(batch).patches_BPF)
    with pytest.raises(AssertionError, match="patches features"):
        model.features_of(replace(batch, features=pooled, reference_B3HW=None))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_weighs_the_errors_as_min_snr_says_or_not_at_all(prediction_type: str) -> None:
    model, batch = tiny.make_model(prediction_type, zero_snr=True), tiny.make_batch()
    batch.draws.time_B = torch.tensor([0.05, 0.3, 0.99999])
    with torch.no_grad():
        plain, model.min_snr_gamma = model.errors(batch), 5.0
        weighted = model.errors(batch)
    snr_B = model.family.alphas_cumprod[[50, 300, 999]] / (1 - model.family.alphas_cumprod[[50, 300, 999]])
    capped = {"epsilon": 5 / snr_B, "v_prediction": snr_B.clamp(max=5) / (snr_B + 1)}[prediction_type].clamp(max=1)

    assert torch.equal(plain.loss, plain.error_B.mean())
    assert torch.equal(weighted.error_B, plain.error_B) and torch.equal(weighted.time_B, batch.draws.time_B)
    torch.testing.assert_close(weighted.loss, (capped * plain.error_B).mean(), rtol=1e-4, atol=0)
    assert weighted.loss < 0.9 * plain.loss


@pytest.mark.parametrize("time", [0.0, 0.99999])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_losses_and_gradients_are_finite_at_both_ends_of_a_schedule_without_signal(
    prediction_type: str, time: float
) -> None:
    model, batch = tiny.make_model(prediction_type, zero_snr=True), tiny.make_batch()
    model.adapter.install()
    batch.draws.time_B.fill_(time)
    losses = model.errors(batch).error_B
    losses.mean().backward()

    assert losses.isfinite().all() and (losses > 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.trainable.parameters())


@pytest.mark.parametrize(("head", "kind"), [("global", "simple"), ("fine_grained", "decoupled"), ("full", "decoupled")])
def test_only_the_trainable_set_gets_gradients_and_all_of_it(head: str, kind: str) -> None:
    model = tiny.make_model(head=head, kind=kind)
    model.adapter.install()
    model.errors(tiny.make_batch()).loss.backward()

    for name, parameter in model.trainable.named_parameters():
        assert parameter.requires_grad and parameter.grad.abs().max() > 0, name
    frozen = [*model.family.parameters(), *model.encoder.parameters()]
    assert frozen and all(parameter.grad is None and not parameter.requires_grad for parameter in frozen)
    learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert learning == {id(parameter) for parameter in model.trainable.parameters()}


@pytest.mark.parametrize(
    ("kind", "head", "family"),
    [*(("decoupled", "fine_grained", family) for family in tiny_sdxl.FAMILIES), ("simple", "global", "sd15")],
)
def test_recomputed_blocks_see_the_prompt_of_the_first_pass_and_leave_another_in_place(
    kind: str, head: str, family: str
) -> None:
    model = tiny.shake(tiny.make_model(kind=kind, head=head, family=tiny_sdxl.FAMILIES[family]()))
    batch, (latents, t_B, text, tokens) = tiny.make_batch(), tiny.make_inputs(model)
    model.adapter.install()
    expected = gradients(model.errors(batch).loss, model)
    with torch.no_grad():
        other = model.predict(latents, t_B, text, -tokens, 0.5)
    calls = count_calls(model.family.unet.up_blocks[1].attentions[0].transformer_blocks[0])
    model.checkpoint_gradients()
    loss = model.errors(batch).loss
    assert len(calls) == 1
    with model.prompted(text, -tokens, 0.5) as conditioned:
        recomputed = gradients(loss, model)
        assert len(calls) == 2
        with torch.no_grad():
            assert torch.equal(model.family.denoise(latents, t_B, conditioned), other)

    assert all(torch.equal(recomputed[name], gradient) for name, gradient in expected.items())


def count_calls(module: torch.nn.Module) -> list[None]:
    """Grows by one with each later call of the module."""
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def test_the_trainable_set_is_head_and_branches_and_nothing_else(model: IPAdapterModel) -> None:
    layers = range(len(tiny.HIDDEN))
    branches = {f"ip_adapter.branches.{i}.to_{kind}_ip.weight" for i in layers for kind in "kv"}
    head = {"image_proj.proj.weight", "image_proj.proj.bias", "image_proj.norm.weight", "image_proj.norm.bias"}

    assert set(model.trainable.state_dict()) == head | branches
    context, pooled = tiny.CONTEXT_WIDTH, tiny.POOLED_WIDTH
    assert (
        count_parameters(model.trainable) == 2 * context * sum(tiny.HIDDEN) + 4 * context * (pooled + 1) + 2 * context
    )


def test_the_hash_notices_one_touched_number_of_any_type(model: IPAdapterModel) -> None:
    model.encoder.visual.register_buffer("num_batches_tracked", torch.tensor(3))
    model.family.unet.to(torch.bfloat16)
    hashed = model.frozen_hash()
    for place in ("family.unet.conv_in.bias", "family.vae.decoder.conv_out.weight", "encoder.visual.proj"):
        weight = model.get_parameter(place)
        kept = weight[-1].clone()
        weight[-1] += 1e-2
        assert model.frozen_hash() != hashed
        weight[-1] = kept
    assert model.frozen_hash() == hashed
    model.encoder.visual.num_batches_tracked += 1
    assert model.frozen_hash() != hashed


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys() == {"vae", "encoder", "tokenizer"}
    return {name for name in before if before[name] != after[name]}


def test_fingerprints_tell_which_part_is_another(model: IPAdapterModel) -> None:
    """By weights, number types, pixel means and scale."""
    before = model.fingerprints()
    for place, part in (
        ("family.unet.conv_in.bias", set()),
        ("family.text_encoder.final_layer_norm.bias", set()),
        ("family.vae.encoder.conv_in.bias", {"vae"}),
        ("encoder.visual.proj", {"vae", "encoder"}),
    ):
        model.get_parameter(place)[-1] += 1e-6
        assert changed(before, model.fingerprints()) == part
    touched = model.fingerprints()
    model.encoder.mean += 0.01
    model.family.vae.register_to_config(scaling_factor=0.5)
    scaled = model.fingerprints()
    model.to(torch.bfloat16)
    half = model.fingerprints()

    assert changed(touched, scaled) == changed(scaled, half) == {"vae", "encoder"}
    assert before["vae"].startswith("float32 ") and half["vae"].startswith("bfloat16 ")


@pytest.mark.parametrize(("head", "usual"), [("global", "zeros"), ("fine_grained", "blank"), ("full", "blank")])
def test_no_image_is_zeros_or_the_blank_picture_as_the_head_says(head: str, usual: str) -> None:
    assert tiny.make_model(head=head).head.no_image == usual
    for no_image in ("zeros", "blank"):
        model = tiny.make_model(head=head, no_image=no_image)
        [blank] = given(model.encoder.blank(2, uses=model.head.uses))
        [none] = given(model.no_image(2))
        assert torch.equal(none, blank if no_image == "blank" else torch.zeros_like(blank))
        assert blank.abs().max() > 0.01


def given(features: Features) -> list[Tensor]:
    return [tensor for tensor in (features.pooled_BE, features.patches_BPF) if tensor is not None]
