"""Samples → shards: pictures are read and shrunk in worker processes, and written by webdataset's TarWriter."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from webdataset.writer import TarWriter

from ipa.data.images.opening import Size, picture_size, upright, upright_size, with_picture
from ipa.data.images.preparation import ImagePreparation
from ipa.data.images.transforms import open_picture
from ipa.data.rejects import Reason, Rejected, Tally
from ipa.data.shards.names import ENDINGS
from ipa.errors import UserError, brief
from ipa.files import printable, read_json, write_atomically, write_json
from ipa.tools.pack import folder

PLAN = "pack.json"  # what the shards in a folder were packed from
OTHER_FOLDER = "choose another folder with out=FOLDER"
NEUTRAL = ("out", "workers", "overwrite")  # options that do not change what a shard holds
JPEG_QUALITY = 95
REDUCING_GAP = 3  # fast first step of resizing, down to this many times the final size

Members = dict[str, bytes]  # extension → content


class Sample(NamedTuple):
    """A picture to pack, as a name in its folder, and its reference, as a name in the other folder."""

    key: str
    picture: str
    reference: str
    stamps: tuple[folder.Stamp, folder.Stamp | None]
    captions: tuple[str, ...]
    columns: folder.Row


def pack(options: Any) -> None:
    """Write the missing shards and print what is in all of them; raises UserError."""
    samples, left_out = collect(options)
    if options.shuffle:
        random.Random(options.seed).shuffle(samples)
    prepare_folder(samples, options)
    starts = range(0, len(samples), options.samples_per_shard)
    shards = {Path(options.out, f"{start // starts.step:05d}.tar"): samples[start:][: starts.step] for start in starts}
    missing = {path: part for path, part in shards.items() if not path.exists()}
    print(f"{len(shards) - len(missing)} of {len(shards)} shards are there already", flush=True)
    write_shards(missing, options)
    print("\n".join(summary([read_json(stats_path(path)) for path in shards], left_out, options.out)))


def collect(options: Any) -> tuple[list[Sample], list[Rejected]]:
    """The samples, sorted by name, and what is left out; raises UserError if nothing is left."""
    files = folder.list_files(options.folder, "folder", skip=options.references)
    references = folder.list_files(options.references, "references") if options.references else {}
    stems = {folder.stem(name): name for name in folder.pictures_in(references)}
    if len(stems) < len(folder.pictures_in(references)):
        raise UserError(f"references={options.references} has several pictures of one name, with different extensions")
    entries, about = folder.read_captions(files, options)
    print(f"{about}, for {len(entries):,} of {len(folder.pictures_in(files)):,} pictures", flush=True)
    samples, left_out = list[Sample](), folder.unused(files)
    for number, name in enumerate(folder.pictures_in(files)):
        reference = stems.get(folder.stem(name), "")
        if name not in entries and options.missing_caption != "empty":
            left_out.append(Rejected(Reason.NO_CAPTION, key=name))
        elif options.references and not reference:
            left_out.append(Rejected(Reason.NO_REFERENCE, key=name))
        else:
            key = f"{number:06d}_{re.sub('[/.]', '_', printable(folder.stem(name)))}"
            stamps = files[name], references.get(reference)
            samples.append(Sample(key, name, reference, stamps, *entries.get(name, ((), {}))))
    without_caption = any(each.reason == Reason.NO_CAPTION for each in left_out)
    if not samples or (options.missing_caption == "error" and without_caption):
        raise UserError(f"{Tally.of(left_out)}; missing_caption=skip leaves those out, empty packs them")
    return samples, left_out


def summary(stats: Sequence[dict[str, Any]], left_out: list[Rejected], out: str) -> list[str]:
    """What is in the shards, what was left out, and the command that trains; raises UserError if they are empty."""
    left_out = [*left_out, *(Rejected(*failed) for each in stats for failed in each["failed"])]
    pictures, size = sum(each["successes"] for each in stats), sum(each["tar_bytes"] for each in stats)
    if not pictures:
        raise UserError(f"none of the pictures could be packed: {Tally.of(left_out)}")
    value = out if re.fullmatch(r"[\w./-]+", out, re.ASCII) else f'"{out}"'  # quoted for Hydra, then for the shell
    words = ["python", "train.py", "experiment=decoupled_global", "recipe=sd15", f"data.train={value}"]
    references = {kind for each in stats for kind in each["extensions"] if kind.startswith("ref.")}
    words += [f"data.reference=[{','.join(sorted(references))}]"] if references else []
    what = f"{out}: {pictures:,} pictures, shards: {len(stats):,}, {size / 1e6:,.1f} MB"
    return [*(f"left out, {line}" for line in Tally.of(left_out).lines()), what, f"next: {shlex.join(words)}"]


def prepare_folder(samples: Sequence[Sample], options: Any) -> None:
    """Records what is packed. Raises UserError for shards of anything else, which training would read too.

    With ``options.overwrite`` those of an earlier packing are removed.
    """
    out = Path(options.out)
    shards = [path for path in out.glob("*") if path.name.endswith(ENDINGS)]
    digest = hashlib.blake2b(json.dumps(samples, default=str).encode(), digest_size=16).hexdigest()
    plan = {name: value for name, value in options.items() if name not in NEUTRAL}
    before = read_json(out / PLAN) if (out / PLAN).exists() else {}
    if shards and not before:
        raise UserError(f"out={out} has shards that were not packed here, which training would read: {OTHER_FOLDER}")
    changes = [f"{name}={before.get(name)}, now {plan[name]}" for name in plan if before.get(name) != plan[name]]
    if before.get("samples") != digest:
        changes = changes or ["other files: the folder has changed"]
    if shards and changes and not options.overwrite:
        raise UserError(
            f"out={out} was packed with {'; '.join(changes)}. overwrite=true packs again, or {OTHER_FOLDER}"
        )
    outdated = [*shards, *map(stats_path, shards)] if changes else []
    for path in [*out.glob(".*.tmp"), *outdated]:  # .tmp: of a process that was killed
        path.unlink()
    if changes:
        write_json(out / PLAN, {"samples": digest, **plan}, otherwise=OTHER_FOLDER)


def stats_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}_stats.json")


def write_shards(shards: Mapping[Path, Sequence[Sample]], options: Any) -> None:
    """Write them all with a progress bar. With one worker everything happens in this process."""
    samples = [sample for part in shards.values() for sample in part]
    workers = options.workers or len(os.sched_getaffinity(0))
    loading: dict[str, Any] = {"num_workers": workers if workers > 1 else 0, "batch_size": None}
    loader: Any = DataLoader(samples, collate_fn=partial(members_of, options=options), **loading)  # type: ignore[arg-type]
    found = iter(tqdm(loader, unit=" pictures", desc=f"shards: {len(shards)}"))
    for path, part in shards.items():
        write_atomically(path, partial(write_tar, stats_path(path), part, found), OTHER_FOLDER)


def write_tar(stats: Path, samples: Sequence[Sample], found: Iterator[Members | Rejected], temporary: Path) -> None:
    """The tar, and before it gets its name the statistics as img2dataset has them, with the names of what failed."""
    failed, extensions, written = list[Rejected](), set[str](), 0
    with temporary.open("wb") as file, TarWriter(file, "", "", encoder=False, mtime=0, format="PAX_FORMAT") as tar:
        for sample, members in zip(samples, found, strict=False):  # the next shard's members stay
            if isinstance(members, Rejected):
                failed.append(members.at(sample.picture))
            else:
                tar.write({"__key__": sample.key, **members})
                extensions, written = extensions | members.keys(), written + 1
    counts = {"count": len(samples), "successes": written, "failed_to_download": 0, "failed_to_resize": len(failed)}
    counts["tar_bytes"] = temporary.stat().st_size
    details = {"status_dict": {"success": written} | Tally.of(failed).counts, "extensions": sorted(extensions)}
    write_json(stats, counts | details | {"failed": [each.args[:3] for each in failed]}, otherwise=OTHER_FOLDER)


def members_of(sample: Sample, options: Any) -> Members | Rejected:
    try:
        picture, size, original = load(Path(options.folder, sample.picture), options.size)
        reference = load(Path(options.references, sample.reference), options.size)[0] if sample.reference else {}
    except OSError as error:
        return Rejected(Reason.BROKEN_PICTURE, brief(error))
    except Rejected as reject:
        return reject.at()
    caption = next(iter(sample.captions), "")
    metadata: dict[str, Any] = {"status": "success", "caption": caption, "captions": sample.captions}
    metadata |= {name: None if value != value else value for name, value in sample.columns.items()}  # no NaN in JSON
    metadata |= {"key": sample.key, "file_name": sample.picture, "width": size[0], "height": size[1]}
    metadata |= {"original_width": original[0], "original_height": original[1]}
    texts = {"json": json.dumps(metadata, default=str).encode(), "txt": caption.encode()}
    return {**picture, **texts, **{f"ref.{kind}": data for kind, data in reference.items()}}


def load(path: Path, size_px: int | None) -> tuple[Members, Size, Size]:
    """The picture, copied, or shrunk if its shortest side is longer; its size now and before.

    Raises ``Rejected`` for what training would reject, which only decoding finds.
    """
    data = path.read_bytes()
    size = picture_size(data)
    if size_px is not None and min(size) > size_px:
        return *with_picture(data, partial(shrink, size_px=size_px)), size
    open_picture(data, "white", ImagePreparation.max_pixels, needs=[(1, 1)], headroom=1)
    return {path.suffix.lower().removeprefix("."): data}, size, size


def shrink(picture: Image.Image, size_px: int) -> tuple[Members, Size]:
    """Upright, in sRGB, with the shortest side ``size_px``: lossless WebP where there is transparency, else JPEG."""
    width, height = (round(side * size_px / min(picture.size)) for side in upright_size(picture))
    picture.draft(None, (REDUCING_GAP * size_px,) * 2)  # a JPEG is decoded at a half, a quarter …
    small = upright(picture).resize((width, height), Image.Resampling.LANCZOS, reducing_gap=REDUCING_GAP)
    out = io.BytesIO()
    if small.mode == "RGBA":
        small.save(out, "webp", lossless=True)
        return {"webp": out.getvalue()}, small.size
    small.save(out, "jpeg", quality=JPEG_QUALITY)
    return {"jpg": out.getvalue()}, small.size
