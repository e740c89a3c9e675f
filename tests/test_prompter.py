"""The prompter against stock diffusers with the same adapter files, and what only the prompter can do.

Tiny Stable Diffusion pipelines in float32; the features of the images are handed to diffusers as embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    T2IAdapter,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import ExifTags, Image
from safetensors.torch import save_file
from torch import Tensor

from ipa.errors import UserError
from ipa.metrics.clip import ClipScorer
from ipa.model import IPAdapterModel
from ipa.prompter import Prompter, batches
from ipa.references import COMBINE, Item, Reference, open_reference, read_mask, tiles_of
from ipa.types import to_uint8

PX = tiny.IMAGE_PX
STEPS = 3
OPTIONS: dict[str, Any] = {"guidance": 3.0, "num_steps": STEPS, "batch_size": 8}
# the same in diffusers
PLAIN: Any = {"negative_prompt": "", "guidance_scale": 3.0, "num_inference_steps": STEPS, "output_type": "pt"}


def picture(seed: int) -> Image.Image:
    pixels = tiny.make_pictures(1, tiny.REFERENCE_PX, seed)[0]
    return Image.fromarray(np.asarray(pixels.permute(1, 2, 0)))


CAT, DOG, SKY = (picture(seed) for seed in (11, 12, 13))


def half(left: bool) -> Image.Image:
    mask = Image.new("L", (PX, PX))
    mask.paste(255, (0, 0, PX // 2, PX) if left else (PX // 2, 0, PX, PX))
    return mask


def adapted(family: Any, seed: int) -> IPAdapterModel:
    """A model around the family with the adapter of a file."""
    model = tiny.shake(tiny.make_model(family=family), seed=seed)
    model.adapter.install()
    return model


@pytest.fixture(scope="module")
def prompter() -> Prompter:
    """Two adapters on one base."""
    family = tiny.make_family()
    return Prompter([adapted(family, 1), adapted(family, 2)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    paths = [tmp_path_factory.mktemp("adapters") / f"{seed}.safetensors" for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        tiny.write_adapter(path, seed=seed)
    return paths


def stock(files: Sequence[Path], family: Any = None) -> Any:
    """A public pipeline on a base of its own with these adapters loaded by diffusers."""
    pipeline = tiny.make_pipeline(family or tiny.make_family())
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    names = [file.name for file in files]
    pipeline.load_ip_adapter(
        [str(file.parent) for file in files], subfolder=[""] * len(files), weight_name=names, image_encoder_folder=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embeds(prompter: Prompter, *images: Image.Image, number: int = 0) -> Tensor:
    """[no image; images], 2 × N × E, as the public call takes them."""
    model = prompter.models[number]
    pixels = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    pooled = model.encode_reference(pixels).pooled_BE
    assert pooled is not None
    return torch.stack([torch.zeros_like(pooled), pooled])


def stock_latents(pipeline: Any, seed: int, embeddings: Sequence[Tensor], **arguments: Any) -> Tensor:
    return call_stock(pipeline, seed, embeddings, **arguments, output_type="latent")


def call(pipeline: Any, seed: int, embeddings: Sequence[Tensor], text: str = "cat", **arguments: Any) -> Image.Image:
    return as_image(call_stock(pipeline, seed, embeddings, text, **arguments) * 2 - 1)


def call_stock(pipeline: Any, seed: int, embeddings: Sequence[Tensor], text: str = "cat", **arguments: Any) -> Tensor:
    out: Tensor = pipeline(
        text,
        ip_adapter_image_embeds=list(embeddings),
        **(PLAIN | {"latents": tiny_noise(seed), "height": PX, "width": PX} | arguments),
    ).images
    return out


def tiny_noise(seed: int) -> Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def as_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(np.asarray(to_uint8(pixels)[0].permute(1, 2, 0)))


def assert_alike(ours: Image.Image, theirs: Image.Image) -> None:
    """Equal up to rounding to 8 bits."""
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 1 and ours.size == theirs.size


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of their size; single values differ more by rounding, which guidance multiplies at every step."""
    assert ours.shape == theirs.shape and (ours - theirs).norm() <= 1e-5 * theirs.norm()


def differ(one: Image.Image, other: Image.Image) -> bool:
    return bool(np.abs(np.asarray(one, int) - np.asarray(other, int)).max() > 3)


def test_images_masks_blocks_and_adapters_are_those_of_diffusers(prompter: Prompter, files: list[Path]) -> None:
    """Several images of one prompt are in one softmax; prompts, of one or several adapters, add up."""
    cat, pair = embeds(prompter, CAT), embeds(prompter, CAT, DOG)
    masks = IPAdapterMaskProcessor().preprocess([half(True), half(False)], height=PX, width=PX)
    masked = {"cross_attention_kwargs": {"ip_adapter_masks": [masks.transpose(0, 1)]}}
    up = dict.fromkeys((name for name in prompter.family.blocks() if name.startswith("up_blocks.1.")), 0.6)
    # diffusers' scale, embeddings and arguments, and our references
    cases: list[tuple[Any, list[Tensor], dict[str, Any], list[Reference]]] = [
        (0.7, [cat], {}, [Reference(CAT, 0.7)]),
        (0.7, [pair], {}, [Reference([CAT, DOG], 0.7)]),
        ([[0.7, 0.4]], [pair], masked, [Reference(CAT, 0.7, mask=half(True)), Reference(DOG, 0.4, mask=half(False))]),
        ({"up": {"block_1": [0.6]}}, [cat], {}, [Reference(CAT, blocks=up)]),
        ([0.7, 0.5], [cat, embeds(prompter, DOG, number=1)], {}, [Reference(CAT, 0.7), Reference(DOG, 0.5, adapter=1)]),
    ]
    one, both, made = stock(files[:1]), stock(files), []
    for scale, embeddings, arguments, references in cases:
        pipeline = one if len(embeddings) == 1 else both
        pipeline.set_ip_adapter_scale(scale)
        made.append(latents_of(prompter, Item(references, "cat", seed=3)))
        assert_same(made[-1], stock_latents(pipeline, 3, embeddings, **arguments))

    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in combinations(made, 2))


def test_outside_the_masks_the_latents_are_the_bases(prompter: Prompter) -> None:
    """And inside they are not those of the mask alone, since they see another surrounding."""
    items = [Item([Reference(CAT, mask=half(left))], "cat", seed=3) for left in (True, False)]
    items += [Item([Reference(DOG, mask=half(True)), Reference(CAT, mask=half(False))], "cat", seed=4)]
    plain = [Item([], each.text, seed=each.seed) for each in items]
    base = torch.cat([latents_of(prompter, *plain[:2]), latents_of(prompter, plain[2])])  # batches as below
    kept = latents_of(prompter, *items, keep_outside=True)
    masked = latents_of(prompter, *items)

    assert torch.equal(kept[0][..., 4:], base[0][..., 4:]) and torch.equal(kept[1][..., :4], base[1][..., :4])
    assert not torch.equal(masked[0][..., 4:], base[0][..., 4:])
    assert not torch.allclose(kept[0][..., :4], base[0][..., :4], atol=1e-3)
    torch.testing.assert_close(kept[2], masked[2])
    control = T2IAdapter(channels=[8, 16, 32], num_res_blocks=1, downscale_factor=2)
    other = prompter.pipeline(StableDiffusionAdapterPipeline, adapter=control)
    with pytest.raises(UserError, match="keep_outside: StableDiffusionAdapterPipeline"):
        prompter(CAT, mask=half(True), pipeline=other, keep_outside=True, **OPTIONS)
    own = {"callback_on_step_end": lambda pipe, step, time, state: state}
    with pytest.raises(UserError, match="keep_outside uses callback_on_step_end itself"):
        prompter(CAT, mask=half(True), arguments=own, keep_outside=True, **OPTIONS)


def latents_of(prompter: Prompter, *items: Item, **options: Any) -> Tensor:
    """The final ones, as the decoder gets them."""
    found: list[Tensor] = []
    decode = prompter.family.decode_latents
    with pytest.MonkeyPatch.context() as patch:
        for batch in batches(items, 8):
            passes: list[Tensor] = []
            patch.setattr(prompter.family, "decode_latents", lambda x, passes=passes: passes.append(x) or decode(x))
            prompter.generate(batch, **options, **OPTIONS)
            found.append(passes[-1])  # with keep_outside the base's come first
    return torch.cat(found)


@pytest.mark.parametrize(
    "nothing",
    [
        {"scale": 0.0},
        {"blocks": {"mid_block": 0.0}},
        {"mask": Image.new("L", (PX, PX))},
        {"curve": lambda progress: 0.0},
        {"start": 0.0, "end": 0.0},
        {"blocks": {}},
        {"scale": 0.0, "embeds_scaling": "K+mean(V) w/ C penalty"},
    ],
    ids=["scale", "blocks", "mask", "curve", "time", "no blocks", "inside the softmax"],
)
def test_nothing_is_the_base_bit_for_bit(prompter: Prompter, nothing: dict[str, Any]) -> None:
    (base,) = prompter(text="cat", seed=3, **OPTIONS)
    (ours,) = prompter(CAT, "cat", seed=3, **nothing, **OPTIONS)

    assert np.array_equal(np.asarray(ours), np.asarray(base))
    assert differ(prompter(CAT, "cat", seed=3, **OPTIONS)[0], base)


def test_every_item_of_a_batch_may_have_its_own_everything(prompter: Prompter) -> None:
    items = [
        Item([Reference(CAT, 1.0, mask=half(True))], "cat", seed=3),
        Item([Reference(DOG, 0.5, mask=half(False))], "a red dog", negative_text="cat", seed=4),
        Item([Reference([CAT, SKY])], "cat", seed=5),
        Item(text="cat", seed=6),
        Item([Reference(CAT, 0.3, start=0.2)], "cat", seed=7),
        Item([Reference(DOG, 0.9, start=0.2)], "cat", seed=8),
    ]
    together = latents_of(prompter, *items)

    assert_same(together, torch.cat([latents_of(prompter, item) for item in items]))
    assert len({each.numpy().tobytes() for each in together}) == len(items)


def test_time_limits_and_curves(prompter: Prompter) -> None:
    """The prompt acts in some of the three steps."""
    whole, first, last = (
        prompter(CAT, "cat", seed=3, **limits, **OPTIONS)[0] for limits in ({}, {"end": 0.5}, {"start": 0.5})
    )
    (curved,) = prompter(CAT, "cat", seed=3, curve=lambda progress: float(progress <= 0.5), **OPTIONS)

    assert len({image.tobytes() for image in (whole, first, last)}) == 3
    assert np.array_equal(np.asarray(curved), np.asarray(first))


def test_combining_images(prompter: Prompter) -> None:
    made = {name: prompter([CAT, DOG, SKY], seed=3, combine=name, **OPTIONS)[0] for name in COMBINE}
    same = prompter([CAT, CAT], seed=3, combine="average", **OPTIONS)[0]

    assert len({image.tobytes() for image in made.values()}) == len(COMBINE)
    assert_alike(same, prompter(CAT, seed=3, **OPTIONS)[0])
    assert_alike(
        prompter([CAT, DOG], seed=3, combine="add", weights=[0.5, 0.5], **OPTIONS)[0],
        prompter([CAT, DOG], seed=3, combine="average", **OPTIONS)[0],
    )


def test_a_negative_image_takes_the_place_of_none(prompter: Prompter) -> None:
    plain, negative = prompter(CAT, seed=3, **OPTIONS)[0], prompter(CAT, seed=3, negative=DOG, **OPTIONS)[0]

    assert differ(plain, negative)
    unguided = {"guidance": 1.0, "num_steps": STEPS}
    assert_alike(prompter(CAT, seed=3, negative=DOG, **unguided)[0], prompter(CAT, seed=3, **unguided)[0])


def test_a_text_that_is_cut_off_is_logged_and_sizes_are_free(
    prompter: Prompter, caplog: pytest.LogCaptureFixture
) -> None:
    (image,) = prompter(CAT, "cat", width=2 * PX, height=PX, **OPTIONS)
    assert not caplog.text and image.size == (2 * PX, PX)
    prompter(CAT, "a red dog cat " * 10, **OPTIONS)
    assert "does not read its end" in caplog.text and "dog" in caplog.text
    with pytest.raises(UserError, match="batch_size=0"):
        prompter(CAT, **(OPTIONS | {"batch_size": 0}))


def test_tiles_act_in_their_rectangles(prompter: Prompter) -> None:
    """One prompt is the sum of those of its tiles, within the user's own mask."""
    tall = Image.effect_noise((60, 150), 80).convert("RGB")
    fitted = tall.resize((256, 640), Image.Resampling.LANCZOS)
    parts = []
    for top in (0, 192, 384):
        mask = Image.new("L", (PX, PX))
        mask.paste(255, (0, round(top / 640 * PX), PX // 2, round((top + 256) / 640 * PX)))
        parts.append(Reference(fitted.crop((0, top, 256, top + 256)), 0.7, mask=mask))
    (ours,) = prompter(tall, "cat", scale=0.7, mask=half(True), tiles=True, seed=3, **OPTIONS)

    assert_alike(ours, prompter(parts, "cat", seed=3, **OPTIONS)[0])
    assert differ(ours, prompter(tall, "cat", scale=0.7, mask=half(True), seed=3, **OPTIONS)[0])
    assert [box for _, box in tiles_of(tall.resize((60, 70)))] == [
        (x, y, x + 0.5, y + 0.5) for y in (0, 0.5) for x in (0, 0.5)
    ]
    assert [len(tiles_of(tall.resize(size))) for size in ((70, 60), (80, 60), (60, 90), (600, 60))] == [4, 2, 2, 4]


def test_content_is_subtracted_from_the_embedding(
    prompter: Prompter, clip_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """e − s · e_text, by the text tower of the same CLIP; a head that reads patches has no such thing."""
    model = prompter.models[0]
    monkeypatch.setattr(model.encoder, "source", clip_name)  # whose weights are those of the tiny encoder
    clip = ClipScorer.from_pretrained(clip_name)
    with torch.no_grad():
        text = clip.clip.encode_text(clip.tokenizer(["cat"]))
    pooled = embeds(prompter, DOG) - 0.5 * torch.stack([torch.zeros_like(text), text])
    reference = Reference(DOG, subtract_text="cat", subtract_strength=0.5)
    (found,) = prompter.condition(model, [reference], (PX, PX), True)

    torch.testing.assert_close(found.images[0].pooled_BE, pooled[1], rtol=1e-5, atol=1e-6)
    patches = Prompter([tiny.shake(tiny.make_model(head="fine_grained"))])
    with pytest.raises(UserError, match=r"subtract_text=cat: .*patches"):
        patches([reference], **OPTIONS)


def start_image() -> Image.Image:
    return CAT.resize((PX, PX))


def test_image_to_image_inpainting_and_controlnet_are_those_of_diffusers(prompter: Prompter, files: list[Path]) -> None:
    torch.manual_seed(5)
    controlnet = ControlNetModel.from_unet(prompter.family.unet, conditioning_embedding_out_channels=(4, 8)).eval()
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    base, begin, size = stock(files[:1]), start_image(), {"height": PX, "width": PX}
    base.set_ip_adapter_scale(0.7)
    ways: list[tuple[Any, dict[str, Any], dict[str, Any], dict[str, int]]] = [
        (StableDiffusionImg2ImgPipeline, {}, {"image": begin, "strength": 0.7}, {}),
        (StableDiffusionInpaintPipeline, {}, {"image": begin, "mask_image": half(True), "strength": 0.7}, size),
        (StableDiffusionControlNetPipeline, {"controlnet": controlnet}, {"image": begin}, size),
    ]
    (plain,) = prompter(DOG, "cat", scale=0.7, seed=3, **OPTIONS)
    for kind, parts, arguments, sizes in ways:
        theirs = kind(**base.components, **parts, requires_safety_checker=False)
        theirs.set_progress_bar_config(disable=True)
        prompt = {"ip_adapter_image_embeds": [embeds(prompter, DOG)], "generator": torch.Generator().manual_seed(3)}
        out = theirs("cat", **prompt, **PLAIN, **sizes, **arguments)
        pipeline = prompter.pipeline(kind, **parts)
        (ours,) = prompter(DOG, "cat", scale=0.7, seed=3, pipeline=pipeline, arguments=arguments, **OPTIONS)
        assert_alike(ours, as_image(out.images * 2 - 1))
        assert differ(ours, plain)


def test_t2i_adapter_whose_stock_pipeline_cannot_load_ip_adapters(
    prompter: Prompter, files: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers' layers can, if their input is given to the UNet by a hook: the same picture."""
    assert not hasattr(StableDiffusionAdapterPipeline, "load_ip_adapter")
    torch.manual_seed(5)
    control = T2IAdapter(
        in_channels=3,
        channels=list(prompter.family.unet.config.block_out_channels),
        num_res_blocks=1,
        downscale_factor=2,
        adapter_type="full_adapter",
    ).eval()
    pipeline = prompter.pipeline(StableDiffusionAdapterPipeline, adapter=control)
    arguments = {"image": start_image()}
    (ours,) = prompter(DOG, "cat", scale=0.7, seed=3, pipeline=pipeline, arguments=arguments, **OPTIONS)
    base = stock(files[:1])
    base.set_ip_adapter_scale(0.7)
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    theirs = StableDiffusionAdapterPipeline(**parts, adapter=control, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    tokens = embeds(prompter, DOG)[:, None]
    add_image = lambda unet, inputs, named: (inputs, named | {"added_cond_kwargs": {"image_embeds": [tokens]}})  # noqa: E731
    base.unet.register_forward_pre_hook(add_image, with_kwargs=True)

    expected = theirs(
        "cat", image=start_image(), **PLAIN | {"output_type": "np"}, latents=tiny_noise(3), height=PX, width=PX
    )
    assert_alike(ours, as_image(torch.from_numpy(expected.images).permute(0, 3, 1, 2) * 2 - 1))
    assert differ(ours, prompter(DOG, "cat", scale=0.7, seed=3, **OPTIONS)[0])
    with pytest.raises(UserError, match=r"guidance_rescale=0\.5: StableDiffusionAdapterPipeline"):
        prompter(DOG, pipeline=pipeline, guidance_rescale=0.5, arguments=arguments, **OPTIONS)
    trained = replace(prompter, defaults={**prompter.defaults, "guidance_rescale": 0.7})
    (again,) = trained(DOG, "cat", scale=0.7, seed=3, pipeline=pipeline, arguments=arguments, **OPTIONS)
    assert not differ(ours, again)
    assert "StableDiffusionAdapterPipeline has no guidance_rescale: the previews' 0.7 is left out" in caplog.text


def test_loras_and_learned_words_are_those_of_diffusers(files: list[Path], tmp_path: Path) -> None:
    """The tokenizer and the text encoder are the prompter's, too; a LoRA comes off again."""
    pytest.importorskip("peft")
    write_lora(tmp_path)
    save_file({"<new>": 5 * torch.randn(tiny.CONTEXT_WIDTH)}, tmp_path / "new.safetensors")
    prompter, theirs = Prompter([adapted(tiny.make_family(), 1)]), stock(files[:1])
    pipeline = prompter.pipeline()
    theirs.set_ip_adapter_scale(0.7)
    ways: list[Callable[[Any], None]] = [
        lambda pipe: None,
        lambda pipe: pipe.load_textual_inversion(str(tmp_path), weight_name="new.safetensors"),
        lambda pipe: pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors"),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    made = []
    for change in ways:
        change(pipeline)
        change(theirs)
        made += prompter(CAT, "a <new> cat", scale=0.7, seed=3, pipeline=pipeline, **OPTIONS)
        assert_alike(made[-1], call(theirs, 3, [embeds(prompter, CAT)], "a <new> cat"))

    assert differ(made[0], made[1]) and differ(made[1], made[2])
    assert_alike(made[3], made[1])


def write_lora(folder: Path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig, get_peft_model_state_dict

    unet = tiny.make_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    layers = {name: 3 * value for name, value in get_peft_model_state_dict(unet).items()}
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=convert_state_dict_to_diffusers(layers), weight_name="lora.safetensors"
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scale": -1.0}, ["scale=-1", "at least 0"]),
        ({"scale": float("nan")}, ["scale=nan"]),
        ({"start": 0.5, "end": 0.2}, ["start=0.5 end=0.2"]),
        ({"combine": "mix"}, ["combine=mix", "concat, add"]),
        ({"combine": "subtract"}, ["subtract", "two images"]),
        ({"weights": [1.0, 2.0]}, ["weights", "1 images"]),
        ({"embeds_scaling": "K only"}, ["embeds_scaling=K only", "V only, K+V"]),
        ({"images": [CAT, DOG], "tiles": True}, ["tiles: give one image", "not 2"]),
        ({"subtract_text": "cat"}, ["encoder.name=tiny"]),
        ({"blocks": "stile"}, ["blocks=stile", "ease in", "mid_block"]),
        ({"blocks": {"middle": 1.0}}, ["middle", "mid_block"]),
        ({"adapter": 2}, ["adapter=2", "2 adapters"]),
        ({"mask": Image.new("L", (PX, 2 * PX))}, ["mask of", f"{PX} × {PX}"]),
        ({"images": "nowhere.png"}, ["nowhere.png", "no such file"]),
        ({"images": []}, ["an image"]),
        ({"images": 5}, ["5 is no picture"]),
        ({"subtract_text": "cat", "subtract_strength": float("nan")}, ["subtract_strength=nan"]),
        ({"subtract_text": 5}, ["subtract_text=5"]),
        ({"images": Image.new("RGB", (0, 0))}, ["no pixels"]),
        ({"mask": "nowhere.png"}, ["mask=nowhere.png", "no such file"]),
        ({"scale": "much"}, ["scale=much", "a number"]),
        ({"weights": 1.0}, ["weights=1.0"]),
        ({"weights": [float("nan")]}, ["weights=[nan]"]),
        ({"curve": "linear"}, ["curve=linear", "function"]),
        ({"blocks": ["mid_block"]}, ["blocks=['mid_block']", "mapping"]),
        ({"blocks": {"mid_block": "much"}}, ["mid_block: much"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else "-".join(value),
)
def test_what_cannot_be_is_refused_in_words(prompter: Prompter, given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        prompter([Reference(**({"images": CAT} | given))], **OPTIONS)

    for word in words:
        assert word in str(caught.value)


def test_a_picture_is_the_same_from_a_file_and_open_and_may_have_any_mode(tmp_path: Path) -> None:
    """What is transparent in a mask does not act."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    CAT.resize((24, 16)).save(tmp_path / "cat.jpg", exif=turned)
    from_file, from_picture = open_reference(tmp_path / "cat.jpg"), open_reference(Image.open(tmp_path / "cat.jpg"))

    assert from_file.size == from_picture.size == (16, 24)
    assert torch.equal(from_file.pixels_3HW, from_picture.pixels_3HW)
    for mode in ("CMYK", "YCbCr", "I", "RGBX", "HSV"):
        assert int(open_reference(Image.new("L", (4, 4), 255).convert(mode)).pixels_3HW.min()) >= 253
    white = Image.new("RGBA", (PX, PX), (255, 255, 255, 0))
    white.paste((255, 255, 255, 255), (0, 0, PX // 2, PX))
    assert torch.equal(read_mask(white, (PX, PX)), read_mask(half(True), (PX, PX)))


def test_a_simple_adapter_has_one_weight_for_all_blocks(prompter: Prompter) -> None:
    simple = Prompter([tiny.shake(tiny.make_model(kind="simple"))])
    (plain,) = simple(CAT, "cat", seed=3, **OPTIONS)

    assert differ(plain, simple([Reference(CAT), Reference(DOG)], "cat", seed=3, **OPTIONS)[0])
    for given in ({"blocks": {"mid_block": 1.0}}, {"mask": half(True)}, {"end": 0.5}):
        with pytest.raises(UserError, match="simple adapter"):
            simple(CAT, **given, **OPTIONS)


def test_the_adapters_of_files_share_one_base(files: list[Path], base_folder: Path, clip_name: str) -> None:
    prompter = Prompter.load(files, base=str(base_folder), encoder=clip_name, device="cpu")

    assert len(prompter.models) == 2 and prompter.models[0].family is prompter.models[1].family
    assert isinstance(prompter.pipeline(), StableDiffusionPipeline)
