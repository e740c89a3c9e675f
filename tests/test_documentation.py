"""Every command, option and example of README and docs fits the code; `documented.py` explains how they are found."""

import ast
import json
import re
from pathlib import Path

import documented
import pytest
import yaml
from documented import NEEDS, PAGES, ROOT, RUN

from ipa.tools.card import ENCODERS

OPTION = re.compile(r"[+~]?([a-z]\w*(?:[./]\w+)*)=")
OF_TORCH = {"mode"}  # torch.compile's
MESSAGES = ROOT / "docs/troubleshooting.md"


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_examples_of_a_page_fit(page: str) -> None:
    wrong = [f"{each}\n  {why}" for each in documented.commands(page) if (why := documented.complaint(each.words))]
    for block in documented.blocks(page):
        assert block.marks <= NEEDS | {RUN}, f"{page}:{block.line}: a mark is one of {RUN}, {', '.join(sorted(NEEDS))}"
        if block.language == "python" and (why := documented.complaint_of_python(block)):
            wrong.append(f"{page}:{block.line}: {why}")

    assert wrong == []


@pytest.mark.parametrize("page", PAGES)
def test_options_and_commands_in_the_text_exist(page: str) -> None:
    wrong = []
    for mention in documented.mentions(page):
        words = tuple(word.strip("'") for word in re.split(r" (?=[^ ]*=)", mention))
        if re.match(r"(python (train|evaluate)\.py|python -m ipa\.|make |ipa-)", mention):
            why = documented.complaint((*mention.replace("'", "").split(),))
            wrong += [] if why is None or why.startswith("please give") else [f"{mention}: {why}"]
        elif OPTION.match(words[0]):
            names = [match[1] for word in words if (match := OPTION.match(word))]
            wrong += [name for name in names if name not in documented.options() | OF_TORCH]

    assert wrong == []


def test_commands_of_the_makefile_fit() -> None:
    for target in ("train", "ablation", "evaluate"):
        found = documented.makes(target)
        assert found
        assert [why for words in found if (why := documented.complaint(words))] == []


def test_a_mistyped_option_is_found() -> None:
    for words, message in {
        ("python", "train.py", "optimizer.lrr=1"): "optimizer.lr=1",
        ("python", "train.py", "-m", "seed=1,2", "experimnt=simple_global"): "experiment=simple_global",
        ("python", "train.py", "global_batch_size=0"): "global_batch_size=0",
        ("python", "-m", "ipa.tools.sample", "adapter=x", "scal=1"): "scale=",
        ("ipa-sample", "adapter=x", "scale=-1"): "scale",
        ("torchrun", "--nnodes=2", "train.py", "recipe=sd16"): "sd16",
        ("make", "trian"): "trian",
        ("python", "benchmarks/step.py", "--ech"): "--ech",
        ("pip", "install", "-e", ".[slrm]"): "slrm",
        ("nosuch",): "nosuch",
    }.items():
        assert message in str(documented.complaint(words))


@pytest.mark.parametrize("page", PAGES)
def test_recipes_and_experiments_of_a_page_compose(page: str, tmp_path: Path) -> None:
    """YAML blocks with the name of their file in a comment; all of a page are in one folder."""
    files = {}
    for block in documented.blocks(page):
        if block.language == "yaml" and (named := re.search(r"^# mine/(\S+\.yaml)", block.text, re.M)):
            files[named[1]] = tmp_path / named[1]
            files[named[1]].parent.mkdir(parents=True, exist_ok=True)
            files[named[1]].write_text(block.text)
            assert yaml.safe_load(block.text)
    for name in files:
        group, choice = Path(name).parent, Path(name).stem
        added = [f"+{group}@data.known.{choice}={choice}", "recipe=sd15"] if str(group) == "source" else []
        words = ("python", "train.py", "--config-dir", str(tmp_path), *(added or [f"{group}={choice}"]))
        assert documented.complaint(words) is None


def test_many_commands_are_run_by_the_tests() -> None:
    assert sum(RUN in each.marks for page in PAGES for each in documented.commands(page)) >= 20


@pytest.mark.parametrize("workflow", sorted((ROOT / "docs/comfyui").glob("*.json")), ids=lambda path: path.stem)
def test_workflows_of_comfyui_are_whole(workflow: Path) -> None:
    """Links lead to outputs that are there; files and nodes have the names of the page and the model card."""
    outputs = {"CheckpointLoaderSimple": 3, "SaveImage": 0, "LoadImage": 2}
    nodes = json.loads(workflow.read_text())
    page = (ROOT / "docs/comfyui.md").read_text()
    for node in nodes.values():
        for value in node["inputs"].values():
            if isinstance(value, list):
                assert value[1] < outputs.get(nodes[value[0]]["class_type"], 1)
    encoders = {name.strip("`") for _, name in ENCODERS.values()}
    used = {node["class_type"]: node["inputs"] for node in nodes.values()}

    assert used["CLIPVisionLoader"]["clip_name"] in encoders
    assert {"IPAdapterModelLoader", "IPAdapterAdvanced", "CLIPVisionLoader"} <= set(used)
    assert all(f"`{name}`" in page for name in ("IPAdapterModelLoader", "IPAdapterAdvanced", "CLIPVisionLoader"))


def test_every_quoted_message_is_in_the_source() -> None:
    """Its parts between … are in one text of the code, in this order."""
    texts = messages_in_source()
    quoted = re.findall(r"^\| `([^`]+)` \|", MESSAGES.read_text(), re.MULTILINE)
    missing = []
    for each in quoted:
        pattern = ".*".join(re.escape(part.strip()) for part in each.split("…"))
        if not any(re.search(pattern, text, re.DOTALL) for text in texts):
            missing.append(each)

    assert len(quoted) > 50
    assert missing == []


def messages_in_source() -> list[str]:
    """All texts of ipa/, with … for what an f-string inserts."""
    found = []
    for path in (ROOT / "ipa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[.\w]+", "…", node.value))  # what logging inserts
    return found
