"""How the tools read their command line."""

from dataclasses import dataclass, field

import pytest
from omegaconf import MISSING

from ipa.tools.options import read_options


@dataclass
class Options:
    folder: str = MISSING
    out: str = MISSING
    size: int | None = None
    names: list[str] = field(default_factory=list)


PLACES = ("folder", "out")


def test_words_without_a_name_fill_the_places_in_order() -> None:
    options = read_options(["in", "size=3", "somewhere/a=b", "names=[a,b]"], Options, PLACES)

    assert (options.folder, options.out, options.size) == ("in", "somewhere/a=b", 3)
    assert options.names == ["a", "b"]


def test_named_words_do_as_well() -> None:
    assert read_options(["out=there", "folder=here"], Options, PLACES) == read_options(
        ["here", "there"], Options, PLACES
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in"], "please give out=…"),
        (["in", "out", "more"], "'more' is one word too many: after FOLDER OUT come the options folder=, out="),
        (["in", "out", "sise=3"], "'sise=3' is not one of the options .* Did you mean size=…"),
        (["in", "folder=out"], "folder is given twice, 'in' and 'out'"),
        (["in", "out", "size=big"], "size=big: .*Integer"),
        ([], "please give folder=… and out=…"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(words, Options, PLACES)


def test_without_places_every_word_needs_a_name() -> None:
    with pytest.raises(ValueError, match="'in' is not one of the options folder="):
        read_options(["in"], Options)
