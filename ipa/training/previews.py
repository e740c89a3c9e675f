"""Previews: the same held-out image prompts with the same seeds at fixed steps, as a grid and as scores.

Loss says little about an adapter; these pictures do. Rows are held-out image prompts; columns are the prompt itself,
λ = 0, 0.5 and 1 with the empty text, and λ = 1 with a text.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ipa.checkpoint import write_atomically
from ipa.data.transforms import cover, fit_reference, read_picture
from ipa.metrics.border import BorderColour
from ipa.metrics.clip import ClipScorer
from ipa.metrics.clip_scores import ClipCosines
from ipa.metrics.pixels import fit_square
from ipa.model import IPAdapterModel
from ipa.sampling import SamplingOptions, generate
from ipa.training.checkpointing import is_due
from ipa.training.loggers import log_now, log_picture
from ipa.types import Features, to_uint8, to_unit_range

log = logging.getLogger(__name__)

SCALES = (0.0, 0.5, 1.0)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class HeldOutPrompts:
    """Held-out pictures as image prompts: uint8 images and references (B3HW) and their captions."""

    def __init__(self, images_B3HW: Tensor, references_B3HW: Tensor, captions: list[str]) -> None:
        self.images_B3HW, self.references_B3HW, self.captions = images_B3HW, references_B3HW, captions

    @classmethod
    def from_datamodule(cls, datamodule: Any, count: int) -> HeldOutPrompts | None:
        """The first ``count`` validation samples, fewer if there are fewer; None without validation data."""
        loader = datamodule.val_dataloader()
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
        """Every picture of a folder, by name, its caption from the `.txt` beside it (empty without one).

        Raises FileNotFoundError without pictures, ValueError for one that cannot be read.
        """
        paths = pictures_in(folder)
        pictures = [read_picture(path, "preview.images") for path in paths]
        images = torch.stack([cover(picture, (image_size_px, image_size_px)) for picture in pictures])
        references = torch.stack([fit_reference(picture, reference_size_px, reference_fit) for picture in pictures])
        captions = [path.with_suffix(".txt") for path in paths]
        return cls(images, references, [path.read_text().strip() if path.is_file() else "" for path in captions])

    @classmethod
    def find(cls, datamodule: Any, folder: str | Path | None, count: int) -> HeldOutPrompts | None:
        """The first ``count`` prompts of ``folder``, without one those of the validation shards."""
        if folder is None:
            return cls.from_datamodule(datamodule, count)
        sizes = (datamodule.image_size_px, datamodule.reference_size_px)
        return cls.from_folder(folder, *sizes, datamodule.reference_fit).head(count)

    def __len__(self) -> int:
        return len(self.captions)

    def head(self, count: int) -> HeldOutPrompts:
        return HeldOutPrompts(self.images_B3HW[:count], self.references_B3HW[:count], self.captions[:count])


def pictures_in(folder: str | Path) -> list[Path]:
    """By name; raises FileNotFoundError when there are none."""
    paths = sorted(path for path in Path(folder).glob("*") if path.suffix.lower() in PICTURES)
    if not paths:
        raise FileNotFoundError(f"preview.images={folder}: no pictures there ({', '.join(PICTURES)})")
    return paths


def encode(model: IPAdapterModel, prompts: HeldOutPrompts, batch_size: int = 64) -> Features:
    pieces = [model.encode_reference(piece.to(model.device)) for piece in prompts.references_B3HW.split(batch_size)]
    fields = [[getattr(piece, name) for piece in pieces] for name in ("pooled_BE", "patches_BPF")]
    return Features(*(None if found[0] is None else torch.cat(found) for found in fields))


def generate_from(
    model: IPAdapterModel, prompts: HeldOutPrompts, options: SamplingOptions, seed: int, texts: list[str] | None = None
) -> Tensor:
    """One picture per prompt, empty text unless ``texts`` are given; seeds ``seed``, ``seed + 1`` …"""
    texts = texts or [""] * len(prompts)
    return generate(model, encode(model, prompts), texts, range(seed, seed + len(prompts)), options)


def score_prompts(
    model: IPAdapterModel, scorer: ClipScorer, prompts: HeldOutPrompts, options: SamplingOptions, seed: int
) -> dict[str, float]:
    """Generate from every prompt with the empty text, and score: see ``ClipCosines`` and ``BorderColour``."""
    captions = [[caption] for caption in prompts.captions] if any(prompts.captions) else None
    pixels, references = generate_from(model, prompts, options, seed), to_unit_range(prompts.images_B3HW)
    scores: dict[str, float] = {}
    for metric in (ClipCosines(scorer, sync_on_compute=False), BorderColour(sync_on_compute=False)):
        metric.update(pixels, references, captions)
        scores |= {name: float(value) for name, value in metric.compute().items()}
    return scores


def draw_grid(columns: list[Tensor], titles: list[str], cell_px: int = 96) -> Image.Image:
    """Pictures in [-1, 1] as a grid, one tensor B3HW per column, titles above."""
    header_px, gap_px = 18, 4
    pitch = cell_px + gap_px
    grid = Image.new("RGB", (pitch * len(columns) + gap_px, pitch * len(columns[0]) + header_px + gap_px), "white")
    pen = ImageDraw.Draw(grid)
    for x, (column, title) in enumerate(zip(columns, titles, strict=True)):
        pen.text((gap_px + x * pitch, 3), title, fill="black")
        for y, picture in enumerate(to_uint8(fit_square(column, column.shape[-1]))):
            cell = Image.fromarray(picture.permute(1, 2, 0).numpy()).resize(
                (cell_px, cell_px), Image.Resampling.NEAREST
            )
            grid.paste(cell, (gap_px + x * pitch, header_px + gap_px + y * pitch))
    return grid


class Previews(L.Callback):
    """At every ``every_n_steps`` and at the last step: a grid in ``folder``, and scores over ``num_scored`` prompts.

    Prompts are the pictures in ``images``, or the held-out shards'. ``text`` is what the last column asks for. Without
    a scorer there are pictures only.
    """

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
            pictures_in(images)  # told at once, and not when all is loaded
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.options = options
        self.num_prompts, self.num_scored = num_prompts, num_scored
        self.text, self.images, self.seed, self.scorer = text, images, seed, scorer
        self.prompts: HeldOutPrompts | None = None
        self.last: Path | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.prompts = HeldOutPrompts.find(datamodule, self.images, max(self.num_prompts, self.num_scored))
        if self.prompts is None and trainer.is_global_zero:
            log.info("no previews: give preview.images=FOLDER, pictures to prompt with, or data.val=SHARDS")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if is_due(trainer, batch_idx, self.every_n_steps) and trainer.is_global_zero and self.prompts is not None:
            with pl_module.product():
                self.preview(trainer, pl_module)

    def preview(self, trainer: L.Trainer, pl_module: Any) -> None:
        model, step, prompts = pl_module.model, trainer.global_step, self.prompts
        assert prompts is not None
        grid = self.draw(model, prompts.head(self.num_prompts))
        self.last = self.folder / f"step_{step:06d}.png"
        write_atomically(self.last, lambda beside: grid.save(beside, format="PNG"))
        for logger in trainer.loggers:
            log_picture(logger, "preview/grid", grid, step)
        if self.scorer is not None:
            scores = score_prompts(model, self.scorer, prompts.head(self.num_scored), self.options, self.seed)
            self.tell(trainer, {f"preview/{name}": value for name, value in scores.items()})

    def tell(self, trainer: L.Trainer, scores: dict[str, float]) -> None:
        """To the loggers, and to the callbacks that want to know the best step."""
        log_now(trainer, scores)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in scores.items()})

    def draw(self, model: IPAdapterModel, prompts: HeldOutPrompts) -> Image.Image:
        columns, titles = [to_unit_range(prompts.images_B3HW)], ["prompt"]
        for scale in SCALES:
            columns.append(generate_from(model, prompts, self.options.with_scale(scale), self.seed))
            titles.append(f"scale {scale:g}")
        if self.text:
            columns.append(generate_from(model, prompts, self.options, self.seed, [self.text] * len(prompts)))
            titles.append(f"+ {self.text}")
        return draw_grid(columns, titles)
