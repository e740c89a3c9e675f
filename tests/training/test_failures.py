"""What goes wrong: a clear message that names what was given, and nothing half-written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_sdxl
import torch
from conftest import EXPERIMENTS, Command, Run, World, column, last_checkpoint, picture, samples, write_shard
from safetensors.torch import load_file, save_file

from ipa.cli import explain_failure
from ipa.errors import UserError
from ipa.training.checkpointing import read_checkpoint

REFUSED = [
    (
        ["data.train=PLACE/nowhere"],
        ["no such shard: 'PLACE/nowhere'", "PLACE holds captionless", "Give a folder"],
    ),
    (["data.train=[]"], ["the list of shards is empty", "Give a folder"]),
    (["data.val=PLACE/no.tar"], ["no such shard: 'PLACE/no.tar'"]),
    (["data.train=PLACE/captionless"], ["no usable sample", "no caption: 2", "data.captions"]),
    (["data.train=PLACE/captionless", "data.num_workers=1"], ["no usable sample", "no caption: 2"]),
    (["data.val=PLACE/captionless"], ["no usable sample", "no caption: 2"]),
    (["base.path=PLACE/nowhere"], ["base.path=PLACE/nowhere", "Give a diffusers pipeline folder"]),
    (["base.path=PLACE"], ["base.path=PLACE", "model_index.json", "pipeline folder"]),
    (["encoder.name=local-dir:PLACE/nowhere"], ["encoder.name=local-dir:PLACE/nowhere", "open_clip_config.json"]),
    (["encoder.name=ViT-Q-99"], ["encoder.name=ViT-Q-99", "local-dir:FOLDER"]),
    (["judge.name=local-dir:PLACE/nowhere"], ["local-dir:PLACE/nowhere", "open_clip_config.json"]),
    (["tokens.num_tokens=3"], ["diffusers takes tokens.num_tokens=4 for granted, it is 3", "adapter.layout=ipa"]),
    (["data.drops.text=2"], ["drop rates", "text=2"]),
]
# what is refused although not a weight of base or encoder could be read
BEFORE_WEIGHTS = [
    (["tokens.num_tokens=0"], ["tokens.num_tokens=0", "at least one"]),
    (["tokens.no_image=foo"], ["tokens.no_image=foo", "blank, zeros"]),
    (
        ["experiment=decoupled_fine_grained", "resampler.depth=2"],
        ["resampler.depth=4 for granted, it is 2", "adapter.layout=ipa"],
    ),
    (["experiment=simple_global", "adapter.layout=diffusers"], ["simple adapters", "adapter.layout=ipa"]),
    (["adapter.layout=foo"], ["layout=foo", "diffusers, comfyui, ipa"]),
    (["base=sdxl", "base.path=PLACE/base"], ["PLACE/base is a Stable Diffusion 1.x or 2.x pipeline", "base=sd15"]),
    (["base.path=PLACE/sdxl"], ["PLACE/sdxl is a Stable Diffusion XL pipeline", "base=sdxl"]),
    (["adapter.init_from=PLACE/no.safetensors"], ["PLACE/no.safetensors", "no such file"]),
    (["preview.images=PLACE/empty"], ["preview.images=PLACE/empty", "no pictures there"]),
    (["trainer.devices=0"], ["trainer.devices=0", "1 or more"]),
    (["scale_lr=cubic"], ["scale_lr=cubic", "linear or sqrt"]),
    (["ema.decay=1"], ["ema.decay=1", "below 1"]),
    (
        ["data.batch_size=null", "global_batch_size=32", "trainer.accumulate_grad_batches=3"],
        ["global_batch_size=32", "accumulate_grad_batches=3", "a multiple of 3", "data.batch_size"],
    ),
]


def message_of(train_in: Run, place: Path, overrides: list[str]) -> str:
    """What the command prints before it exits with 1; where there are no words the user would see a traceback."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - the words are looked at by the caller
        train_in(place / "x", *(override.replace("PLACE", str(place)) for override in overrides))
    message = explain_failure(caught.value, str(place))
    assert message is not None, caught.value
    assert sorted(path.name for path in (place / "x").rglob("*") if path.is_file()) in ([], ["config.yaml"])
    return message


@pytest.fixture
def bare(tmp_path: Path, world: World) -> list[str]:
    """Bases and an encoder with their configuration files alone, as overrides."""
    (tmp_path / "empty").mkdir()
    tiny_sdxl.make_family().pipeline().save_pretrained(tmp_path / "sdxl")
    shutil.copytree(world.base, tmp_path / "base")
    shutil.copytree(world.encoder.removeprefix("local-dir:"), tmp_path / "encoder")
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    return ["base.path=PLACE/base", "encoder.name=local-dir:PLACE/encoder"]


@pytest.mark.parametrize(("overrides", "expected"), BEFORE_WEIGHTS, ids=lambda value: " ".join(value))
def test_what_cannot_work_is_refused_before_weights_are_read(
    train_in: Run, tmp_path: Path, bare: list[str], overrides: list[str], expected: list[str]
) -> None:
    message = message_of(train_in, tmp_path, [*bare, *overrides])

    assert "safetensors" not in message or "init_from" in overrides[0]
    for words in expected:
        assert words.replace("PLACE", str(tmp_path)) in message


def test_weights_that_are_missing_are_told_by_their_folder(train_in: Run, tmp_path: Path, bare: list[str]) -> None:
    """So the weights are really not there in the test above, and what is refused there is refused before."""
    assert str(tmp_path / "base") in message_of(train_in, tmp_path, bare)


@pytest.mark.parametrize(("overrides", "expected"), REFUSED, ids=lambda value: " ".join(value))
def test_bad_input_is_refused_in_words(
    train_in: Run, tmp_path: Path, overrides: list[str], expected: list[str]
) -> None:
    write_shard(tmp_path / "captionless/00000.tar", [("a.png", picture(0)), ("b.png", picture(1))])

    message = message_of(train_in, tmp_path, overrides)

    for words in expected:
        assert words.replace("PLACE", str(tmp_path)) in message


def test_command_tells_bad_input_without_a_traceback(start: Command, tmp_path: Path) -> None:
    process = start("data.train=nowhere", "~logger.wandb")
    output, _ = process.communicate(timeout=200)

    assert process.returncode == 1
    assert "no such shard: 'nowhere'" in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs/decoupled_global/x/checkpoints").exists()


def test_command_names_the_experiments_that_there_are(start: Command, tmp_path: Path) -> None:
    process = start("experiment=decoupled_globl")
    output, _ = process.communicate(timeout=200)

    assert process.returncode == 2
    assert "Did you mean experiment=decoupled_global" in output
    for name in EXPERIMENTS:
        assert name in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


def break_in_the_middle(path: Path) -> None:
    """Overwrite the header of the second half's first member."""
    content = bytearray(path.read_bytes())
    middle = content.index(b"000000203.txt")
    content[middle : middle + 512] = b"\xff" * 512
    path.write_bytes(content)


def test_dirty_data_is_skipped_and_counted(train_in: Run, tmp_path: Path, world: World) -> None:
    """A broken tar, broken pictures and a sample without caption, beside good shards; eight steps are one pass."""
    broken = write_shard(tmp_path / "dirty/00000.tar", samples(range(200, 206)))
    break_in_the_middle(broken)
    dirt = [("a.txt", b"a thing"), ("a.png", picture(1)[:60]), ("b.png", picture(2)), ("c.txt", b"c"), ("c.png", b"no")]
    write_shard(tmp_path / "dirty/00001.tar", [*dirt, *samples([300, 301, 302])])

    folder = train_in(
        tmp_path / "x",
        f"data.train=[{tmp_path}/dirty,{world.train}]",
        "trainer.max_steps=8",
        "preview.every_n_steps=8",
        "scoring=null",
    )

    for reason, count in {"broken tar": 1, "broken picture": 2, "no caption": 1}.items():
        counts = [float(value) for value in column(folder, f"data/rejected/{reason}").values()]
        assert counts == sorted(counts)
        assert counts[-1] == count
    assert len(column(folder, "train/loss")) == 8
    assert '"samples rejected": 4' in (folder / "summary.json").read_text()


def test_loss_that_blows_up_stops_the_run(train_in: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss of step 2 is (nan|inf)") as caught:
        train_in(tmp_path / "x", "optimizer.lr=1e30", "preview.every_n_steps=4")

    message = explain_failure(caught.value)
    assert message is not None
    assert "00000.tar" in message or "00001.tar" in message
    assert message.count("0000000") == 4  # the keys of the batch
    assert "optimizer.lr" in message
    assert list(column(tmp_path / "x", "train/loss")) == [1]
    assert not (tmp_path / "x/checkpoints").exists()


def test_broken_frozen_weight_is_noticed_at_the_first_step(train_in: Run, tmp_path: Path, world: World) -> None:
    base = Path(shutil.copytree(world.base, tmp_path / "base"))
    weights = base / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.weight"][0, 0, 0, 0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})

    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        train_in(tmp_path / "x", f"base.path={base}")


def test_weights_that_nobody_can_use_are_not_saved(train_in: Run, tmp_path: Path) -> None:
    """Finite in fp32, but too large for the fp16 of the adapter file."""
    with pytest.raises(ValueError, match=r"after step 1 .* not finite or too large"):
        train_in(tmp_path / "x", "optimizer.lr=1e6", "preview.every_n_steps=1", "data.val=null", "scoring=null")

    assert not (tmp_path / "x/adapter.safetensors").exists()
    assert not (tmp_path / "x/checkpoints").exists()


FULL_DISK = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"


@pytest.fixture
def half_done(train_in: Run, tmp_path: Path) -> Callable[..., Path]:
    """A run of two steps in the folder where ``start`` goes on, nothing else than steps in it."""
    return train_in(tmp_path / "runs/decoupled_global/x", "trainer.max_steps=2", "scoring=null")


@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint(start: Command, half_done: Path) -> None:
    """A limit on the size of files stands for the full disk: previews and adapter fit, the checkpoint does not."""
    last = last_checkpoint(half_done)
    content = last.read_bytes()
    limit = len(content) // 2
    assert (half_done / "adapter.safetensors").stat().st_size < limit

    process = start("~logger.wandb", "scoring=null", "trainer.max_steps=4", setup=FULL_DISK.format(limit=limit))
    output, _ = process.communicate(timeout=200)

    assert process.returncode == 1, output
    assert "could not write" in output
    assert ".ckpt" in output
    assert "free some space" in output
    assert "Traceback" not in output
    assert last.read_bytes() == content
    assert read_checkpoint(last)["global_step"] == 2
    assert [path.name for path in half_done.rglob("*.tmp")] == []
    assert sorted(path.name for path in (half_done / "checkpoints").iterdir()) == ["step_00000002.ckpt"]


def test_a_run_goes_on_when_its_full_disk_has_room_again(train_in: Run, small_disk: Path, finished: Path) -> None:
    """A file system that is really full: the run says so, its last checkpoint is whole, and it ends as ever."""
    folder = train_in(small_disk / "x", "trainer.max_steps=2", "scoring=null")
    last, filler = last_checkpoint(folder), small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))

    with pytest.raises(UserError, match=r"step_00000004\.ckpt needs .* MB are free there.*same command then goes on"):
        train_in(folder)

    assert read_checkpoint(last)["global_step"] == 2 and last_checkpoint(folder) == last
    filler.unlink()
    train_in(folder)
    assert column(folder, "train/loss") == column(finished, "train/loss")
    adapters = (load_file(each / "adapter.safetensors") for each in (folder, finished))
    for one, other in zip(*(each.items() for each in adapters), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1])


@pytest.mark.slow
def test_full_disk_leaves_the_last_adapter(start: Command, half_done: Path) -> None:
    adapter = half_done / "adapter.safetensors"
    content = adapter.read_bytes()
    limit = len(content) - 1000
    quiet = ("data.val=null", "scoring=null", "~logger.wandb")  # no preview, which would be the first to fail

    process = start(*quiet, "trainer.max_steps=4", setup=FULL_DISK.format(limit=limit))
    output, _ = process.communicate(timeout=200)

    assert process.returncode == 1, output
    assert "could not write" in output
    assert adapter.read_bytes() == content
    assert [path.name for path in half_done.rglob("*.tmp")] == []
