"""``dry_run=true``: nothing is loaded, downloaded or left behind."""

from pathlib import Path

import documented
import forked
import pytest
import torch

from ipa.export.storage import load_adapter
from ipa.families.published import PUBLISHED
from ipa.training.dry_run import GIB, dry_run, hollow_model, step_maker
from ipa.training.memory import estimate_peak
from ipa.weights import count_parameters

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def report(*overrides: str) -> dict[str, str]:
    lines = dry_run(documented.composed("train", overrides)).splitlines()
    return {line[:12].strip(): line[12:] for line in lines}


def test_report_of_the_demo_world() -> None:
    """Sizes are those of the committed files."""
    found = report("experiment=decoupled_global")
    tensors, _ = load_adapter(ROOT / "demo/adapters/decoupled_global.safetensors")
    trained = sum(tensor.numel() for tensor in tensors.values())

    assert found["trained"].startswith(f"{trained:,} parameters")
    assert "3,558 samples in 12 shards" in found["data"]
    assert found["steps"] == "2,000 of 16 samples: 32,000, 9.0 passes over the data"
    assert found["download"] == "nothing"
    assert "MiB for a step of 16 samples in one process" in found["memory"]


FREE = ("optimizer=schedule_free", "schedule=constant", "ema.decay=null")


@pytest.mark.parametrize(
    ("options", "numbers"),
    [((), 3), (("ema.decay=null",), 2), (("optimizer=adamw",), 4), (("optimizer=prodigy",), 6), (FREE, 4)],
)
def test_a_checkpoint_has_weights_average_and_the_optimizers_state(options: tuple[str, ...], numbers: int) -> None:
    """In numbers of four bytes for each weight, as real checkpoints have them."""
    disk = report("experiment=decoupled_global", *options)["disk"]

    assert f"checkpoints of {4 * numbers * 324_352 / 2**20:.1f} MiB" in disk
    assert ("two adapter files" in disk) == ("ema.decay=null" not in options or options == FREE)


def test_command_leaves_nothing_behind(tmp_path: Path) -> None:
    """Also where little can be known: a fork, as this test uses, can compute no gradients for the memory."""
    here, temporary = tmp_path / "here", tmp_path / "tmp"
    here.mkdir()
    temporary.mkdir()
    options = ("recipe=sd15", "base.path=nobody/nothing", "data.train=/nowhere", "dry_run=true")
    environment = {"TMPDIR": str(temporary)}
    done = forked.run(ROOT / "train.py", *options, cwd=here, environment=environment)

    assert done.returncode == 0, done.stderr
    assert "not known" in done.stdout
    assert not list(here.iterdir())
    assert not list(temporary.glob("ipa*"))


def test_unknowns_are_reported_with_their_reason() -> None:
    found = report("recipe=sd15", "base.path=nobody/nothing", "data.train=/nowhere")

    assert "nobody/nothing: neither the hub nor its cache has this" in found["not known"]
    assert found["data"].startswith("unknown: no such shard: '/nowhere'")
    assert found["steps"].startswith("1,000,000 of 64 samples")
    assert "memory" not in found


SD15 = {"vae": 83_653_863, "text_encoder": 123_060_480}


@pytest.mark.parametrize(
    ("base", "parameters"),
    [
        ("sd15", {**SD15, "unet": 859_520_964}),
        ("sd21", {**SD15, "unet": 865_910_724, "text_encoder": 340_387_840}),
        ("sdxl", {**SD15, "unet": 2_567_463_684}),
        ("flux_dev", {"transformer": 11_901_408_320}),
        ("chroma", {"transformer": 8_899_983_424}),
        ("sd35_medium", {"transformer": 2_243_171_520}),
        ("sd35_large", {"transformer": 8_056_627_520}),
    ],
)
def test_known_bases_have_their_published_sizes(base: str, parameters: dict[str, int]) -> None:
    with torch.device("meta"):
        parts = PUBLISHED[documented.composed("train", (f"base={base}",)).base.path]()
        assert {name: count_parameters(parts[name]) for name in parameters} == parameters


@pytest.mark.slow
def test_memory_of_the_large_recipes_is_that_of_the_table() -> None:
    """docs/performance.md: SD 1.5 online, one sample 4.41 GiB, checkpointing 3.73."""
    for options, gib in (((), 4.41), (("gradient_checkpointing=true",), 3.73)):
        cfg = documented.composed("train", ("recipe=sd15", "data.train=/nowhere", *options))
        model = hollow_model(cfg)

        assert estimate_peak(model, step_maker(cfg), 1, 512) / GIB == pytest.approx(gib, rel=0.01)


@pytest.mark.slow
def test_report_of_a_quantized_transformer() -> None:
    """docs/performance.md: FLUX.1-dev, one sample at 512 px, in nf4."""
    nf4 = ("base.quantization=nf4", "base.text_quantization=nf4")
    found = report("recipe=flux", *nf4, "data.train=/nowhere", "data.batch_size=1")

    assert "transformer 11,901.4 M" in found["base"] and "about 17.5 GiB" in found["memory"]
