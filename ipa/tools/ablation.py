"""Compare the variants of a sweep: one table, one picture.

    python train.py -m experiment=decoupled_global,simple_global seed=1,2,3 name=ablation
    python -m ipa.tools.ablation sweep=runs/ablation out=docs/ablation.md

Reads what every run left (`summary.json`, `config.yaml`, `adapter.safetensors`), groups runs by kind and head, and
writes mean ± standard deviation over the seeds. The picture has one column per variant, same prompts, same noise.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from ipa.cli import quiet_libraries
from ipa.errors import UserError
from ipa.tools.options import run_tool

CONFIGURATIONS = Path(__file__).resolve().parents[2] / "conf"
ORDER = ("decoupled_global", "decoupled_fine_grained", "simple_global", "simple_fine_grained")
PROMPTED, ALONE = "scale 1", "scale 0"
# score → heading and decimals
COLUMNS = {
    "clip_i": ("CLIP-I ↑", 3),
    "clip_t": ("CLIP-T ↑", 3),
    "retrieval_at_1": ("retrieval@1 ↑", 3),
    "border_lab": ("border ΔE ↓", 1),
}


@dataclass
class Options:
    """What `python -m ipa.tools.ablation` takes, with the defaults."""

    sweep: str = MISSING  # folder of the sweep: one folder in it for each run
    out: str = MISSING  # markdown file; the picture goes into images/ beside it
    notes: str | None = None  # markdown that is put under the figures, what you make of them
    adapters: str | None = None  # folder for a copy of each variant's first adapter file
    rows: int = 8  # prompts of the picture


@dataclass
class Run:
    """One finished run of a sweep."""

    folder: Path
    variant: str
    seed: int
    summary: dict[str, Any]

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter.safetensors"

    @property
    def config(self) -> DictConfig:
        """Data of unknown origin: it may only call what this checkout's configurations name."""
        from ipa.training.configuration import read_saved

        return OmegaConf.create(read_saved(self.folder / "config.yaml", CONFIGURATIONS))


def read_runs(sweep: Path) -> list[Run]:
    """The finished runs in a sweep's folder, by variant and seed; raises UserError without any."""
    from ipa.export.storage import read_metadata
    from ipa.training.configuration import read_plain

    runs, unfinished = [], []
    for folder in sorted(path.parent for path in sweep.glob("*/config.yaml")):
        if not (folder / "summary.json").is_file():
            unfinished.append(folder.name)
            continue
        metadata = read_metadata(folder / "adapter.safetensors")
        summary = json.loads((folder / "summary.json").read_text())
        seed = read_plain(folder / "config.yaml")["seed"]
        runs.append(Run(folder, f"{metadata['kind']}_{metadata['head']}", seed, summary))
    if unfinished:
        raise UserError(
            f"not finished yet: {', '.join(unfinished)}. The sweep's command with name={sweep.name} goes on."
        )
    if not runs:
        raise UserError(f"sweep={sweep}: no runs there. `python train.py -m … name={sweep.name}` makes them.")
    return sorted(runs, key=lambda run: (rank(run.variant), run.seed))


def rank(variant: str) -> tuple[int, str]:
    return (ORDER.index(variant) if variant in ORDER else len(ORDER), variant)


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.variant, []).append(run)
    return found


def scores(runs: Sequence[Run], name: str, scale: str = PROMPTED) -> list[float]:
    return [run.summary["scores"][scale][name] for run in runs]


def spread(values: Sequence[float], digits: int) -> str:
    """`0.451 ± 0.004`, or the value alone where there is one."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(runs: Sequence[Run]) -> str:
    names = [name for name in COLUMNS if name in runs[0].summary["scores"][PROMPTED]]
    head = ["variant", *(COLUMNS[name][0] for name in names), "parameters", "samples/s"]
    lines = [head, ["---"] * len(head)]
    lines.append(
        ["base alone (λ = 0)", *(spread(scores(runs, name, ALONE)[:1], COLUMNS[name][1]) for name in names), "", ""]
    )
    for variant, group in by_variant(runs).items():
        cells = [spread(scores(group, name), COLUMNS[name][1]) for name in names]
        speed = spread([run.summary["samples per second"] for run in group], 0)
        lines.append([variant.replace("_", " "), *cells, f"{group[0].summary['parameters trained']:,}", speed])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def comparisons(runs: Sequence[Run]) -> str:
    """The differences that the paper speaks of, beside the larger deviation of the two."""
    groups = by_variant(runs)
    claims = [
        ("decoupled above simple (global), CLIP-I", "decoupled_global", "simple_global", "clip_i"),
        ("decoupled above simple (fine-grained), CLIP-I", "decoupled_fine_grained", "simple_fine_grained", "clip_i"),
        ("fine-grained above global (decoupled), CLIP-I", "decoupled_fine_grained", "decoupled_global", "clip_i"),
        ("fine-grained below global (decoupled), CLIP-T", "decoupled_global", "decoupled_fine_grained", "clip_t"),
    ]
    lines = ["| the paper's order | difference | larger deviation | here |", "| --- | --- | --- | --- |"]
    for claim, above, below, name in claims:
        if above in groups and below in groups:
            lines.append(comparison(claim, scores(groups[above], name), scores(groups[below], name)))
    return "\n".join(lines)


def comparison(claim: str, above: Sequence[float], below: Sequence[float]) -> str:
    difference = statistics.mean(above) - statistics.mean(below)
    deviation = max(statistics.stdev(values) if len(values) > 1 else float("nan") for values in (above, below))
    verdict = (
        "as in the paper"
        if difference > deviation
        else "the other way round"
        if -difference > deviation
        else "undecided"
    )
    return f"| {claim} | {difference:+.3f} | {deviation:.3f} | {verdict} |"


def draw_picture(runs: Sequence[Run], rows: int, path: Path) -> None:
    """Prompt, base alone, and one column for the first run of every variant."""
    from hydra.utils import instantiate

    from ipa.export.loading import load_model
    from ipa.files import write_atomically
    from ipa.training.previews import HeldOutPrompts, draw_grid, generate_from
    from ipa.types import to_unit_range

    columns, titles, prompts = [], [], None
    for variant, group in by_variant(runs).items():
        cfg = group[0].config
        model = load_model(group[0].adapter)
        options = instantiate(cfg.sampling)
        if prompts is None:
            prompts = HeldOutPrompts.find(fitted_data(cfg, model), cfg.preview.images, rows)
            assert prompts is not None, "the runs were scored, so they had prompts"
            columns = [
                to_unit_range(prompts.images_B3HW),
                generate_from(model, prompts, options.with_scale(0), cfg.seed),
            ]
            titles = ["prompt", "base alone"]
        columns.append(generate_from(model, prompts, options, cfg.seed))
        titles.append(
            variant.replace("decoupled", "dec.")
            .replace("simple", "sim.")
            .replace("_fine_grained", " fine")
            .replace("_", " ")
        )
    grid = draw_grid(columns, titles)
    write_atomically(path, lambda beside: grid.save(beside, format="PNG", optimize=True))


def fitted_data(cfg: DictConfig, model: Any) -> Any:
    from hydra.utils import instantiate

    size_px = cfg.image_size_px or model.family.image_size_px
    datamodule = instantiate(cfg.data, num_workers=0, batch_size=1)
    datamodule.fit_to(
        image_size_px=size_px,
        reference_size_px=model.encoder.image_size_px,
        latent_shape=model.family.latent_shape(size_px),
    )
    return datamodule


def commit() -> str:
    """The checkout's commit, marked when the work tree differs from it."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def page(runs: Sequence[Run], picture: str, notes: str) -> str:
    cfg, seeds = runs[0].config, sorted({run.seed for run in runs})
    how: Mapping[str, Any] = cfg.scoring.options
    settings = [
        f"{date.today().isoformat()}, commit {commit()}.",
        f"Base `{cfg.base.path}`, {cfg.trainer.max_steps} steps of {cfg.global_batch_size} samples,",
        f"learning rate {cfg.optimizer.lr}, seeds {', '.join(map(str, seeds))}.",
        f"Scores: {cfg.scoring.num_prompts} held-out image prompts, empty text, λ = {PROMPTED.split()[1]},",
        f"{how['num_steps']} steps, guidance {how['guidance']}, by `{cfg.judge.name}`, which conditions nothing.",
        "Mean ± standard deviation over the seeds. CLIP-I and CLIP-T are cosines.",
    ]
    parts = [
        "# The ablation",
        "\n".join(settings),
        table(runs),
        comparisons(runs),
        f"![Same prompts, same noise, one column per variant]({picture})",
        notes.strip(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def compare(options: Any) -> Path:
    from ipa.files import write_atomically

    sweep, out = Path(options.sweep), Path(options.out)
    runs = read_runs(sweep)
    picture = out.parent / "images" / f"{out.stem}.png"
    draw_picture(runs, options.rows, picture)
    notes = Path(options.notes).read_text() if options.notes else ""
    text = page(runs, f"images/{picture.name}", notes)
    write_atomically(out, lambda beside: beside.write_text(text))
    if options.adapters:
        for variant, group in by_variant(runs).items():
            copied = Path(options.adapters) / f"{variant}.safetensors"
            write_atomically(copied, partial(shutil.copyfile, group[0].adapter))
    print(table(runs), comparisons(runs), sep="\n\n")
    return out


def main() -> None:
    quiet_libraries()
    run_tool(sys.argv[1:], Options, compare, __doc__)


if __name__ == "__main__":
    main()
