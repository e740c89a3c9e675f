"""Images of a system and their values: one file of values, and a strip of the first images, for each ``Ask``.

    python -m demo.paper.measuring runs/paper/measured/asks.json part=0

The asks of one system on one base share its weights. What is measured already is not measured again: a file's key is a
hash of everything that determines its values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from make_control import KINDS, residuals
from omegaconf import MISSING
from safetensors.torch import load_file, save_file
from torch import Tensor

from demo.paper.plan import CONTROLS, commit, short_hash
from demo.paper.prompts import Prompts, read_prompts
from ipa.cli import quiet_libraries
from ipa.files import read_json, write_atomically, write_json
from ipa.sampling import SamplingOptions
from ipa.tools.options import option, run_tool
from ipa.types import to_uint8

VERSION = 2  # of the metrics here: another number measures everything again


@dataclass(frozen=True)
class Ask:
    """What to draw: a ``system`` (``base`` for the base alone) on ``base``, with λ = ``scale``.

    ``text`` is "" or ``other``, the caption of another concept. ``control`` is "" or a structure control of
    ``plan.CONTROLS``, which gets the edges of another image prompt. ``prompts`` is heldout, unseen or own. ``seed``
    chooses the noise.
    """

    system: str
    base: str = ""
    scale: float = 1.0
    text: str = ""
    control: str = ""
    prompts: str = "heldout"
    seed: int = 1

    @property
    def name(self) -> str:
        parts = [self.system, self.base, f"scale{self.scale:g}", self.text and f"text-{self.text}", self.control]
        parts += ["" if self.prompts == "heldout" else self.prompts, f"noise{self.seed}"]
        return "_".join(part for part in parts if part)


@dataclass(frozen=True)
class Task:
    """An ask with what it needs: the system's file (None for one without), the base's folder, and the key."""

    ask: Ask
    file: str | None
    base: str
    key: str

    def is_done(self, folder: Path) -> bool:
        path = folder / f"{self.ask.name}.json"
        return path.is_file() and read_json(path).get("key") == self.key


@dataclass(frozen=True)
class Measured:
    """``values[name][i]`` belongs to the item ``items[i]``; ``strip_N3HW`` are the first images in uint8.

    ``commit`` is the one they were measured at, which need not be the page's.
    """

    values: dict[str, list[float]]
    items: list[str]
    parameters: int | None
    strip_N3HW: Tensor
    commit: str


def read_measured(folder: Path, ask: Ask) -> Measured:
    content = read_json(folder / f"{ask.name}.json")
    strip = load_file(folder / f"{ask.name}.safetensors")["strip"]
    return Measured(content["values"], content["items"], content["parameters"], strip, content["commit"])


def measure(
    tasks: Sequence[Task], sampling: dict[str, Any], count: int, shown: int, own: str | None, folder: Path
) -> None:
    read = partial(read_prompts, count=count, own=own)
    for (system, file, base), group in groupby(tasks, key=lambda task: (task.ask.system, task.file, task.base)):
        method = load_method(system.partition("@")[0], file, base)
        for task in group:
            if not task.is_done(folder):
                measure_one(method, task, read(task.ask.prompts), sampling, shown, folder)


@torch.no_grad()
def measure_one(method: Any, task: Task, prompts: Prompts, sampling: dict[str, Any], shown: int, folder: Path) -> None:
    ask = task.ask
    texts = {"": [""] * len(prompts), "other": prompts.other_texts}[ask.text]
    controls = prompts.control_pixels() if ask.control else None
    options = SamplingOptions(**sampling, scale=ask.scale)
    pieces = []
    for rows in torch.arange(len(prompts)).split(options.batch_size):
        given = prompts.given(rows.tolist(), texts, ask.seed)
        steered = nullcontext() if controls is None else steering(method, ask.control, controls[rows])
        with steered:
            pieces.append(method.generate(given, options))
    pixels = torch.cat(pieces)
    values = prompts.values(pixels, texts if ask.text else None)
    strip = {"strip": to_uint8(pixels[:shown]).contiguous()}
    write_atomically(folder / f"{ask.name}.safetensors", lambda path: save_file(strip, path))
    content = {
        "key": task.key,
        "commit": commit(),
        "ask": asdict(ask),
        "parameters": method.trained,
        "items": prompts.ids,
        "values": {name: [round(float(x), 6) for x in value] for name, value in values.items()},
    }
    write_json(folder / f"{ask.name}.json", content)  # last: its presence means that both are whole


def load_method(name: str, file: str | None, base: str) -> Any:
    from demo.paper.systems import SYSTEMS, load_system
    from ipa.evaluation.methods.ip_adapter import IPAdapterMethod

    if name in {*SYSTEMS, "reference"}:
        return load_system(name, None if file is None else Path(file), base)
    return IPAdapterMethod.from_pretrained(file, base=base)


@contextmanager
def steering(method: Any, control: str, control_B3HW: Tensor) -> Iterator[None]:
    """While inside, the base's UNet also gets what the control adds: any system, without code of its own."""
    from demo.paper.systems import added_arguments

    family = method.family if hasattr(method, "family") else method.model.family
    kind = KINDS[control][0]
    loaded = kind.from_pretrained(CONTROLS[control], torch_dtype=torch.float32).requires_grad_(False).eval()
    length = family.encode_text([""]).states_BLD.shape[1]

    def added(inputs: tuple[Any, ...], given: dict[str, Any]) -> dict[str, Any]:
        noisy_BCHW, time = inputs[:2]
        states_BLD = given["encoder_hidden_states"][:, :length]
        repeated = control_B3HW.repeat(len(noisy_BCHW) // len(control_B3HW), 1, 1, 1)
        own = residuals(loaded, noisy_BCHW, time, states_BLD, repeated)
        return {name: summed(value, given.get(name)) for name, value in own.items()}

    with added_arguments(family.unet, added):
        yield


def summed(own: Any, before: Any) -> Any:
    """A tensor or several, added to what a system already gives."""
    if before is None:
        return own
    return own + before if isinstance(own, Tensor) else [one + other for one, other in zip(own, before, strict=True)]


def key_of(ask: Ask, *inputs: Any) -> str:
    return short_hash(VERSION, asdict(ask), inputs)


@dataclass
class Options:
    asks: str = option(MISSING, "file with the tasks and settings")
    part: int = option(0, "of the list of parts", at_least=0)


def run(options: Any) -> None:
    content = read_json(Path(options.asks))
    tasks = [Task(**{**task, "ask": Ask(**task["ask"])}) for task in content["parts"][options.part]]
    measure(tasks, content["sampling"], content["count"], content["shown"], content["own"], Path(options.asks).parent)


def main() -> None:
    quiet_libraries()
    run_tool(sys.argv[1:], Options, run, __doc__, positional=("asks",))


if __name__ == "__main__":
    main()
