"""Hostile files, made from sound ones: each is read, or refused in words; nothing runs, nothing is written elsewhere.

    python tests/fuzz.py --seed 1 --number 500
    python tests/fuzz.py --seed 1 --number 1 --kinds shard --first 17      # one case again, with its traceback

A case is a kind and a number; the same seed makes the same case. It is read in a process of its own, which has a limit
of memory and of time, and is killed with all that it started. *Refused* is what a command would tell the user in words
(``ipa.cli.explain_failure``). Whatever else comes out is a failure: a traceback, a hang, too much memory, a canary
(a file that a payload makes), or a change outside the run's folder.
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
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import hydra  # noqa: E402
import torch  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from hydra.core.hydra_config import HydraConfig  # noqa: E402
from hydra.utils import instantiate  # noqa: E402
from omegaconf import OmegaConf, open_dict  # noqa: E402
from PIL import Image, PngImagePlugin  # noqa: E402
from safetensors.torch import save  # noqa: E402

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
from ipa.training.checkpointing import newest_whole, read_checkpoint, write_checkpoint  # noqa: E402
from ipa.training.configuration import settle_configuration  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LIMIT_S, LIMIT_BYTES = 30, 1_500_000_000
MALICIOUS = 0.3  # share of the cases that are made by hand
ODD = ("", "-1", "1e9", "x", "999999999999", "ü")  # values of metadata
MAGIC_CANARY = "canary"

Make = Callable[[random.Random], bytes]
Reads = Callable[[Path, Path], Any]  # the file, and the run's folder


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
    """Sound files to mutate, what is made by hand, and what reads them."""

    name: str
    sound: Callable[[Material], list[tuple[str, bytes]]]
    by_hand: Callable[[Material], list[tuple[str, Make]]]
    read: Reads


@dataclass
class Material:
    """What sound files are made of; ``canary`` is what a payload makes when it runs."""

    folder: Path
    seed: int = 0
    made: dict[str, list[tuple[str, Make]]] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.tensors = {
            name: tensor[:6] if tensor.ndim > 1 and "ip_adapter" in name else tensor
            for name, tensor in load_adapter(ROOT / "demo/adapters/simple_global.safetensors")[0].items()
        }

    def by_hand(self, kind: Kind) -> list[tuple[str, Make]]:
        if kind.name not in self.made:
            self.made[kind.name] = kind.by_hand(self)
        return self.made[kind.name]

    @property
    def canary(self) -> Path:
        return self.folder / MAGIC_CANARY

    @cached_property
    def metadata(self) -> dict[str, str]:
        return load_adapter(ROOT / "demo/adapters/simple_global.safetensors")[1]

    @cached_property
    def safetensors(self) -> bytes:
        return save(self.tensors, self.metadata)

    @cached_property
    def pickled(self) -> bytes:
        out = io.BytesIO()
        torch.save(nested(self.tensors), out)
        return out.getvalue()

    @cached_property
    def checkpoint(self) -> bytes:
        state = {f"trainable.{name}": tensor for name, tensor in from_published(self.tensors).items()}
        content = {"state_dict": state, "global_step": 3, "adapter_metadata": self.metadata, "loops": {"a": [1, 2]}}
        path = self.folder / "sound.ckpt"
        write_checkpoint(path, content)
        return path.read_bytes()

    @cached_property
    def shard(self) -> bytes:
        return packed([member for number in range(4) for member in sample(number)])

    @cached_property
    def cache(self) -> bytes:
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

    @cached_property
    def configuration(self) -> bytes:
        folder = self.folder / "sound"
        settle_configuration(compose(folder), folder, resumes=False)
        return (folder / "config.yaml").read_bytes()


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
    formats = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP")
    kind = formats[number % len(formats)]
    out = io.BytesIO()
    Image.frombytes("RGB", (24, 16), random.Random(number).randbytes(24 * 16 * 3)).save(out, kind)
    extension = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    about = json.dumps({"width": 24, "punsafe": 0.1, "caption": ["a", "b"]}).encode()
    return [
        (f"{number:04d}.{extension}", out.getvalue()),
        (f"{number:04d}.txt", b"a thing"),
        (f"{number:04d}.json", about),
    ]


def packed(members: list[tuple[str, bytes]], kinds: dict[str, bytes] | None = None, link: str = "/etc/passwd") -> bytes:
    """A tar; ``kinds`` has the types of members that are no files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.type = (kinds or {}).get(name, tarfile.REGTYPE)
            info.linkname = link if info.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
            info.size = len(content) if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


# mutations

Mutation = Callable[[bytearray, random.Random], None]


def flip_bits(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 3, 20))):
        at = draw.randrange(len(data))
        data[at] ^= 1 << draw.randrange(8)


def flip_early(data: bytearray, draw: random.Random) -> None:
    """Headers are at the beginning."""
    for _ in range(draw.choice((1, 2, 5))):
        data[draw.randrange(min(600, len(data)))] = draw.randrange(256)


def truncate(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(len(data)) :]


def zeros(data: bytearray, draw: random.Random) -> None:
    at, length = draw.randrange(len(data)), draw.choice((1, 8, 64, 600))
    data[at : at + length] = bytes(len(data[at : at + length]))


def ones(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    data[at : at + 8] = b"\xff" * len(data[at : at + 8])


def swap(data: bytearray, draw: random.Random) -> None:
    length = min(draw.choice((4, 64, 512)), len(data) // 2)
    one, other = draw.randrange(len(data) - length + 1), draw.randrange(len(data) - length + 1)
    first, second = bytes(data[one : one + length]), bytes(data[other : other + length])
    data[one : one + length], data[other : other + length] = second, first


def doubled(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    data[at:at] = data[at : at + draw.choice((1, 30, 512))]


def huge_length(data: bytearray, draw: random.Random) -> None:
    at = draw.choice((0, draw.randrange(len(data))))
    data[at : at + 8] = struct.pack(draw.choice("<>") + "Q", draw.choice((1 << 31, 1 << 40, (1 << 63) - 1)))


MUTATIONS: tuple[Mutation, ...] = (flip_bits, flip_early, truncate, zeros, ones, swap, doubled, huge_length)


def mutated(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2))):
        if changed:
            draw.choice(MUTATIONS)(changed, draw)
    return bytes(changed)


ODD_VALUES: tuple[Any, ...] = (
    None,
    -1,
    0,
    1e300,
    float("nan"),
    "x",
    "",
    [],
    {},
    [[]],
    True,
    "1",
    "a\nb",
    10**30,
    "ü",
    ["a", 3],
    {"a": 1},
)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, child in node.items() if isinstance(node, dict) else []:
        yield (*path, key)
        yield from leaves(child, (*path, key))


def odd_options(text: bytes, draw: random.Random) -> bytes:
    """A configuration that is well written, but says something odd, or nothing."""
    content: Any = OmegaConf.to_container(OmegaConf.create(text.decode()))
    for _ in range(draw.choice((1, 1, 3))):
        *path, last = draw.choice(list(leaves(content)))
        node = content
        for key in path:
            node = node[key]
        if draw.random() < 0.2:
            del node[last]
        else:
            node[last] = draw.choice(ODD_VALUES)
    return OmegaConf.to_yaml(OmegaConf.create(content)).encode()


def odd_override(material: Material, draw: random.Random) -> bytes:
    content: Any = OmegaConf.to_container(OmegaConf.create(material.configuration.decode()))
    name = ".".join(("data", *draw.choice(list(leaves(content["data"])))))
    return f"{name}={json.dumps(draw.choice(ODD_VALUES))}".encode()


def rezipped(data: bytes) -> bytes:
    """The same zip archive with right sums: who writes a file can compute them, too."""
    out_zip = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out_zip, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    except Exception:  # damaged beyond repair
        return data
    return out_zip.getvalue()


# made by hand


class Payload:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def payloads(canary: Path) -> list[Any]:
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    return [
        Payload(os.system, touch),
        Payload(builtins.exec, code),
        Payload(builtins.eval, code),
        Payload(subprocess.call, ["touch", str(canary)]),
        Payload(getattr, Payload(__import__, "os"), "getcwd"),
        Payload(Path.touch, canary),
        Payload(torch.load, str(canary)),
        Payload(builtins.open, str(canary), "w"),
    ]


def pickles(canary: Path) -> list[tuple[str, Make]]:
    made: list[tuple[str, Make]] = []
    for payload in payloads(canary):
        for wrap in (lambda p: p, lambda p: {"image_proj": p}, lambda p: {"state_dict": {"a": p}, "global_step": 1}):
            content = wrap(payload)
            made.append(("raw", lambda draw, c=content: pickle.dumps(c, protocol=draw.randrange(5))))
            made.append(("zip", lambda draw, c=content: torch_file(pickle.dumps(c, protocol=2))))
    deep = b"(" * 200_000 + b"l" * 200_000 + b"."
    made.append(("deep", lambda draw: torch_file(deep)))
    made.append(("huge string", lambda draw: torch_file(b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.")))
    made.append(("zip bomb", lambda draw: zip_of({"archive/data.pkl": bytes(400_000_000), "archive/version": b"3"})))
    outside = {"archive/data.pkl": pickle.dumps({}), f"../../{canary.name}": b"x"}
    made.append(("zip slip", lambda draw: zip_of(outside)))
    return made


def torch_file(pickled: bytes) -> bytes:
    return zip_of({"archive/data.pkl": pickled, "archive/byteorder": b"little", "archive/version": b"3\n"})


def zip_of(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if len(files) == 2 else zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def headers_by_hand(material: Material) -> list[tuple[str, Make]]:
    def of(header: bytes, data: bytes = bytes(64)) -> bytes:
        return struct.pack("<Q", len(header)) + header + data

    def tensor(**changes: Any) -> bytes:
        entry = {"dtype": "F16", "shape": [2, 2], "data_offsets": [0, 8]} | changes
        return of(json.dumps({"image_proj.proj.weight": entry}).encode())

    names = json.dumps({f"ip_adapter.{i}.to_k_ip.weight": {} for i in range(3)}).encode()
    return [
        ("length", lambda draw: struct.pack("<Q", 1 << 62) + b"{}"),
        ("deep", lambda draw: of(b"[" * 100_000)),
        ("deep in metadata", lambda draw: of(b'{"__metadata__":' + b'{"a":' * 50_000)),
        ("overlap", lambda draw: tensor(data_offsets=[0, 1 << 60])),
        ("shape", lambda draw: tensor(shape=[1 << 40, 1 << 40])),
        ("negative", lambda draw: tensor(shape=[-1, 4])),
        ("dtype", lambda draw: tensor(dtype="O")),
        ("metadata", lambda draw: save(material.tensors, dict.fromkeys(material.metadata, draw.choice(ODD)))),
        ("names", lambda draw: of(names)),
        ("scalar", lambda draw: save({name: torch.zeros(()) for name in material.tensors}, material.metadata)),
        ("empty", lambda draw: save({}, {})),
        ("flat", lambda draw: save({n: t.flatten() for n, t in material.tensors.items()}, material.metadata)),
    ]


def shards_by_hand(material: Material) -> list[tuple[str, Make]]:
    picture, text, about = (content for _, content in sample(1))
    outside = f"../../{material.canary.name}.png"

    def with_picture(data: bytes, extension: str = "jpg") -> Make:
        return lambda draw: packed([*sample(0), (f"a.{extension}", data), ("a.txt", text), *sample(2)])

    def with_json(data: Callable[[], bytes]) -> Make:
        return lambda draw: packed([("a.png", picture), ("a.json", data()), ("a.txt", text), *sample(2)])

    def of_kind(kind: bytes, link: str = "/etc/passwd") -> Make:
        return lambda draw: packed([*sample(0), ("a.png", b""), ("a.txt", text), *sample(2)], {"a.png": kind}, link)

    def named(name: str) -> Make:
        return lambda draw: packed([(name, picture), (name.rpartition(".")[0] + ".txt", text), *sample(2)])

    made: list[tuple[str, Make]] = [
        ("outside", named(outside)),
        ("absolute", named(f"{material.canary}.png")),
        ("backslashes", named("..\\..\\a.png")),
        ("drive", named("C:\\a.png")),
        *((f"type {kind!r}", of_kind(kind)) for kind in (b"1", b"2", b"3", b"4", b"6", b"7", b"Z")),
        ("link inside", of_kind(tarfile.SYMTYPE, "0000.png")),
        ("deep json", with_json(lambda: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")),
        ("large json", with_json(lambda: b'{"a":"' + b"x" * 30_000_000 + b'"}')),
        ("long number", with_json(lambda: b'{"punsafe":' + b"9" * 100_000 + b"}")),
        ("list json", with_json(lambda: b"[1]")),
        ("not a number", with_json(lambda: b'{"punsafe": NaN, "caption": [[], {}, null, 3, "\\ud800"]}')),
        ("large text", lambda draw: packed([("a.png", picture), ("a.txt", b"x" * 3_000_000), ("a.json", about)])),
        ("pixels", with_picture(png_claiming(60_000, 60_000), "png")),
        ("just too many", with_picture(png_claiming(10_000, 10_001), "png")),
        ("no pixels", with_picture(png_claiming(0, 5), "png")),
        ("text in PNG", with_picture(png_with_text(), "png")),
        ("profile", with_picture(png_with_profile(), "png")),
        ("frames", with_picture(animation("GIF", 3000), "gif")),
        ("frames of WebP", with_picture(animation("WEBP", 300), "webp")),
        ("scans", with_picture(jpeg_of_scans(500))),
        ("PostScript", with_picture(postscript(material.canary))),
        ("SVG", with_picture(b'<svg xmlns="http://www.w3.org/2000/svg" width="99999" height="99999"></svg>', "png")),
        ("a bomb of a TIFF", with_picture(tiff_claiming(65_000, 65_000), "tif")),
        ("bomb", lambda draw: gzip.compress(packed([("a.png", bytes(300_000_000))]), 9)),
        ("bombs of xz", lambda draw: __import__("lzma").compress(packed([("a.png", bytes(300_000_000))]), preset=0)),
        ("bomb of bzip2", lambda draw: __import__("bz2").compress(packed([("a.png", bytes(200_000_000))]))),
        ("sizes", lambda draw: sized(draw.choice((1 << 33, 1 << 60, 8**11 - 1)))),
        ("names of names", lambda draw: long_names(5000)),
        ("PAX of PAX", lambda draw: pax_headers(5000)),
        ("PAX size", lambda draw: pax_records(b"size=-5")),
        ("PAX sparse", lambda draw: pax_records(b"GNU.sparse.map=0,1,2,3,4", b"GNU.sparse.size=99999999999")),
        ("PAX length", lambda draw: pax_records(b"path=x", claimed=10**12)),
        ("many members", lambda draw: packed([("a.png", picture)] * 3000)),
        ("tar in tar", lambda draw: packed([("a.tar", packed(sample(0))), *sample(1)])),
    ]
    return made


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


def png_with_text() -> bytes:
    """A chunk of compressed text that grows to 200 MB."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    bomb = chunk(b"iTXt", b"key\0\1\0\0\0" + zlib.compress(bytes(200_000_000), 9))
    return out.getvalue()[:33] + bomb * 3 + out.getvalue()[33:]


def png_with_profile() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=PngImagePlugin.PngInfo())
    bomb = chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(200_000_000), 9))
    return out.getvalue()[:33] + bomb + out.getvalue()[33:]


def animation(kind: str, frames: int) -> bytes:
    pictures = [Image.new("P" if kind == "GIF" else "RGB", (8, 8), i % 250) for i in range(frames)]
    out = io.BytesIO()
    pictures[0].save(out, kind, save_all=True, append_images=pictures[1:])
    return out.getvalue()


def jpeg_of_scans(number: int) -> bytes:
    """A progressive JPEG of 4000 x 4000 px, one of whose scans comes again and again."""
    out = io.BytesIO()
    Image.new("L", (4000, 4000)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    begin = data.rindex(b"\xff\xda")
    return data[:begin] + data[begin:-2] * number + data[-2:]


def tiff_claiming(width: int, height: int) -> bytes:
    tags = [
        (256, 4, width),
        (257, 4, height),
        (258, 3, 8),
        (259, 3, 8),
        (262, 3, 1),
        (273, 4, 8),
        (278, 4, height),
        (279, 4, 1 << 31),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def postscript(canary: Path) -> bytes:
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n({canary}) (w) file\n".encode()


def sized(size: int) -> bytes:
    info = tarfile.TarInfo("a.png")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


def long_names(number: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    return (info.tobuf(tarfile.GNU_FORMAT) + b"a.png".ljust(512, b"\0")) * number + packed(sample(0))


def pax_headers(number: int) -> bytes:
    return pax_block(b"comment=x") * number + packed(sample(0))


def pax_records(*records: bytes, claimed: int | None = None) -> bytes:
    return pax_block(*records, claimed=claimed) + packed(sample(0))


def pax_block(*records: bytes, claimed: int | None = None) -> bytes:
    lines = b"".join(b"%d %s\n" % (len(record) + 4, record) for record in records)
    info = tarfile.TarInfo("PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, len(lines) if claimed is None else claimed
    return info.tobuf(tarfile.GNU_FORMAT) + lines.ljust(-(-len(lines) // 512) * 512, b"\0")


def caches_by_hand(material: Material) -> list[tuple[str, Make]]:
    def of(**changes: Any) -> Make:
        def make(draw: random.Random) -> bytes:
            entries = [(name, content) for name, content in members(material.cache)]
            return packed([(name, changes[name](content) if name in changes else content) for name, content in entries])

        return make

    def entries(changes: dict[str, Any]) -> Callable[[bytes], bytes]:
        return lambda content: json.dumps(json.loads(content) | changes).encode()

    header, closing, first, rejected = (
        "cache.header.json",
        "cache.closing.json",
        "0000.safetensors",
        "0009.rejected.json",
    )
    deep = b"[" * 100_000
    return [
        ("deep header", of(**{header: lambda content: deep})),
        ("list header", of(**{header: lambda content: b"[]"})),
        ("more in the header", of(**{header: entries({"more": 1})})),
        ("no choices", of(**{header: entries({"choices": {}})})),
        ("other choices", of(**{header: entries({"choices": [1]})})),
        ("no sizes", of(**{header: entries({"sizes": {}})})),
        ("odd sizes", of(**{header: entries({"sizes": {"kept": 3, "latent_shape": "x"}})})),
        ("buckets", of(**{header: entries({"choices": {"crop": "center", "buckets": [[0, -1]]}})})),
        ("source", of(**{header: entries({"source": {"a": 1}})})),
        ("endless rejects", of(**{closing: entries({"rejects": {"x": 10**15}})})),
        ("odd rejects", of(**{closing: entries({"rejects": {"x": -1, "y": "z"}})})),
        ("deep closing", of(**{closing: lambda content: deep})),
        ("deep sample", of(**{first: lambda content: struct.pack("<Q", len(deep)) + deep})),
        ("no arrays", of(**{first: lambda content: save({}, {"sample": about()})})),
        ("other arrays", of(**{first: lambda content: save({"x": torch.zeros(3)}, {"sample": about()})})),
        ("other shapes", of(**{first: lambda content: save(other_shapes(), {"sample": about()})})),
        ("index", of(**{first: lambda content: save(other_shapes(), {"sample": about(index="x")})})),
        ("captions", of(**{first: lambda content: save(other_shapes(), {"sample": about(captions=[])})})),
        (
            "more captions",
            of(**{first: lambda content: save(other_shapes(), {"sample": about(captions=[["a", 1], ["b", 2]])})}),
        ),
        ("odd reject", of(**{rejected: lambda content: b'{"index": [], "reason": {}, "size": "x"}'})),
        ("link", lambda draw: packed([*members(material.cache), ("a.safetensors", b"")], {"a.safetensors": b"2"})),
        ("outside", lambda draw: packed([*members(material.cache)[:-1], (f"../{MAGIC_CANARY}.safetensors", b"x")])),
    ]


def about(**changes: Any) -> str:
    return json.dumps({"index": 0, "captions": [["a", 1.0]], "size": None, "target": None} | changes)


def other_shapes() -> dict[str, torch.Tensor]:
    dtypes = {"mean_CHW": torch.float16, "logvar_CHW": torch.float16, "pooled_E": torch.float16}
    return {
        name: (tensor.to(dtypes.get(name, torch.int32))[..., :1]).contiguous()
        for name, tensor in cached_tensors(0).items()
    }


def members(data: bytes) -> list[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def configurations_by_hand(material: Material) -> list[tuple[str, Make]]:
    canary = material.canary
    text = material.configuration

    def with_option(name: str, value: Any) -> Make:
        def make(draw: random.Random) -> bytes:
            cfg = OmegaConf.create(text.decode())
            OmegaConf.update(cfg, name, value, force_add=True)
            return OmegaConf.to_yaml(cfg).encode()

        return make

    def call(target: str, *arguments: Any) -> dict[str, Any]:
        return {"_target_": target, "_args_": list(arguments)}

    touch = f"touch {canary}"
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
    )
    return [
        ("os.system", with_option("callbacks.evil", call("os.system", touch))),
        ("subprocess", with_option("schedule", call("subprocess.call", ["touch", str(canary)]))),
        ("exec", with_option("data.drops", call("builtins.exec", f"open({str(canary)!r}, 'w')"))),
        ("hydra", with_option("optimizer", call("hydra.utils.get_method", "os.system"))),
        ("in a list", with_option("data.filters", [call("os.system", touch)])),
        ("partial", with_option("callbacks.evil", call("os.system", touch) | {"_partial_": True})),
        ("environment", with_option("licence", "${oc.env:HOME}")),
        ("nested expression", with_option("licence", "${oc.${x}:HOME}")),
        (
            "a shell",
            with_option(
                "data",
                {"_target_": "ipa.data.datamodule.ShardDataModule", "train": f"pipe:{touch}", "schemes": ["pipe"]},
            ),
        ),
        ("outside", with_option("callbacks.checkpoints.folder", str(canary.parent / "elsewhere"))),
        ("outside by dots", with_option("callbacks.export.path", "../../elsewhere.safetensors")),
        ("root", with_option("trainer.default_root_dir", str(canary.parent / "elsewhere"))),
        ("no run", with_option("paths", {"run": ""})),
        ("python tags", lambda draw: b"a: !!python/object/apply:os.system ['%s']\n" % touch.encode()),
        ("laughs", lambda draw: laughs.encode()),
        ("laughs at the end", lambda draw: text + laughs.encode()),
        ("itself", lambda draw: b"a: &a {b: *a}\n"),
        ("deep", lambda draw: b"a: " + b"[" * 50_000),
        ("deep mapping", lambda draw: b"".join(b" " * n + b"a:\n" for n in range(900))),
        ("large", lambda draw: text + b"x: " + b"y" * 2_000_000),
        ("list", lambda draw: b"- 1\n"),
        ("numbers as names", lambda draw: b"1: 2\nnull: 3\n"),
        ("empty", lambda draw: b""),
        ("no text", lambda draw: draw.randbytes(300)),
    ]


OVERRIDES = [
    "data.train='pipe:touch {canary}'",
    "data.train='https://x/$(touch {canary}).tar'",
    "data.train=['s3://b/`touch {canary}`.tar','gs://b/;touch {canary};.tar']",
    "data.train='{{0..99999999999}}.tar'",
    "data.train='{{a,b}}{{{{{{{{'",
    "data.train=/dev/zero",
    "data.train='\\0'",
    "data.schemes=[pope]",
    "data.schemes=pipe data.train='pipe:touch {canary}'",
    "optimizer.lr=nan trainer.max_steps=-1",
    "optimizer.lr=-1",
    "+a.b.c=${{oc.env:NOPE_NOT_THERE}} licence=${{a.b.c}}",
    "licence=${{licence}}",
    "licence=${{oc.decode:__import__('os').system('touch {canary}')}}",
    "experiment=../../../etc/passwd",
    "recipe=/etc/passwd",
    "data.window=99999999999999999999999",
    "data.batch_size=[1,2]",
    "data.background={{white: 7}}",
    "data.captions={{a: -1}}",
    "data.filters={{x: {{key: json.a, min: abc}}}}",
    "callbacks.evil._target_=1",
    "seed=-1",
    "name=../../../../x",
    "+x={{" + "a: {{" * 60 + "}}" * 61,
    "'" * 3,
    "=",
    "a" * 20_000,
]


def overrides_by_hand(material: Material) -> list[tuple[str, Make]]:
    lines = [line.format(canary=material.canary) for line in OVERRIDES]
    return [(line[:30], lambda draw, text=line: text.encode()) for line in lines]


# readers


def read_adapter(path: Path, run: Path) -> None:
    export(OmegaConf.structured(Options(adapter=str(path))))
    export(OmegaConf.structured(Options(adapter=str(path), out=str(run / "out.safetensors"), layout="ipa")))


def read_training(path: Path, run: Path) -> None:
    folder = run / "checkpoints"
    folder.mkdir()
    placed = folder / "step_00000003.ckpt"
    shutil.copyfile(path, placed)
    newest_whole(folder)
    read_checkpoint(placed)
    export(OmegaConf.structured(Options(adapter=str(placed))))


def read_pictures(path: Path, run: Path) -> None:
    placed = run / "00000.tar"
    shutil.copyfile(path, placed)
    source = ShardSource.of(
        "train",
        shards=str(placed),
        captions=["txt", "json.caption"],
        filters={
            "unsafe": {"key": "json.punsafe", "max": 0.5, "missing": "keep"},
            "side": {"key": "short_side_px", "min": 1},
        },
    )
    preparation = ImagePreparation(16, 8, (4, 2, 2))
    for found in source.read(str(placed)):
        if isinstance(found, Record):
            with contextlib.suppress(Rejected):
                preparation.sample(found, Address(0, 0, "train", found.shard, found.index), None)


def read_features(path: Path, run: Path) -> None:
    placed = run / "00000.tar"
    shutil.copyfile(path, placed)
    data = CachedDataModule(str(placed), batch_size=2, num_workers=0, background=None)
    data.fit_to(image_size_px=16, reference_size_px=8, latent_shape=(4, 2, 2))
    preparation = data.train_preparation()
    assert isinstance(preparation, CachedPreparation)
    for batch in islice(data.train_dataloader(), 6):
        data.consumed(batch)


def read_configuration_of(path: Path, run: Path) -> None:
    shutil.copyfile(path, run / "config.yaml")
    cfg = settle_configuration(compose(run), run, resumes=True)
    datamodule: Any = instantiate(cfg.data)
    for batch in islice(
        ShardSource.read(datamodule.train_order.sources[0], datamodule.train_order.sources[0].shards[0]), 1
    ):
        assert batch is not None
    instantiate(cfg.callbacks)
    instantiate(cfg.optimizer)
    instantiate(cfg.schedule)


def read_overrides(path: Path, run: Path) -> None:
    text = path.read_bytes().decode(errors="replace").replace("\0", "")  # which no command line can hold
    words = [word for word in (text.split(" ") if "'" not in text and "{" not in text else [text]) if word]
    sys.argv = ["train.py", *words]
    command = cli._Command(lambda cfg: None, str(ROOT / "conf"), "train")
    try:
        cfg = compose(run, *words)
    except Exception as error:
        if (words_for_it := command._explain_usage(error)) is None:
            raise
        raise Refused(words_for_it) from error
    instantiate(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)).data)


class Refused(ValueError):
    """What the command line answers before a run begins."""


def compose(folder: Path, *overrides: str) -> Any:
    """The configuration for a run in ``folder``, as Hydra would hand it to the command."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        asked = [f"hydra.runtime.output_dir={folder}", "name=fuzz", *overrides]
        cfg = hydra.compose("train", asked, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        cfg.pop("hydra")
    return cfg


def ckpt_by_hand(material: Material) -> list[tuple[str, Make]]:
    made = pickles(material.canary)

    def rezip(make: Make) -> Make:
        return lambda draw: rezipped(make(draw))

    odd: list[Any] = [
        {"state_dict": {}, "global_step": 1},
        {"state_dict": [1], "global_step": "x", "adapter_metadata": 3},
        {"state_dict": {"trainable.x": 1}, "global_step": 1, "adapter_metadata": {"a": 1}},
        {"state_dict": {3: torch.zeros(1)}, "global_step": 1, "adapter_metadata": {}},
        [1, 2],
        torch.zeros(3),
    ]

    def saved(content: Any) -> Make:
        def make(draw: random.Random) -> bytes:
            out = io.BytesIO()
            torch.save(content, out)
            return rezipped(out.getvalue())

        return make

    return [
        *((f"{name}, rezipped", rezip(make)) for name, make in made),
        *(("odd content", saved(each)) for each in odd),
    ]


KINDS = {
    kind.name: kind
    for kind in (
        Kind("safetensors", lambda m: [(".safetensors", m.safetensors)], headers_by_hand, read_adapter),
        Kind("bin", lambda m: [(".bin", m.pickled)], lambda m: pickles(m.canary), read_adapter),
        Kind("checkpoint", lambda m: [(".ckpt", m.checkpoint)], ckpt_by_hand, read_training),
        Kind("shard", lambda m: [(".tar", m.shard), (".tar", gzip.compress(m.shard))], shards_by_hand, read_pictures),
        Kind("cache", lambda m: [(".tar", m.cache)], caches_by_hand, read_features),
        Kind("configuration", lambda m: [(".yaml", m.configuration)], configurations_by_hand, read_configuration_of),
        Kind("overrides", lambda m: [(".txt", b"data.val_batch_size=3")], overrides_by_hand, read_overrides),
    )
}


def make_case(material: Material, kind: Kind, number: int) -> tuple[str, str, bytes]:
    """What it is, the file's ending, and its content."""
    draw = random.Random(f"{material.seed} {kind.name} {number}")
    by_hand = material.by_hand(kind)
    if number < len(by_hand) or draw.random() < MALICIOUS / 3:
        name, make = by_hand[number % len(by_hand)]
        return name, kind.sound(material)[0][0], make(draw)
    suffix, data = draw.choice(kind.sound(material))
    changed = mutated(data, draw)
    if kind.name == "configuration" and draw.random() < 0.7:
        changed = odd_options(data, draw)
    if kind.name == "overrides" and draw.random() < 0.7:
        changed = odd_override(material, draw)
    if kind.name == "checkpoint" and draw.random() < 0.6:
        inside = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(inside, "w") as new:
            for name in old.namelist():
                new.writestr(name, mutated(old.read(name) or b"x", draw) if draw.random() < 0.2 else old.read(name))
        changed = rezipped(inside.getvalue())
    return "mutated", suffix, changed


def read_sound(material: Material, kind: Kind) -> list[Outcome]:
    """What comes of the files that all others are made from: without these the rest says nothing."""
    outcomes = []
    for number, (suffix, content) in enumerate(kind.sound(material)):
        folder = material.folder / f"{kind.name}-sound{number}"
        (folder / "run").mkdir(parents=True)
        path = folder / f"case{suffix}"
        path.write_bytes(content)
        outcomes.append(in_a_process(lambda: kind.read(path, folder / "run"), folder / "told.txt"))  # noqa: B023
        shutil.rmtree(folder)
    return outcomes


def run_case(material: Material, kind: Kind, number: int) -> tuple[str, Outcome]:
    """Make it, and read it in a process of its own."""
    name, suffix, content = make_case(material, kind, number)
    place = material.folder / f"{kind.name}{number}"
    run = place / "run"
    run.mkdir(parents=True)
    path = place / f"case{suffix}"
    path.write_bytes(content)
    before = listing(material.folder, place / "run")
    outcome = in_a_process(lambda: kind.read(path, run), place / "told.txt")
    (place / "told.txt").unlink(missing_ok=True)
    changed = before ^ listing(material.folder, place / "run")
    if material.canary.exists():
        outcome = Outcome("EXECUTED", outcome.detail)
    elif changed:
        outcome = Outcome("WROTE OUTSIDE", ", ".join(sorted(changed)))
    material.canary.unlink(missing_ok=True)
    shutil.rmtree(place)
    return name, outcome


def listing(folder: Path, without: Path) -> set[str]:
    """All files and folders with their sizes, but for what is in the run's folder."""
    return {
        f"{path.relative_to(folder)} {path.stat().st_size if path.is_file() else ''}"
        for path in folder.rglob("*")
        if without not in path.parents
    }


def in_a_process(read: Callable[[], Any], told: Path) -> Outcome:
    """``read`` in a fork with limits; it tells by a file."""
    told.touch()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        answer(read, told)
    ends = time.monotonic() + LIMIT_S
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > ends:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome("HANGS", f"longer than {LIMIT_S} s")
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    word, _, detail = told.read_text(errors="replace").partition("\n")
    return Outcome(word or "CRASHED", detail)


def answer(read: Callable[[], Any], told: Path) -> None:
    """Never returns."""
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
        message = str(error) if isinstance(error, Refused) else cli.explain_failure(error)
        trace = "".join(traceback.format_exception(error))
        words = f"refused\n{message}" if message and message != "None" else f"TRACEBACK\n{trace}"
    except BaseException as error:
        words = f"ENDED\n{error!r}"
    told.write_text(words, errors="replace")
    os._exit(0)


def cases(seed: int, number: int, names: list[str], first: int = 0) -> Iterator[tuple[str, int, str, Outcome]]:
    """``number`` cases, spread over the kinds: kind, number of the case, what it is, and what came of it."""
    cli.refuse_pickles()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        material = Material(Path(folder), seed)
        for name in names:  # once, not in every child
            KINDS[name].sound(material)
        for i in range(number):
            kind = KINDS[names[i % len(names)]]
            case = first + i // len(names)
            what, outcome = run_case(material, kind, case)
            yield kind.name, case, what, outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
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
