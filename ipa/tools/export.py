"""Convert adapter files, and describe them.

    python -m ipa.tools.export adapter=FILE                                    # only describe it
    python -m ipa.tools.export adapter=plus.bin out=plus.safetensors dtype=bfloat16
    python -m ipa.tools.export adapter=runs/…/checkpoints/step_00000600.ckpt out=raw.safetensors weights=raw

It reads checkpoints of the public training script too (accelerate's, DeepSpeed's, Lightning's), and says what it left
out. The extension of ``out`` selects the format. A .bin, the published pickle, cannot hold metadata.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from ipa.errors import UserError
from ipa.tools.options import option, tool

DTYPES = ("float16", "bfloat16", "float32")
# metadata without which a file can be misread
NEEDED = ("base_family", "branches", "head", "kind", "head_width", "num_tokens", "no_image", "layer")


@dataclass
class Options:
    adapter: str = option(MISSING, "adapter file, checkpoint (also of the public training script), or run folder")
    out: str | None = option(None, "output file, .safetensors or .bin; null: only describe the adapter")
    dtype: str = option("float16", "data type of the output", one_of=DTYPES)
    layout: str = option("diffusers", "program that must be able to read the output: diffusers, comfyui, or only ipa")
    weights: str | None = option(None, "of a checkpoint; null: average if it has one", one_of=("average", "raw"))
    licence: str | None = option(None, "free text for the metadata")


def export(options: Any) -> Path | None:
    """Describe the adapter and write it to ``out`` if that is given; returns the path written."""
    import torch

    from ipa.export.adapter_file import make_head
    from ipa.export.layouts import check_layout
    from ipa.export.published import write_adapter
    from ipa.export.reading import read_adapter
    from ipa.export.storage import check_output

    out = None if options.out is None else Path(options.out)
    if out is not None:
        check_output(out, "out")
    adapter = read_adapter(Path(options.adapter), options.weights)
    print(describe(options.adapter, adapter))
    if out is None:
        return None
    with torch.device("meta"):
        check_layout(make_head(adapter.file), adapter.file.kind, options.layout, adapter.file.branches)
    if out.suffix == ".bin":
        check_without_metadata(adapter)
    licence = {"licence": options.licence} if options.licence else {}
    write_adapter(out, convert(adapter.tensors, options.dtype), {**adapter.metadata, **licence})
    if out.suffix == ".bin":
        print("the metadata is omitted: a .bin cannot hold it")
    return out


def check_without_metadata(adapter: Any) -> None:
    """Refuse to omit metadata without which the file would be misread."""
    from ipa.export.adapter_file import identify

    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors.items()}
    metadata = {**adapter.metadata, **adapter.file.metadata()}

    def is_needed(name: str) -> bool:
        left_out = {name, "base_family"} if name == "branches" else {name}  # a family implies its branches
        try:
            return identify(shapes, {key: metadata[key] for key in metadata.keys() - left_out}) != adapter.file
        except UserError:
            return True

    if needed := [f"{name}={metadata[name]}" for name in NEEDED if name in metadata and is_needed(name)]:
        raise UserError(
            f"a .bin cannot hold metadata, and its readers would not assume {', '.join(needed)}: give out=….safetensors"
        )


def convert(tensors: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The tensors in another dtype; raises UserError if a number overflows."""
    import torch

    from ipa.types import first_not_finite

    converted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
    if broken := first_not_finite(converted):
        raise UserError(f"dtype={dtype}: numbers of {broken[0]} are too large for it; use bfloat16 or float32")
    return converted


def describe(source: str, adapter: Any) -> str:
    import torch

    from ipa.export.adapter_file import make_head
    from ipa.export.layouts import LAYOUTS, misreadings, other_no_image
    from ipa.weights import dtype_name

    file = adapter.file
    with torch.device("meta"):
        head = make_head(file)
    dtypes = sorted({dtype_name(tensor.dtype) for tensor in adapter.tensors.values()})
    lines = [f"{source} is {file.describe()}.", *adapter.remarks]
    lines.append(f"{file.num_parameters:,} parameters in {file.num_tensors} tensors: {', '.join(dtypes)}")
    for layout in LAYOUTS:
        yes = "yes" if adapter.is_published or layout == "ipa" else "once it is written with out=…"
        problems = misreadings(head, file.kind, layout, file.branches)
        lines.append(f"readable by {layout}: {yes if not problems else 'no, ' + '; '.join(problems)}")
        if not problems and (warning := other_no_image(head, layout, file.branches)):
            lines.append(f"    but {warning}")
    lines += [f"    {name}: {value}" for name, value in sorted(adapter.metadata.items()) if value]
    return "\n".join(lines)


main = tool(Options, export, __doc__)

if __name__ == "__main__":
    main()
