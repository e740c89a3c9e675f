"""Folder, captions and references together: what is packed, what is left out, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ipa.data.rejects import EMPTY_CAPTION, NO_CAPTION, NO_REFERENCE
from ipa.errors import UserError
from ipa.tools.packing.captions import Captions
from ipa.tools.packing.folders import Folder, Stamp, examples, number, same, stem, unique_keys
from ipa.tools.packing.samples import Sample
from ipa.tools.packing.tables import Entry

UNCAPTIONED = (NO_CAPTION, EMPTY_CAPTION)
References = Mapping[str, tuple[str, Stamp]]  # picture → its reference


@dataclass
class Contents:
    """The samples, sorted by name; reason → names of what is left out; lines about what was found."""

    samples: list[Sample] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def collect(cls, folder: Folder, captions: Captions, references: References | None, uncaptioned: str) -> Contents:
        """``uncaptioned`` is what becomes of pictures without caption: skip, empty or error (ValueError)."""
        said, notes = captions.read(folder.pictures)
        keys = unique_keys(folder.pictures)
        contents = cls(notes=[*notes, *peculiar(folder, keys)])
        for name in folder.pictures:
            entry = said.get(name, NO_CAPTION)
            if entry in UNCAPTIONED and uncaptioned == "empty":
                entry = Entry(())
            reference = references.get(name) if references is not None else (None, None)
            if isinstance(entry, str):
                contents.leave_out(entry, name)
            elif reference is None:
                contents.leave_out(NO_REFERENCE, name)
            else:
                sample = Sample(keys[name], name, folder.files[name], entry.captions, entry.others, *reference)
                contents.samples.append(sample)
        contents.check(uncaptioned)
        return contents

    def leave_out(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, []).append(name)

    def check(self, uncaptioned: str) -> None:
        """Raises UserError if captions are missing that may not, or nothing is left; notes those that may."""
        without = [f"{reason}: {examples(self.left_out[reason])}" for reason in UNCAPTIONED if reason in self.left_out]
        if uncaptioned == "error" and without:
            raise UserError(
                f"{'; '.join(without)}. missing_caption=skip leaves these out, missing_caption=empty packs them without"
            )
        if not self.samples:
            reasons = "; ".join(f"{reason}: {examples(names)}" for reason, names in self.left_out.items())
            raise UserError(f"no picture is left to be packed. {reasons}")
        bare = [sample.name for sample in self.samples if not sample.captions]
        if bare:
            self.notes.append(
                f"packed without caption: {examples(bare)}; training leaves them out unless data.captions names more "
                "than txt"
            )


def peculiar(folder: Folder, keys: Mapping[str, str]) -> list[str]:
    """Lines about names that somebody may wonder about."""
    lines = []
    told_apart = [f"{name} is {keys[name]}" for name in keys if keys[name].endswith(f"_{number(name)}")]
    if told_apart:
        lines.append(f"names that would give the same key, told apart by a number: {examples(told_apart)}")
    if folder.unread:
        lines.append(f"pictures of kinds that are not read, make them JPEG or PNG: {examples(folder.unread)}")
    return lines


def find_references(references: Folder, pictures: Sequence[str]) -> References:
    """Picture → the reference of the same name, whatever its ending; raises UserError if there is none at all."""
    found: dict[str, str] = {}
    for name in references.pictures:
        other = found.setdefault(same(stem(name)), name)
        if other != name:
            raise UserError(f"references={references.path} has both {other} and {name}: which one is meant?")
    pairs = {name: found[same(stem(name))] for name in pictures if same(stem(name)) in found}
    if not pairs:
        raise UserError(
            f"references={references.path} has no picture of the name of one of {examples(pictures)}: it has "
            f"{examples(found.values())}"
        )
    return {name: (reference, references.files[reference]) for name, reference in pairs.items()}
