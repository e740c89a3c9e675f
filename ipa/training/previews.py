"""Previews: the same held-out image prompts with the same seeds at fixed steps, as a grid and as scores.

A row of the grid is an image prompt: itself, λ = 0, 0.5 and 1 with the empty text, and λ = 1 with a text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ipa.data.images.transforms import cover, fit_reference, read_picture
from ipa.data.order.lanes import Share
from ipa.distributed import rank_and_world, send_to_first
from ipa.files import pictures_in, read_text, write_atomically
from ipa.metrics.border import BorderColour
from ipa.metrics.clip import ClipScorer
from ipa.metrics.clip_scores import ClipCosines
from ipa.metrics.image_metric import fit_square
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, generate, rows
from ipa.training.hooks import Order, TrainingCallback, falls_on, is_due
from ipa.training.loggers import log_now, log_picture
from ipa.training.stopping import Stopped
from ipa.types import Features, to_uint8, to_unit_range

log = logging.getLogger(__name__)

SCALES = (0.0, 0.5, 1.0)


@dataclass
class HeldOutPrompts:
    """Held-out images as image prompts, uint8, and their captions."""

    images_B3HW: Tensor
    references_B3HW: Tensor
    captions: list[str]

    @classmethod
    def from_datamodule(cls, datamodule: Any, count: int) -> HeldOutPrompts | None:
        """Up to ``count`` validation samples, the same on every rank; None without validation data."""
        loader = datamodule.val_dataloader(Share())
        if isinstance(loader, list):
            return None
        images, references, captions = [], [], []
        for batch in loader:
            images.append(batch.image_B3HW)
            references.append(batch.reference_B3HW)
            captions += batch.text
            if len(captions) >= count:
                break
        return cls(torch.cat(images)[:count], torch.cat(references)[:count], captions[:count])

    @classmethod
    def from_folder(
        cls, folder: str | Path, image_size_px: int, reference_size_px: int, reference_fit: str = "crop"
    ) -> HeldOutPrompts:
        """All images of a folder by name, with captions from `.txt` files (or empty). Raises UserError."""
        paths = pictures_in(folder, "preview.images")
        pictures = [read_picture(path, "preview.images") for path in paths]
        images = torch.stack([cover(picture, (image_size_px, image_size_px)) for picture in pictures])
        references = torch.stack([fit_reference(picture, reference_size_px, reference_fit) for picture in pictures])
        captions = [path.with_suffix(".txt") for path in paths]
        return cls(images, references, [read_text(path).strip() if path.is_file() else "" for path in captions])

    @classmethod
    def find(cls, datamodule: Any, folder: str | Path | None, count: int) -> HeldOutPrompts | None:
        """The first ``count`` prompts of ``folder``, or of the validation shards if it is None."""
        if folder is None:
            return cls.from_datamodule(datamodule, count)
        images = datamodule.images
        sizes = (images.image_size_px, images.reference_size_px)
        return cls.from_folder(folder, *sizes, images.reference_fit).head(count)

    def __len__(self) -> int:
        return len(self.captions)

    def head(self, count: int) -> HeldOutPrompts:
        return HeldOutPrompts(self.images_B3HW[:count], self.references_B3HW[:count], self.captions[:count])


def encode(model: IPAdapterModel, prompts: HeldOutPrompts, batch_size: int = 64) -> Features:
    pieces = [model.encode_reference(piece.to(model.device)) for piece in prompts.references_B3HW.split(batch_size)]
    return Features.join(torch.cat, pieces)


@dataclass
class Column:
    """One image per prompt, all with the same ``text``, from seeds ``seed``, ``seed + 1`` …"""

    prompts: HeldOutPrompts
    options: SamplingOptions
    seed: int
    text: str = ""

    def batches(self) -> list[range]:
        """A fixed partition, regardless of which rank runs it: kernels round differently at other batch sizes."""
        size = self.options.batch_size
        return [range(start, min(start + size, len(self.prompts))) for start in range(0, len(self.prompts), size)]

    def generate(self, model: IPAdapterModel, features: Features, batch: range) -> Tensor:
        chosen, seeds = rows(features, torch.tensor(batch)), [self.seed + number for number in batch]
        pixels = generate(model, chosen, [self.text] * len(batch), seeds, self.options)
        return pixels.contiguous()  # as received from another rank, or a scorer would round differently


def generate_columns(model: IPAdapterModel, columns: Sequence[Column]) -> list[Tensor]:
    """The images of every column, pixels_B3HW, on the first rank; the others return an empty list.

    All ranks call this and share the work: batch i, counted through all columns, is generated by rank i % world. In
    the last round a rank without a batch repeats the first, since with sharded weights every rank takes part in every
    pass.
    """
    features = [encode(model, column.prompts) for column in columns]
    work = [(column, batch) for column in range(len(columns)) for batch in columns[column].batches()]
    rank, world = rank_and_world()
    made = {}
    for first in range(0, len(work), world):
        column, batch = work[first + rank if first + rank < len(work) else 0]
        with model.eagerly():
            made[first + rank] = columns[column].generate(model, features[column], batch)
    pieces = send_to_first(made, [len(batch) for _, batch in work], model.device)
    if rank != 0:
        return []
    of_column = [number for number, _ in work]
    return [torch.cat([p for p, c in zip(pieces, of_column, strict=True) if c == n]) for n in range(len(columns))]


def score_pictures(
    scorer: ClipScorer, prompts: HeldOutPrompts, pixels_B3HW: Tensor, device: torch.device | str
) -> dict[str, float]:
    """Scores of the images generated from the prompts, with the scorer on ``device``; see the two metrics."""
    captions = [[caption] for caption in prompts.captions] if any(prompts.captions) else None
    references = to_unit_range(prompts.images_B3HW)
    scores: dict[str, float] = {}
    with scorer.on(device):
        for metric in (ClipCosines(scorer, sync_on_compute=False), BorderColour(sync_on_compute=False)):
            metric.update(pixels_B3HW, references, captions)
            scores |= {name: float(value) for name, value in metric.compute().items()}
    return scores


def draw_grid(columns: list[Tensor], titles: list[str], cell_px: int = 96) -> Image.Image:
    """Images in [-1, 1] as a grid, one tensor B3HW per column, with titles."""
    header_px, gap_px = 18, 4
    pitch = cell_px + gap_px
    grid = Image.new("RGB", (pitch * len(columns) + gap_px, pitch * len(columns[0]) + header_px + gap_px), "white")
    pen = ImageDraw.Draw(grid)
    for x, (column, title) in enumerate(zip(columns, titles, strict=True)):
        pen.text((gap_px + x * pitch, 3), title, fill="black")
        for y, picture in enumerate(to_uint8(fit_square(column, column.shape[-1]))):
            cell = Image.fromarray(picture.permute(1, 2, 0).numpy())
            resized = cell.resize((cell_px, cell_px), Image.Resampling.NEAREST)
            grid.paste(resized, (gap_px + x * pitch, header_px + gap_px + y * pitch))
    return grid


class Previews(TrainingCallback):
    """Every ``every_n_steps`` and at the last step: a grid in ``folder``, and scores over ``num_scored`` prompts.

    Prompts are the images in ``images``, or the held-out shards. ``text`` is the prompt of the last column. Without a
    scorer there are images only. The checkpoint of a step is written before its preview, so a run that resumes there
    makes the preview first. Previews may be interrupted within ``interruptible``.
    """

    order = Order.PREVIEW

    def __init__(
        self,
        folder: str | Path,
        every_n_steps: int,
        options: SamplingOptions,
        num_prompts: int = 8,
        num_scored: int = 32,
        text: str = "",
        images: str | Path | None = None,
        seed: int = 0,
        scorer: ClipScorer | None = None,
    ) -> None:
        if images is not None:
            pictures_in(str(images), "preview.images")  # raises before the models are loaded
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.options = options
        self.num_prompts, self.num_scored = num_prompts, num_scored
        self.text, self.images, self.seed = text, images, seed
        self.scorer = scorer if num_scored else None
        self.prompts: HeldOutPrompts | None = None
        self.last: Path | None = None
        self.interruptible: Callable[[], AbstractContextManager[object]] = nullcontext

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        most = max(self.num_prompts, self.num_scored)
        if most == 0:
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.prompts = HeldOutPrompts.find(datamodule, self.images, most)
        if self.prompts is None and trainer.is_global_zero:
            log.info("no previews: give preview.images=FOLDER, images to prompt with, or data.val=SHARDS")

    def on_ready(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step > 0 and falls_on(trainer.global_step, trainer.max_steps, self.every_n_steps):
            self.preview(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_due(trainer, batch_idx, self.every_n_steps):
            self.preview(trainer, pl_module)

    def preview(self, trainer: L.Trainer, pl_module: Any) -> None:
        """All ranks call this and share the work."""
        if self.prompts is None:
            return
        try:
            with self.interruptible():
                with pl_module.product():
                    pictures = generate_columns(pl_module.model, self.columns(self.prompts))
                if trainer.is_global_zero:
                    self.show(trainer, self.prompts, pictures)
        except Stopped:
            log.info("the preview of step %d is made when the run resumes", trainer.global_step)

    def columns(self, prompts: HeldOutPrompts) -> list[Column]:
        """The columns of the grid, then the scored images if there is a scorer."""
        columns = []
        if self.num_prompts:
            shown = prompts.head(self.num_prompts)
            columns += [Column(shown, self.options.with_scale(scale), self.seed) for scale in SCALES]
            columns += [Column(shown, self.options, self.seed, self.text)] if self.text else []
        if self.scorer is not None:
            columns += [Column(prompts.head(self.num_scored), self.options, self.seed)]
        return columns

    def show(self, trainer: L.Trainer, prompts: HeldOutPrompts, pictures: list[Tensor]) -> None:
        if self.scorer is not None:
            scored, device = prompts.head(self.num_scored), trainer.strategy.root_device
            self.log_scores(trainer, score_pictures(self.scorer, scored, pictures.pop(), device))
        if pictures:
            self.log_grid(trainer, self.draw(prompts.head(self.num_prompts), pictures))

    def log_scores(self, trainer: L.Trainer, scores: Mapping[str, float]) -> None:
        shown = {f"preview/{name}": value for name, value in scores.items()}
        log_now(trainer, shown)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in shown.items()})  # Checkpoints

    def log_grid(self, trainer: L.Trainer, grid: Image.Image) -> None:
        self.last = self.folder / f"step_{trainer.global_step:06d}.png"
        write_atomically(self.last, lambda temporary: grid.save(temporary, format="PNG"))
        for logger in trainer.loggers:
            log_picture(logger, "preview/grid", grid, trainer.global_step)

    def draw(self, prompts: HeldOutPrompts, pictures: list[Tensor]) -> Image.Image:
        titles = ["prompt", *(f"scale {scale:g}" for scale in SCALES), *([f"+ {self.text}"] if self.text else [])]
        return draw_grid([to_unit_range(prompts.images_B3HW), *pictures], titles)
