"""What goes wrong: a clear message that names what was given, and nothing half-written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Command, Run, World, column, picture, samples, write_shard
from safetensors.torch import load_file, save_file

from ipa.cli import explain_failure

REFUSED = [
    (
        ["data.train=PLACE/nowhere"],
        ["no such shard: 'PLACE/nowhere'", "PLACE holds captionless", "Give a folder"],
    ),
    (["data.train=[]"], ["the list of shards is empty", "Give a folder"]),
    (["data.val=PLACE/no.tar"], ["no such shard: 'PLACE/no.tar'"]),
    (["data.train=PLACE/captionless"], ["no usable sample", "no caption: 2", "data.caption_key"]),
    (["data.train=PLACE/captionless", "data.num_workers=1"], ["no usable sample", "no caption: 2"]),
    (["data.val=PLACE/captionless"], ["no usable sample", "no caption: 2"]),
    (["base.path=PLACE/nowhere"], ["base.path=PLACE/nowhere", "Give a diffusers pipeline folder"]),
    (["base.path=PLACE"], ["base.path=PLACE", "model_index.json", "pipeline folder"]),
    (["encoder.name=local-dir:PLACE/nowhere"], ["encoder.name=local-dir:PLACE/nowhere", "open_clip_config.json"]),
    (["encoder.name=ViT-Q-99"], ["encoder.name=ViT-Q-99", "local-dir:FOLDER"]),
    (["judge.name=local-dir:PLACE/nowhere"], ["local-dir:PLACE/nowhere", "open_clip_config.json"]),
    (["tokens.num_tokens=0"], ["tokens.num_tokens=0", "at least one"]),
    (["tokens.num_tokens=3"], ["tokens.num_tokens=3", "assume 4 tokens", "tokens.num_tokens=4"]),
    (["data.drops.text=2"], ["drop rates", "text=2"]),
]


@pytest.mark.parametrize(("overrides", "expected"), REFUSED, ids=lambda value: " ".join(value))
def test_bad_input_is_refused_in_words(
    train_in: Run, tmp_path: Path, overrides: list[str], expected: list[str]
) -> None:
    """The command prints ``explain_failure`` and exits with 1; where that has no words the user sees a traceback."""
    write_shard(tmp_path / "captionless/00000.tar", [("a.png", picture(0)), ("b.png", picture(1))])
    place = str(tmp_path)

    with pytest.raises(Exception) as caught:  # noqa: PT011 - the words are looked at below
        train_in(tmp_path / "x", *(override.replace("PLACE", place) for override in overrides))

    message = explain_failure(caught.value)
    assert message is not None
    for words in expected:
        assert words.replace("PLACE", place) in message
    assert sorted(path.name for path in (tmp_path / "x").rglob("*") if path.is_file()) in ([], ["config.yaml"])


def test_command_tells_bad_input_without_a_traceback(start: Command, tmp_path: Path) -> None:
    process = start("data.train=nowhere", "~logger.wandb")
    output, _ = process.communicate(timeout=200)

    assert process.returncode == 1
    assert "no such shard: 'nowhere'" in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs/decoupled_global/x/checkpoints").exists()


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


def test_full_disk_leaves_the_last_checkpoint(start: Command, half_done: Path) -> None:
    """A limit on the size of files stands for the full disk: previews and adapter fit, the checkpoint does not."""
    files = [half_done / name for name in ("checkpoints/last.ckpt", "config.yaml")]
    content = files[0].read_bytes()
    limit = len(content) // 2
    assert (half_done / "adapter.safetensors").stat().st_size < limit

    process = start("~logger.wandb", "scoring=null", "trainer.max_steps=4", setup=FULL_DISK.format(limit=limit))
    output, _ = process.communicate(timeout=200)

    assert process.returncode == 1, output
    assert "could not write" in output
    assert ".ckpt" in output
    assert "free some space" in output
    assert "Traceback" not in output
    assert files[0].read_bytes() == content
    assert torch.load(files[0], weights_only=True)["global_step"] == 2
    assert [path.name for path in half_done.rglob("*.tmp")] == []
    assert sorted(path.name for path in (half_done / "checkpoints").iterdir()) == ["last.ckpt", "step_000002.ckpt"]


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
