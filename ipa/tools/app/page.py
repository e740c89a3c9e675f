"""The page: what its buttons do."""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock
from typing import Any, Self

import gradio as gr
import torch

from ipa.errors import UserError
from ipa.presets import own_presets, preset_names
from ipa.prompter import Prompter, batches
from ipa.sampling import SamplingOptions
from ipa.tools.app.layout import Offer, canvas, make_inputs, make_outputs
from ipa.tools.app.settings import as_command, as_python, read_page
from ipa.tools.app.uploads import Files, check_picture, check_pictures
from ipa.tools.pictures import write_picture
from ipa.tools.sample import check, items_of, label, make, pipeline_of

log = logging.getLogger(__name__)

PICTURES = ("image", "mask", "start_image", "control")  # settings that name files of the job
PROGRESS = gr.Progress()
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class Cancelled(Exception):
    """The user has cancelled the job, or has gone."""


class Job:
    """One or several ``calls`` of a pipeline; it replaces the pipeline's progress bar."""

    def __init__(self, show: gr.Progress) -> None:
        self.show, self.calls, self.call, self.step, self.num_steps = show, 1, 0, 0, 0
        self.stop = Event()

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Self:
        """What diffusers pipelines call before their first step."""
        self.call, self.step, self.num_steps = self.call + 1, 0, total or 1
        self.update(0)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, steps: int = 1) -> None:
        """After each step; raises Cancelled, which ends the pipeline."""
        if self.stop.is_set():
            raise Cancelled
        self.step += steps
        part = f"part {self.call} of {self.calls}" if self.calls > 1 else ""
        self.show((self.step, self.num_steps), desc=part)


class Page:
    """``fixed`` are the settings that the page's own command line decides on."""

    def __init__(self, prompter: Prompter, fixed: dict[str, Any]) -> None:
        self.prompter, self.fixed = prompter, fixed
        self.jobs: dict[str, Job] = {}  # by the session's name
        self.model_lock = Lock()  # a cancelled job ends after its step, when the next one has begun
        self.sampling = SamplingOptions(**prompter.defaults)
        self.edge_px = self.sampling.image_size_px or prompter.family.image_size_px

    def offer(self) -> Offer:
        family, adapters = self.prompter.family, self.fixed["adapter"]
        return Offer(
            [(label("adapter", number, self.fixed), each) for number, each in enumerate(adapters)],
            preset_names(family.blocks(), own_presets(family.source)),
            self.edge_px,
            family.size_multiple_px,
            self.sampling.num_steps,
            self.sampling.guidance,
            self.sampling.guidance_rescale,
            self.fixed["control_model"] is not None,
        )

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="ipa", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True) as blocks:
            gr.Markdown("# Image prompts\nThe adapter makes new images from your pictures and your text.")
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=300):
                    self.inputs = make_inputs(self.offer())
                with gr.Column(scale=1, min_width=300, elem_id="results"):
                    self.outputs = make_outputs()
            self.connect(blocks)
        return blocks

    def connect(self, blocks: gr.Blocks) -> None:
        inputs, out = self.inputs, self.outputs
        values = list(inputs.values())
        shown = [out.command, out.python, out.files]
        waiting: dict[str, Any] = {"show_progress_on": out.status, "concurrency_limit": 1, "api_visibility": "private"}
        generating = out.generate.click(self.generate, values, [out.status, out.picture, *shown], **waiting)
        out.cancel.click(self.cancel, None, out.status, queue=False, cancels=generating, **HIDDEN)
        out.show.click(self.show, values, [out.status, *shown], concurrency_limit=2, **HIDDEN)
        inputs["image"].upload(self.check_pictures, inputs["image"], [inputs["image"], out.status], **HIDDEN)
        for name in ("start_image", "control"):
            inputs[name].upload(self.check_picture, inputs[name], [inputs[name], out.status], **HIDDEN)
        for name in ("width", "height"):
            inputs[name].change(resized, [inputs["width"], inputs["height"]], inputs["mask"], **HIDDEN)
        blocks.unload(self.stop)

    # buttons

    async def generate(self, request: gr.Request, show: Any = PROGRESS, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        out, session = self.outputs, str(request.session_hash)
        job = self.jobs[session] = Job(show)
        with TemporaryDirectory() as name:
            folder = Path(name)
            try:
                settings, files = await asyncio.to_thread(self.prepare, values, folder)
                await asyncio.to_thread(self.make, job, settings, folder)
                yield {
                    **self.shown(settings, files),
                    out.picture: str(folder / "picture.png"),
                    out.status: message("Ready. The file contains its settings.", *self.notes(settings)),
                }
            except Cancelled:
                yield {out.status: message("Cancelled.")}
            except Exception as error:
                yield {out.status: problem(explained(error, folder))}
            finally:
                job.stop.set()  # gradio cancels this function, not its thread
                if self.jobs.get(session) is job:
                    del self.jobs[session]

    def cancel(self, request: gr.Request) -> str:
        self.stop(request)
        return message("Cancelled.")

    def stop(self, request: gr.Request) -> None:
        if job := self.jobs.get(str(request.session_hash)):
            job.stop.set()

    async def show(self, *values: Any) -> AsyncIterator[dict[Any, Any]]:
        with TemporaryDirectory() as name:
            try:
                settings, files = await asyncio.to_thread(self.prepare, values, Path(name))
                yield {**self.shown(settings, files), self.outputs.status: ""}
            except Exception as error:
                yield {self.outputs.status: problem(explained(error, Path(name)))}

    async def check_pictures(self, pictures: Any) -> tuple[Any, str]:
        paths = [Path(path) for path, _ in pictures or []]
        good, complaints = await asyncio.to_thread(check_pictures, paths)
        return [str(path) for path in good] if complaints else gr.skip(), problem(*complaints)

    async def check_picture(self, path: str | None) -> tuple[Any, str]:
        try:
            await asyncio.to_thread(check_picture, Path(str(path)))
        except UserError as error:
            return None, problem(str(error))
        return gr.skip(), ""

    # what they do

    def prepare(self, values: Sequence[Any], folder: Path) -> tuple[dict[str, Any], Files]:
        """Checked settings, and the pictures that they name; raises UserError."""
        page, files = dict(zip(self.inputs, values, strict=True)), Files(folder)
        size = page["width"] or self.edge_px, page["height"] or self.edge_px
        for name, edge in zip(("width", "height"), size, strict=True):
            self.prompter.family.check_size(edge, name)
        page["image"] = [files.add(path) for path, _ in page["image"] or []]
        page |= {name: files.add(page[name]) for name in ("start_image", "control")}
        page["mask"] = files.add_mask(page["mask"], size)
        if page["guidance_rescale"] == self.sampling.guidance_rescale:
            page["guidance_rescale"] = None  # the default, which pipelines that have none leave out
        settings = read_page(page, self.fixed, self.edge_px)
        check(at(settings, folder))
        return settings, files

    def make(self, job: Job, settings: dict[str, Any], folder: Path) -> None:
        here = at(settings, folder)
        calls = len(list(batches(items_of(here), self.sampling.batch_size)))
        job.calls = calls * (1 + settings["keep_outside"])  # once more without the pictures
        chosen = [self.prompter.models[self.fixed["adapter"].index(each)] for each in settings["adapter"]]
        prompter = replace(self.prompter, models=chosen)
        with self.model_lock:
            pipeline, arguments = pipeline_of(prompter, here)
            pipeline.progress_bar = job.progress_bar
            write_picture(make(prompter, here, pipeline, arguments), folder / "picture.png", settings)

    def shown(self, settings: dict[str, Any], files: Files) -> dict[Any, Any]:
        out, made = self.outputs, [str(files.folder / name) for name in files.made]
        return {
            out.command: gr.Code(as_command(settings), visible=True),
            out.python: gr.Code(as_python(settings), visible=True),
            out.files: gr.File(made, visible=bool(made)),
        }

    def notes(self, settings: dict[str, Any]) -> list[str]:
        """What of the texts the base does not read."""
        texts = (*settings["text"], settings["negative_text"])
        rests = [rest for text in texts if (rest := self.prompter.family.cut_off(text))]
        return [f"The text is too long for this base, which does not read its end: … {rest}" for rest in rests]


def at(settings: dict[str, Any], folder: Path) -> dict[str, Any]:

    def moved(value: Any) -> Any:
        return [str(folder / each) for each in value] if isinstance(value, list) else value and str(folder / value)

    return settings | {name: moved(settings[name]) for name in PICTURES}


def resized(width: float | None, height: float | None) -> Any:
    return gr.skip() if not (width and height) else gr.HTML("", **canvas(int(width), int(height)))


def explained(error: Exception, folder: Path) -> str:
    """A message without paths of the server."""
    if isinstance(error, UserError):
        return str(error).replace(f"{folder}/", "")
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "there is not enough memory for this: ask for fewer or smaller images"
    log.error("a job failed", exc_info=error)
    return "this went wrong on the server, whose console has the details"


def message(*lines: str) -> str:
    return "".join(f'<p role="status">{html.escape(line)}</p>' for line in lines)


def problem(*lines: str) -> str:
    return "".join(f'<p class="problem" role="alert">{html.escape(line)}</p>' for line in lines)
