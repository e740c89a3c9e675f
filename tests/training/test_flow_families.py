"""Transformers go through the whole house at tiny size: training, exact resume, previews, files, caches, processes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache, partialmethod
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_flow
import torch
from composing import composed
from conftest import QUIET, Run, World, assert_same_run, checkpoint, column, compose, rewound
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image
from ranks import together, train_all

from ipa.errors import UserError
from ipa.export.loading import load_model
from ipa.export.reading import read_adapter
from ipa.prompter import Prompter
from ipa.references import Item, Reference
from ipa.sampling import recorded_options
from ipa.tools.precompute.run import precompute
from ipa.training.callbacks import ScaleWarmup
from ipa.training.dry_run import dry_run
from ipa.training.memory import make_batch
from ipa.training.parts import build_model
from ipa.training.strategies import frozen_blocks

SLOW = ("chroma", "instantx", "schnell")
FOUR = ("tokens.num_tokens=4",)
CASES = {
    "flux": ("base=flux_dev", "tokens.no_image=black"),
    "schnell": ("base=flux_schnell", "experiment=simple_global"),
    "chroma": ("base=chroma", "tokens.no_image=black"),
    "sd35_medium": ("base=sd35_medium", "experiment=decoupled_time_aware", *FOUR, "scale_warmup_steps=3"),
    "int8": ("base=flux_dev", "base.quantization=int8", "tokens.no_image=black"),
    "instantx": ("base=flux_dev", "base.hosts=all", "experiment=decoupled_mlp", *FOUR, "adapter.layout=ipa"),
}
MARKS = {
    **dict.fromkeys(SLOW, pytest.mark.slow),
    "int8": pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao"),
}
PARAMETERS = [pytest.param(name, marks=MARKS.get(name, ())) for name in CASES]


@pytest.fixture(scope="module")
def overrides_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Overrides that put a family into the tiny world."""
    place = tmp_path_factory.mktemp("bases")

    @cache
    def folder(name: str) -> str:
        return tiny_flow.save(tiny_flow.MAKERS[name](), place / name)

    def overrides(name: str) -> list[str]:
        base = folder(name if name in tiny_flow.MAKERS else "flux")
        usual = ["base.dtype=float32", "optimizer.lr=0.01", "data.background=null", "sampling.guidance_rescale=0"]
        return [*CASES[name], f"base.path={base}", *usual]

    return overrides


@pytest.fixture(scope="module")
def trained(train_in: Run, overrides_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run of a family; only to be read."""
    place = tmp_path_factory.mktemp("trained")
    return cache(lambda name: train_in(place / name, *overrides_of(name)))


@pytest.mark.parametrize("name", PARAMETERS)
def test_it_trains_resumes_to_the_bit_and_writes_previews_and_adapter(
    name: str, train_in: Run, trained: Callable[[str], Path], overrides_of: Callable[[str], list[str]], tmp_path: Path
) -> None:
    whole = trained(name)
    assert_same_run(train_in(rewound(whole, tmp_path / "x"), *overrides_of(name)), whole)
    saved = checkpoint(whole)["state_dict"]

    assert sorted(path.name for path in (whole / "previews").iterdir()) == ["step_000002.png", "step_000004.png"]
    for source in (whole / "adapter.safetensors", whole):  # the folder's is its last checkpoint
        model = load_model(source)
        for key, value in model.trainable.state_dict().items():
            stored = saved[f"trainable.{key}"]
            assert torch.equal(value, stored if source is whole else stored.half().float())
    metadata = read_adapter(whole / "adapter.safetensors").metadata
    assert metadata.get("base_quantization") == ("int8" if name == "int8" else None)
    assert metadata["timesteps"] == ("logit_normal" if name.startswith("sd3") else "uniform")
    if name == "flux":  # how the training sampled is recorded
        assert (metadata["train_guidance"], metadata["hosts"], metadata["branches"]) == ("1", "double", "flux")
        assert recorded_options(metadata)["guidance"] == 4.0


@pytest.mark.parametrize("name", ["flux", "sd35_medium"])
def test_a_batch_with_its_own_references_λ_per_block_and_two_images(
    name: str, trained: Callable[[str], Path], tmp_path: Path
) -> None:
    """What the stock pipelines mix or refuse."""
    prompter = Prompter.load(trained(name) / "adapter.safetensors", device="cpu")
    tiny.shake(prompter.models[0])
    for colour in ("red", "blue"):
        Image.new("RGB", (24, 24), colour).save(tmp_path / f"{colour}.png")
    red, blue = (str(tmp_path / f"{colour}.png") for colour in ("red", "blue"))
    items = [Item([Reference(path)], "cat", seed=1) for path in (red, blue)]
    both = prompter.generate(items, num_steps=1)
    alone = prompter.generate(items[1:], num_steps=1)
    one, other, same = (torch.from_numpy(np.array(image)).float() for image in (*both, *alone))

    assert (one - other).abs().max() > 1 and (other - same).abs().max() <= 1
    blocks = prompter.family.blocks()
    made = [
        prompter([red, blue], "cat", seed=1, num_steps=1, blocks=weights)[0]
        for weights in ({blocks[0]: 1.0}, {blocks[1]: 1.0}, "ease in")
    ]
    assert made[0].tobytes() != made[1].tobytes() != made[2].tobytes()


CACHED = ["flux", *(pytest.param(name, marks=pytest.mark.slow) for name in ("chroma", "sd35_medium"))]


@pytest.fixture(scope="module")
def features(
    world: World, overrides_of: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[str]]:
    """Overrides that train a family from its cache, precomputed with the given options."""

    @cache
    def made(name: str, *options: str) -> list[str]:
        out = tmp_path_factory.mktemp("features")
        own = [*overrides_of(name), f"out={out}", "device=cpu", "num_workers=0", *options]
        precompute(composed("precompute", *world.overrides(), *own))
        return [*overrides_of(name), "data=cache", f"data.train={out}", "data.lanes.ranks=1", "data.lanes.workers=1"]

    return made


def without_text_encoders(overrides: list[str], folder: Path) -> list[str]:
    """The same base in another place, where the text encoders have no weights."""
    base = next(each for each in overrides if each.startswith("base.path=")).partition("=")[2]
    ignored = shutil.ignore_patterns("model.safetensors")  # of transformers; diffusers' has another name
    shutil.copytree(base, folder, ignore=ignored)
    return [*overrides, f"base.path={folder}"]


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize("text", ["ids", "states"])
def test_training_from_a_cache_is_training_online(
    name: str, text: str, train_in: Run, trained: Callable[[str], Path], features: Any, tmp_path: Path
) -> None:
    """The same losses within the rounding of half precision; with text states there need be no text encoders."""
    overrides = features(name, f"text={text}", "preview.text=cat")
    how = QUIET if text == "ids" else ("scoring=null", "preview.num_prompts=1", "preview.num_scored=0")
    overrides = overrides if text == "ids" else without_text_encoders(overrides, tmp_path / "base")
    cached = train_in(tmp_path / "cached", *overrides, *how, "preview.text=cat")
    one, other = ([*map(float, column(each, "train/loss").values())] for each in (trained(name), cached))

    assert one == pytest.approx(other, rel=0.02)
    assert (cached / "previews/step_000004.png").is_file() == (text == "states")


@pytest.mark.parametrize("name", CACHED)
def test_cached_states_are_what_the_text_encoders_give_in_bfloat16(
    name: str, world: World, features: Any, tmp_path: Path
) -> None:
    """To the bit, dropped texts too, where the base computes in bfloat16; token ids give them in training."""
    conditions = []
    for text in ("ids", "states"):
        overrides = features(name, f"text={text}", "base.dtype=bfloat16")
        cfg = compose(tmp_path / "run", *world.overrides(), *overrides, "base.dtype=bfloat16")
        data = instantiate(cfg.data)
        data.batch_size = 8
        model = build_model(cfg, data.texts)
        data.fit_to(image_size_px=16, reference_size_px=tiny.REFERENCE_PX, latent_shape=model.family.latent_shape(16))
        data.check_model(model)
        batches = list(islice(data.train_dataloader(), 4))
        assert any(batch.draws.drop_text_B.any() for batch in batches)
        assert bool(model.family.text_encoders) == (text == "ids")
        conditions.append([model.text_of(batch) for batch in batches])
    for online, cached in zip(*conditions, strict=True):
        assert cached.states_BLD.dtype == torch.bfloat16
        kept = slice(None) if online.mask_BL is None else online.mask_BL
        assert torch.equal(cached.states_BLD[kept], online.states_BLD[kept])
        for part in ("pooled_BE", "mask_BL"):
            assert (getattr(online, part) is None) or torch.equal(getattr(cached, part), getattr(online, part))


@pytest.mark.parametrize("name", CACHED)
def test_a_dry_run_with_states_counts_no_text_encoders(name: str, world: World, features: Any, tmp_path: Path) -> None:
    reports = {}
    for text in ("ids", "states"):
        cfg = compose(tmp_path / "run", *world.overrides(), *features(name, f"text={text}", "base.dtype=bfloat16"))
        reports[text] = dict(line.split(maxsplit=1) for line in dry_run(cfg).splitlines())

    assert "text_encoder" in reports["ids"]["base"] and "text_encoder" not in reports["states"]["base"]
    assert "with text states" in reports["states"]["data"] and "estimated" in reports["states"]["memory"]


@pytest.mark.slow
def test_a_run_from_states_resumes_to_the_bit(train_in: Run, features: Any, tmp_path: Path) -> None:
    overrides = [*QUIET, *features("flux", "text=states_fp8"), "preview.text=null"]
    whole = train_in(tmp_path / "whole", *overrides)
    assert_same_run(train_in(rewound(whole, tmp_path / "x"), *overrides), whole)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["preview.text=horse"], "preview.text=horse is not among .* ipa.tools.precompute"),
        (["base.text_tokens=6"], r"fingerprints: tokenizer .* \(base.path, base.text_tokens"),
        (["data.pairs.strip=[json.artist]"], r"choices: pairs\.strip"),
        (["data.texts=nowhere.safetensors"], r"nowhere\.safetensors cannot be read"),
    ],
)
def test_other_texts_than_the_cache_has_are_refused(
    given: list[str], message: str, train_in: Run, features: Any, tmp_path: Path
) -> None:
    cached = features("flux", "text=states", "preview.text=cat")
    with pytest.raises((UserError, InstantiationException), match=message):
        train_in(tmp_path / "run", *QUIET, *cached, "preview.text=cat", *given)


def test_warm_up_of_λ_follows_the_step() -> None:
    module = SimpleNamespace(model=SimpleNamespace(train_scale=None))
    for num_steps, step, expected in ((4, 0, 0.0), (4, 1, 0.25), (4, 9, 1.0), (0, 0, 1.0)):
        trainer: Any = SimpleNamespace(global_step=step)
        ScaleWarmup(num_steps).on_train_batch_start(trainer, module, None, 0)
        assert module.model.train_scale == expected


@pytest.mark.parametrize("name", ["flux", "chroma", "sd35_medium"])
def test_fsdp_shards_transformer_and_text_encoders_by_block(name: str) -> None:
    """All weights of the blocks are in a unit."""
    model = tiny_flow.make_model(tiny_flow.MAKERS[name])
    units = [type(block).__name__ for block in frozen_blocks(model)]
    transformer = model.family.transformer
    blocks = [*transformer.transformer_blocks, *getattr(transformer, "single_transformer_blocks", ())]

    assert all(block in frozen_blocks(model) for block in blocks)
    assert units.count("T5Block") == 2 and len(units) > len(blocks) + 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "strategy"),
    [(name, None, strategy) for name in ("flux", "sd35_medium") for strategy in ("ddp", "fsdp")]
    + [("chroma", "states", "ddp")],
)
def test_two_processes_train_as_one(
    name: str, text: str | None, strategy: str, world: World, train_in: Run, overrides_of: Any, features, tmp_path
) -> None:
    cached = [] if text is None else [*features(name, f"text={text}", "preview.text=cat"), "preview.text=cat"]
    own = cached or overrides_of(name)
    shared = (*QUIET, *own, "data.batch_size=null", "global_batch_size=4", "gradient_checkpointing=true")
    one = train_in(tmp_path / "one", *shared)
    processes = (f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true")
    together(train_all, [(tmp_path / "two", (*world.overrides(), "~logger.wandb", *processes, *shared))])
    weights = [checkpoint(folder)["state_dict"] for folder in (one, tmp_path / "two")]

    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=1e-3, msg=key)
    losses = [list(map(float, column(folder, "train/loss").values())) for folder in (one, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "chroma", "sd35_medium"])
def test_compiled_blocks_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients, with the adapter inside of the graphs; without generating code, which takes minutes."""
    found: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    for compiles in (False, True):
        torch._dynamo.reset()
        model = tiny.shake(tiny_flow.make_model(tiny_flow.MAKERS[name]))
        model.adapter.install()
        if compiles:
            model.compile_blocks()
        loss = model.errors(make_batch(model, 2, tiny.IMAGE_PX, cached=False)).loss
        found.append((loss.detach(), torch.autograd.grad(loss, model.trained())))

    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
