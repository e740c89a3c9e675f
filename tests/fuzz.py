"""Hostile files made from valid ones: each is read or refused with a message, and nothing in them runs.

    python tests/fuzz.py --seed 1 --number 500
    python tests/fuzz.py --seed 1 --number 1 --kinds shard --first 17      # one case again, with its traceback

A case is a kind and a number; the same seed makes the same case. It is read in a process of its own with a limit of
memory and of time, and is killed with all that it started. *Refused* means what a command would report in words
(``ipa.cli.explain_failure``). Anything else is a failure: a traceback, a hang, too much memory, a canary (a file that a
payload creates), or a change outside the run's folder.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save  # noqa: E402
from tars import bomb, png_chunk  # noqa: E402
from tars import saved as encoded  # noqa: E402

from ipa import cli  # noqa: E402
from ipa.data.addresses import Address  # noqa: E402
from ipa.data.cache.datamodule import CachedDataModule  # noqa: E402
from ipa.data.cache.format import CacheWriter, Header  # noqa: E402
from ipa.data.cache.preparation import CachedPreparation  # noqa: E402
from ipa.data.images.preparation import ImagePreparation  # noqa: E402
from ipa.data.records import Record  # noqa: E402
from ipa.data.rejects import Rejected  # noqa: E402
from ipa.data.shards.source import ShardSource  # noqa: E402
from ipa.export.published import from_published  # noqa: E402
from ipa.export.storage import load_adapter, nested  # noqa: E402
from ipa.tools.export import Options, export  # noqa: E402
from ipa.training.checkpointing import newest_whole, read_checkpoint  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
ADAPTER = ROOT / "demo/adapters/decoupled_global.safetensors"
LIMIT_S, LIMIT_BYTES = 30, 1_500_000_000
BY_HAND_AGAIN = 0.1  # share of the later cases that are made by hand
ODD = ("", "-1", "1e9", "x", "999999999999", "ü")  # values of metadata
CANARY = "canary"
DEEP = b"[" * 100_000

Make = Callable[[random.Random], bytes]
Named = list[tuple[str, Make]]


@dataclass
class Outcome:
    """``word`` is read, refused, or what went wrong; ``detail`` the message or the traceback."""

    word: str
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.word in ("read", "refused")


@dataclass(frozen=True)
class Kind:
    """Valid files to mutate, what is made by hand, and what reads them: the file, and the run's folder."""

    name: str
    suffix: str
    valid: Callable[[Material], list[bytes]]
    by_hand: Callable[[Material], Named]
    read: Callable[[Path, Path], Any]


@dataclass
class Material:
    """What valid files are made of; ``canary`` is the file that a payload creates when it runs."""

    folder: Path
    seed: int = 0
    made: dict[str, tuple[list[bytes], Named]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.canary = self.folder / CANARY
        self.tensors, self.metadata = load_adapter(ADAPTER)

    def of(self, kind: Kind) -> tuple[list[bytes], Named]:
        """Valid files and those made by hand, made once."""
        if kind.name not in self.made:
            self.made[kind.name] = kind.valid(self), kind.by_hand(self)
        return self.made[kind.name]

    def by_hand(self, kind: Kind) -> Named:
        return self.of(kind)[1]


def valid_checkpoint(material: Material) -> bytes:
    state = {f"trainable.{name}": tensor for name, tensor in from_published(material.tensors).items()}
    return saved({"state_dict": state, "global_step": 3, "adapter_metadata": material.metadata, "loops": {"a": [1, 2]}})


def valid_shard() -> bytes:
    return packed([member for number in range(4) for member in sample(number)])


def valid_cache() -> bytes:
    out = io.BytesIO()
    sizes = {"kept": ["pooled"], "image_size_px": 16, "reference_size_px": 8, "latent_shape": [4, 2, 2]}
    choices = {"crop": "center", "reference_fit": "crop", "background": "white", "buckets": None}
    writer = CacheWriter(out, Header("train", {"vae": "float32 1"}, choices, sizes))
    for index in range(4):
        record = Record(f"{index:04d}", "00000.tar", index, b"", (("a cat", 1.0),), measured=(30, 20))
        writer.sample(record, cached_tensors(index), None)
    writer.rejected(Record("0009", "00000.tar", 9, b"", ()), "broken picture")
    writer.close({"broken picture": 1})
    return out.getvalue()


def saved(content: Any) -> bytes:
    """As torch saves it."""
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def cached_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "mean_CHW": torch.randn(4, 2, 2, generator=generator),
        "logvar_CHW": torch.randn(4, 2, 2, generator=generator),
        "pooled_E": torch.randn(5, generator=generator),
        "text.ids": torch.arange(6).view(1, 6),
        "size_6": torch.tensor([20, 30, 0, 5, 16, 16]),
    }


def sample(number: int) -> list[tuple[str, bytes]]:
    kind, extension = (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif"))[number % 4]
    image = Image.frombytes("RGB", (24, 16), random.Random(number).randbytes(24 * 16 * 3))
    about = json.dumps({"width": 24, "punsafe": 0.1, "caption": ["a", "b"]}).encode()
    members = {extension: encoded(image, kind), "txt": b"a thing", "json": about}
    return [(f"{number:04d}.{name}", content) for name, content in members.items()]


def packed(members: list[tuple[str, bytes]], kinds: dict[str, bytes] | None = None, link: str = "/etc/passwd") -> bytes:
    """A tar; ``kinds`` has the types of members that are not files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type = (kinds or {}).get(name, tarfile.REGTYPE)
            info.linkname = link if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(content) if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def unpacked(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def zip_of(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


# mutations


def flip_bits(data: bytearray, draw: random.Random) -> None:
    """Anywhere, or only at the beginning, where headers are."""
    end = draw.choice((len(data), min(600, len(data))))
    for _ in range(draw.choice((1, 1, 3, 20))):
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)


def truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def overwrite(data: bytearray, draw: random.Random) -> None:
    at, length = draw.randrange(len(data)), draw.choice((1, 8, 64, 600))
    data[at : at + length] = draw.choice((b"\0", b"\xff")) * len(data[at : at + length])


def repeat(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    data[at:at] = data[at : at + draw.choice((1, 30, 512))]


def huge_length(data: bytearray, draw: random.Random) -> None:
    at = draw.choice((0, draw.randrange(len(data))))
    data[at : at + 8] = struct.pack(draw.choice("<>") + "Q", draw.choice((1 << 31, 1 << 40, (1 << 63) - 1)))


MUTATIONS = (flip_bits, truncate, overwrite, repeat, huge_length)


def mutated(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2))):
        if changed:
            draw.choice(MUTATIONS)(changed, draw)
    return bytes(changed)


def mutated_inside(data: bytes, draw: random.Random) -> bytes:
    """Members of a zip archive changed, with right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    return zip_of({n: mutated(c or b"x", draw) if draw.random() < 0.2 else c for n, c in files.items()})


# made by hand


class Payload:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def always(content: bytes) -> Make:
    return lambda draw: content


def pickles(canary: Path) -> Named:
    code = f"open({str(canary)!r}, 'w').close()"
    payloads = [
        Payload(os.system, f"touch {canary}"),
        Payload(builtins.exec, code),
        Payload(builtins.eval, code),
        Payload(subprocess.call, ["touch", str(canary)]),
        Payload(getattr, Payload(__import__, "os"), "getcwd"),
        Payload(Path.touch, canary),
        Payload(torch.load, str(canary)),
        Payload(builtins.open, str(canary), "w"),
    ]
    made: Named = []
    for payload in payloads:
        for content in (payload, {"image_proj": payload}, {"state_dict": {"a": payload}, "global_step": 1}):
            made.append(("raw", lambda draw, c=content: pickle.dumps(c, protocol=draw.randrange(5))))
            made.append(("zip", lambda draw, c=content: torch_file(pickle.dumps(c, protocol=2))))
    bomb = {"archive/data.pkl": bytes(100_000_000), "archive/version": b"3"}
    return [
        *made,
        ("deep", always(torch_file(b"(" * 200_000 + b"l" * 200_000 + b"."))),
        ("huge string", always(torch_file(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x."))),
        ("zip bomb", lambda draw: zip_of(bomb, zipfile.ZIP_DEFLATED)),
        ("zip slip", always(zip_of({"archive/data.pkl": pickle.dumps({}), f"../../{canary.name}": b"x"}))),
    ]


def torch_file(pickled: bytes) -> bytes:
    return zip_of({"archive/data.pkl": pickled, "archive/byteorder": b"little", "archive/version": b"3\n"})


def checkpoints_by_hand(material: Material) -> Named:
    odd: list[Any] = [
        {"state_dict": {}, "global_step": 1},
        {"state_dict": [1], "global_step": "x", "adapter_metadata": 3},
        {"state_dict": {"trainable.x": 1}, "global_step": 1, "adapter_metadata": {"a": 1}},
        {"state_dict": {3: torch.zeros(1)}, "global_step": 1, "adapter_metadata": {}},
        [1, 2],
        torch.zeros(3),
    ]
    return [*pickles(material.canary), *(("odd content", always(saved(each))) for each in odd)]


def headers_by_hand(material: Material) -> Named:
    def of(header: bytes, data: bytes = bytes(64)) -> Make:
        return always(struct.pack("<Q", len(header)) + header + data)

    def tensor(**changes: Any) -> Make:
        entry = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]} | changes
        return of(json.dumps({"image_proj.proj.weight": entry}).encode())

    tensors, metadata = material.tensors, material.metadata
    return [
        ("length", always(struct.pack("<Q", 1 << 62) + b"{}")),
        ("deep", of(DEEP)),
        ("deep in metadata", of(b'{"__metadata__":' + b'{"a":' * 50_000)),
        ("overlap", tensor(data_offsets=[0, 1 << 60])),
        ("shape", tensor(shape=[1 << 40, 1 << 40])),
        ("negative", tensor(shape=[-1, 4])),
        ("dtype", tensor(dtype="O")),
        ("metadata", lambda draw: save(tensors, dict.fromkeys(metadata, draw.choice(ODD)))),
        ("one entry", lambda draw: save(tensors, metadata | {draw.choice(list(metadata)): draw.choice(ODD)})),
        ("names", of(json.dumps({f"ip_adapter.{i}.to_k_ip.weight": {} for i in range(3)}).encode())),
        ("scalar", always(save({name: torch.zeros(()) for name in tensors}, metadata))),
        ("empty", always(save({}, {}))),
        ("flat", always(save({name: tensor.flatten() for name, tensor in tensors.items()}, metadata))),
    ]


def shards_by_hand(material: Material) -> Named:
    image, text, about = (content for _, content in sample(1))
    odd_json = (
        *(b'{"a":' + DEEP + b"]" * 100_000 + b"}", b'{"a":"' + b"x" * 30_000_000 + b'"}', b"[1]"),
        *(b'{"punsafe":' + b"9" * 100_000 + b"}", b'{"punsafe": NaN, "caption": [[], {}, null, 3, "\\ud800"]}'),
    )
    names = (f"../../{CANARY}.png", f"{material.canary}.png", "..\\..\\a.png")

    def between(*members: tuple[str, bytes], kinds: dict[str, bytes] | None = None, link: str = "/etc/passwd") -> Make:
        """A shard with these members between two valid samples."""
        return always(packed([*sample(0), *members, *sample(2)], kinds, link))

    def of_image(data: bytes, extension: str = "png") -> Make:
        return between((f"a.{extension}", data), ("a.txt", text))

    def of_json(data: bytes) -> Make:
        return between(("a.png", image), ("a.json", data), ("a.txt", text))

    def of_name(name: str) -> Make:
        return between((name, image), (name.rpartition(".")[0] + ".txt", text))

    def of_kind(kind: bytes, link: str = "/etc/passwd") -> Make:
        return between(("a.png", b""), ("a.txt", text), kinds={"a.png": kind}, link=link)

    return [
        *((f"name {name}", of_name(name)) for name in names),
        *((f"type {kind!r}", of_kind(kind)) for kind in (b"1", b"2", b"3", b"4", b"6", b"7", b"Z")),
        ("link inside", of_kind(tarfile.SYMTYPE, "0000.png")),
        *((f"json {data[:16]!r}", of_json(data)) for data in odd_json),
        ("large text", always(packed([("a.png", image), ("a.txt", b"x" * 3_000_000), ("a.json", about)]))),
        ("pixels", of_image(bomb(60_000, 60_000))),
        ("just too many", of_image(bomb(10_000, 10_001))),
        ("no pixels", of_image(bomb(0, 5))),
        ("text in PNG", lambda draw: of_image(png_with(b"iTXt", b"key\0\1\0\0\0"))(draw)),
        ("profile", lambda draw: of_image(png_with(b"iCCP", b"icc\0\0"))(draw)),
        ("frames", lambda draw: of_image(animation("GIF", 3000), "gif")(draw)),
        ("frames of WebP", lambda draw: of_image(animation("WEBP", 300), "webp")(draw)),
        ("scans", lambda draw: of_image(jpeg_of_scans(500), "jpg")(draw)),
        ("PostScript", of_image(postscript(material.canary), "jpg")),
        ("SVG", of_image(b'<svg xmlns="http://www.w3.org/2000/svg" width="99999" height="99999"></svg>')),
        ("gzip bomb", lambda draw: gzip.compress(packed([("a.png", bytes(300_000_000))]), 9)),
        ("sizes", lambda draw: header_of("a.png", draw.choice((1 << 33, 1 << 60, 8**11 - 1))) + bytes(2048)),
        ("names of names", always(long_name(b"a.png") * 5000 + packed(sample(0)))),
        ("PAX of PAX", always(pax(b"comment=x") * 5000 + packed(sample(0)))),
        ("PAX size", always(pax(b"size=-5") + packed(sample(0)))),
        ("PAX sparse", always(pax(b"GNU.sparse.map=0,1,2,3", b"GNU.sparse.size=99999999999") + packed(sample(0)))),
        ("PAX length", always(pax(b"path=x", claimed=10**12) + packed(sample(0)))),
        ("many members", always(packed([("a.png", image)] * 3000))),
        ("tar in tar", always(packed([("a.tar", packed(sample(0))), *sample(1)]))),
    ]


def png_with(kind: bytes, start: bytes) -> bytes:
    """A chunk that decompresses to 200 MB, three times."""
    png, bomb = encoded(Image.new("RGB", (8, 8)), "PNG"), png_chunk(kind, start + zlib.compress(bytes(200_000_000), 9))
    return png[:33] + bomb * 3 + png[33:]


def animation(kind: str, frames: int) -> bytes:
    images = [Image.new("P" if kind == "GIF" else "RGB", (8, 8), i % 250) for i in range(frames)]
    return encoded(images[0], kind, save_all=True, append_images=images[1:])


def jpeg_of_scans(number: int) -> bytes:
    """A progressive JPEG of 4000 × 4000 px, one of whose scans is repeated."""
    data = encoded(Image.new("L", (4000, 4000)), "JPEG", progressive=True)
    begin = data.rindex(b"\xff\xda")
    return data[:begin] + data[begin:-2] * number + data[-2:]


def postscript(canary: Path) -> bytes:
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n({canary}) (w) file\n".encode()


def header_of(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def long_name(name: bytes) -> bytes:
    return header_of("././@LongLink", len(name), tarfile.GNUTYPE_LONGNAME) + name.ljust(512, b"\0")


def pax(*records: bytes, claimed: int | None = None) -> bytes:
    lines = b"".join(b"%d %s\n" % (len(record) + 4, record) for record in records)
    header = header_of("PaxHeader", len(lines) if claimed is None else claimed, tarfile.XHDTYPE)
    return header + lines.ljust(-(-len(lines) // 512) * 512, b"\0")


def caches_by_hand(material: Material) -> Named:
    members = unpacked(valid_cache())

    def of(name: str, change: Callable[[bytes], bytes]) -> Make:
        return always(packed([(n, change(content) if n == name else content) for n, content in members]))

    def entries(part: str, changes: dict[str, Any]) -> Make:
        return of(f"cache.{part}.json", lambda content: json.dumps(json.loads(content) | changes).encode())

    def first(tensors: dict[str, torch.Tensor], **changes: Any) -> Make:
        about = {"index": 0, "captions": [["a", 1.0]], "size": None, "target": None} | changes
        return of("0000.safetensors", lambda content: save(tensors, {"sample": json.dumps(about)}))

    headers: list[dict[str, Any]] = [
        *({"more": 1}, {"choices": {}}, {"choices": [1]}, {"sizes": {}}, {"source": {"a": 1}}),
        *({"sizes": {"kept": 3, "latent_shape": "x"}}, {"choices": {"crop": "center", "buckets": [[0, -1]]}}),
        {"choices": {"crop": "center", "reference_fit": "crop", "background": "white", "buckets": []}},
    ]
    abouts: list[dict[str, Any]] = [{}, {"index": "x"}, {"captions": []}, {"captions": [["a", 1], ["b", 2]]}]
    dtypes = {"mean_CHW": torch.float16, "logvar_CHW": torch.float16, "pooled_E": torch.float16}
    cut = {n: t.to(dtypes.get(n, torch.int32))[..., :1].contiguous() for n, t in cached_tensors(0).items()}
    return [
        ("deep header", of("cache.header.json", lambda content: DEEP)),
        ("list header", of("cache.header.json", lambda content: b"[]")),
        *((f"header {change}", entries("header", change)) for change in headers),
        *(
            (f"rejects {rejects}", entries("closing", {"rejects": rejects}))
            for rejects in ({"x": 10**15}, {"x": -1, "y": "z"})
        ),
        ("deep closing", of("cache.closing.json", lambda content: DEEP)),
        ("deep sample", of("0000.safetensors", lambda content: struct.pack("<Q", len(DEEP)) + DEEP)),
        ("no arrays", first({})),
        ("other arrays", first({"x": torch.zeros(3)})),
        *((f"other shapes {change}", first(cut, **change)) for change in abouts),
        ("odd reject", of("0009.rejected.json", lambda content: b'{"index": [], "reason": {}, "size": "x"}')),
        ("link", always(packed([*members, ("a.safetensors", b"")], {"a.safetensors": b"2"}))),
        ("outside", always(packed([*members[:-1], (f"../{CANARY}.safetensors", b"x")]))),
    ]


# readers


def read_adapter(path: Path, run: Path) -> None:
    export(OmegaConf.structured(Options(adapter=str(path))))
    export(OmegaConf.structured(Options(adapter=str(path), out=str(run / "out.safetensors"), layout="ipa")))


def read_training(path: Path, run: Path) -> None:
    placed = run / "checkpoints" / "step_00000003.ckpt"
    placed.parent.mkdir()
    shutil.copyfile(path, placed)
    newest_whole(placed.parent)
    read_checkpoint(placed)
    export(OmegaConf.structured(Options(adapter=str(placed))))


def read_images(path: Path, run: Path) -> None:
    placed = shutil.copyfile(path, run / "00000.tar")
    unsafe = {"key": "json.punsafe", "max": 0.5, "missing": "keep"}
    filters = {"unsafe": unsafe, "side": {"key": "short_side_px", "min": 1}}
    source = ShardSource.of("train", shards=str(placed), captions=["txt", "json.caption"], filters=filters)
    preparation = ImagePreparation(16, 8, (4, 2, 2))
    for found in source.read(str(placed)):
        if isinstance(found, Record):
            with contextlib.suppress(Rejected):
                preparation.sample(found, Address(0, 0, "train", found.shard, found.index), None)


def read_features(path: Path, run: Path) -> None:
    placed = shutil.copyfile(path, run / "00000.tar")
    data = CachedDataModule(str(placed), batch_size=2, num_workers=0, background=None)
    data.fit_to(image_size_px=16, reference_size_px=8, latent_shape=(4, 2, 2))
    assert isinstance(data.train_preparation(), CachedPreparation)
    for batch in islice(data.train_dataloader(), 6):
        data.consumed(batch)


KINDS = {
    kind.name: kind
    for kind in (
        Kind("safetensors", ".safetensors", lambda m: [save(m.tensors, m.metadata)], headers_by_hand, read_adapter),
        Kind("bin", ".bin", lambda m: [saved(nested(m.tensors))], lambda m: pickles(m.canary), read_adapter),
        Kind("checkpoint", ".ckpt", lambda m: [valid_checkpoint(m)], checkpoints_by_hand, read_training),
        Kind("shard", ".tar", lambda m: [valid_shard(), gzip.compress(valid_shard())], shards_by_hand, read_images),
        Kind("cache", ".tar", lambda m: [valid_cache()], caches_by_hand, read_features),
    )
}


# cases


def make_case(material: Material, kind: Kind, number: int) -> tuple[str, bytes]:
    """What it is, and the file's content."""
    draw = random.Random(f"{material.seed} {kind.name} {number}")
    valid, by_hand = material.of(kind)
    if number < len(by_hand) or draw.random() < BY_HAND_AGAIN:
        name, make = by_hand[number % len(by_hand)]
        return name, make(draw)
    data = draw.choice(valid)
    inside = kind.name in ("bin", "checkpoint") and draw.random() < 0.6
    return "mutated", (mutated_inside if inside else mutated)(data, draw)


def read_valid(material: Material, kind: Kind) -> list[Outcome]:
    """The outcome for the files that all others are made from; if these fail, the rest means nothing."""
    return [read_alone(material, kind, f"valid{i}", content) for i, content in enumerate(material.of(kind)[0])]


def run_case(material: Material, kind: Kind, number: int) -> tuple[str, Outcome]:
    """Make a case, and read it in a process of its own."""
    name, content = make_case(material, kind, number)
    return name, read_alone(material, kind, str(number), content)


def read_alone(material: Material, kind: Kind, label: str, content: bytes) -> Outcome:
    place = material.folder / f"{kind.name}{label}"
    run, path, report = place / "run", place / f"case{kind.suffix}", place / "report.txt"
    run.mkdir(parents=True)
    path.write_bytes(content)
    before = listing(material.folder, run)
    outcome = in_a_process(lambda: kind.read(path, run), report)
    report.unlink(missing_ok=True)
    changed = before ^ listing(material.folder, run)
    if material.canary.exists():
        outcome = Outcome("EXECUTED", outcome.detail)
    elif changed:
        outcome = Outcome("WROTE OUTSIDE", ", ".join(sorted(changed)))
    material.canary.unlink(missing_ok=True)
    shutil.rmtree(place)
    return outcome


def listing(folder: Path, without: Path) -> set[str]:
    """All files and folders with their sizes, except those in the run's folder."""
    return {
        f"{path.relative_to(folder)} {path.stat().st_size if path.is_file() else ''}"
        for path in folder.rglob("*")
        if without not in path.parents
    }


def in_a_process(read: Callable[[], Any], report: Path) -> Outcome:
    """Call ``read`` in a fork with limits, which writes its outcome to ``report``."""
    report.touch()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        read_and_exit(read, report)
    ends, outcome = time.monotonic() + LIMIT_S, None
    while outcome is None and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
        if time.monotonic() > ends:
            outcome = Outcome("HANGS", f"longer than {LIMIT_S} s")
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if outcome is not None:
        os.waitpid(child, 0)
        return outcome
    word, _, detail = report.read_text(errors="replace").partition("\n")
    return Outcome(word or "CRASHED", detail)


def read_and_exit(read: Callable[[], Any], report: Path) -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES, size + LIMIT_BYTES))
    sink = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(sink, number)
    try:
        warnings.simplefilter("ignore")
        read()
        words = "read"
    except Exception as error:
        message = cli.explain_failure(error)
        words = f"refused\n{message}" if message else f"TRACEBACK\n{''.join(traceback.format_exception(error))}"
    except BaseException as error:
        words = f"ENDED\n{error!r}"
    report.write_text(words, errors="replace")
    os._exit(0)


def cases(seed: int, number: int, names: list[str], first: int = 0) -> Iterator[tuple[str, int, str, Outcome]]:
    """``number`` cases, spread over the kinds: kind, number of the case, what it is, and its outcome."""
    cli.refuse_pickles()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        material = Material(Path(folder), seed)
        for name in names:  # once, not in every child
            material.of(KINDS[name])
        for i in range(number):
            kind, case = KINDS[names[i % len(names)]], first + i // len(names)
            yield kind.name, case, *run_case(material, kind, case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("seed", 1), ("number", 500), ("first", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    counted: Counter[tuple[str, str]] = Counter()
    for kind, number, what, outcome in cases(options.seed, options.number, options.kinds, options.first):
        counted[kind, outcome.word] += 1
        if not outcome.good or options.number == 1:
            print(f"{kind} {number} ({what}): {outcome.word}\n{outcome.detail}\n", flush=True)
    for (kind, word), times in sorted(counted.items()):
        print(f"{kind:15} {word:15} {times:5}")
    sys.exit(any(word not in ("read", "refused") for _, word in counted))


if __name__ == "__main__":
    main()
