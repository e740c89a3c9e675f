"""The command line of the tools."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
from omegaconf import MISSING

from ipa.errors import UserError
from ipa.tools import ablation, export, report, sample
from ipa.tools.options import describe, option, read_options, run_tool
from ipa.tools.pack import __main__ as pack


@dataclass
class Options:
    folder: str = option(MISSING, "the images")
    out: str = option(MISSING, "the result")
    size: int | None = option(None, "their size", at_least=1)
    share: float = option(0.5, "a share", at_least=0, at_most=1)
    names: list[str] = option(MISSING, "some names")
    text: str = option("a", "free text")
    label: str | None = option("x", "a label")
    way: str = option("left", "a choice", one_of=("left", "right"))
    again: bool = option(False, "a switch")


PLACES = ("folder", "out")
GIVEN = ["in", "out", "names=a"]


def test_arguments_without_a_name_set_the_positional_options_in_order() -> None:
    options = read_options(["in", "size=3", "somewhere/a=b", "names=[a, b]"], Options, PLACES)

    assert (options.folder, options.out, options.size, options.names) == ("in", "somewhere/a=b", 3, ["a", "b"])
    assert options == read_options(["size=3", "out=somewhere/a=b", "names=[a, b]", "folder=in"], Options, PLACES)


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("size=null", "size", None),
        ("share=1e-1", "share", 0.1),
        ("again=true", "again", True),
        ("names=a b", "names", ["a b"]),
        ("names=1", "names", ["1"]),
        ("names=[]", "names", []),
        ("label=null", "label", None),
        ("text=null", "text", "null"),
        ("text=", "text", ""),
        ("text=yes", "text", "yes"),
        ("text=1.50", "text", "1.50"),
        ("text=red: {heart}, it's #1", "text", "red: {heart}, it's #1"),
        ("text='a: b'", "text", "a: b"),
        ("text=${oc.env:WORD}", "text", "from the environment"),
    ],
)
def test_values_have_the_type_of_their_option_and_texts_stay_as_typed(
    monkeypatch: pytest.MonkeyPatch, argument: str, name: str, value: object
) -> None:
    monkeypatch.setenv("WORD", "from the environment")

    assert read_options([*GIVEN, argument], Options, PLACES)[name] == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "please give folder=… and out=… and names=…"),
        ([*GIVEN, "more"], "'more' is one argument too many: after FOLDER OUT"),
        ([*GIVEN, "sise=3"], "Did you mean size=….* 'sise=3' is not one of the options folder=, out="),
        ([*GIVEN, "folder=out"], "folder is given twice, 'in' and 'out'"),
        ([*GIVEN, "size=big"], "size=big: give an integer at least 1, or null"),
        ([*GIVEN, "size=0"], "size=0: give an integer at least 1, or null"),
        ([*GIVEN, "size=1.5"], "size=1.5: "),
        ([*GIVEN, "share=2"], "share=2: give a number at least 0 and at most 1"),
        ([*GIVEN, "share=nan"], "share=nan: give a number"),
        ([*GIVEN, "way=up"], "way=up: give one of left, right"),
        ([*GIVEN, "again=perhaps"], "again=perhaps: give true or false"),
    ],
)
def test_mistakes_are_named_with_what_is_possible(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_options(arguments, Options, PLACES)


def test_without_positional_options_every_argument_needs_a_name() -> None:
    with pytest.raises(UserError, match="'in' is not one of the options folder="):
        read_options(["in"], Options)


@pytest.mark.parametrize("tool", [ablation, export, pack, report, sample], ids=lambda tool: tool.__name__)
def test_the_help_of_each_tool_explains_every_option(tool) -> None:
    lines = describe(tool.Options).splitlines()

    for known in fields(tool.Options):
        (at,) = [number for number, line in enumerate(lines) if line.startswith(f"  {known.name}=")]
        assert known.metadata["help"] in lines[at + 1]
    assert max(map(len, lines)) <= 120


def run(do) -> None:
    run_tool(["folder=here", "out=x", "names=a"], Options, do, None)


def test_only_errors_of_the_user_end_a_tool_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["tool.py"])
    monkeypatch.setenv("SOME_TOKEN", "0123456789")
    monkeypatch.chdir(tmp_path)
    messages = {
        "tool: give something else than …": UserError("give something else than 0123456789"),
        "PermissionError: .*'here/a.png'": PermissionError(13, "Permission denied", "here/a.png"),
    }
    for message, error in messages.items():
        with pytest.raises(SystemExit, match=message):
            run(lambda options, error=error: raise_(error))
    for bug in (ValueError("zip()"), TypeError("a bug"), OSError(28, "No space left on device", "/tmp/x")):
        with pytest.raises(type(bug)):
            run(lambda options, bug=bug: raise_(bug))

    run(lambda options: Path(options.out))
    assert capsys.readouterr().out == "wrote x\n"


def raise_(error: Exception) -> None:
    raise error
