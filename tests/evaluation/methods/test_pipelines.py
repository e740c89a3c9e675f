"""How parts of published pipelines are found and read: from the hub's cache, old layouts, pickles."""

from pathlib import Path

import pytest
import tiny
import tiny_pipelines as made
import tiny_prompt_tokens as parts
import torch
from diffusers import AutoencoderKL, StableUnCLIPImg2ImgPipeline
from safetensors.torch import load_file

from ipa.errors import MissingWeights
from ipa.evaluation.methods.method import draw_start
from ipa.evaluation.methods.pipelines import find_folder, load_part, read_classes
from ipa.evaluation.methods.weights import Source
from ipa.sampling import draw_noise


def test_every_pictures_start_is_its_own_and_what_follows_is_not_the_same_numbers() -> None:
    prompts = parts.make_prompts()
    noise_BCHW, generators = draw_start(prompts, (4, 8, 8))
    assert torch.equal(noise_BCHW, draw_noise((4, 8, 8), [prompt.seed for prompt in prompts]))
    following = torch.stack([torch.randn(4, 8, 8, generator=generator) for generator in generators])
    assert not torch.isin(following, noise_BCHW).any()


def test_a_pipelines_parts_are_those_of_its_constructor() -> None:
    classes = read_classes(StableUnCLIPImg2ImgPipeline)
    assert classes["vae"] is AutoencoderKL
    assert {name for name, part in classes.items() if part is None} == {"scheduler", "image_noising_scheduler"}


def test_a_hub_id_is_found_in_the_cache_by_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--pipeline"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/v2.0").write_text("0" * 40)
    snapshot = made.save_parts(repository / "snapshots" / ("0" * 40), {"vae": tiny.make_vae()})

    source = Source("someone/pipeline", revision="v2.0")
    assert find_folder(source, ["vae"]) == snapshot
    with pytest.raises(MissingWeights, match=r"someone/pipeline has no unet/, text/\. .*--revision v2\.0 --local-dir"):
        find_folder(source, ["vae", "unet", "text"])
    with pytest.raises(MissingWeights, match=r"someone/pipeline is neither a local folder nor"):
        find_folder(Source("someone/pipeline"), ["vae"])


def test_pickles_with_the_former_names_of_attention_layers_are_read_and_run_no_code(tmp_path: Path) -> None:
    """As some of the published ones are."""
    former, vae = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}, tiny.make_vae()
    made.save_parts(tmp_path, {"vae": vae})
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    state, renamed = load_file(file), {}
    file.unlink()
    for name, tensor in state.items():
        for now, then in former.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
        renamed[name] = tensor
    assert len(renamed.keys() - state.keys()) == 16, "four of each kind, with bias, in encoder and decoder"
    torch.save(renamed, file.with_suffix(".bin"))

    loaded = load_part(AutoencoderKL, tmp_path / "vae", Source(str(tmp_path)), torch.float32)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in vae.state_dict().items())
    torch.save({"encoder.conv_in.weight": tiny.Harmful(tmp_path / "harm")}, file.with_suffix(".bin"))
    with pytest.raises((MissingWeights, ValueError), match=r"cannot be read in vae/"):
        load_part(AutoencoderKL, tmp_path / "vae", Source(str(tmp_path)), torch.float32)
    assert not (tmp_path / "harm").exists()
