"""Write the model card of a trained adapter, with everything that a repository of the hub needs.

    python -m ipa.tools.card run=runs/decoupled_global/mine                        # into RUN/card
    python -m ipa.tools.card run=RUN evaluation=runs/evaluation/demo licence=apache-2.0 push=OWNER/NAME

The folder gets README.md with the hub's metadata, the adapter and the last preview. ``evaluation`` takes the scores of
this adapter with their intervals from the results of `python evaluate.py`. ``push`` uploads the folder if you are
logged in (`hf auth login`); nothing else is sent anywhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader
from omegaconf import MISSING

from ipa.errors import UserError, brief
from ipa.files import HUB_ID, hash_file, is_hub_id, read_json, write_atomically
from ipa.tools.options import option, tool

ADAPTER, PREVIEW = "adapter.safetensors", "preview.png"
PIPELINES = {"stable_diffusion": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
# image encoder → where diffusers and ComfyUI find it
ENCODERS = {
    "ViT-H-14 laion2b_s32b_b79k": (
        '"h94/IP-Adapter", subfolder="models/image_encoder"',
        "`CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors`",
    ),
    "ViT-bigG-14 laion2b_s39b_b160k": (
        '"h94/IP-Adapter", subfolder="sdxl_models/image_encoder"',
        "`CLIP-ViT-bigG-14-laion2B-39B-b160k.safetensors`",
    ),
    "ViT-L-14-quickgelu openai": ('"openai/clip-vit-large-patch14"', "`clip-vit-large-patch14.safetensors`"),
}
SCORES = {"clip_i": "CLIP-I", "clip_t": "CLIP-T", "retrieval_at_1": "retrieval@1"}


@dataclass
class Options:
    run: str = option(MISSING, "folder of a finished training run")
    out: str | None = option(None, "folder for the card; null: RUN/card")
    title: str | None = option(None, "heading; null: the experiment and the base")
    licence: str | None = option(None, "as the hub names it (apache-2.0); null: the metadata's, or other")
    evaluation: str | None = option(None, "folder of a benchmark's results, as python evaluate.py writes it")
    push: str | None = option(None, "OWNER/NAME on the hub to upload the folder to; null: nothing is uploaded")


def card(options: Any) -> Path:
    """Write the folder, and upload it if asked; returns the card. Raises UserError."""
    run = Path(options.run)
    adapter = run / ADAPTER
    if not adapter.is_file():
        raise UserError(f"run={run} has no {ADAPTER}: give the folder of a finished training run")
    if options.push is not None:
        check_login(options.push)
    content = describe(run, adapter, options)
    out = Path(options.out or run / "card")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(adapter, out / ADAPTER)
    if content["preview"]:
        shutil.copyfile(content["preview"], out / PREVIEW)
    text = Environment(
        loader=PackageLoader("ipa.tools", "."), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    page = text.get_template("card.md.jinja").render(content)
    write_atomically(out / "README.md", lambda path: path.write_text(page))
    if options.push is not None:
        upload(out, options.push)
    return out / "README.md"


def describe(run: Path, adapter: Path, options: Any) -> dict[str, Any]:
    """What the template reads."""
    import torch

    from ipa.export.adapter_file import make_head
    from ipa.export.layouts import misreadings
    from ipa.export.reading import read_adapter

    read = read_adapter(adapter)
    metadata, config = read.metadata, read_config(run)
    with torch.device("meta"):
        head = make_head(read.file)
    file, base = read.file, metadata.get("base", "")
    reasons = {layout: misreadings(head, file.kind, layout, file.branches) for layout in ("diffusers", "comfyui")}
    name = " ".join(filter(None, (metadata.get("encoder"), metadata.get("encoder_weights"))))
    encoder = ENCODERS.get(name, ('"FOLDER"', f"the image encoder ({name.removeprefix('local-dir:')})"))
    scores, num_prompts, has_intervals = read_scores(run, adapter, options.evaluation, config)
    return {
        "title": options.title or f"{config.get('group') or run.parent.name}: image prompts for {base or 'a base'}",
        "description": f"{read.file.describe()[0].upper()}{read.file.describe()[1:]}.",
        "metadata": metadata,
        "licence": options.licence or metadata.get("licence") or "other",
        "base": base,
        "base_model": base if is_hub_id(base) else None,
        "preview": max((run / "previews").glob("step_*.png"), default=None),
        "scores": scores,
        "num_prompts": num_prompts,
        "has_intervals": has_intervals,
        "pipeline": PIPELINES.get(metadata.get("base_family", ""), "DiffusionPipeline"),
        "repository": options.push or ".",
        "encoder": {"diffusers": encoder[0], "comfyui": encoder[1], "is_public": name in ENCODERS},
        "guidance": metadata.get("sampling_guidance", "7.5"),
        "rescale": float(metadata.get("sampling_guidance_rescale", 0)),
        "diffusers_reads": not reasons["diffusers"],
        "comfyui_reads": not reasons["comfyui"],
        "why_not": "; ".join(reasons["diffusers"] or reasons["comfyui"]),
        "training": training_of(config, metadata, read_summary(run)),
    }


def read_config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    try:
        content = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({brief(error)}): give the folder of a training run") from error
    return dict(content)


def read_summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    if not path.is_file():
        raise UserError(f"run={run} has no summary.json: the training is not finished; the same command resumes it")
    return read_json(path)


def training_of(config: Mapping[str, Any], metadata: Mapping[str, str], summary: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the table, without those that are unknown."""
    optimizer, data, drops = config["optimizer"], config["data"], config["data"].get("drops") or {}
    sources = Path(str(data["train"])).name if data.get("train") else ", ".join(data.get("sources") or [])
    rates = [f"{drops[name]:g}" for name in ("text", "image", "both") if name in drops]
    rows = {
        "base": metadata.get("base"),
        "image encoder": metadata.get("encoder"),
        "image tokens": metadata.get("num_tokens"),
        "trained parameters": f"{summary['parameters trained']:,}",
        "steps": f"{summary['steps']:,}",
        "batch": config.get("global_batch_size"),
        "optimizer": f"{optimizer['_target_'].rpartition('.')[2]}, learning rate {optimizer['lr']:g}",
        "EMA": (config.get("ema") or {}).get("decay"),
        "data": sources,
        "drops (text, image, both)": ", ".join(rates),
        "precision": (config.get("trainer") or {}).get("precision"),
    }
    return {name: value for name, value in rows.items() if value not in (None, "", [])}


def read_scores(
    run: Path, adapter: Path, evaluation: str | None, config: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, int, bool]:
    """The table, its number of prompts, and whether it has intervals."""
    if evaluation is not None:
        return (*scores_of_evaluation(Path(evaluation), adapter), True)
    scores = read_summary(run).get("scores")
    if not scores:
        return None, 0, False
    names = [name for name in SCORES if name in next(iter(scores.values()))]
    rows = [[row, *(f"{values[name]:.3f}" for name in names)] for row, values in scores.items()]
    return {"columns": [SCORES[name] for name in names], "rows": rows}, config["scoring"]["num_prompts"], False


def scores_of_evaluation(folder: Path, adapter: Path) -> tuple[dict[str, Any], int]:
    """Scores of the systems that used this file; raises UserError if there are none."""
    from ipa.evaluation.report.reading import read_evaluation

    found, own = read_evaluation(folder), hash_file(adapter)
    systems = [each for each in found.systems if own in (each.settings.get("files") or {}).values()]
    if not systems:
        raise UserError(f"evaluation={folder} has no result of {adapter}: `python evaluate.py adapter=…` makes one")
    names = [name for name in SCORES if all(name in each.scores for each in systems)]
    rows = []
    for system in systems:
        scores = [system.scores[name] for name in names]
        rows.append([system.label, *(f"{each.value:.3f} ({each.low:.3f}–{each.high:.3f})" for each in scores)])
    return {"columns": [SCORES[name] for name in names], "rows": rows}, len(found.items)


def check_login(name: str) -> None:
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(name):
        raise UserError(f"push={name}: give OWNER/NAME")
    if get_token() is None:
        raise UserError(f"push={name}: log in first with `hf auth login`")


def upload(folder: Path, name: str) -> None:
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except OSError as error:  # requests' and the hub's errors are OSErrors
        raise UserError(f"push={name}: the upload failed ({brief(error)}); the card is in {folder}") from error


main = tool(Options, card, __doc__)

if __name__ == "__main__":
    main()
