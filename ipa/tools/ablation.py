"""Compare the variants of a sweep: one table, one figure.

    python train.py -m experiment=decoupled_global,simple_global seed=1,2,3 name=ablation
    python -m ipa.tools.ablation sweep=runs/ablation out=docs/ablation.md

Reads `summary.json`, `config.yaml` and `adapter.safetensors` of every run, groups the runs by kind and head, and writes
mean ± standard deviation over the seeds. The figure has one column per variant, with the same prompts and noise.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Template
from omegaconf import MISSING, OmegaConf

from ipa.cli import quiet_libraries
from ipa.errors import UserError, brief
from ipa.files import read_json, read_text, write_atomically
from ipa.tools.options import option, tool

ORDER = ("decoupled_global", "decoupled_fine_grained", "simple_global", "simple_fine_grained")
PROMPTED, ALONE = "scale 1", "scale 0"
# score → heading and decimals
COLUMNS = {
    "clip_i": ("CLIP-I ↑", 3),
    "clip_t": ("CLIP-T ↑", 3),
    "retrieval_at_1": ("retrieval@1 ↑", 3),
    "border_lab": ("border ΔE ↓", 1),
}
# what the paper claims: the first variant has more of the score than the second
CLAIMS = {
    "decoupled above simple (global), CLIP-I": ("decoupled_global", "simple_global", "clip_i"),
    "decoupled above simple (fine-grained), CLIP-I": ("decoupled_fine_grained", "simple_fine_grained", "clip_i"),
    "fine-grained above global (decoupled), CLIP-I": ("decoupled_fine_grained", "decoupled_global", "clip_i"),
    "fine-grained below global (decoupled), CLIP-T": ("decoupled_global", "decoupled_fine_grained", "clip_t"),
}


@dataclass
class Options:
    sweep: str = option(MISSING, "folder of the sweep, with one folder for each run")
    out: str = option(MISSING, "markdown file to write; its picture goes into images/ next to it")
    notes: str | None = option(None, "markdown file with your conclusions, added below the figures")
    adapters: str | None = option(None, "folder for a copy of each variant's first adapter file")
    rows: int = option(8, "image prompts in the picture", at_least=1)


@dataclass
class Run:
    """One finished run of a sweep; ``config`` is untrusted data."""

    variant: str
    seed: int
    summary: Mapping[str, Any]
    config: Any
    adapter: Path


def read_runs(sweep: Path) -> list[Run]:
    """The runs in a sweep's folder, by variant and seed; raises UserError if there are none or one is not finished."""
    folders = sorted(path.parent for path in sweep.glob("*/config.yaml"))
    if not folders:
        raise UserError(f"sweep={sweep} has no runs. `python train.py -m … name={sweep.name}` makes them.")
    if unfinished := [folder.name for folder in folders if not (folder / "summary.json").is_file()]:
        raise UserError(
            f"not finished yet: {', '.join(unfinished)}. The sweep's command with name={sweep.name} resumes them."
        )
    return sorted(
        map(read_run, folders), key=lambda run: ([*ORDER, run.variant].index(run.variant), run.variant, run.seed)
    )


def read_run(folder: Path) -> Run:
    from ipa.export.reading import read_adapter

    path = folder / "config.yaml"
    try:
        config = OmegaConf.load(path)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not the configuration of a run ({brief(error)})") from error
    adapter = folder / "adapter.safetensors"
    metadata = read_adapter(adapter).metadata
    summary = read_json(folder / "summary.json", "train the run again")
    return Run(f"{metadata['kind']}_{metadata['head']}", config.seed, summary, config, adapter)


def by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {variant: list(group) for variant, group in groupby(runs, key=lambda run: run.variant)}


def scores(runs: Sequence[Run], name: str, scale: str = PROMPTED) -> list[float]:
    return [run.summary["scores"][scale][name] for run in runs]


def spread(values: Sequence[float], digits: int) -> str:
    """`0.451 ± 0.004`, or a single value alone."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def table(runs: Sequence[Run]) -> list[list[str]]:
    """The lines of the table, its head first: the base alone, then the variants."""
    columns = {name: column for name, column in COLUMNS.items() if name in runs[0].summary["scores"][PROMPTED]}
    base = [spread(scores(runs, name, ALONE)[:1], digits) for name, (_, digits) in columns.items()]
    lines = [["variant", *(title for title, _ in columns.values()), "parameters", "samples/s"]]
    lines.append(["base alone (λ = 0)", *base, "", ""])
    for variant, group in by_variant(runs).items():
        cells = [spread(scores(group, name), digits) for name, (_, digits) in columns.items()]
        speed = spread([run.summary["samples per second"] for run in group], 0)
        lines.append([variant.replace("_", " "), *cells, f"{group[0].summary['parameters trained']:,}", speed])
    return lines


def comparisons(runs: Sequence[Run]) -> list[list[str]]:
    """The paper's claims: our difference, and the larger standard deviation of the two variants."""
    groups = by_variant(runs)
    lines = [["the paper's order", "difference", "larger deviation", "here"]]
    for claim, (above, below, name) in CLAIMS.items():
        if above in groups and below in groups:
            values = scores(groups[above], name), scores(groups[below], name)
            difference = statistics.mean(values[0]) - statistics.mean(values[1])
            deviation = max(map(statistics.stdev, values)) if min(map(len, values)) > 1 else math.nan
            lines.append([claim, f"{difference:+.3f}", f"{deviation:.3f}", verdict(difference, deviation)])
    return lines


def verdict(difference: float, deviation: float) -> str:
    """``deviation`` is NaN if a variant has a single seed, which decides nothing."""
    if difference > deviation:
        return "as in the paper"
    return "the other way round" if -difference > deviation else "undecided"


def draw_picture(runs: Sequence[Run], rows: int, path: Path) -> None:
    """Prompt, base alone, and one column for the first run of every variant."""
    import torch

    from ipa.evaluation.methods.ip_adapter import IPAdapterMethod
    from ipa.sampling import SamplingOptions
    from ipa.training.previews import draw_grid
    from ipa.types import to_unit_range

    prompts, titles = read_prompts(runs[0].config, rows), ["prompt", "base alone"]
    columns: list[torch.Tensor] = []
    for variant, (run, *_) in by_variant(runs).items():
        method = IPAdapterMethod.from_pretrained(str(run.adapter))
        # the configuration is untrusted: nothing is instantiated from it
        options = SamplingOptions(
            **{name: run.config.sampling[name] for name in run.config.sampling if name != "_target_"}
        )
        if not columns:
            size_px = options.image_size_px or method.model.family.image_size_px
            columns = [to_unit_range(torch.stack([prompt.cut(size_px) for prompt in prompts]))]
            columns.append(method.generate(prompts, options.with_scale(0)))
        columns.append(method.generate(prompts, options))
        short = variant.replace("decoupled", "dec.").replace("simple", "sim.").replace("_fine_grained", " fine")
        titles.append(short.replace("_", " "))
    grid = draw_grid(columns, titles)
    write_atomically(path, lambda temporary: grid.save(temporary, format="PNG", optimize=True))


def read_prompts(cfg: Any, count: int) -> list[Any]:
    """The first image prompts of a run's previews."""
    from ipa.evaluation.benchmarks import FolderBenchmark, ShardBenchmark
    from ipa.evaluation.methods.method import Prompt

    images, shards = cfg.preview.images, cfg.data.val
    benchmark: Any = FolderBenchmark("", images, count) if images else ShardBenchmark("", shards, count)
    return [Prompt(benchmark.read(item), "", cfg.seed + number) for number, item in enumerate(benchmark.items())]


def commit() -> str:
    """The checkout's commit, marked as dirty if the work tree differs from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def page(runs: Sequence[Run], picture: str, notes: str) -> str:
    template = Path(__file__).with_name("ablation.md.jinja").read_text(encoding="utf-8")
    return Template(template, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).render(
        today=date.today().isoformat(),
        commit=commit(),
        cfg=runs[0].config,
        seeds=sorted({run.seed for run in runs}),
        scale=PROMPTED.split()[1],
        scores=table(runs),
        comparisons=comparisons(runs),
        picture=picture,
        notes=notes.strip(),
    )


def compare(options: Any) -> Path:
    quiet_libraries()
    runs, out = read_runs(Path(options.sweep)), Path(options.out)
    notes = read_text(options.notes) if options.notes else ""
    picture = out.parent / "images" / f"{out.stem}.png"
    draw_picture(runs, options.rows, picture)
    text = page(runs, f"images/{picture.name}", notes)
    write_atomically(out, lambda temporary: temporary.write_text(text))
    for variant, group in by_variant(runs).items() if options.adapters else ():
        copied = Path(options.adapters) / f"{variant}.safetensors"
        write_atomically(copied, partial(shutil.copyfile, group[0].adapter))
    print(text)
    return out


main = tool(Options, compare, __doc__)

if __name__ == "__main__":
    main()
