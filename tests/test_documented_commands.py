"""The commands and examples of README and docs that are marked to run, as a reader would type them, but shortened.

Those of a page run one after the other in a folder with the checkout's files and the pictures that the page names.
"""

import re
import shutil
import tarfile
from pathlib import Path

import documented
import forked
import pytest
import torch
from documented import PAGES, ROOT, RUN
from PIL import Image
from safetensors.torch import load_file

PICTURES = ("photo.png", "cat.png", "dog.png", "PICTURE", "front.png", "side.png", "edges.png", "blurred.png")
TRAIN = (
    *("trainer.max_steps=2", "global_batch_size=4", "sampling.num_steps=2", "preview.every_n_steps=2"),
    *("preview.num_prompts=2", "preview.num_scored=2", "scoring.num_prompts=2", "~logger.wandb"),
)
SHORT = {
    "train.py": TRAIN,
    "evaluate.py": ("benchmark.limit=2", "num_seeds=1", "sampling.num_steps=2"),
    "ipa.tools.sample": ("num_steps=2",),
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "PATH": "/usr/bin:/bin",
}
RUNNING = [page for page in PAGES if any(RUN in block.marks for block in documented.blocks(page))]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What the pages speak of: a checkout, pictures with and without captions, masks, an adapter in two forms."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("train.py", "evaluate.py", "demo", "conf"):
        (here / name).symlink_to(ROOT / name)
    with tarfile.open(ROOT / "demo/data/heldout/00000.tar") as shard:
        members = [member for member in shard if member.name.endswith((".webp", ".png"))][: len(PICTURES)]
        for name, member in zip(PICTURES, members, strict=True):
            picture = Image.open(shard.extractfile(member)).convert("RGB")  # type: ignore[arg-type]
            picture.save(here / name, "PNG")
    for name in ("mask.png", "left.png", "right.png"):
        Image.new("L", (64, 64), 255).save(here / name)
    for name in ("FOLDER", "PICTURES", "photos", "pictures"):
        (here / name).mkdir()
        for number, picture in enumerate(PICTURES[:4]):
            shutil.copy(here / picture, here / name / f"{number}.png")
            (here / name / f"{number}.txt").write_text(f"picture {number}")
    rows = [f"{number}.png,picture {number}" for number in range(4)]
    (here / "photos/labels.csv").write_text("\n".join(["file,title", *rows]))
    adapter = ROOT / "demo/adapters/decoupled_global.safetensors"
    shutil.copy(adapter, here / "FILE.safetensors")
    nested: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in load_file(adapter).items():
        part, _, key = name.partition(".")
        nested[part][key] = tensor
    torch.save(nested, here / "plus.bin")
    return here


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING)
def test_commands_of_a_page_run(page: str, place: Path) -> None:
    for command in documented.commands(page):
        if RUN in command.marks:
            run(command, place)
    names: dict[str, object] = {}
    for block in documented.blocks(page):
        if block.language == "python" and RUN in block.marks:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                exec(compile(block.text, f"{page}:{block.line}", "exec"), names)


def run(command: documented.Command, place: Path) -> None:
    words = [in_place(word, place) for word in documented.as_python(command.words)]
    script, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
    short = () if {"--help", "--cfg"} & set(arguments) else SHORT.get(script, ())
    short += ("sampling.scale=0,1",) if "sweep=scale" in arguments else ()
    given = [first(word) if "-m" in arguments else word for word in arguments]
    done = forked.run(file_of(script), *given, *short, cwd=place, environment=ENVIRONMENT)

    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def in_place(word: str, place: Path) -> str:
    """``/data/mine`` is in the page's folder, and ``FILE`` an adapter there."""
    word = re.sub(r"(^|=)/data/", rf"\1{place}/data/", word)
    return f"{word}.safetensors" if word == "adapter=FILE" else word


def first(word: str) -> str:
    """The first two jobs of a sweep."""
    key, equals, values = word.partition("=")
    return f"{key}{equals}{','.join(values.split(',')[: 2 if key == 'experiment' else 1])}" if equals else word


def file_of(script: str) -> Path:
    """A script of the checkout, or the file of a module."""
    if script.endswith(".py"):
        return ROOT / script
    path = ROOT / script.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
