"""Convert adapter files, and say what they are.

    python -m ipa.tools.export adapter=FILE                                    # what it is, and who can read it
    python -m ipa.tools.export adapter=plus.bin out=plus.safetensors dtype=bfloat16
    python -m ipa.tools.export adapter=runs/…/checkpoints/last.ckpt out=raw.safetensors weights=raw

``adapter`` is an adapter file (.safetensors or .bin), a training checkpoint (.ckpt) or a run folder. The ending of
``out`` says the form: .bin, the published pickle, has no room for metadata.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ipa.tools.options import run_tool

DTYPES = ("float16", "bfloat16", "float32")
WEIGHTS = {"average": "average.", "raw": "trainable."}


@dataclass
class Options:
    """What `python -m ipa.tools.export` takes, with the defaults."""

    adapter: str = MISSING  # adapter file, training checkpoint, or run folder
    out: str | None = None  # .safetensors or .bin; without it the file is only described
    dtype: str = "float16"
    layout: str = "diffusers"  # who must be able to read it: diffusers, comfyui, or ipa alone
    weights: str = "average"  # of a checkpoint: the average's, where there is one, or the raw ones
    licence: str | None = None  # free text for the metadata


def check_options(options: Any) -> None:
    for name, known in (("dtype", DTYPES), ("weights", tuple(WEIGHTS))):
        if options[name] not in known:
            raise ValueError(f"{name}={options[name]}: one of {', '.join(known)}")
    if options.out is not None and Path(options.out).suffix not in (".safetensors", ".bin"):
        raise ValueError(f"out={options.out}: an adapter file ends with .safetensors or .bin")


def export(options: Any) -> Path | None:
    """Describe the adapter, and write it if asked to; returns the path written."""
    check_options(options)
    import torch

    from ipa.checkpoint import save_adapter
    from ipa.export.adapter_file import identify, make_head
    from ipa.export.layouts import check_layout
    from ipa.export.published import with_metadata

    tensors, metadata = read(Path(options.adapter), options.weights)
    file = identify({name: tuple(tensor.shape) for name, tensor in tensors.items()}, metadata, options.adapter)
    print(describe(options.adapter, file, tensors, metadata))
    if options.out is None:
        return None
    with torch.device("meta"):
        check_layout(make_head(file), file.kind, options.layout)
    out = Path(options.out)
    converted = {name: tensor.to(getattr(torch, options.dtype)) for name, tensor in tensors.items()}
    licence = {"licence": options.licence} if options.licence else {}
    save_adapter(out, converted, with_metadata(converted, metadata | licence))
    if out.suffix == ".bin":
        print("the metadata is left out: a .bin has no room for it")
    return out


def read(path: Path, weights: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Published names and metadata, of whichever of the three ``path`` is."""
    from ipa.checkpoint import load_adapter

    if path.is_dir():
        path = path / "adapter.safetensors"
    return read_checkpoint(path, weights) if path.suffix == ".ckpt" else load_adapter(path)


def read_checkpoint(path: Path, weights: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The trainable set of a training checkpoint, averaged where there is an average and it is asked for."""
    import torch

    from ipa.export.published import to_published

    if not path.is_file():
        raise FileNotFoundError(f"adapter={path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state, metadata = checkpoint["state_dict"], dict(checkpoint["adapter_metadata"])
    except Exception as error:  # torch has many kinds for what it refuses
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"adapter={path} is not a checkpoint of a training ({reason})") from error
    averaged = any(name.startswith(WEIGHTS["average"]) for name in state)
    prefix = WEIGHTS[weights if averaged else "raw"]
    chosen = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    chosen.pop("count", None)  # of the steps that the average has taken in
    return to_published(chosen, torch.float32), metadata


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
