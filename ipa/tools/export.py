"""Convert adapter files, and describe them.

    python -m ipa.tools.export adapter=FILE                                    # only describe it
    python -m ipa.tools.export adapter=plus.bin out=plus.safetensors dtype=bfloat16
    python -m ipa.tools.export adapter=runs/…/checkpoints/step_00000600.ckpt out=raw.safetensors weights=raw

The extension of ``out`` selects the format. A .bin, the published pickle, cannot hold metadata.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ipa.errors import UserError
from ipa.tools.options import option, run_tool

DTYPES = ("float16", "bfloat16", "float32")
WEIGHTS = {"average": "average.", "raw": "trainable."}
# metadata without which a file can be misread
NEEDED = ("head", "head_width", "num_tokens", "no_image", "layer")


@dataclass
class Options:
    adapter: str = option(
        MISSING, "adapter file (.safetensors, .bin), training checkpoint (.ckpt), or run folder (its last checkpoint)"
    )
    out: str | None = option(None, "output file, .safetensors or .bin; null: only describe the adapter")
    dtype: str = option("float16", "data type of the output", one_of=DTYPES)
    layout: str = option("diffusers", "program that must be able to read the output: diffusers, comfyui, or only ipa")
    weights: str | None = option(
        None,
        "which weights of a checkpoint; null: the average if there is one, or else raw",
        one_of=tuple(WEIGHTS),
    )
    licence: str | None = option(None, "free text for the metadata")


def check_options(options: Any) -> None:
    if options.out is not None and Path(options.out).suffix not in (".safetensors", ".bin"):
        raise UserError(f"out={options.out}: an adapter file ends with .safetensors or .bin")


def export(options: Any) -> Path | None:
    """Describe the adapter and write it to ``out`` if that is given; returns the path written."""
    check_options(options)
    import torch

    from ipa.export.adapter_file import identify, make_head
    from ipa.export.layouts import check_layout
    from ipa.export.storage import save_adapter

    tensors, metadata = read(Path(options.adapter), options.weights)
    file = identify({name: tuple(tensor.shape) for name, tensor in tensors.items()}, metadata, options.adapter)
    print(describe(options.adapter, file, tensors, metadata))
    if options.out is None:
        return None
    with torch.device("meta"):
        check_layout(make_head(file), file.kind, options.layout)
    out = Path(options.out)
    if out.suffix == ".bin":
        check_shapes_tell_all(file, tensors)
    licence = {"licence": options.licence} if options.licence else {}
    save_adapter(out, convert(tensors, options.dtype), {**metadata, **file.metadata(), **licence})
    if out.suffix == ".bin":
        print("the metadata is omitted: a .bin cannot hold it")
    return out


def check_shapes_tell_all(file: Any, tensors: dict[str, Any]) -> None:
    """Refuse to omit metadata without which the file would be misread."""
    from ipa.export.adapter_file import identify

    try:
        same = identify({name: tuple(tensor.shape) for name, tensor in tensors.items()}) == file
    except UserError:
        same = False
    if not same:
        needed = ", ".join(f"{name}={value}" for name, value in file.metadata().items() if name in NEEDED)
        raise UserError(
            f"a .bin cannot hold metadata, and its readers would not assume {needed}: give out=….safetensors"
        )


def convert(tensors: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The tensors in another dtype; raises UserError if a number overflows."""
    import torch

    converted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    broken = [name for name, tensor in converted.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise UserError(
            f"{len(broken)} of {len(tensors)} tensors overflow in {dtype} or are not finite ({broken[0]} …). If they "
            "are finite, use dtype=float32."
        )
    return converted


def read(path: Path, weights: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors by published names, and metadata, of a file, a checkpoint or a run folder."""
    from ipa.export.storage import load_adapter
    from ipa.training.checkpointing import newest_whole

    if path.is_dir():
        path = newest_whole(path / "checkpoints") or path / "adapter.safetensors"
    if path.suffix == ".ckpt":
        return read_checkpoint(path, weights)
    if weights is not None:
        raise UserError(f"weights={weights}: {path} holds one set of weights; only a checkpoint has two")
    return load_adapter(path)


def read_checkpoint(path: Path, weights: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """The trainable set of a checkpoint: ``weights``, by default the average if there is one."""
    import torch

    from ipa.export.published import to_published
    from ipa.training.checkpointing import read_checkpoint as read_whole

    if not path.is_file():
        raise UserError(f"adapter={path}: no such file")
    checkpoint = read_whole(path)
    state, metadata = checkpoint["state_dict"], checkpoint.get("adapter_metadata")
    if metadata is None or not holds(state, torch.Tensor) or not holds(metadata, str):
        raise UserError(f"{path} is not a checkpoint of an adapter's training")
    averaged = any(name.startswith(WEIGHTS["average"]) for name in state)
    if weights == "average" and not averaged:
        raise UserError(f"weights=average: the training of {path} kept no average; omit it")
    prefix = WEIGHTS[weights or ("average" if averaged else "raw")]
    chosen = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    chosen.pop("count", None)  # of averaged steps
    return to_published(chosen, torch.float32), metadata


def holds(content: Any, kind: type) -> bool:
    """Whether this is a dict from strings to such values."""
    return isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, kind) for k, v in content.items())


def describe(source: str, file: Any, tensors: dict[str, Any], metadata: dict[str, str]) -> str:
    """Lines for the console."""
    import torch

    from ipa.export.adapter_file import make_head
    from ipa.export.layouts import LAYOUTS, misreadings

    with torch.device("meta"):
        head = make_head(file)
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    lines = [f"{source} is {file.describe()}."]
    lines.append(f"{file.num_parameters:,} parameters in {file.num_tensors} tensors: {', '.join(sorted(dtypes))}")
    for layout in LAYOUTS:
        problems = misreadings(head, file.kind, layout)
        lines.append(f"readable by {layout}: {'yes' if not problems else 'no, ' + '; '.join(problems)}")
    lines += [f"    {name}: {value}" for name, value in sorted(metadata.items()) if value]
    return "\n".join(lines)


def main() -> None:
    run_tool(sys.argv[1:], Options, export, __doc__)


if __name__ == "__main__":
    main()
