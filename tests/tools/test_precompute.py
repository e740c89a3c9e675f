"""From pictures to feature shards and to the losses of a training on them; kills, company, and refusals."""

import json
import os
import random
import re
import tarfile
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import toy_family
from composing import composed
from dirt import write_dirty_shard
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig
from PIL import Image
from tars import Members, saved, write_tar

from ipa.data.addresses import Address
from ipa.data.cache.format import CacheWriter, WrongCache
from ipa.data.cache.source import read_header
from ipa.data.cache.states import Texts
from ipa.data.records import Record
from ipa.data.rejects import Rejected
from ipa.errors import UserError
from ipa.tools.precompute.run import FrozenParts, check_finite, precompute
from ipa.tools.precompute.shards import read_share
from ipa.tools.precompute.texts import TextParts
from ipa.training.parts import build_model
from ipa.types import Batch, to_unit_range

SHARDS, SAMPLES = 3, 20
TWO_CAPTIONS = "data.captions={keys:[txt,alt],choice:random}"


def picture(draw: random.Random, size: tuple[int, int] = (20, 24)) -> bytes:
    return saved(Image.frombytes("RGB", (4, 4), draw.randbytes(48)).resize(size, Image.Resampling.BICUBIC), "PNG")


def samples(number: int) -> Members:
    """Every fifth sample has half a picture, every seventh no caption, every third a second caption."""
    draw, members = random.Random(number), Members()
    for i in range(SAMPLES):
        content = {"txt": f"thing {i}".encode(), "png": picture(draw, (20 + i, 24))}
        content |= {"png": content["png"][:60]} if i % 5 == 4 else {}
        content |= {"alt": b"something else"} if i % 3 == 0 else {}
        members += [(f"{number:03d}{i:03d}.{name}", content[name]) for name in content if (i % 7, name) != (6, "txt")]
    return members


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for number in range(SHARDS):
        write_tar(folder / f"{number:05d}.tar", samples(number))
    return folder


@pytest.fixture(scope="module")
def parts(shards: Path, base_folder: Path, clip_name: str) -> list[str]:
    """What precomputing and training have in common."""
    return [
        *("recipe=demo", f"base.path={base_folder}", f"encoder.name={clip_name}"),
        *("resampler.width=16", "resampler.heads=1", f"data.train={shards}", "data.val=null"),
    ]


def run(out: Path, *overrides: str) -> Path:
    """In this process, decoding too; returns the folder."""
    usual = ["data.background=null", "batch_size=4", "num_workers=0", "device=cpu"]
    precompute(composed("precompute", *usual, f"out={out}", *overrides))
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> Path:
    """A cache of the pooled embedding; only to be read."""
    return run(tmp_path_factory.mktemp("made") / "features", *parts)


def test_workers_change_no_byte(made: Path, parts: list[str], shards: Path, tmp_path: Path) -> None:
    assert sorted(contents(made)) == sorted(path.name for path in shards.iterdir())
    assert contents(run(tmp_path / "out", *parts, "num_workers=2")) == contents(made)


def test_text_states_come_in_a_second_pass_that_a_restart_resumes(
    made: Path, parts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes after a kill between the passes; another text is added without another pass."""
    watch_passes(monkeypatch)
    with caplog.at_level("INFO"):
        run(tmp_path / "dry", *parts, "text=states", "dry_run=true")
        assert not (tmp_path / "dry").exists() and "each of its captions at most 0.3 KiB of states" in caplog.text
        whole = run(tmp_path / "whole", *parts, "text=states")
    waiting = tmp_path / "parts/.without_states"
    waiting.mkdir(parents=True)
    (waiting / "00001.tar").write_bytes((made / "00001.tar").read_bytes())
    parted = run(tmp_path / "parts", *parts, "text=states")

    assert not waiting.exists() and f"3 shards with {count_samples(whole)} samples made" in caplog.text
    assert contents(parted) == contents(whole) and contents(whole).keys() == {*contents(made), "texts.safetensors"}
    before, times = contents(whole), {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    run(whole, *parts, "text=states", "preview.text=a horse")
    changed = {path.name for path in whole.iterdir() if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"texts.safetensors"} and contents(whole)["00000.tar"] == before["00000.tar"]
    assert Texts.read(str(whole / "texts.safetensors")).has(["", "red apple", "a horse"])
    with pytest.raises(WrongCache, match="text: states, here states_fp8"):
        run(whole, *parts, "text=states_fp8")


def watch_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where the text encoders are in memory together with the first pass's models, or with weights of others."""
    first, second, before = FrozenParts.__init__, TextParts.__init__, []

    def pictures(self: FrozenParts, family: Any, encoder: Any, *others: Any) -> None:
        assert family.unet.device.type == "meta" and not family.text_encoders
        before.extend([weakref.ref(family.vae), weakref.ref(encoder)])
        first(self, family, encoder, *others)

    def texts(self: TextParts, family: Any, *others: Any) -> None:
        assert all(each() is None for each in before)
        assert family.unet.device.type == family.vae.device.type == "meta"
        second(self, family, *others)

    monkeypatch.setattr(FrozenParts, "__init__", pictures)
    monkeypatch.setattr(TextParts, "__init__", texts)


def count_samples(folder: Path) -> int:
    number = 0
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            number += sum(name.endswith(".safetensors") for name in tar.getnames())
    return number


def train_batches(cfg: DictConfig, model: Any, number: int, image_size_px: int | None = None) -> list[Batch]:
    data = instantiate(cfg.data)
    data.batch_size = 5
    edge = image_size_px or model.family.image_size_px
    shape = model.family.latent_shape(edge)
    data.fit_to(image_size_px=edge, reference_size_px=model.encoder.image_size_px, latent_shape=shape)
    data.check_model(model)
    return list(islice(data.train_dataloader(), number))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> Path:
    """A cache that keeps the pooled embedding and the reference, with two captions of some samples."""
    return run(tmp_path_factory.mktemp("both") / "features", *parts, TWO_CAPTIONS, "keep=[pooled,reference]")


def test_training_sees_the_same_in_dirty_data_as_online(parts: list[str], tmp_path: Path) -> None:
    """Order, stand-ins for broken pictures, draws and positions; a pass counts the same rejects."""
    folder, expected = tmp_path / "data", Counter[str]()
    for number in range(3):
        expected += write_dirty_shard(folder / f"{number:05d}.tar", number, samples=24, share=0.4).rejects
    parts = [*parts, f"data.train={folder}", "data.lanes.ranks=1", "data.lanes.workers=2", "++data.window=20"]
    out = run(tmp_path / "features", *parts)
    parts += ["data.num_workers=0", "data.drops.text=0.2", "data.drops.image=0.2"]
    online, cached = (
        composed("train", *parts, "data.background=null"),
        composed("train", *parts, "data=cache", f"data.train={out}"),
    )
    model = build_model(online)
    for one, other in zip(train_batches(online, model, 30), train_batches(cached, model, 30), strict=True):
        for name in ("keys", "shards", "text", "position"):
            assert getattr(one, name) == getattr(other, name), name
        assert torch.equal(one.size_B6, other.size_B6)
        assert all(torch.equal(drawn, vars(other.draws)[name]) for name, drawn in vars(one.draws).items())
    for cfg in (online, cached):
        data, counted = instantiate(cfg.data), Counter[str]()
        data.fit_to(image_size_px=16, reference_size_px=tiny.REFERENCE_PX, latent_shape=(4, 8, 8))
        preparation, (source,) = data.train_preparation(), data.train_order.sources
        for found in (each for shard in source.shards for each in source.read(shard)):
            try:
                if isinstance(found, Rejected):
                    raise found
                preparation.sample(found, Address(0, 0, "", "", 0), None)
            except Rejected as reject:
                counted[reject.reason] += 1
        assert counted == expected


def test_aspect_buckets_are_kept_and_batches_have_one_each(parts: list[str], tmp_path: Path) -> None:
    buckets = "data.buckets=[[16,16],[24,16],[16,24]]"
    online = composed("train", *parts, "data.num_workers=0", "data.background=null", f"++{buckets}")
    out = run(tmp_path / "features", *parts, f"++{buckets}")
    cached = composed("train", *parts, "data=cache", f"data.train={out}", "data.num_workers=0", "data.lanes.ranks=1")
    model = build_model(online)
    data = instantiate(online.data)
    data.fit_to(image_size_px=16, reference_size_px=model.encoder.image_size_px, latent_shape=(4, 8, 8))
    preparation, (source,) = data.train_preparation(), data.train_order.sources
    records = {found.key: found for shard in source.shards for found in source.read(shard) if isinstance(found, Record)}
    seen = set()
    for batch in train_batches(cached, model, 20):
        (height, width) = batch.size_B6[0, 4:].tolist()
        assert batch.size_B6[:, 4:].unique(dim=0).tolist() == [[height, width]]
        seen.add((width, height))
        for i, key in enumerate(batch.keys):
            sample = preparation.sample(records[key], Address(0, 0, "", "", 0), (width, height))
            pixels = to_unit_range(sample.image_3HW[None])
            expected = model.family.encode_pixels(pixels).mean_BCHW[0]
            torch.testing.assert_close(batch.posterior.mean_BCHW[i].float(), expected, rtol=2e-3, atol=1e-3)
            assert torch.equal(batch.size_B6[i], sample.size_6)

    assert seen == {(16, 16), (24, 16)}
    for asked, said in (
        (f"{buckets}", None),
        ("data.buckets=[[16,16]]", r"choices: buckets \[\[16, 24\], .*, not \[\[16, 16\]\]"),
    ):
        cfg = composed("train", *parts, "data=cache", f"data.train={out}", "data.num_workers=0", asked)
        with nullcontext() if said is None else pytest.raises(WrongCache, match=said):
            train_batches(cfg, model, 1)


def test_a_family_with_packed_latents_and_two_tokenizers(parts: list[str], shards: Path, tmp_path: Path) -> None:
    """The family says what the cache keeps of a text: two rows of ids of different length for each caption."""
    with toy_family.installed(tmp_path) as toy:
        parts = [*parts, *toy, "data.num_workers=0", "data.lanes.ranks=1", "data.lanes.workers=1", TWO_CAPTIONS]
        out = run(tmp_path / "features", *parts)
        online, cached = composed("train", *parts), composed("train", *parts, "data=cache", f"data.train={out}")
        model = tiny.shake(build_model(online))
        model.adapter.install()
        for pictures, features in zip(train_batches(online, model, 4), train_batches(cached, model, 4), strict=True):
            assert {name: ids.shape[1] for name, ids in features.text_inputs.items()} == toy_family.LENGTHS
            assert features.text == pictures.text and features.image_B3HW is None
            with torch.no_grad():
                losses = [model.errors(batch).error_B for batch in (features, pictures)]
            torch.testing.assert_close(*losses, rtol=2e-3, atol=0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tarfile's stream is not closed
def test_two_ranks_make_all_and_a_restart_makes_what_a_dead_one_left(
    made: Path, parts: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of 2 is interrupted and killed in the middle of its only shard, and started again; a shard is lost."""
    out = tmp_path / "out"
    with caplog.at_level("INFO"):
        run(out, *parts, "rank=0", "world=2")
    assert sorted(os.listdir(out)) == ["00000.tar", "00002.tar"]
    assert "2 shards with" in caplog.text and "1 shards are left to other processes" in caplog.text
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    write = CacheWriter.sample

    def interrupted(self: CacheWriter, record: Record, *others: Any) -> None:
        if record.index > 9:
            raise KeyboardInterrupt
        write(self, record, *others)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "sample", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(out, *parts, "rank=1", "world=2")
    assert not (out / "00001.tar").exists()
    (out / ".00001.tar.4711.tmp").write_bytes((made / "00001.tar").read_bytes()[:2000])
    run(out, *parts, "rank=1", "world=2")

    assert contents(out) == contents(made)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    (out / "00002.tar").unlink()
    with caplog.at_level("INFO"):
        run(out, *parts)
    assert contents(out) == contents(made)
    assert "1 shards with" in caplog.text and "2 shards were complete" in caplog.text


SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}


@pytest.mark.parametrize(
    ("rank", "world", "environment", "share"),
    [
        (None, None, {}, (0, 1)),
        (0, 2, SLURM, (0, 2)),
        (None, None, SLURM, (3, 4)),
        (None, None, {"RANK": "1", "WORLD_SIZE": "2", **SLURM}, (1, 2)),
        (None, None, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),  # a batch script without srun
    ],
)
def test_shares_come_from_the_options_or_from_the_launcher(
    rank: int | None, world: int | None, environment: dict[str, str], share: tuple[int, int]
) -> None:
    assert read_share(rank, world, environment) == share


@pytest.mark.parametrize(("rank", "world"), [(1, None), (None, 2), (2, 2), (-1, 2)])
def test_shares_that_there_are_not_are_refused(rank: int | None, world: int | None) -> None:
    with pytest.raises(ValueError, match=rf"rank={rank} world={world}: give both or neither"):
        read_share(rank, world, {})


RANDOM = {
    "data.crop=random": r"data\.crop=random",
    "data.background={_target_:ipa.data.images.transforms.Background,white:0.5,colours:[red]}": (
        r"data\.background, white=0"
    ),
    "++data.augment={_target_:ipa.data.images.augment.Augmentation,flip:0.5}": r"data\.augment=.*flip=0\.5",
}


def test_random_choices_are_refused_by_name(made: Path, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.reference=\["):
        run(tmp_path / "out", *parts, "++data.reference=[ref.jpg,other.jpg]")
    with pytest.raises(UserError) as refused:
        run(tmp_path / "out", *parts, *RANDOM)
    cfg = composed("train", *parts, "data=cache", f"data.train={made}", *RANDOM)
    with pytest.raises(InstantiationException) as refused_in_training:
        instantiate(cfg.data)

    with pytest.raises(InstantiationException, match=r"data\.references\.chances=\[1, 2\].*one reference each"):
        instantiate(composed("train", *parts, "data=cache", f"data.train={made}", "data.references.chances=[1,2]").data)
    for message in (str(refused.value), str(refused_in_training.value.__cause__)):
        assert all(re.search(complaint, message) for complaint in RANDOM.values())
    assert not (tmp_path / "out").exists()


def test_masks_and_a_fixed_background_are_kept_and_required(parts: list[str], tmp_path: Path) -> None:
    draw, members = random.Random(0), Members()
    for i in range(6):
        mask = saved(Image.frombytes("L", (4, 4), draw.randbytes(16)).resize((24, 20)), "PNG")
        members += [(f"{i}.txt", b"a"), (f"{i}.png", picture(draw, (24, 20))), (f"{i}.mask.png", mask)]
    shard = write_tar(tmp_path / "masked/0.tar", members)
    red = "data.background={_target_:ipa.data.images.transforms.Background,white:0,colours:[red]}"
    masks = [*parts, f"data.train={shard}", "data.loss_mask=mask.png", "data.reference_mask=mask.png", red]
    made = run(tmp_path / "out", *masks)
    online = [*masks, "data.num_workers=0", "++data.window=8", "loss_mask_outside=0.1"]
    cached = [*online, "data=cache", f"data.train={made}", "data.lanes.ranks=1", "data.lanes.workers=1"]
    online_cfg, cached_cfg = composed("train", *online), composed("train", *cached, "data.background=null")
    model = tiny.shake(build_model(online_cfg))
    model.adapter.install()
    (pictures,), (features,) = (train_batches(cfg, model, 1) for cfg in (online_cfg, cached_cfg))
    assert torch.equal(pictures.loss_mask_B1HW, features.loss_mask_B1HW) and pictures.loss_mask_B1HW.float().std() > 10
    with torch.no_grad():
        expected = model.errors(pictures).error_B
        assert model.errors(replace(pictures, loss_mask_B1HW=None)).error_B.min() > 1.2 * expected.min()
        torch.testing.assert_close(model.errors(features).error_B, expected, rtol=2e-3, atol=0)
    assert read_header(str(made / "0.tar")).choices["background"] == "red"
    for other, name in (
        ("data.loss_mask=null", "loss_mask mask.png, not None"),
        ("data.reference_mask=alpha", "reference"),
        (red.replace("white:0", "white:1"), "background red, not white"),
    ):
        with pytest.raises((WrongCache, InstantiationException), match=name):
            instantiate(composed("train", *cached, other).data)


def test_a_cache_that_was_made_in_another_way_is_not_continued(made: Path, parts: list[str]) -> None:
    before = contents(made)
    with pytest.raises(WrongCache) as refused:
        run(
            made, *parts, "data.reference_fit=pad", "base.dtype=bfloat16", "image_size_px=32", "data.captions=json.text"
        )
    with pytest.raises(WrongCache, match=r"sizes kept: .*pooled.*reference"):
        run(made, *parts, "experiment=decoupled_fine_grained", "encoder.dtype=bfloat16")

    wanted = (
        "fingerprints vae: ",
        'choices reference_fit: "crop", here "pad"',
        "image_size_px: 16, here 32",
        "captions: ",
    )
    assert all(each in str(refused.value) for each in wanted)
    assert contents(made) == before


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["data.reference_fit=pad"], "choices: reference_fit crop, not pad"),
        (["image_size_px=32"], r"image_size_px 16, not 32; latent_shape \[4, 8, 8\], not \[4, 16, 16\]"),
        (
            ["base.dtype=bfloat16", "encoder.dtype=bfloat16"],
            "fingerprints: vae .*, not bfloat16.*encoder .*, not bfloat16",
        ),
        (["experiment=decoupled_fine_grained"], r"keeps pooled of each reference, but .* patches .*keep=\[reference\]"),
        (["data.buckets=sdxl"], "choices: buckets None, not "),
    ],
)
def test_training_with_other_parts_says_which_differs(
    overrides: list[str], complaint: str, made: Path, parts: list[str]
) -> None:
    cfg = composed("train", *parts, "data=cache", f"data.train={made}", *overrides)
    with pytest.raises((WrongCache, InstantiationException)) as refused:
        train_batches(cfg, build_model(cfg), 1, cfg.image_size_px)

    error = refused.value if isinstance(refused.value, WrongCache) else refused.value.__cause__
    assert isinstance(error, WrongCache) and re.search(complaint, str(error))


def test_several_sources_have_folders_of_their_own_and_are_mixed_by_their_weights(
    made: Path, both: Path, parts: list[str], shards: Path, tmp_path: Path
) -> None:
    plain = [part for part in parts if not part.startswith("data.train")]
    known = [f"data.known.{name}.{what}" for name in ("laion", "coyo") for what in (f"shards={shards}", "filters=null")]
    out = run(tmp_path / "out", *plain, "data=shards", "data.sources=[laion,coyo]", *known)
    laion, coyo = contents(out / "laion"), contents(out / "coyo")
    assert laion.keys() == coyo.keys() == contents(made).keys() and laion != coyo
    caches = [f"+data.caches.{name}={{shards:{out / name},weight:{w}}}" for name, w in (("laion", 3), ("coyo", 1))]
    cfg = composed("train", *plain, "data=cache", *caches, "data.num_workers=0", "data.lanes.ranks=1")
    sources = instantiate(cfg.data).train_order.sources

    assert [(source.name, source.weight, len(source.shards)) for source in sources] == [("laion", 3, 3), ("coyo", 1, 3)]
    assert len(train_batches(cfg, build_model(cfg), 3)) == 3
    misnamed = [caches[0].replace("caches.laion", "caches.mine"), caches[1]]
    with pytest.raises(InstantiationException, match=r"data\.caches\.mine was made from laion: use that name"):
        instantiate(composed("train", *plain, "data=cache", *misnamed).data)
    for path, said in ((made, None), (both, r"data\.caches\.train was not made as laion was: .*kept.*\W+full_key")):
        cfg = composed("train", *plain, "data=cache", caches[0], f"+data.caches.train.shards={path}")
        with nullcontext() if said is None else pytest.raises(InstantiationException, match=said):
            instantiate(cfg.data)


def test_a_shard_that_breaks_off_on_its_way_here_is_not_kept(
    made: Path, parts: list[str], shards: Path, tmp_path: Path
) -> None:
    pipes = [f"data.train='pipe:head -c {size} {shards / '00000.tar'}'" for size in (15_000, 1_000_000)]
    with pytest.raises(UserError, match=r"1 shards broke off while .* \(pipe:head -c 15000"):
        run(tmp_path / "out", *parts, pipes[0], "data.schemes=[pipe,file]")
    assert not list((tmp_path / "out").glob("*.tar"))
    run(tmp_path / "out", *parts, pipes[1], "data.schemes=[pipe,file]")

    assert (tmp_path / "out/00000.tar").read_bytes() == (made / "00000.tar").read_bytes()


def test_a_broken_file_is_kept_as_far_as_it_goes(parts: list[str], shards: Path, tmp_path: Path) -> None:
    broken = tmp_path / "00000.tar"
    broken.write_bytes((shards / "00000.tar").read_bytes()[:15_000])
    out = run(tmp_path / "out", *parts, f"data.train={broken}")
    with tarfile.open(out / "00000.tar") as tar:
        names = tar.getnames()
        closing = json.loads(tar.extractfile(names[-1]).read())

    assert closing["rejects"]["broken tar"] == 1
    assert closing["samples"] == sum(name.endswith(".safetensors") for name in names) > 0


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["text=words"], "text=words: give one of ids, states, states_fp8"),
        (["keep=[poled]"], r"keep=\['poled'\]: .* pooled, reference"),
        (["out=s3://bucket/features"], "out=s3://bucket/features"),
        (["device=quantum"], "device=quantum: "),
        (["data=cache", "data.train=MADE"], "data=cache is what this command writes"),
        (["data.train=[SHARDS,SHARDS]"], r"2 shards are called 00000\.tar"),
    ],
)
def test_options_are_checked(
    overrides: list[str], complaint: str, parts: list[str], made: Path, shards: Path, tmp_path: Path
) -> None:
    given = [each.replace("MADE", str(made)).replace("SHARDS", str(shards)) for each in overrides]
    with pytest.raises(ValueError, match=complaint):
        run(tmp_path / "out", *parts, *given)


def test_numbers_that_fp16_does_not_hold_are_not_written() -> None:
    records = [Record(f"{i}", "00000.tar", i, b"", ()) for i in range(3)]
    tensors = {"mean_CHW": torch.zeros(3, 2, 2), "logvar_CHW": torch.tensor([[0.0], [70_000.0], [0.0]]).half()}
    with pytest.raises(ValueError, match=r"00000\.tar, key 1: logvar_CHW .*base\.vae_dtype=float32"):
        check_finite(tensors, records)
