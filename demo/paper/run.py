"""The command's work: plan, train, measure, write. What is finished is kept, so it continues where it was stopped."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from torch import Tensor

from demo.paper.claims import Read, Section, crossings, find
from demo.paper.frozen import find_frozen
from demo.paper.measuring import Ask, Task, key_of, read_measured
from demo.paper.page import read_notes, write_page
from demo.paper.plan import (
    BASE,
    CONTROLS,
    DENOISING_S,
    ENCODER,
    HELDOUT,
    JUDGE,
    START_S,
    TRAIN,
    UNSEEN,
    Job,
    Settings,
    adapters,
    hash_of,
    read_list,
    short_hash,
    train_adapter,
    train_base,
    train_system,
)
from demo.paper.prompts import read_prompts
from demo.paper.running import run_jobs
from demo.paper.sections import sections_of
from ipa.files import write_json
from ipa.ranges import whole
from ipa.types import to_uint8

FROZEN, FINE_GRAINED = 1, 4  # the sections with figures of their own


def make_page(cfg: DictConfig) -> None:
    """Raises UserError."""
    started = time.perf_counter()
    settings = Settings.of(cfg)
    every = sections_of(settings)
    sections, notes = chosen(every, cfg.sections), read_notes(settings.out, [section.number for section in every])
    given = [each for each in HydraConfig.get().overrides.task if not each.startswith("sections=")]
    plan = Plan(settings, given)
    asks = list(dict.fromkeys(ask for section in sections for ask in section.asks()))
    for kind in {ask.prompts for ask in asks}:
        read_prompts(kind, settings.items, settings.own)  # a broken picture is told before the trainings
    run_jobs(plan.jobs(asks), settings.jobs, "training")
    run_jobs(plan.measurements(asks), settings.jobs, "measuring")
    read = cache(partial(read_measured, plan.folder))
    figures = {
        "commit": ", ".join(sorted({read(ask).commit for ask in asks})),
        "date": date.today().isoformat(),
        "settings": settings.described(),
        "texts": read_prompts("heldout", settings.items).other_texts[: settings.shown],
        "sections": [figures_of(section, plan, read) for section in sections],
    }
    page = write_page(settings.out, figures, notes, sections, read, partial(first_prompts, settings))
    print(
        f"wrote {page}, page.html and figures.json; this call took {(time.perf_counter() - started) / 60:.1f} minutes"
    )


def figures_of(section: Section, plan: Plan, read: Read) -> dict[str, Any]:
    content = find(section, read)
    if section.number == FROZEN:
        content |= find_frozen(plan.adapter(section), plan.settings)
    if section.number == FINE_GRAINED:
        content["crossing"] = crossings(content["charts"][0]["lines"])
    return {**content, "commands": plan.commands(section)}


def first_prompts(settings: Settings, kind: str) -> Tensor:
    """In uint8; ``edges`` are those that structure controls get with the held-out ones."""
    prompts = read_prompts("heldout" if kind == "edges" else kind, settings.items, settings.own)
    pixels = 2 * prompts.control_pixels() - 1 if kind == "edges" else prompts.pixels_B3HW
    return to_uint8(pixels[: settings.shown])


def chosen(sections: Sequence[Section], numbers: Any) -> list[Section]:
    if numbers is None:
        return list(sections)
    wanted = read_list("sections", numbers, whole(1, len(sections)))
    return [section for section in sections if section.number in wanted]


@dataclass(frozen=True)
class Measurement(Job):
    """A process that measures several asks."""

    def is_done(self) -> bool:
        return self.progress() == 1


class Plan:
    """Which jobs the asks need, and where their results are."""

    def __init__(self, settings: Settings, given: Sequence[str] = ()) -> None:
        shared = (settings.steps, settings.items, settings.num_steps, settings.guidance, settings.base_minutes)
        self.settings, self.given = settings, given  # the options on the command line, except sections
        self.folder = settings.work / "measured" / short_hash(shared, settings.shown)  # a trial leaves the rest alone

    def job(self, system: str) -> Job | None:
        """None for a system that is not trained here."""
        name, _, rest = system.partition("-")
        if name in adapters():
            return train_adapter(name, int(rest.partition("@")[0]), self.settings)
        return None if system == "reference" else train_system(system, self.settings)

    def needed(self, ask: Ask) -> list[Job]:
        jobs = [self.job(ask.system), train_base(ask.base, self.settings) if ask.base else None]
        return [job for job in jobs if job is not None]

    def jobs(self, asks: Iterable[Ask]) -> list[Job]:
        every = {job.folder: job for ask in asks for job in self.needed(ask)}
        return list(every.values())

    def file(self, system: str) -> Path | None:
        job = self.job(system)
        if job is None:
            return None
        _, at, step = system.partition("@")
        if at:
            return job.folder / "checkpoints" / f"step_{int(step):08d}.ckpt"
        return job.folder / ("adapter.safetensors" if job.result.name == "summary.json" else "system.safetensors")

    def task(self, ask: Ask) -> Task:
        file = self.file(ask.system)
        base = str(train_base(ask.base, self.settings).result) if ask.base else BASE
        inputs = [base, ENCODER, JUDGE, HELDOUT, TRAIN, *([CONTROLS[ask.control]] if ask.control else [])]
        inputs += [] if file is None else [str(file)]
        inputs += [UNSEEN] if ask.prompts == "unseen" else []
        inputs += [str(self.settings.own)] if ask.prompts == "own" else []
        key = key_of(ask, self.sampling(), self.settings.items, self.settings.shown, [hash_of(each) for each in inputs])
        return Task(ask, None if file is None else str(file), base, key)

    def sampling(self) -> dict[str, Any]:
        return {"num_steps": self.settings.num_steps, "guidance": self.settings.guidance}

    def measurements(self, asks: Iterable[Ask]) -> list[Job]:
        """One job for each process, each with whole groups of a system and a base, about as many asks."""
        tasks = [task for task in map(self.task, asks) if not task.is_done(self.folder)]
        groups: dict[tuple[str, str], list[Task]] = {}
        for task in tasks:
            groups.setdefault((task.ask.system, task.base), []).append(task)
        parts: list[list[Task]] = [[] for _ in range(min(self.settings.jobs, len(groups)))]
        for each in sorted(groups.values(), key=len, reverse=True):
            min(parts, key=len).extend(each)
        content = {
            "parts": [[asdict(task) for task in part] for part in parts],
            "sampling": self.sampling(),
            "count": self.settings.items,
            "shown": self.settings.shown,
            "own": self.settings.own,
        }
        path = self.folder / "asks.json"
        if parts:
            write_json(path, content)
        return [self.measurement(path, number, part) for number, part in enumerate(parts)]

    def measurement(self, path: Path, number: int, part: Sequence[Task]) -> Job:
        command = ("python", "-m", "demo.paper.measuring", str(path), f"part={number}")
        images = len(part) * self.settings.items
        seconds = START_S + images * self.settings.num_steps * DENOISING_S

        def progress() -> float:
            return sum(task.is_done(self.folder) for task in part) / len(part)

        return Measurement(f"{images} images", (command,), self.folder / "logs" / str(number), path, seconds, progress)

    def adapter(self, section: Section) -> Path:
        """The file of its first row."""
        file = self.file(section.asks()[0].system)
        assert file is not None
        return file

    def commands(self, section: Section) -> list[str]:
        """The trainings in the order of the rows, then the measurement."""
        lines = [line for job in self.jobs(section.asks()) for line in job.shown()]
        return [*lines, shlex.join(["python", "-m", "demo.paper", f"sections=[{section.number}]", *self.given])]
