"""`make paper`: what it claims follows from the values, the page shows the figures in its JSON, and work resumes."""

import copy
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed
from make_control import KINDS

from demo.paper import ROOT, measuring, train_system
from demo.paper.claims import (
    CONTRADICTED,
    HOLDS,
    METRICS,
    UNDECIDED,
    Comparison,
    Threshold,
    crossings,
    find,
    judged,
    statistics,
)
from demo.paper.measuring import Ask, Measured, Task, measure, read_measured
from demo.paper.page import digits, interval, mean, read_notes, signed, write_page
from demo.paper.plan import BASE, Job, Settings, adapters, train_adapter, train_base, wide_tokens
from demo.paper.prompts import read_prompts
from demo.paper.run import Plan, chosen
from demo.paper.running import run_jobs
from demo.paper.sections import sections_of
from ipa.errors import UserError
from ipa.files import read_json
from ipa.metrics.bootstrap import confidence_interval
from ipa.sampling import SamplingOptions

OTHER_SYSTEMS = ("variations", "shuffle", "style", "reference")
SHOWN = [4, 8, 9]  # with charts and marks
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+\.\d+(?![\w.])")


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.of(composed("paper", "seeds=[1,2]", f"out={tmp_path}/out", f"work={tmp_path}/work"))


def asks(count: int) -> tuple[Ask, ...]:
    return tuple(Ask(f"global-{seed}", seed=seed) for seed in range(count))


def reading(values: dict[Ask, list[float]], metric: str = "clip_i") -> Any:
    return lambda ask: Measured(
        {metric: values[ask]}, [str(i) for i in range(len(values[ask]))], 1, torch.zeros(0), "abc"
    )


def verdict_of(above: list[list[float]], below: list[list[float]], metric: str = "clip_i", factor: float = 1.0) -> str:
    one, other = asks(len(above)), tuple(replace(ask, scale=0.0) for ask in asks(len(below)))
    read = reading({**dict(zip(one, above, strict=True)), **dict(zip(other, below, strict=True))}, metric)
    return judged(Comparison("", "one", "other", metric, factor), {"one": one, "other": other}, read)["verdict"]


HIGH, LOW = [0.8, 0.9, 0.7, 0.8], [0.5, 0.6, 0.5, 0.3]


def test_a_claim_holds_only_if_the_interval_and_every_seed_say_so() -> None:
    assert verdict_of([HIGH, HIGH], [LOW, LOW]) == HOLDS
    assert verdict_of([LOW, LOW], [HIGH, HIGH]) == CONTRADICTED
    assert verdict_of([HIGH, LOW], [LOW, LOW]) == UNDECIDED  # a seed without any difference
    assert verdict_of([[0.9, 0.1, 0.5, 0.5]], [[0.1, 0.9, 0.4, 0.6]]) == UNDECIDED
    assert verdict_of([[0.9]], [[0.1]]) == UNDECIDED  # a single item has no interval
    assert verdict_of([LOW, LOW], [HIGH, HIGH], "border") == HOLDS  # lower is better
    assert verdict_of([LOW, LOW], [HIGH, HIGH], factor=0.3) == HOLDS
    assert verdict_of([HIGH, HIGH], [LOW]) == HOLDS  # one system for all seeds
    rows, read = {"one": asks(2)}, reading(dict.fromkeys(asks(2), HIGH))
    for threshold, verdict in ((0.5, HOLDS), (0.95, CONTRADICTED)):  # judged as differences
        assert judged(Threshold("", "one", "clip_i", threshold), rows, read)["verdict"] == verdict


def test_intervals_are_over_items_that_keep_their_seeds() -> None:
    found = statistics([HIGH, LOW], list("abcd"))
    expected = confidence_interval(torch.tensor([*HIGH, *LOW]), list("abcdabcd"))

    assert (found["mean"], found["low"], found["high"]) == pytest.approx(tuple(expected), abs=5e-5)
    assert (found["items"], found["images"], found["by_seed"]) == (4, 8, pytest.approx([0.8, 0.475]))


def test_crossings_are_found() -> None:
    def line(*values: float) -> list[dict[str, Any]]:
        return [{"x": 100.0 * i, "y": {"mean": value}} for i, value in enumerate(values, 1)]

    assert crossings({"a": line(0, 0, 2), "b": line(1, 1, 1)}) == "The lines cross between 200 and 300."
    assert crossings({"a": line(0, 0), "b": line(1, 1)}).endswith("b is above a throughout.")


def test_every_section_names_what_it_measures(settings: Settings) -> None:
    sections, plan = sections_of(settings), Plan(settings)

    assert [section.number for section in sections] == list(range(1, 12))
    for section in sections:
        tests = [*section.tests, *(t for rows in section.ticks.values() for own in rows.values() for t in own)]
        for test in tests:
            rows = [test.row] if isinstance(test, Threshold) else [test.above, test.below]
            assert set(rows) <= set(section.rows), test
            assert test.metric in METRICS
        assert set(section.strip) <= set(section.rows)
        assert all(
            plan.needed(ask) or ask.system == "reference" or Path(ask.system).is_file() for ask in section.asks()
        )
    names = [ask.name for section in sections for ask in section.asks()]
    assert len(set(names)) == len({ask for section in sections for ask in section.asks()})


def test_trainings_compose_and_have_folders_of_their_own(settings: Settings) -> None:
    settings = replace(settings, work=settings.work / "odd, (x)=1")
    jobs = [train_adapter(name, 1, settings) for name in adapters()]

    assert len({job.folder for job in jobs}) == len(jobs)
    assert train_adapter("global", 1, replace(settings, steps=9)).folder != jobs[0].folder
    for job in jobs[-6:] + jobs[4:8:3]:  # all kinds of options
        (_, _, *options, folder) = job.commands[0]
        cfg = composed("train", *options, folder)
        assert cfg.trainer.max_steps == settings.steps
        assert folder == f'hydra.run.dir="{job.folder}"'
    assert jobs[0].shown()[0].count("'~logger.wandb'") == 1  # as one types it
    wide = 193 * 128 * wide_tokens() + 2 * 128  # the larger simple adapter has as many parameters as the decoupled
    assert wide == pytest.approx(324_352, rel=0.04)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps=0", "steps=0: give an integer"),
        ("seeds=-1", "seeds=-1: give an integer"),
        ("seeds=[1,1]", "seeds="),
        ("own=nowhere", "own=nowhere: give a folder with images"),
        ("seeds=abc", "seeds=abc: give an integer"),
        ("items=200", "items=200: give an integer at least 1 and at most 131"),
        ("quick=maybe", "quick=maybe: give true or false"),
        ("work=null", "work=null is no folder"),
        ("work=[a]", "is no folder"),
        ("out=false", "out=False is no folder"),
        ("num_steps=1001", "num_steps=1001: give an integer at least 1 and at most 1000"),
        ("out=README.md/page", "out=README.md/page is no folder"),
    ],
)
def test_wrong_options_are_refused(override: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        Settings.of(composed("paper", override))


def test_unknown_sections_are_refused(settings: Settings) -> None:
    assert [section.number for section in chosen(sections_of(settings), [5, 2])] == [2, 5]
    for unknown in ([12], 0, True, 2.5, "x", []):
        with pytest.raises(UserError, match=r"sections=.*: give an integer at least 1 and at most 11, or a list"):
            chosen(sections_of(settings), unknown)


def test_notes_belong_to_sections(tmp_path: Path) -> None:
    assert read_notes(tmp_path, [2]) == {}
    (tmp_path / "notes.yaml").write_text("2: a reason\n")
    assert read_notes(tmp_path, [2]) == {2: "a reason"}
    for wrong in ("two: a reason", "true: a reason", "3: a reason", "2:", "[2]"):
        (tmp_path / "notes.yaml").write_text(wrong)
        with pytest.raises(UserError, match="from numbers of sections"):
            read_notes(tmp_path, [1, 2])


def drawn(ask: Ask) -> Measured:
    """Made-up values, as different asks would have them."""
    generator = torch.Generator().manual_seed(sum(ask.name.encode()))
    values = {name: torch.rand(6, generator=generator).tolist() for name in METRICS}
    strip = torch.randint(256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return Measured(values, [str(i) for i in range(6)], sum(ask.name.encode()), strip, "abc")


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """The figures of some sections, for made-up values."""
    os.chdir(ROOT)
    sections = chosen(sections_of(Settings.of(composed("paper", "seeds=[1,2]"))), SHOWN)
    return [{**find(section, drawn), "commands": ["python train.py"]} for section in sections]


def page_of(settings: Settings, found: list[dict[str, Any]]) -> tuple[str, str, dict[str, Any]]:
    found, sections = copy.deepcopy(found), chosen(sections_of(settings), SHOWN)
    figures = {
        "commit": "abc",
        "date": "today",
        "settings": settings.described(),
        "texts": ["comet"],
        "sections": found,
    }
    strip = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    page = write_page(settings.out, figures, read_notes(settings.out, SHOWN), sections, drawn, lambda kind: strip)
    return page.read_text(), (settings.out / "page.html").read_text(), read_json(settings.out / "figures.json")


def statistics_in(node: Any, metric: str = "") -> Any:
    """(statistics, metric) of everything in a section's figures."""
    if isinstance(node, dict):
        if "by_seed" in node:
            yield node, metric
        for key, value in node.items():
            yield from statistics_in(value, key if key in METRICS else node.get("metric", metric))
    elif isinstance(node, list):
        for value in node:
            yield from statistics_in(value, metric)


def numbers_of(figures: dict[str, Any]) -> set[str]:
    """Every number with a decimal point that a page of these figures may show."""
    shown = [f"{figures['settings'][name]}" for name in ("guidance", "base_minutes")]
    for each, metric in statistics_in(figures["sections"]):
        shown += [mean(each, metric), interval(each, metric), signed(each, metric)]
        shown += [f"{value:+.{digits(metric)}f}" for value in each["by_seed"]]
    texts = [section[key] for section in figures["sections"] for key in ("paper", "how", "notes") if key in section]
    names = json.dumps(figures["sections"], ensure_ascii=False)
    texts += re.findall(r'"(?:name|title|claim|fact|crossing)": "([^"]*)"', names)
    texts += [
        str(test["factor"]) for section in figures["sections"] for test in section.get("tests", ()) if "factor" in test
    ]
    return {number for text in [*shown, *texts] for number in NUMBER.findall(text)}


def without_machinery(html: str) -> str:
    return re.sub(r"<style>.*?</style>|<pre>.*?</pre>|src=\"[^\"]*\"|arXiv [\d.]+", "", html, flags=re.S)


def prose(markdown: str) -> str:
    return re.sub(r"<details>.*?</details>|\]\([^)]*\)", "", markdown, flags=re.S)


def test_page_shows_the_figures_of_its_json_and_opens_offline(settings: Settings, found: list[dict[str, Any]]) -> None:
    settings.out.mkdir()
    (settings.out / "notes.yaml").write_text("4: Our belief.\n")
    markdown, html, figures = page_of(settings, found)

    for section in chosen(sections_of(settings), SHOWN):
        assert f"## {section.number}. {section.title}" in markdown and f'id="section-{section.number}"' in html
    allowed = numbers_of(figures)
    for text in (prose(markdown), without_machinery(html)):
        assert len(NUMBER.findall(text)) > 200
        assert set(NUMBER.findall(text)) <= allowed
    for each, metric in statistics_in([section.get("rows", []) for section in figures["sections"]]):
        assert mean(each, metric) in markdown and mean(each, metric) in html
    assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
    assert all((settings.out / file).is_file() for file in re.findall(r"\]\((images/[^)]*)\)", markdown))
    assert page_of(settings, found)[:2] == (markdown, html)  # the same figures give the same page
    assert "Our belief." in markdown.split("## 4.")[1].split("## 8.")[0] and "Our belief." in html


def job(folder: Path, name: str, code: str, result: str) -> Job:
    return Job(name, (("python", "-c", code),), folder / name, folder / name / result, 1.0)


def test_jobs_are_run_once_and_a_failure_names_its_command(tmp_path: Path) -> None:
    write = "import pathlib, sys; pathlib.Path({!r}).open('a').write('x')"
    good = job(tmp_path, "good", write.format(str(tmp_path / "good" / "out")), "out")
    bad = job(tmp_path, "bad", "import sys; sys.exit('a reason')", "out")

    run_jobs([good], 2, "test")
    run_jobs([good], 2, "test")
    assert good.result.read_text() == "x"
    with pytest.raises(UserError, match=r"(?s)bad failed:.*a reason.*sys.exit"):
        run_jobs([bad, good], 2, "test")


def options_of(name: str, out: Path, steps: int = 4) -> Any:
    return train_system.Options(name, steps, 1, str(out))


@pytest.mark.slow
def test_systems_resume_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_system, "SAVE_EVERY", 2)
    whole = train_system.train(options_of("shuffle", tmp_path / "whole"))
    make_step = train_system.Training.make_step

    def killed(self: Any, batch: Any) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        make_step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(train_system.Training, "make_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train_system.train(options_of("shuffle", tmp_path / "cut"))
    assert (tmp_path / "cut" / "checkpoint.pt").is_file()
    assert train_system.train(options_of("shuffle", tmp_path / "cut")).read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", ["unclip", *(pytest.param(x, marks=pytest.mark.slow) for x in OTHER_SYSTEMS)])
def test_systems_are_sampled_and_measured_once(name: str, tmp_path: Path) -> None:
    file = None if name == "reference" else str(train_system.train(options_of(name, tmp_path, 2)))
    tasks = [Task(Ask(name, seed=seed), file, BASE, f"key{seed}") for seed in (1, 2)]
    sampling = {"num_steps": 2, "guidance": 3.0}

    measure(tasks, sampling, 3, 2, None, tmp_path / "measured")

    one, other = (read_measured(tmp_path / "measured", task.ask) for task in tasks)
    assert len(one.values["clip_i"]) == len(one.items) == 3 and one.strip_N3HW.shape == (2, 3, 64, 64)
    assert not torch.equal(one.strip_N3HW, other.strip_N3HW)
    written = (tmp_path / "measured" / f"{tasks[0].ask.name}.json").stat().st_mtime_ns
    measure(tasks, sampling, 3, 2, None, tmp_path / "measured")
    assert (tmp_path / "measured" / f"{tasks[0].ask.name}.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("name", "control"),
    [
        ("demo/adapters/decoupled_global.safetensors", "controlnet"),
        ("demo/adapters/decoupled_global.safetensors", "t2i_adapter"),
        pytest.param("reference", "controlnet", marks=pytest.mark.slow),
    ],
)
def test_structure_control_joins_any_system(
    name: str, control: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(measuring.CONTROLS, control, str(tmp_path))
    method = measuring.load_method(name, None if name == "reference" else name, BASE)
    family = method.family if name == "reference" else method.model.family
    net: Any = KINDS[control][1](family.unet)
    prompts, options = read_prompts("heldout", 2), SamplingOptions(num_steps=2, guidance=3.0)
    given = prompts.given(range(2), [""] * 2, 1)
    alone = method.generate(given, options)

    for is_trained in (False, True):
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2 * is_trained)
        net.save_pretrained(tmp_path)
        with measuring.steering(method, control, prompts.control_pixels()):
            assert torch.equal(method.generate(given, options), alone) != is_trained
    assert torch.equal(method.generate(given, options), alone)


def test_held_out_prompts_and_their_own_images_score_highest() -> None:
    prompts = read_prompts("heldout", 8)
    values = prompts.values(prompts.pixels_B3HW, prompts.captions)

    assert values["clip_i"].min() > 0.999 and values["retrieval"].min() == values["background"].min() == 1
    assert values["border"].max() == 0 and values["edges"].min() == 1
    assert values["text"].min() == 1 and values["control"].max() < 1


@pytest.mark.slow
def test_all_sections_from_nothing(tmp_path: Path) -> None:
    """Real trainings, bases and systems of two steps; several minutes."""
    import subprocess

    sizes = ["quick=true", "steps=2", "items=3", "num_steps=2", "base_minutes=0.02", "shown=2"]
    command = [sys.executable, "-m", "demo.paper", *sizes, f"work={tmp_path}/work", f"out={tmp_path}/out"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)

    figures = read_json(tmp_path / "out" / "figures.json")
    assert [section["number"] for section in figures["sections"]] == list(range(1, 12))
    assert figures["sections"][0]["verdict"] == HOLDS
    allowed = numbers_of(figures)
    assert set(NUMBER.findall(prose((tmp_path / "out" / "index.md").read_text()))) <= allowed
    settings = Settings.of(composed("paper", *sizes, f"work={tmp_path}/work"))
    assert train_base("noto", settings).is_done()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert after == before  # nothing is made twice
