"""The page: it opens offline, is the same for the same input, escapes text, and shows the right curves and images."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_folder import scored, write_demo, write_items, write_json, write_run, write_skipped

from ipa.errors import UserError
from ipa.evaluation.report.curves import Chart, describe, draw, find_bars, find_charts, line_style
from ipa.evaluation.report.files import write_report
from ipa.evaluation.report.page import Shown, choose_items, choose_system, extremes, make_page
from ipa.evaluation.report.reading import Evaluation, read_evaluation
from ipa.evaluation.report.table import make_table

VOID = {"img", "meta", "wbr"}
HOSTILE = """</style></td><script>alert("1")</script> & 'quoted' {{ 7 * 7 }} """


class Checked(HTMLParser):
    """Fails unless elements are closed in order; collects attributes that load something, ids and tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(folder: Path, **shown: object) -> str:
    evaluation = read_evaluation(folder)
    return make_page(evaluation, make_table(evaluation), Shown(**shown))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only to be read."""
    return write_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def evaluation(demo: Path) -> Evaluation:
    return read_evaluation(demo)


@pytest.fixture(scope="module")
def page(demo: Path) -> str:
    return page_of(demo)


def test_the_page_has_everything_and_loads_nothing(page: str) -> None:
    checked = Checked(page)

    addresses = {address.partition(",")[0] for address in checked.loads if not address.startswith("#")}
    assert addresses == {"data:image/webp;base64", "data:image/svg+xml;base64"}
    assert {address[1:] for address in checked.loads if address.startswith("#")} == checked.ids
    assert not {"link", "iframe", "object"} & set(checked.tags)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)
    assert "skipped: download it | from &lt;there&gt; and give path=FOLDER" in page
    for text in ("CLIP-I against λ", "Closest to their image prompts", "&lt;item3&gt;", "abc123", "2.15.0", "f00d"):
        assert text in page


def test_text_of_the_user_cannot_break_the_page(tmp_path: Path, page: str) -> None:
    """Neither markup in labels, captions, ids, settings and reasons, nor templates, nor $, which matplotlib reads."""
    label, item = "a<u>&\"'$x_{$" + "long" * 40, "<i>'\"&"
    items = [{"id": item, "captions": [HOSTILE + "w" * 500], "reference": "references/a.png"}]
    benchmark = {"name": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    write_json(tmp_path / "items.json", {"benchmark": benchmark, "num_seeds": 1, "items": items})
    for scale in (0.0, 1.0):
        run = {"method": {"name": HOSTILE, "source": HOSTILE}, "sampling": {"scale": scale}}
        write_run(tmp_path, f"{label}{scale}", scored(scale, {item: 0.5}, fid=HOSTILE), [f"{item}_0"], **run)
    write_skipped(tmp_path, "skipped", HOSTILE)

    hostile = page_of(tmp_path)

    checked = Checked(hostile)
    assert set(checked.tags) <= {*Checked(page).tags} and checked.tags.count("script") == 1
    assert "&lt;script&gt;alert" in hostile and "{{ 7 * 7 }}" in hostile
    assert hostile.count("data:image/svg+xml") == 2


def test_files_are_the_same_for_the_same_input_and_a_missing_or_broken_image_leaves_a_gap(tmp_path: Path) -> None:
    """Also in another folder, and when they are written again."""
    folders, shown = [write_demo(tmp_path / name) for name in ("one", "two")], Shown(rows=1, best=1)
    written = [
        {path.name: path.read_bytes() for path in write_report(folder, shown).parent.iterdir() if path.is_file()}
        for folder in (*folders, folders[0])
    ]
    assert set(written[0]) == {"items.json", "table.md", "report.html"}
    assert written[0] == written[1] == written[2]

    (folders[0] / "mine-0/pictures/item0_0.png").unlink()
    (folders[0] / "mine-0/pictures/item1_0.png").write_bytes(b"no image")
    (folders[0] / "style/pictures/item0_0.png").unlink()
    assert page_of(folders[0], rows=6, best=0).count("no image") == 2


def charts_of(folder: Path, runs: dict[str, dict[str, object]]) -> list[Chart]:
    """The charts of these runs by label, whose CLIP-I is their λ."""
    write_items(folder, ["a"])
    for label, run in runs.items():
        write_run(folder, label, scored(run["sampling"]["scale"]), **run)  # type: ignore[index]
    return find_charts(read_evaluation(folder))


def test_curves_join_runs_that_differ_in_one_setting_alone(tmp_path: Path) -> None:
    points = [(0.0, 2), (1.0, 2.0), (1.0, 5.0)]  # 2 from a command line, 2.0 from a file
    runs = {f"run-{n}": {"sampling": {"scale": x, "guidance": y}} for n, (x, y) in enumerate(points)}
    runs["run-0"] |= {"device": "gpu", "seconds": 9.5, "batch_size": 4}  # these change no image
    runs["run-1"]["sampling"]["guidance_rescale"] = 0.0  # what runs from before this option did
    runs["other"] = {"method": {"source": "other"}, "sampling": {"scale": 0.5, "guidance": 3.0}}
    runs["slower"] = {"sampling": {"num_steps": 20, "scale": 0.5, "guidance": 3.0}}

    charts = charts_of(tmp_path, runs)

    metrics = ("clip_i", "clip_t")
    assert [(chart.axis, chart.metric) for chart in charts] == [
        (axis, metric) for axis in ("scale", "guidance") for metric in metrics
    ]
    (series,) = charts[0].series
    assert [(x, score.value) for x, score in series.points] == [(0.0, 0.0), (1.0, 1.0)]
    assert series.title == "IP-Adapter, run"


@pytest.mark.parametrize(
    ("labels", "titles"),
    [
        (("ip_adapter-one", "ip_adapter-one-scale0", "ip_adapter-two-scale0", "ip_adapter-two"), ["one", "two"]),
        (("a", "b", "c", "d"), ["a, b", "c, d"]),
        (("a-0", "a-1", "a-2", "a-3"), ["a-0, a-1", "a-2, a-3"]),
    ],
)
def test_curves_of_one_system_have_different_names(tmp_path: Path, labels: tuple[str, ...], titles: list[str]) -> None:
    """Short ones, of what the labels of their runs share, if that is enough."""
    runs = {
        label: {"method": {"source": str(number // 2)}, "sampling": {"scale": float(number % 2)}}
        for number, label in enumerate(labels)
    }

    assert [each.title for each in charts_of(tmp_path, runs)[0].series] == [f"IP-Adapter, {each}" for each in titles]


def test_a_chart_is_an_svg_with_a_line_for_each_series(evaluation: Evaluation) -> None:
    chart = find_charts(evaluation)[0]
    drawn = svg(draw(chart))

    assert drawn.count(f"stroke: {line_style(0)[0]}; stroke-width: 2") == 1 and line_style(1)[0] not in drawn
    assert describe(chart) == "CLIP-I against λ.\nIP-Adapter, mine: 0.000 at 0, 0.125 at 0.5, 0.250 at 1."
    assert len({line_style(number) for number in range(16)}) == 16


def svg(address: str) -> str:
    """The source of an image in a page."""
    drawn = base64.b64decode(address.removeprefix("data:image/svg+xml;base64,")).decode()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    return drawn


def test_items_of_the_grid_depend_on_the_seed_and_best_and_worst_are_in_order(evaluation: Evaluation) -> None:
    chosen = [[item.id for item in choose_items(evaluation, 3, seed)] for seed in (*range(8), 0)]
    assert chosen[0] == chosen[-1] and len({tuple(ids) for ids in chosen}) > 1
    assert all(ids == sorted(ids) for ids in chosen) and len(choose_items(evaluation, 99, 0)) == 6

    system = choose_system(evaluation, None)
    assert system is not None and system.label == "mine-1.0"
    best, worst = extremes(system, evaluation.items, 4)
    assert [item.id for item in best] == ["item5", "item4", "item3"]
    assert [item.id for item in worst] == ["item0", "item1", "item2"]
    for label in ("style", "theirs"):
        with pytest.raises(UserError, match=rf"system={label}.*CLIP-I.*mine-0, mine-0\.5, mine-1\.0"):
            choose_system(evaluation, label)


def test_bars_show_the_attention_to_the_image_of_each_adapter_once(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    ratios = {"down_blocks.0": 0.25, "$mid$": 1.5, "broken": None}
    for label, found in {"one-scale0": ratios, "one-scale1": ratios, "other": {"mid": 0.1}, "none": None}.items():
        write_run(tmp_path, label, method={"image_attention": found} if found else {})
    bars = {system.label: (drawn, words) for system, drawn, words in find_bars(read_evaluation(tmp_path))}

    assert {label: words for label, (_, words) in bars.items()} == {
        "one-scale0": "down_blocks.0 0.25, $mid$ 1.50",
        "other": "mid 0.10",
    }
    assert svg(bars["one-scale0"][0])
    page = write_report(tmp_path, Shown()).read_text()
    assert 'id="image-attention"' in page and "down_blocks.0 0.25" in page
