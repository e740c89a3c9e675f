"""Quantized bases: they compute what the base with rounded weights computes, forward and backward, and start no other.

They need torchao (int8, fp8), bitsandbytes (nf4) and gguf: `pip install ipa[quantization]`. bitsandbytes works on the
CPU, but diffusers refuses it there, which is left out here.

A transformer in a file of its own: quantized already, or under the names of the original code, whose map here is the
inverse of what diffusers reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_flow
import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from ipa.errors import UserError
from ipa.families import quantization
from ipa.families.transformer_file import PREFIX, in_names_of_diffusers
from ipa.training.memory import make_batch
from ipa.weights import hash_weights

# scheme → relative error of a layer's weights, and cosine of the adapter's gradients with those of the base that is not
# quantized; measured: 0.991, 0.969, 0.998 and 0.998 or more
ROUNDING = {"int8": 0.01, "fp8": 0.03, "nf4": 0.12, "gguf": 0.01}
COSINES = {"int8": 0.98, "fp8": 0.93, "nf4": 0.98, "gguf": 0.98}
PACKAGES = {**quantization.SCHEMES, "gguf": "gguf"}
MAKERS: dict[str, Callable[..., Any]] = {**tiny_flow.MAKERS, "sd15": tiny.make_family}
CASES = [  # without nf4 for the tiny transformers: bitsandbytes 0.50 dequantizes some small tensors wrongly on a CPU
    *(("flux", scheme) for scheme in ("fp8", "int8", "gguf")),
    *(("chroma", scheme) for scheme in ("fp8", "gguf")),
    *(("sd35_medium", scheme) for scheme in ("int8", "gguf")),
    *(("sd15", scheme) for scheme in ("int8", "nf4")),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    place = tmp_path_factory.mktemp("bases")
    return cache(lambda name: tiny_flow.save(MAKERS[name](), place / name))


@pytest.fixture
def load(folder_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A family of a folder, quantized by a scheme, on the CPU."""

    def load(name: str, scheme: str | None = None, **options: Any) -> Any:
        if scheme is not None:
            pytest.importorskip(PACKAGES[scheme])
        if scheme == "nf4":
            from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB4BitDiffusersQuantizer

            monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
            # whose packed layout, for calls without gradients, asks for widths that are multiples of 64
            monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
            monkeypatch.setattr(quantization, "own_device", lambda: "cpu")
            monkeypatch.setattr(quantization, "has_gpu", lambda: True)
        folder = folder_of(name)
        options |= {"time_width": tiny_flow.TIME_WIDTH} if name.startswith("sd3") else {}
        family = type(MAKERS[name]())
        if scheme == "gguf":
            return family.from_pretrained(folder, transformer_file=gguf_of(Path(folder), family), **options)
        return family.from_pretrained(folder, quantization=scheme, **options)

    return load


def gguf_of(folder: Path, family: Any) -> str:
    """The transformer under diffusers' names."""
    transformer = family.denoiser_class.from_pretrained(folder / "transformer")
    return write_gguf(folder / "tiny-Q8_0.gguf", transformer.state_dict())


def write_gguf(file: Path, weights: dict[str, Tensor]) -> str:
    """In 8 bits (Q8_0: a scale for each 32 weights)."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(file, "tiny")
    for name, value in weights.items():
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(value.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def rounded(layer: nn.Module) -> Tensor:
    """The weights that a layer computes with."""
    weight: Any = layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "quant_type"):
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        return torch.as_tensor(dequantize_gguf_tensor(weight)).as_subclass(Tensor)
    return weight.dequantize() if hasattr(weight, "dequantize") and type(weight) is not nn.Parameter else weight


def layers(module: nn.Module) -> dict[str, Any]:
    return {name: each for name, each in module.named_modules() if isinstance(each, nn.Linear)}


def step(name: str, family: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Loss, and the gradients of all that is trained, with an adapter that acts."""
    torch.manual_seed(0)
    model = tiny.make_model(family=family) if name == "sd15" else tiny_flow.make_model(lambda: family)
    tiny.shake(model).adapter.install()
    if options.get("checkpointing"):
        model.checkpoint_gradients()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
        loss = model.errors(make_batch(model, 4, tiny.IMAGE_PX, cached=False)).loss
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in model.trained()])  # type: ignore[union-attr]


def cosine(one: Tensor, other: Tensor) -> float:
    return float(nn.functional.cosine_similarity(one, other, dim=0))


@pytest.mark.parametrize(("name", "scheme"), CASES)
def test_it_is_the_base_with_rounded_weights(name: str, scheme: str, load: Callable[..., Any]) -> None:
    """The loss and the adapter's gradients are those of such a base, and the gradients near the base's own."""
    quantized, base = load(name, scheme), load(name)
    plain = step(name, load(name))
    kept, changed = layers(base.denoiser), 0
    with torch.no_grad():
        for key, layer in layers(quantized.denoiser).items():
            own, stored = kept[key].weight, rounded(layer)
            assert (stored - own).norm() <= ROUNDING[scheme] * own.norm(), key
            changed += not torch.equal(own, stored)
            own.copy_(stored)
    assert changed > 20
    loss, gradients = step(name, quantized)
    expected = step(name, base)

    torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected[1], rtol=2e-3, atol=2e-3 * float(expected[1].abs().max()))
    assert gradients.isfinite().all() and cosine(gradients, plain[1]) > COSINES[scheme]
    assert quantized.describe()["base_quantization"] == ("tiny-Q8_0.gguf" if scheme == "gguf" else scheme)


@pytest.mark.parametrize("scheme", ["fp8", "gguf"])
def test_it_trains_in_half_precision_with_recomputed_blocks(scheme: str, load: Callable[..., Any]) -> None:
    one, other = (
        step("flux", load("flux", scheme, dtype="bfloat16"), autocast=True, checkpointing=again) for again in (0, 1)
    )
    assert one[1].isfinite().all()
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_t5_is_quantized_by_itself(load: Callable[..., Any]) -> None:
    pytest.importorskip("torchao")
    base, quantized = load("flux"), load("flux", text_quantization="int8")
    one, other = (family.encode_text(["a red dog"]).states_BLD for family in (base, quantized))

    assert 0 < (one - other).norm() / one.norm() < 0.02
    assert hash_weights(base.transformer) == hash_weights(quantized.transformer)
    assert hash_weights(base) != hash_weights(quantized) == hash_weights(load("flux", text_quantization="int8"))


def test_branches_of_a_unet_start_from_weights_that_are_not_rounded(load: Callable[..., Any]) -> None:
    for one, other in zip(load("sd15").hosts(), load("sd15", "int8").hosts(), strict=True):
        first, second = one.make_branch().state_dict(), other.make_branch().state_dict()
        assert all(torch.equal(value, second[name]) for name, value in first.items())


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
GPTQ = {"quant_method": "gptq"}


@pytest.mark.parametrize(
    ("options", "saved", "message"),
    [
        ({"quantization": "int3"}, None, r"base\.quantization=int3: give fp8, int8, nf4, or null"),
        ({"text_quantization": "int3"}, None, r"base\.text_quantization=int3: give fp8"),
        ({"quantization": "int8"}, BNB, r"base\.quantization=int8: the transformer .* already quantized \(nf4\): give"),
        ({}, BNB, r"base\.quantization=null: .* give base\.quantization=nf4"),
        ({"quantization": "fp8"}, GPTQ, r"already quantized \(gptq\): give a base that is not quantized"),
        ({"transformer_file": "x.ckpt"}, None, r"base\.transformer_file=x\.ckpt: give a \.gguf or a \.safetensors"),
        ({"transformer_file": "x.safetensors"}, None, r"base\.transformer_file=x\.safetensors: no such file"),
    ],
)
def test_other_schemes_are_refused_before_weights_are_read(
    folder_of: Callable[[str], str], tmp_path: Path, options: dict[str, str], saved: Any, message: str
) -> None:
    folder = copy_configuration(Path(folder_of("flux")), tmp_path / "base", saved)
    with pytest.raises(UserError, match=message):
        tiny_flow.Flux.read_widths(folder, **options)


def copy_configuration(source: Path, target: Path, saved: Any) -> str:
    """A folder without weights, whose transformer was saved as quantized."""
    for file in source.rglob("*.json"):
        content = json.loads(file.read_text())
        if saved and file.parent.name == "transformer":
            content["quantization_config"] = saved
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(content))
    return str(target)


def test_a_missing_package_and_a_missing_gpu_are_named(
    folder_of: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "has_gpu", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(quantization, "find_spec", lambda name: None)
        for scheme, package in quantization.SCHEMES.items():
            with pytest.raises(UserError, match=rf"base\.quantization={scheme} needs .*pip install {package}"):
                tiny_flow.Flux.read_widths(folder_of("flux"), quantization=scheme)
    monkeypatch.setattr(quantization, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"base\.quantization=nf4: .* only with a GPU; give fp8 or int8"):
        tiny_flow.Flux.read_widths(folder_of("flux"), quantization="nf4")


def test_a_file_must_be_the_transformer_of_its_base(folder_of: Callable[[str], str], tmp_path: Path) -> None:
    """Not of another family, cut short, no GGUF, or quantized twice."""
    flux, other = folder_of("flux"), str(tmp_path / "other.safetensors")
    transformer = tiny_flow.make_flux().transformer
    save_file(transformer.state_dict(), other)
    loaded = tiny_flow.Flux.from_pretrained(flux, transformer_file=other)
    assert hash_weights(loaded.transformer) == hash_weights(transformer)

    read = tiny_flow.Flux.read_widths
    save_file(tiny_flow.make_sd3().transformer.state_dict(), other)
    with pytest.raises(UserError, match=r"base\.transformer_file=.*other\.safetensors (has no|does not fit)"):
        read(flux, transformer_file=other)
    save_file({name: value for name, value in transformer.state_dict().items() if "proj_out" not in name}, other)
    with pytest.raises(UserError, match=r"base\.transformer_file=.*other\.safetensors (has no|does not fit)"):
        read(flux, transformer_file=other)
    pytest.importorskip("gguf")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF and nothing")
    with pytest.raises(UserError, match=r"broken\.gguf is not a GGUF file"):
        read(flux, transformer_file=str(broken))
    with pytest.raises(UserError, match=r"base\.quantization=fp8: .* is quantized already; give null"):
        read(flux, transformer_file=gguf_of(Path(flux), tiny_flow.Flux), quantization="fp8")


Names = Sequence[tuple[str, str]]
NUMBER = r"\.(\d+)\."
FLUX: Names = [
    (r"time_text_embed\.timestep_embedder\.", "time_in."),
    (r"time_text_embed\.text_embedder\.", "vector_in."),
    (r"time_text_embed\.guidance_embedder\.", "guidance_in."),
    (r"linear_1\.", "in_layer."),
    (r"linear_2\.", "out_layer."),
    (r"distilled_guidance_layer\.norms\.(\d+)\.weight", r"distilled_guidance_layer.norms.\1.scale"),
    (r"context_embedder\.", "txt_in."),
    (r"x_embedder\.", "img_in."),
    (rf"single_transformer_blocks{NUMBER}norm\.linear", r"single_blocks.\1.modulation.lin"),
    (rf"single_transformer_blocks{NUMBER}(attn\.to_[qkv]|proj_mlp)", r"single_blocks.\1.linear1"),
    (rf"single_transformer_blocks{NUMBER}attn\.(norm_[qk])", r"single_blocks.\1.norm.\2"),
    (rf"single_transformer_blocks{NUMBER}proj_out", r"single_blocks.\1.linear2"),
    (rf"transformer_blocks{NUMBER}norm1\.linear", r"double_blocks.\1.img_mod.lin"),
    (rf"transformer_blocks{NUMBER}norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
    (rf"transformer_blocks{NUMBER}attn\.to_[qkv]", r"double_blocks.\1.img_attn.qkv"),
    (rf"transformer_blocks{NUMBER}attn\.add_[qkv]_proj", r"double_blocks.\1.txt_attn.qkv"),
    (rf"transformer_blocks{NUMBER}attn\.(norm_[qk])", r"double_blocks.\1.img_attn.norm.\2"),
    (rf"transformer_blocks{NUMBER}attn\.norm_added_([qk])", r"double_blocks.\1.txt_attn.norm.norm_\2"),
    (r"norm\.norm_q\.weight", "norm.query_norm.scale"),
    (r"norm\.norm_k\.weight", "norm.key_norm.scale"),
    (rf"transformer_blocks{NUMBER}ff\.net", r"double_blocks.\1.img_mlp"),
    (rf"transformer_blocks{NUMBER}ff_context\.net", r"double_blocks.\1.txt_mlp"),
    (r"mlp\.0\.proj", "mlp.0"),
    (rf"transformer_blocks{NUMBER}attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
    (rf"transformer_blocks{NUMBER}attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
]
SD3: Names = [
    (r"pos_embed\.proj", "x_embedder.proj"),
    (r"pos_embed\.pos_embed", "pos_embed"),
    (r"time_text_embed\.timestep_embedder\.", "t_embedder.mlp."),
    (r"time_text_embed\.text_embedder\.", "y_embedder.mlp."),
    (r"linear_1\.", "0."),
    (r"linear_2\.", "2."),
    (rf"transformer_blocks{NUMBER}(attn2?)\.to_[qkv]", r"joint_blocks.\1.x_block.\2.qkv"),
    (rf"transformer_blocks{NUMBER}attn\.add_[qkv]_proj", r"joint_blocks.\1.context_block.attn.qkv"),
    (rf"transformer_blocks{NUMBER}(attn2?)\.norm_([qk])", r"joint_blocks.\1.x_block.\2.ln_\3"),
    (rf"transformer_blocks{NUMBER}attn\.norm_added_([qk])", r"joint_blocks.\1.context_block.attn.ln_\2"),
    (rf"transformer_blocks{NUMBER}(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
    (rf"transformer_blocks{NUMBER}attn\.to_add_out", r"joint_blocks.\1.context_block.attn.proj"),
    (rf"transformer_blocks{NUMBER}norm1\.linear", r"joint_blocks.\1.x_block.adaLN_modulation.1"),
    (rf"transformer_blocks{NUMBER}norm1_context\.linear", r"joint_blocks.\1.context_block.adaLN_modulation.1"),
    (rf"transformer_blocks{NUMBER}ff\.net", r"joint_blocks.\1.x_block.mlp"),
    (rf"transformer_blocks{NUMBER}ff_context\.net", r"joint_blocks.\1.context_block.mlp"),
    (r"mlp\.0\.proj", "mlp.fc1"),
    (r"block\.mlp\.2", "block.mlp.fc2"),
    (r"^norm_out\.linear", "final_layer.adaLN_modulation.1"),
    (r"^proj_out", "final_layer.linear"),
]


def original(transformer: Any, names: Names) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix, and the last modulations have shift before scale."""
    pieces: dict[str, list[Tensor]] = {}
    last = f"joint_blocks.{len(transformer.transformer_blocks) - 1}.context_block.adaLN"
    parts = ("to_q", "add_q", "to_k", "add_k", "to_v", "add_v", "proj_mlp")
    state = transformer.state_dict()
    for name in sorted(state, key=lambda name: next((i for i, part in enumerate(parts) if part in name), 0)):
        renamed, value = name, state[name]
        for theirs, ours in names:
            renamed = re.sub(theirs, ours, renamed)
        if renamed.startswith(("final_layer.adaLN", last)):
            value = torch.cat(value.chunk(2)[::-1])
        pieces.setdefault(renamed, []).append(value)
    return {f"{PREFIX}{name}": torch.cat(each) if len(each) > 1 else each[0] for name, each in pieces.items()}


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_a_file_in_the_original_names_has_the_weights_of_its_base(kind: str, tmp_path: Path) -> None:
    """SD3, whose conversion knows no fixed sizes; other parts in the file do not matter."""
    family = tiny_flow.make_sd35_medium()
    folder, file = tiny_flow.save(family, tmp_path / "base"), tmp_path / f"original.{kind}"
    weights = original(family.transformer, SD3)
    if kind == "gguf":
        pytest.importorskip("gguf")
        write_gguf(file, weights)
    else:
        save_file({**weights, "vae.decoder.weight": torch.zeros(2)}, file)
    loaded = type(family).from_pretrained(folder, transformer_file=str(file), time_width=tiny_flow.TIME_WIDTH)

    expected, found = dict(family.transformer.named_modules()), dict(loaded.transformer.named_modules())
    for name in (name for name, module in expected.items() if getattr(module, "weight", None) is not None):
        if kind == "safetensors":
            assert torch.equal(found[name].weight, expected[name].weight), name
        else:
            stored = rounded(found[name]).float()
            torch.testing.assert_close(stored, expected[name].weight, rtol=0, atol=0.02)


@pytest.mark.parametrize("kind", [FluxTransformer2DModel, ChromaTransformer2DModel])
def test_names_of_the_published_files_are_known(kind: Any) -> None:
    """At full size, since diffusers' conversion assumes it; fp8 weights with scales of their own would be misread."""
    with torch.device("meta"):
        transformer = kind(**({"guidance_embeds": True} if kind is FluxTransformer2DModel else {}))
        names = original(transformer, FLUX)
    shapes = {name: tuple(value.shape) for name, value in names.items()}
    expected = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}

    assert in_names_of_diffusers(shapes, transformer, "flux.safetensors") == expected
    scaled = {**shapes, f"{PREFIX}double_blocks.0.img_attn.qkv.scale_weight": ()}
    with pytest.raises(UserError, match=r"base\.transformer_file=x\.safetensors has 1 tensors .*qkv\.scale_weight"):
        in_names_of_diffusers(scaled, transformer, "x.safetensors")
