"""A source of captioned pictures: shards → records, as img2dataset or another tool wrote them.

    laion = ShardSource.of("laion", shards="laion/{00000..00999}.tar", weight=2, captions=["json.recaption", "txt"],
                           filters={"small": {"key": "short_side_px", "min": 512}})

The values are those of a file in conf/source. WebDataset's ``group_by_keys`` groups the members into samples.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from webdataset.tariterators import base_plus_ext, group_by_keys

from ipa.data.addresses import digest
from ipa.data.records import Record, Source
from ipa.data.rejects import Reason, Rejected
from ipa.data.shards.fields import ALPHA, Captions, Fields, as_list, is_extension, is_weight
from ipa.data.shards.filters import Filter, read_filters
from ipa.data.shards.names import TRUSTED, expand_shards, shard_name
from ipa.data.shards.strip import Strip
from ipa.data.shards.tar import BLOCK_BYTES, MAX_MEMBER_BYTES, Forward, Member, read_members, walk
from ipa.errors import UserError

OPTIONS = ("shards", "weight", "captions", "image", "reference", "filters", "loss_mask", "reference_mask")
MAX_SAMPLE_BYTES = MAX_MEMBER_BYTES  # all members of a sample, with their headers
INCOMPLETE = (Reason.NO_PICTURE, Reason.NO_CAPTION, Reason.NO_REFERENCE, Reason.NO_MASK)
MACOS = ("._", ".DS_Store")  # what it adds to archives
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)


@dataclass(frozen=True)
class Layout:
    """Which member or entry of the metadata is the caption, which members are references, what is filtered.

    ``images`` are the extensions that the picture may have, the preferred one first; by default ``files.PICTURES``.
    ``loss_mask`` is the picture's, ``reference_masks`` has one for each reference, or one for the picture: members'
    extensions, or ``fields.ALPHA``. ``strip`` changes captions after the filters saw them. ``columns`` are entries of
    the metadata that records keep.
    """

    captions: Captions = field(default_factory=Captions)
    references: tuple[str, ...] = ()
    filters: tuple[Filter, ...] = ()
    # not in repr, so the fingerprints of older runs stay
    images: tuple[str, ...] = field(default=(), repr=False)
    loss_mask: str = field(default="", repr=False)
    reference_masks: tuple[str, ...] = field(default=(), repr=False)
    strip: Strip = field(default_factory=Strip, repr=False)
    columns: tuple[str, ...] = field(default=(), repr=False)

    def record(self, key: str, shard: str, index: int, members: Mapping[str, bytes]) -> Record:
        """Members: extension → content. The first fault of picture, caption, reference and filters is raised."""
        fields = Fields(members, self.references, self.images)
        picture, captions = fields.picture, self.captions.read(fields)
        present = [n for n, name in enumerate(self.references) if name in members]
        references = tuple(members[self.references[n]] for n in present)
        if self.references and not references:
            raise Rejected(Reason.NO_REFERENCE, f"none of {', '.join(self.references)}")
        loss_mask = fields.mask(self.loss_mask, picture) if self.loss_mask else None
        masks = self.reference_masks and [self.reference_masks[n] for n in present or [0]]
        shown = zip(masks, references or (picture,), strict=True) if masks else ()
        reference_masks = tuple(fields.mask(name, each) for name, each in shown)
        for each in self.filters:
            each.check(fields, captions[0][0])
        if self.strip.terms or self.strip.names:
            captions = self.strip.captions(captions, fields)
        found = Record(key, shard, index, picture, captions, references, loss_mask=loss_mask)
        found.measured, found.reference_masks = vars(fields).get("size"), reference_masks  # the size if it was needed
        found.values = tuple(fields.entry(name) for name in self.columns)
        return found

    def try_record(self, key: str, shard: str, index: int, members: Mapping[str, bytes]) -> Record | Rejected:
        try:
            return self.record(key, shard, index, members)
        except Rejected as reject:
            return reject.at(key, shard)


@dataclass(frozen=True)
class ShardSource(Source):
    """``shards`` are single archives, ``layout`` is what to read in them."""

    layout: Layout

    @classmethod
    def of(
        cls,
        name: str,
        *,
        shards: str | Sequence[str],
        weight: float = 1.0,
        captions: Any = "txt",
        image: str | Sequence[str] | None = None,
        reference: str | Sequence[str] | None = None,
        filters: Mapping[str, Any] | None = None,
        loss_mask: str | None = None,
        reference_mask: str | Sequence[str] | None = None,
        strip: Strip | None = None,
        option: str = "data",
        schemes: Sequence[str] = TRUSTED,
        **unknown: Any,
    ) -> ShardSource:
        """From YAML: see ``expand_shards``, ``captions`` and ``filters``; the others are extensions of members.

        Raises UserError, whose messages name what is below ``option``. No shard is opened.
        """
        if unknown:
            raise UserError(f"{option} has no {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
        layout = Layout(
            Captions.of(captions, f"{option}.captions"),
            read_extensions(reference, f"{option}.reference"),
            read_filters(filters, f"{option}.filters"),
            read_extensions(image, f"{option}.image"),
            "".join(read_masks(loss_mask, 1, f"{option}.loss_mask")),
            read_masks(reference_mask, max(1, len(as_list(reference))), f"{option}.reference_mask"),
            strip or Strip(),
        )
        found = expand_shards(shards, schemes, f"{option.partition('.')[0]}.schemes")
        return cls(name, found, read_weight(weight, f"{option}.weight"), layout)

    def read(self, shard: str) -> Iterator[Record | Rejected]:
        return read_shard(shard, self.layout)

    def read_at(self, shard: str, index: int, data: bytes) -> Record:
        """One sample from the bytes of its ``span``; raises ``Rejected``, or one of ``BREAKS`` for other bytes."""
        files = Files(shard, walk(Forward(io.BytesIO(data + END_OF_ARCHIVE))))
        for members in group_by_keys(files, files.split, handler=files.skip_double):
            return self.layout.record(members.pop("__key__"), shard_name(shard), index, members)
        raise Rejected(Reason.NO_KEY)

    def layout_fingerprint(self) -> str:
        return f"{digest(*self.layout_parts):016x}"

    @property
    def layout_parts(self) -> tuple[str, ...]:
        """Without ``strip``, which changes no choice of samples."""
        masks = [f"loss {self.layout.loss_mask}"] * bool(self.layout.loss_mask)
        masks += [f"reference {name}" for name in self.layout.reference_masks]
        return repr(self.layout), *self.layout.images, *masks

    def fingerprint(self) -> str:
        return f"{digest(*self.layout_parts, *self.layout.strip.parts, *map(shard_name, self.shards)):016x}"


def read_extensions(given: Any, option: str) -> tuple[str, ...]:
    names = as_list(given)
    if not all(map(is_extension, names)) or len({name.lower() for name in names}) < len(names):
        raise UserError(
            f"{option}={given}: give the extension of a member (ref.jpg of 0001.ref.jpg), or a list of them"
        )
    return tuple(name.lower() for name in names)


def read_masks(given: Any, number: int, option: str) -> tuple[str, ...]:
    """None at all, or one for each of a ``number`` of pictures; one for all if it is ``ALPHA``."""
    names = read_extensions(given, option)
    names = names * number if names == (ALPHA,) else names
    if names and len(names) != number:
        raise UserError(f"{option}={given}: give {ALPHA}, or the extensions of {number} members, one for each picture")
    return names


def read_weight(weight: Any, option: str) -> float:
    if not is_weight(weight):
        raise UserError(f"{option}={weight}: give a number above 0; to turn a source off, leave it out of data.sources")
    return float(weight)


def read_shard(shard: str, layout: Layout) -> Iterator[Record | Rejected]:
    """The samples of a shard in file order.

    Of samples with the same key the first counts; one whose members are not adjacent is counted once. The last sample
    before a break is used if it is complete; if not, it is part of the break and not counted separately.
    """
    name, files = shard_name(shard), Files(shard)
    seen, incomplete = set[str](), set[str]()
    held: Record | Rejected | None = None
    for index, members in enumerate(group_by_keys(files, files.split, handler=files.skip_double)):
        if held is not None:
            yield held
        key, _ = members.pop("__key__"), members.pop("__url__")
        if files.doubled and key not in seen:
            yield Rejected(Reason.DUPLICATE_KEY, "the first one is used", key, name)
        held = layout.try_record(key, name, index, members)
        span = files.spans.popleft()
        if isinstance(held, Record):
            held.span = span
        if key in seen:
            held = None if key in incomplete else Rejected(Reason.DUPLICATE_KEY, "the first one is used", key, name)
        elif isinstance(held, Rejected) and held.reason in INCOMPLETE:
            incomplete.add(key)
        seen.add(key)
        yield from files.take_rejects()
    if held is not None and not (files.broken and isinstance(held, Rejected)):
        yield held
    yield from files.take_rejects()
    if files.broken:
        yield files.broken


class Files:
    """The members of a shard as ``group_by_keys`` takes them; rejected ones are set aside, so they split no sample.

    ``spans`` are those of the samples, one for each that ``group_by_keys`` has not given yet.
    """

    def __init__(self, shard: str, members: Iterator[Member | Rejected] | None = None) -> None:
        self.shard = shard
        self.members = read_members(shard) if members is None else members
        self.spans: deque[tuple[int, int]] = deque()
        self.span_key: str | None = None
        self.rejects: list[Rejected] = []
        self.broken: Rejected | None = None
        self.doubled = False
        self.parts: tuple[str | None, str | None] = (None, None)  # key and extension of the last member

    def __iter__(self) -> Iterator[dict[str, Any]]:
        last_key, size_bytes = "", 0
        for member in self.members:
            if isinstance(member, Rejected):
                self.set_aside(member)
                continue
            name, content, span = member
            key, _ = self.parts = base_plus_ext(name)
            if key is None or key.endswith("/"):
                if not name.rpartition("/")[2].startswith(MACOS):  # no loss
                    self.set_aside(Rejected(Reason.NO_KEY, f"'{name}' is not KEY.EXTENSION, as 0001.jpg is"))
                continue
            size_bytes = len(content) + BLOCK_BYTES + (size_bytes if key == last_key else 0)
            last_key = key
            if size_bytes > MAX_SAMPLE_BYTES:
                self.set_aside(Rejected(Reason.TOO_LARGE, f"{name}: {key} has over {MAX_SAMPLE_BYTES:,} bytes in all"))
            else:
                begin = self.spans.pop()[0] if key == self.span_key else span[0]
                self.spans.append((begin, span[1]))
                self.span_key = key
                yield {"fname": name, "data": content, "__url__": self.shard}

    def set_aside(self, reject: Rejected) -> None:
        if reject.is_break:
            self.broken = reject
        else:
            self.rejects.append(reject.at(shard=shard_name(self.shard)))

    def split(self, name: str) -> Any:
        """Key and extension of the member that was just given."""
        return self.parts

    def skip_double(self, error: Exception) -> bool:
        """Called for a second member with the same name, which is left out."""
        self.doubled = True
        return True

    def take_rejects(self) -> list[Rejected]:
        taken, self.rejects, self.doubled = self.rejects, [], False
        return taken
